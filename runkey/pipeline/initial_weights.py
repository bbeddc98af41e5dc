"""Initial weights, before anything runs: get those of a run, and try them on a fresh model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runkey import paths
from runkey.data.index import read_classes
from runkey.hashing import sha256_file
from runkey.identity.initial_weights import InitialWeights, find_initial_weights
from runkey.identity.key import FILE_PARAMS, NO_FILE
from runkey.identity.pinned_weights import BACKBONE_WEIGHTS, INIT_FROM, pinned_of
from runkey.params import Params
from runkey.registry.dvc_cache import download
from runkey.registry.library import open_library
from runkey.registry.weights import get_weights
from runkey.tracking.store import locate_store

if TYPE_CHECKING:
    from runkey.model.weights import Pretrained


def get_initial_weights(params: Params, root: Path) -> list[InitialWeights]:
    """Find the files that the parameters name; download published ones, and copy those of a run.

    Raises:
        RecipeError: there is no such file, folder, run or published file.
        RegistryError: the run's files are missing or not what it recorded, or a download failed.
    """
    values = params.flat()
    named = {name: values[name] for name in FILE_PARAMS if values[name] not in NO_FILE}
    backbone = params.model.backbone
    found = [find_initial_weights(n, v, root, backbone=backbone) for n, v in named.items()]
    for one in found:
        if one.published is not None:
            get_weights(one.published, one.file.parents[1])
            continue
        there = one.file.is_file() and sha256_file(one.file) == one.sha256
        if one.run is not None and not there:
            store = locate_store()
            library = open_library(store.full_uri, store.home)
            download(library, one.run, one.run_files, one.file.parent.parent)
    return found


def pretrained_of(params: Params, root: Path) -> Pretrained | None:
    """Return the published weights that training begins with, by itself or by way of a model's.

    They are known by their hash, also where a file of another name holds them. A folder or run says
    in its card what it began with.
    """
    from runkey.model.weights import Pretrained, read_card  # they import torch

    values = params.flat()
    name = INIT_FROM if values[INIT_FROM] is not None else BACKBONE_WEIGHTS
    if values[name] in NO_FILE:
        return None
    found = find_initial_weights(name, values[name], root, backbone=params.model.backbone)
    if row := found.published or pinned_of(found.sha256):
        return Pretrained(row.name, row.file, row.sha256, row.licence)
    return read_card(found.file.parent).pretrained if found.card else None


def check_initial_weights(params: Params, root: Path) -> None:
    """Load the initial weights into a model that is thrown away, so that a fault comes early.

    Raises as `get_initial_weights`, and ModelError if a file is no weights file or none of its
    tensors fits the model.
    """
    if not get_initial_weights(params, root):
        return
    # Imported here: torch takes seconds, which other uses of `runkey params` save.
    from runkey.model.detr import build_model
    from runkey.model.weights import load_initial_weights

    classes = root / paths.PREPARED / "classes.json"
    names = [one.name for one in read_classes(classes)] if classes.is_file() else ["?"]
    load_initial_weights(build_model(params.model, len(names)), params.model, names, root)
