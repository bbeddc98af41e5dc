"""Render parameters or a preset as a complete, commented params.yaml, and the reference page.

    python -m runkey.params.render params.yaml

renews a file's fields and comments after a change of the schema, and keeps its values and head. A
preset is a small YAML file with the values that differ from the schema's defaults.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from runkey.errors import ParamsError, report_errors
from runkey.files import read_text, write_atomically
from runkey.params.load import load_params
from runkey.params.schema import LEVELS, Checks, Params, Section

_WIDTH = 100
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
# YAML 1.1 reads these words as booleans or null unless they are quoted.
_QUOTED = {"off", "on", "yes", "no", "null", "true", "false", ""}

_PAGE_HEAD = """\
# Parameters

<!-- Generated from runkey/params/schema.py by `make reference-docs`. -->

Every parameter of `params.yaml`. A key that is not written has its default; an unknown key is an
error. `runkey params` checks the file and prints every value, `runkey preset NAME` writes a
complete file from a preset, and `dvc exp run -S model.num_queries=40` changes one value for one
run. A check that `params.yaml` does not list needs a plus sign: `-S +data.checks.empty_box=fail`.
"""


def render(params: Params, head: str) -> str:
    """Return the text of a complete params.yaml, opened by `head`: lines with their `#`."""
    return "\n".join([*head.splitlines(), "", *_section(Params, params.written(), "")]) + "\n"


def head_of(text: str) -> str:
    """Return the comment lines that open a file, up to the first line without `#`."""
    return "\n".join(takewhile(lambda line: line.startswith("#"), text.splitlines()))


def preset_files() -> dict[str, Path]:
    """Return the file of each preset by name, sorted."""
    package = Path(__file__).parents[1]
    # The first is of a wheel, the second of a checkout.
    files = [*package.glob("presets/*.yaml")] or package.parent.glob("presets/*.yaml")
    return {path.stem: path for path in sorted(files)}


def preset_file(name: str) -> Path:
    """Return the file of a preset; ParamsError if there is none."""
    files = preset_files()
    if name not in files:
        raise ParamsError(f"preset {name}: not found (known: {', '.join(files)})")
    return files[name]


def render_preset(name: str) -> str:
    """Return the complete, commented params.yaml of a preset.

    Raises:
        ParamsError: there is no such preset, or its file is faulty.
    """
    file = preset_file(name)
    return render(load_params(file), head_of(read_text(file)))


def describe_preset(name: str) -> str:
    """Return the first paragraph of the preset's header, on one line."""
    paragraph = head_of(read_text(preset_files()[name])).split("\n#\n")[0]
    return paragraph.replace("\n#", " ").lstrip("# ").removeprefix(f"{name}: ")


def _section(section: type[Section], values: dict[str, Any], indent: str) -> Iterator[str]:
    fields = section.model_json_schema()["properties"]
    for name, value in values.items():
        if subsection := _subsections(section).get(name):
            if not indent:
                yield ""
            yield from _comment(subsection.__doc__ or "", "", indent)
            yield f"{indent}{name}:"
            yield from _section(subsection, value, indent + "  ")
            if subsection is Checks:
                yield from _check_list(indent + "  ")
        else:
            yield from _comment(fields[name]["description"], allowed(fields[name]), indent)
            yield f"{indent}{name}: {_scalar(value)}"


def _subsections(section: type[Section]) -> dict[str, type[Section]]:
    kinds = {name: field.annotation for name, field in section.model_fields.items()}
    return {n: k for n, k in kinds.items() if isinstance(k, type) and issubclass(k, Section)}


def _check_list(indent: str) -> Iterator[str]:
    """Comment lines that list the single checks with their policy at each level."""
    text = (
        "Set a check here, such as `empty_box: fail`, to override the level. The policy of each"
        " check at each level, and the allowed ones (docs/reference/params.md explains them):"
    )
    yield from _comment(text, "", indent)
    fields = Checks.model_json_schema()["properties"]
    rows = [(name, *policies, allowed(fields[name])) for name, policies in _policies()]
    for row in [("check", *LEVELS, "allowed"), *rows]:
        yield "{}#   {:<21} {:<7} {:<7} {:<5} {}".format(indent, *row)


def _policies() -> list[tuple[str, list[str]]]:
    """Each check with its policy at each level."""
    by_level = [Checks.policies(level) for level in LEVELS]
    return [(name, [policies[name] for policies in by_level]) for name in by_level[0]]


def _comment(text: str, allowed_values: str, indent: str) -> list[str]:
    bracket = f"[{allowed_values}]" if allowed_values else ""
    if len(f"{indent}# {bracket}") <= _WIDTH:
        # No-break spaces keep the brackets on one line while the text is wrapped.
        bracket = bracket.replace(" ", "\xa0")
    lines = textwrap.wrap(
        f"{_on_one_line(text)} {bracket}",
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\xa0", " ") for line in lines]


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def allowed(field: dict[str, Any]) -> str:
    """Describe what a field's JSON schema allows: `number >= 0, <= 1`, `fast | detr`, ..."""
    if "anyOf" in field:
        return " | ".join(allowed(branch) for branch in field["anyOf"])
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return " | ".join(str(value) for value in field["enum"])
    if field.get("type") == "array":
        items = field.get("items") or field["prefixItems"][0]
        return f"list of {allowed(items)}"
    words = {"integer": "whole number", "string": "text", "boolean": "true | false"}
    kind = field.get("type", "")
    bounds = [f" {sign} {field[key]:.12g}" for key, sign in _BOUNDS.items() if key in field]
    return f"{words.get(kind, kind)}{','.join(bounds)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in _QUOTED
        return value if plain else json.dumps(value)
    # Only YAML 1.2 reads 5e-05 as a number; every reader takes 5.0e-05 for one.
    return re.sub(r"^(-?\d+)e", r"\1.0e", json.dumps(value))


def reference() -> str:
    """Return the reference page of every parameter, in Markdown."""
    return _PAGE_HEAD + "".join(_page_section(Params, ""))


def _page_section(section: type[Section], prefix: str) -> Iterator[str]:
    fields, subsections = section.model_json_schema()["properties"], _subsections(section)
    if prefix:
        yield f"\n## {prefix[:-1]}\n\n{_on_one_line(section.__doc__ or '')}\n"
    yield "\n| Parameter | Values | Default | Effect |\n|---|---|---|---|\n"
    for name in ["level"] if section is Checks else [n for n in fields if n not in subsections]:
        field = fields[name]
        default = f"`{_scalar(field['default'])}`" if "default" in field else "required"
        yield _row(f"`{prefix}{name}`", _values(field), default, field["description"])
    if section is Checks:
        yield f"\n| Check | Values | {' | '.join(LEVELS)} | Fault |\n|---|---|---|---|---|---|\n"
        for name, policies in _policies():
            field = fields[name]
            yield _row(f"`{prefix}{name}`", _values(field), *policies, field["description"])
    for name, subsection in subsections.items():
        yield from _page_section(subsection, f"{prefix}{name}.")


def _row(*cells: str) -> str:
    return f"| {_on_one_line(' | '.join(cells))} |\n"


def _values(field: dict[str, Any]) -> str:
    return allowed(field).replace(" | ", ", ")


def main(paths: list[str]) -> None:
    """Rewrite each file."""
    for path in map(Path, paths):
        write_atomically(path, render(load_params(path), head_of(read_text(path))))


if __name__ == "__main__":
    with report_errors():
        main(sys.argv[1:])
