"""Verify that recorded runs still are what they say they are; nothing is written.

Whatever is deleted or torn becomes a result that names it. A check that fails to run is a fault;
the other checks run anyway.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, Literal

from runkey.errors import RunkeyError
from runkey.files import parse_json
from runkey.hashing import hash_stream, sha256_file
from runkey.identity.dvc_yaml import DIR
from runkey.identity.key import PARTS, Recipe, older_rule
from runkey.identity.pinned_weights import FOLDER, pinned_of
from runkey.identity.record import DETAILS, KEY, KEY_JSON, ORIGIN, Details, Record, this_host
from runkey.paths import RUN_JSON
from runkey.progress import Steps, progress
from runkey.registry.dvc_cache import DvcCache, files_of, md5_file
from runkey.registry.library import Library, ReadRun, finished_runs
from runkey.registry.snapshot import REFS, changed_files, has_commit, has_git, has_snapshot
from runkey.registry.weights import is_here
from runkey.units import counted

State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check, or one thing that it found wrong."""

    check: str
    """files, key, mlflow, snapshot, dvc cache, environment or workspace."""
    state: State
    """A warning is worth knowing and no fault: the run is what it says it is."""
    text: str
    """Names the file and the run where something is wrong."""
    way_out: str = ""
    """A command, or what to do."""


def summarize(results: Iterable[CheckResult]) -> str:
    """Say how many faults and warnings there are."""
    states = [result.state for result in results]
    faults, warnings = states.count("fault"), states.count("warning")
    text = counted(faults or "no", "fault")
    return f"{text}, {counted(warnings, 'warning')}" if warnings else text


def first_few(names: list[str]) -> str:
    """Join the first three names, and say how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a run's parts are looked for."""

    library: Library
    stored: ReadRun | None
    """Reads MLflow's runs; None: its database is one that only MLflow reads."""
    root: Path
    """The main checkout, with git's and DVC's stores."""
    is_shared: bool
    """True if the store is a server, whose runs come from several machines."""
    quick: bool = False
    """Check presence and sizes only."""

    @cached_property
    def cache(self) -> DvcCache:
        """The checkout's DVC cache, searched once; RegistryError if its settings cannot be read."""
        return DvcCache(self.root)


