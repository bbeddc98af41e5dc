"""Whether recorded runs still are what they say they are.

    report = verify_run(record, sources)      # every file hashed, MLflow, snapshot, DVC's cache ...
    report.is_right

Nothing is written.  Whatever is deleted or torn becomes a finding that names it; a check that
cannot be made is a fault of its own, and the others are made all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

from runkey.errors import RegistryError, RunkeyError
from runkey.identity.key import PARTS, Recipe, older_rule
from runkey.identity.record import DETAILS, KEY_JSON, Details, Record, StoredFile
from runkey.identity.run_folder import ORIGIN
from runkey.paths import RUN_JSON
from runkey.progress import QUIET, Steps, progress
from runkey.registry.checks.findings import Finding, Report, some
from runkey.registry.checks.mlflow_run import ReadRun, finished_runs
from runkey.registry.checks.verify_cache import CacheCheck
from runkey.registry.checks.verify_places import check_environment, check_mlflow, check_snapshot
from runkey.registry.library import Library

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a run's parts are looked for."""

    library: Library
    stored: ReadRun | None
    """Reads runs of MLflow; None: its database is one that only MLflow reads."""
    root: Path
    """The main checkout, with git's and DVC's stores."""
    cache: CacheCheck
    host: str
    """This machine's name: what another machine keeps need not be here."""
    is_shared: bool
    """Whether the store is a server, whose runs come from several machines."""
    quick: bool = False
    """Presence and sizes only."""


@dataclass
class _Run:
    """A run while it is verified."""

    record: Record
    details: Details
    sources: Sources
    recipe: Recipe | None = field(default=None)
    """Set once key.json was read."""


def verify_run(record: Record, sources: Sources) -> Report:
    """All findings about a run.

    Args:
        record: the run, with its details.
        sources: where to look.
    """
    if record.run.status != "FINISHED":
        text = f"run {record.run.run_id} is {record.run.status}; there is no result to verify"
        findings = [Finding("files", "warning", text)]
    elif record.details is None:
        text = f"{DETAILS}: run {record.run.run_id} has none, so its files are not known"
        findings = [Finding("files", "fault", text, "`runkey index` reads it from MLflow again")]
    else:
        findings = list(_findings(_Run(record, record.details, sources)))
    run = record.run
    return Report(record.label, run.run_id, run.name, run.status, tuple(findings))


def unrecorded(uri: str, run_ids: set[str]) -> list[Finding]:
    """Finished runs of a store on this machine that MLflow has and the records do not.

    Args:
        uri: `Store.uri`.
        run_ids: MLflow ids of the runs that have a record.
    """
    try:
        missing = sorted(finished_runs(uri) - run_ids)
    except RunkeyError as error:
        return [Finding("mlflow", "fault", str(error), "start it, or set MLFLOW_TRACKING_URI")]
    text = f"{len(missing)} finished runs of MLflow have no record here: {some(missing)}"
    return [Finding("record", "fault", text, "`runkey index` writes them")] if missing else []


def _findings(run: _Run) -> Iterator[Finding]:
    """The checks in order; what one of them raises is its finding."""
    for name, check in _CHECKS.items():
        try:
            yield from check(run)
        except RunkeyError as error:
            yield Finding(name, "fault", str(error))
        # Recorded values of another type than they should have; files that cannot be read.
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            text = f"cannot be checked: {type(error).__name__}: {error}"
            yield Finding(name, "fault", f"run {run.record.run.run_id} {text}")


def _check_files(run: _Run) -> Iterator[Finding]:
    """Every recorded file, and the record of them itself."""
    files = run.details.files
    with progress("verify", sum(file.size for file in files.values()), "bytes") as steps:
        told = {path: _wrong(run, path, file, steps) for path, file in files.items()}
    wrong = {path: why for path, why in told.items() if why}
    yield from _check_record_file(run)
    if len(wrong) == len(files) > 1:
        text = f"none of its {len(files)} files can be read: {next(iter(wrong.values()))}"
        yield Finding("files", "fault", text, _fetch(run))
        return
    for path, why in wrong.items():
        place = run.sources.cache.copy_of(run.details, path)
        way_out = f"DVC's cache has it: cp {place} over it" if place else _fetch(run)
        yield Finding("files", "fault", f"{path}: {why}", way_out)
    if not wrong:
        megabytes = sum(file.size for file in files.values()) / 1e6
        how = "sizes" if run.sources.quick else "sizes and sha256"
        text = f"{len(files)} files, {megabytes:.1f} MB: {how} as recorded"
        yield Finding("files", "ok", text)


def _fetch(run: _Run) -> str:
    return f"`runkey fetch {run.record.label}`, if it was published"


def _wrong(run: _Run, path: str, recorded: StoredFile, steps: Steps) -> str:
    """What is wrong with a file, in words; empty if nothing."""
    where = f"(run {run.record.run.run_id})"
    try:
        with run.sources.library.open_file(run.record, path) as file:
            if run.sources.quick:
                size, digest = _size(file), recorded.sha256
            else:
                size, digest = _hash(file, steps)
    except (RunkeyError, OSError, HTTPException) as error:
        return str(error).removeprefix(f"{run.record.label}: ").removeprefix(f"{path}: ")
    if size != recorded.size:
        return f"{size} bytes, recorded {recorded.size} {where}"
    if digest != recorded.sha256:
        return f"sha256 {digest[:12]}, recorded {recorded.sha256[:12]} {where}"
    return ""


