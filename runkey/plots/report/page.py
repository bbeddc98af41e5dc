"""The page: one HTML file that holds all that it shows, and asks for nothing.

Pictures are parts of it, styles too; there is no script, and its content policy forbids a browser
to load anything.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from runkey import __version__
from runkey.plots.hints import Hint
from runkey.plots.report import pictures, tables
from runkey.plots.report.differences import differences
from runkey.plots.report.pictures import Picture
from runkey.plots.report.source import Run
from runkey.plots.report.tables import Table

_FOLDER = Path(__file__).parent
_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Section:
    """All of one run."""

    run: Run
    head: Table
    parts: Table
    scores: Table
    classes: Table
    changed: Table
    parameters: Table
    environment: Table
    data: Table
    hints: list[Hint]
    happened: Table
    evaluation: list[Picture]
    curves: list[Picture]
    memory: list[Picture]
    images: list[Picture]


def write_report(runs: Sequence[Run], path: Path) -> Path:
    """Write a page about a run, or about several with what differs between them on top.

    Args:
        runs: at least one.
        path: the HTML file; its folder is made.

    Returns:
        The path.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    several = len(runs) > 1
    page = environment.get_template(_TEMPLATE).render(
        title=", ".join(f"{run.label} {run.name}".strip() for run in runs),
        sections=[_section(run) for run in runs],
        differences=differences(runs) if several else None,
        curves=pictures.comparison(list(runs)) if several else None,
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _section(run: Run) -> Section:
    return Section(
        run=run,
        head=tables.head(run),
        parts=tables.key_parts(run),
        scores=tables.scores(run),
        classes=tables.classes(run),
        changed=tables.changed(run),
        parameters=tables.every_parameter(run),
        environment=tables.environment(run),
        data=tables.data(run),
        hints=run.hints(),
        happened=tables.happened(run),
        evaluation=pictures.evaluation(run),
        curves=pictures.curves(run),
        memory=pictures.memory(run),
        images=pictures.data(run),
    )
