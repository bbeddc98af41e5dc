"""The tables of the guide's pages, from results/techniques.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.techniques.collect import RESULTS
from benchmarks.techniques.variants import BY_NAME, VARIANTS, Variant

GUIDE = RESULTS.parents[2] / "docs" / "guide"
_BLOCK = re.compile(r"(<!-- techniques: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


def fill(text: str, rows: Sequence[Row]) -> str:
    """A page's text with its tables as the results are.

    Args:
        text: Markdown with blocks `<!-- techniques: PAGE -->` ... `<!-- end -->`.
        rows: of results/techniques.json.

    Raises:
        KeyError: there is no table of that name.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{table(found[2], rows)}{found[3]}", text)


def read_rows() -> list[Row]:
    """The committed results."""
    return list(json.loads(RESULTS.read_text(encoding="utf-8")).values())


def table(page: str, rows: Sequence[Row]) -> str:
    """One page's table, in Markdown: a line for each variant and machine."""
    columns = {"AP": _ap, **_COLUMNS[page]}
    lines = [
        "| changed | on | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    shown = [row for row in rows if page in BY_NAME[row["variant"]].pages]
    changed_on = {short_machine(row) for row in shown if row["settings"]}
    for variant in VARIANTS:
        for machine in sorted(
            changed_on, reverse=True
        ):  # without those that the baseline alone had
            same = [
                row
                for row in shown
                if row["variant"] == variant.name and short_machine(row) == machine
            ]
            if same:
                cells = [_changed(variant), machine, *(cell(same) for cell in columns.values())]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def short_machine(row: Row) -> str:
    """Such as `Xeon` or `H200`; what they are is said in docs/guide/index.md."""
    if "gpu" in row["machine"]:
        return str(row["machine"]["gpu"].split(",")[0].split()[-1])
    return "Xeon" if "Xeon" in row["machine"]["cpu"] else "EPYC"


def _changed(variant: Variant) -> str:
    return f"`{variant.label}`" if variant.label else "nothing"


def _ap(rows: Sequence[Row]) -> str:
    values = sorted(row["AP"] for row in rows if row["AP"] is not None)
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({len(values)} seeds, {values[0]:.3f} to {values[-1]:.3f})"


def _mean(name: str, form: str, factor: float = 1.0) -> Callable[[Sequence[Row]], str]:
    def cell(rows: Sequence[Row]) -> str:
        values = [row[name] * factor for row in rows if row.get(name) is not None]
        return format(mean(values), form) if values else "-"

    return cell


def _first(make: Callable[[Row], str]) -> Callable[[Sequence[Row]], str]:
    return lambda rows: make(rows[0])


def _count(event: str) -> Callable[[Row], str]:
    return lambda row: str(row["events"].get(event, 0))


def _memory(row: Row) -> str:
    for line in row["memory"]:
        if found := re.search(r"predicted for a GPU, \w+: (.*)", line):
            return found[1].replace(" an image", " x images")
    return "-"


def _processor_time(row: Row) -> str:
    seconds = row.get("stage_cpu_seconds", {}).get("train")
    return "-" if seconds is None else f"{seconds:.0f}"


def _said(row: Row) -> str:
    # Older runs logged a hint about clipping, which helped nobody.
    return ", ".join(f"`{kind}`" for kind in row["hints"] if kind != "clipping") or "none"


_AP50 = {"AP50": _mean("AP50", ".3f")}
_SPEED = {"images/s": _mean("images_per_second", ".0f"), "waits": _mean("data_wait_share", ".0%")}
_LOSSES = {
    "training loss": _mean("train_loss_last", ".2f"),
    "val loss": _mean("val_loss_last", ".2f"),
}
_COLUMNS: dict[str, dict[str, Callable[[Sequence[Row]], str]]] = {
    "schedules": _AP50
    | {"best epoch": _mean("best_epoch", ".0f")}
    | _LOSSES
    | {"hints": _first(_said)},
    "clipping": _AP50
    | {"median norm": _mean("grad_norm", ".3g"), "clipped": _mean("clipped_share", ".0%")},
    "early-stopping": {
        "epochs run": _mean("epochs", ".0f"),
        "best epoch": _mean("best_epoch", ".0f"),
        "minutes": _mean("seconds", ".1f", 1 / 60),
        "val loss, least": _mean("val_loss_least", ".2f"),
        "last": _mean("val_loss_last", ".2f"),
    },
    "overfitting": _LOSSES | {"gap": _mean("loss_gap", "+.2f"), "hints": _first(_said)},
    "memory": {"GPU, bf16, predicted": _first(_memory)} | {"CPU s": _first(_processor_time)},
    "accumulation": _AP50 | {"optimizer steps": _mean("steps", ".0f")} | _LOSSES,
    "mixed-precision": _AP50
    | {"images/s": _SPEED["images/s"], "CPU s": _first(_processor_time)}
    | {"skipped steps": _mean("skipped_steps", ".0f")},
    "data-loading": _SPEED | {"CPU s": _first(_processor_time)},
    "nan": _LOSSES
    | {
        "skipped steps": _first(_count("skipped_step")),
        "spikes": _first(_count("loss_spike")),
        "rollbacks": _first(_count("rollback")),
        "hints": _first(_said),
    },
    "distributed": {"images/s": _SPEED["images/s"], "CPU s": _first(_processor_time)},
}


def write_tables() -> list[Path]:
    """Fill the tables of all pages; the pages that changed."""
    rows, changed = read_rows(), []
    for page in sorted(GUIDE.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = fill(before, rows)
        if after != before:
            page.write_text(after, encoding="utf-8")
            changed.append(page)
    return changed
