"""G1: memory predicted against measured on a GPU.

    python -m benchmarks.gpu_memory predict predicted.json          # anywhere, minutes
    python -m benchmarks.gpu_memory measure predicted.json FOLDER   # on a GPU, two minutes

`measure` writes FOLDER/gpu_memory.json, and FOLDER/steps/<configuration>.json for some: every
operation of a step with what the allocator was asked for meanwhile.  Both run without mlflow, dvc
and pycocotools; `--only TEXT` takes the configurations whose name has the text in it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_common import Report
from benchmarks.gpu_steps import (
    end_history,
    log_fake_step,
    log_step,
    replayed,
    start_history,
)
from benchmarks.gpu_workspaces import KernelGpu
from benchmarks.memory_replay import replay_training
from runkey.data.dataset import colour_constants
from runkey.memory.batch_shapes import BatchShapes, ShapeStatistics
from runkey.memory.predict import predict as predict_memory
from runkey.memory.trace.events import MicroBatch
from runkey.memory.trace.record import BatchFields, fixed_matches, recorder, synthetic_batch
from runkey.params import Params, load_params, override
from runkey.pipeline.step_factory import build_step, step_factory
from runkey.training.device import choose_device
from runkey.units import MIB

PRESETS = Path(__file__).parents[1] / "presets"
CLASSES = 91
FIELDS = BatchFields(CLASSES, None)
OBJECTS = 10
STEPS = 3
# What predictions are for where no GPU can be asked.
HOPPER = KernelGpu((9, 0), 91002)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One training."""

    preset: str
    precision: str
    checkpointing: bool
    batch: int
    height: int
    width: int
    logged: bool = False
    """Whether a step's operations are written down."""
    passes: int = 1
    changes: tuple[tuple[str, Any], ...] = ()
    """Other parameters, by dotted name."""

    @property
    def name(self) -> str:
        """For files and messages."""
        kept = "checkpoints" if self.checkpointing else "all"
        shape = f"{self.batch}x{self.height}x{self.width}"
        changed = "".join(f"-{value}" for _, value in self.changes).replace(" ", "")
        return f"{self.preset}{changed}-{self.precision}-{kept}-{shape}-{self.passes}"

    @property
    def shape(self) -> tuple[int, int]:
        """Padded height and width."""
        return self.height, self.width

    @property
    def params(self) -> Params:
        """Its parameters."""
        tree = load_params(PRESETS / f"{self.preset}.yaml").model_dump()
        tree["training"] = tree["training"] | {"precision": self.precision}
        tree["model"] = tree["model"] | {"checkpointing": self.checkpointing}
        return override(Params.model_validate(tree), dict(self.changes))

    @property
    def window(self) -> tuple[MicroBatch, ...]:
        """Its micro-batches."""
        return (MicroBatch(self.batch, self.height, self.width, OBJECTS),) * self.passes


def configurations() -> list[Configuration]:
    """The 64 of G1, by model, and some that other parts of the engine answer for."""
    logged = {("r50", "off", True, (640, 640), 8), ("r50", "off", False, (800, 1333), 2)}
    grid = [
        Configuration(
            f"coco-detr-{backbone}",
            precision,
            kept,
            batch,
            height,
            width,
            (backbone, precision, kept, (height, width), batch) in logged,
        )
        for backbone, precision, kept, (height, width), batch in itertools.product(
            ("r50", "r101"), ("off", "bf16"), (False, True), ((800, 1333), (640, 640)), (1, 2, 4, 8)
        )
    ]
    others = [
        Configuration("coco-detr-r50", "off", False, 2, 800, 1333, logged=True, passes=2),
        Configuration("coco-detr-r50", "bf16", False, 2, 800, 1333, logged=True, passes=2),
        Configuration("coco-detr-r50", "bf16", True, 2, 800, 1333, logged=True, passes=2),
        Configuration("coco-detr-r50", "fp16", False, 3, 750, 1000, logged=True),
        Configuration("sample", "bf16", False, 8, 120, 160, logged=True),
        Configuration("sample", "off", True, 8, 480, 640, logged=True),
    ]
    return grid + others


