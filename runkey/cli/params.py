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

# `runkey preset` and `runkey params`: write params.yaml from a preset, check it, print it.


_ABOUT_WIDTH = 78


def preset(
    name: Annotated[str, typer.Argument(help="Name of the preset; none: list them.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite changes that are not committed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a preset as a complete, commented params.yaml; without a name, list the presets."""
    from runkey.params import presets  # 0.3 s

    if not name:
        about = {known: _about(presets.describe_preset(known)) for known in presets.preset_files()}
        if as_json:
            print_json(about)
        for known, text in () if as_json else about.items():
            print(f"{known:<16} {text}")
        return
    new = presets.render_preset(name)
    target = _target()
    old = target.read_text(encoding="utf-8") if target.is_file() else None
    written = old != new
    if written:
        if old is not None and not force and not _is_kept(old, target):
            raise ParamsError(
                "params.yaml: has changes that are not committed; commit them, or use --force to"
                " overwrite them"
            )
        target.write_text(new, encoding="utf-8", newline="\n")
    if as_json:
        print_json({"preset": name, "written": written})
    elif written:
        print(f"params.yaml is preset {name}: {_about(presets.describe_preset(name))}")
    else:
        print(f"params.yaml is preset {name} already")


def show(
    as_json: AsJson = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference page of all parameters instead.")
    ] = False,
) -> None:
    """Check params.yaml; print every value, defaults filled in."""
    if markdown:
        from runkey.params.render import reference

        print(reference(), end="")
        return
    from runkey.params import load_params

    values = load_params(workspace() / paths.PARAMS).flat(runtime=True)
    if as_json:
        print_json(values)
        return
    for name, value in values.items():
        print(f"{name} = {json.dumps(value)}")


def _target() -> Path:
    """Return the params.yaml to write: the repository's, or a new one in a folder with stages/."""
    if Path("stages").is_dir():
        return paths.PARAMS.resolve()
    return workspace() / paths.PARAMS


def _is_kept(text: str, target: Path) -> bool:
    """Return True if git's HEAD or a preset still has this params.yaml."""
    from runkey.params import presets

    committed = subprocess.run(
        ["git", "-C", str(target.parent), "show", f"HEAD:./{paths.PARAMS}"],
        capture_output=True,
        check=False,
    )
    if committed.returncode == 0 and committed.stdout == text.encode():
        return True
    return any(presets.render_preset(name) == text for name in presets.preset_files())


def _about(text: str) -> str:
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

    counts = make_sample(target)
    if as_json:
        print_json({"folder": str(target)})
        return
    for split, (images, balls) in counts.items():
        print(f"{split}: {images} images, {balls} balls")
    print(f"written to {target}/; annotations are COCO's, LICENSE.txt names the authors")
