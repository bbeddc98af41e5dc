"""`runkey list`: the runs, newest first."""

from __future__ import annotations

import time
from collections import Counter
from typing import Annotated

import typer

from runkey.cli.output import AsJson, print_json, print_table
from runkey.cli.place import claims, library


def list_runs(
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            "-w",
            help="Condition: lr=5e-05, AP>0.6, status=FINISHED, name~warm, started>2026-11-01; of"
            " several all must hold.",
        ),
    ] = None,
    sort: Annotated[
        str,
        typer.Option("--sort", "-s", help="Metric, parameter, tag, or key, name, status, seconds."),
    ] = "started",
    ascending: Annotated[
        bool, typer.Option("--ascending", help="Smallest or oldest first.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="Runs at most; 0: all.")] = 20,
    columns: Annotated[
        str,
        typer.Option(
            "--columns",
            "-c",
            help="Names with commas between: key, when, status, AP, took, name, where, or any"
            " metric, parameter or tag. A + first adds to the usual ones.",
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List recorded runs, newest first."""
    from runkey.identity.key import older_rule
    from runkey.registry.reading import columns as show
    from runkey.registry.reading.query import Query, find_field, parse_condition, split_condition
    from runkey.registry.reading.state import known_runs, status_now

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


def _columns(asked: str, usual: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in asked.removeprefix("+").split(",") if name.strip()]
    return [*usual, *names] if asked.startswith("+") or not names else names
