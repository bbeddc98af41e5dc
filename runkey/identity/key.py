"""The key of a stage's result: a hash over everything that decides it, known before it runs.

    recipe = make_recipe("train", root)
    recipe.key                  # rk2-<64 hex digits>
    recipe.preimages["code"]    # what one of its four parts hashes, to compare two runs

The recipe of a stage includes the code, parameters and data of the stages before it, never the
hashes of their outputs: a key that depends on outputs could not be looked up before they exist.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from runkey.errors import RecipeError
from runkey.hashing import canonical_json, sha256_bytes
from runkey.identity.code import (
    BYTES,
    EXCLUDED,
    RULE,
    code_rule,
    hash_files,
    import_closure,
    is_excluded,
)
from runkey.identity.dvc_yaml import Stage, chain, covers, meets, read_pipeline, tracked_md5
from runkey.identity.environment import environment_preimage
from runkey.identity.kept import KEPT, kept_values
from runkey.identity.pinned_weights import BACKBONE_WEIGHTS, INIT_FROM
from runkey.paths import LOCK, PARAMS, home_of, store_root
from runkey.progress import WIDTH
from runkey.units import counted

if TYPE_CHECKING:
    from runkey.params import Params


SCHEMA = "rk2"
"""Version of the rule; changes whenever the same inputs would give another key."""
OLDER = {"rk1": "bytes of the code"}
"""Rules of older keys, and what they hash of the code; such runs keep their keys."""
SCHEMAS = (SCHEMA, *OLDER)
ANY_SCHEMA = "rk[12]"
"""Regular expression and glob that match the rule of any key."""
_REPEATS = "-repeats-"
_TRAINING = re.compile(rf"{ANY_SCHEMA}-[0-9a-f]{{64}}({_REPEATS}[0-9a-f]{{8}})?")
ANY_KEY = "rk"
"""Prefix of every key."""
SHORT = 12
"""Digits that are shown of a hash."""
PARTS = ("code", "params", "data", "environment")

DATA_PATH = "data.path"
"""Not hashed: the data part hashes what is there, wherever it is."""
FILE_PARAMS = (BACKBONE_WEIGHTS, INIT_FROM)
"""Values that may name weights: their hash enters the key instead of a path or a run's key."""
NO_FILE = (None, "none")
"""Values of these that name no file."""

