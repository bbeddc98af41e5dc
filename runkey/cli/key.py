"""`runkey key`: the key that a stage's result would have, of the tree as it stands."""

from __future__ import annotations

from typing import Annotated

import typer

from runkey.cli.output import AsJson, print_json
from runkey.cli.place import workspace


def key(
    stage: Annotated[str, typer.Argument(help="Stage of dvc.yaml.")] = "train",
    explain: Annotated[
        bool,
        typer.Option("--explain", help="List every file, parameter, hash and package in it."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the key of the tree as it stands; nothing needs to have run."""
    from runkey.identity.explain import explain as lines_of
    from runkey.identity.key import make_recipe

    recipe = make_recipe(stage, workspace())
    if as_json:
        print_json(recipe.as_dict())
    elif explain:
        print("\n".join(lines_of(recipe)))
    else:
        print(recipe.key)
