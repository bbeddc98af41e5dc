"""Cost of augmentation: CPU ms to make a training image of a batch, with the cache and without.

    python benchmarks/augment.py --prepared CHECKOUT [--prepared CHECKOUT] [--rounds 5]

Each CHECKOUT is a repository whose `prepare` has run with a cache, with params.yaml and data.  One
process makes the same images under every setting in turn, so that what else the machine does meets
all of them alike.  torch uses one thread.  `results/augment.md` is written anew.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from runkey import paths
from runkey.data.loader import TrainLoader, build_train_loader
from runkey.data.sampler import micro_batches
from runkey.params import Params, load_params

RESULT = Path(__file__).parent / "results" / "augment.md"
PLAIN = {"zoom": 0.0, "aspect": 0.0, "shift": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "resized only": PLAIN,
    "zoom 0.25, aspect 0.1, shift 0.1": {},
    "and `zoom_out_probability` 1": {"zoom_out_probability": 1.0},
    "and `crop_probability` 1, `crop_fraction` 0.5": {
        "crop_probability": 1.0,
        "crop_fraction": 0.5,
    },
    "and `mosaic_probability` 1": {"mosaic_probability": 1.0},
}
_IMAGES = 160


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prepared", type=Path, action="append", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    text = "# Cost of augmentation\n\n"
    text += "`python benchmarks/augment.py --prepared CHECKOUT ...`, "
    text += f"{date.today()}; {os.cpu_count()} cores ({platform.machine()}), CPU time of one, "
    text += (
        f"Python {platform.python_version()}, torch {torch.__version__}; {chosen.rounds} rounds of "
    )
    text += (
        f"{_IMAGES} images, all settings in turn; medians, with the least and the most. Draws are "
    )
    text += "those of the sampler, in ms an image; colour is applied on the device.\n"
    for root in chosen.prepared:
        text += _measured(root.resolve(), chosen.rounds)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    text += f"\nLoad at the end: {load}.\n"
    RESULT.write_text(text, encoding="utf-8")
    print(text)


def _measured(root: Path, rounds: int) -> str:
    """The table of a checkout."""
    params = load_params(root / paths.PARAMS)
    loaders = {name: _loader(params, root, values) for name, values in SETTINGS.items()}
    cached: dict[str, list[float]] = {name: [] for name in SETTINGS}
    decoded: dict[str, list[float]] = {name: [] for name in SETTINGS}
    drawn: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for number in range(rounds):
        for name, loader in loaders.items():
            start = time.process_time()
            batches = loader.sampler.global_batches(number)
            drawn[name].append((time.process_time() - start) / len(loader.sampler.ids))
            del batches
            cached[name].append(_seconds(loader, number))
            decoded[name].append(_seconds(_without_cache(loader), number))
    size, count = params.data, len(next(iter(loaders.values())).sampler.ids)
    lines = [
        f"\n## {count} images, `short_sides` {list(size.short_sides)}, `long_side` "
        f"{size.long_side}\n\n| setting | from the cache | from files | draws |\n|---|---|---|---|"
    ]
    for name in SETTINGS:
        values = (cached[name], decoded[name], drawn[name])
        lines.append(f"| {name} | " + " | ".join(map(_text, values)) + " |")
    return "\n".join(lines) + "\n" + _padding(params, root)


def _padding(params: Params, root: Path) -> str:
    """What several short sides cost, in padded pixels against the largest one alone."""
    largest = max(params.data.short_sides)
    several = tuple(round(largest * part) for part in (0.75, 0.875, 1.0))

    def pixels(**values: Any) -> float:
        data = params.data.model_copy(update=values)
        loader = _loader(params.model_copy(update={"data": data}), root, {})
        shapes = [
            [augment.size for _, augment in part]
            for epoch in range(5)
            for step in loader.sampler.global_batches(epoch)
            for part in micro_batches(step, len(step), grouped=data.group_by_aspect)
        ]
        return float(sum(len(p) * max(h for h, _ in p) * max(w for _, w in p) for p in shapes))

    alone = pixels(short_sides=(largest,), group_by_aspect=True)
    together = pixels(short_sides=several, group_by_aspect=True) / alone
    mixed = pixels(short_sides=several, group_by_aspect=False) / alone
    return (
        f"\n`short_sides` {list(several)} in batches of 8: {together:.2f} of the padded pixels of "
        f"{largest} alone; {mixed:.2f} with `group_by_aspect: false`.\n"
    )


def _loader(params: Params, root: Path, values: dict[str, Any]) -> TrainLoader:
    augment = params.data.augment.model_copy(update={"flip_probability": 0.5, **values})
    data = params.data.model_copy(update={"augment": augment})
    runtime = params.runtime.model_copy(update={"workers": 0})
    loader = build_train_loader(
        params.model_copy(update={"data": data, "runtime": runtime}), root, 8
    )
    assert _maker(loader).cache is not None, f"{root}: has no decoded cache"
    return loader


def _maker(loader: TrainLoader) -> Any:
    return loader.stream._loader.dataset


def _without_cache(loader: TrainLoader) -> TrainLoader:
    """The same loader, which decodes files."""
    from runkey.data.loader import BatchStream

    maker = replace(_maker(loader), cache=None)
    return replace(loader, stream=BatchStream(maker, 0, 1, pin_memory=False))


def _seconds(loader: TrainLoader, epoch: int) -> float:
    """Seconds an image of the first images of an epoch, without the draws."""
    steps = loader.epoch(epoch)
    images = sum(len(batch) for batch in next(steps))  # draws the whole epoch
    images, start = 0, time.process_time()
    for step in steps:
        images += sum(map(len, step))
        if images >= _IMAGES:
            break
    return (time.process_time() - start) / images


def _text(seconds: list[float]) -> str:
    low, middle, high = (1000 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:.2f} ms ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
