"""Compare two runs, or a run with the working tree.

    diff = compare(run_side(library, "rk2-1d0c", root), tree_side(root), root)

The four parts of the key are compared by their hashes, each part that differs by what it hashes:
code by a git diff, data image by image or file by file. Then come metrics and witness.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from runkey import paths
from runkey.data.image_list import IMAGE_LIST, ImageList, read_image_list
from runkey.errors import DataError, RegistryError
from runkey.evaluation.files import OTHER, RESAMPLED, Resampled
from runkey.evaluation.noise import ScoreDifference, compare_scores
from runkey.files import expect, parse_json
from runkey.identity.code import RULE, code_rule, hash_code
from runkey.identity.dvc_yaml import PIPELINE, read_yaml_text
from runkey.identity.initial_weights import weights_of
from runkey.identity.key import PARTS, SHORT, Recipe, make_recipe, older_rule
from runkey.identity.record import CLASS_AP, KEY_JSON, LoggedRun, Record
from runkey.registry.dvc_cache import DvcCache, files_of
from runkey.registry.library import Library, find_run
from runkey.registry.lineage import initial_weights
from runkey.registry.snapshot import git, git_bytes, has_commit, same_code

ReadFile = Callable[[str], bytes | None]
"""Returns the bytes of a file of one side; None: not there."""
Change = Literal["added", "removed", "changed"]
# The user's own settings for diffs would change what a script reads.
_PLAIN = ("--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--src-prefix=a/")


@dataclass(frozen=True)
class Pair:
    """A name whose values differ; None: not there on that side."""

    name: str
    a: Any
    b: Any


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Pair]:
    """List the names whose values are not the same, in alphabetical order."""
    return [
        Pair(name, a.get(name), b.get(name))
        for name in sorted(a.keys() | b.keys())
        if (name in a, a.get(name)) != (name in b, b.get(name))
    ]


TREE = "."
"""Address of the working tree."""
IMAGES_JSON = f"{paths.PREPARED}/{IMAGE_LIST}"
RESAMPLED_JSON = f"{paths.EVALUATION}/{RESAMPLED}"
_OF_VAL = f"{paths.EVALUATION}/{OTHER}/{RESAMPLED}"
_EVAL = "eval/"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison."""

    address: str
    """As the user named it."""
    key: str
    parts: dict[str, str]
    recipe: Recipe | None
    """None: the run has no key.json, such as a failed one."""
    record: Record | None
    """None: the working tree."""
    read: ReadFile | None
    """Reads its files; None: they are not here."""
    images: ImageList | None
    resampled: Resampled | None = None
    """None: it was not evaluated, or before there were intervals."""
    resampled_val: Resampled | None = None
    """The same on val, of a run whose result is of test."""
    packages: dict[str, str] = field(default_factory=dict)
    """Installed version by name; empty if unknown."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, and why."""

    @property
    def params(self) -> dict[str, Any]:
        """The parameters in the key; of a run without key.json as text, as MLflow has them."""
        if self.recipe:
            return dict(self.recipe.preimages["params"])
        logged = self.record.run.params if self.record else {}
        return {n: v for n, v in logged.items() if n.split(".")[0] not in ("key", "runtime")}

    def preimage(self, part: str) -> dict[str, Any]:
        """Return what a part hashes; empty if unknown."""
        return dict(self.recipe.preimages[part]) if self.recipe else {}