def stated_bounds(
    params: Params, shape: tuple[int, int], objects: int, classes: int, images: int
) -> tuple[int, ...]:
    """Most bytes that the allocator holds, for micro-batches of 1, 2, ... images of one shape.

    Args:
        params: what is trained.
        shape: padded (height, width), pixels.
        objects: boxes of an image.
        classes: K.
        images: most images.
    """
    statistics = ShapeStatistics(1, 1, shape, shape, shape, shape, (objects,))

    def sample(count: int, batches: int) -> list[tuple[MicroBatch, ...]]:
        one = MicroBatch(count, *shape, objects)
        return [(one,), (one, one)] * (batches // 3)

    shapes = BatchShapes(statistics, lambda _: statistics, sample, classes)
    params = override(params, {"training.batch_size": images})
    predicted = predict_memory(
        params, shapes, lambda changed: step_factory(changed, classes), alternatives=False
    )
    return predicted.model.gpu.upper_bytes


def bodies() -> list[Configuration]:
    """The 8 of G10: pretrained and timm bodies, several levels, shapes that G1 lacks."""
    weights = ("model.backbone_weights", "none")

    def of(preset: str, precision: str, batch: int, height: int, width: int, **model: Any) -> Any:
        changes = tuple((f"model.{name}", value) for name, value in model.items())
        return Configuration(
            preset, precision, False, batch, height, width, changes=(weights, *changes)
        )

    return [
        of("photos", "bf16", 16, 384, 512),
        of("photos", "off", 8, 608, 800, feature_strides=[8, 16]),
        of("photos", "bf16", 8, 480, 640, backbone="timm:convnext_tiny"),
        of("photos", "off", 4, 512, 512, backbone="timm:vit_small_patch16_224", frozen_stages=0),
        of("photos", "bf16", 8, 576, 768, backbone="timm:resnet18", frozen_stages=0),
        of("photos", "off", 8, 448, 448, backbone="resnet50", frozen_stages=2),
        of("coco-detr-r50", "bf16", 6, 704, 1056, dilation=True),
        of("coco-detr-r101", "bf16", 3, 1056, 704),
    ]


def check_bodies(device: torch.device, report_: Report, _: Path) -> None:
    """G10: predicted against measured memory, one configuration after the other.

    Without a GPU the first one alone is predicted, which tries the script itself.
    """
    if device.type != "cuda":
        small = Configuration("sample", "off", False, 2, 60, 80)
        report_.add("predicted", predict([small], HOPPER))
        return
    for one in bodies():
        if report_.seconds_left < 25:
            report_.leave_out(one.name)
            continue
        predicted = predict([one], present_gpu())
        (row,) = report(predicted, list(measure([one], report_.path.parent)))["configurations"]
        report_.add("configurations", [row])
        if abs(row["errors"]["allocated"]) > 0.03 or row["above_bound"]:
            report_.add("not_within_3_percent", [one.name])


def predict(chosen: list[Configuration], gpu: KernelGpu) -> dict[str, Any]:
    """Allocated and reserved bytes of each, alone in its process, after `STEPS` steps."""
    predicted: dict[str, Any] = {}
    models = itertools.groupby(
        chosen, key=lambda c: (c.preset, c.precision, c.checkpointing, c.changes)
    )
    for _, group in models:
        predicted |= _predict_model(list(group), gpu)
    return {"gpu": asdict(gpu), "torch": torch.__version__, "configurations": predicted}


def _predict_model(group: list[Configuration], gpu: KernelGpu) -> dict[str, Any]:
    params = group[0].params
    predicted = {}
    recorded = []
    for configuration in group:
        with recorder(step_factory(params, CLASSES), FIELDS, gpu) as one:
            steps = [one.step(configuration.window) for _ in range(2)]
            if configuration.logged:
                log = log_fake_step(one, configuration.window)
                predicted[configuration.name] = {"log": log}
            recorded.append((one.setup, steps))
    bounds = {
        shape: stated_bounds(params, shape, OBJECTS, CLASSES, images=8)
        for shape in dict.fromkeys(configuration.shape for configuration in group)
    }
    for configuration, (setup, (first, steady)) in zip(group, recorded, strict=True):
        result = replay_training(setup, first, [steady] * (STEPS - 1))
        content = {
            "allocated": result.allocated,
            "reserved": result.reserved,
            "upper": bounds[configuration.shape][configuration.batch - 1],
        }
        predicted[configuration.name] = predicted.get(configuration.name, {}) | content
        used, held = result.allocated / MIB, result.reserved / MIB
        print(f"{configuration.name}: {used:.1f} {held:.0f} MiB", flush=True)
    return predicted


def measure(chosen: list[Configuration], folder: Path) -> Iterator[dict[str, Any]]:
    """The same numbers from the GPU."""
    # As training does it: with expandable segments.
    device, _ = choose_device("cuda")
    for configuration in chosen:
        start = time.perf_counter()
        clean_up()
        left = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if configuration.logged:
            start_history()
        trained = build_step(configuration.params, CLASSES, device)
        window = tuple(synthetic_batch(one, FIELDS) for one in configuration.window)
        built = torch.cuda.memory_allocated()
        with fixed_matches():
            for _ in range(STEPS):
                trained.step(window)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        row = {
            "name": configuration.name,
            "left": left,
            "built": built,
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "outside": total - free - torch.cuda.memory_reserved(),
            "outside_at_most": present_gpu().context_bytes,
            "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        }
        if configuration.logged:
            row["allocator"] = replayed(end_history())
            (folder / "steps").mkdir(parents=True, exist_ok=True)
            with fixed_matches():
                text = json.dumps(log_step(trained, window))
            (folder / "steps" / f"{configuration.name}.json").write_text(text)
        row["seconds"] = round(time.perf_counter() - start, 2)
        del trained, window
        yield row


def clean_up() -> None:
    """Give back what the last training held, the libraries' workspaces too."""
    gc.collect()
    colour_constants.cache_clear()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def report(predicted: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Both side by side, and how far apart they are."""
    errors = []
    for row in rows:
        wanted = predicted["configurations"].get(row["name"])
        if wanted is None:
            continue
        row["predicted"] = {name: wanted[name] for name in ("allocated", "reserved", "upper")}
        row["above_bound"] = row["reserved"] > wanted["upper"]
        row["errors"] = {name: wanted[name] / row[name] - 1 for name in ("allocated", "reserved")}
        errors.append(row["errors"]["allocated"])
        print(
            f"{row['name']:45} allocated {row['allocated'] / MIB:8.1f} MiB "
            f"{row['errors']['allocated']:+7.2%}, reserved {row['reserved'] / MIB:6.0f} MiB "
            f"{row['errors']['reserved']:+7.2%}{' ABOVE THE BOUND' if row['above_bound'] else ''}"
        )
    worst = max(map(abs, errors), default=None)
    print(f"{len(errors)} configurations; worst error of allocated: {worst}")
    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "predicted_with": {name: predicted[name] for name in ("gpu", "torch")},
        "worst_error": worst,
        "above_the_bound": [row["name"] for row in rows if row.get("above_bound")],
        "configurations": rows,
    }


def present_gpu() -> KernelGpu:
    """Return the GPU that torch would use; torch must see one."""
    properties = torch.cuda.get_device_properties(0)
    return KernelGpu(
        (properties.major, properties.minor),
        torch.backends.cudnn.version() or 0,
        properties.multi_processor_count,
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["predict", "measure"])
    parser.add_argument("predictions", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    chosen = [one for one in configurations() if arguments.only in one.name]
    if arguments.what == "predict":
        gpu = present_gpu() if torch.cuda.is_available() else HOPPER
        arguments.predictions.write_text(json.dumps(predict(chosen, gpu)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    predicted = json.loads(arguments.predictions.read_text())
    rows = []
    for row in measure(chosen, arguments.folder):
        rows.append(row)
        # After each one: a run that is cut short leaves what it has.
        text = json.dumps(report(predicted, rows), indent=1)
        (arguments.folder / "gpu_memory.json").write_text(text)


if __name__ == "__main__":
    main()
