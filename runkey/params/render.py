"""Write parameters as a complete YAML file: every field, with its effect, unit and range above it.

    python -m runkey.params.render params.yaml presets/*.yaml

rewrites files from their own values and the schema's comments, after a field was added or changed.
The comment block at a file's head is kept.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from runkey.params.load import load_params
from runkey.params.root import Params

_WIDTH = 100
# YAML 1.1 readers take these for booleans; quoted, every reader sees text.
_QUOTED = {"off", "on", "yes", "no", "null", "true", "false", ""}


def render(params: Params, head: str) -> str:
    """The file's text.

    Args:
        params: the values.
        head: comment lines, each with its `#`, that open the file.
    """
    schema = Params.model_json_schema()
    lines = [*head.splitlines(), ""]
    lines += _section(schema, schema["$defs"], params.model_dump(mode="json"), "")
    return "\n".join(lines) + "\n"


def head_of(text: str) -> str:
    """The comment lines that open a file, up to the first line without `#`."""
    lines = text.splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(lines[:count])


def _section(
    schema: dict[str, Any], sections: dict[str, Any], values: dict[str, Any], indent: str
) -> list[str]:
    lines: list[str] = []
    for name, value in values.items():
        field = schema["properties"][name]
        target = sections.get(field.get("$ref", "").rpartition("/")[2])
        text = field.get("description") or (target or {}).get("description", "")
        if not indent and target:
            lines.append("")
        lines += _comment(text, "" if target else allowed(field), indent)
        if target:
            lines.append(f"{indent}{name}:")
            lines += _section(target, sections, value, indent + "  ")
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}")
    return lines


def _comment(text: str, allowed_values: str, indent: str) -> list[str]:
    # A no-break space while lines are cut, so that the brackets stay on one line.
    bracket = f"[{allowed_values}]".replace(" ", "\xa0") if allowed_values else ""
    lines = textwrap.wrap(
        " ".join([*text.split(), bracket]),
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\xa0", " ") for line in lines]


def allowed(field: dict[str, Any]) -> str:
    """What a field's JSON schema admits, in words: `number, 0..1`, `fast | detr`, ..."""
    if "anyOf" in field:
        return " | ".join(allowed(branch) for branch in field["anyOf"])
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return " | ".join(str(value) for value in field["enum"])
    if field.get("type") == "array":
        items = field.get("items") or field["prefixItems"][0]
        return f"list of {allowed(items)}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "bool"}
    kind = words.get(field.get("type", ""), field.get("type", ""))
    kind = "true | false" if kind == "bool" else kind
    return f"{kind}{_range(field)}"


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
    # 5e-05 is a number to YAML 1.2 alone; 5.0e-05 is one to every reader.
    return re.sub(r"^(-?\d+)e", r"\1.0e", json.dumps(value))


def main(paths: list[str]) -> None:
    """Rewrite each file."""
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        path.write_text(render(load_params(path), head_of(text)), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