_NOBODY_READS = re.compile(
    r"\.DS_Store|\._.*|\..*\.sw[a-p]|\.git(ignore|attributes|keep)|\.dvcignore"
)
"""Hidden files that file managers, editors, git and DVC keep; all others are in the key."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a stage's result."""

    stage: str
    cmd: Mapping[str, str]
    """Command by stage, of this stage and of all before it."""
    preimages: Mapping[str, Any]
    """What each of the four `PARTS` hashes."""
    schema: str = SCHEMA

    @property
    def parts(self) -> dict[str, str]:
        """Hex sha256 of each part, its name included, so that no part equals another."""
        return {part: part_digest(part, self.preimages[part], self.schema) for part in PARTS}

    @property
    def key(self) -> str:
        """`rk2-` and 64 hex digits."""
        whole = {"schema": self.schema, "stage": self.stage, "cmd": dict(self.cmd), **self.parts}
        return f"{self.schema}-{part_digest('recipe', whole, self.schema)}"

    def as_dict(self) -> dict[str, Any]:
        """Return the contents of key.json: the key, its parts and everything that they hash."""
        return {
            "schema": self.schema,
            "key": self.key,
            "stage": self.stage,
            "cmd": dict(self.cmd),
            "parts": self.parts,
            "preimages": dict(self.preimages),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Return the recipe that `as_dict` gave, also one of an older rule.

        Raises:
            RecipeError: it has another schema, is incomplete, or does not hash to its own key.
        """
        schema = stored.get("schema")
        if schema not in SCHEMAS:
            raise RecipeError(
                f"key.json: schema {schema!r}; this runkey reads {' and '.join(SCHEMAS)}"
            )
        try:
            recipe = cls(stored["stage"], stored["cmd"], stored["preimages"], schema)
            if recipe.key != stored["key"]:
                raise RecipeError(f"key.json: its contents do not hash to its key {stored['key']}")
        except (KeyError, TypeError) as error:
            raise RecipeError(f"key.json: lacks {error}") from None
        except ValueError as error:  # of NaN and infinity, which are no JSON
            raise RecipeError(f"key.json: {error}") from None
        code = recipe.preimages["code"]
        rule = code_rule(code) if isinstance(code, Mapping) else None
        if rule not in (RULE, BYTES):
            raise RecipeError(f"key.json: code by rule {rule!r}; this runkey reads {RULE}, {BYTES}")
        return recipe


def short_key(key: str) -> str:
    """Return the key as it is shown: `rk2-` and 12 digits."""
    return key[: len(SCHEMA) + 1 + SHORT]


def older_rule(key: str) -> str:
    """Return a remark on a key that is made by an older rule; empty for any other."""
    schema = key.partition("-")[0]
    return f"key by the older rule {schema} ({OLDER[schema]})" if schema in OLDER else ""


def make_recipe(
    stage: str, root: Path, params: Params | None = None, main: Path | None = None
) -> Recipe:
    """Return the recipe of a stage of dvc.yaml for the files in `root` as they are now.

    `params` are the checked parameters, read from params.yaml if None. `main` is the checkout in
    whose store a run's key is looked up that `model.init_from` names; None: `DVC_ROOT` or `root`.

    Raises:
        RecipeError: something that the key covers is missing; the text names it.
        ParamsError: params.yaml is missing or wrong.
        LockError: conda-lock.yml is missing or wrong.
    """
    if params is None:
        # Importing the schema takes 0.2 s, which other users of this module save.
        from runkey.params import load_params

        params = load_params(root / PARAMS)
    flat = params.flat()
    stages = chain(read_pipeline(root, flat), stage)
    data, files = _data_and_files(stages, flat, root)
    with _without_collections(), kept_values(home_of(main or store_root(root)) / KEPT):
        for each in stages:
            files |= {*import_closure(each.module, root, EXCLUDED)}
        hashes = hash_files(sorted(files), root)
        environment = environment_preimage(root / LOCK)
    preimages = {
        "code": {"rule": RULE, "files": hashes, "excluded": sorted(EXCLUDED)},
        "params": _params(stages, flat, root, main),
        "data": data,
        "environment": environment,
    }
    return Recipe(stage, {one.name: one.cmd for one in stages}, preimages)


def with_params(recipe: Recipe, root: Path, params: Params, main: Path | None = None) -> Recipe:
    """Return the recipe of the same files and data with other parameters, in milliseconds.

    Arguments and errors are those of `make_recipe`; `data.path` must be the same.
    """
    flat = params.flat()
    stages = chain(read_pipeline(root, flat), recipe.stage)
    changed = {"params": _params(stages, flat, root, main)}
    return replace(recipe, preimages={**recipe.preimages, **changed})


@contextmanager
def _without_collections() -> Iterator[None]:
    """Do not look for cycles among the nodes of parsed files: there are none, and it takes long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def part_digest(kind: str, preimage: Any, schema: str = SCHEMA) -> str:
    """Return the hex sha256 of a preimage, prefixed with `kind` (one of `PARTS`, or `recipe`).

    Raises:
        RecipeError: a text holds half of a surrogate pair, which UTF-8 cannot encode.
    """
    try:
        return sha256_bytes(f"{schema}:{kind}\n{canonical_json(preimage)}".encode())
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise RecipeError(f"{PARAMS}: a text holds half a character, {half}") from None


def _params(
    stages: Iterable[Stage], flat: Mapping[str, Any], root: Path, main: Path | None
) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for stage in stages:
        for name in stage.params:
            values = {n: v for n, v in flat.items() if n == name or n.startswith(f"{name}.")}
            if not values and name.split(".")[0] != "runtime":
                raise RecipeError(f"dvc.yaml: stage {stage.name} lists {name}, no name in {PARAMS}")
            chosen |= values
    chosen.pop(DATA_PATH, None)
    for name in FILE_PARAMS:
        value = chosen.get(name)
        if value not in NO_FILE:
            # Imported here: it reads records, which hold keys.
            from runkey.identity.initial_weights import find_initial_weights

            backbone = flat["model.backbone"]
            chosen[name] = find_initial_weights(name, value, root, main, backbone).identity
    return chosen


def _data_and_files(
    stages: tuple[Stage, ...], flat: Mapping[str, Any], root: Path
) -> tuple[dict[str, str], set[str]]:
    """Return the md5s of tracked inputs, and the declared files that are neither data nor Python.

    The folder of the images counts even if dvc.yaml does not list it.
    """
    outs = [out for stage in stages for out in stage.outs]
    deps = [d for s in stages for d in s.deps if not any(meets(d, out) for out in outs)]
    where = str(PurePosixPath(flat[DATA_PATH]))  # as `read_pipeline` gives paths
    data: dict[str, str] = {}
    files: set[str] = set()
    for dep in dict.fromkeys([where, *deps]):
        md5 = tracked_md5(dep, root)
        if md5 is not None:
            data["data" if dep == where else dep] = md5
        elif dep == where:
            raise RecipeError(f"{PARAMS}: {DATA_PATH} = {where} is not tracked; `dvc add {where}`")
        elif not covers(dep, str(LOCK)):
            files |= _other_files(dep, root)
    return data, files


def _other_files(dep: str, root: Path) -> set[str]:
    """Return the files at a declared path that Python does not import, such as templates.

    A declared file counts whatever it is: code may read it, or run it without importing it.
    """
    path = root / dep
    if not path.exists():
        raise RecipeError(f"dvc.yaml: {dep} is a dependency and does not exist")
    if path.is_file():
        return set() if is_excluded(dep) else {dep}
    found = {file.relative_to(root) for file in path.rglob("*") if file.is_file()}
    return {
        file.as_posix()
        for file in found
        if file.suffix != ".py"
        and "__pycache__" not in file.parts
        and not _NOBODY_READS.fullmatch(file.name)
    }


# --- folders of trainings, below `Store.home`


def training_folder(home: Path, key: str, repeats: str | None = None) -> Path:
    """Return the folder of all that an interrupted training needs to continue.

    `repeats` is the MLflow id of the run that is trained again to compare with it.
    """
    return home / (f"{key}{_REPEATS}{repeats[:8]}" if repeats else key)


def training_folders(home: Path, begins: str = "") -> list[Path]:
    """List the folders that are there of keys that begin so, with or without `rk2-`.

    A folder that somebody copied or renamed, such as `rk2-...-backup`, is none.
    """
    names = (begins, *(f"{schema}-{begins}" for schema in SCHEMAS))
    folders = sorted(home.glob(f"{ANY_SCHEMA}-*/"))
    return [f for f in folders if f.name.startswith(names) and _TRAINING.fullmatch(f.name)]


def split_training(folder: Path) -> tuple[str, str]:
    """Return the key of a training's folder, and the first digits of the run that it repeats."""
    key, _, repeats = folder.name.partition(_REPEATS)
    return key, repeats


# --- runkey key --explain


def explain(recipe: Recipe) -> Iterator[str]:
    """Yield the lines of `runkey key --explain`."""
    yield recipe.key
    yield f"stage {recipe.stage}: what decides its result, known before anything has run"
    parts = recipe.parts
    for part in PARTS:
        yield ""
        yield f"{part:<12} {parts[part]}"
        yield from (f"  {line}" for line in _explain_part(part, recipe.preimages[part]))
    yield ""
    yield "commands"
    width = max(map(len, recipe.cmd))
    yield from (f"  {stage:<{width}}  {cmd}" for stage, cmd in recipe.cmd.items())


def _explain_part(part: str, preimage: Mapping[str, Any]) -> Iterator[str]:
    if part == "code":
        files = preimage["files"]
        rule = "of Python the syntax tree, without comments, docstrings, log text"
        yield f"{counted(len(files), 'file')}; {rule}:"
        yield from (f"{sha256[:SHORT]}  {path}" for path, sha256 in sorted(files.items()))
        yield "left out, since they tell of a run and do not change it:"
        yield from (f"{'':<{SHORT}}  {path}" for path in preimage["excluded"])
    elif part == "params":
        values = counted(len(preimage), "value")
        yield f"{values}, defaults filled in; none of runtime, no path of a file:"
        yield from (f"{name} = {json.dumps(value)}" for name, value in sorted(preimage.items()))
    elif part == "data":
        yield "what `dvc add` writes into the .dvc file of each:"
        yield from (f"{name} = {md5}" for name, md5 in sorted(preimage.items()))
    else:
        packages = preimage["packages"]
        yield f"{counted(len(packages), 'package')} of conda-lock.yml for {preimage['platform']}:"
        for name, version, build, digest in packages:
            kind, _, digits = digest.partition(":")
            short = digits[:SHORT] if kind == "sha256" else f"{kind}:{digits[:SHORT]}"
            line = f"{short}  {name} {version}"
            # Builds are flush right where there is room.
            yield f"{line} {build:>{max(0, WIDTH - 3 - len(line))}}"
