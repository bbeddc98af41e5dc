"""DVC's files, read without importing DVC: stages of dvc.yaml, md5s of .dvc files, settings."""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runkey.errors import RecipeError, RegistryError
from runkey.files import (
    LARGE,
    FormatError,
    check_tree,
    check_yaml,
    parse_json,
    read_text,
)
from runkey.paths import INITIAL_WEIGHTS, PARAMS

PIPELINE = Path("dvc.yaml")
_OUTPUTS = ("outs", "metrics", "plots")
_FROM_GIT = f"`git checkout {PIPELINE}` restores the last committed one"
_TEMPLATE = re.compile(r"\$\{([^}]+)\}")
DIR = ".dir"
"""End of the md5 of a folder."""
MD5 = re.compile(r"[0-9a-f]{32}(?:\.dir)?")


def read_yaml_text(path: Path) -> Any:
    """Read a YAML file as dicts, lists and strings: every scalar stays text.  None if it is empty.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it is not YAML in UTF-8; the text gives the line.
    """
    import yaml  # what reads no pipeline saves its import

    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        return check_tree(yaml.load(check_yaml(read_text(path)), loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise FormatError(f"not YAML{where}") from None
    except (TypeError, RecursionError):
        raise FormatError("not YAML: a list or a section in place of a name") from None


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
        """The module of the command `python -m <module>`; RecipeError if it is another one."""
        words = self.cmd.split()
        if "-m" not in words[:-1]:
            raise RecipeError(
                f"{PIPELINE}: stage {self.name} runs `{self.cmd}`, not `python -m <module>`,"
                " so its code is not known"
            )
        return words[words.index("-m") + 1]


def read_pipeline(root: Path, values: Mapping[str, Any]) -> dict[str, Stage]:
    """Read the stages of `root`/dvc.yaml by name; `values` of parameters fill in `${...}`.

    Raises:
        RecipeError: the file is missing, is not a pipeline, or uses an unknown value.
    """
    try:
        tree = read_yaml_text(root / PIPELINE)
    except FileNotFoundError:
        raise RecipeError(f"{PIPELINE}: not found in {root.resolve()}") from None
    except FormatError as error:
        raise RecipeError(f"{PIPELINE}: {error}; {_FROM_GIT}") from None
    stages = tree.get("stages") if isinstance(tree, dict) else None
    if not isinstance(stages, dict) or not stages:
        raise RecipeError(f"{PIPELINE}: holds no stages; {_FROM_GIT}")
    return {name: _stage(name, entry, values) for name, entry in stages.items()}


def _stage(name: str, entry: Any, values: Mapping[str, Any]) -> Stage:
    if not isinstance(entry, dict) or not isinstance(entry.get("cmd"), str):
        raise RecipeError(f"{PIPELINE}: stage {name} has no single `cmd`")

    def value_of(match: re.Match[str]) -> str:
        if (wanted := match[1].strip()) not in values:
            raise RecipeError(
                f"{PIPELINE}: stage {name} uses ${{{wanted}}}, no value of params.yaml"
            )
        return str(values[wanted])

    def listed(key: str) -> list[Any]:
        found = entry.get(key) or []
        if not isinstance(found, list) or not all(isinstance(one, str | dict) for one in found):
            raise RecipeError(f"{PIPELINE}: stage {name}: {key} is no list of names; {_FROM_GIT}")
        return found

    def paths(key: str) -> tuple[str, ...]:
        # An entry is a path, or a path with options: `metrics.json: {cache: false}`.
        names = (n for e in listed(key) for n in ((e,) if isinstance(e, str) else e))
        return tuple(str(PurePosixPath(_TEMPLATE.sub(value_of, n))) for n in names)

    return Stage(
        name=name,
        cmd=" ".join(_TEMPLATE.sub(value_of, entry["cmd"]).split()),
        # In keys stand the hashes of the weights that it leads to, and no stage `check`.
        deps=tuple(p for p in paths("deps") if p != INITIAL_WEIGHTS.name),
        params=tuple(p for item in listed("params") for p in _param_names(name, item)),
        outs=tuple(out for key in _OUTPUTS for out in paths(key)),
    )


def _param_names(stage: str, item: Any) -> Iterable[str]:
    """Return the names in an entry of `params`: a name, or `params.yaml: [names]`."""
    if isinstance(item, str):
        return (item,)
    names = item.get(PARAMS.name) if isinstance(item, dict) and len(item) == 1 else None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise RecipeError(f"{PIPELINE}: stage {stage} lists params {item}; only {PARAMS} is read")
    return tuple(names)


def chain(stages: Mapping[str, Stage], name: str) -> tuple[Stage, ...]:
    """Return the stages before a stage and itself; RecipeError: no such stage, or a cycle."""
    if name not in stages:
        raise RecipeError(f"{PIPELINE}: no stage {name}; there are {', '.join(stages)}")
    ordered: dict[Stage, None] = {}

    def visit(stage: Stage, later: tuple[Stage, ...]) -> None:
        if stage in later:
            raise RecipeError(f"{PIPELINE}: stage {stage.name} depends on its own outputs")
        for other in stages.values():
            if any(meets(dep, out) for dep in stage.deps for out in other.outs):
                visit(other, (*later, stage))
        ordered.setdefault(stage)

    visit(stages[name], ())
    return tuple(ordered)


def covers(folder: str, path: str) -> bool:
    """Return True if `path` is `folder` or is inside it; both posix and repo-relative."""
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def meets(dep: str, out: str) -> bool:
    """Return True if a dependency and an output share files."""
    return covers(dep, out) or covers(out, dep)


def tracked_md5(path: str, root: Path) -> str | None:
    """Return `md5:<hash>` of a path that DVC tracks, by itself or inside a folder; else None.

    It is what `dvc add` wrote into `<path>.dvc`; for a part of a tracked folder, what it would
    write for that part alone.  The data themselves are not read.

    Raises:
        RecipeError: the .dvc file holds no md5, or its list of files is not in DVC's cache or
            does not hold the path.
    """
    file = pointer_of(path, root)
    if file is None:
        return None
    tracked = PurePosixPath(file.removesuffix(".dvc"))
    if PurePosixPath(path) == tracked:
        return f"md5:{_pointer_md5(file, root)}"
    part = tracked_files(path, root)
    if part is None:
        raise RecipeError(
            f"{file}: the md5 of {path}, a part of {tracked}, is not known, since DVC's cache does"
            f" not hold the list of files in {tracked}; run `dvc pull {file}`"
        )
    if not part:
        inner = PurePosixPath(path).relative_to(tracked)
        raise RecipeError(f"{file}: {tracked} has no {inner}; `dvc add {tracked}` lists it anew")
    return f"md5:{part[''] if '' in part else folder_md5(part)}"


def tracked_files(path: str, root: Path) -> dict[str, str] | None:
    """Return md5 by name, relative to `path`, of the files at a path that DVC tracks.

    The name of a tracked file is "" itself.  None if DVC's cache does not hold the list.
    """
    file = pointer_of(path, root)
    assert file is not None
    tracked, md5 = PurePosixPath(file.removesuffix(".dvc")), _pointer_md5(file, root)
    if not md5.endswith(DIR):
        return {"": md5} if PurePosixPath(path) == tracked else {}
    listed = _read_list(md5, root)
    if listed is None or PurePosixPath(path) == tracked:
        return listed
    inner = PurePosixPath(path).relative_to(tracked).as_posix()
    if inner in listed:
        return {"": listed[inner]}
    start = f"{inner}/"
    return {n.removeprefix(start): listed[n] for n in listed if n.startswith(start)}


def folder_md5(files: Mapping[str, str]) -> str:
    """Return the md5 that DVC gives a folder with these files, md5 by name."""
    listed = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    text = json.dumps(listed, sort_keys=True).encode()
    return f"{hashlib.md5(text, usedforsecurity=False).hexdigest()}{DIR}"


def _pointer_md5(file: str, root: Path) -> str:
    tracked = PurePosixPath(file.removesuffix(".dvc"))
    try:
        outs = read_yaml_text(root / file)["outs"]
        return next(str(out["md5"]) for out in outs if out["path"] == tracked.name)
    except (ValueError, KeyError, TypeError, StopIteration):
        raise RecipeError(
            f"{file}: holds no md5 of {tracked.name}; `dvc add {tracked}` writes it"
        ) from None


def pointer_of(path: str, root: Path) -> str | None:
    """Return the .dvc file, relative to `root`, that tracks `path` or a folder above it."""
    tracked = (PurePosixPath(path), *PurePosixPath(path).parents[:-1])
    return next((f"{t}.dvc" for t in tracked if (root / f"{t}.dvc").is_file()), None)


def _read_list(md5: str, root: Path) -> dict[str, str] | None:
    """Return md5 by path of the files in a folder; None if the cache has no whole list of it."""
    folder = cache_folder(root)
    # DVC 2 put it in the second place.
    for base in (folder / "files" / "md5", folder):
        listed = read_folder_list(base / md5[:2] / md5[2:], md5)
        if listed is not None:
            return listed
    return None


def read_folder_list(path: Path, md5: str) -> dict[str, str] | None:
    """Return md5 by path of the files in a folder, from DVC's list of it; None if damaged.

    `md5` is that of the folder, which ends in `DIR`.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        text = read_text(path, LARGE)
        digest = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        if digest == md5.removesuffix(DIR):
            return md5s(parse_json(text), "relpath")
    return None


def md5s(items: Any, name: str) -> dict[str, str]:
    """Return md5 by path of inputs, outputs or files; what is no md5 must not become a path."""
    return {str(item[name]): item["md5"] for item in items if MD5.fullmatch(item["md5"])}


def cache_folder(root: Path) -> Path:
    """Return a checkout's DVC cache: `cache.dir` of its settings (`read_config`), or .dvc/cache."""
    folder = root / ".dvc" / "cache"
    base = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "dvc"
    users = Path(os.environ.get("DVC_GLOBAL_CONFIG_DIR") or base) / "config"
    for file in (users, root / ".dvc" / "config", root / ".dvc" / "config.local"):
        if value := read_config(file).get("cache", "dir", fallback="").strip("\"'"):
            try:
                folder = (file.parent / Path(value).expanduser()).resolve()
            except (OSError, RuntimeError, ValueError):
                raise RegistryError(f"{file}: cache.dir {value[:60]!a}: no folder") from None
    return folder


def read_config(path: Path) -> configparser.ConfigParser:
    """Read one of DVC's settings files, empty if it is not there; RegistryError if it is none."""
    config = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        with suppress(FileNotFoundError):
            config.read_string(read_text(path))
    except (configparser.Error, ValueError, AttributeError):
        raise RegistryError(f"{path}: not a DVC settings file; `dvc config -l` says more") from None
    return config
