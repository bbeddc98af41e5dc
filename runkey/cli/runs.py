"""`runkey list`, `show`, `get` and `open`: find runs, read about them, copy their files."""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from runkey.cli.output import AsJson, Key, claims, library, print_json, print_table, store
from runkey.errors import RegistryError
from runkey.identity.key import older_rule, short_key
from runkey.units import format_bytes

_HOST = "127.0.0.1"


def list_runs(
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            "-w",
            help="Condition: lr=5e-05, AP>0.6, status=FINISHED, name~warm, started>2026-11-01;"
            " repeat it to require several.",
        ),
    ] = None,
    sort: Annotated[
        str,
        typer.Option("--sort", "-s", help="Metric, parameter, tag, or key, name, status, seconds."),
    ] = "started",
    ascending: Annotated[
        bool, typer.Option("--ascending", help="Smallest or oldest first.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="Most runs; 0: all.")] = 20,
    columns: Annotated[
        str,
        typer.Option(
            "--columns",
            "-c",
            help="Names separated by commas: key, when, status, AP, took, name, where, or any"
            " metric, parameter or tag. A leading + adds to the default ones.",
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List recorded runs, newest first."""
    from runkey.registry import show
    from runkey.registry.claims import status_now
    from runkey.registry.library import known_runs
    from runkey.registry.query import Query, find_field, parse_condition, split_condition

    runs = library()
    chosen = _columns(columns, show.COLUMNS)
    own = {*show.COLUMNS, "started"}
    conditions = [split_condition(text)[0] for text in where or ()]
    known = known_runs(runs, {sort, *chosen, *conditions} - own)
    query = Query(
        conditions=tuple(parse_condition(condition, known) for condition in where or ()),
        sort=find_field(sort, known),
        descending=not ascending,
        limit=limit or None,
    )
    found = runs.find(query)
    if as_json:
        print_json([record.as_dict() for record in found])
        return
    if not found:
        print(f"no run{' fulfils that' if where else ''} in {runs.place}")
        return
    now = claims()
    states = {record.run.run_id: status_now(record, now) for record in found}
    rows = show.cells(found, chosen, states, time.time())
    right = [c for n, c in enumerate(chosen) if show.is_number_column(c, [row[n] for row in rows])]
    print_table(chosen, rows, right=right, whole=("key", "when", "status", "AP", "took"))
    older = Counter(filter(None, (older_rule(record.key) for record in found)))
    for rule, count in older.items():
        print(f"{count} of these: {rule}")


def _columns(asked: str, default: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in asked.removeprefix("+").split(",") if name.strip()]
    return [*default, *names] if asked.startswith("+") or not names else names


def show_run(
    key: Key,
    every_param: Annotated[
        bool, typer.Option("--all", help="Show all parameters, not only the changed ones.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run: status, key, metrics, parameters, environment, files, location."""
    from runkey.registry.claims import status_now
    from runkey.registry.library import find_run
    from runkey.registry.server_library import run_page
    from runkey.registry.show import describe, lines

    runs, place = library(), store()
    record = find_run(runs, key)
    others = [r for r in runs.matching(record.key) if r.run.run_id != record.run.run_id]
    status = status_now(record, claims())
    if as_json:
        print_json(
            {
                **record.as_dict(),
                "status_now": status,
                "same_key": [other.as_dict()["run"] for other in others],
            }
        )
        return
    page = run_page(runs.place, record.run) if place.is_server else ""
    rows = describe(record, status=status, others=others, page=page, every_param=every_param)
    print("\n".join(lines(rows)))


def get(
    key: Key,
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder to put them in [the short key].")
    ] = None,
    only: Annotated[
        str,
        typer.Option("--only", help="`all`, or a file or folder of the run, such as `model`."),
    ] = "all",
    force: Annotated[
        bool, typer.Option("--force", help="Replace files that hold something else.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a run's files here; check each against the hash that the run recorded."""
    from runkey.registry.dvc_cache import download, in_the_way
    from runkey.registry.library import find_run

    runs = library()
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
        if not prefix or path == prefix or path.startswith(f"{prefix}/")
    }
    if not files:
        known = sorted({path.split("/")[0] for path in record.details.files})
        raise RegistryError(f"{record.label}: {only}: no such file; it has {', '.join(known)}")
    target = to or Path(short_key(record.key))
    if not force and (other := in_the_way(record, files, target)):
        raise RegistryError(
            f"{target / other[0]}: holds something else, and so do {len(other) - 1} more;"
            " --force replaces them"
            if other[1:]
            else f"{target / other[0]}: holds something else; --force replaces it"
        )
    download(runs, record, files, target)
    total = sum(stored.size for stored in files.values())
    if as_json:
        print_json(
            {"key": record.key, "run": record.run.run_id, "to": str(target)}
            | {"files": {path: stored.sha256 for path, stored in files.items()}}
        )
        return
    for path, stored in files.items():
        print(f"  {format_bytes(stored.size):>9}  {target / path}")
    print(f"{len(files)} files of {record.label}, {format_bytes(total)}, hashes verified")


def open_page(
    keys: Annotated[
        list[str], typer.Argument(help="Prefixes of keys; KEY:RUN for one of a key's runs.")
    ],
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port of `make ui` for a local store.")
    ] = 5000,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in the web browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the address of a run's MLflow page; of several runs, of their comparison."""
    from runkey.registry.library import find_run
    from runkey.registry.server_library import comparison_page, run_page

    runs, place = library(), store()
    found = [find_run(runs, key).run for key in keys]
    server = runs.place if place.is_server else f"http://{_HOST}:{port}"
    page = run_page(server, found[0]) if len(found) == 1 else comparison_page(server, found)
    served = place.is_server or _answers(port)
    if as_json:
        print_json({"page": page, "served": served, "runs": [run.run_id for run in found]})
    else:
        print(page)
    if not served:
        option = "" if port == 5000 else f" PORT={port}"
        print(f"nothing listens there; `make ui{option}` serves it", file=sys.stderr)
    elif browser:
        import webbrowser

        webbrowser.open(page)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((_HOST, port)) == 0
