"""The model that a reference names: a run's key, a folder, a file, an MLflow address; no torch."""

from __future__ import annotations

import os
from pathlib import Path

from runkey import paths
from runkey.errors import ModelError, RegistryError, RunkeyError
from runkey.files import FormatError, read_json
from runkey.identity.key import SCHEMAS, SHORT
from runkey.identity.record import KEY_JSON, Record
from runkey.registry.library import find_run, open_library, run_reader, split_address
from runkey.registry.models import copy_model, registered_run
from runkey.tracking.store import Store, find_store

_CARDS = ("model.json", "card.json")
"""What a folder with a saved model, or an export, has."""


def find_model(reference: str | os.PathLike[str]) -> Path:
    """Return the folder or file of the model that a reference names, see `load`."""
    text = os.fspath(reference)
    if os.path.exists(text):  # noqa: PTH110 - Path raises for a long name
        return _model_in(Path(text))
    if text.startswith("models:/"):
        store = find_store()
        return _of_run(store, registered_run(store.full_uri, text), text)
    if text.startswith("runs:/"):
        run_id, _, path = text.removeprefix("runs:/").partition("/")
        if path not in ("", paths.MODEL.as_posix()):
            raise RegistryError(f"{text}: write runs:/{run_id}; its model is in {paths.MODEL}/")
        return _of_run(find_store(), run_id, text)
    try:
        schema, digits, run_id = split_address(text)
    except RegistryError:
        raise ModelError(
            f"{text}: no such file or folder, and no key; give a run's key (`runkey list`), a"
            " folder such as model/, an exported file, runs:/ID or models:/NAME@ALIAS"
        ) from None
    begins = [f"{schema}-{digits}"] if schema else [f"{one}-{digits}" for one in SCHEMAS]
    here = None if run_id else _workspace_model(begins)
    if here and len(digits) >= SHORT:
        return here[1]
    store = find_store()
    library = open_library(store.full_uri, store.home, offline=True)
    # The working tree's own run need not be in the store, but another key may begin so too.
    if here and {one.key for begin in begins for one in library.matching(begin)} <= {here[0]}:
        return here[1]
    return copy_model(library, store.home, find_run(library, text))


def _model_in(path: Path) -> Path:
    """The model at a path: the file or folder itself, or `model/` in what `runkey get` wrote."""
    if path.is_file():
        return path
    folders = (path, path / paths.MODEL)
    found = next((f for f in folders if any((f / name).is_file() for name in _CARDS)), None)
    if found is None:
        raise ModelError(
            f"{path}: holds neither a model ({_CARDS[0]}) nor an export ({_CARDS[1]}); `runkey get"
            " KEY --only model` copies a run's"
        )
    return found


def _workspace_model(begins: list[str]) -> tuple[str, Path] | None:
    """The workspace's key and its model/, if the key has one of these beginnings."""
    try:
        root = paths.workspace()
        key = str(read_json(root / KEY_JSON, dict[str, object])["key"])
    except (RunkeyError, OSError, FormatError, KeyError):
        return None
    return (key, root / paths.MODEL) if key.startswith(tuple(begins)) else None


def _of_run(store: Store, run_id: str, reference: str) -> Path:
    """The model of a run by its MLflow id."""
    read = run_reader(store.full_uri)
    if read is None:
        raise RegistryError(f"{reference}: {store.uri} is read by key; `runkey list` shows keys")
    run = read(run_id)
    if run is None:
        raise RegistryError(f"{reference}: no such run in {store.uri}; `runkey list` shows them")
    library = open_library(store.full_uri, store.home)
    found = [one for one in library.matching(run.key) if one.run.run_id == run_id]
    record = found[0] if found else Record(run=run, details=None)
    return copy_model(library, store.home, library.with_details(record))
