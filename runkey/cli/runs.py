"""`runkey list`, `show`, `get`, `open` and `diff`: find runs, read and compare them, copy files."""

from __future__ import annotations

import socket
import time
import webbrowser
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from runkey import paths
from runkey.cli import output
from runkey.cli.output import AsJson, Key
from runkey.errors import RegistryError
from runkey.identity.key import older_rule, short_key
from runkey.identity.record import CLASS_AP, Record
from runkey.progress import say
from runkey.registry import show
from runkey.registry.claims import status_now
from runkey.registry.dvc_cache import download, in_the_way
from runkey.registry.library import find_run
from runkey.registry.models import THRESHOLDS
from runkey.registry.query import NAMES, Query, find_field, parse_condition
from runkey.registry.rest import comparison_page, run_page
from runkey.units import counted, format_bytes

if TYPE_CHECKING:
    from runkey.registry.diff import Diff, Pair, Side

_HOST = "127.0.0.1"
_KNOWN = 10
"""Newest runs in which names of metrics, parameters and tags are looked up."""
_LABEL = 13


def list_runs(
    where: Annotated[
        list[str] | None,
        Option(
            "--where",
            "-w",
            help="Condition: lr=5e-05, AP>0.6, status=FINISHED, name~warm, started>2026-11-01;"
            " repeat it to require several.",
        ),
    ] = None,
    sort: Annotated[
        str,
        Option("--sort", "-s", help="Metric, parameter, tag, or key, name, status, seconds."),
    ] = "started",
    ascending: Annotated[bool, Option("--ascending", help="Smallest or oldest first.")] = False,
    limit: Annotated[int, Option("--limit", "-n", min=0, help="Most runs; 0: all.")] = 20,
    columns: Annotated[
        str,
        Option(
            "--columns",
            "-c",
            help="Names separated by commas: key, when, status, AP, split, took, name, data, where,"
            " or any metric, parameter or tag. A leading + adds to the default ones.",
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List recorded runs, newest first."""
    runs = output.library(offline=True)
    names = [name.strip() for name in columns.removeprefix("+").split(",") if name.strip()]
    default = () if names and not columns.startswith("+") else show.COLUMNS
    chosen = list(dict.fromkeys([*default, *names]))
    known = cache(lambda: [record.run for record in runs.find(Query(limit=_KNOWN))])
    query = Query(
        conditions=tuple(parse_condition(condition, known) for condition in where or ()),
        sort=find_field(sort, known),
        descending=not ascending,
        limit=limit or None,
    )
    found = runs.find(query)
    if as_json:
        output.print_json([record.as_dict() for record in found])
        return
    if not found:
        say(f"no run{' fulfils that' if where else ''} in {runs.place}{_lost(where)}")
        return
    now = output.claims()
    states = {record.run.run_id: status_now(record, now) for record in found}
    if not names or columns.startswith("+"):
        chosen = show.with_split(chosen, found)
    table = show.table(found, chosen, states, time.time())
    right = [name for name, cells in table.items() if show.is_number_column(name, cells)]
    rows = zip(*table.values(), strict=True)
    whole = ("key", "when", "status", "AP", "took", "data")
    output.print_table(chosen, rows, right=right, whole=whole)
    _say_mixed_splits(query, found)
    for rule, count in Counter(filter(None, (older_rule(r.key) for r in found))).items():
        say(f"{count} of these: {rule}")
    if note := output.tree_note(output.store().home):
        output.print_beside("", note)


def _say_mixed_splits(query: Query, found: list[Record]) -> None:
    """Say it if a list is chosen or sorted by AP, and that is not of one split."""
    if NAMES["AP"] in (query.sort.name, *(c.field.name for c in query.conditions)):
        splits = Counter(filter(None, (show.split_of(one.run) for one in found)))
        if len(splits) > 1:
            shares = (f"of {split} in {counted(count, 'run')}" for split, count in splits.items())
            say(f"AP is {' and '.join(shares)}; --where split=test compares within one split")


def _lost(where: list[str] | None) -> str:
    """Name the way out if MLflow's database is there, and the cache of its runs is not."""
    store = output.store()
    if where or store.is_server or not store.database or not store.database.is_file():
        return ""
    return "; if it was lost, `runkey index` reads the runs from MLflow again"


def show_run(
    key: Key,
    every_param: Annotated[
        bool, Option("--all", help="Show all parameters, not only the changed ones.")
    ] = False,
    lineage: Annotated[
        bool,
        Option("--lineage", help="Show from which run it was started, and which continue it."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run: status, key, metrics, parameters, environment, files, location."""
    from runkey.registry.lineage import children, draw, family, origin, rows

    runs, store = output.library(offline=True), output.store()
    record = find_run(runs, key)
    if lineage:
        tree = family(runs, record)
        output.print_answer(tree.as_dict(), *draw(tree), as_json=as_json)
        return
    others = [r for r in runs.matching(record.key) if r.run.run_id != record.run.run_id]
    status = status_now(record, output.claims())
    if as_json:
        same_key = [other.as_dict()["run"] for other in others]
        began = origin(runs, record)
        answer = {**record.as_dict(), "status_now": status, "same_key": same_key}
        answer |= {"started_from": asdict(began) if began else None}
        answer |= {"continued_by": [child.key for child in children(runs, record)]}
        output.print_json(answer)
        return
    page = run_page(runs.place, record.run) if store.is_server else ""
    described = show.describe(
        record, status, others, page, every_param=every_param, lineage=rows(runs, record)
    )
    for label, text in described:
        if text:
            output.print_beside(f"{label:<{_LABEL - 1}} ", text)


def get(
    key: Key,
    to: Annotated[
        Path | None, Option("--to", help="Folder to put them in [the short key].")
    ] = None,
    only: Annotated[
        str,
        Option("--only", help="`all`, or a file or folder of the run, such as `model`."),
    ] = "all",
    force: Annotated[
        bool, Option("--force", help="Replace files that hold something else.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a run's files here; check each against the hash that the run recorded."""
    runs = output.library()
    record = find_run(runs, key)
    if record.details is None:
        raise RegistryError(
            f"{record.label}: {record.run.status}, recorded no files"
            f" (run {record.run.run_id}); `runkey list --where status=FINISHED`"
        )
    prefix = "" if only == "all" else only.strip("/")
    files = {
        path: stored
        for path, stored in sorted(record.details.files.items())
        if not prefix
        or f"{path}/".startswith(f"{prefix}/")
        or (prefix == paths.MODEL.as_posix() and path == THRESHOLDS)
    }
    if not files:
        known = sorted({path.split("/")[0] for path in record.details.files})
        raise RegistryError(f"{record.label}: {only}: no such file; it has {', '.join(known)}")
    target = to or Path(short_key(record.key))
    if not force and (other := in_the_way(record, files, target)):
        more = f", and so do {len(other) - 1} more" if other[1:] else ""
        it = "them" if more else "it"
        raise RegistryError(
            f"{target / other[0]}: holds something else{more}; --force replaces {it}"
        )
    download(runs, record, files, target)
    total = sum(stored.size for stored in files.values())
    answer = {"key": record.key, "run": record.run.run_id, "to": str(target)}
    hashes = {"files": {path: stored.sha256 for path, stored in files.items()}}
    lines = [f"  {format_bytes(stored.size):>9}  {target / path}" for path, stored in files.items()]
    lines.append(
        f"{counted(len(files), 'file')} of {record.label}, {format_bytes(total)}, hashes verified"
    )
    output.print_answer(answer | hashes, *lines, as_json=as_json)


def open_page(
    keys: Annotated[list[str], Argument(help="Prefixes of keys; KEY:RUN for one of a key's runs.")],
    port: Annotated[
        int, Option("--port", min=1, max=65535, help="Port of `make ui` for a local store.")
    ] = 5000,
    browser: Annotated[bool, Option("--browser", help="Open it in the web browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the address of a run's MLflow page; of several runs, of their comparison."""
    runs, store = output.library(offline=True), output.store()
    found = [find_run(runs, key).run for key in keys]
    server = runs.place if store.is_server else f"http://{_HOST}:{port}"
    page = run_page(server, found[0]) if len(found) == 1 else comparison_page(server, found)
    with socket.socket() as probe:
        probe.settimeout(2)
        served = store.is_server or probe.connect_ex((_HOST, port)) == 0
    answer = {"page": page, "served": served, "runs": [run.run_id for run in found]}
    output.print_answer(answer, page, as_json=as_json)
    if not served:
        option = "" if port == 5000 else f" PORT={port}"
        say(f"nothing listens there; `make ui{option}` serves it", stderr=True)
    elif browser:
        webbrowser.open(page)


# --- runkey diff

_CELL = 44
"""Characters of a value; longer ones are cut in the middle."""
_HASH = 12


def print_diff(a: Side, b: Side, diff: Diff, *, patch: bool, limit: int | None) -> None:
    """Print all sections that are not empty; at most `limit` names of each kind."""
    output.print_table(("", "key", "run", "started", "status", ""), [_head("A", a), _head("B", b)])
    _print_verdict(a, b, diff)
    _pairs("params", diff.params, limit)
    _pairs("commands", diff.commands, limit)
    _print_code(diff, patch=patch, limit=limit)
    _print_data(diff, limit)
    _pairs("environment", diff.packages, limit)
    _print_artifacts(diff, limit)
    _print_metrics(diff, limit)
    _pairs("witness (no part of the key)", diff.witness, None)
    _pairs("installed packages (no part of the key)", diff.installed, limit)
    notes = [f"note on A: {note}" for note in a.notes]
    notes += [f"note on B: {note}" for note in b.notes]
    if notes:
        say("", *notes)


def _head(name: str, side: Side) -> tuple[str, ...]:
    if side.record is None:
        return (name, short_key(side.key), ".", "", "", "the tree as it stands")
    run = side.record.run
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started_ms / 1000))
    return (name, short_key(side.key), run.run_id[:8], started, run.status, run.name)


def _print_verdict(a: Side, b: Side, diff: Diff) -> None:
    say()
    if a.record and b.record and a.record.run.run_id == b.record.run.run_id:
        say("the same run")
        return
    if diff.same_key:
        say("the same key: code, parameters, data and environment are the same")
        return
    rows = [
        (name, _short(pair.a), _short(pair.b), "same" if pair.a == pair.b else "differs")
        for name, pair in diff.parts.items()
    ]
    output.print_table(("part", "A", "B", ""), rows)
    if diff.lineage:
        say(f"\n{diff.lineage}")


def _short(digest: str | None) -> str:
    return digest[:_HASH] if digest else "-"


def _print_code(diff: Diff, *, patch: bool, limit: int | None) -> None:
    files = diff.code.files
    if files:
        rows = []
        for file in files:
            counts = f"+{file.insertions} -{file.deletions}"
            known = file.insertions is not None
            hashes = f"{_short(file.a)} -> {_short(file.b)}"
            rows.append((file.change, file.path, counts if known else hashes))
        title = _differ("code", files) + ("" if patch else "; --patch prints the lines")
        _section(title, ("", "file", "lines"), rows, limit)
    if paths := diff.code.incomparable:
        say(
            f"\ncode: {counted(len(paths), 'file')} not comparable: hashes made by different rules,"
            " and no text here"
        )
        for path in paths[:limit]:
            say(f"  {path}")
        _more(len(paths), limit)
    _pairs("left out of the code part", diff.excluded, limit)
    if patch and diff.code.patch:
        say(f"\n{diff.code.patch}".rstrip("\n"))


def _print_data(diff: Diff, limit: int | None) -> None:
    _pairs("data", diff.data, limit)
    if diff.images and (kinds := diff.images.by_kind()):
        say(f"\nimages: {diff.images.total_a} in A, {diff.images.total_b} in B")
        if not diff.data:
            say("  (of the same data: they were split or checked in another way)")
        _names(kinds, limit)
    if diff.files:
        say("\nfiles of the data, by DVC's cache")
        _names(diff.files, limit)


def _names(kinds: Mapping[Any, Sequence[str]], limit: int | None) -> None:
    for kind, names in kinds.items():
        if names:
            say(f"  {len(names)} {kind}")
            for name in names[:limit]:
                say(f"    {name}")
            _more(len(names), limit, "    ")


def _print_artifacts(diff: Diff, limit: int | None) -> None:
    if diff.artifacts or diff.equal_artifacts:
        rows = [(pair.name, _short(pair.a), _short(pair.b)) for pair in diff.artifacts]
        title = f"files: {diff.equal_artifacts} the same, {len(rows)} not"
        _section(title, ("sha256", "A", "B"), rows, limit)


def _print_metrics(diff: Diff, limit: int | None) -> None:
    rows = []
    classes = [pair for pair in diff.metrics if pair.name.startswith(f"{CLASS_AP}/")]
    for pair in [pair for pair in diff.metrics if pair not in classes] + classes[:limit]:
        a, b = ("-" if value is None else f"{value:.6g}" for value in (pair.a, pair.b))
        rows.append((pair.name, a, b, "" if "-" in (a, b) else f"{pair.b - pair.a:+.3g}"))
    if rows or diff.equal_metrics:
        numbers = ("A", "B", "B - A")
        title = f"metrics: {diff.equal_metrics} the same, {len(diff.metrics)} not"
        _section(title, ("", *numbers), rows, None, right=numbers)
        _more(len(classes), limit)
    for score in diff.scores:
        output.print_beside("  B - A  ", str(score))


def _pairs(what: str, pairs: Sequence[Pair], limit: int | None) -> None:
    if pairs:
        rows = [(pair.name, _value(pair.a), _value(pair.b)) for pair in pairs]
        _section(_differ(what, pairs), ("", "A", "B"), rows, limit)


def _differ(what: str, items: Sequence[object]) -> str:
    return f"{what}: {len(items)} differ{'s' if len(items) == 1 else ''}"


def _section(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    limit: int | None,
    right: Sequence[str] = (),
) -> None:
    say(f"\n{title}")
    if rows:
        output.print_table(columns, rows[:limit], right=right)
    _more(len(rows), limit)


def _more(count: int, limit: int | None, indent: str = "") -> None:
    if limit is not None and count > limit:
        say(f"{indent}... and {count - limit} more (--all)")


def _value(value: Any) -> str:
    """Fit a value into a cell; long texts keep their beginning and end."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = ", ".join(map(str, value)) or "none"
    text = "-" if value is None else str(value)
    half = (_CELL - 3) // 2
    return text if len(text) <= _CELL else f"{text[:half]}...{text[-half:]}"


_HELP = "Prefix of a key; KEY:RUN for one of its runs; . for the tree as it stands."


def diff(
    a: Annotated[str, Argument(help=_HELP)],
    b: Annotated[str, Argument(help=_HELP)],
    patch: Annotated[bool, Option("--patch", help="Print the lines of code that differ.")] = False,
    all_names: Annotated[
        bool, Option("--all", help="Print every name, not the first 10 of each kind.")
    ] = False,
    exit_code: Annotated[
        bool, Option("--exit-code", help="End with 3 if the keys differ.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two runs: the parts of their keys, metrics, machines."""
    from runkey.registry.diff import compare

    sides = (_side(a), _side(b))
    found = compare(*sides, output.checkout())
    if as_json:
        output.print_json(_as_dict(sides, found, patch=patch))
    else:
        print_diff(*sides, found, patch=patch, limit=None if all_names else 10)
    if exit_code and not found.same_key:
        output.answer_no()


def _side(address: str) -> Side:
    from runkey.registry.diff import TREE, run_side, tree_side

    if address == TREE:
        return tree_side(output.workspace())
    return run_side(output.library(offline=True), address, output.checkout())


def _as_dict(sides: tuple[Side, Side], found: Diff, *, patch: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for name, side in zip("ab", sides, strict=True):
        run = side.record and side.record.run
        logged = {name: getattr(run, name, None) for name in ("run_id", "name", "status")}
        about = {"address": side.address, "key": side.key}
        answer[name] = {**about, **logged, "notes": side.notes}
    answer |= asdict(found)
    if not patch:
        del answer["code"]["patch"]
    for pair in answer["metrics"]:
        numbers = (pair["a"], pair["b"])
        pair["difference"] = None if None in numbers else pair["b"] - pair["a"]
    return answer
