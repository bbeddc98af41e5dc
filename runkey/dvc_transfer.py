"""Copy run-cache entries and objects to a DVC remote and back.

The only file that imports DVC: every kind of remote that DVC has works (S3, SSH, a folder, ...).
The command line imports it where a run is published or fetched; DVC takes a second to import.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from threading import Lock
from typing import Any, override

from dvc.config import NoRemoteError, RemoteNotFoundError
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.fs import HTTPFileSystem, LocalFileSystem
from dvc.fs import generic as copying
from dvc.repo import Repo
from dvc_data.hashfile.db import get_odb
from dvc_data.hashfile.hash_info import HashInfo
from fsspec.callbacks import Callback

from runkey.errors import RegistryError
from runkey.paths import Address
from runkey.progress import QUIET, Steps, progress
from runkey.units import counted


class NoUsableRemoteError(RegistryError):
    """No remote is set that other machines can read."""


@dataclass(frozen=True)
class DvcRemote:
    """A DVC remote of a checkout.

    Every method raises RegistryError if the remote is not set, cannot be reached or refuses.
    """

    root: Path
    """The checkout."""
    name: str | None = None
    """As `dvc remote list` shows it; None: DVC's default."""

    def check(self) -> str:
        """Return the remote's address, once it has answered; refuse a folder of the checkout."""
        with self._opened() as (repo, remote):
            remote.fs.exists(remote.path)
            root = Path(repo.root_dir).resolve()
            local = isinstance(remote.fs, LocalFileSystem)
            if local and root in Path(remote.path).resolve().parents:
                name = self.name or repo.config["core"].get("remote")
                raise NoUsableRemoteError(
                    f"DVC remote {name} is a folder of this checkout, which other machines cannot"
                    f" read; `dvc remote modify {name} url <address>` sets your team's"
                )
            return Address(str(remote.fs.unstrip_protocol(remote.path)))

    def push(self, objects: Mapping[str, int], entries: Iterable[str]) -> int:
        """Copy objects (bytes by md5) and entries (paths below runs/) from the checkout's cache.

        Return the number of objects that were not there yet. Over HTTP DVC keeps no entries;
        `runkey fetch` takes them from the MLflow run.
        """
        with self._opened() as (repo, remote):
            new = _move(repo, repo.cache.local, remote, objects, "objects to DVC")
            # In the place where `dvc pull --run-cache` finds them too.
            runs = repo.cloud.get_remote_odb(self.name, "push", hash_name="md5-dos2unix")
            for path in () if isinstance(runs.fs, HTTPFileSystem) else entries:
                target = runs.fs.join(runs.path, "runs", *path.split("/"))
                if not runs.fs.exists(target):
                    runs.fs.makedirs(runs.fs.parent(target), exist_ok=True)
                    source = os.path.join(repo.stage_cache.cache_dir, path)  # noqa: PTH118
                    copying.copy(LocalFileSystem(), source, runs.fs, target)
            return new

    def pull(self, objects: Mapping[str, int], folder: Path) -> None:
        """Copy objects (bytes by md5) to `<folder>/<2 digits>/<the rest>`, unchecked."""
        with self._opened() as (repo, remote):
            target = get_odb(  # type: ignore[no-untyped-call]
                LocalFileSystem(), str(folder), hash_name="md5"
            )
            _move(repo, remote, target, objects, "objects from DVC")

    @contextmanager
    def _opened(self) -> Iterator[tuple[Repo, Any]]:
        """The repository and the remote's object database; DVC shows no bars of its own."""
        try:
            with _quiet(), Repo(str(self.root)) as repo:
                yield repo, repo.cloud.get_remote_odb(self.name, "push")
        except RegistryError:
            raise
        except RemoteNotFoundError:
            text = f"DVC has no remote {self.name!r}; `dvc remote list` shows them"
            raise RegistryError(text) from None
        except NoRemoteError:
            text = "DVC has no default remote; `dvc remote add -d store <address>`"
            raise NoUsableRemoteError(text) from None
        except NotDvcRepoError:
            raise RegistryError(f"{self.root}: not a DVC repository; `dvc init`") from None
        # Every storage's driver raises its own kinds: no log-in, no network, no space.
        except Exception as error:  # noqa: BLE001
            text = " ".join(f"{type(error).__name__}: {error}".split())
            name = self.name or "(default)"
            raise RegistryError(f"DVC remote {name}: {text[:300]}") from None


def commit_stages(root: Path, stages: Iterable[str]) -> None:
    """Put the outputs of stages into DVC's cache as they are, with run-cache entries.

    RegistryError if an input or output is not there.
    """
    try:
        with _quiet(), Repo(str(root)) as repo:
            for stage in stages:
                repo.commit(stage, force=True)
    except DvcException as error:
        raise RegistryError(f"`dvc commit {stage}`: {error}; `dvc repro` takes the run") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Let DVC log nothing."""
    logger = logging.getLogger("dvc")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _move(repo: Repo, source: Any, target: Any, objects: Mapping[str, int], what: str) -> int:
    """Copy the objects that the target lacks; return their number."""
    missing: list[str] = []
    moved = TransferProgress(objects)
    with ExitStack() as bar:

        def validate(status: Any) -> None:
            missing.extend(str(one.value) for one in status.missing)
            total = sum(objects[str(one.value)] for one in status.new)
            moved.steps = bar.enter_context(progress(what, total, "bytes"))

        # DVC's index of the remote is not used: objects may have been deleted there since.
        infos = {HashInfo("md5", md5) for md5 in objects}
        done = repo.cloud.transfer(source, target, infos, validate_status=validate, callback=moved)
    missing += [str(one.value) for one in done.failed]
    if missing:
        where = source.fs.unstrip_protocol(source.path)
        raise RegistryError(
            f"{where}: {len(missing)} of {counted(len(objects), 'object')} missing or not readable,"
            f" {min(missing)} among them"
        )
    return len(done.transferred)


class TransferProgress(Callback):  # type: ignore[misc]
    """Counts the bytes of objects that DVC moves in several threads."""

    def __init__(self, sizes: Mapping[str, int], steps: Steps = QUIET) -> None:
        """Args: sizes: bytes by md5.  steps: the progress to advance by them."""
        super().__init__()
        self.sizes, self.steps, self.lock = sizes, steps, Lock()

    @override
    @contextmanager
    def branched(self, path_1: str, path_2: str, **kwargs: Any) -> Iterator[Callback]:
        """Give the callback of one object; each byte counts once, also if it is sent again."""
        size, counted = self.sizes.get("".join(PurePath(path_1).parts[-2:]), 0), 0

        def count(_: int | None, value: int) -> None:
            nonlocal counted
            if (new := min(value, size) - counted) > 0:
                counted += new
                with self.lock:
                    self.steps.advance(new)

        child = Callback(hooks={"bytes": count})
        yield child
        # Some kinds of remote do not report progress.
        child.absolute_update(size)
