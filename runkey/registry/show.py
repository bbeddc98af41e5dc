"""How runs are shown: the columns of `runkey list`, the page of `runkey show`."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from runkey.files import FormatError, expect, parse_json
from runkey.identity.key import older_rule
from runkey.identity.record import (
    CLASS_AP,
    HINT,
    KEY,
    RESUMED_AFTER,
    SPLIT,
    TAKEN,
    Details,
    LoggedRun,
    Record,
)
from runkey.registry.query import NAMES, Field, Value, find_field, number
from runkey.units import counted, format_age, format_bytes, format_score

COLUMNS = ("key", "when", "status", "AP", "took", "name", "data", "where")
"""Default columns of `runkey list`."""
RIGHT = ("AP", "took")
"""Columns that are flush right."""

_RUN_DIGITS = 4
_DATA_DIGITS = 6
_DIGEST = re.compile("[0-9a-f]{40,64}")
_DIGITS = 12
_DAY_SECONDS = 86_400.0
_SHORT_FROM = 0.00995
"""A smaller half of an interval is shown with three digits, not two."""


def table(
    records: Sequence[Record], columns: Sequence[str], states: Mapping[str, str], now: float
) -> dict[str, list[str]]:
    """Return the texts of the runs in each column; `states` holds the current status by run id.

    RegistryError if no run has a value of a column's name.
    """
    times_seen = Counter(record.key for record in records)
    show: dict[str, Callable[[Record], str]] = {
        "key": lambda r: address(r) if times_seen[r.key] > 1 or r.reproduction_of else r.label,
        "status": lambda r: states[r.run.run_id],
        "when": lambda r: ago(r.run.started_ms, now),
        "AP": lambda r: average_precision(r.run),
        SPLIT: lambda r: split_of(r.run),
        "took": lambda r: _took(r.run),
        "data": lambda r: data_label(r.run),
        "where": lambda r: _where(r.run),
    }
    for column in columns:
        if column not in show:
            show[column] = _plain(find_field(column, lambda: [record.run for record in records]))
    return {column: list(map(show[column], records)) for column in columns}


def is_number_column(column: str, cells: Sequence[str]) -> bool:
    """Return True if a column should be flush right."""
    return column in RIGHT or (any(cells) and all(number(c) is not None for c in cells if c))


def ago(started_ms: int, now: float) -> str:
    """Format a time in milliseconds since 1970: `5 min ago`, or the day if it is longer ago."""
    seconds = max(0.0, now - started_ms / 1000)
    is_today = seconds < _DAY_SECONDS
    return f"{format_age(seconds)} ago" if is_today else _time(started_ms, "%Y-%m-%d")


def text(value: Value) -> str:
    """Format a value: numbers with 4 digits, an empty text for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else value


def address(record: Record) -> str:
    """Return the address of a run, which tells it from others of its key."""
    return f"{record.label}:{record.run.run_id[:_RUN_DIGITS]}"


def average_precision(run: LoggedRun) -> str:
    """Format the COCO AP on the held-out images; in brackets the last AP measured in training.

    Half the length of the 95% interval follows, where it is known: `0.673 ±.03`.
    """
    final, last = map(run.metrics.get, (NAMES["AP"], "val/AP"))
    if final is not None:
        low, high = (run.metrics.get(f"{NAMES['AP']}_{end}") for end in ("low", "high"))
        if low is None or high is None:
            return f"{final:.3f}"
        half = (high - low) / 2
        digits = 2 if half >= _SHORT_FROM else 3
        return f"{final:.3f} ±{half:.{digits}f}".replace("±0.", "±.")
    return "" if last is None else f"({last:.3f})"


def split_of(run: LoggedRun) -> str:
    """Return the split that `average_precision` is of; empty if there is none."""
    if NAMES["AP"] in run.metrics:
        return run.split
    return "val" if "val/AP" in run.metrics else ""


def with_split(columns: Sequence[str], records: Iterable[Record]) -> list[str]:
    """Return columns with the split behind the AP, if the AP of any run is of test."""
    if "AP" not in columns or SPLIT in columns or {split_of(r.run) for r in records} <= {"", "val"}:
        return list(columns)
    place = list(columns).index("AP") + 1
    return [*columns[:place], SPLIT, *columns[place:]]


def _plain(field: Field) -> Callable[[Record], str]:
    def show(record: Record) -> str:
        value = field.of(record.run)
        if field == Field("run", "name"):
            times = record.run.resumed
            remarks = ["reproduction"] if record.reproduction_of else []
            remarks += [f"resumed {times}x"] if times else []
            return f"{value} ({', '.join(remarks)})" if remarks else str(value)
        if isinstance(value, str) and _DIGEST.fullmatch(value):
            return value[:_DIGITS]
        if field.kind == "run" and field.name in ("started", "ended") and isinstance(value, float):
            return _time(value)
        return text(value)

    return show