def run_side(library: Library, address: str, root: Path) -> Side:
    """Read a recorded run; `root` is the main checkout, whose repository has snapshots.

    RegistryError if there is no such run; this or RecipeError if its key.json is damaged.
    """
    record = find_run(library, address)
    notes = list(filter(None, [older_rule(record.key)]))

    def artifact(path: str) -> bytes | None:
        if record.details and path not in record.details.files:
            notes.append(f"it kept no {path}")
            return None
        try:
            with library.open_file(record, path) as file:
                return file.read()
        except (RegistryError, OSError, HTTPException) as error:
            notes.append(str(error))
            return None

    recipe = _recipe(record, artifact(KEY_JSON))
    kept = record.details.files if record.details else {}
    oid = record.details.snapshot if record.details else record.run.tags.get("snapshot")
    read = _snapshot_reader(root, oid)
    if read is None:
        what = f"its snapshot {oid[:12]} is not in this repository" if oid else "it has no snapshot"
        notes.append(f"{what}; of its code only the hashes are known")
    return Side(
        address=address,
        key=record.key,
        parts=recipe.parts if recipe else record.run.parts,
        recipe=recipe,
        record=record,
        read=read,
        images=_images(artifact(IMAGES_JSON), notes),
        resampled=_resampled(artifact, RESAMPLED_JSON, notes) if RESAMPLED_JSON in kept else None,
        resampled_val=_resampled(artifact, _OF_VAL, notes) if _OF_VAL in kept else None,
        packages=_installed_packages(artifact(str(paths.RUN_JSON))),
        notes=notes,
    )


def tree_side(workspace: Path) -> Side:
    """Read the working tree, with the key that a training of it has; raises as `make_recipe`."""
    recipe = make_recipe("train", workspace)
    images, notes = None, list[str]()

    def read(path: str) -> bytes | None:
        file = workspace / path
        return file.read_bytes() if file.is_file() else None

    if _prepared_md5(workspace) in recipe.preimages["data"].values():
        images = _images(read(IMAGES_JSON), notes)
    else:
        notes.append(f"{paths.PREPARED}/ is not of these data; `dvc repro prepare` lists images")
    return Side(
        address=TREE,
        key=recipe.key,
        parts=recipe.parts,
        recipe=recipe,
        record=None,
        read=read,
        images=images,
        notes=notes,
    )


def _snapshot_reader(root: Path, oid: str | None) -> ReadFile | None:
    if oid is None or not has_commit(root, oid):
        return None

    def read(path: str) -> bytes | None:
        try:
            # `./`: the repository may lie below the top folder of git.
            return git_bytes(root, "cat-file", "blob", f"{oid}:./{path}")
        except RegistryError:
            return None

    return read


def _recipe(record: Record, data: bytes | None) -> Recipe | None:
    if data is None:
        return None
    try:
        recipe = Recipe.from_dict(parse_json(data))
    except (ValueError, AttributeError):
        raise RegistryError(
            f"{record.label}: {KEY_JSON}: not JSON (run {record.run.run_id});"
            f" `runkey verify {record.label}` says what else is wrong"
        ) from None
    if recipe.key != record.key:
        raise RegistryError(f"{record.label}: {KEY_JSON}: holds another key, {recipe.key}")
    return recipe


def _images(data: bytes | None, notes: list[str]) -> ImageList | None:
    try:
        return None if data is None else read_image_list(data, IMAGES_JSON)
    except DataError as error:
        notes.append(str(error))
        return None


def _resampled(read: ReadFile, path: str, notes: list[str]) -> Resampled | None:
    data = read(path)
    try:
        found: Resampled | None = None if data is None else expect(Resampled, parse_json(data))
        return found
    except ValueError as error:
        notes.append(f"{path}: {error}; its AP is not compared in pairs")
        return None


def _installed_packages(data: bytes | None) -> dict[str, str]:
    """Installed packages in a run.json; {} if it has none or cannot be read."""
    try:
        return dict(parse_json(data or b"{}")["witness"]["packages"])
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


@dataclass(frozen=True)
class FileChange:
    """A file that differs."""

    path: str
    change: Change
    a: str | None
    """Its hash in the key."""
    b: str | None
    insertions: int | None
    """Lines; None where the file's text is unknown."""
    deletions: int | None


@dataclass(frozen=True)
class CodeDiff:
    """The difference of two code parts."""

    files: list[FileChange]
    patch: str
    """git's, of the files whose text is known."""
    unknown: list[str]
    """Files that are in no snapshot here."""
    incomparable: list[str]
    """Files that may differ or not: different rules made their hashes, and one side's text is not
    here."""


