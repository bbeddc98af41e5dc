"""`runkey watch [KEY]`: follow a running training from another terminal."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from runkey import paths
from runkey.cli.output import answer_no
from runkey.cli.place import library, store, workspace
from runkey.errors import RegistryError, RunkeyError
from runkey.identity.key import ANY_SCHEMA, SCHEMA, short_key

_LOG = paths.LOGS / "train.jsonl"
_FOLDER = re.compile(rf"({ANY_SCHEMA}-[0-9a-f]{{64}})(-repeats-[0-9a-f]{{8}})?")
_PREFIX = re.compile(rf"(?:({ANY_SCHEMA})-)?([0-9a-f]{{4,64}})")


def watch(
    key: Annotated[
        str | None, typer.Argument(help="Beginning of a key [the newest training here].")
    ] = None,
) -> None:
    """Follow a training: loss, AP, learning rate, gradient norm, speed, hints.

    It ends with the training.
    """
    from runkey.plots.watch.follow import follow

    with _found(key) as found:
        alive = partial(_is_trained, found.log.parent)
        if not follow(found.log, found.title, found.params, alive, print):
            print("interrupted; `dvc repro` goes on from its last checkpoint")
            answer_no()


@dataclass(frozen=True)
class _Training:
    log: Path
    title: str
    params: Mapping[str, str]


@contextmanager
def _found(key: str | None) -> Iterator[_Training]:
    """The training that is meant; the log of one that has ended is fetched."""
    home = store().home
    match = _PREFIX.fullmatch((key or "").strip().lower())
    if key and not match:
        raise RunkeyError(f"{key}: not a key; a key is {SCHEMA}- and hex digits, at least 4")
    schema, digits = match.groups() if match else (None, "")
    logs = [
        log
        for log in home.glob(f"{schema or ANY_SCHEMA}-{digits}*/{_LOG.name}")
        if _FOLDER.fullmatch(log.parent.name)
    ]
    if logs:
        yield _here(max(logs, key=lambda log: (_is_trained(log.parent), log.stat().st_mtime)))
    elif key:
        with tempfile.TemporaryDirectory(prefix="runkey-watch-") as folder:
            yield _ended(key, Path(folder))
    elif (log := workspace() / _LOG).is_file():
        yield _Training(log, "the last training here", {})
    else:
        raise RunkeyError(f"{home}: nothing is trained here; `dvc repro` begins a training")


def _is_trained(folder: Path) -> bool:
    from runkey.training.checkpoint.lock import trained_by

    return trained_by(folder) is not None


def _here(log: Path) -> _Training:
    """A training in its folder, with what its store knows of it."""
    key = log.parent.name.partition("-repeats-")[0]
    try:
        known = library().matching(key)[-1:]
    except RegistryError:
        known = []  # the log alone will do
    name = known[0].run.name if known else ""
    return _Training(
        log, f"{short_key(key)}  {name}".rstrip(), known[0].run.params if known else {}
    )


def _ended(key: str, folder: Path) -> _Training:
    """A run that has ended, its log put into a folder."""
    from runkey.registry.download import download
    from runkey.registry.library import find_run

    runs = library()
    record = find_run(runs, key)
    if record.details is None:
        host = record.run.tags.get("host", "another machine")
        raise RegistryError(
            f"{record.label}: {record.run.status}, and its log is not here but on {host};"
            f" `runkey open {record.label}` names its MLflow page"
        )
    download(runs, record, [_LOG.as_posix()], folder)
    return _Training(folder / _LOG, f"{record.label}  {record.run.name}", record.run.params)
