"""Presets: small YAML files with the values that differ from the schema's defaults.

`runkey preset NAME` renders one as a complete, commented params.yaml.
"""

from __future__ import annotations

from pathlib import Path

from runkey.errors import ParamsError
from runkey.params.load import load_params
from runkey.params.render import head_of, render


def preset_folder() -> Path:
    """Return the folder of preset files: `runkey/presets` in a wheel, `presets` in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "presets"


def preset_files() -> dict[str, Path]:
    """Return the file of each preset by name, sorted."""
    return {path.stem: path for path in sorted(preset_folder().glob("*.yaml"))}


def render_preset(name: str) -> str:
    """Return the complete, commented params.yaml of a preset.

    Raises:
        ParamsError: there is no such preset, or its file is faulty.
    """
    files = preset_files()
    if name not in files:
        raise ParamsError(f"preset {name}: not found (known: {', '.join(files)})")
    return render(load_params(files[name]), head_of(files[name].read_text(encoding="utf-8")))


def describe_preset(name: str) -> str:
    """Return the first paragraph of the preset's header, on one line."""
    paragraph = head_of(preset_files()[name].read_text(encoding="utf-8")).split("\n#\n")[0]
    return paragraph.replace("\n#", " ").lstrip("# ").removeprefix(f"{name}: ")
