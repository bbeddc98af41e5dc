"""How `runkey memory` tells of a prediction: tables for people, a dict for scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from runkey.cli.output import print_table

if TYPE_CHECKING:
    from runkey.memory.model import Estimate
    from runkey.memory.predict import Prediction

_COLUMNS = {
    "parameters": ("parameter", "buffer"),
    "gradients": ("gradient",),
    "optimizer": ("optimizer", "library"),
    "activations": ("activation",),
    "inputs": ("input",),
    "temporary": ("temporary",),
}
"""Columns of the table, each with its classes."""
_TITLES = {
    "checkpointing": "activation checkpointing",
    "bf16": "bf16",
    "fp32": "fp32",
    "smaller images": "images of 3/4 the sides",
    "grouping": "batches grouped by aspect",
    "no grouping": "batches not grouped by aspect",
}
_MIB, _GIB = 2**20, 2**30


def as_dict(prediction: Prediction, images: int) -> dict[str, Any]:
    """memory.json's content, and the breakdown of a micro-batch."""
    from runkey.memory.cards import cards
    from runkey.memory.timeline import break_down

    model = prediction.model
    return asdict(model) | {
        "shown": {
            "images": images,
            "allocated_bytes": prediction.template.peak(prediction.around.worst(images)),
            "upper_bytes": model.gpu.upper(images),
            **asdict(break_down(prediction.trace(images))),
        },
        "cards": [asdict(card) for card in cards(model.gpu)],
    }


def print_memory(prediction: Prediction, images: int) -> None:
    """Four tables: the peak by class and module, what would save, what fits where."""
    model = prediction.model
    height, width = model.census.worst_of(images)
    peak = prediction.template.peak(prediction.around.worst(images))
    for line in model.census.lines():
        print(line)
    print(
        f"\nA training step of {images} images of {height} x {width}, {model.precision}: "
        f"{peak / _GIB:.2f} GiB of tensors at the peak,\nup to {model.gpu.upper(images) / _GIB:.2f}"
        f" GiB held by the allocator, and the CUDA context beside it.  {model.gpu.line}\n"
    )
    _print_breakdown(prediction, images)
    _print_changes(prediction, images)
    _print_cards(prediction)


def _print_breakdown(prediction: Prediction, images: int) -> None:
    from runkey.memory.timeline import break_down

    parts = break_down(prediction.trace(images))
    print(f"Alive at the peak, MiB ({parts.phase} pass)")
    rows = [
        (module or "around the model", sizes)
        for module, sizes in sorted(parts.modules.items(), key=lambda item: -sum(item[1].values()))
    ]
    cells = [[name, *_cells(sizes)] for name, sizes in rows]
    cells.append(["total", *_cells(parts.classes)])
    print_table(["", *_COLUMNS, "sum"], cells, right=[*_COLUMNS, "sum"])


def _cells(sizes: Mapping[Any, int]) -> list[str]:
    """MiB by column and in sum; nothing where there is nothing."""
    columns = [sum(sizes.get(name, 0) for name in names) for names in _COLUMNS.values()]
    return [_mib(size) for size in (*columns, sum(columns))]


def _print_changes(prediction: Prediction, images: int) -> None:
    """What each technique would give, for the same micro-batch."""
    model = prediction.model
    now = model.gpu.upper(images)
    rows = [["as it is", "", f"{now / _GIB:.2f}", ""]]
    for one in model.alternatives:
        upper = one.estimate.upper(images)
        if upper == now:
            continue  # One shape only: grouping changes nothing.
        cells = [_TITLES[one.name], one.change, f"{upper / _GIB:.2f}", f"{upper / now - 1:+.0%}"]
        rows.append(cells)
    print(f"\nWhat changes would give, GiB at most for {images} images")
    print_table(["", "params.yaml", "GiB", "change"], rows, right=["GiB", "change"])


def _print_cards(prediction: Prediction) -> None:
    """The largest micro-batch on common GPUs, as it is and with each change of the step."""
    from runkey.memory.cards import CARDS_GIB, cards

    model = prediction.model
    kinds: list[tuple[str, Estimate]] = [("as it is", model.gpu)]
    kinds += [
        (_TITLES[one.name], one.estimate)
        for one in model.alternatives
        if one.estimate.upper_bytes != model.gpu.upper_bytes
    ]
    names = [f"{gib} GiB" for gib in CARDS_GIB]
    rows = [[name, *(_images(card.images) for card in cards(kind))] for name, kind in kinds]
    print("\nThe largest micro-batch on a GPU of")
    print_table(["", *names], rows, right=names)


def _images(count: int) -> str:
    from runkey.memory.cards import MOST_IMAGES

    return f">{MOST_IMAGES}" if count >= MOST_IMAGES else str(count or "none")


def _mib(size: int) -> str:
    if not size:
        return ""
    return f"{size / _MIB:,.0f}" if size >= 10 * _MIB else f"{size / _MIB:.1f}"
