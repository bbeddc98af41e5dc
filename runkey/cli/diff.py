"""`runkey diff`: what differs between two runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runkey.cli.output import AsJson, answer_no, print_json
from runkey.cli.place import checkout, library, workspace

if TYPE_CHECKING:
    from runkey.registry.diff.diff import Diff
    from runkey.registry.diff.diff_sides import Side

_HELP = "Beginning of a key; KEY:RUN for one of its runs; . for the tree as it stands."


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
    from runkey.registry.diff.diff import compare

    sides = (_side(a), _side(b))
    found = compare(*sides, checkout())
    if as_json:
        print_json(_as_dict(sides, found, patch=patch))
    else:
        from runkey.cli.diff_text import print_diff

        print_diff(*sides, found, patch=patch, limit=None if all_names else 10)
    if exit_code and not found.same_key:
        answer_no()


def _side(address: str) -> Side:
    from runkey.registry.diff.diff_sides import TREE, run_side, tree_side

    if address == TREE:
        return tree_side(workspace())
    return run_side(library(), address, checkout())


def _as_dict(sides: tuple[Side, Side], found: Diff, *, patch: bool) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, side in zip("ab", sides, strict=True):
        run = side.record.run if side.record else None
        told[name] = {
            "address": side.address,
            "key": side.key,
            "run_id": run.run_id if run else None,
            "name": run.name if run else None,
            "status": run.status if run else None,
            "notes": side.notes,
        }
    told |= asdict(found)
    if not patch:
        del told["code"]["patch"]
    for pair in told["metrics"]:
        numbers = (pair["a"], pair["b"])
        pair["difference"] = None if None in numbers else pair["b"] - pair["a"]
    return told
