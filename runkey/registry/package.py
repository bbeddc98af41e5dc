"""A run in a folder: what `publish` sends, `fetch` gets, and an archive contains.

    run/run.json, run/artifacts/             the MLflow run (`runkey.identity.record`)
    dvc.json, objects/<2 digits>/<the rest>  the `DvcPart`: DVC's run-cache entries, their objects
    snapshot.bundle                          git's bundle of the snapshot, in archives only

Another checkout's `dvc repro` restores every stage of it; `dvc push --run-cache` sends too little
for that. All of it may come from elsewhere and is checked before it is used: DVC believes an
entry's name and runs whatever the entry says.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Protocol, TypedDict

from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError, with_config

from runkey.errors import ParamsError, RecipeError, RegistryError
from runkey.files import LARGE, first_fault, read_json, replacing
from runkey.hashing import sha256_bytes, sha256_file
from runkey.identity.dvc_yaml import DIR, folder_md5
from runkey.identity.key import DATA_PATH, FILE_PARAMS, SCHEMA, Recipe, short_key
from runkey.identity.record import (
    ARTIFACTS,
    CONTENT,
    DETAILS,
    KEY,
    KEY_JSON,
    ORIGIN,
    TAKEN,
    Details,
    LoggedRun,
    Record,
)
from runkey.params import as_text, override, parse_params
from runkey.params.load import parse_yaml
from runkey.params.schema import flatten
from runkey.paths import INITIAL_WEIGHTS, LOGS, PARAMS, RUN_JSON
from runkey.progress import each
from runkey.registry.archive import check_weights, parse_json, safe_path
from runkey.registry.dvc_cache import DvcCache, files_of, linked, md5_file
from runkey.registry.query import number
from runkey.registry.snapshot import changed_files, checked_out, git
from runkey.training.lock import locked
from runkey.units import MIB

logger = logging.getLogger(__name__)

_LONGEST_PARAM = 6000
"""Characters that MLflow keeps."""

RUN, OBJECTS, BUNDLE = "run", "objects", "snapshot.bundle"


class Runs(Protocol):
    """Access to a store's MLflow runs; `runkey.tracking` implements it with MLflow."""

    def read(self, run_id: str, folder: Path) -> object:
        """Copy a run to a folder, in the form of `runkey.identity.record`."""

    def write(self, folder: Path) -> LoggedRun:
        """Copy a run from such a folder; it can be found by its key only when it is whole."""

    def add(self, run_id: str, file: Path) -> None:
        """Add a file to a run's artifacts."""


@dataclass(frozen=True)
class Package:
    """A run whose files were checked."""

    run: Path
    """The folder of the MLflow run."""
    key: str
    origin: str
    """MLflow id of the run that was made first."""
    details: Details
    recipe: Recipe

    @property
    def files(self) -> Path:
        """The folder of its artifacts."""
        return self.run / ARTIFACTS


def object_path(folder: Path, md5: str) -> Path:
    """Return where an object lies in a package's folder."""
    return folder / OBJECTS / md5[:2] / md5[2:]


@contextmanager
def staging(home: Path, what: str) -> Iterator[Path]:
    """Make a temporary folder in `Store.home`; it is deleted afterwards.

    The lock in it shows `runkey gc` that a process which was killed left it.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{what}-", dir=home) as folder,
        locked(Path(folder)),
    ):
        inner = Path(folder, "files")
        inner.mkdir()
        yield inner


def note_taken(package: Package, how: str) -> None:
    """Note in a run that is to be copied how it came here, whatever its maker noted."""
    content = read_json(package.run / CONTENT, most=LARGE)
    content["tags"][TAKEN] = f"{how} on {time.strftime('%Y-%m-%d')}"
    (package.run / CONTENT).write_text(json.dumps(content), encoding="utf-8")


def read_run(runs: Runs, record: Record, folder: Path, where: str) -> Package:
    """Copy an MLflow run into a package's folder, and check it as `check` does."""
    (folder / RUN).mkdir()
    runs.read(record.run.run_id, folder / RUN)
    return check(folder, record.key, where)


