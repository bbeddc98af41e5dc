"""A small store with runs, claims and folders, of which `runkey gc` may take some."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from runkey.registry.claims import Claim, FileClaims, this_owner
from runkey.registry.gc import Scope, collect
from runkey.registry.library import LocalLibrary
from tests.support.records import key_of

KEY = key_of("one")


def dead_owner():
    """The owner that a process of this machine was, which has ended."""
    code = (
        "import json; from runkey.registry.claims import this_owner as me;"
        " print(json.dumps(vars(me())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return replace(this_owner(), **json.loads(done.stdout))


@contextmanager
def held(folder):
    """Another process holds the lock of a folder, as the training or the reproduction in it."""
    script = "import sys; from pathlib import Path\n"
    script += "from runkey.training.lock import locked\n"
    script += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        yield
        holder.kill()


class House:
    """A store in a repository, whose MLflow is a list of the runs deleted from it."""

    def __init__(self, repository) -> None:
        self.repository = repository
        self.root = repository.root
        self.home = self.root / ".runkey"
        self.claims = FileClaims(self.home / "claims")
        self.deleted: list[str] = []

    def items(self, days=0.0, now=None):
        scope = Scope(
            root=self.root,
            home=self.home,
            library=LocalLibrary(self.home),
            claims=self.claims,
            delete_run=self.deleted.append,
            now=now or time.time(),
        )
        return collect(scope, days)

    def offered(self, **options):
        return {(item.kind, item.name.rpartition(":")[2]) for item in self.items(**options)}

    def apply(self):
        for item in self.items():
            item.remove()

    def claim(self, key=KEY, generation=1, owner=None, state="running", run_id=None):
        claim = Claim(
            key=key,
            generation=generation,
            owner=owner or this_owner(),
            state=state,
            run_id=run_id,
            beat=0,
            since_ms=time.time_ns() // 1_000_000,
        )
        assert self.claims.make(claim)
        return claim

    def folder(self, path, size=1000):
        file = self.home / path / "step.pt"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"\0" * size)
        return file.parent

    def worktree(self, name):
        path = self.home / "reproduce" / name
        self.repository.git("worktree", "add", "-q", "--detach", str(path), "HEAD")
        return path


@pytest.fixture
def house(repository):
    return House(repository)


@pytest.fixture(scope="module")
def gone():
    return dead_owner()
