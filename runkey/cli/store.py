"""`runkey delete`, `gc`, `index`, `replay` and `ui`: look after the store, serve MLflow's pages."""

from __future__ import annotations

import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from runkey import paths
from runkey.cli import output
from runkey.cli.output import AsJson, Key
from runkey.errors import RegistryError
from runkey.identity.key import short_key
from runkey.identity.record_cache import Rebuilt
from runkey.progress import each, log_to_terminal, say
from runkey.registry.library import LocalLibrary, ServerLibrary, find_run
from runkey.registry.query import Condition, Field, Query
from runkey.registry.rest import comparison_page, list_page
from runkey.tracking.store import VIEW, Store, has_own_pages, served
from runkey.units import counted, format_bytes

if TYPE_CHECKING:
    from runkey.registry.gc import Item, Scope

_COMPARED = 3
"""Newest runs that `runkey ui` compares."""
_ONLY_HERE = (
    "runs and claims are on {place}, which gc leaves alone; this is about this machine, and about"
    " checkpoints there that are of no more use"
)


def gc(
    apply: Annotated[bool, Option("--apply", help="Delete what is listed.")] = False,
    older_than: Annotated[
        float,
        Option(
            "--older-than", min=0, metavar="DAYS", help="Only what ended or changed so long ago."
        ),
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """List what may be deleted: failed runs, old checkpoints, dead claims."""
    from runkey.registry.gc import collect

    scope = _scope()
    items = collect(scope, older_than)
    errors: list[str | None] = [None] * len(items)
    if apply:
        errors = [item.try_to_remove() for item in each("delete", items, "items")]
    if as_json:
        _print_json(items, errors, applied=apply)
    else:
        if not scope.is_local:
            say(_ONLY_HERE.format(place=scope.library.place))
        _print(items, errors, applied=apply)
    _check_all(errors)


def _scope() -> Scope:
    from runkey.registry.gc import Scope
    from runkey.tracking.transfer import delete_run

    output.workspace()
    store = output.store()
    return Scope(
        root=output.checkout(),
        home=store.home,
        library=output.library(),
        claims=output.claims(),
        delete_run=partial(delete_run, store),
    )


def _check_all(errors: list[str | None]) -> None:
    if failed := sum(error is not None for error in errors):
        raise RegistryError(f"{failed} of {len(errors)} could not be deleted")


def _print_json(items: list[Item], errors: list[str | None], *, applied: bool) -> None:
    rows = [
        {
            "kind": item.kind,
            "name": item.name,
            "why": item.why,
            "bytes": item.size,
            "age_days": round(item.age_seconds / 86400, 3),
            "deleted": applied and error is None,
            "error": error,
        }
        for item, error in zip(items, errors, strict=True)
    ]
    total = sum(item.size for item in items)
    output.print_json({"applied": applied, "bytes": total, "items": rows})


def _short(item: Item) -> str:
    return item.name if item.kind != "run" else item.name[: item.name.index(":") + 9]


def _print(items: list[Item], errors: list[str | None], *, applied: bool) -> None:
    if not items:
        say("nothing to delete")
        return
    rows = []
    for item, error in zip(items, errors, strict=True):
        why = item.why if error is None else f"{item.why}; not deleted: {error}"
        days = f"{item.age_seconds / 86400:.1f}"
        rows.append((item.kind, _short(item), days, format_bytes(item.size), why))
    output.print_table(("kind", "name", "days", "size", "why"), rows, right=("days", "size"))
    gone = [item.size for item, error in zip(items, errors, strict=True) if error is None]
    total = format_bytes(sum(gone))
    if applied:
        say(f"deleted {len(gone)}, freed {total}")
    else:
        say(f"{len(gone)} may go, {total}; --apply deletes them")


def delete(
    keys: Annotated[list[str], Argument(help="Prefixes of keys; KEY:RUN for one of a key's runs.")],
    apply: Annotated[bool, Option("--apply", help="Delete what is listed.")] = False,
    server: Annotated[
        bool, Option("--server", help="Also from a tracking server, for everybody who uses it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List all that is kept of runs, finished ones too; with --apply delete it.

    That is MLflow's run and model with their files, the record, DVC's experiments and run-cache
    entries, checkpoints, the snapshot's ref and the claim.
    """
    from runkey.registry.delete import plan

    scope = _scope()
    if not scope.is_local and not server:
        raise RegistryError(
            f"runs are on {scope.library.place}; --server deletes them there, for everybody who"
            " uses it"
        )
    deletion = plan(scope, keys)
    items = deletion.items
    errors: list[str | None] = deletion.apply() if apply else [None] * len(items)
    total = sum(item.size for item, error in zip(items, errors, strict=True) if error is None)
    if as_json:
        _print_json(items, errors, applied=apply)
    else:
        rows = [
            (item.kind, _short(item), format_bytes(item.size) if item.size else "", item.why)
            for item in items
        ]
        output.print_table(("kind", "name", "size", "what"), rows, right=("size",), whole=("name",))
        failed = [(item, error) for item, error in zip(items, errors, strict=True) if error]
        for item, error in failed:
            output.print_beside(f"{item.kind} {_short(item)}: ", f"not deleted: {error}")
        done = f"deleted {len(items) - len(failed)}, freed {format_bytes(total)}"
        listed = f"{counted(len(items), 'item')}, {format_bytes(total)}; --apply deletes them"
        say(done if apply else listed)
        for note in deletion.notes:
            say(note)
    _check_all(errors)


def index(as_json: AsJson = False) -> None:
    """Write the cache of runs again from MLflow; needed only if it was lost."""
    store = output.store()
    counts, line = Rebuilt(), "a tracking server is asked each time: there is no cache to write"
    if not store.is_server:
        try:
            counts = _rebuild(store)
        except OSError as error:
            raise RegistryError(str(error)) from None
        changes = f"{counted(counts.written, 'record')} written, {counts.removed} removed"
        line = f"{counted(counts.runs, 'run')} in MLflow: {changes}"
    output.print_answer(asdict(counts), line, as_json=as_json)


def _rebuild(store: Store) -> Rebuilt:
    library = LocalLibrary(store.home, uri=store.uri)
    if store.database:
        return library.rebuild()
    # Only MLflow can read another kind of database.
    with served(store, 0) as (address, _), TemporaryDirectory() as folder:
        return library.rebuild(ServerLibrary(address, Path(folder)))


def replay(key: Key, as_json: AsJson = False) -> None:
    """Send MLflow what it lacks of a training that ended while it was away.

    A training without an MLflow run gets one.
    """
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
        counts = f"{counted(sent.values, 'value')} and {counted(sent.files, 'file')}"
        line = f"run {sent.run_id}, {sent.status}: {counts} sent"
    output.print_answer(answer, line, as_json=as_json)


def ui(
    port: Annotated[
        int, Option("--port", min=0, max=65535, help="Local port; 0: any free one.")
    ] = 0,
) -> None:
    """Serve MLflow's pages on the store until Ctrl-C, and print their addresses."""
    from runkey.params import load_params

    log_to_terminal()
    experiment = load_params(output.workspace() / paths.PARAMS).runtime.experiment
    # A process manager ends it as Ctrl-C does: MLflow's own processes end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    store = output.store()
    if store.is_server:
        say(*_pages(store.uri, experiment, VIEW))
        return
    try:
        with served(store, port, experiment) as (address, server):
            say(*_pages(address, experiment, "" if has_own_pages() else VIEW))
            say("Ctrl-C ends it")
            server.wait()
    except KeyboardInterrupt:
        say("stopped")


def _pages(address: str, experiment: str, view: str) -> list[str]:
    """Return lines that name the run list (in a shared view) and the last runs' comparison."""
    lines = ["all runs", f"  {list_page(address, experiment, view)}"]
    finished = Condition(Field("run", "status"), "=", "FINISHED")
    newest = Query(conditions=(finished,), limit=_COMPARED)
    last = [record.run for record in output.library().find(newest)]
    if len(last) > 1:
        names = ", ".join(f"{run.name} ({short_key(run.key)})" for run in last)
        lines += [f"comparison of the last {len(last)}: {names}"]
        lines += [f"  {comparison_page(address, last)}"]
    return lines
