"""The key of a stage's result: a hash over all that decides it, known before anything has run.

    recipe = make_recipe("train", root)
    recipe.key                  # rk2-<64 hex digits>
    recipe.parts["code"]        # one of the four hashes in it
    recipe.preimages["code"]    # what that one hashes, for a comparison of two runs

The recipe of a stage holds the code, the parameters and the data of the stages before it as well,
never the hashes of their outputs: a key that changes by having run could not be looked up first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from runkey.hashing import canonical_json, sha256_bytes, sha256_file
from runkey.identity.closure import BYTES, EXCLUDED, code_rule, hash_files, import_closure
from runkey.identity.environment import PLATFORM, environment_preimage
from runkey.identity.errors import RecipeError
from runkey.identity.pipeline import Stage, chain, covers, meets, read_pipeline, tracked_md5
from runkey.identity.syntax import RULE
from runkey.paths import LOCK, PARAMS

if TYPE_CHECKING:
    from runkey.params import Params

SCHEMA = "rk2"
"""Changes whenever the same inputs would give another key."""
OLDER = {"rk1": "bytes of the code"}
"""Rules by which older runs are named, and what they hash; such runs keep their keys."""
SCHEMAS = (SCHEMA, *OLDER)
ANY_SCHEMA = "rk[12]"
"""Matches the rule of any key, in a regular expression and in a glob."""
ANY_KEY = "rk"
"""What every key begins with."""
SHORT = 12
PARTS = ("code", "params", "data", "environment")

DATA_PATH = "data.path"
"""Where the data lie is not hashed; what lies there is, as the data part."""
FILE_PARAMS = ("model.backbone_weights", "model.init_from")
"""Values that may be paths of files: the file's content enters the key in place of its path."""


@dataclass(frozen=True)
class Recipe:
    """All that decides a stage's result."""

    stage: str
    cmd: Mapping[str, str]
    """Command by stage, of this one and of all before it."""
    preimages: Mapping[str, Any]
    """What each of the four `PARTS` hashes."""
    schema: str = SCHEMA

    @property
    def parts(self) -> dict[str, str]:
        """Hex sha256 of each part.  The part's name is hashed too: no part can pass for another."""
        return {part: part_digest(part, self.preimages[part], self.schema) for part in PARTS}

    @property
    def key(self) -> str:
        """`rk2-` and 64 hex digits."""
        whole = {"schema": self.schema, "stage": self.stage, "cmd": dict(self.cmd), **self.parts}
        return f"{self.schema}-{part_digest('recipe', whole, self.schema)}"

    def as_dict(self) -> dict[str, Any]:
        """For key.json: the key, its parts and everything that they hash."""
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
        """The recipe that `as_dict` gave, also of an older rule.

        Raises:
            RecipeError: it is of another schema, is incomplete, or does not hash to its own key.
        """
        schema = stored.get("schema")
        if schema not in SCHEMAS:
            raise RecipeError(
                f"key.json: schema {schema!r}; this runkey reads {' and '.join(SCHEMAS)}"
            )
        try:
            recipe = cls(stored["stage"], stored["cmd"], stored["preimages"], schema)
            matches = recipe.key == stored["key"]
        except (KeyError, TypeError) as error:
            raise RecipeError(f"key.json: lacks {error}") from None
        if not matches:
            raise RecipeError(f"key.json: its contents do not hash to its key {stored['key']}")
        code = recipe.preimages["code"]
        rule = code_rule(code) if isinstance(code, Mapping) else None
        if rule not in (RULE, BYTES):
            raise RecipeError(f"key.json: code by rule {rule!r}; this runkey reads {RULE}, {BYTES}")
        return recipe


def short_key(key: str) -> str:
    """The key as it is shown: `rk2-` and 12 digits."""
    return key[: len(SCHEMA) + 1 + SHORT]


def older_rule(key: str) -> str:
    """Return what to tell of a key that is made by an older rule; empty for any other."""
    schema = key.partition("-")[0]
    return f"key by the older rule {schema} ({OLDER[schema]})" if schema in OLDER else ""


