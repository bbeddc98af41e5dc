"""All that is known of a run, as lines for people."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from runkey.identity.key import older_rule
from runkey.identity.record import HINT, KEY, RESUMED_AFTER, Details, LoggedRun, Record
from runkey.params import changed_params
from runkey.registry.reading.columns import address, size, span, text

WIDTH = 100
_LABEL = 13
_PART_DIGITS = 12
_FIRST = ("AP", "AP50", "AP75", "loss")
_GROUPS = ("eval", "val", "train")

_WITHOUT = {True: "none yet: they are written at the end", False: "none: it ended too early"}

Row = tuple[str, str]
"""A label, empty if it is that of the row before, and a text of any length."""


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows, wrapped at spaces to 100 columns."""
    result = []
    for label, content in rows:
        result += textwrap.wrap(
            content,
            WIDTH,
            initial_indent=f"{label:<{_LABEL}}",
            subsequent_indent=" " * _LABEL,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return [line.replace(_NO_BREAK, " ") for line in result]


_TOLD = (("decision", "decision"), ("last reuse", "reused"))
"""Rows and the tags that they show: why it was trained, and who took its result last."""


def describe(
    record: Record, *, status: str, others: Sequence[Record], page: str, every_param: bool
) -> list[Row]:
    """What is known of a run.

    Args:
        record: the run, with its details.
        status: as it is now.
        others: further runs of its key.
        page: address of its MLflow page; empty if nothing serves one.
        every_param: show all parameters, not only those that are not the default.
    """
    run, details = record.run, record.details
    return [
        ("key", record.key),
        *([("", older)] if (older := older_rule(record.key)) else []),
        ("parts", _listed(f"{name} {digest[:_PART_DIGITS]}" for name, digest in run.parts.items())),
        ("status", _status(run, status)),
        ("name", run.name),
        *([("repeats", f"run {record.reproduction_of}")] if record.reproduction_of else []),
        *([("resumed", _resumed(run))] if run.resumed else []),
        *((row, told) for row, tag in _TOLD if (told := run.tags.get(tag))),
        *_titled("hints", _hints(run)),
        *_metrics(run.metrics),
        *_params(run, every_param=every_param),
        *(_witness(details) if details else [("details", _WITHOUT[run.ended_ms is None])]),
        *_others(others),
        *_files(details),
        ("MLflow run", f"{run.run_id} in experiment {run.experiment_id}"),
        ("artifacts", run.artifact_uri),
        *([("page", page)] if page else []),
    ]


def _status(run: LoggedRun, status: str) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started_ms / 1000))
    if run.ended_ms is None:
        return f"{status}, since {started}"
    return f"{status}, {started}, took {span((run.ended_ms - run.started_ms) / 1000)}"


def _resumed(run: LoggedRun) -> str:
    times = "once" if run.resumed == 1 else f"{run.resumed} times"
    return f"{times}, after {run.tags.get(RESUMED_AFTER, '?')}"


def _hints(run: LoggedRun) -> Iterator[str]:
    """What the training was told, and what to change."""
    for tag in sorted(run.tags):
        if tag.startswith(HINT):
            fields = json.loads(run.tags[tag])
            yield f"{fields.get('seen')}; {fields.get('change')}"


def _metrics(metrics: Mapping[str, float]) -> Iterator[Row]:
    """A row for each group, `eval` first, and in each the AP first."""

    def group(name: str) -> str:
        return name.rpartition("/")[0]

    def order(name: str) -> tuple[Any, ...]:
        head, leaf = group(name), name.rpartition("/")[2]
        place = _GROUPS.index(head) if head in _GROUPS else len(_GROUPS)
        first = _FIRST.index(leaf) if leaf in _FIRST else len(_FIRST)
        return place, head, first, leaf

    for head, names in groupby(sorted(metrics, key=order), key=group):
        values = (f"{n.rpartition('/')[2]} {_short(metrics[n])}" for n in names)
        yield head or "metrics", _listed(values)


def _short(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= abs(value) < 1 else text(value)


def _params(run: LoggedRun, *, every_param: bool) -> Iterator[Row]:
    values = {name: v for name, v in run.params.items() if name.split(".")[0] != KEY}
    if not values:
        return
    shown = values if every_param else changed_params(values)
    if every_param:
        yield "parameters", f"{len(values)}"
        yield from (("", f"{name} = {value}") for name, value in sorted(shown.items()))
        return
    said = f"{len(values)}, of which {len(shown)} are not the default (--all shows them all)"
    yield "parameters", said
    if shown:
        yield "", _listed(f"{name}={_unbroken(value)}" for name, value in sorted(shown.items()))


def _witness(details: Details) -> Iterator[Row]:
    seen = details.witness
    items = [
        str(seen.get("device", "device unknown")),
        f"micro-batch {seen.get('micro_batch', '?')}",
        f"{seen.get('world_size', '?')} process(es)",
        f"{seen.get('threads', '?')} thread(s)",
        f"mixed precision {seen.get('precision', '?')}",
    ]
    yield "ran on", f"{details.host}: {_listed(items)}"
    yield "", str(seen.get("interpreter", ""))
    yield from _titled("packages", seen.get("package_differences") or ["as locked"])
    yield from _titled("undeclared", seen.get("undeclared_files") or ())
    commit = seen.get("commit")
    if commit:
        state = "with changes that were not committed" if seen.get("dirty") else "as committed"
        yield "commit", f"{commit} {state}"
    if details.snapshot is None:
        yield "snapshot", "none: it did not run in a git repository"
    elif details.snapshot == commit:
        yield "snapshot", "the commit itself"
    else:
        yield "snapshot", details.snapshot
    yield from _titled("reproduced", (_outcome(outcome) for outcome in details.outcomes))


def _outcome(outcome: Mapping[str, Any]) -> str:
    """When, where and what: see `runkey.registry.checks.reproduce.Repeat`."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(outcome.get("when_ms", 0) / 1000))
    if outcome.get("identical"):
        verdict = "bit-identical"
    elif outcome.get("reproduced"):
        kind = ", ".join(outcome.get("class_differences", ()))
        verdict = f"within tolerance on another kind of machine ({kind})"
    else:
        verdict = "NOT the same result"
    run = f" (run {outcome['run_id']})" if outcome.get("run_id") else ""
    return f"{when} on {outcome.get('host', '?')}: {verdict}{run}"


def _others(others: Sequence[Record]) -> Iterator[Row]:
    for number, other in enumerate(others):
        what = "reproduction" if other.reproduction_of else "another run"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(other.run.started_ms / 1000))
        line = f"{address(other)} {what}, {other.run.status}, {when}"
        yield ("" if number else "same key"), line


def _files(details: Details | None) -> Iterator[Row]:
    if details is None or not details.files:
        return
    total = sum(file.size for file in details.files.values())
    yield "files", f"{len(details.files)}, {size(total)}"
    paths = sorted(details.files, key=lambda path: (path.rpartition("/")[0], path))
    for folder, inside in groupby(paths, key=lambda path: path.rpartition("/")[0]):
        items = (f"{p.rpartition('/')[2]} {_unbroken(size(details.files[p].size))}" for p in inside)
        yield "", f"{folder + '/: ' if folder else ''}{_listed(items)}"


def _titled(label: str, items: Iterable[object]) -> Iterator[Row]:
    for number, item in enumerate(items):
        yield ("" if number else label), str(item)


_NO_BREAK = "\N{NO-BREAK SPACE}"


def _unbroken(value: str) -> str:
    return value.replace(" ", _NO_BREAK)


def _listed(items: Iterable[object]) -> str:
    return ", ".join(_unbroken(str(item)) for item in items)