# The form of run.json.


@with_config(ConfigDict(extra="forbid"))
class _Dataset(TypedDict):
    name: str | None
    digest: str | None
    source_type: str | None
    source: str | None
    schema: str | None
    profile: str | None
    tags: dict[str, str | None]


class _Manifest(TypedDict):
    key: str
    parts: dict[str, str]


class _Content(TypedDict):
    schema: Literal["run1"]
    run_id: str
    name: str
    status: str
    started_ms: int
    ended_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, list[tuple[int, int, float | Literal["nan", "inf", "-inf"]]]]
    """Each point as step, milliseconds and value."""
    datasets: list[_Dataset]


def check(folder: Path, key: str, where: str) -> Package:
    """Check that the run in a folder is complete, is of this key and is what it says.

    Raises:
        RegistryError: it is incomplete, a file differs from its recorded hash, its key.json does
            not give that key, its run.json names another, its MLflow run shows other parameters, or
            a file could run code when it is loaded; the text names it.
    """
    files = folder / RUN / ARTIFACTS
    stored = parse_json(_Content, folder / RUN / CONTENT, f"{where}: {CONTENT}")
    if stored["status"] != "FINISHED":
        raise RegistryError(f"{where}: the run is {stored['status']}, not FINISHED")
    key_json, record_json = (
        parse_json(dict[str, Any], files / name, f"{where}: {name}") for name in (KEY_JSON, DETAILS)
    )
    try:
        recipe, details = Recipe.from_dict(key_json), Details.from_dict(record_json, DETAILS)
    except RecipeError as error:
        raise RegistryError(f"{where}: {error}") from None
    tagged = stored["tags"].get(KEY) or stored["params"].get(KEY)
    for what, found in (("its run", tagged), ("its key.json", recipe.key)):
        if found != key:
            raise RegistryError(
                f"{where}: {what} has another key, {short_key(str(found))}, than {short_key(key)}"
            )
    keyed = {f"{KEY}.{part}": digest for part, digest in recipe.parts.items()}
    keyed |= {n: v for n, v in recipe.preimages["params"].items() if n not in FILE_PARAMS}
    for name in keyed.keys() & stored["params"].keys() if recipe.schema == SCHEMA else ():
        shown, text = stored["params"][name], as_text(keyed[name])
        if shown != text[:_LONGEST_PARAM]:
            raise RegistryError(
                f"{where}: its run has {name} = {shown!r:.60}, and its key {text:.60}; refused"
            )
    if details.stage != recipe.stage:
        raise RegistryError(f"{where}: {DETAILS} is of the stage {details.stage[:40]!r}; refused")
    for name, recorded in each("hash files", list(details.files.items()), "files"):
        path = files / safe_path(name, f"{where}: {DETAILS}")
        if not path.is_file():
            raise RegistryError(f"{where}: {name}: recorded by the run, and not there")
        if path.stat().st_size != recorded.size or sha256_file(path) != recorded.sha256:
            raise RegistryError(f"{where}: {name}: not the file that the run recorded")
    for path in sorted(p for p in files.rglob("*") if p.is_file()):
        check_weights(path, path.relative_to(files).as_posix())
    pointer = files / RUN_JSON
    manifest = parse_json(_Manifest, pointer, f"{where}: {RUN_JSON}")
    if manifest != {"key": key, "parts": recipe.parts}:
        found = short_key(manifest["key"])
        raise RegistryError(f"{where}: {RUN_JSON} is of another key, {found}; refused")
    if details.pointer_md5 not in (None, md5_file(pointer)):
        raise RegistryError(f"{where}: {DETAILS} names another {RUN_JSON} than the run's; refused")
    origin = stored["tags"].get(ORIGIN) or stored["run_id"]
    return Package(folder / RUN, key, origin, details, recipe)


# DVC's part of a run.

FILE = "dvc.json"
"""Artifact of a published run that holds the `DvcPart`."""

