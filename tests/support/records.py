"""Recorded runs as training leaves them, made without training: real files, real hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from runkey.hashing import sha256_bytes
from runkey.identity.record import Details, LoggedRun, Record, StoredFile
from runkey.identity.record_cache import remove_record, update_record

FILES = {
    "model/weights.pt": b"weights",
    "model/key.json": b"{}",
    "logs/train.jsonl": b'{"step": 1}\n',
    "metrics/train.json": b'{"seconds": 1.0}\n',
    "run.json": b"{}",
}


def key_of(name: str) -> str:
    """A key of the right shape for any name."""
    return f"rk2-{hashlib.sha256(name.encode()).hexdigest()}"


def write_record(cache: Path, record: Record) -> None:
    """Put a record into a cache in place of what that has of the run."""
    remove_record(cache, record.run.run_id)
    update_record(cache, record.run, record.details)


def make_run(
    root: Path,
    key: str,
    run_id: str | None = None,
    *,
    status: Any = "FINISHED",
    files: dict[str, bytes] | None = None,
    with_details: bool = True,
    started_ms: int = 1_700_000_000_000,
    **changes: Any,
) -> Record:
    """A run of the local store in `root`: its artifacts and its record.

    Args:
        root: the checkout; artifacts go to mlartifacts/, the record to .runkey/runs.sqlite.
        key: its key.
        run_id: MLflow's; made from the key if None.
        status: MLflow's.
        files: contents by artifact path; `FILES` if None.
        with_details: False: as a run that ended early leaves it.
        started_ms: milliseconds since 1970.
        changes: further fields of `LoggedRun` (name, metrics, params, tags) or `Details`.
    """
    files = FILES if files is None else files
    run_id = run_id or hashlib.md5(key.encode()).hexdigest()
    folder = root / "mlartifacts" / run_id / "artifacts"
    stored = {}
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        stored[path] = StoredFile(sha256=sha256_bytes(content), size=len(content))
    parts = {f"key.{part}": sha256_bytes(f"{part}{key}".encode()) for part in _PARTS}
    logged: dict[str, Any] = {
        "run_id": run_id,
        "experiment_id": "1",
        "name": "baseline",
        "status": status,
        "started_ms": started_ms,
        "ended_ms": started_ms + 60_000 if status != "RUNNING" else None,
        "artifact_uri": folder.as_uri(),
        "params": {"lr": "0.0001", "seed": "0", "key": key, **parts},
        "metrics": {"eval/AP": 0.5, "train/loss": 1.25},
        "tags": {"key": key, "device": "cpu x86_64"},
    }
    details: dict[str, Any] = {
        "stage": "train",
        "files": stored,
        "outputs": sorted(stored),
        "witness": {
            "device": "cpu x86_64",
            "micro_batch": 8,
            "world_size": 1,
            "threads": 1,
            "precision": "off",
            "interpreter": "CPython 3.12.1 Linux x86_64",
            "package_differences": [],
            "undeclared_files": [],
            "commit": "0" * 40,
            "dirty": False,
        },
        "host": "here",
        "snapshot": None,
        "pointer_md5": None,
        "decision": "no run of this key: trained",
    }
    for name, value in changes.items():
        (logged if name in logged else details)[name] = value
    record = Record(run=LoggedRun(**logged), details=Details(**details) if with_details else None)
    write_record(root / ".runkey" / "runs.sqlite", record)
    return record


_PARTS = ("code", "params", "data", "environment")
