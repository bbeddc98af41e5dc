"""`runkey memory`: predict the memory of a training step, without a GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from runkey import paths
from runkey.cli import output
from runkey.cli.output import AsJson
from runkey.errors import DataError, ParamsError
from runkey.files import FormatError
from runkey.progress import say
from runkey.units import GIB, MIB, counted

if TYPE_CHECKING:
    from runkey.memory.batch_shapes import BatchShapes
    from runkey.memory.predict import Alternative, MemoryModel, Prediction
    from runkey.params import Params


Changes = Annotated[
    list[str] | None,
    Option("--set-param", "-S", help="NAME=VALUE instead of params.yaml's; repeatable."),
]
_COLUMNS = {
    "parameters": ("parameter", "buffer"),
    "gradients": ("gradient",),
    "optimizer": ("optimizer", "library"),
    "activations": ("activation",),
    "inputs": ("input",),
    "temporary": ("temporary",),
}
"""Columns of the table, and the classes of tensors in each."""
_TITLES = {
    "checkpointing": "activation checkpointing",
    "smaller images": "images of 3/4 the sides",
    "grouping": "batches grouped by aspect",
    "no grouping": "batches not grouped by aspect",
}


def as_dict(prediction: Prediction, images: int) -> dict[str, Any]:
    """Format for JSON: the content of memory.json, and the breakdown of a micro-batch."""
    from runkey.memory.choose import cards
    from runkey.memory.trace.events import break_down

    model = prediction.model
    return model.as_dict() | {
        "shown": {
            "images": images,
            "allocated_bytes": prediction.peak(images),
            "upper_bytes": model.gpu.upper(images),
            **asdict(break_down(prediction.trace(images))),
        },
        "cards": [asdict(card) for card in cards(model.gpu)],
    }


def print_memory(prediction: Prediction, images: int) -> None:
    """Print the peak by class and module, what changes would save, and what fits which GPU."""
    model = prediction.model
    height, width = model.shapes.worst_of(images)
    peak = prediction.peak(images)
    say(*model.shapes.lines())
    say(
        f"\nA training step of {counted(images, 'image')} of {height} x {width},"
        f" {model.precision}: {peak / GIB:.2f} GiB of tensors at the peak,\n"
        f"up to {model.gpu.upper(images) / GIB:.2f} GiB held by the allocator, and the CUDA"
        f" context beside it.  {model.gpu.line}\n"
    )
    _print_breakdown(prediction, images)
    _print_changes(model, images)
    _print_cards(model)


def _print_breakdown(prediction: Prediction, images: int) -> None:
    from runkey.memory.trace.events import break_down

    parts = break_down(prediction.trace(images))
    say(f"Alive at the peak, MiB ({parts.phase} pass)")
    largest_first = sorted(parts.modules.items(), key=lambda item: -sum(item[1].values()))
    rows = [[name or "around the model", *_cells(sizes)] for name, sizes in largest_first]
    rows.append(["total", *_cells(parts.classes)])
    output.print_table(["", *_COLUMNS, "sum"], rows, right=[*_COLUMNS, "sum"])


def _cells(sizes: Mapping[Any, int]) -> list[str]:
    """MiB by column, and the sum; empty where it is 0."""
    columns = [sum(sizes.get(name, 0) for name in names) for names in _COLUMNS.values()]
    return [_mib(size) for size in (*columns, sum(columns))]


def _print_changes(model: MemoryModel, images: int) -> None:
    """The memory of the same micro-batch with each technique."""
    now = model.gpu.upper(images)
    rows = [["as it is", "", f"{now / GIB:.2f}", ""]]
    for one in model.alternatives:
        upper = one.estimate.upper(images)
        if upper != now:  # with one shape only, grouping changes nothing
            rows.append([_title(one), one.change, f"{upper / GIB:.2f}", f"{upper / now - 1:+.0%}"])
    say(f"\nWhat changes would give, GiB at most for {counted(images, 'image')}")
    output.print_table(["", "params.yaml", "GiB", "change"], rows, right=["GiB", "change"])


def _title(alternative: Alternative) -> str:
    return _TITLES.get(alternative.name, alternative.name)


def _print_cards(model: MemoryModel) -> None:
    """The largest micro-batch on common GPUs, as it is and with each technique."""
    from runkey.memory.choose import CARDS_GIB, MOST_IMAGES, cards

    def images(count: int) -> str:
        return f">{MOST_IMAGES}" if count >= MOST_IMAGES else str(count or "none")

    others = [o for o in model.alternatives if o.estimate.upper_bytes != model.gpu.upper_bytes]
    kinds = [("as it is", model.gpu), *((_title(one), one.estimate) for one in others)]
    names = [f"{gib} GiB" for gib in CARDS_GIB]
    rows = [[name, *(images(card.images) for card in cards(kind))] for name, kind in kinds]
    say("\nThe largest micro-batch on a GPU of")
    output.print_table(["", *names], rows, right=names)


def _mib(size: int) -> str:
    if not size:
        return ""
    return f"{size / MIB:,.0f}" if size >= 10 * MIB else f"{size / MIB:.1f}"


# Without data, assume the objects and classes of COCO's crowded images.
_OBJECTS = 60
_CLASSES = 80


def memory(
    changes: Changes = None,
    shape: Annotated[
        str, Option(help="Padded HEIGHTxWIDTH of every batch; needs no prepared data.")
    ] = "",
    batch: Annotated[
        int, Option(min=0, help="Images of a forward pass; 0: as many as fit the budget.")
    ] = 0,
    picture: Annotated[
        Path | None, Option(help="Folder for timeline.png and timeline.svg.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the memory of a training step: by class, by module, on common GPUs."""
    from runkey.params import load_params, override

    root = output.workspace()
    params = override(load_params(root / paths.PARAMS), parse_changes(changes or []))
    if batch > params.training.batch_size:
        params = override(params, {"training.batch_size": batch})
    # Hide the GPU from torch, so that the prediction is the same with and without one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    shapes = _batch_shapes(params, root, shape)
    from runkey.memory.choose import shown_images
    from runkey.memory.predict import predict
    from runkey.pipeline.step_factory import step_factory

    prediction = predict(params, shapes, lambda other: step_factory(other, shapes.num_classes))
    budget = params.memory.budget_gib
    budget_gib = None if budget == "device" else budget
    images = batch or shown_images(prediction.model, budget_gib)
    if picture is not None:
        from runkey.plots.memory import draw_step

        draw_step(prediction, images, picture, budget_gib)
    if as_json:
        output.print_json(as_dict(prediction, images))
    else:
        print_memory(prediction, images)