def compare_code(
    a: Mapping[str, Any], b: Mapping[str, Any], read_a: ReadFile | None, read_b: ReadFile | None
) -> CodeDiff:
    """Compare the code parts of two keys file by file.

    If the keys were made by different rules, files on both sides are compared by their text under
    the newer rule, in which a comment makes no difference.
    """
    pairs = differing(a["files"], b["files"])
    rule_a, rule_b = code_rule(a), code_rule(b)
    known: dict[str, tuple[bytes, bytes]] = {}
    incomparable, differ = [], []
    for pair in pairs:
        path = pair.name
        old, new = _text(path, pair.a, read_a, rule_a), _text(path, pair.b, read_b, rule_b)
        if old is not None and new is not None:
            known[path] = old, new
        if rule_a == rule_b or _change(pair) != "changed":
            differ.append(pair)
        elif path not in known:
            incomparable.append(path)
        elif not same_code(path, known[path][1], hash_code(path, known[path][0]), RULE):
            differ.append(pair)
    changed = [pair for pair in differ if pair.name in known]
    lines, patch = _git_diff(changed, known) if changed else ({}, "")
    files = [
        FileChange(pair.name, _change(pair), pair.a, pair.b, *lines.get(pair.name, (None, None)))
        for pair in differ
    ]
    unknown = [pair.name for pair in differ if pair.name not in lines]
    return CodeDiff(files, patch, unknown, incomparable)


def _change(pair: Pair) -> Change:
    if pair.a is None:
        return "added"
    return "removed" if pair.b is None else "changed"


def _text(path: str, recorded: str | None, read: ReadFile | None, rule: str) -> bytes | None:
    """A file's text with LF at line ends, as in keys; None if it is not the recorded one."""
    if recorded is None:
        return b""
    data = read(path) if read else None
    if data is None:
        return None
    data = data.replace(b"\r\n", b"\n")
    return data if same_code(path, data, recorded, rule) else None


def _git_diff(
    pairs: list[Pair], texts: Mapping[str, tuple[bytes, bytes]]
) -> tuple[dict[str, tuple[int | None, int | None]], str]:
    """Lines added and removed by path, and the patch, made in a temporary repository."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        git(root, "init", "-q", "--template=")
        trees = []
        for side in (0, 1):
            for pair in pairs:
                file = root / pair.name
                file.unlink(missing_ok=True)
                if (pair.a, pair.b)[side] is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(texts[pair.name][side])
            git(root, "-c", "core.autocrlf=false", "add", "-A", "-f", ".")
            trees.append(git(root, "write-tree"))
        numbers = git(root, "diff", *_PLAIN, "--numstat", "-z", *trees)
        patch = git_bytes(root, "diff", *_PLAIN, "--dst-prefix=b/", *trees)
    rows = [row.split("\t", 2) for row in numbers.split("\0") if row]
    lines: dict[str, tuple[int | None, int | None]] = {  # `-` stands for a file that is no text
        path: (None, None) if plus == "-" else (int(plus), int(minus)) for plus, minus, path in rows
    }
    return lines, patch.decode("utf-8", "replace")


@dataclass(frozen=True)
class ImagesDiff:
    """Image files, relative to the data folder, by what changed from A to B."""

    added: list[str]
    removed: list[str]
    relabelled: list[str]
    """Other boxes or other classes."""
    replaced: list[str]
    """Another picture of the same name."""
    moved: list[str]
    """From one split to the other."""
    total_a: int
    total_b: int

    def by_kind(self) -> dict[str, list[str]]:
        """Return the lists that are not empty, by name."""
        return {
            kind: names for kind, names in vars(self).items() if isinstance(names, list) and names
        }


def compare_images(a: ImageList, b: ImageList) -> ImagesDiff:
    """Compare two lists of images; an image that is relabelled and replaced is in both lists."""
    old = {file: (split, one) for split, members in a.items() for file, one in members.items()}
    new = {file: (split, one) for split, members in b.items() for file, one in members.items()}
    both = sorted(old.keys() & new.keys())
    return ImagesDiff(
        added=sorted(new.keys() - old.keys()),
        removed=sorted(old.keys() - new.keys()),
        relabelled=[f for f in both if old[f][1].labels != new[f][1].labels],
        replaced=[f for f in both if old[f][1].content != new[f][1].content],
        moved=[f for f in both if old[f][0] != new[f][0]],
        total_a=len(old),
        total_b=len(new),
    )


@dataclass(frozen=True, kw_only=True)
class Diff:
    """The differences of A and B. Every `Pair` is of values that differ."""

    same_key: bool
    lineage: str
    """Whether one was started from the other's weights, or both from the same; empty if not."""
    parts: dict[str, Pair]
    """Hashes of every part, also of equal ones."""
    commands: list[Pair]
    """Commands of the stages, by name."""
    params: list[Pair]
    code: CodeDiff
    excluded: list[Pair]
    """Files and folders that only one side's code part leaves out: True where it does."""
    data: list[Pair]
    """md5s by name of the data."""
    images: ImagesDiff | None
    """None if one side's images are unknown."""
    files: dict[Change, list[str]] | None
    """Files of the data folder by what changed, if the images are unknown and DVC's cache lists
    both folders."""
    packages: list[Pair]
    """Locked packages as `version build`; if these are equal, as hashes."""
    metrics: list[Pair]
    scores: list[ScoreDifference]
    """AP and AP50 of runs, and whether they differ by more than noise."""
    witness: list[Pair]
    installed: list[Pair]
    """Installed versions, if known of both runs."""
    artifacts: list[Pair]
    """sha256 by path of recorded files; only for runs of one key."""
    equal_metrics: int
    equal_artifacts: int


