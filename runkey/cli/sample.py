"""`runkey sample-data`: draw the sample data set again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runkey.cli.output import AsJson, print_json
from runkey.cli.place import workspace
from runkey.errors import DataError


def sample_data(
    out: Annotated[
        Path | None, typer.Argument(help="Folder to write to; default: data/ of the repository.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over sample data that are there already.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remake the sample data, numbered balls, from scikit-learn's pictures.

    They come out the same, byte for byte.
    """
    target = out or workspace() / "data"
    if not force and target.exists() and any(target.iterdir()):
        raise DataError(f"{target}: is not empty; name another folder, or say --force")
    from runkey.data.sample import make_sample  # scikit-learn: 2 s

    make_sample(target, (lambda _: None) if as_json else print)
    if as_json:
        print_json({"folder": str(target)})
        return
    print(f"written to {target}/; annotations are COCO's, LICENSE.txt names the authors")