def make_recipe(
    stage: str,
    root: Path,
    params: Params | None = None,
    platform: str = PLATFORM,
    excluded: Iterable[str] = EXCLUDED,
) -> Recipe:
    """The recipe of a stage as the files in `root` stand now.

    Args:
        stage: its name in dvc.yaml.
        root: the repository, or DVC's temporary copy of it.
        params: the checked parameters; read from params.yaml if None.
        platform: whose packages of conda-lock.yml are meant.
        excluded: see `runkey.identity.closure.EXCLUDED`.

    Raises:
        RecipeError: something that enters the recipe is missing; the text names it.
        ParamsError: params.yaml is missing or wrong.
        LockError: conda-lock.yml is missing or wrong.
    """
    if params is None:
        # Its checks are built when it is imported, 0.2 s; those who only name keys need none.
        from runkey.params import load_params

        params = load_params(root / PARAMS)
    flat = params.flat()
    stages = chain(read_pipeline(root, flat), stage)
    data, files = _data_and_files(stages, flat, root)
    preimages = {
        "code": _code(stages, files, root, tuple(excluded)),
        "params": _params(stages, flat, root),
        "data": data,
        "environment": environment_preimage(root / LOCK, platform),
    }
    return Recipe(stage, {one.name: one.cmd for one in stages}, preimages)


def part_digest(kind: str, preimage: Any, schema: str = SCHEMA) -> str:
    """Hex sha256 of a preimage; `kind`, one of `PARTS` or `recipe`, is hashed before it.

    Text counts as it is written: nothing is normalised, letters that look alike may differ.

    Raises:
        RecipeError: a text holds half a character, which YAML can write and UTF-8 cannot.
    """
    try:
        return sha256_bytes(f"{schema}:{kind}\n{canonical_json(preimage)}".encode())
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise RecipeError(f"{PARAMS}: a text holds half a character, {half}") from None


def _code(
    stages: Iterable[Stage], files: Iterable[str], root: Path, excluded: tuple[str, ...]
) -> dict[str, Any]:
    """Hashes of the files that the stages reach by import, and of declared files beside them."""
    paths = set(files)
    for stage in stages:
        paths |= set(import_closure(stage.module, root, excluded))
    return {
        "rule": RULE,
        "files": hash_files(sorted(paths), root),
        "excluded": sorted(excluded),
    }


def _params(stages: Iterable[Stage], flat: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The values that the stages list, with defaults filled in."""
    chosen: dict[str, Any] = {}
    for stage in stages:
        for name in stage.params:
            values = {n: v for n, v in flat.items() if n == name or n.startswith(f"{name}.")}
            if not values and name.split(".")[0] != "runtime":
                raise RecipeError(f"dvc.yaml: stage {stage.name} lists {name}, no name in {PARAMS}")
            chosen |= values
    chosen.pop(DATA_PATH, None)
    for name in FILE_PARAMS:
        if chosen.get(name) not in (None, "none", "imagenet"):
            chosen[name] = _file_hash(name, chosen[name], root)
    return chosen


def _file_hash(name: str, value: str, root: Path) -> str:
    path = root / value
    if not path.is_file():
        raise RecipeError(f"{PARAMS}: {name} = {value}: no such file")
    return f"sha256:{sha256_file(path)}"


def _data_and_files(
    stages: tuple[Stage, ...], flat: Mapping[str, Any], root: Path
) -> tuple[dict[str, str], list[str]]:
    """The md5s of the tracked inputs, and the declared files that are neither data nor Python.

    The folder that the images are really read from counts, whether dvc.yaml names it or not.
    """
    outs = [out for stage in stages for out in stage.outs]
    deps = [d for s in stages for d in s.deps if not any(meets(d, out) for out in outs)]
    where = str(flat[DATA_PATH]).rstrip("/")
    data: dict[str, str] = {}
    files: list[str] = []
    for dep in dict.fromkeys([where, *deps]):
        md5 = tracked_md5(dep, root)
        if md5 is not None:
            data["data" if dep == where else dep] = md5
        elif dep == where:
            raise RecipeError(f"{PARAMS}: {DATA_PATH} = {where} is not tracked; `dvc add {where}`")
        elif not covers(dep, str(LOCK)):
            files += _other_files(dep, root)
    return data, files


def _other_files(dep: str, root: Path) -> list[str]:
    """The files at a declared path that Python does not import, such as tables and templates."""
    path = root / dep
    if not path.exists():
        raise RecipeError(f"dvc.yaml: {dep} is a dependency and does not exist")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    relative = (file.relative_to(root) for file in found)
    return [
        r.as_posix()
        for r in relative
        if r.suffix not in (".py", ".pyc") and not any(part.startswith(".") for part in r.parts)
    ]
