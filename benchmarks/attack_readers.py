"""What reads files beside the commands of `runkey`, for `benchmarks.attack`: stages and loaders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from runkey.data.image_list import read_image_list
from runkey.data.index import index_file, read_classes, read_index
from runkey.data.prepare import prepare
from runkey.files import read_plain
from runkey.identity.dvc_yaml import tracked_md5
from runkey.identity.record import RunManifest, RunPointer
from runkey.inference.model import find_thresholds, load_model_folder
from runkey.memory.batch_shapes import prepared_shapes
from runkey.model.weights import load_model
from runkey.params import load_params, render
from runkey.pipeline.prepare import own_data_note
from runkey.plots.curves import write_plot_tables, write_training_plots
from runkey.plots.evaluation import write_evaluation_plots
from runkey.registry.archive import check_weights
from runkey.tracking.describe import read_dataset
from runkey.tracking.log import JsonlLog
from runkey.training.checkpoint import newest_fingerprint

Names = Mapping[str, str]


def _preset(root: Path, _: Names) -> None:
    render.main([str(root / "presets" / "sample.yaml")])


def _curves(root: Path, _: Names) -> None:
    (root / "plots").mkdir(exist_ok=True)
    write_plot_tables(root / "logs" / "train.jsonl", root / "plots")
    write_training_plots(root / "logs" / "train.jsonl", root / "plots")


def _evaluation(root: Path, _: Names) -> None:
    (root / "plots").mkdir(exist_ok=True)
    where = (root / "prepared", root / "evaluation", root / "data", root / "plots")
    write_evaluation_plots(*where, images=2)


def _prepare(root: Path, _: Names) -> None:
    """The stage, without its look at data.dvc, which refuses any changed file at once."""
    params = load_params(root / "params.yaml")
    prepare(params.data, root, root / "prepared", params.model.num_queries)


def _prepared(root: Path, _: Names) -> None:
    prepared = root / "prepared"
    read_classes(prepared / "classes.json")
    for split in ("train", "val"):
        read_index(index_file(prepared, split))
    read_image_list(read_plain(prepared / "images.json"), "images.json")
    prepared_shapes(load_params(root / "params.yaml"), prepared)


def _resume(root: Path, names: Names) -> None:
    path = root / ".runkey" / names["OTHER"] / "train.jsonl"
    log = JsonlLog(path, quiet=True)
    log.resume({"log_bytes": 100})
    log.log({"train/loss": 1.0}, 5)
    log.close()


def _checkpoint(root: Path, names: Names) -> None:
    from runkey.training.checkpoint import FolderCheckpoints, Interval
    from tests.support.checkpoint_kit import FINGERPRINT

    folder = root / ".runkey" / names["OTHER"]
    newest_fingerprint(folder)
    FolderCheckpoints(folder, FINGERPRINT, interval=Interval(0), retry_seconds=0.0).load()


def _export(root: Path, name: str) -> None:
    """Run an export on an image, which also its network answers."""
    image = root / "data" / "train" / "train_1.png"
    load_model_folder(root / name, "cpu")(image, score="auto")


READERS: dict[str, Callable[[Path, Names], object]] = {
    "stage:prepare": _prepare,
    "stage:own_data_note": lambda root, _: own_data_note(root),
    "read:preset": _preset,
    "read:curves": _curves,
    "read:evaluation": _evaluation,
    "read:prepared": _prepared,
    "read:resume": _resume,
    "read:checkpoint": _checkpoint,
    "read:manifest": lambda root, _: RunManifest.read(root / "run.json"),
    "read:pointer": lambda root, names: RunPointer.read(root / ".runkey" / names["OTHER"]),
    "read:dataset": lambda root, _: read_dataset(root, "data", {}),
    "read:part": lambda root, _: tracked_md5("data/train", root),
    "read:predictor": lambda root, _: load_model_folder(root / "model", "cpu"),
    "read:thresholds": lambda root, _: find_thresholds(root / "model"),
    "read:export": lambda root, _: _export(root, "export"),
    "read:onnx": lambda root, _: _export(root, "export/model.onnx"),
    "read:model": lambda root, _: load_model(root / "model"),
    "read:check": lambda root, _: check_weights(
        root / "model" / "weights.safetensors", "weights.safetensors"
    ),
}
