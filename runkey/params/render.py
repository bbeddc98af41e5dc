"""Render parameters or a preset as a complete, commented params.yaml, and the reference page.

    python -m runkey.params.render params.yaml

rewrites files with their own values and the schema's current comments.  Run it after adding a
field.  The comment block at the head of a file is kept.  A preset is a small YAML file with the
values that differ from the schema's defaults.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runkey.errors import ParamsError
from runkey.params.load import load_params
from runkey.params.schema import LEVELS, Checks, Params

_WIDTH = 100
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
    schema = Params.model_json_schema()
    lines = [*head.splitlines(), ""]
    lines += _section(schema, schema["$defs"], params.written(), "")
    return "\n".join(lines) + "\n"


def head_of(text: str) -> str:
    """Return the comment lines that open a file, up to the first line without `#`."""
    lines = text.splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(lines[:count])


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


def _section(
    schema: dict[str, Any], sections: dict[str, Any], values: dict[str, Any], indent: str
) -> list[str]:
    lines: list[str] = []
    for name, value in values.items():
        field = schema["properties"][name]
        target = sections.get(_section_name(field))
        if target:
            lines += [] if indent else [""]
            lines += _comment(_description(target), "", indent)
            lines.append(f"{indent}{name}:")
            lines += _section(target, sections, value, indent + "  ")
            if target["title"] == Checks.__name__:
                lines += _check_list(indent + "  ")
        else:
            lines += _comment(_description(field), allowed(field), indent)
            lines.append(f"{indent}{name}: {_scalar(value)}")
    return lines


def _section_name(field: dict[str, Any]) -> str:
    """Return the class of a field that is a section of its own, else nothing."""
    return str(field.get("$ref", "")).rpartition("/")[2]


def _description(field: dict[str, Any]) -> str:
    return " ".join(field.get("description", "").split())


def _check_list(indent: str) -> list[str]:
    """Return comment lines that list the single checks with their policy at each level."""
    text = (
        "Set a check here, such as `empty_box: fail`, to override the level. The policy of each"
        " check at each level, and the allowed ones (docs/reference/params.md explains them):"
    )
    fields = Checks.model_json_schema()["properties"]
    rows = [("check", *LEVELS, "allowed")]
    rows += [(n, *policies, allowed(fields[n])) for n, policies in _policies()]
    table = [f"{indent}#   {r[0]:<21} {r[1]:<7} {r[2]:<7} {r[3]:<5} {r[4]}" for r in rows]
    return [*_comment(text, "", indent), *table]


def _policies() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each check with its policy at each level."""
    by_level = [Checks.policies(level) for level in LEVELS]
    for name in by_level[0]:
        yield name, tuple(policies[name] for policies in by_level)


def _comment(text: str, allowed_values: str, indent: str) -> list[str]:
    bracket = f"[{allowed_values}]" if allowed_values else ""
    if len(f"{indent}# {bracket}") <= _WIDTH:
        # No-break spaces keep the brackets on one line while the text is wrapped.
        bracket = bracket.replace(" ", "\xa0")
    lines = textwrap.wrap(
        f"{text} {bracket}",
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\xa0", " ") for line in lines]


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
    return f"{words.get(kind, kind)}{_range(field)}"


def _range(field: dict[str, Any]) -> str:
    bounds = [
        f" {sign} {_number(field[key])}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if key in field
    ]
    return ",".join(bounds)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in _QUOTED
        return value if plain else json.dumps(value)
    # Only YAML 1.2 reads 5e-05 as a number; every reader takes 5.0e-05 for one.
    return re.sub(r"^(-?\d+)e", r"\1.0e", json.dumps(value))


def reference() -> str:
    """Return the reference page of every parameter, in Markdown."""
    schema = Params.model_json_schema()
    return _PAGE_HEAD + "".join(_page_section(schema, schema["$defs"], ""))


def _page_section(schema: dict[str, Any], sections: dict[str, Any], prefix: str) -> Iterator[str]:
    fields = schema["properties"]
    single = {n: field for n, field in fields.items() if _section_name(field) not in sections}
    if prefix:
        yield f"\n## {prefix[:-1]}\n\n{_description(schema)}\n"
    if schema["title"] == Checks.__name__:
        single = {"level": fields["level"]}
    yield "\n| Parameter | Values | Default | Effect |\n|---|---|---|---|\n"
    for name, field in single.items():
        default = f"`{_scalar(field['default'])}`" if "default" in field else "required"
        yield f"| `{prefix}{name}` | {_values(field)} | {default} | {_description(field)} |\n"
    if schema["title"] == Checks.__name__:
        yield f"\n| Check | Values | {' | '.join(LEVELS)} | Fault |\n|---|---|---|---|---|---|\n"
        for name, policies in _policies():
            cells = [f"`{prefix}{name}`", _values(fields[name]), *policies]
            yield f"| {' | '.join(cells)} | {_description(fields[name])} |\n"
    for name, field in fields.items():
        if _section_name(field) in sections:
            yield from _page_section(sections[_section_name(field)], sections, f"{prefix}{name}.")


def _values(field: dict[str, Any]) -> str:
    return allowed(field).replace(" | ", ", ")


def main(paths: list[str]) -> None:
    """Rewrite each file."""
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        path.write_text(render(load_params(path), head_of(text)), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