def _hash(file: BinaryIO, steps: Steps = QUIET) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        steps.advance(len(chunk))
    return size, digest.hexdigest()


def _size(file: BinaryIO) -> int:
    """Bytes of a file; a server's is read only if the server did not say."""
    if file.seekable():
        return file.seek(0, os.SEEK_END)
    length = getattr(file, "length", None)
    return _hash(file)[0] if length is None else int(length)


def _check_record_file(run: _Run) -> Iterator[Finding]:
    """record.json is not among its own files: it is compared with this store's copy of it."""
    try:
        stored = _read(run, DETAILS)
    except RunkeyError as error:
        text = str(error).removeprefix(f"{run.record.label}: ")
        yield Finding("files", "fault", text, "this store's record is whole; `runkey export` it")
        return
    if stored != run.details.as_json().encode():
        text = f"{DETAILS}: differs from this store's record (run {run.record.run.run_id})"
        yield Finding("files", "fault", text, "`runkey index` shows which of them can be read")


def _check_key(run: _Run) -> Iterator[Finding]:
    """key.json hashes to the key, and run.json names the same."""
    way_out = f"`runkey get {run.record.label}` says which file is damaged"
    try:
        run.recipe = Recipe.from_dict(json.loads(_read(run, KEY_JSON)))
        stated = run.recipe
    except (RunkeyError, ValueError, AttributeError) as error:
        yield Finding("key", "fault", f"{KEY_JSON}: {_plain(run, KEY_JSON, error)}", way_out)
        return
    if stated.key != run.record.key:
        text = f"{KEY_JSON}: is of key {stated.key}, the run of {run.record.key}"
        yield Finding("key", "fault", text, way_out)
        return
    wrong = list(_wrong_in_run_json(run, stated))
    yield from (Finding("key", "fault", f"{RUN_JSON}: {text}", way_out) for text in wrong)
    if not wrong:
        older = f"; {rule}" if (rule := older_rule(stated.key)) else ""
        yield Finding("key", "ok", f"{KEY_JSON} hashes to the key, {RUN_JSON} names it{older}")


def _wrong_in_run_json(run: _Run, stated: Recipe) -> Iterator[str]:
    try:
        manifest: dict[str, Any] = json.loads(_read(run, RUN_JSON.as_posix()))
        key, parts, run_id = (manifest.get(name) for name in ("key", "parts", "run_id"))
    except (RunkeyError, ValueError, AttributeError) as error:
        yield _plain(run, RUN_JSON.as_posix(), error)
        return
    if key != stated.key:
        yield f"is of key {key}, the run of {stated.key}"
    if parts != stated.parts:
        named = parts if isinstance(parts, dict) else {}
        differing = [part for part in PARTS if named.get(part) != stated.parts[part]]
        yield f"states other hashes of {', '.join(differing)} than {KEY_JSON}"
    own = {run.record.run.run_id, run.record.run.tags.get(ORIGIN)}
    if run_id is not None and run_id not in own:
        yield f"names MLflow run {run_id}, this one is {run.record.run.run_id}"


def _plain(run: _Run, path: str, error: Exception) -> str:
    """What is wrong, without what the finding says anyway."""
    if isinstance(error, RunkeyError):
        text = str(error)
        for known in (f"{run.record.label}: ", f"{path}: ", "key.json: "):
            text = text.removeprefix(known)
        return text
    return f"not JSON as a run writes it (run {run.record.run.run_id})"


def _read(run: _Run, path: str) -> bytes:
    try:
        with run.sources.library.open_file(run.record, path) as file:
            return file.read()
    except (OSError, HTTPException) as error:
        raise RegistryError(f"{path}: cannot be read ({error})") from None


def _mlflow(run: _Run) -> Iterator[Finding]:
    return check_mlflow(run.record, run.recipe, run.sources.stored)


def _snapshot(run: _Run) -> Iterator[Finding]:
    sources = run.sources
    away = sources.is_shared and run.details.host != sources.host
    recipe = None if sources.quick else run.recipe
    return check_snapshot(run.record, run.details, recipe, sources.root, away=away)


def _dvc_cache(run: _Run) -> Iterator[Finding]:
    sources = run.sources
    away = sources.is_shared and run.details.host != sources.host
    return sources.cache.check(run.record, run.details, away=away, quick=sources.quick)


def _environment(run: _Run) -> Iterator[Finding]:
    return check_environment(run.details, run.recipe)


_CHECKS: dict[str, Callable[[_Run], Iterator[Finding]]] = {
    "files": _check_files,
    "key": _check_key,
    "mlflow": _mlflow,
    "snapshot": _snapshot,
    "dvc cache": _dvc_cache,
    "environment": _environment,
}