Md5 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}(\.dir)?$")]
PathOf = Callable[[str], Path]
"""Returns the place where the object of an md5 lies."""


@dataclass(frozen=True)
class DvcPart:
    """Entries, and names and sizes of objects; their bytes are in a cache, remote or archive."""

    entries: dict[str, str]
    """YAML text by path below the cache's runs/, the stages in order."""
    objects: dict[Md5, NonNegativeInt]
    """Bytes by md5; a folder's md5 ends with `.dir`."""
    names: dict[Md5, str]
    """Path in the repository by md5, for messages."""
    schema: Literal["dvc1"]

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(self.objects.values())

    def as_json(self) -> str:
        """Format as the content of `FILE`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    def missing_from(self, cache: DvcCache) -> list[str]:
        """List the objects that a cache does not have."""
        return [md5 for md5 in self.objects if not cache.object_path(md5).is_file()]

    def check(self, path_of: PathOf, package: Package) -> list[CheckedEntry]:
        """Refuse what DVC would not write, is not what its name says, not the run's, or does harm.

        Raises:
            RegistryError: an entry is malformed or names an object that is not listed; an object is
                missing, has another md5 or size, lists a file outside its folder or one that is not
                among the objects, or could run code when it is loaded; no entry is the run's, or
                one is not of its chain, or of another command, other parameters or data than its
                key; an output of the run is missing or differs from its file in MLflow.
        """
        details = package.details
        entries = {path: _check_entry(path, text) for path, text in self.entries.items()}
        needed = {md5 for entry in entries.values() for md5 in entry.outs.values()}
        if missing := needed - self.objects.keys():
            raise RegistryError(f"{FILE}: object {min(missing)} of an entry is not listed")
        listings: dict[str, dict[str, str]] = {}
        for md5, size in each("hash objects", list(self.objects.items()), "objects"):
            path, where = path_of(md5), f"DVC object {md5}"
            if not path.is_file() or path.stat().st_size != size:
                raise RegistryError(f"{where}: missing, or not of {size} bytes")
            if md5_file(path) != md5.removesuffix(DIR):
                raise RegistryError(f"{where}: its contents have another md5; damaged")
            if md5.endswith(DIR):
                items = parse_json(list[_Listed], path, where)
                listings[md5] = {safe_path(item["relpath"], where): item["md5"] for item in items}
                if lost := set(listings[md5].values()) - self.objects.keys():
                    raise RegistryError(f"{where}: lists {min(lost)}, which is not there")
        files = {p: files_of(entry.outs, listings.__getitem__) for p, entry in entries.items()}
        for one in files.values():
            for name, md5 in one.items():
                check_weights(path_of(md5), name)
        pointer = details.pointer_md5 or md5_file(package.files / RUN_JSON)
        start = next((p for p, one in files.items() if pointer in one.values()), None)
        if start is None:
            raise RegistryError(f"{FILE}: not of this run: no entry has its run.json")
        read = {p: (set(one.deps.items()), set(one.outs.items())) for p, one in entries.items()}
        before, after = linked(start, read, listings.__getitem__)
        if strange := entries.keys() - {start, *before, *after}:
            raise RegistryError(
                f"{FILE}: DVC entry {min(strange)[:24]}, of `{entries[min(strange)].cmd[:60]}`, has"
                " nothing to do with this run; refused"
            )
        self._check_outputs(files[start], details, path_of)
        made = {(name.rstrip("/"), md5) for one in files.values() for name, md5 in one.items()}
        for place, entry in entries.items():
            entry.compare(package.recipe, made, is_later=place in after)
            for name, md5 in files[place].items():
                recorded = details.files.get(name)
                if recorded and sha256_file(path_of(md5)) != recorded.sha256:
                    entry.doubt = f"its {name} is not the one that the run recorded"
        return list(entries.values())

    def _check_outputs(self, own: dict[str, str], details: Details, path_of: PathOf) -> None:
        """Compare the files of the run's own entry with those that the run recorded."""
        for name in own:
            # A log that lost lines is no output of the run.
            is_kept = name.endswith("/") or LOGS in Path(name).parents
            if name not in details.files and not is_kept:
                raise RegistryError(f"{name}: in DVC's entry, and the run recorded no such file")
        for name in details.outputs:
            if name not in details.files or name not in own:
                raise RegistryError(f"{name}: an output of the run; not among its files or DVC's")
            if sha256_file(path_of(own[name])) != details.files[name].sha256:
                raise RegistryError(
                    f"{name}: DVC object {own[name]} is not the file that the run recorded"
                )

    def install(self, path_of: PathOf, cache: DvcCache, left_out: Collection[str] = ()) -> None:
        """Copy what was checked into a cache: files, then folder listings, then entries."""
        for md5 in sorted(self.missing_from(cache), key=lambda md5: md5.endswith(DIR)):
            _place(cache.object_path(md5), path_of(md5))
            place = cache.object_path(md5)  # as DVC leaves its objects
            place.chmod(stat.S_IMODE(place.stat().st_mode) & 0o444)
        for path, text in self.entries.items():
            if path not in left_out and not (cache.runs / path).exists():
                _place(cache.runs / path, text)


