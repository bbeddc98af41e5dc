"""Where initial weights come from: a file, a folder of a saved model, or a recorded run's key.

    find_initial_weights("model.init_from", "rk2-4d50533b2310", root).identity

The identity is that of the content, so a run's key, its files in a folder and a copy of them are
the same initial weights.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runkey import paths
from runkey.errors import RecipeError
from runkey.files import LARGE, read_json
from runkey.hashing import sha256_file
from runkey.identity.dvc_yaml import read_yaml_text
from runkey.identity.key import ANY_SCHEMA, FILE_PARAMS, NO_FILE, SCHEMAS, Recipe, short_key
from runkey.identity.record import KEY_JSON, Record, age
from runkey.identity.record_cache import open_records, read_records

WEIGHTS = "weights.safetensors"
OLD_WEIGHTS = "weights.pt"
"""What models of runkey 0.1 have in place of `WEIGHTS`."""
CARD = "model.json"
"""Beside the weights of a saved model: its classes, by which rows of heads are matched."""

_KEY = re.compile(rf"(?:({ANY_SCHEMA})-)?([0-9a-f]{{4,64}})")
LINKS = Path(".initial_weights")
_ABOUT_LINKS = """\
Links to the weights that params.yaml names, made by `runkey params --check`, so that `dvc repro`
sees when a file changes. Delete this folder if DVC says that a file in it does not exist.
"""
COPIES = Path("initial")
"""Below `paths.HOME`: copies of runs' models, in a folder named by the hash of the weights."""


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """A weights file whose content is known."""

    file: Path
    """Of a run, where `runkey.pipeline.initial_weights` puts it."""
    sha256: str
    card: str | None
    """sha256 of the card beside it; None: it has none."""
    run: Record | None
    """The run that it is taken from."""

    @property
    def identity(self) -> str:
        """What enters the key: changed weights, or other class names, give another one."""
        return f"sha256:{self.sha256}" + (f" {CARD}:{self.card}" if self.card else "")

    @property
    def run_files(self) -> list[str]:
        """The run's files that are needed."""
        folder = paths.MODEL.as_posix()
        names = [self.file.name, *([CARD] if self.card else [])]
        return [f"{folder}/{name}" for name in names]


def weights_file(path: Path) -> Path:
    """Return the weights file of a path: itself, or the one in a saved model's folder.

    `runkey get KEY` makes a folder with all files of a run, whose model is in `model/`.
    """
    if not path.is_dir():
        return path
    files = [folder / n for folder in (path, path / paths.MODEL) for n in (WEIGHTS, OLD_WEIGHTS)]
    return next((file for file in files if file.is_file()), path / WEIGHTS)


def find_initial_weights(
    name: str, value: str, root: Path, main: Path | None = None
) -> InitialWeights:
    """Find the weights that the parameter `name` gives, without reading more than their hash.

    `main` is the checkout whose store has the run of a key; None: `DVC_ROOT` or `root`.

    Raises:
        RecipeError: there is no such file, folder or run, it holds no weights, or several keys
            begin so.
        RegistryError: the records of runs cannot be read.
    """
    where = f"{paths.PARAMS}: {name} = {value}"
    path = root / value
    # Not of the file itself: DVC may have made it a link into its cache.
    folders = (path.absolute(), weights_file(path).parent)
    if any(f.resolve().is_relative_to((root / paths.MODEL).resolve()) for f in folders):
        raise RecipeError(
            f"{where}: is what train writes, and DVC deletes it before; name the run's key instead"
        )
    key = _KEY.fullmatch(value)
    if not path.exists() and key:
        return _of_run(where, key, main or _main(root))
    file = weights_file(path)
    if not file.is_file():
        raise RecipeError(
            f"{where}: holds no {WEIGHTS}; name a weights file, a folder that `runkey get` made, "
            "or a run's key"
            if path.is_dir()
            else f"{where}: no such file; name a weights file, a folder that `runkey get` made, or "
            "a run's key"
        )
    card = file.with_name(CARD)
    has_card = file.name in (WEIGHTS, OLD_WEIGHTS) and card.is_file()
    try:
        return InitialWeights(
            file, sha256_file(file), sha256_file(card) if has_card else None, None
        )
    except OSError as error:
        raise RecipeError(f"{where}: cannot be read ({error.strerror})") from None


def recorded_with(weights: str, cache: Path) -> list[Record]:
    """Return the finished runs in a cache whose weights have that sha256, oldest first.

    RegistryError if the cache cannot be read.
    """
    with open_records(cache, partial=True) as database:
        condition = "status = 'FINISHED' AND instr(details, ?)"
        rows = list(read_records(database, condition, (weights,))) if database else []
    found = [one for one in rows if isinstance(one, Record) and weights in weights_of(one)]
    return sorted(found, key=age)