def data_label(run: LoggedRun) -> str:
    """Tell data sets apart: the first digits of their hash, and the folder if it is not data/."""
    folder = run.params.get("data.path", "data").rstrip("/").rpartition("/")[2]
    digits = run.parts["data"][:_DATA_DIGITS]
    return digits if folder == "data" else f"{folder} {digits}".rstrip()


def _where(run: LoggedRun) -> str:
    # Without the one architecture that there are packages for, which would fold the table.
    return " ".join(filter(None, map(run.tags.get, ("host", "device")))).removesuffix(" x86_64")


def _took(run: LoggedRun) -> str:
    return "" if run.ended_ms is None else format_age((run.ended_ms - run.started_ms) / 1000)


# --- runkey show

_FIRST = ("AP", "AP50", "AP75", "loss")
_EXPORT = "export/"
"""Metrics of exports, `export/onnx-fp32/AP`, are in the run's record too."""
_GROUPS = ("eval", "eval/val", CLASS_AP, "val", "train")
_MOST_CLASSES = 20

Row = tuple[str, str]
"""A label, empty if the row continues the one before, and a text of any length, which is not broken
at a NO-BREAK SPACE."""


def describe(
    record: Record,
    status: str,
    others: Sequence[Record],
    page: str,
    *,
    every_param: bool,
    lineage: Iterable[Row] = (),
) -> Iterator[Row]:
    """Yield what is known of a run, as rows; without `every_param` only the changed parameters.

    Rows without a text are not shown. `lineage`: see `runkey.registry.lineage.rows`.
    """
    run, details = record.run, record.details
    yield from _titled("key", [record.key, older_rule(record.key)])
    yield "parts", _listed(f"{name} {one[:_DIGITS]}" for name, one in run.parts.items())
    yield "status", _status(run, status)
    yield "name", run.name
    if record.reproduction_of:
        yield "repeats", f"run {record.reproduction_of}"
    yield from lineage
    if run.resumed:
        times = "once" if run.resumed == 1 else counted(run.resumed, "time")
        yield "resumed", f"{times}, after {run.tags.get(RESUMED_AFTER, '?')}"
    # Why it was trained, and who reused its result last.
    yield "decision", run.tags.get("decision", "")
    yield "last reuse", run.tags.get("reused", "")
    yield "taken", run.tags.get(TAKEN, "")
    hints = (text for tag, text in sorted(run.tags.items()) if tag.startswith(HINT))
    yield from _titled("hints", map(_hint, hints))
    yield from _metrics(run.metrics, run.split)
    yield from _params(run, every_param=every_param)
    if details:
        yield from _environment(details)
    else:
        ended = ": it ended too early" if run.ended_ms else " yet: they are written at the end"
        yield "details", f"none{ended}"
    yield from _titled("same key", map(_other, others))
    yield from _titled("exports", _exports(details))
    yield from _files(details)
    yield "MLflow run", f"{run.run_id} in experiment {run.experiment_id}"
    yield "artifacts", run.artifact_uri
    yield "page", page


def _hint(text: str) -> str:
    """Return a hint's text; the tags of older runs are JSON."""
    if not text.startswith("{"):
        return text
    try:
        hint = expect(dict[str, Any], parse_json(text))
    except FormatError as error:
        return f"not readable ({error})"
    return f"{hint.get('seen')}; {hint.get('change')}"


def _status(run: LoggedRun, status: str) -> str:
    started, took = _time(run.started_ms), _took(run)
    return f"{status}, {started}, took {took}" if took else f"{status}, since {started}"