def collect(
    cache: DvcCache,
    pointer_md5: str,
    label: str,
    params: Mapping[str, str] | None = None,
    *,
    with_data: bool = False,
) -> DvcPart:
    """Find what a checkout's cache holds of a run, given the md5 of its run.json.

    Stages of other `params`, as MLflow has the run's, may have had the same outputs, such as
    `prepare` with another seed; their entries are left out. `with_data` also takes the raw data,
    which `data.dvc` has a remote for.

    Raises:
        RegistryError: the cache has no entry of the run, or lacks an object that one names.
    """
    entry = cache.entry_of(pointer_md5)
    if entry is None:
        raise RegistryError(
            f"{label}: DVC's cache in {cache.folder} has no entry of this run; `dvc repro` where"
            " the tree has this key takes the run and makes one, then it can be handed on"
        )
    chain = [
        one
        for one in cache.chain(entry)
        if one.path == entry.path or not _is_of_others(cache.runs / one.path, params or {})
    ]
    names: dict[str, str] = {}
    for one in chain:
        deps = one.deps.items() if with_data else ()
        here = {path: md5 for path, md5 in deps if cache.object_path(md5).is_file()}
        files = files_of({**here, **one.outs}, cache.listing)
        names = {md5: path for path, md5 in files.items()} | names
    for md5, name in names.items():
        if not cache.object_path(md5).is_file():
            raise RegistryError(
                f"{label}: DVC's cache lacks {name} ({cache.object_path(md5)}); `dvc fetch`, or"
                " `dvc repro --force`, gets it back"
            )
    return DvcPart(
        {one.path: (cache.runs / one.path).read_text(encoding="utf-8") for one in chain},
        {md5: cache.object_path(md5).stat().st_size for md5 in names},
        names,
        "dvc1",
    )


def _is_of_others(path: Path, params: Mapping[str, str]) -> bool:
    """Return True if an entry holds another value of a run's parameter."""
    tree = parse_yaml(path.read_text(encoding="utf-8"))
    values = flatten((tree.get("params") or {}).get(str(PARAMS)) or {})
    for name in values.keys() & params.keys() - set(FILE_PARAMS):
        given = as_text(values[name])
        both = number(given), number(params[name])
        if given[:_LONGEST_PARAM] != params[name] and (None in both or both[0] != both[1]):
            return True
    return False


