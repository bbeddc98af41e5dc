"""Write the records' files again from what MLflow has."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from runkey import paths
from runkey.errors import RegistryError
from runkey.identity.errors import RecipeError
from runkey.identity.record import Record, read_record, write_record


@dataclass
class Rebuilt:
    """Counts of records' files."""

    runs: int = 0
    """In MLflow."""
    written: int = 0
    """That were missing or held something else."""
    removed: int = 0
    """Whose run MLflow does not have any more, and files that are no records."""

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


def rebuild(home: Path, records: Iterable[Record]) -> Rebuilt:
    """Make the records' files what MLflow has; files that change meanwhile are left as they are.

    Args:
        home: `Store.home`.
        records: of all its runs; nothing is removed before the last one has come.

    Raises:
        RegistryError: the folder cannot be written.
    """
    folder = home / paths.RECORDS
    began = time.time_ns()
    counts = Rebuilt()
    kept = set()
    try:
        for record in records:
            counts.runs += 1
            kept.add(record.file_name)
            if not _is_newer(folder / record.file_name, began):
                counts.written += _write_if_other(folder, record)
        # A run that began after its page was read has a newer file, and is not in `kept`.
        for path in sorted(folder.glob("*.json")):
            if path.name not in kept and not _is_newer(path, began):
                path.unlink(missing_ok=True)
                counts.removed += 1
    except OSError as error:
        raise RegistryError(f"{error.filename or folder}: {error.strerror}") from None
    return counts


def _is_newer(path: Path, began_ns: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns >= began_ns
    return False


def _write_if_other(folder: Path, record: Record) -> bool:
    """Whether the file had to be written."""
    # RecipeError: torn, or of another schema.
    with contextlib.suppress(FileNotFoundError, RecipeError):
        if _text(read_record(folder / record.file_name)) == _text(record):
            return False
    write_record(folder, record)
    return True


def _text(record: Record) -> str:
    return json.dumps(record.as_dict(), sort_keys=True)  # NaN equals NaN as text
