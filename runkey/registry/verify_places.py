"""Parts of `runkey verify`: MLflow's record of a run, its code snapshot, its environment."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from runkey.errors import RegistryError
from runkey.hashing import sha256_file
from runkey.identity.key import PARTS, Recipe
from runkey.identity.record import KEY, Details, LoggedRun, Record
from runkey.registry.diff_files import changed_files
from runkey.registry.dvc_cache import DIR, DvcCache, Entry, md5_file
from runkey.registry.local_library import run_from_json
from runkey.registry.rest import RestClient, RestError
from runkey.registry.snapshot import REFS, git, has_git, has_snapshot

# What `runkey verify` finds: one finding a check, or one a thing that is wrong.


State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """files, key, mlflow, snapshot, dvc cache or environment."""
    state: State
    """A warning is worth knowing and no fault: the run is what it says it is."""
    text: str
    """Names the file and the run where something is wrong."""
    way_out: str = ""
    """A command, or what to do."""


@dataclass(frozen=True)
class Report:
    """All findings about one run."""

    label: str
    """The short key."""
    run_id: str
    """MLflow's."""
    name: str
    status: str
    """MLflow's; only a FINISHED run has anything to verify."""
    findings: tuple[Finding, ...]

    def of(self, state: State) -> list[Finding]:
        """The findings of one state."""
        return [finding for finding in self.findings if finding.state == state]

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return not self.of("fault")

    @property
    def summary(self) -> str:
        """Such as `2 faults, 1 warning`."""
        return counted(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"right": self.is_right, "summary": self.summary, **asdict(self)}


def counted(findings: Iterable[Finding]) -> str:
    """How many faults and warnings there are, in words."""
    states = [finding.state for finding in findings]
    faults, warnings = states.count("fault"), states.count("warning")
    told = f"{faults or 'no'} fault{'' if faults == 1 else 's'}"
    return f"{told}, {warnings} warning{'' if warnings == 1 else 's'}" if warnings else told


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    listed = list(names)
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")


# One run as MLflow has it now, read without MLflow: from its sqlite file, or over REST.


ReadRun = Callable[[str], LoggedRun | None]
"""Gives a run by its MLflow id; None where there is none, or it was deleted.  RegistryError: the
store cannot be read."""

_SQLITE = "sqlite:///"
_BUSY_SECONDS = 20.0


def run_reader(uri: str) -> ReadRun | None:
    """What reads runs of a store; None for a database that only MLflow itself can read.

    Args:
        uri: `Store.uri`.
    """
    if uri.startswith(_SQLITE):
        database = Path(uri.removeprefix(_SQLITE))
        return lambda run_id: _from_sqlite(database, run_id)
    if uri.startswith(("http://", "https://")):
        client = RestClient(uri)
        return lambda run_id: _from_server(client, run_id)
    return None


def finished_runs(uri: str) -> set[str]:
    """MLflow ids of all finished runs that have a key, of a sqlite store; of another none.

    Raises:
        RegistryError: the store cannot be read.
    """
    if not uri.startswith(_SQLITE):
        return set()
    query = (
        "SELECT run_uuid FROM runs JOIN tags USING (run_uuid) WHERE tags.key = ?"
        " AND status = 'FINISHED' AND lifecycle_stage = 'active'"
    )
    with _opened(Path(uri.removeprefix(_SQLITE))) as database:
        return {run_id for (run_id,) in database.execute(query, (KEY,))}


def count_runs(uri: str) -> int | None:
    """How many active runs have a key; None: it is no sqlite store, and only MLflow could say.

    Raises:
        RegistryError: the store cannot be read.
    """
    if not uri.startswith(_SQLITE):
        return None
    query = (
        "SELECT count(*) FROM runs JOIN tags USING (run_uuid) WHERE tags.key = ?"
        " AND lifecycle_stage = 'active'"
    )
    with _opened(Path(uri.removeprefix(_SQLITE))) as database:
        return int(database.execute(query, (KEY,)).fetchone()[0])


