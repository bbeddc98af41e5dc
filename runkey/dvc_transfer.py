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
from dvc.exceptions import NotDvcRepoError
from dvc.fs import HTTPFileSystem, LocalFileSystem
from dvc.fs import generic as copying
from dvc.repo import Repo
from dvc_data.hashfile.db import get_odb
from dvc_data.hashfile.hash_info import HashInfo
from fsspec.callbacks import Callback

from runkey.errors import RegistryError
from runkey.progress import QUIET, progress


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
        """Return its address, for messages.

        Raises:
            RegistryError: also where it is a folder of the checkout itself, which no colleague
                can read.
        """
        with self._opened() as (repo, remote):
            root = Path(repo.root_dir).resolve()
            local = isinstance(remote.fs, LocalFileSystem)
            if local and root in Path(remote.path).resolve().parents:
                name = self.name or repo.config["core"].get("remote")
                raise RegistryError(
                    f"DVC remote {name} is a folder of this checkout, which nobody else reads;"
                    f" `dvc remote modify {name} url <address>` names your team's"
                )
            return str(remote.fs.unstrip_protocol(remote.path))

    def push(self, objects: Mapping[str, int], entries: Iterable[str]) -> int:
        """Copy objects and entries from the checkout's cache.

        Args:
            objects: bytes by md5.
            entries: paths below the cache's runs/. Over HTTP, where DVC keeps none, they are left
                out: `runkey fetch` has them from the MLflow run.

        Returns:
            Number of objects that were not there yet.

        Raises:
            RegistryError: also where the cache lacks an object.
        """
        with self._opened() as (repo, remote):
            new = _move(repo, repo.cache.local, remote, objects, "objects to DVC")
            self._push_entries(repo, entries)
            return new

    def pull(self, objects: Mapping[str, int], folder: Path) -> None:
        """Copy objects to `<folder>/<2 digits>/<the rest>`; their contents are not checked.

        Args:
            objects: bytes by md5.
            folder: target folder.

        Raises:
            RegistryError: also where the remote lacks an object.
        """
        with self._opened() as (repo, remote):
            target = get_odb(  # type: ignore[no-untyped-call]
                LocalFileSystem(), str(folder), hash_name="md5"
            )
            _move(repo, remote, target, objects, "objects from DVC")

    @contextmanager
    def _opened(self) -> Iterator[tuple[Repo, Any]]:
        """The repository, and the remote's object database; DVC's own bars are off meanwhile."""
        logger = logging.getLogger("dvc")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            with Repo(str(self.root)) as repo:
                yield repo, repo.cloud.get_remote_odb(self.name, "push")
        except RegistryError:
            raise
        except RemoteNotFoundError:
            text = f"DVC has no remote {self.name!r}; `dvc remote list` shows them"
            raise RegistryError(text) from None
        except NoRemoteError:
            text = "DVC has no default remote; `dvc remote add -d store <address>`"
            raise RegistryError(text) from None
        except NotDvcRepoError:
            raise RegistryError(f"{self.root}: not a DVC repository; `dvc init`") from None
        # Every storage's driver raises its own kinds: no log-in, no network, no space.
        except Exception as error:  # noqa: BLE001
            text = " ".join(f"{type(error).__name__}: {error}".split())
            name = self.name or "(default)"
            raise RegistryError(f"DVC remote {name}: {text[:300]}") from None
        finally:
            logger.setLevel(level)

    def _push_entries(self, repo: Repo, paths: Iterable[str]) -> None:
        """Copy run-cache entries, so that `dvc pull --run-cache` finds them too."""
        remote = repo.cloud.get_remote_odb(self.name, "push", hash_name="md5-dos2unix")
        if isinstance(remote.fs, HTTPFileSystem):
            return
        for path in paths:
            target = remote.fs.join(remote.path, "runs", *path.split("/"))
            if not remote.fs.exists(target):
                remote.fs.makedirs(remote.fs.parent(target), exist_ok=True)
                source = os.path.join(repo.stage_cache.cache_dir, path)  # noqa: PTH118
                copying.copy(LocalFileSystem(), source, remote.fs, target)


def _move(repo: Repo, source: Any, target: Any, objects: Mapping[str, int], what: str) -> int:
    """Copy the objects that the target lacks; return their number."""
    missing: list[str] = []
    with TransferProgress(objects, what) as callback:

        def validate(status: Any) -> None:
            missing.extend(str(one.value) for one in status.missing)
            callback.start(status.new)

        # DVC's index of the remote is not used: objects may have been deleted there since.
        done = repo.cloud.transfer(
            source,
            target,
            {HashInfo("md5", md5) for md5 in objects},
            validate_status=validate,
            callback=callback,
        )
    missing += [str(one.value) for one in done.failed]
    if missing:
        where = source.fs.unstrip_protocol(source.path)
        raise RegistryError(
            f"{where}: {len(missing)} of {len(objects)} objects are missing or could not be read,"
            f" {min(missing)} among them"
        )
    return len(done.transferred)


class TransferProgress(Callback):  # type: ignore[misc]
    """Progress in bytes of objects that DVC moves in several threads."""

    def __init__(self, sizes: Mapping[str, int], what: str) -> None:
        """Args: sizes: bytes by md5.  what: text in front of the bar."""
        super().__init__()
        self._sizes, self._what, self._lock = sizes, what, Lock()
        self._steps, self._bar = QUIET, ExitStack()

    def start(self, objects: Iterable[HashInfo]) -> None:
        """Begin, with the total of these objects."""
        total = sum(self._sizes[str(one.value)] for one in objects)
        self._steps = self._bar.enter_context(progress(self._what, total, "bytes"))

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    @override
    def branched(self, path_1: str, path_2: str, **kwargs: Any) -> Callback:
        """Return the callback of one object."""
        return _ObjectProgress(self, self._sizes.get("".join(PurePath(path_1).parts[-2:]), 0))

    def add(self, amount: int) -> None:
        """Count more bytes as moved."""
        with self._lock:
            self._steps.advance(amount)


class _ObjectProgress(Callback):  # type: ignore[misc]
    """Counts an object's bytes, each once: an object that failed is sent again."""

    def __init__(self, parent: TransferProgress, size: int) -> None:
        super().__init__()
        self._parent, self._size, self._counted = parent, size, 0

    @override
    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        self._count(self.value)

    def close(self) -> None:
        """Count the rest: some kinds of remote do not report progress."""
        self._count(self._size)

    def _count(self, value: int) -> None:
        new = min(value, self._size) - self._counted
        if new > 0:
            self._counted += new
            self._parent.add(new)
