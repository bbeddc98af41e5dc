"""A recipe as text: the key, its four parts, and everything that each part hashes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from runkey.identity.key import PARTS, Recipe

_SHOWN = 12
"""Digits of a file's or package's hash; `as_dict` has them all."""
_WIDTH = 100


def explain(recipe: Recipe) -> Iterator[str]:
    """The lines of `runkey key --explain`; packages come last, since they are most of them."""
    yield recipe.key
    yield f"stage {recipe.stage}: what decides its result, known before anything has run"
    parts = recipe.parts
    for part in PARTS:
        yield ""
        yield f"{part:<12} {parts[part]}"
        yield from (f"  {line}" for line in _LINES[part](recipe.preimages[part]))
    yield ""
    yield "commands"
    width = max(map(len, recipe.cmd))
    yield from (f"  {stage:<{width}}  {cmd}" for stage, cmd in recipe.cmd.items())


def _code(preimage: Mapping[str, Any]) -> Iterator[str]:
    files = preimage["files"]
    yield f"{len(files)} files; of Python the syntax tree, without comments, docstrings, log text:"
    yield from (f"{sha256[:_SHOWN]}  {path}" for path, sha256 in sorted(files.items()))
    yield "left out, since they tell of a run and do not change it:"
    yield from (f"{'':<{_SHOWN}}  {path}" for path in preimage["excluded"])


def _params(preimage: Mapping[str, Any]) -> Iterator[str]:
    yield f"{len(preimage)} values, defaults filled in; none of runtime, no path of a file:"
    yield from (f"{name} = {json.dumps(value)}" for name, value in sorted(preimage.items()))


def _data(preimage: Mapping[str, Any]) -> Iterator[str]:
    yield "what `dvc add` writes into the .dvc file of each:"
    yield from (f"{name} = {md5}" for name, md5 in sorted(preimage.items()))


def _environment(preimage: Mapping[str, Any]) -> Iterator[str]:
    packages = preimage["packages"]
    yield f"{len(packages)} packages of conda-lock.yml for {preimage['platform']}:"
    for name, version, build, content in packages:
        kind, _, digits = content.partition(":")
        short = digits[:_SHOWN] if kind == "sha256" else f"{kind}:{digits[:_SHOWN]}"
        line = f"{short}  {name} {version}"
        # Builds are flush right where there is room: the eye reads names and versions.
        yield f"{line} {build:>{max(0, _WIDTH - 3 - len(line))}}"


_LINES = {"code": _code, "params": _params, "data": _data, "environment": _environment}
