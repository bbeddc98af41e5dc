"""`runkey preset` and `runkey params`: put a parameter file in place, check it, print it."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from runkey import paths
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
) -> None:
    """Copy presets/NAME.yaml to params.yaml."""
    from runkey.params import load_params  # 0.3 s

    root = workspace()
    presets = {path.stem: path for path in sorted((root / "presets").glob("*.yaml"))}
    if not name:
        for known, path in presets.items():
            print(f"{known:<16} {_about(path)}")
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
    if old == new and target.is_file():
        print(f"params.yaml is preset {name} already")
        return
    target.write_bytes(new)
    print(f"params.yaml is preset {name}: {_about(presets[name])}")


def show(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a line per value.")
    ] = False,
) -> None:
    """Check params.yaml; print every value, defaults filled in."""
    from runkey.params import load_params

    values = load_params(workspace() / paths.PARAMS).flat(runtime=True)
    if as_json:
        print(json.dumps(values, indent=2))
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
