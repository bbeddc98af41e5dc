"""The two sides of a comparison: a recorded run, or the tree as it stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from runkey import paths
from runkey.data.image_list import IMAGE_LIST, ImageList, read_image_list
from runkey.errors import DataError, RegistryError
from runkey.identity.key import Recipe, make_recipe, older_rule
from runkey.identity.pipeline import PIPELINE
from runkey.identity.record import KEY_JSON, Record
from runkey.identity.yamltext import read_yaml_text
from runkey.registry.diff.diff_code import Source, TreeSource, snapshot_source
from runkey.registry.library import Library, find_run

TREE = "."
"""How the tree as it stands is named."""
IMAGES_JSON = f"{paths.PREPARED}/{IMAGE_LIST}"


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is known of one side."""

    address: str
    """As the user named it."""
    key: str
    parts: dict[str, str]
    recipe: Recipe | None
    """None: the run left no key.json, as when it failed."""
    record: Record | None
    """None: the tree as it stands."""
    code: Source | None
    """Where its files are; None: nowhere here."""
    images: ImageList | None
    packages: dict[str, str] = field(default_factory=dict)
    """Version by name of what was really installed; empty if not known."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, and why."""

    @property
    def params(self) -> dict[str, Any]:
        """The parameters in the key; of a run without key.json as MLflow has them, as text."""
        if self.recipe:
            return dict(self.recipe.preimages["params"])
        logged = self.record.run.params if self.record else {}
        return {n: v for n, v in logged.items() if n.split(".")[0] not in ("key", "runtime")}

    def preimage(self, part: str) -> dict[str, Any]:
        """What a part hashes; empty if not known."""
        return dict(self.recipe.preimages[part]) if self.recipe else {}


def run_side(library: Library, address: str, root: Path) -> Side:
    """A recorded run.

    Args:
        library: where runs are looked up.
        address: a key or its beginning, see `find_run`.
        root: the main checkout, whose repository has snapshots.

    Raises:
        RegistryError: there is no such run, or its key.json is another run's.
        RecipeError: its key.json is damaged.
    """
    record = find_run(library, address)
    notes = [older] if (older := older_rule(record.key)) else []

    def read(path: str) -> bytes | None:
        return _artifact(library, record, path, notes)

    recipe = _recipe(record, read)
    oid = record.details.snapshot if record.details else record.run.tags.get("snapshot")
    code = snapshot_source(root, oid)
    if code is None:
        what = f"its snapshot {oid[:12]} is not in this repository" if oid else "it has no snapshot"
        notes.append(f"{what}; of its code only the hashes are known")
    return Side(
        address=address,
        key=record.key,
        parts=recipe.parts if recipe else record.run.parts,
        recipe=recipe,
        record=record,
        code=code,
        images=_images(read(IMAGES_JSON), IMAGES_JSON, notes),
        packages=_packages(read(str(paths.RUN_JSON))),
        notes=notes,
    )


def tree_side(workspace: Path) -> Side:
    """The tree as it stands, as a training of it would be keyed.

    Raises:
        RecipeError, ParamsError, LockError: see `make_recipe`.
    """
    recipe = make_recipe("train", workspace)
    notes: list[str] = []
    images = None
    if _prepared_md5(workspace) in recipe.preimages["data"].values():
        file = workspace / IMAGES_JSON
        images = _images(file.read_bytes() if file.is_file() else None, IMAGES_JSON, notes)
    else:
        notes.append(f"{paths.PREPARED}/ is not of these data; `dvc repro prepare` lists images")
    return Side(
        address=TREE,
        key=recipe.key,
        parts=recipe.parts,
        recipe=recipe,
        record=None,
        code=TreeSource(workspace),
        images=images,
        notes=notes,
    )


def _recipe(record: Record, read: Callable[[str], bytes | None]) -> Recipe | None:
    content = read(KEY_JSON)
    if content is None:
        return None
    try:
        recipe = Recipe.from_dict(json.loads(content))
    except (ValueError, AttributeError):
        raise RegistryError(
            f"{record.label}: {KEY_JSON}: not JSON (run {record.run.run_id});"
            f" `runkey verify {record.label}` says what else is wrong"
        ) from None
    if recipe.key != record.key:
        raise RegistryError(f"{record.label}: {KEY_JSON}: holds another key, {recipe.key}")
    return recipe


def _artifact(library: Library, record: Record, path: str, notes: list[str]) -> bytes | None:
    """An artifact's bytes; None, and a note, if it is not there."""
    if record.details and path not in record.details.files:
        notes.append(f"it kept no {path}")
        return None
    try:
        with library.open_file(record, path) as file:
            return file.read()
    except (RegistryError, OSError, HTTPException) as error:
        notes.append(str(error))
        return None


def _images(content: bytes | None, where: str, notes: list[str]) -> ImageList | None:
    try:
        return None if content is None else read_image_list(content, where)
    except DataError as error:
        notes.append(str(error))
        return None


def _packages(content: bytes | None) -> dict[str, str]:
    """Installed packages in a run.json; {} if there are none to be read."""
    try:
        stored = json.loads(content or b"{}")
        return dict(stored["witness"]["packages"])
    except (ValueError, KeyError, TypeError):
        return {}


def _prepared_md5(workspace: Path) -> str | None:
    """`md5:<hash>` of the data that prepared/ was made from, as dvc.lock has it."""
    try:
        lock = read_yaml_text(workspace / PIPELINE.with_suffix(".lock"))
        deps = lock["stages"]["prepare"]["deps"]
        return next(f"md5:{dep['md5']}" for dep in deps if str(dep["md5"]).endswith(".dir"))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
