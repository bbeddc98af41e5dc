"""The one published number for this job: mmdetection's DETR-R50, 2 images a GPU, 7.9 GB.

    python -m benchmarks.memory_anchor       # no GPU, a minute; the table of results/memory.md

mmdetection 2 (configs/detr/metafile.yml: V100, fp32, "Training Memory (GB): 7.9", the largest
`max_memory_allocated` of 8 GPUs over a training).  Predicted is our step in that set-up; then what
theirs does otherwise is added piece by piece, in our model.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from benchmarks.gpu_kernels import AnyGpu
from runkey.memory.predict import batch_fields
from runkey.memory.trace.events import MicroBatch, round_up, timeline_of
from runkey.memory.trace.record import recorder
from runkey.params import load_params, override
from runkey.pipeline.step_factory import step_factory
from runkey.units import MIB

ROOT = Path(__file__).parents[1]
CLASSES = 80
V100 = AnyGpu((7, 0))
PUBLISHED_GB = 7.9
WORST = MicroBatch(2, 1333, 1333, 30)
"""The worst batch of their training is not published.  Taken is what its transforms can reach: the
originals of a batch are of one aspect, but a crop of one may be of the other."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to train."""

    title: str
    changes: dict[str, object]
    one: MicroBatch
    materialised: bool = False
    """Attention keeps its maps, as `nn.MultiheadAttention` with weights does."""
    keeps_gradients: bool = False
    """They are there in the forward pass, zeroed: torch's default before 2.0."""
    buckets: bool = False
    """Of DistributedDataParallel: the gradients once more."""


OURS = {"training.precision": "off", "training.batch_size": 2, "data.group_by_aspect": False}
BATCH_NORM = {"model.norm": "live"}
WAYS = (
    Way("ours, batches grouped by aspect", OURS, MicroBatch(2, 800, 1333, 30)),
    Way("ours, as mmdetection batches", OURS, WORST),
    Way("+ batch norm that is not folded into convolutions", OURS | BATCH_NORM, WORST),
    Way("+ attention maps kept", OURS | BATCH_NORM, WORST, materialised=True),
    Way("+ gradients kept", OURS | BATCH_NORM, WORST, materialised=True, keeps_gradients=True),
    Way(
        "+ buckets of data parallel training",
        OURS | BATCH_NORM,
        WORST,
        materialised=True,
        keeps_gradients=True,
        buckets=True,
    ),
)


def peak_bytes(way: Way) -> int:
    """Most that tensors take in a step."""
    params = override(load_params(ROOT / "presets" / "coco-detr-r50.yaml"), way.changes)
    with ExitStack() as stack:
        if way.materialised:
            stack.enter_context(patch.object(AnyGpu, "kernel", lambda *_: "math"))
        fields = batch_fields(params, CLASSES)
        one = stack.enter_context(recorder(step_factory(params, CLASSES), fields, V100))
        window = (way.one,) * (2 if way.keeps_gradients else 1)
        one.step(window[:1])
        trace = one.step(window)
    gradients = sum(round_up(e.bytes) for e in trace.before if e.class_ == "gradient")
    return timeline_of(trace).peak_bytes + (gradients if way.buckets else 0)


def main() -> None:
    """Predict and print a table's rows."""
    print("| predicted | images x height x width | MiB | GB | against 7.9 GB |")
    print("|---|---|---|---|---|")
    for way in WAYS:
        size = peak_bytes(way)
        print(
            f"| {way.title} | {way.one.images} x {way.one.height} x {way.one.width} "
            f"| {size / MIB:,.0f} | {size / 1e9:.2f} | {size / 1e9 / PUBLISHED_GB - 1:+.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