def _time(milliseconds: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    return time.strftime(form, time.localtime(milliseconds / 1000))


def _metrics(metrics: Mapping[str, float], split: str) -> Iterator[Row]:
    """Yield a row for each group, `eval` first, and in each the AP first.

    `split` is the one that the result is of; it is shown if it is not val.
    """
    of_split = "" if split == "val" else f" {split}"

    def order(parts: tuple[str, str]) -> tuple[int, str, int, str]:
        head, leaf = parts
        return (*_GROUPS, head).index(head), head, (*_FIRST, leaf).index(leaf), leaf

    names = {_split(name): name for name in metrics if not name.startswith(_EXPORT)}
    for head, group in groupby(sorted(names, key=order), key=itemgetter(0)):
        values = {parts[1]: metrics[names[parts]] for parts in group}
        if head == CLASS_AP:
            text = _listed(_worst(values))
            yield "AP by class", f"{text} (on {split})" if of_split else text
        else:
            label = f"eval{of_split}" if head == "eval" else head or "metrics"
            yield label, _listed(_with_intervals(values))


def _with_intervals(values: Mapping[str, float]) -> Iterator[str]:
    """Yield name and value of each metric; the ends of an interval stand beside its metric."""
    for name, value in values.items():
        base, _, end = name.rpartition("_")
        if end in ("low", "high") and f"{base}_low" in values and f"{base}_high" in values:
            continue
        has_interval = f"{name}_low" in values and f"{name}_high" in values
        yield f"{name} {format_score(values, name) if has_interval else _short(value)}"


def _worst(scores: Mapping[str, float]) -> Iterator[str]:
    """Yield the AP of the classes, the worst first."""
    names = sorted(scores, key=lambda name: scores[name])
    yield from (f"{name} {_short(scores[name])}" for name in names[:_MOST_CLASSES])
    if len(names) > _MOST_CLASSES:
        yield f"and {len(names) - _MOST_CLASSES} more"


def _short(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= abs(value) < 1 else text(value)


def _params(run: LoggedRun, *, every_param: bool) -> Iterator[Row]:
    values = {name: v for name, v in run.params.items() if name.split(".")[0] != KEY}
    if not values:
        return
    from runkey.params import changed_params  # 0.4 s, which `runkey list` saves

    if every_param:
        yield "parameters", f"{len(values)}"
        yield from (("", f"{name} = {value}") for name, value in sorted(values.items()))
        return
    shown = sorted(changed_params(values).items())
    note = f"of which {len(shown)} are not the default (--all shows them all)"
    yield "parameters", f"{len(values)}, {note}"
    yield "", _listed(f"{name}={value}" for name, value in shown)


def _environment(details: Details) -> Iterator[Row]:
    ran = details.witness
    items = [
        str(ran.get("device", "device unknown")),
        f"micro-batch {ran.get('micro_batch', '?')}",
        counted(ran.get("world_size", "?"), "process"),
        counted(ran.get("threads", "?"), "thread"),
        f"mixed precision {ran.get('precision', '?')}",
    ]
    yield "ran on", f"{details.host}: {_listed(items)}"
    yield "", str(ran.get("cpu", ""))
    yield "", str(ran.get("interpreter", ""))
    yield from _titled("packages", ran.get("package_differences") or ["as locked"])
    yield from _titled("undeclared", ran.get("undeclared_files") or ())
    if commit := ran.get("commit"):
        state = "with changes that were not committed" if ran.get("dirty") else "as committed"
        yield "commit", f"{commit} {state}"
    snapshot = details.snapshot or "none: it did not run in a git repository"
    yield "snapshot", "the commit itself" if snapshot == commit else snapshot
    yield from _titled("reproduced", (_outcome(outcome) for outcome in details.outcomes))


def _outcome(outcome: Mapping[str, Any]) -> str:
    """Format an outcome of `runkey.registry.reproduce.reproduce`."""
    when = _time(outcome.get("when_ms", 0), "%Y-%m-%d %H:%M")
    if outcome.get("identical"):
        verdict = "bit-identical"
    elif outcome.get("reproduced"):
        kind = ", ".join(outcome.get("class_differences", ()))
        verdict = f"within tolerance on another kind of machine ({kind})"
    else:
        verdict = "NOT the same result"
    run = f" (run {outcome['run_id']})" if outcome.get("run_id") else ""
    return f"{when} on {outcome.get('host', '?')}: {verdict}{run}"


def _other(other: Record) -> str:
    what = "reproduction" if other.reproduction_of else "another run"
    when = _time(other.run.started_ms, "%Y-%m-%d %H:%M")
    return f"{address(other)} {what}, {other.run.status}, {when}"


def _exports(details: Details | None) -> Iterator[str]:
    """Yield a line for each exported model: format, precision, AP and its change, size."""
    for name, parity in sorted(details.exports.items()) if details else ():
        kind, _, precision = name.partition("-")
        ap, lost = parity.get("ap"), parity.get("ap_lost")
        score = "AP not measured"
        if isinstance(ap, float) and isinstance(lost, float):
            score = f"AP {ap:.3f} ({round(-lost, 2) + 0.0:+.2f} points)"
        size = parity.get("size_mb")
        parts = [f"{kind} {precision}", score]
        parts += [format_bytes(round(1e6 * size))] if isinstance(size, float) else []
        parts += [] if parity.get("passed") else ["refused"]
        yield _listed(parts)


def _files(details: Details | None) -> Iterator[Row]:
    if details is None or not details.files:
        return
    sizes = {_split(path): file.size for path, file in details.files.items()}
    yield "files", f"{len(sizes)}, {format_bytes(sum(sizes.values()))}"
    for folder, inside in groupby(sorted(sizes), key=itemgetter(0)):
        items = (f"{parts[1]} {format_bytes(sizes[parts])}" for parts in inside)
        yield "", f"{folder + '/: ' if folder else ''}{_listed(items)}"


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder, name


def _titled(label: str, items: Iterable[object]) -> Iterator[Row]:
    """Yield a row for each item that is not empty; the first has the label."""
    for index, item in enumerate(filter(None, items)):
        yield ("" if index else label), str(item)


def _listed(items: Iterable[object]) -> str:
    """Join items; no line ends in the middle of one."""
    return ", ".join(str(item).replace(" ", "\N{NO-BREAK SPACE}") for item in items)