def parse_changes(changes: list[str]) -> dict[str, Any]:
    """Return values by name, read as YAML 1.2, as in `dvc exp run -S`."""
    from runkey.params.load import parse_yaml

    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not (name and equals):
            raise ParamsError(f"-S {change}: not NAME=VALUE, such as model.backbone=resnet101")
        try:
            values[name] = parse_yaml(text)
        except FormatError as error:
            raise ParamsError(f"-S {change}: the value is {error}") from None
    return values


def _batch_shapes(params: Params, root: Path, shape: str) -> BatchShapes:
    """The batches of the prepared data, or of one shape."""
    from runkey.data.index import index_file
    from runkey.memory.batch_shapes import prepared_shapes, single_shape

    if not shape:
        prepared = root / paths.PREPARED
        index = index_file(prepared, "train")
        if not index.is_file():
            raise DataError(
                f"{index}: not found; run `dvc repro prepare`, or name a shape: "
                "`runkey memory --shape 800x1333`"
            )
        return prepared_shapes(params, prepared)
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if not found:
        raise ParamsError(f"--shape {shape}: not HEIGHTxWIDTH in pixels, such as 800x1333")
    size = int(found[1]), int(found[2])
    objects = min(_OBJECTS, params.model.num_queries)
    return single_shape(params, size, objects=objects, num_classes=_CLASSES)