def _place(target: Path, data: Path | str) -> None:
    """Write a file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    size = data.stat().st_size if isinstance(data, Path) else len(data)
    # Not beside the target: DVC takes any file in a folder of entries for an entry.
    with replacing(target, target.parents[1], wanted=size) as file:
        if isinstance(data, Path):
            with data.open("rb") as source:
                shutil.copyfileobj(source, file, MIB)
        else:
            file.write(data.encode())


# What a run-cache entry holds, beside the key of its run.


@dataclass
class CheckedEntry:
    """An entry of DVC's form."""

    path: str
    cmd: str
    deps: dict[str, str]
    """md5 by path."""
    params: dict[Any, Any]
    """Nested values by file."""
    outs: dict[str, str]
    """md5 by path."""
    code: dict[str, str] = field(default_factory=dict)
    """The inputs that only the run's snapshot can confirm."""
    doubt: str = ""
    """What can be neither confirmed nor contradicted; such an entry is left out."""

    def compare(self, recipe: Recipe, made: Set[tuple[str, str]], *, is_later: bool) -> None:
        """Compare it with the key of its run, and set `code` and `doubt`.

        `made` holds path and md5 of all outputs of the run's entries. What reads the run's outputs
        (`is_later`) may have a command and parameters that the key does not hold.

        Raises:
            RegistryError: it is of another command, parameter or data than the key.
        """

        def contradict(what: str) -> None:
            if not is_later:
                where = f"DVC entry {self.path[:24]} of `{self.cmd[:60]}`"
                raise RegistryError(f"{where}: {what}; refused")
            self.doubt = what

        if not is_later and self.cmd not in recipe.cmd.values():
            contradict("not a command of the run's key")
        values = flatten(self.params.get(str(PARAMS)) or {})
        for name in values.keys() & recipe.preimages["params"].keys():
            given, keyed = values[name], recipe.preimages["params"][name]
            if name in FILE_PARAMS and str(keyed).startswith("sha256:"):
                self.doubt = f"its {name} names a file"
            elif given != keyed or isinstance(given, bool) != isinstance(keyed, bool):
                contradict(f"{name} = {given!r:.60}, and the run's key has {keyed!r:.60}")
        if self.params.keys() - {str(PARAMS)}:
            self.doubt = f"it reads parameters from other files than {PARAMS}"
        if not is_later:
            self.doubt = self.doubt or _other_params(values, recipe)
        where_data = str(values.get(DATA_PATH, "data")).rstrip("/")
        for path, md5 in self.deps.items():
            stated = str(recipe.preimages["data"].get("data" if path == where_data else path))
            if stated.startswith("md5:") and stated != f"md5:{md5}":
                contradict(f"reads other data, {path}, than the run's key")
            if (path, md5) not in made and stated != f"md5:{md5}":
                self.code[path] = md5


def _other_params(values: Mapping[str, Any], recipe: Recipe) -> str:
    """Say which of an entry's parameters the key holds under no name, or not so; empty if none."""
    keyed = recipe.preimages["params"]
    free = {name for name in values if name == DATA_PATH or name.startswith("runtime.")}
    for name in sorted(values.keys() - keyed.keys() - free):
        # A shorthand, such as data.checks.level, stands in keys as what it means.
        section = f"{name.rpartition('.')[0]}."
        try:
            meant = override(parse_params({"lr": 1.0, "seed": 0}), values).flat()
        except ParamsError:
            meant = {}
        within = {n: value for n, value in keyed.items() if n.startswith(section)}
        if not within or any(meant.get(n) != value for n, value in within.items()):
            return f"its {name} is no parameter of the key"
    return ""


def confirm(entries: Iterable[CheckedEntry], package: Package, root: Path) -> list[str]:
    """Compare the code that entries read with the run's snapshot, which is in git at `root`.

    Returns:
        The paths of the entries to leave out; a warning says why.
    """
    waiting = [entry for entry in entries if entry.code]
    if oid := package.details.snapshot:
        code = package.recipe.preimages["code"]
        wrong = changed_files(root, oid, code) if code.get("files") else {}
        found = _md5s_in(root, oid, {path for entry in waiting for path in entry.code})
    left_out = []
    for entry in entries:
        if entry.code and not entry.doubt:
            other = [path for path, md5 in entry.code.items() if not oid or found.get(path) != md5]
            if not oid:
                entry.doubt = "the run has no snapshot of the code that it read"
            elif wrong:
                path, how = next(iter(wrong.items()))
                entry.doubt = f"the snapshot is not the key's: {path} {how}"
            elif other:
                entry.doubt = f"its {other[0]} is not as in the run's snapshot"
        if entry.doubt:
            left_out.append(entry.path)
            logger.warning(
                f"DVC's entry of `{entry.cmd}` is left out: {entry.doubt}; `dvc repro` runs that"
                " stage, and `train` takes the run by its key"
            )
    return left_out


