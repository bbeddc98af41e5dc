"""`runkey open KEY...`: where MLflow shows runs."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from runkey.cli.output import AsJson, Key, library, print_json, store
from runkey.errors import RegistryError
from runkey.identity.key import short_key

# `runkey get KEY`: the files of a run.


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
    """Copy a run's files here; each is checked against the hash that the run recorded."""
    from runkey.registry.dvc_cache import download, in_the_way
    from runkey.registry.library import find_run
    from runkey.registry.query import size

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
        print(f"  {size(stored.size):>9}  {target / path}")
    print(f"{len(files)} files of {record.label}, {size(total)}, hashes verified")


_HOST = "127.0.0.1"


def open_page(
    keys: Annotated[
        list[str], typer.Argument(help="Beginnings of keys; KEY:RUN for one of a key's runs.")
    ],
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Where `make ui` serves a local store.")
    ] = 5000,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in the web browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the address of a run's MLflow page; of several, that of their comparison."""
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
