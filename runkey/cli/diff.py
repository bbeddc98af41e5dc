"""`runkey diff`: compare two runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runkey.cli.output import (
    AsJson,
    answer_no,
    checkout,
    library,
    print_json,
    print_table,
    workspace,
)
from runkey.identity.key import short_key

if TYPE_CHECKING:
    from runkey.registry.diff import Diff, Pair, Side


_CELL = 44
"""Characters of a value; longer ones are cut in the middle."""
_HASH = 12


def print_diff(a: Side, b: Side, diff: Diff, *, patch: bool, limit: int | None) -> None:
    """Print all sections that are not empty.

    Args:
        a: the one side.
        b: the other.
        diff: the comparison of the two.
        patch: print the lines of code that differ.
        limit: most names of each kind; None: all.
    """
    print_table(("", "key", "run", "started", "status", ""), [_head("A", a), _head("B", b)])
    _print_verdict(a, b, diff)
    _pairs("params", diff.params, limit)
    _pairs("commands", diff.commands, limit)
    _print_code(diff, patch=patch, limit=limit)
    _print_data(diff, limit)
    _pairs("environment", diff.packages, limit)
    _print_artifacts(diff, limit)
    _print_metrics(diff)
    _pairs("witness (no part of the key)", diff.witness, None)
    _pairs("installed packages (no part of the key)", diff.installed, limit)
    for name, side in (("A", a), ("B", b)):
        for note in side.notes:
            print(f"\nnote on {name}: {note}", end="")
    if a.notes or b.notes:
        print()


def _head(name: str, side: Side) -> tuple[str, ...]:
    if side.record is None:
        return (name, short_key(side.key), ".", "", "", "the tree as it stands")
    run = side.record.run
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started_ms / 1000))
    return (name, short_key(side.key), run.run_id[:8], started, run.status, run.name)


def _print_verdict(a: Side, b: Side, diff: Diff) -> None:
    print()
    if a.record and b.record and a.record.run.run_id == b.record.run.run_id:
        print("the same run")
        return
    if diff.same_key:
        print("the same key: code, parameters, data and environment are the same")
        return
    rows = [
        (name, _short(pair.a), _short(pair.b), "same" if pair.a == pair.b else "differs")
        for name, pair in diff.parts.items()
    ]
    print_table(("part", "A", "B", ""), rows)


def _short(digest: str | None) -> str:
    return digest[:_HASH] if digest else "-"


def _print_code(diff: Diff, *, patch: bool, limit: int | None) -> None:
    files = diff.code.files
    if files:
        _heading("code", len(files), "" if patch else "; --patch prints the lines")
        rows = []
        for file in files[:limit]:
            counts = f"+{file.insertions} -{file.deletions}"
            known = file.insertions is not None
            hashes = f"{_short(file.a)} -> {_short(file.b)}"
            rows.append((file.change, file.path, counts if known else hashes))
        print_table(("", "file", "lines"), rows)
        _more(len(files), limit)
    _print_incomparable(diff.code.incomparable, limit)
    _pairs("left out of the code part", diff.excluded, limit)
    if patch and diff.code.patch:
        print(f"\n{diff.code.patch}", end="")


def _print_incomparable(paths: Sequence[str], limit: int | None) -> None:
    if paths:
        print(
            f"\ncode: {len(paths)} files cannot be compared: their hashes are made by different"
            " rules, and their text is not here"
        )
        for path in paths[:limit]:
            print(f"  {path}")
        _more(len(paths), limit)


def _print_data(diff: Diff, limit: int | None) -> None:
    _pairs("data", diff.data, limit)
    if diff.images and not diff.images.is_empty:
        print(f"\nimages: {diff.images.total_a} in A, {diff.images.total_b} in B")
        if not diff.data:
            print("  (of the same data: they were split or checked in another way)")
        _names(diff.images.by_kind(), limit)
    if diff.files:
        print("\nfiles of the data, by DVC's cache")
        _names(diff.files.by_kind(), limit)


def _names(kinds: Mapping[str, Sequence[str]], limit: int | None) -> None:
    for kind, names in kinds.items():
        if names:
            print(f"  {len(names)} {kind}")
            for name in names[:limit]:
                print(f"    {name}")
            _more(len(names), limit, "    ")


def _print_artifacts(diff: Diff, limit: int | None) -> None:
    if not diff.artifacts and not diff.equal_artifacts:
        return
    print(f"\nfiles: {diff.equal_artifacts} the same, {len(diff.artifacts)} not")
    rows = [(pair.name, _short(pair.a), _short(pair.b)) for pair in diff.artifacts[:limit]]
    if rows:
        print_table(("sha256", "A", "B"), rows)
    _more(len(diff.artifacts), limit)


def _print_metrics(diff: Diff) -> None:
    if not diff.metrics and not diff.equal_metrics:
        return
    print(f"\nmetrics: {diff.equal_metrics} the same, {len(diff.metrics)} not")
    rows = [(p.name, _number(p.a), _number(p.b), _change(p)) for p in diff.metrics]
    if rows:
        print_table(("", "A", "B", "B - A"), rows, right=("A", "B", "B - A"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _change(pair: Pair) -> str:
    return "" if None in (pair.a, pair.b) else f"{pair.b - pair.a:+.3g}"


def _pairs(what: str, pairs: Sequence[Pair], limit: int | None) -> None:
    if not pairs:
        return
    _heading(what, len(pairs))
    print_table(("", "A", "B"), [(p.name, _value(p.a), _value(p.b)) for p in pairs[:limit]])
    _more(len(pairs), limit)


def _heading(what: str, count: int, tail: str = "") -> None:
    print(f"\n{what}: {count} differ{'s' if count == 1 else ''}{tail}")


def _more(count: int, limit: int | None, indent: str = "") -> None:
    if limit is not None and count > limit:
        print(f"{indent}... and {count - limit} more (--all)")


def _value(value: Any) -> str:
    """Fit a value into a cell; long texts keep their beginning and end."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = ", ".join(map(str, value)) or "none"
    text = "-" if value is None else str(value)
    half = (_CELL - 3) // 2
    return text if len(text) <= _CELL else f"{text[:half]}...{text[-half:]}"


