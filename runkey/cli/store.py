"""`runkey replay KEY`: send to MLflow what it lacks of a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runkey.cli import output
from runkey.cli.output import AsJson, Key, checkout, print_json, print_table, store, workspace
from runkey.errors import RegistryError, RunkeyError
from runkey.identity.record import Record
from runkey.progress import each, log_to_terminal, progress

if TYPE_CHECKING:
    from runkey.registry.gc import Item, Scope


# `runkey gc`: what may go, and how much that frees.


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
    from runkey.registry.gc import collect

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
    from runkey.registry.gc import Scope
    from runkey.registry.server_library import open_claims, open_library

    place = store()

    def delete_run(run_id: str) -> None:
        from runkey.tracking.transfer import delete_run as delete

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
    from runkey.registry.query import size

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


# `runkey index`: the records' files, written again from MLflow.


def index(as_json: AsJson = False) -> None:
    """Write the records of all runs again from MLflow; needed only if they were lost."""
    from runkey.registry.mlflow_runs import count_runs
    from runkey.registry.record_cache import Rebuilt, rebuild

    place = store()
    if place.is_server:
        if as_json:
            print_json(Rebuilt().as_dict())
        else:
            print("a tracking server is asked each time: there are no records to write")
        return
    from runkey.tracking.transfer import recorded_runs

    log_to_terminal(stderr=True)
    records = recorded_runs(place)
    if place.database and place.database.is_file() and (total := count_runs(place.uri)):
        records = _watched(records, total)
    counts = rebuild(place.home, records)
    if as_json:
        print_json(counts.as_dict())
        return
    print(
        f"{counts.runs} runs in MLflow: {counts.written} records written, {counts.removed} removed"
    )


def _watched(records: Iterable[Record], total: int) -> Iterator[Record]:
    """The records, with the progress of whoever takes them."""
    with progress("index", total, "runs") as steps:
        for record in records:
            yield record
            steps.advance()


def replay(key: Key, as_json: AsJson = False) -> None:
    """Send MLflow what it lacks of a training that ended while it was away.

    A training that MLflow never heard of gets its run.
    """
    from runkey.registry.library import find_run
    from runkey.tracking.replay import find_training, send_saved

    log_to_terminal(stderr=True)
    store = output.store()
    folder = find_training(store.home, key)
    if folder is None:
        run = find_run(output.library(), key).run
        answer = {"run_id": run.run_id, "status": run.status, "values": 0, "files": 0}
        line = f"run {run.run_id}, {run.status}: nothing is kept here that it could lack"
    else:
        sent = send_saved(store, folder)
        answer = asdict(sent)
        line = f"run {sent.run_id}, {sent.status}: {sent.values} values and {sent.files} files sent"
    if as_json:
        print_json(answer)
    else:
        print(line)
