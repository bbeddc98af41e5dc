"""A checkout in which everything lies that a command reads, made in seconds: nothing is trained.

Data, prepared/, model/, evaluation/ and logs/ are made by the stages' own code; the runs of the
store are recorded as training records them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from runkey.data.index import ClassName, read_classes
from runkey.data.prepare import prepare
from runkey.errors import LockError
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.files import RESAMPLED, write_results
from runkey.identity.key import Recipe, make_recipe
from runkey.identity.record import Hardware, RunManifest, RunPointer, capture_environment
from runkey.inference.export import write_export
from runkey.inference.extras import import_extra
from runkey.inference.module import EXPORTED
from runkey.inference.networks import Card
from runkey.model.detr import build_model
from runkey.model.weights import CardClass, ModelCard, Sizes, load_model, save_model
from runkey.params import load_params, parse_params
from runkey.params.render import render
from runkey.registry.archive import pack
from runkey.registry.claims import Claim, FileClaims, this_owner
from runkey.tracking.describe import RunDescription
from runkey.tracking.store import Store, experiment_id, open_client
from runkey.training.checkpoint import FolderCheckpoints, Interval
from tests.support.checkpoint_kit import FINGERPRINT, Training
from tests.support.exportable import write_best_scores
from tests.support.logs import write_log
from tests.support.project import REPOSITORY, TINY, draw_data
from tests.support.records import key_of, make_run
from tests.support.report_runs import SIZES, files_of
from tests.support.run_package import RECIPE, git, make_ready

_CPU = Hardware(device="cpu x86_64", micro_batch=4, world_size=1, threads=1)
_RESAMPLES = json.dumps(
    {"truth": "0" * 64, "deviations": {"AP": 2.0, "AP50": 2.0}}
    | {name: [0.4, None, 0.5, 0.6] for name in ("AP", "AP50")}
).encode()
OTHER = key_of("other")
"""Key of a training that was interrupted."""


def make_checkout(root: Path) -> None:
    """Make it in an empty folder."""
    _tracked_files(root)
    params = load_params(root / "params.yaml")
    prepare(params.data, root, root / "prepared", params.model.num_queries)
    _results(root)
    _other_labels(root)
    recipe = make_recipe("train", root, params)
    _runs(root, recipe)
    ready = make_ready(root.parent / "ready")
    pack(ready.folder, RECIPE.key, root / "run.zip")
    shutil.rmtree(root.parent / "ready")


def _tracked_files(root: Path) -> None:
    for name in ("runkey", "stages", "presets"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, root / name, ignore=ignored)
    for name in ("dvc.yaml", "requirements.txt", ".gitignore", ".dvcignore"):
        shutil.copy(REPOSITORY / name, root / name)
    # Of the packages a few: each key of an attack reads the file.
    parts = (REPOSITORY / "conda-lock.yml").read_text().split("\n- name: ")
    (root / "conda-lock.yml").write_text("\n- name: ".join(parts[:20]) + "\n")
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n    remote = seed\n")
    (root / "params.yaml").write_text(render(parse_params(TINY), "# tiny"))
    short = [line for line in (root / "params.yaml").read_text().splitlines() if line.strip()]
    short = [line for line in short if not line.lstrip().startswith("#")]
    (root / "params.yaml").write_text("\n".join(short) + "\n")
    draw_data(root / "data")
    listed = [
        {
            "md5": _cached(root, path.read_bytes()),
            "relpath": path.relative_to(root / "data").as_posix(),
        }
        for path in sorted((root / "data").rglob("*"))
        if path.is_file()
    ]
    md5 = _cached(root, json.dumps(listed).encode(), ".dir")
    (root / "data.dvc").write_text(
        f"outs:\n- md5: {md5}\n  size: 1\n  nfiles: {len(listed)}\n  hash: md5\n  path: data\n"
    )
    (root / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  prepare:\n    cmd: python -m stages.prepare\n    deps:\n"
        f"    - path: data\n      hash: md5\n      md5: {md5}\n      size: 1\n"
    )
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "start")


def _cached(root: Path, content: bytes, suffix: str = "") -> str:
    md5 = hashlib.md5(content).hexdigest() + suffix
    path = root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5


def _results(root: Path) -> None:
    """What the stages train and evaluate leave."""
    params = load_params(root / "params.yaml")
    classes = read_classes(root / "prepared" / "classes.json")
    torch.manual_seed(0)
    model = build_model(params.model, len(classes))
    sizes = Sizes(params.data.short_sides[-1], params.data.long_side)
    rows = tuple(CardClass(c.index, c.id, c.name) for c in classes)
    save_model(root / "model", model.state_dict(), ModelCard(params.model, rows, sizes))
    (root / "logs").mkdir()
    write_log(root / "logs" / "train.jsonl", epochs=3)
    (root / "logs" / "system.jsonl").write_text(
        '{"time": 1, "values": {"system/cpu_utilization_percentage": 50}}\n' * 3
    )
    _evaluation(root / "evaluation", [one.name for one in classes])
    write_best_scores(root / "model", **{one.name: 0.25 for one in classes})
    (root / "model" / "thresholds.json").rename(root / "evaluation" / "thresholds.json")
    _export(root)
    (root / "metrics").mkdir()
    numbers = {"seconds": 61.5, "best_epoch": 2, "best_step": 4, "epochs": 2}
    (root / "metrics" / "train.json").write_text(json.dumps(numbers))
    (root / "metrics" / "evaluate.json").write_text('{"AP": 0.5, "AP50": 0.7, "AP75": null}')


def _export(root: Path) -> None:
    """What `runkey export-model` writes; nothing without the packages of `make env-export`."""
    try:
        import_extra("onnx")
        import_extra("onnxruntime")
    except LockError:
        return
    detector, card = load_model(root / "model")
    made: Card = {
        "format": 1,
        "key": None,
        "export": "onnx",
        "precision": "fp32",
        "file": "model.onnx",
        "classes": [{"index": one.index, "id": one.id, "name": one.name} for one in card.classes],
        "sizes": {
            "short_side": card.sizes.short_side,
            "long_side": card.sizes.long_side,
            "intensity_range": None,
        },
        "thresholds": {one.name: 0.25 for one in card.classes},
    }
    write_export(detector, made, root / "export", options=EXPORTED)


def _other_labels(root: Path) -> None:
    """What `runkey convert` reads: twelve images each for YOLO and for Pascal VOC."""
    yolo, voc = root / "yolo", root / "voc"
    for folder in ("images/train", "images/val", "labels/train", "labels/val"):
        (yolo / folder).mkdir(parents=True)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    folders = "path: /data/set\ntrain: images/train\nval: images/val\n"
    (yolo / "data.yaml").write_text(f"{folders}nc: 2\nnames:\n  0: red\n  1: blue\n")
    for number in range(1, 13):
        picture = root / "data" / "train" / f"train_{number}.png"
        split = "train" if number % 2 else "val"
        shutil.copy(picture, yolo / "images" / split / f"{number}.png")
        (yolo / "labels" / split / f"{number}.txt").write_text(
            "0 0.5 0.5 0.25 0.4\n1 0.25 0.3 0.125 0.2\n0 0.1 0.2 0.5 0.2 0.3 0.6\n"
        )
        shutil.copy(picture, voc / "JPEGImages" / f"{number}.png")
        objects = "".join(
            f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{left}</xmin>"
            "<ymin>9</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>"
            for name, left in (("red", 4), ("blue", 12))
        )
        size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
        (voc / "Annotations" / f"{number}.xml").write_text(
            f"<annotation><filename>{number}.png</filename>{size}{objects}</annotation>"
        )
    for split, first in (("train", 1), ("val", 7)):
        lines = (f"{number}\n" for number in range(first, first + 6))
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(lines))
    (root / ".venv-convert").symlink_to(REPOSITORY / ".venv-convert")


def _evaluation(folder: Path, names: list[str]) -> None:
    folder.mkdir()
    one = {"AP": 0.4, "AP50": 0.6, "AR": 0.5, "objects": 6, "by_size": SIZES}
    whole = {"AP": 0.4, "AP50": 0.6, "AP_small": None, "loss": 2.5}
    (folder / "metrics.json").write_text(
        json.dumps(whole | {"per_class": dict.fromkeys(names, one)})
    )
    curve = {"iou": [0.5, 0.75], "recall": [0.0, 0.5, 1.0]}
    classes = [
        {"name": name, "objects": 6, "ap": 0.4, "precision": [[1, 0.5, 0], [0.5, 0.2, 0]]}
        for name in names
    ]
    (folder / "precision_recall.json").write_text(json.dumps(curve | {"classes": classes}))
    found: Any = [
        {"image_id": image, "category_id": 3, "bbox": [4.0, 4.0, 16.0, 14.0], "score": 0.9}
        for image in range(1, 7)
    ]
    kite = [ClassName(0, 3, "kite")]
    write_results(folder / "predictions.json", DetectionArrays.from_results(found, kite), kite)
    (folder / RESAMPLED).write_bytes(_RESAMPLES)


def _runs(root: Path, recipe: Recipe) -> None:
    home, database = root / ".runkey", root / "mlflow.db"
    home.mkdir(exist_ok=True)
    store = Store(f"sqlite:///{database}", root / "mlartifacts", home)
    client = open_client(store)
    place = experiment_id(client, store, "tiny")
    logged = client.create_run(place, run_name="done", tags={"key": recipe.key}).info.run_id
    client.log_param(logged, "key", recipe.key)
    client.set_terminated(logged, "FINISHED")
    parts = {f"key.{part}": digest for part, digest in recipe.parts.items()}
    key_json = json.dumps(recipe.as_dict()).encode()
    (root / "model" / "key.json").write_bytes(key_json)
    folder = root.parent / "files"
    folder.mkdir()
    files = files_of(folder, "complete", 0.5) | {"model/key.json": key_json, "run.json": b"{}"}
    files[f"evaluation/{RESAMPLED}"] = _RESAMPLES
    shutil.rmtree(folder)
    hint = {"event.hint.overfit": '{"seen": "a gap", "change": "more data"}'}
    done = make_run(
        root,
        recipe.key,
        logged,
        files=files,
        params={"lr": "0.001", "seed": "0", "key": recipe.key, **parts},
        tags={"key": recipe.key, "device": "cpu", **hint},
    )
    assert done.details
    artifacts = root / "mlartifacts" / done.run.run_id / "artifacts"
    (artifacts / "record.json").write_text(done.details.as_json())
    make_run(root, OTHER, status="RUNNING", with_details=False, name="interrupted")
    environment = capture_environment(root, recipe, _CPU)
    manifest = RunManifest(
        key=recipe.key,
        stage="train",
        parts=recipe.parts,
        run_id=done.run.run_id,
        witness=environment,
    )
    manifest.write(root / "run.json")
    claims = FileClaims(home / "claims")
    for key, state in ((recipe.key, "finished"), (OTHER, "running")):
        run_id = done.run.run_id if state == "finished" else "b" * 32
        assert claims.make(
            Claim(key=key, generation=1, owner=this_owner(), state=state, run_id=run_id, since_ms=1)  # type: ignore[arg-type]
        )
    training = home / OTHER
    write_log(training / "train.jsonl", epochs=1)
    RunPointer(store.uri, run_id="b" * 32, sent={"train.jsonl": 10}).write(training)
    about = {"experiment": "tiny", "description": asdict(RunDescription("x", {"key": OTHER}, {}))}
    (training / "description.json").write_text(json.dumps(about))
    kit = Training()
    for _ in range(2):
        kit.step()
        kit.evaluate()
        checkpoints = FolderCheckpoints(
            training, FINGERPRINT, interval=Interval(0), retry_seconds=0
        )
        checkpoints.save(kit.checkpoint(), wait=True)
