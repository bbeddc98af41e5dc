"""The stages of dvc.yaml and the md5s of *.dvc files, read as files: DVC itself is not imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runkey.identity.dvc_files import md5_below
from runkey.identity.errors import RecipeError
from runkey.identity.yamltext import read_yaml_text
from runkey.paths import PARAMS

PIPELINE = Path("dvc.yaml")
_OUTPUTS = ("outs", "metrics", "plots")
_TEMPLATE = re.compile(r"\$\{([^}]+)\}")


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml, with `${...}` filled in.  Paths are posix and repo-relative."""

    name: str
    cmd: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    """Names in params.yaml, of values or of whole sections."""
    outs: tuple[str, ...]
    """Outputs, metrics and plots."""

    @property
    def module(self) -> str:
        """The module that the command runs, of `python -m <module>`.

        Raises:
            RecipeError: the command is another one.
        """
        words = self.cmd.split()
        if "-m" not in words[:-1]:
            raise RecipeError(
                f"{PIPELINE}: stage {self.name} runs `{self.cmd}`, not `python -m <module>`,"
                " so its code is not known"
            )
        return words[words.index("-m") + 1]


def read_pipeline(root: Path, values: Mapping[str, Any]) -> dict[str, Stage]:
    """The stages of `root`/dvc.yaml by name.

    Args:
        root: the repository.
        values: parameters by dotted name, for `${...}`.

    Raises:
        RecipeError: the file is missing, is no pipeline, or uses a value that is not there.
    """
    try:
        tree = read_yaml_text(root / PIPELINE)
    except FileNotFoundError:
        raise RecipeError(f"{PIPELINE}: not found in {root.resolve()}") from None
    except ValueError as error:
        raise RecipeError(f"{PIPELINE}: {error}") from None
    stages = tree.get("stages") if isinstance(tree, dict) else None
    if not isinstance(stages, dict):
        raise RecipeError(f"{PIPELINE}: holds no stages")
    return {name: _stage(name, entry, values) for name, entry in stages.items()}


def _stage(name: str, entry: Any, values: Mapping[str, Any]) -> Stage:
    if not isinstance(entry, dict) or not isinstance(entry.get("cmd"), str):
        raise RecipeError(f"{PIPELINE}: stage {name} has no single `cmd`")

    def fill(text: str) -> str:
        return _TEMPLATE.sub(lambda match: _value(match[1].strip(), name, values), text)

    def entries(key: str) -> tuple[str, ...]:
        # An entry is a path, or a path with options: `metrics.json: {cache: false}`.
        return tuple(fill(t) for item in entry.get(key) or () for t in _names(item))

    return Stage(
        name=name,
        cmd=" ".join(fill(entry["cmd"]).split()),
        deps=tuple(map(_posix, entries("deps"))),
        params=tuple(p for item in entry.get("params") or () for p in _param_names(name, item)),
        outs=tuple(_posix(out) for key in _OUTPUTS for out in entries(key)),
    )


def _names(item: Any) -> Iterable[str]:
    return (item,) if isinstance(item, str) else tuple(item)


def _param_names(stage: str, item: Any) -> Iterable[str]:
    """The names of one entry of `params`: a name, or `params.yaml: [names]`."""
    if isinstance(item, str):
        return (item,)
    if not isinstance(item, dict) or list(item) != [PARAMS.name] or not item[PARAMS.name]:
        raise RecipeError(f"{PIPELINE}: stage {stage} lists params {item}; only {PARAMS} is read")
    return tuple(item[PARAMS.name])


def _value(name: str, stage: str, values: Mapping[str, Any]) -> str:
    if name not in values:
        raise RecipeError(f"{PIPELINE}: stage {stage} uses ${{{name}}}, no value of params.yaml")
    return str(values[name])


def _posix(path: str) -> str:
    return str(PurePosixPath(path))


def covers(folder: str, path: str) -> bool:
    """Whether `path` is `folder` or lies in it; both posix and repo-relative."""
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def chain(stages: Mapping[str, Stage], name: str) -> tuple[Stage, ...]:
    """The stage and all stages that it depends on, itself last, each once.

    Raises:
        RecipeError: there is no such stage, or stages depend on each other in a circle.
    """
    if name not in stages:
        raise RecipeError(f"{PIPELINE}: no stage {name}; there are {', '.join(stages)}")
    ordered: list[Stage] = []
    open_stages: list[str] = []

    def visit(stage: Stage) -> None:
        if stage in ordered:
            return
        if stage.name in open_stages:
            raise RecipeError(f"{PIPELINE}: stage {stage.name} depends on its own outputs")
        open_stages.append(stage.name)
        for other in stages.values():
            if any(meets(dep, out) for dep in stage.deps for out in other.outs):
                visit(other)
        open_stages.pop()
        ordered.append(stage)

    visit(stages[name])
    return tuple(ordered)


def meets(dep: str, out: str) -> bool:
    """Whether a dependency and an output share files: one is the other, or lies in it."""
    return covers(dep, out) or covers(out, dep)


def tracked_md5(path: str, root: Path) -> str | None:
    """`md5:<hash>` of a file or folder that DVC tracks, by itself or in a folder; else None.

    It is what `dvc add` wrote into `<path>.dvc`; of a part of a tracked folder, what it would write
    for that part alone.  The data themselves are not looked at.

    Raises:
        RecipeError: there is such a .dvc file, and it holds no md5, or its list of files is not in
            DVC's cache, or does not hold the path.
    """
    file = pointer_of(path, root)
    if file is None:
        return None
    tracked = PurePosixPath(file.removesuffix(".dvc"))
    try:
        outs = read_yaml_text(root / file)["outs"]
        md5 = next(str(out["md5"]) for out in outs if out["path"] == tracked.name)
    except (ValueError, KeyError, TypeError, StopIteration):
        raise RecipeError(
            f"{file}: holds no md5 of {tracked.name}; `dvc add {tracked}` writes it"
        ) from None
    if PurePosixPath(path) != tracked:
        md5 = md5_below(file, tracked, md5, path, root)
    return f"md5:{md5}"


def pointer_of(path: str, root: Path) -> str | None:
    """The .dvc file, relative to `root`, of what DVC tracks as `path` or as a folder above it."""
    tracked = (PurePosixPath(path), *PurePosixPath(path).parents[:-1])
    return next((f"{t}.dvc" for t in tracked if (root / f"{t}.dvc").is_file()), None)