@dataclass
class Report:
    """All results about one run."""

    record: Record
    sources: Sources
    findings: list[CheckResult] = field(default_factory=list)
    check: str = "files"
    """Name of the check that is made now."""
    recipe: Recipe | None = None
    """Set once key.json was read."""

    @property
    def details(self) -> Details:
        """The run's; there are some while checks are made."""
        assert self.record.details
        return self.record.details

    def of(self, state: State) -> list[CheckResult]:
        """Return the results of one state."""
        return [result for result in self.findings if result.state == state]

    @property
    def is_right(self) -> bool:
        """True if nothing is wrong."""
        return not self.of("fault")

    @property
    def summary(self) -> str:
        """Such as `2 faults, 1 warning`."""
        return summarize(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Format for JSON."""
        return {
            "right": self.is_right,
            "summary": self.summary,
            "label": self.record.label,
            "run_id": self.run_id,
            "name": self.record.run.name,
            "status": self.record.run.status,
            "findings": [asdict(result) for result in self.findings],
        }

    @property
    def run_id(self) -> str:
        """MLflow's."""
        return self.record.run.run_id

    @property
    def fetch(self) -> str:
        """Command that gets the run from the team."""
        return f"`runkey fetch {self.record.label}`"

    def add(self, state: State, text: str, way_out: str = "") -> str:
        """Add a result of the check that is made now; return "", with which a check can end."""
        self.findings.append(CheckResult(self.check, state, text, way_out))
        return ""

    def add_missing(self, text: str, way_out: str) -> str:
        """Add that a part is missing, which a run of another machine may keep there."""
        if self.sources.is_shared and self.details.host != this_host():
            return self.add("warning", f"{text} (it ran on {self.details.host})", way_out)
        return self.add("fault", text, way_out)

    def read(self, path: str) -> bytes:
        """Read an artifact of the run."""
        with self.sources.library.open_file(self.record, path) as file:
            return file.read()

    def why(self, path: str, error: Exception) -> str:
        """Say why a file cannot be used, beginning with its path."""
        text = str(error)
        if not isinstance(error, _UNREADABLE):
            text = f"not JSON as a run writes it (run {self.run_id})"
        for prefix in (f"{self.record.label}: ", f"{path}: ", "key.json: "):
            text = text.removeprefix(prefix)
        return f"{path}: {text}"


_UNREADABLE = (RunkeyError, OSError, HTTPException)


def verify_run(record: Record, sources: Sources) -> Report:
    """Make all checks of a run, in order; what a check raises is its result."""
    report = Report(record, sources)
    run = f"run {report.run_id}"
    if record.run.status != "FINISHED":
        report.add("warning", f"{run} is {record.run.status}; there is no result to verify")
    elif record.details is None:
        text = f"{DETAILS}: {run} has none, so its files are not known"
        report.add("fault", text, "`runkey index` reads it from MLflow again")
    else:
        for report.check, check in _CHECKS:
            before = len(report.findings)
            try:
                right = check(report)
                if right and len(report.findings) == before:
                    report.add("ok", right)
            except RunkeyError as error:
                report.add("fault", str(error))
            # Recorded values of another type than they should have; files that cannot be read.
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                report.add("fault", f"{run} cannot be checked: {type(error).__name__}: {error}")
    return report


def find_unrecorded(uri: str, run_ids: set[str]) -> list[CheckResult]:
    """Find finished runs of this machine's MLflow store whose ids are not among the recorded."""
    try:
        missing = sorted(finished_runs(uri) - run_ids)
    except RunkeyError as error:
        return [CheckResult("mlflow", "fault", str(error), "start it, or set MLFLOW_TRACKING_URI")]
    if not missing:
        return []
    text = f"{counted(len(missing), 'finished run')} of MLflow without a record here"
    text = f"{text}: {first_few(missing)}"
    return [CheckResult("record", "fault", text, "`runkey index` writes them")]


# The checks. Each adds what is wrong; it returns what to say if nothing is, if anything.


def _check_record_file(report: Report) -> None:
    """Compare record.json, which is not among its own files, with this store's copy of it."""
    try:
        if report.read(DETAILS) != report.details.as_json().encode():
            text = f"{DETAILS}: differs from this store's record (run {report.run_id})"
            report.add("fault", text, "`runkey index` shows which of them can be read")
    except _UNREADABLE as error:
        way_out = "this store's record is whole; `runkey export` it"
        report.add("fault", report.why(DETAILS, error), way_out)


def _check_files(report: Report) -> str:
    files = report.details.files
    size = sum(file.size for file in files.values())
    with progress("verify", size, "bytes") as steps:
        answers = {path: _why_wrong(report, path, steps) for path in files}
    wrong = {path: why for path, why in answers.items() if why}
    way_out = f"{report.fetch}, if it was published"
    if len(wrong) == len(files) > 1:
        text = (
            f"none of its {counted(len(files), 'file')} can be read: {next(iter(wrong.values()))}"
        )
        return report.add("fault", text, way_out)
    for path, why in wrong.items():
        place = _copy_in_cache(report, path)
        report.add("fault", why, f"DVC's cache has it: cp {place} over it" if place else way_out)
    how = "sizes" if report.sources.quick else "sizes and sha256"
    return f"{counted(len(files), 'file')}, {size / 1e6:.1f} MB: {how} as recorded"


def _check_initial_weights(report: Report) -> str:
    """Name the weights that it began with; of published ones, look at the download."""
    began = report.record.started_from
    if began is None:
        return ""
    row = pinned_of(began.weights)
    path = report.sources.root / FOLDER / row.file if row else None
    if row is None or path is None or not path.exists():
        return began.about if row is None else f"{began.about}; not in {FOLDER}/"
    if not report.sources.quick and not is_here(row, report.sources.root):
        text = f"{FOLDER / row.file}: other bytes than {began.about}"
        return report.add("warning", text, f"`runkey weights {row.name}` downloads it again")
    return f"{began.about}; in {FOLDER}/"


def _copy_in_cache(report: Report, path: str) -> Path | None:
    """The object in DVC's cache that holds an artifact as recorded, if there is one."""
    cache = report.sources.cache
    entry = cache.entry_of(report.details.pointer_md5 or "")
    md5 = files_of(entry.outs, cache.listing).get(path) if entry else None
    place = cache.object_path(md5) if md5 else None
    whole = place and place.is_file() and sha256_file(place) == report.details.files[path].sha256
    return place if whole else None


def _why_wrong(report: Report, path: str, steps: Steps) -> str:
    """Say what is wrong with a file; empty if nothing."""
    recorded = report.details.files[path]
    try:
        with report.sources.library.open_file(report.record, path) as file:
            if report.sources.quick:
                size, digest = _size(file), recorded.sha256
            else:
                size, digest = hash_stream(file, advance=steps.advance)
    except _UNREADABLE as error:
        return report.why(path, error)
    if size != recorded.size:
        return f"{path}: {size} bytes, recorded {recorded.size} (run {report.run_id})"
    if digest != recorded.sha256:
        now, then = digest[:12], recorded.sha256[:12]
        return f"{path}: sha256 {now}, recorded {then} (run {report.run_id})"
    return ""


def _size(file: BinaryIO) -> int:
    """Bytes of a file; a server's file is read only if the server did not state its length."""
    length = file.seek(0, os.SEEK_END) if file.seekable() else getattr(file, "length", None)
    return hash_stream(file)[0] if length is None else int(length)


def _check_key(report: Report) -> str:
    """Check that key.json hashes to the key, and run.json names the same."""
    way_out = f"`runkey get {report.record.label}` says which file is damaged"
    fault, name = partial(report.add, "fault", way_out=way_out), KEY_JSON
    try:
        report.recipe = stated = Recipe.from_dict(parse_json(report.read(name)))
        if stated.key != report.record.key:
            return fault(f"{name}: is of key {stated.key}, the run of {report.record.key}")
        name = RUN_JSON.as_posix()
        manifest: dict[str, Any] = parse_json(report.read(name))
        key, parts, run_id = (manifest.get(field) for field in ("key", "parts", "run_id"))
    except (*_UNREADABLE, ValueError, AttributeError) as error:  # the latter two: other JSON
        return fault(report.why(name, error))
    if key != stated.key:
        fault(f"{name}: is of key {key}, the run of {stated.key}")
    if parts != stated.parts:
        named = parts if isinstance(parts, dict) else {}
        differing = [part for part in PARTS if named.get(part) != stated.parts[part]]
        fault(f"{name}: states other hashes of {', '.join(differing)} than {KEY_JSON}")
    if run_id is not None and run_id not in {report.run_id, report.record.run.tags.get(ORIGIN)}:
        fault(f"{name}: names MLflow run {run_id}, this one is {report.run_id}")
    older = f"; {rule}" if (rule := older_rule(stated.key)) else ""
    return f"{KEY_JSON} hashes to the key, {RUN_JSON} names it{older}"


def _check_mlflow(report: Report) -> str:
    """Compare what MLflow has of the run now with the record and the key."""
    if report.sources.stored is None:
        return report.add("warning", "its database is read through a server only; skipped")
    now = report.sources.stored(report.run_id)
    if now is None:
        text = f"run {report.run_id} is not in MLflow, or was deleted there"
        return report.add("fault", text, f"restore it on MLflow's pages, or {report.fetch}")

    def fault(text: str) -> None:
        way_out = "`runkey index` takes over what MLflow has, if that is right"
        report.add("fault", f"run {report.run_id}: {text}", way_out)

    key, recorded = report.record.key, report.record.run
    for place, value in (("param", now.params.get(KEY)), ("tag", now.tags.get(KEY))):
        if value != key:
            fault(f"{place} {KEY} is {value or 'missing'}, the run's key {key}")
    for part in PARTS:
        value = now.params.get(f"{KEY}.{part}")
        if not value or (report.recipe and value != report.recipe.parts[part]):
            fault(f"param {KEY}.{part} is {value or 'missing'}, not that of the key")
    evaluated = {name for metrics in report.details.evaluations.values() for name in metrics}
    if missing := sorted(evaluated - now.metrics.keys()):
        fault(f"metrics of its evaluation are missing: {first_few(missing)}")
    if now.status != recorded.status:
        fault(f"status {now.status}, recorded {recorded.status}")
    for kind in ("param", "metric"):  # tags may be edited
        values, before = getattr(now, f"{kind}s"), getattr(recorded, f"{kind}s")
        for name in sorted(values.keys() | before.keys()):
            value, was = values.get(name, "missing"), before.get(name, "missing")
            if value != was and repr(value) != repr(was):  # NaN is not equal to itself
                fault(f"{kind} {name} is {value}, recorded {was}")
    counts = f"{counted(len(now.params), 'param')}, {counted(len(now.metrics), 'metric')}"
    return f"{counts}, the key and its parts"


def _check_snapshot(report: Report) -> str:
    """Check that the commit is there, kept by a ref, and of the code that the key names."""
    root, oid = report.sources.root, report.details.snapshot
    if oid is None or not has_git(root):
        where = "it ran outside git" if oid is None else f"{root} is no git repository"
        return report.add("warning", f"none: {where}")
    commit = f"commit {oid[:12]}"
    if not has_commit(root, oid):
        return report.add_missing(f"{commit} is not in git here", report.fetch)
    if not has_snapshot(root, oid):
        ref = f"{REFS}/{report.record.key}/{oid[:12]}"
        text = f"{ref} is missing: git's gc may delete {commit}"
        return report.add("fault", text, f"`git update-ref {ref} {oid}`")
    if report.recipe is None or report.sources.quick:
        return commit
    code = report.recipe.preimages["code"]
    for path, why in changed_files(root, oid, code).items():
        report.add("fault", f"{commit}: {path} {why}", report.fetch)
    return f"{commit}, hashes as in the key: {counted(len(code['files']), 'file')} of code"


def _check_dvc_cache(report: Report) -> str:
    """Check the run-cache entry, and each object of its outputs."""
    if report.record.reproduction_of:
        # `runkey reproduce` keeps its run out of DVC's cache, where the newest entry wins.
        return "none: a repeat is kept in MLflow only"
    if report.details.pointer_md5 is None:
        return "none: not run by DVC"
    way_out = f"{report.fetch}, or `dvc repro`, which takes the run's files"
    cache, quick = report.sources.cache, report.sources.quick
    entry = cache.entry_of(report.details.pointer_md5)
    if entry is None:
        text = f"no entry in {cache.runs} gave this run.json ({report.details.pointer_md5})"
        return report.add_missing(text, way_out)
    files = files_of(entry.outs, cache.listing)
    for name, md5 in files.items():
        place, why = cache.object_path(md5), ""
        if not place.is_file():
            why = "is not there"
        elif not quick and (now := md5_file(place)) != md5.removesuffix(DIR):
            why = f"is damaged (md5 {now})"
        if why:
            report.add("fault", f"{name}: {place} {why} (entry {entry.path})", way_out)
    return f"{counted(len(files), 'object')} {'there' if quick else 'with the right md5'}"


def _check_locked(report: Report) -> str:
    """Check that the key names locked packages."""
    if report.recipe is None:
        return ""
    locked = report.recipe.preimages["environment"]
    if not locked.get("packages"):
        return report.add("fault", "key.json: its environment names no packages")
    return f"{counted(len(locked['packages']), 'locked package')} for {locked.get('platform')}"


def _check_witness(report: Report) -> None:
    """Warn where the run had other packages than locked, or code beside the key."""
    witness = report.details.witness
    if differing := witness["package_differences"]:
        text = f"not as locked: {counted(len(differing), 'package')}: {first_few(differing)}"
        report.add("warning", text)
    for path in witness["undeclared_files"]:
        report.add("warning", f"{path} was imported, and is no part of the key")


_CHECKS: tuple[tuple[str, Callable[[Report], str | None]], ...] = (
    ("files", _check_record_file),
    ("files", _check_files),
    ("weights", _check_initial_weights),
    ("key", _check_key),
    ("mlflow", _check_mlflow),
    ("snapshot", _check_snapshot),
    ("dvc cache", _check_dvc_cache),
    ("environment", _check_locked),
    ("environment", _check_witness),
)