def _md5s_in(root: Path, oid: str, paths: Iterable[str]) -> dict[str, str]:
    """Return the md5 that DVC would give each of the paths in a checkout of a commit."""
    listed = git(root, "ls-tree", "-r", "-z", "--name-only", oid).split("\0")
    inside = {
        path: [name for name in listed if name == path or name.startswith(f"{path}/")]
        for path in paths
    }
    found = {}
    with checked_out(root, oid, {name for names in inside.values() for name in names}) as folder:
        for path, names in inside.items():
            if names == [path]:
                found[path] = md5_file(folder / path)
            elif names:
                found[path] = folder_md5(
                    {name.removeprefix(f"{path}/"): md5_file(folder / name) for name in names}
                )
    return found


# The form of a run-cache entry.

_ENTRY_PATH = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})/([0-9a-f]{64})")
_LARGEST_ENTRY = 4 * MIB
_ANCHOR = re.compile(r"(^|[\s\[{,:-])[&*!][\w!]", re.MULTILINE)


@with_config(ConfigDict(extra="forbid"))
class _Item(TypedDict):
    path: str
    hash: Literal["md5"]
    md5: Md5
    size: NotRequired[Any]
    nfiles: NotRequired[Any]
    isexec: NotRequired[Any]


@with_config(ConfigDict(extra="forbid"))
class _Entry(TypedDict):
    cmd: str
    deps: Annotated[list[_Item], Field(min_length=1)]
    params: NotRequired[dict[Any, Any]]
    outs: Annotated[list[_Item], Field(min_length=1)]


def _check_entry(path: str, text: str) -> CheckedEntry:
    """Parse an entry, whose name must be the hash of its content."""
    where = f"DVC entry {path[:24]}"
    match = _ENTRY_PATH.fullmatch(path)
    if not match:
        raise RegistryError(f"{where}: not the name of a run-cache entry; refused")
    # DVC writes no anchors and no tags; aliases of aliases can fill the memory.
    if len(text) > _LARGEST_ENTRY or _ANCHOR.search(text):
        raise RegistryError(f"{where}: too long, or YAML with anchors or tags; refused")
    try:
        tree = parse_yaml(text)
        entry = TypeAdapter(_Entry).validate_python(tree, strict=True)
        by_path = {**tree, "outs": [item["path"] for item in entry["outs"]]}
        hashes = _dvc_hash(by_path), _dvc_hash(tree)
    except ValidationError as error:
        raise RegistryError(f"{where}: not of DVC's form: {first_fault(error)}; refused") from None
    except (ValueError, TypeError):  # the latter: values that JSON has not
        raise RegistryError(f"{where}: not YAML as DVC writes it; refused") from None
    if (match[2], match[3]) != hashes:
        raise RegistryError(f"{where}: its contents do not hash to its name; refused")
    deps, outs = (
        {safe_path(item["path"], where): item["md5"] for item in entry[kind]}
        for kind in ("deps", "outs")
    )
    deps.pop(INITIAL_WEIGHTS.name, None)  # their hash is a parameter of the key
    return CheckedEntry(path, entry["cmd"], deps, entry.get("params", {}), outs)


def _dvc_hash(tree: Mapping[str, Any]) -> str:
    """DVC's own hash: sha256 of JSON with sorted keys, sizes left out at every depth."""
    return sha256_bytes(json.dumps(_without_sizes(tree), sort_keys=True).encode())


def _without_sizes(value: Any) -> Any:
    if isinstance(value, dict):
        return {n: _without_sizes(v) for n, v in value.items() if n not in ("size", "nfiles")}
    return [_without_sizes(v) for v in value] if isinstance(value, list) else value


class _Listed(TypedDict):
    relpath: str
    md5: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
