"""`runkey open KEY...`: where MLflow shows runs."""

from __future__ import annotations

import socket
import sys
from typing import Annotated

import typer

from runkey.cli.output import AsJson, print_json
from runkey.cli.place import library, store

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
    from runkey.registry.reading.pages import comparison_page, run_page

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
