"""`runkey export` and `runkey import`: a run as one file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from runkey.cli.output import AsJson, Key, print_beside, print_json
from runkey.cli.place import library, store, workspace
from runkey.cli.team import WithData, runs_of
from runkey.errors import RegistryError
from runkey.identity.key import short_key
from runkey.progress import progress
from runkey.registry.reading.columns import size


def export_run(
    key: Key,
    file: Annotated[Path, typer.Argument(help="Archive to write, such as run.zip.")],
    with_data: WithData = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there already.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run to one file: results, DVC's entries, snapshot and MLflow run."""
    from runkey.registry.library import find_run
    from runkey.registry.team.carry import PARTS
    from runkey.registry.team.carry import export_run as write

    if file.exists() and not force:
        raise RegistryError(f"{file}: is there already; name another, or say --force")
    record, place = find_run(library(), key), store()
    runs = runs_of(place)
    with progress("export", PARTS, "parts") as steps:
        done = write(record, workspace(), place.home, runs, file, with_data=with_data, steps=steps)
    packed = file.stat().st_size
    if as_json:
        print_json(asdict(done) | {"file": str(file), "archive_size": packed})
        return
    print_beside(
        f"{short_key(done.key)}: ",
        f"{done.files} files ({size(done.size)}) in {file}, {size(packed)};"
        f" `runkey import {file.name}` takes it in",
    )


def import_run(
    file: Annotated[Path, typer.Argument(help="Archive that `runkey export` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Take in a run from a file, checked whole; `dvc repro` then restores it."""
    from runkey.registry.team.carry import PARTS
    from runkey.registry.team.carry import import_run as take

    place = store()
    runs, local = runs_of(place), library()
    with progress("import", PARTS, "parts") as steps:
        done = take(file, workspace(), place.home, runs, local, steps=steps)
    if as_json:
        print_json(asdict(done))
        return
    state = "taken in as" if done.is_new else "was here already as"
    print_beside(
        f"{short_key(done.key)}: ",
        f"{done.files} files ({size(done.size)}) verified, {state} MLflow run {done.run_id}",
    )
