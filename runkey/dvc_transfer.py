"""`python -m runkey.dvc_transfer`: run-cache entries and objects to a DVC remote, and back.

A process of its own, the only code here that imports DVC: every kind of remote that DVC has works
(S3, SSH, a folder, ...), and the registry goes without DVC's second of import time.

stdin    {"action": "check" | "push" | "pull", "root": ..., "remote": name or null,
          "objects": {md5: bytes, ...}, "entries": [path below runs/, ...], "to": folder for "pull"}
stdout   a line of JSON each: {"total": bytes to move}, {"moved": bytes since the last such line};
         last {"place": ..., "objects": number, "entries": number}, or {"error": text}, exit code 1
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
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

EVERY_SECONDS = 0.2
"""Between two lines about bytes that were moved."""


class _RefusedError(Exception):
    """Something that the user can mend; the text says how."""


def main() -> int:
    """Do what stdin says; see above."""
    wanted = json.load(sys.stdin)
    answers = sys.stdout

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        with redirect_stdout(sys.stderr):
            answer = _act(wanted, Moved(wanted["objects"], say))
    except _RefusedError as error:
        answer = {"error": str(error)}
    except RemoteNotFoundError:
        answer = {"error": f"DVC has no remote {wanted['remote']!r}; `dvc remote list` shows them"}
    except NoRemoteError:
        answer = {"error": "DVC has no default remote; `dvc remote add -d store <address>`"}
    except NotDvcRepoError:
        answer = {"error": f"{wanted['root']}: not a DVC repository; `dvc init`"}
    # Every storage's driver raises its own kinds: no log-in, no network, no space.
    except Exception as error:  # noqa: BLE001
        text = " ".join(f"{type(error).__name__}: {error}".split())
        answer = {"error": f"DVC remote {wanted['remote'] or '(default)'}: {text[:300]}"}
    say(answer)
    return 1 if "error" in answer else 0


class Moved(Callback):  # type: ignore[misc]
    """Counts the bytes of objects while DVC moves them, in several threads."""

    def __init__(self, sizes: dict[str, int], say: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._sizes, self._say = sizes, say
        self._lock, self._unsaid, self._last = Lock(), 0, time.monotonic()

    def expect(self, objects: set[HashInfo]) -> None:
        """These are moved, and no others."""
        self._say({"total": sum(self._sizes[str(one.value)] for one in objects)})

    @override
    def branched(self, path_1: str, path_2: str, **kwargs: Any) -> Callback:
        """Counts one object."""
        return _OneMoved(self, self._sizes.get("".join(PurePath(path_1).parts[-2:]), 0))

    def add(self, amount: int) -> None:
        """So many bytes more were moved."""
        with self._lock:
            self._unsaid += amount
            if time.monotonic() - self._last >= EVERY_SECONDS:
                self._say({"moved": self._unsaid})
                self._unsaid, self._last = 0, time.monotonic()


class _OneMoved(Callback):  # type: ignore[misc]
    """Counts an object's bytes, never more than it has: what failed is sent again."""

    def __init__(self, all_moved: Moved, bytes_: int) -> None:
        super().__init__()
        self._all, self._bytes, self._counted = all_moved, bytes_, 0

    @override
    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        """The value has changed."""
        self._count(self.value)

    def close(self) -> None:
        """Some kinds of remote do not say how far they are."""
        self._count(self._bytes)

    def _count(self, bytes_: int) -> None:
        new = min(bytes_, self._bytes) - self._counted
        if new > 0:
            self._counted += new
            self._all.add(new)


def _act(wanted: dict[str, Any], moved_bytes: Moved) -> dict[str, Any]:
    repo = Repo(wanted["root"])
    name = wanted["remote"]
    remote = repo.cloud.get_remote_odb(name, "push")
    place = str(remote.fs.unstrip_protocol(remote.path))
    hashes = {HashInfo("md5", md5) for md5 in wanted["objects"]}
    moved, entries = 0, 0
    if wanted["action"] != "pull":
        _refuse_own_folder(repo, remote, name)
    if wanted["action"] == "push":
        moved = _move(repo, repo.cache.local, remote, hashes, moved_bytes)
        entries = _push_entries(repo, name, wanted["entries"])
    if wanted["action"] == "pull":
        folder = get_odb(  # type: ignore[no-untyped-call]
            LocalFileSystem(), wanted["to"], hash_name="md5"
        )
        moved = _move(repo, remote, folder, hashes, moved_bytes)
    return {"place": place, "objects": moved, "entries": entries}


def _refuse_own_folder(repo: Repo, remote: Any, name: str | None) -> None:
    """A folder of this checkout is nothing that a colleague can read."""
    root = Path(repo.root_dir).resolve()
    if isinstance(remote.fs, LocalFileSystem) and root in Path(remote.path).resolve().parents:
        name = name or repo.config["core"].get("remote")
        raise _RefusedError(
            f"DVC remote {name} is a folder of this checkout, which nobody else reads;"
            f" `dvc remote modify {name} url <address>` names your team's"
        )


def _move(repo: Repo, source: Any, target: Any, hashes: set[HashInfo], moved_bytes: Moved) -> int:
    """Copy the objects that the target lacks; how many."""
    lost: list[str] = []

    def validate(status: Any) -> None:
        lost.extend(str(one.value) for one in status.missing)
        moved_bytes.expect(status.new)

    # DVC's index of what a remote had is left out: objects may have been deleted there since.
    done = repo.cloud.transfer(
        source, target, hashes, validate_status=validate, callback=moved_bytes
    )
    lost += [str(one.value) for one in done.failed]
    if lost:
        where = source.fs.unstrip_protocol(source.path)
        raise _RefusedError(
            f"{where}: {len(lost)} of {len(hashes)} objects are missing or could not be read,"
            f" {min(lost)} among them"
        )
    return len(done.transferred)


def _push_entries(repo: Repo, name: str | None, paths: list[str]) -> int:
    """Copy run-cache entries, so that `dvc pull --run-cache` finds them too; how many.

    Over HTTP DVC itself keeps none; `runkey fetch` has them from the MLflow run.
    """
    remote = repo.cloud.get_remote_odb(name, "push", hash_name="md5-dos2unix")
    if isinstance(remote.fs, HTTPFileSystem):
        return 0
    new = 0
    for path in paths:
        target = remote.fs.join(remote.path, "runs", *path.split("/"))
        if not remote.fs.exists(target):
            remote.fs.makedirs(remote.fs.parent(target), exist_ok=True)
            source = os.path.join(repo.stage_cache.cache_dir, path)  # noqa: PTH118
            copying.copy(LocalFileSystem(), source, remote.fs, target)
            new += 1
    return new


if __name__ == "__main__":
    raise SystemExit(main())
