"""Where initial weights come from: a published file, a file, a saved model's folder, a run's key.

    find_initial_weights("model.init_from", "rk2-4d50533b2310", root).identity

The identity is that of the content, so a run's key, its files in a folder and a copy of them are
the same initial weights.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runkey import paths
from runkey.errors import RecipeError
from runkey.hashing import sha256_file
from runkey.identity.key import ANY_SCHEMA, FILE_PARAMS, NO_FILE, SCHEMAS, short_key
from runkey.identity.pinned_weights import (
    DETECTORS,
    FOLDER,
    INIT_FROM,
    PACKAGES,
    PinnedWeights,
    pinned_by,
)
from runkey.identity.record import Record, age
from runkey.identity.record_cache import open_records, read_records

WEIGHTS = "weights.safetensors"
OLD_WEIGHTS = "weights.pt"
"""What models of runkey 0.1 have in place of `WEIGHTS`."""
CARD = "model.json"
"""Beside the weights of a saved model: its classes, by which rows of heads are matched."""

_KEY = re.compile(rf"(?:({ANY_SCHEMA})-)?([0-9a-f]{{4,64}})")
_ABOUT_LINKS = """\
Links to the weights that params.yaml names, made by `runkey params --check`, so that `dvc repro`
trains again when a file changes. Delete this folder if DVC says that a file in it does not exist.
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
    run: Record | None = None
    """The run that it is taken from."""
    published: PinnedWeights | None = None
    """What it is downloaded as, by `runkey.pipeline.initial_weights`."""

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
    name: str, value: str, root: Path, main: Path | None = None, backbone: str = ""
) -> InitialWeights:
    """Find the weights that the parameter `name` gives, without reading more than their hash.

    Args:
        name: of the parameter.
        value: of the parameter.
        root: the workspace.
        main: the checkout whose store has the run of a key, and that downloads go to; None:
            `DVC_ROOT` or `root`.
        backbone: value of `model.backbone`.

    Raises:
        RecipeError: there is no such file, folder, run or published file, it holds no weights, or
            several keys begin so.
        RegistryError: the records of runs cannot be read.
    """
    where = f"{paths.PARAMS}: {name} = {value}"
    if row := _published(where, name, value, backbone):
        return InitialWeights(
            (main or _main(root)) / FOLDER / row.file, row.sha256, None, None, row
        )
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
        lack = f"holds no {WEIGHTS}" if path.is_dir() else "no such file"
        known = DETECTORS if name == INIT_FROM else ("imagenet", *PACKAGES)
        raise RecipeError(
            f"{where}: {lack}; name a weights file, a folder that `runkey get` made, a run's key,"
            f" or {', '.join(known)}"
        )
    card = file.with_name(CARD)
    has_card = file.name in (WEIGHTS, OLD_WEIGHTS) and card.is_file()
    try:
        return InitialWeights(file, sha256_file(file), sha256_file(card) if has_card else None)
    except OSError as error:
        raise RecipeError(f"{where}: cannot be read ({error.strerror})") from None


def _published(where: str, name: str, value: str | None, backbone: str) -> PinnedWeights | None:
    try:
        return pinned_by(name, value, backbone)
    except LookupError as error:
        raise RecipeError(f"{where}: {error.args[0]}") from None


def own_files(values: Mapping[str, Any], root: Path) -> dict[str, list[Path]]:
    """Return the weights files, with their cards, that parameters name by a path.

    Args:
        values: the parameters under dotted names.
        root: the workspace.

    Returns:
        Absolute paths of files that are there, by parameter. A run's key and published weights
        name none, since what they mean cannot change.
    """
    found: dict[str, list[Path]] = {}
    for name in FILE_PARAMS:
        value = values[name]
        if value in NO_FILE or _published(name, name, value, values["model.backbone"]):
            continue
        file = weights_file(root / value).absolute()
        found[name] = [one for one in (file, file.with_name(CARD)) if one.is_file()]
    return found


def used_files(values: Mapping[str, Any], root: Path) -> list[Path]:
    """Return all weights files that a stage may read: those of `own_files`, and downloads."""
    own = [file for files in own_files(values, root).values() for file in files]
    rows = [_published(n, n, values[n], values["model.backbone"]) for n in FILE_PARAMS]
    return own + [_main(root).absolute() / FOLDER / row.file for row in rows if row]


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


def readable_path(name: str, value: str, root: Path, backbone: str) -> Path:
    """Return the path to read weights from: what `value` names, a download, or a run's copy.

    RecipeError or RegistryError if there are no such weights or no such run.
    """
    if row := _published(name, name, value, backbone):
        return _main(root) / FOLDER / row.file
    key = _KEY.fullmatch(value)
    is_run = key is not None and not (root / value).exists()
    return _of_run(value, key, _main(root)).file if key and is_run else root / value


def link_weights(values: Mapping[str, Any], root: Path) -> None:
    """Make the output of the stage `check`, for parameters under dotted names.

    DVC hashes it through the links, so that `train` runs again when the content has changed.
    """
    folder = root / paths.INITIAL_WEIGHTS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "README").write_text(_ABOUT_LINKS)
    for name, files in own_files(values, root).items():
        for one in files:
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