def _from_sqlite(path: Path, run_id: str) -> LoggedRun | None:
    with _opened(path) as database:
        answer = _ask(database, run_id)
        return run_from_json(answer) if answer else None


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, to be read; it is not made if it is not there."""
    if not path.is_file():
        raise RegistryError(f"{path}: MLflow's database is not there")
    address = f"{path.resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS)) as database:
            yield database
    # The latter three: what stands in a table cannot be MLflow's.
    except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"{path}: MLflow's database cannot be read ({error})") from None


def _ask(database: sqlite3.Connection, run_id: str) -> dict[str, Any] | None:
    """The run as the REST interface would give it."""
    names = ("run_id", "experiment_id", "run_name", "status", "start_time", "end_time")
    row = database.execute(
        "SELECT run_uuid, experiment_id, name, status, start_time, end_time, artifact_uri"
        " FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active'",
        (run_id,),
    ).fetchone()
    if row is None:
        return None

    def pairs(table: str) -> list[dict[str, Any]]:
        query = f"SELECT key, value FROM {table} WHERE run_uuid = ?"
        return [{"key": key, "value": value} for key, value in database.execute(query, (run_id,))]

    metrics = database.execute(
        "SELECT key, value, is_nan FROM latest_metrics WHERE run_uuid = ?", (run_id,)
    )
    values = [{"key": key, "value": math.nan if nan else v} for key, v, nan in metrics]
    return {
        "info": dict(zip((*names, "artifact_uri"), row, strict=True)),
        "data": {"params": pairs("params"), "tags": pairs("tags"), "metrics": values},
    }


def _from_server(client: RestClient, run_id: str) -> LoggedRun | None:
    try:
        answer = client.get("runs/get", {"run_id": run_id})["run"]
    except RestError as error:
        if error.code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if answer["info"].get("lifecycle_stage") == "deleted":
        return None
    return run_from_json(answer)


# Part of `runkey verify`: the result as DVC's cache has it.


class CacheCheck:
    """Looks runs up in one checkout's cache."""

    def __init__(self, root: Path, pointers: Iterable[str]) -> None:
        """Nothing is read yet.

        Args:
            root: the main checkout.
            pointers: md5s of the run.json of all runs that will be asked for: 10,000 entries are
                searched for them once, not once each.
        """
        self._root = root
        self._pointers = frozenset(pointers)

    @cached_property
    def cache(self) -> DvcCache:
        """The cache; RegistryError if DVC's settings cannot be read."""
        return DvcCache(self._root)

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return self.cache.entries_of(self._pointers)

    def check(
        self, record: Record, details: Details, *, away: bool, quick: bool
    ) -> Iterator[Finding]:
        """The run-cache entry, and each object of its outputs.

        Args:
            record: the run.
            details: its own.
            away: another machine ran it, so that its entry need not be here.
            quick: do not hash the objects.
        """
        if details.pointer_md5 is None or record.reproduction_of:
            # `runkey reproduce` keeps its run out of DVC's cache, where the newest entry wins.
            why = "a repeat is kept in MLflow only" if record.reproduction_of else "not run by DVC"
            yield Finding("dvc cache", "ok", f"none: {why}")
            return
        entry = self._entries.get(details.pointer_md5)
        fetch = f"`runkey fetch {record.label}`, or `dvc repro`, which takes the run's files"
        if entry is None:
            state: State = "warning" if away else "fault"
            where = f" (it ran on {details.host})" if away else ""
            text = f"no entry in {self.cache.runs} gave this run.json ({details.pointer_md5})"
            yield Finding("dvc cache", state, f"{text}{where}", fetch)
            return
        files = self.cache.files(entry.outs)
        wrong = {name: why for name, md5 in files.items() if (why := self._wrong(md5, quick))}
        for name, why in wrong.items():
            yield Finding("dvc cache", "fault", f"{name}: {why} (entry {entry.path})", fetch)
        if not wrong:
            how = "are there" if quick else "hash to their md5"
            yield Finding("dvc cache", "ok", f"its {len(files)} objects {how}")

    def copy_of(self, details: Details, path: str) -> Path | None:
        """The object that holds an artifact as it was recorded, if the cache has it whole."""
        entry = self._entries.get(details.pointer_md5 or "")
        md5 = self.cache.files(entry.outs).get(path) if entry else None
        place = self.cache.object_path(md5) if md5 else None
        if place and place.is_file() and sha256_file(place) == details.files[path].sha256:
            return place
        return None

    def _wrong(self, md5: str, quick: bool) -> str:
        """What is wrong with an object, in words; empty if nothing."""
        place = self.cache.object_path(md5)
        if not place.is_file():
            return f"{place} is not there"
        if not quick and (now := md5_file(place)) != md5.removesuffix(DIR):
            return f"{place} is damaged (md5 {now})"
        return ""


def check_mlflow(
    record: Record, recipe: Recipe | None, stored: ReadRun | None
) -> Iterator[Finding]:
    """What MLflow has of the run now, beside the record and the key.

    Args:
        record: the run.
        recipe: its key's, from key.json; None: that was unreadable.
        stored: reads MLflow's runs.
    """
    run_id = record.run.run_id
    if stored is None:
        yield Finding("mlflow", "warning", "its database is read through a server only; skipped")
        return
    run = stored(run_id)
    if run is None:
        text = f"run {run_id} is not in MLflow, or was deleted there"
        way_out = f"restore it on MLflow's pages, or `runkey fetch {record.label}`"
        yield Finding("mlflow", "fault", text, way_out)
        return
    wrong = [*_incomplete(run, record, recipe), *_changed(run, record.run)]
    way_out = "`runkey index` takes over what MLflow has, if that is right"
    yield from (Finding("mlflow", "fault", f"run {run_id}: {text}", way_out) for text in wrong)
    if not wrong:
        text = f"{len(run.params)} params, {len(run.metrics)} metrics, the key and its parts"
        yield Finding("mlflow", "ok", text)