_HELP = "Prefix of a key; KEY:RUN for one of its runs; . for the tree as it stands."


def diff(
    a: Annotated[str, typer.Argument(help=_HELP)],
    b: Annotated[str, typer.Argument(help=_HELP)],
    patch: Annotated[
        bool, typer.Option("--patch", help="Print the lines of code that differ.")
    ] = False,
    all_names: Annotated[
        bool, typer.Option("--all", help="Print every name, not the first 10 of each kind.")
    ] = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with 3 if the keys differ.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two runs: the parts of their keys, metrics, machines."""
    from runkey.registry.diff import compare

    sides = (_side(a), _side(b))
    found = compare(*sides, checkout())
    if as_json:
        print_json(_as_dict(sides, found, patch=patch))
    else:
        print_diff(*sides, found, patch=patch, limit=None if all_names else 10)
    if exit_code and not found.same_key:
        answer_no()


def _side(address: str) -> Side:
    from runkey.registry.diff import TREE, run_side, tree_side

    if address == TREE:
        return tree_side(workspace())
    return run_side(library(), address, checkout())


def _as_dict(sides: tuple[Side, Side], found: Diff, *, patch: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for name, side in zip("ab", sides, strict=True):
        run = side.record.run if side.record else None
        answer[name] = {
            "address": side.address,
            "key": side.key,
            "run_id": run.run_id if run else None,
            "name": run.name if run else None,
            "status": run.status if run else None,
            "notes": side.notes,
        }
    answer |= asdict(found)
    if not patch:
        del answer["code"]["patch"]
    for pair in answer["metrics"]:
        numbers = (pair["a"], pair["b"])
        pair["difference"] = None if None in numbers else pair["b"] - pair["a"]
    return answer
