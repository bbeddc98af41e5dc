"""`runkey sample-data`: draw the sample data set again."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from runkey import paths
from runkey.cli.output import AsJson, print_json, workspace
from runkey.errors import DataError, ParamsError

# `runkey preset` and `runkey params`: put a parameter file in place, check it, print it.


_ABOUT_WIDTH = 78


def preset(
    name: Annotated[
        str, typer.Argument(help="File name in presets/ without .yaml; none: list them.")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Write over changes that nothing else holds.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy presets/NAME.yaml to params.yaml."""
    from runkey.params import load_params  # 0.3 s

    root = workspace()
    presets = {path.stem: path for path in sorted((root / "presets").glob("*.yaml"))}
    if not name:
        about = {known: _about(path) for known, path in presets.items()}
        if as_json:
            print_json(about)
        for known, text in () if as_json else about.items():
            print(f"{known:<16} {text}")
        return
    if name not in presets:
        raise ParamsError(f"presets/{name}.yaml: not found (known: {', '.join(presets)})")
    load_params(presets[name])
    target = root / paths.PARAMS
    new = presets[name].read_bytes()
    old = target.read_bytes() if target.is_file() else new
    if not force and old not in _kept(root, presets):
        raise ParamsError(
            "params.yaml: holds changes that neither git nor a preset has; commit them, or say"
            " --force to lose them"
        )
    is_there = old == new and target.is_file()
    if not is_there:
        target.write_bytes(new)
    if as_json:
        print_json({"preset": name, "written": not is_there})
    elif is_there:
        print(f"params.yaml is preset {name} already")
    else:
        print(f"params.yaml is preset {name}: {_about(presets[name])}")


def show(as_json: AsJson = False) -> None:
    """Check params.yaml; print every value, defaults filled in."""
    from runkey.params import load_params

    values = load_params(workspace() / paths.PARAMS).flat(runtime=True)
    if as_json:
        print_json(values)
        return
    for name, value in values.items():
        print(f"{name} = {json.dumps(value)}")


def _kept(root: Path, presets: dict[str, Path]) -> list[bytes]:
    """The contents of params.yaml that are not lost when it is overwritten."""
    committed = subprocess.run(
        ["git", "-C", str(root), "show", f"HEAD:./{paths.PARAMS}"], capture_output=True, check=False
    )
    contents = [path.read_bytes() for path in presets.values()]
    return contents if committed.returncode else [*contents, committed.stdout]


def _about(path: Path) -> str:
    """What a preset says about itself in its first paragraph, cut to a line."""
    from runkey.params.render import head_of

    paragraph = head_of(path.read_text(encoding="utf-8")).split("\n#\n")[0]
    text = paragraph.replace("\n#", " ").lstrip("# ").removeprefix(f"{path.stem}: ")
    return textwrap.shorten(text, _ABOUT_WIDTH, placeholder=" ...")


# `runkey key`: the key that a stage's result would have, of the tree as it stands.


def key(
    stage: Annotated[str, typer.Argument(help="Stage of dvc.yaml.")] = "train",
    explain: Annotated[
        bool,
        typer.Option("--explain", help="List every file, parameter, hash and package in it."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the key of the tree as it stands; nothing needs to have run."""
    from runkey.identity.key import explain as lines_of
    from runkey.identity.key import make_recipe

    recipe = make_recipe(stage, workspace())
    if as_json:
        print_json(recipe.as_dict())
    elif explain:
        print("\n".join(lines_of(recipe)))
    else:
        print(recipe.key)


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