def metrics_by_split(run: LoggedRun, splits: Collection[str]) -> dict[str, float]:
    """Return a run's metrics; if `splits` are several, by names that say of which split they are.

    So val's AP of a run with a test split meets val's AP of one without, and test's meets none.
    """
    if len(splits) < 2:
        return run.metrics
    named = {}
    for name, value in run.metrics.items():
        head, _, leaf = name.partition("/")
        if head in ("eval", CLASS_AP) and "/" not in leaf:
            name = f"{head}/{run.split}/{leaf}"
        named[name] = value
    return named


def compare(a: Side, b: Side, root: Path) -> Diff:
    """Compare two sides; the DVC cache of the checkout `root` may have the data."""
    known = a.recipe is not None and b.recipe is not None
    kept_a, kept_b = (_kept(side) if a.key == b.key else {} for side in (a, b))
    splits = {side.record.run.split for side in (a, b) if side.record}
    metrics_a, metrics_b = (
        metrics_by_split(side.record.run, splits) if side.record else {} for side in (a, b)
    )
    on_both = a.record is not None and b.record is not None
    data_a, data_b = a.preimage("data"), b.preimage("data")
    images = compare_images(a.images, b.images) if a.images and b.images else None
    code_a, code_b = (side.preimage("code") if known else {} for side in (a, b))
    left_out = [dict.fromkeys(code.get("excluded", ()), True) for code in (code_a, code_b)]
    return Diff(
        same_key=a.key == b.key,
        lineage=_lineage(a, b),
        parts={part: Pair(part, a.parts.get(part), b.parts.get(part)) for part in PARTS},
        commands=differing(a.recipe.cmd, b.recipe.cmd) if a.recipe and b.recipe else [],
        params=differing(a.params, b.params) if known else _as_texts(a.params, b.params),
        code=compare_code(code_a, code_b, a.read, b.read) if known else CodeDiff([], "", [], []),
        excluded=differing(*left_out),
        data=differing(data_a, data_b) if known else [],
        images=images,
        files=_data_files(data_a, data_b, root) if known and images is None else None,
        packages=_packages(a, b) if known else [],
        metrics=differing(metrics_a, metrics_b) if on_both else [],
        scores=_compare_scores(a, b, splits) if on_both else [],
        witness=differing(_witness(a), _witness(b)) if on_both else [],
        installed=differing(a.packages, b.packages) if a.packages and b.packages else [],
        artifacts=differing(kept_a, kept_b),
        equal_metrics=sum(metrics_a[n] == metrics_b[n] for n in metrics_a.keys() & metrics_b),
        equal_artifacts=sum(kept_a[n] == kept_b[n] for n in kept_a.keys() & kept_b),
    )


