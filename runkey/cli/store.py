"""`runkey gc`, `index`, `replay` and `ui`: look after the store, and serve MLflow's pages on it."""

from __future__ import annotations

import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from runkey import paths
from runkey.cli import output
from runkey.cli.output import (
    AsJson,
    Key,
    checkout,
    claims,
    library,
    print_json,
    print_table,
    store,
    workspace,
)
from runkey.errors import RegistryError, RunkeyError
from runkey.identity.key import short_key
from runkey.progress import each, log_to_terminal
from runkey.units import format_bytes

if TYPE_CHECKING:
    from runkey.identity.record_cache import Rebuilt
    from runkey.registry.gc import Item
    from runkey.tracking.store import Store

_COMPARED = 3
"""Newest runs that `runkey ui` compares."""
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
    """List what may be deleted: failed runs, old checkpoints, dead claims."""
    from runkey.registry.gc import Scope, collect
    from runkey.tracking.transfer import delete_run

    workspace()
    place = store()
    scope = Scope(
        root=checkout(),
        home=place.home,
        library=library(),
        claims=claims(),
        delete_run=partial(delete_run, place),
    )
    items = collect(scope, older_than)
    failed = _remove(items) if apply else {}
    if as_json:
        rows = [
            {
                "kind": item.kind,
                "name": item.name,
                "why": item.why,
                "bytes": item.size,
                "age_days": round(item.age_seconds / 86400, 3),
                "deleted": apply and number not in failed,
                "error": failed.get(number),
            }
            for number, item in enumerate(items)
        ]
        print_json({"applied": apply, "bytes": sum(item.size for item in items), "items": rows})
    else:
        if not scope.is_local:
            print(_ONLY_HERE.format(place=scope.library.place))
        _print(items, failed, applied=apply)
    if failed:
        raise RegistryError(f"{len(failed)} of {len(items)} could not be deleted")


def _remove(items: list[Item]) -> dict[int, str]:
    """Delete all; return by the index of an item why it could not be deleted."""
    failed = {}
    for number, item in enumerate(each("delete", items, "items")):
        try:
            item.remove()
        except (RunkeyError, OSError) as error:
            failed[number] = str(error)
    return failed


def _print(items: list[Item], failed: dict[int, str], *, applied: bool) -> None:
    if not items:
        print("nothing to delete")
        return
    rows = []
    for number, item in enumerate(items):
        error = f"; not deleted: {failed[number]}" if number in failed else ""
        name = item.name if item.kind != "run" else item.name[: item.name.index(":") + 9]
        days = f"{item.age_seconds / 86400:.1f}"
        rows.append((item.kind, name, days, format_bytes(item.size), f"{item.why}{error}"))
    print_table(("kind", "name", "days", "size", "why"), rows, right=("days", "size"))
    gone = [item for number, item in enumerate(items) if number not in failed]
    total = format_bytes(sum(item.size for item in gone))
    if applied:
        print(f"deleted {len(gone)}, freed {total}")
    else:
        print(f"{len(gone)} may go, {total}; --apply deletes them")


def index(as_json: AsJson = False) -> None:
    """Write the cache of runs again from MLflow; needed only if it was lost."""
    from runkey.identity.record_cache import Rebuilt

    place = store()
    if place.is_server:
        if as_json:
            print_json(asdict(Rebuilt()))
        else:
            print("a tracking server is asked each time: there is no cache to write")
        return
    try:
        counts = _rebuild(place)
    except OSError as error:
        raise RegistryError(str(error)) from None
    if as_json:
        print_json(asdict(counts))
        return
    print(
        f"{counts.runs} runs in MLflow: {counts.written} records written, {counts.removed} removed"
    )


def _rebuild(place: Store) -> Rebuilt:
    from runkey.registry.library import LocalLibrary, ServerLibrary
    from runkey.tracking.store import served

    library = LocalLibrary(place.home, uri=place.uri)
    if place.database:
        return library.rebuild()
    # Only MLflow can read another kind of database.
    with served(place, 0) as (address, _), TemporaryDirectory() as folder:
        return library.rebuild(ServerLibrary(address, Path(folder)))


def replay(key: Key, as_json: AsJson = False) -> None:
    """Send MLflow what it lacks of a training that ended while it was away.

    A training without an MLflow run gets one.
    """
    from runkey.registry.library import find_run
    from runkey.tracking.replay import find_training, send_saved

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


def ui(
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Local port; 0: any free one.")
    ] = 0,
) -> None:
    """Serve MLflow's pages on the store until Ctrl-C, and print their addresses."""
    from runkey.params import load_params
    from runkey.tracking.store import served

    log_to_terminal()
    experiment = load_params(workspace() / paths.PARAMS).runtime.experiment
    # A process manager ends it as Ctrl-C does: MLflow's own processes end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    place = store()
    if place.is_server:
        print("\n".join(_pages(place.uri, experiment)))
        return
    try:
        with served(place, port) as (address, server):
            print("\n".join(_pages(address, experiment)))
            print("Ctrl-C ends it")
            server.wait()
    except KeyboardInterrupt:
        print("stopped")


def _pages(address: str, experiment: str) -> list[str]:
    """Return lines that name the run list and the comparison of the last runs."""
    from runkey.registry.query import Condition, Field, Query
    from runkey.registry.rest import RestClient, comparison_page, list_page
    from runkey.tracking.store import VIEW

    lines = ["all runs", f"  {list_page(RestClient(address), address, experiment, VIEW)}"]
    finished = Condition(Field("run", "status"), "=", "FINISHED")
    last = [record.run for record in library().find(Query(conditions=(finished,), limit=_COMPARED))]
    if len(last) > 1:
        names = ", ".join(f"{run.name} ({short_key(run.key)})" for run in last)
        lines += [f"comparison of the last {len(last)}: {names}"]
        lines += [f"  {comparison_page(address, last)}"]
    return lines
