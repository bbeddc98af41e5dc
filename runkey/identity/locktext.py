"""The package entries of conda-lock.yml: read line by line where it is written as conda-lock does.

YAML's parser takes 0.15 s for the lock's packages, this 0.01 s, and the key of a tree is to be
known at once.  Only text whose every line is of the few forms below is read this way; for all else
(edited by hand, another version of conda-lock, damaged) there is no answer, and YAML decides.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from runkey.identity.yamltext import parse_yaml_text

# Scalars that mean in YAML exactly what stands there: no `: `, ` #`, anchors, tags, flow brackets.
_PLAIN = r"[A-Za-z0-9_<=](?:[A-Za-z0-9_.+!~<>=*|,/%@-]|:(?=/))*"
_SCALAR = rf"(?:{_PLAIN}|'(?:[ -&(-~]|'')*')"
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"

_HEAD = re.compile(
    r"(?:#[ -~]*\n)*version: 1\nmetadata:\n(?:  [ -~]*\n)+package:\n",
)
_ENTRY = re.compile(
    rf"- name: (?P<name>{_SCALAR})\n"
    rf"  version: (?P<version>{_SCALAR})\n"
    rf"  manager: (?P<manager>{_SCALAR})\n"
    rf"  platform: (?P<platform>{_SCALAR})\n"
    rf"  dependencies:(?P<dependencies> {{}}\n|\n(?:    {_NAME}: {_SCALAR}\n)+)"
    rf"  url: (?P<url>{_SCALAR})\n"
    rf"  hash:\n"
    rf"    md5: (?P<md5>{_SCALAR})\n"
    rf"(?:    sha256: (?P<sha256>{_SCALAR})\n)?"
    rf"  category: (?P<category>{_SCALAR})\n"
    rf"  optional: (?P<optional>{_SCALAR})\n"
)
_DEPENDENCY = re.compile(rf"    ({_NAME}): ({_SCALAR})\n")
_SCALARS = ("name", "version", "manager", "platform", "url", "category", "optional")


def lock_entries(text: str) -> list[dict[str, Any]] | None:
    """The entries under `package`, as `runkey.identity.yamltext` reads them.

    Args:
        text: contents of a conda-lock file.

    Returns:
        None if any line is of another form than conda-lock gives it.
    """
    head = _HEAD.match(text)
    if not head or not _is_whole(text[: head.end() - len("package:\n")]):
        return None
    entries = []
    position = head.end()
    while position < len(text):
        match = _ENTRY.match(text, position)
        if not match:
            return None
        entries.append(_entry(match))
        position = match.end()
    return entries or None


def _is_whole(head: str) -> bool:
    """Whether nothing that begins before `package:` reaches beyond it, such as an open quote."""
    try:
        return isinstance(parse_yaml_text(head), dict)
    except yaml.YAMLError:
        return False


def _entry(match: re.Match[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {field: _value(match[field]) for field in _SCALARS}
    entry["dependencies"] = {
        name: _value(wanted) for name, wanted in _DEPENDENCY.findall(match["dependencies"])
    }
    kinds = ("md5", "sha256") if match["sha256"] else ("md5",)
    entry["hash"] = {kind: _value(match[kind]) for kind in kinds}
    return entry


def _value(scalar: str) -> str:
    """What a scalar says: without its quotes, in which `''` is one quote."""
    return scalar[1:-1].replace("''", "'") if scalar.startswith("'") else scalar
