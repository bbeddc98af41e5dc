"""The tables of a report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runkey.identity.key import PARTS
from runkey.params import changed_params
from runkey.plots.hints import CLASS_SCORES, EVENT
from runkey.plots.report.source import Run

SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100", "loss")
_USUAL = ("training_start", "training_end", CLASS_SCORES)
"""Events of every training."""
_MOST_LETTERS = 80
_SAID = {
    "device": "device",
    "threads": "threads",
    "world_size": "processes",
    "micro_batch": "micro-batch",
    "precision": "mixed precision",
    "interpreter": "Python",
    "commit": "commit",
    "dirty": "changed since the commit",
}


@dataclass(frozen=True)
class Table:
    """Rows of text under headings."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = False
    """Whether all columns but the first hold numbers."""


def head(run: Run) -> Table:
    """What the run is."""
    rows = [
        ("key", run.key),
        ("status", run.status.lower()),
        ("started", _when(run.started_ms)),
        ("took", "" if run.seconds is None else span(run.seconds)),
        ("why", run.tags.get("decision", "")),
        ("MLflow run", run.run_id or "none"),
        ("ended", str(run.log.events.get("training_end", {}).get("reason", ""))),
    ]
    return Table((), [row for row in rows if row[1]])


def happened(run: Run) -> Table:
    """What training met on its way: steps skipped, interruptions and so on."""
    rows = []
    for kind, count in run.log.counts.items():
        if kind not in _USUAL and not kind.startswith(EVENT):
            fields = run.log.events[kind]
            told = ", ".join(f"{n} {_brief(v)}" for n, v in fields.items() if v not in (None, []))
            rows.append((kind.replace("_", " "), f"{count:,}", told))
    return Table(("event", "times", "the last one"), rows)


def key_parts(run: Run) -> Table:
    """The parts of the key."""
    return Table(("part", "sha256"), [(part, run.parts.get(part, "")) for part in PARTS])


def changed(run: Run) -> Table:
    """Parameters that are not the default."""
    return Table(("parameter", "value"), sorted(changed_params(run.params).items()))


def every_parameter(run: Run) -> Table:
    """All parameters."""
    return Table(("parameter", "value"), sorted(run.params.items()))


def environment(run: Run) -> Table:
    """What it ran on."""
    seen = run.witness
    rows = [("host", run.host)]
    rows += [(said, _text(seen[name])) for name, said in _SAID.items() if name in seen]
    rows += [("snapshot", run.snapshot or "")]
    packages = seen.get("package_differences")
    if packages is not None:
        rows += [("packages", ", ".join(packages) or "as locked")]
    if undeclared := seen.get("undeclared_files"):
        rows += [("files outside the key", ", ".join(undeclared))]
    rows += [(name, str(value)) for name, value in seen.get("variables", {}).items()]
    return Table((), [row for row in rows if row[1]])


def scores(run: Run) -> Table:
    """COCO's numbers of the run."""
    found = run.scores()
    names = [name for name in SCORES if found.get(name) is not None]
    return Table(names, [[shown(found[name]) for name in names]] if names else [])


def classes(run: Run) -> Table:
    """COCO's numbers of each class, the worst first."""
    per_class: Mapping[str, Mapping[str, Any]] = run.scores().get("per_class", {})
    sizes = ("small", "medium", "large")

    def row(name: str) -> list[str]:
        c = per_class[name]
        by_size = [c.get("by_size", {}).get(size, {}).get("AP") for size in sizes]
        numbers = [c.get("AP"), c.get("AP50"), c.get("AR"), *by_size]
        return [name, f"{c.get('objects', 0):,}", *map(shown, numbers)]

    order = sorted(per_class, key=lambda name: (per_class[name].get("AP") or 0.0, name))
    columns = ("class", "objects", "AP", "AP50", "AR", *(f"AP {size}" for size in sizes))
    return Table(columns, [row(name) for name in order], numbers=True)


def data(run: Run) -> Table:
    """The data set in numbers, a column for each split."""
    statistics: Mapping[str, Any] = run.json("prepared/statistics.json") or {}
    if not statistics:
        return Table((), [])

    def cells(of: Mapping[str, Any]) -> list[str]:
        per_image = of.get("objects_per_image", {})
        sides = of.get("box_side_pixels", {})
        return [
            f"{of.get('images', 0):,}",
            f"{of.get('images_without_objects', 0):,}",
            f"{of.get('objects', 0):,}",
            f"{of.get('crowd_regions', 0):,}",
            f"{per_image.get('mean', 0):.3g}, at most {per_image.get('maximum', 0)}",
            f"{len(of.get('classes', {})):,}",
            " / ".join(f"{n:,}" for n in of.get("sizes_by_area", {}).values()),
            " / ".join(f"{sides[q]:g}" for q in ("5%", "50%", "95%") if q in sides),
            *(f"{c.get('objects', 0):,}" for c in of.get("classes", {}).values()),
        ]

    names = [
        *("images", "without objects", "objects", "crowd regions", "objects an image", "classes"),
        *("small / medium / large", "side of a box, pixels (5%, 50%, 95%)"),
        *(f"objects of {name}" for name in next(iter(statistics.values())).get("classes", {})),
    ]
    columns = [cells(of) for of in statistics.values()]
    return Table(("", *statistics), list(zip(names, *columns, strict=False)), numbers=True)


def shown(value: Any) -> str:
    """A number for people; nothing for nothing."""
    if not isinstance(value, (int, float)):
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def span(seconds: float) -> str:
    """`41 s`, `2 min 10 s`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def only_differing(rows: Iterable[Sequence[str]]) -> list[Sequence[str]]:
    """The rows whose cells, but for the first, are not all the same."""
    return [row for row in rows if len(set(row[1:])) > 1]


def _brief(value: Any) -> str:
    """A field of an event, cut to what fits a line."""
    text = f"{value:.4g}" if isinstance(value, float) else _text(value)
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"


def _text(value: Any) -> str:
    return (
        {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )


def _when(milliseconds: int | None) -> str:
    if milliseconds is None:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000))
