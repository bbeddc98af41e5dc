"""What differs between two runs, or between a run and the tree as it stands, and how.

    diff = compare(run_side(library, "rk2-1d0c", root), tree_side(root), root)

First the four parts of the key, by their hashes; then each part that differs, by what it hashes;
then what the runs gave (metrics) and what they were run with (witness).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from runkey import paths
from runkey.data.index import IMAGE_LIST, ImageList, read_image_list
from runkey.errors import DataError, RegistryError
from runkey.identity.dvc_yaml import PIPELINE, read_yaml_text
from runkey.identity.key import PARTS, Recipe, make_recipe, older_rule
from runkey.identity.record import KEY_JSON, Record
from runkey.registry.diff_files import (
    CodeDiff,
    FilesDiff,
    ImagesDiff,
    Pair,
    Source,
    TreeSource,
    compare_code,
    compare_files,
    compare_images,
    differing,
    snapshot_source,
)
from runkey.registry.dvc_cache import DvcCache
from runkey.registry.library import Library, find_run

# The two sides of a comparison: a recorded run, or the tree as it stands.


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
        packages=_locked_packages(read(str(paths.RUN_JSON))),
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


def _locked_packages(content: bytes | None) -> dict[str, str]:
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


@dataclass(frozen=True, kw_only=True)
class Diff:
    """The comparison of A and B.  Every `Pair` is of values that differ."""

    same_key: bool
    parts: dict[str, Pair]
    """Every part with its two hashes, the same ones too."""
    commands: list[Pair]
    """Of the stages, by name."""
    params: list[Pair]
    code: CodeDiff
    excluded: list[Pair]
    """Files and folders that the code part leaves out on one side only: True where it does."""
    data: list[Pair]
    """md5 by name of the data."""
    images: ImagesDiff | None
    """None if either side's images are not known."""
    files: FilesDiff | None
    """Of the data folder; where images are not known and DVC's cache has both folders' lists."""
    packages: list[Pair]
    """Locked packages, as `version build`; of one version and build, with their hashes."""
    metrics: list[Pair]
    witness: list[Pair]
    installed: list[Pair]
    """Versions of what was really installed, where both runs say."""
    artifacts: list[Pair]
    """sha256 by path of kept files; only of runs of one key."""
    equal_metrics: int
    equal_artifacts: int


def compare(a: Side, b: Side, root: Path) -> Diff:
    """What differs from A to B.

    Args:
        a: the one side.
        b: the other.
        root: the checkout whose DVC cache may have the data.
    """
    known = a.recipe is not None and b.recipe is not None
    kept_a, kept_b = (_kept(side) if a.key == b.key else {} for side in (a, b))
    metrics_a, metrics_b = (s.record.run.metrics if s.record else {} for s in (a, b))
    on_both = a.record is not None and b.record is not None
    data_a, data_b = a.preimage("data"), b.preimage("data")
    images = compare_images(a.images, b.images) if a.images and b.images else None
    code_a, code_b = (side.preimage("code") for side in (a, b))
    return Diff(
        same_key=a.key == b.key,
        parts={part: Pair(part, a.parts.get(part), b.parts.get(part)) for part in PARTS},
        commands=_commands(a, b) if known else [],
        params=differing(a.params, b.params) if known else _as_texts(a.params, b.params),
        code=compare_code(code_a, code_b, a.code, b.code) if known else CodeDiff([], "", [], []),
        excluded=_excluded(a, b) if known else [],
        data=differing(data_a, data_b) if known else [],
        images=images,
        files=_data_files(data_a, data_b, root) if known and images is None else None,
        packages=_packages(a, b) if known else [],
        metrics=differing(metrics_a, metrics_b) if on_both else [],
        witness=differing(_witness(a), _witness(b)) if on_both else [],
        installed=differing(a.packages, b.packages) if a.packages and b.packages else [],
        artifacts=differing(kept_a, kept_b),
        equal_metrics=_equal(metrics_a, metrics_b),
        equal_artifacts=_equal(kept_a, kept_b),
    )


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> int:
    return sum(1 for name in a.keys() & b.keys() if a[name] == b[name])


def _as_texts(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Pair]:
    """The names on both sides whose values differ as text, which is all that MLflow has."""
    both = a.keys() & b.keys()
    return differing({n: str(a[n]) for n in both}, {n: str(b[n]) for n in both})


def _commands(a: Side, b: Side) -> list[Pair]:
    assert a.recipe
    assert b.recipe
    return differing(a.recipe.cmd, b.recipe.cmd)


def _excluded(a: Side, b: Side) -> list[Pair]:
    listed = [dict.fromkeys(side.preimage("code")["excluded"], True) for side in (a, b)]
    return differing(*listed)


def _data_files(a: Mapping[str, str], b: Mapping[str, str], root: Path) -> FilesDiff | None:
    """By the lists of files that DVC's cache has of both data folders."""
    changed = differing(a, b)
    if not changed:
        return None
    cache = DvcCache(root)
    sides: list[dict[str, str]] = []
    for names in (a, b):
        files: dict[str, str] = {}
        for pair in changed:
            md5 = names.get(pair.name, "").removeprefix("md5:")
            listed = cache.files({pair.name: md5}) if md5 else {}
            if md5 and len(listed) < 2:  # the folder itself alone: its list is not there
                return None
            files |= {path: one for path, one in listed.items() if not path.endswith("/")}
        sides.append(files)
    return compare_files(*sides)


def _packages(a: Side, b: Side) -> list[Pair]:
    environments = [side.preimage("environment") for side in (a, b)]
    rows = [_rows(environment["packages"]) for environment in environments]
    pairs = []
    for pair in differing(*rows):
        old, new = (" + ".join(r[0] for r in side) if side else None for side in (pair.a, pair.b))
        if old == new:  # one version and build, two files
            old, new = (" + ".join(r[1] for r in side) for side in (pair.a, pair.b))
        pairs.append(Pair(pair.name, old, new))
    platforms = [{"(platform)": environment["platform"]} for environment in environments]
    return differing(*platforms) + pairs


def _rows(packages: list[list[str]]) -> dict[str, list[tuple[str, str]]]:
    """(version and build, hash) of each package of a name; a name may be locked twice."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for name, version, build, digest in packages:
        rows.setdefault(name, []).append((f"{version} {build}".strip(), digest))
    return rows


def _witness(side: Side) -> dict[str, Any]:
    """What a run was really run with, in one flat list."""
    assert side.record
    details, tags = side.record.details, side.record.run.tags
    if details is None:
        return {name: tags[name] for name in ("device", "micro_batch", "host") if name in tags}
    return {**details.witness, "host": details.host, "snapshot": details.snapshot}


def _kept(side: Side) -> dict[str, str]:
    details = side.record.details if side.record else None
    return {path: file.sha256 for path, file in details.files.items()} if details else {}
