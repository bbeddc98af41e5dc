"""`runkey preset` and `runkey params`: put a parameter file in place, check it, print it."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from runkey import paths
from runkey.cli.output import AsJson, print_json
from runkey.cli.place import workspace
from runkey.errors import ParamsError

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
