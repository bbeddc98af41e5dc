"""`runkey gc`: what may go, and how much that frees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from runkey.cli.output import AsJson, print_json, print_table
from runkey.cli.place import checkout, store, workspace
from runkey.errors import RegistryError, RunkeyError
from runkey.progress import each

if TYPE_CHECKING:
    from runkey.registry.collect import Item, Scope

_ONLY_HERE = "runs and claims are on {place}, which gc leaves alone; this is about this machine"


def gc(
    apply: Annotated[bool, typer.Option("--apply", help="Delete what is listed.")] = False,
    older_than: Annotated[
        float,
        typer.Option(
            "--older-than", min=0, metavar="DAYS", help="Only what ended or changed so long ago."
        ),
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """List what may go: failed runs, old checkpoints, dead claims; no finished run."""
    from runkey.registry.collect import collect

    workspace()
    scope = _scope()
    items = collect(scope, older_than)
    failed = _remove(items) if apply else {}
    if as_json:
        print_json(_as_dict(items, failed, applied=apply))
    else:
        if not scope.is_local:
            print(_ONLY_HERE.format(place=scope.library.place))
        _print(items, failed, applied=apply)
    if failed:
        raise RegistryError(f"{len(failed)} of {len(items)} could not be deleted")


def _scope() -> Scope:
    from runkey.registry.collect import Scope
    from runkey.registry.open import open_claims, open_library

    place = store()

    def delete_run(run_id: str) -> None:
        from runkey.tracking.remove import delete_run as delete

        delete(place, run_id)

    return Scope(
        root=checkout(),
        home=place.home,
        library=open_library(place.uri, place.home),
        claims=open_claims(place.uri, place.home),
        delete_run=delete_run,
    )


def _remove(items: list[Item]) -> dict[int, str]:
    """Delete all; by the number of an item why it could not be deleted."""
    failed = {}
    for number, item in enumerate(each("delete", items, "items")):
        try:
            item.remove()
        except (RunkeyError, OSError) as error:
            failed[number] = str(error)
    return failed


def _as_dict(items: list[Item], failed: dict[int, str], *, applied: bool) -> dict[str, Any]:
    rows = [
        {
            "kind": item.kind,
            "name": item.name,
            "why": item.why,
            "bytes": item.size,
            "age_days": round(item.age_seconds / 86400, 3),
            "deleted": applied and number not in failed,
            "error": failed.get(number),
        }
        for number, item in enumerate(items)
    ]
    return {"applied": applied, "bytes": sum(item.size for item in items), "items": rows}


def _print(items: list[Item], failed: dict[int, str], *, applied: bool) -> None:
    from runkey.registry.reading.columns import size

    if not items:
        print("nothing to delete")
        return
    rows = []
    for number, item in enumerate(items):
        error = f"; not deleted: {failed[number]}" if number in failed else ""
        name = item.name if item.kind != "run" else item.name[: item.name.index(":") + 9]
        days = f"{item.age_seconds / 86400:.1f}"
        rows.append((item.kind, name, days, size(item.size), f"{item.why}{error}"))
    print_table(("kind", "name", "days", "size", "why"), rows, right=("days", "size"))
    gone = [item for number, item in enumerate(items) if number not in failed]
    total = size(sum(item.size for item in gone))
    if applied:
        print(f"deleted {len(gone)}, freed {total}")
    else:
        print(f"{len(gone)} may go, {total}; --apply deletes them")