def _incomplete(run: LoggedRun, record: Record, recipe: Recipe | None) -> Iterator[str]:
    """What every finished run has."""
    for place, value in (("param", run.params.get(KEY)), ("tag", run.tags.get(KEY))):
        if value != record.key:
            yield f"{place} {KEY} is {value or 'missing'}, the run's key {record.key}"
    for part in PARTS:
        value = run.params.get(f"{KEY}.{part}")
        if not value or (recipe and value != recipe.parts[part]):
            yield f"param {KEY}.{part} is {value or 'missing'}, not that of the key"
    evaluated = {
        n: v
        for e in (record.details.evaluations if record.details else {}).values()
        for n, v in e.items()
    }
    missing = sorted(evaluated.keys() - run.metrics.keys())
    if missing:
        yield f"metrics of its evaluation are missing: {some(missing)}"


def _changed(now: LoggedRun, recorded: LoggedRun) -> Iterator[str]:
    """Where MLflow's run is not the recorded one any more.  Tags are free to be edited."""
    if now.status != recorded.status:
        yield f"status {now.status}, recorded {recorded.status}"
    for kind, here, there in (
        ("param", now.params, recorded.params),
        ("metric", now.metrics, recorded.metrics),
    ):
        yield from _other_values(kind, here, there)


def _other_values(
    kind: str, now: Mapping[str, str | float], recorded: Mapping[str, str | float]
) -> Iterator[str]:
    for name in sorted(now.keys() | recorded.keys()):
        value, was = now.get(name, "missing"), recorded.get(name, "missing")
        if value != was and not (_is_nan(value) and _is_nan(was)):
            yield f"{kind} {name} is {value}, recorded {was}"


def _is_nan(value: str | float) -> bool:
    return isinstance(value, float) and math.isnan(value)


def check_snapshot(
    record: Record, details: Details, recipe: Recipe | None, root: Path, *, away: bool
) -> Iterator[Finding]:
    """The commit of the tree that ran: there, kept, and of the code that the key names.

    Args:
        record: the run.
        details: its own.
        recipe: its key's; None: its files are not hashed.
        root: the main checkout.
        away: another machine ran it, so that its snapshot need not be here.
    """
    oid = details.snapshot
    if oid is None or not has_git(root):
        where = "it ran outside git" if oid is None else f"{root} is no git repository"
        yield Finding("snapshot", "warning", f"none: {where}")
        return
    fetch = f"`runkey fetch {record.label}`"
    try:
        git(root, "cat-file", "-e", f"{oid}^{{tree}}")
    except RegistryError:
        state: State = "warning" if away else "fault"
        where = f" (it ran on {details.host})" if away else ""
        yield Finding("snapshot", state, f"commit {oid[:12]} is not in git here{where}", fetch)
        return
    if not has_snapshot(root, oid):
        ref = f"{REFS}/{record.key}/{oid[:12]}"
        text = f"{ref} is missing: git's gc may delete commit {oid[:12]}"
        yield Finding("snapshot", "fault", text, f"`git update-ref {ref} {oid}`")
        return
    wrong = changed_files(root, oid, recipe.preimages["code"]) if recipe else {}
    for path, why in wrong.items():
        yield Finding("snapshot", "fault", f"commit {oid[:12]}: {path} {why}", fetch)
    if not wrong:
        count = len(recipe.preimages["code"]["files"]) if recipe else 0
        told = f", its {count} files of code hash as in the key" if recipe else ""
        yield Finding("snapshot", "ok", f"commit {oid[:12]}{told}")


def check_environment(details: Details, recipe: Recipe | None) -> Iterator[Finding]:
    """The locked packages are stated; what was otherwise when it ran is a warning."""
    if recipe is not None:
        locked = recipe.preimages["environment"]
        if locked.get("packages"):
            text = f"{len(locked['packages'])} locked packages for {locked.get('platform')}"
            yield Finding("environment", "ok", text)
        else:
            yield Finding("environment", "fault", "key.json: its environment names no packages")
    witness = details.witness
    differing = witness["package_differences"]
    if differing:
        text = f"{len(differing)} packages were not as locked: {some(differing)}"
        yield Finding("environment", "warning", text)
    for path in witness["undeclared_files"]:
        text = f"{path} was imported, and is no part of the key"
        yield Finding("environment", "warning", text)
