"""`runkey show KEY`: all that is known of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from runkey.cli.output import AsJson, Key, print_json
from runkey.cli.place import claims, library, store


def show(
    key: Key,
    every_param: Annotated[
        bool, typer.Option("--all", help="Show all parameters, not only the changed ones.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run: status, key, metrics, parameters, what it ran on, files, where it is."""
    from runkey.registry.library import find_run
    from runkey.registry.reading.pages import run_page
    from runkey.registry.reading.show import describe, lines
    from runkey.registry.reading.state import status_now

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