def weights_of(record: Record) -> list[str]:
    """Return the sha256 of a run's weights, first the file that is read; empty without any."""
    files = record.details.files if record.details else {}
    names = (f"{paths.MODEL}/{name}" for name in (WEIGHTS, OLD_WEIGHTS))
    return [files[name].sha256 for name in names if name in files]


def readable_path(value: str, root: Path) -> Path:
    """Return the path to read weights from: what `value` names, or the copy of a run's file.

    RecipeError or RegistryError if it is a key, and there is no such run.
    """
    key = _KEY.fullmatch(value)
    is_run = key is not None and not (root / value).exists()
    return _of_run(value, key, _main(root)).file if key and is_run else root / value


def check_same_weights(recipe: Recipe, values: Mapping[str, Any], root: Path) -> None:
    """Check that DVC sees all that differs from the run whose model is in model/.

    DVC compares the names of weights files, so it would keep model/ if only their content changed.

    Args:
        recipe: of the stage `train`, as the files are now.
        values: the parameters under dotted names.
        root: the workspace.

    Raises:
        RecipeError: weights alone were changed, under the name that dvc.lock has.
    """
    try:
        trained = Recipe.from_dict(read_json(root / KEY_JSON, dict[str, Any], LARGE))
        lock = read_yaml_text(root / "dvc.lock")["stages"][recipe.stage]["params"]
        locked = {name: lock[paths.PARAMS.name]["model"].get(_field(name)) for name in FILE_PARAMS}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecipeError):
        return  # nothing is trained, or other checks name the fault
    then, now = trained.preimages["params"], recipe.preimages["params"]
    changed = {name: then.get(name) for name in FILE_PARAMS if then.get(name) != now.get(name)}
    otherwise = replace(recipe, preimages={**recipe.preimages, "params": now | changed})
    names = [name for name in changed if locked[name] == str(values[name])]
    if names and len(names) == len(changed) and otherwise.key == trained.key:
        raise RecipeError(
            f"{paths.PARAMS}: {names[0]} = {values[names[0]]}: the file changed since model/ was"
            " trained from it, and DVC sees its name alone; `dvc repro -f -s train` trains again,"
            " then `dvc repro`"
        )


def _field(name: str) -> str:
    return name.removeprefix("model.")


def link_weights(values: Mapping[str, Any], root: Path) -> None:
    """Make `LINKS`, the output of the stage `check`, for parameters under dotted names.

    DVC hashes an output through links, and runs the stage again when the content has changed.
    """
    folder = root / LINKS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "README").write_text(_ABOUT_LINKS)
    for name in FILE_PARAMS:
        if values[name] not in NO_FILE:
            file = weights_file(root / values[name]).absolute()
            for one in (file, file.with_name(CARD)):
                if one.is_file():  # a run's key names none that could change
                    (folder / f"{name}.{one.name}").symlink_to(one)


def _main(root: Path) -> Path:
    return Path(os.environ.get("DVC_ROOT") or root)


def _of_run(where: str, key: re.Match[str], main: Path) -> InitialWeights:
    home = paths.home_of(main)
    cache = paths.records(home, os.environ.get("MLFLOW_TRACKING_URI", "").strip())
    schemas = [key[1]] if key[1] else list(SCHEMAS)
    found: list[Record] = []
    with open_records(cache, partial=True) as database:
        for prefix in (f"{schema}-{key[2]}" for schema in schemas):
            condition = "key >= ? AND key < ? AND status = 'FINISHED'"
            rows = read_records(database, condition, (prefix, f"{prefix}~")) if database else ()
            found += [record for record in rows if isinstance(record, Record)]
    keys = sorted({record.key for record in found})
    if not keys:
        raise RecipeError(
            f"{where}: no such file, and no finished run of that key is recorded here; `runkey "
            "list` shows what is, `runkey show KEY` looks on the server, `runkey fetch KEY` gets it"
        )
    if len(keys) > 1:
        shown = ", ".join(map(short_key, keys[:4])) + (" ..." if len(keys) > 4 else "")
        raise RecipeError(f"{where}: {len(keys)} keys begin so: {shown}; give more of it")
    folder = paths.MODEL.as_posix()
    for record in sorted(found, key=lambda one: (bool(one.reproduction_of), *age(one))):
        files = record.details.files if record.details else {}
        for file in (WEIGHTS, OLD_WEIGHTS):
            weights, card = files.get(f"{folder}/{file}"), files.get(f"{folder}/{CARD}")
            if weights:
                target = home / COPIES / weights.sha256[:16] / folder / file
                return InitialWeights(target, weights.sha256, card.sha256 if card else None, record)
    raise RecipeError(
        f"{where}: what is recorded of that run here has no weights; `runkey show {key[0]}` asks "
        "the server for its files"
    )