def _compare_scores(a: Side, b: Side, splits: Collection[str]) -> list[ScoreDifference]:
    """Compare the results; those on val, if one is of val and the other of test."""
    if len(splits) < 2:
        return compare_scores(_scores(a), _scores(b), a.resampled, b.resampled)
    sides = [
        (_scores(side, f"{_EVAL}{OTHER}/"), side.resampled_val)
        if side.record and side.record.run.split == "test"
        else (_scores(side), side.resampled)
        for side in (a, b)
    ]
    (scores_a, resampled_a), (scores_b, resampled_b) = sides
    found = compare_scores(scores_a, scores_b, resampled_a, resampled_b)
    return [replace(one, name=f"{one.name} on val") for one in found]


def _scores(side: Side, prefix: str = _EVAL) -> dict[str, float]:
    logged = side.record.run.metrics if side.record else {}
    return {n.removeprefix(prefix): value for n, value in logged.items() if n.startswith(prefix)}


def _initial_weights(side: Side) -> str:
    began = side.record.started_from if side.record else None
    return began.weights if began else initial_weights(side.preimage("params"))[1]


def _lineage(a: Side, b: Side) -> str:
    began_a, began_b = map(_initial_weights, (a, b))
    own_a, own_b = (weights_of(side.record) if side.record else [] for side in (a, b))
    if began_b in own_a:
        return "B was started from the weights of A"
    if began_a in own_b:
        return "A was started from the weights of B"
    if began_a and began_a == began_b:
        both = next((s.record.started_from for s in (a, b) if s.record), None)
        return f"both were started from {both.label if both else f'weights {began_a[:SHORT]}'}"
    return ""


def _as_texts(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Pair]:
    """List the names on both sides whose values differ as text, as MLflow has them."""
    both = a.keys() & b.keys()
    return differing({n: str(a[n]) for n in both}, {n: str(b[n]) for n in both})


def _data_files(
    a: Mapping[str, str], b: Mapping[str, str], root: Path
) -> dict[Change, list[str]] | None:
    changed = differing(a, b)
    if not changed:
        return None
    cache = DvcCache(root)
    sides: list[dict[str, str]] = []
    for names in (a, b):
        files: dict[str, str] = {}
        for pair in changed:
            md5 = names.get(pair.name, "").removeprefix("md5:")
            listed = files_of({pair.name: md5}, cache.listing) if md5 else {}
            if md5 and len(listed) < 2:  # only the folder itself: its list is not there
                return None
            files |= {path: one for path, one in listed.items() if not path.endswith("/")}
        sides.append(files)
    kinds: dict[Change, list[str]] = {"added": [], "removed": [], "changed": []}
    for pair in differing(*sides):
        kinds[_change(pair)].append(pair.name)
    return kinds


def _packages(a: Side, b: Side) -> list[Pair]:
    sides = []
    for environment in (side.preimage("environment") for side in (a, b)):
        locked = {"(platform)": [(environment["platform"], "")]}
        for name, version, build, digest in environment["packages"]:  # a name may come twice
            locked.setdefault(name, []).append((f"{version} {build}".strip(), digest))
        sides.append(locked)
    pairs = []
    for pair in differing(*sides):
        old, new = (" + ".join(r[0] for r in side) if side else None for side in (pair.a, pair.b))
        if old == new:  # one version and build, two files
            old, new = (" + ".join(r[1] for r in side) for side in (pair.a, pair.b))
        pairs.append(Pair(pair.name, old, new))
    return pairs


def _witness(side: Side) -> dict[str, Any]:
    assert side.record
    details, tags = side.record.details, side.record.run.tags
    if details is None:
        return {name: tags[name] for name in ("device", "micro_batch", "host") if name in tags}
    return {**details.witness, "host": details.host, "snapshot": details.snapshot}


def _kept(side: Side) -> dict[str, str]:
    details = side.record.details if side.record else None
    return {path: file.sha256 for path, file in details.files.items()} if details else {}
