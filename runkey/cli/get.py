"""`runkey get KEY`: the files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runkey.cli.output import AsJson, Key, print_json
from runkey.cli.place import library
from runkey.errors import RegistryError
from runkey.identity.key import short_key


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
    from runkey.registry.download import download, in_the_way
    from runkey.registry.library import find_run
    from runkey.registry.reading.columns import size

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
