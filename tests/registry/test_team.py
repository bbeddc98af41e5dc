"""publish and fetch with a real DVC remote, a real git remote and real MLflow stores.

The team's store is a second database here; test_two_clones has a server.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from runkey import dvc_transfer
from runkey.dvc_transfer import DvcRemote
from runkey.errors import RegistryError
from runkey.identity.key import ANY_KEY
from runkey.identity.record import CONTENT
from runkey.progress import Steps
from runkey.registry.archive import pack
from runkey.registry.dvc_cache import DvcCache
from runkey.registry.library import LocalLibrary
from runkey.registry.package import FILE, RUN
from runkey.registry.share import Checkout, Handed, fetch, import_run, publish
from runkey.registry.share import Team as Places
from runkey.registry.snapshot import has_snapshot
from runkey.tracking.store import Store
from runkey.tracking.transfer import StoreRuns
from tests.support.run_package import Ready, git, new_checkout

pytestmark = pytest.mark.slow  # DVC takes a second a call


@dataclass
class Machine:
    """A checkout with its store, and the team's places as it sees them."""

    root: Path
    store: Store
    places: Places

    @property
    def local(self) -> LocalLibrary:
        return LocalLibrary(self.store.home)

    @property
    def here(self) -> Checkout:
        return Checkout(self.root, self.store.home, self.local, StoreRuns(self.store, "tests"))

    def take(self, archive: Path) -> None:
        import_run(archive, self.here)

    def publish(self, key: str) -> Handed:
        (record,) = self.local.matching(key)
        return publish(record, self.here, self.places)

    def fetch(self, key: str) -> Handed:
        (record,) = self.places.library.matching(key)
        return fetch(record, self.here, self.places)


class Team:
    def __init__(self, folder: Path, database: Path) -> None:
        self.folder, self.database = folder, database
        self.remote = folder / "remote.git"
        self.dvc = folder / "dvc"
        git(folder, "init", "-q", "--bare", str(self.remote))
        self.store = self._store(folder / "team")
        self.library = LocalLibrary(self.store.home)

    def machine(self, name: str) -> Machine:
        root = new_checkout(self.folder / name)
        with (root / ".dvc" / "config").open("a") as config:
            config.write(f"    remote = store\n['remote \"store\"']\n    url = {self.dvc}\n")
        git(root, "remote", "add", "origin", str(self.remote))
        store = self._store(root)
        runs = StoreRuns(self.store, "team")
        return Machine(root, store, Places(DvcRemote(root), "origin", self.library, runs))

    def sent(self) -> list[str]:
        """Whatever the three places hold."""
        objects = [path.name for path in self.dvc.rglob("*") if path.is_file()]
        refs = git(self.remote, "for-each-ref").splitlines()
        runs = [record.run.run_id for record in self.library.matching(ANY_KEY)]
        return sorted([*objects, *refs, *runs])

    def _store(self, root: Path) -> Store:
        root.mkdir(exist_ok=True)
        shutil.copy(self.database, root / "mlflow.db")
        return Store(f"sqlite:///{root / 'mlflow.db'}", root / "mlartifacts", root / ".runkey")


@pytest.fixture
def team(tmp_path: Path, empty_database: Path) -> Team:
    return Team(tmp_path, empty_database)


def test_a_run_travels(ready: Ready, archive: Path, team: Team) -> None:
    one, two = team.machine("one"), team.machine("two")
    one.take(archive)
    done = one.publish(ready.key)
    assert (done.state, done.new_objects, done.entries, done.new_ref) == ("new", 4, 1, True)
    assert git(team.remote, "rev-parse", str(done.ref)) == ready.snapshot
    again = one.publish(ready.key)
    assert (again.state, again.new_objects, again.new_ref) == ("already there", 0, False)
    assert len(team.library.matching(ready.key)) == 1
    got = two.fetch(ready.key)
    assert (got.state, got.new_objects) == ("new", 4)
    entry = DvcCache(two.root).entry_of(ready.pointer_md5)
    assert entry
    assert has_snapshot(two.root, ready.snapshot)
    assert [r.run.run_id for r in two.local.matching(ready.key)] == [got.run_id]
    assert two.fetch(ready.key).state == "already there"
    assert two.publish(ready.key).state == "already there"


def test_progress_counts_the_bytes_that_dvc_moves(
    ready: Ready, archive: Path, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Steps] = []

    @contextmanager
    def record(what: str, total: float, unit: str) -> Iterator[Steps]:
        bars.append(Steps(what, total, unit))
        yield bars[-1]

    monkeypatch.setattr(dvc_transfer, "progress", record)
    one, two = team.machine("one"), team.machine("two")
    one.take(archive)
    size = one.publish(ready.key).size
    two.fetch(ready.key)
    assert [bar.what for bar in bars] == ["objects to DVC", "objects from DVC"]
    assert [(bar.done, bar.total) for bar in bars] == [(size, size)] * 2
    assert all(bar.amount.endswith(" MB") for bar in bars)


def test_a_run_of_the_key_from_elsewhere_is_not_doubled(
    ready: Ready, archive: Path, package: Path, team: Team
) -> None:
    one, two = team.machine("one"), team.machine("two")
    one.take(archive)
    one.publish(ready.key)
    content = json.loads((package / RUN / CONTENT).read_text())
    (package / RUN / CONTENT).write_text(json.dumps(content | {"run_id": "b" * 32}))
    pack(package, ready.key, package.parent / "other.zip")
    two.take(package.parent / "other.zip")
    before = team.sent()
    assert two.publish(ready.key).state == "published from elsewhere"
    assert team.sent() == before


def test_what_is_not_set_is_said_before_anything_is_sent(
    ready: Ready, archive: Path, team: Team
) -> None:
    one = team.machine("one")
    one.take(archive)
    config = one.root / ".dvc" / "config"
    good = config.read_text()

    def said() -> str:
        with pytest.raises(RegistryError) as caught:
            one.publish(ready.key)
        assert team.sent() == []
        return str(caught.value)

    config.write_text(good.replace("    remote = store\n", ""))
    assert "DVC has no default remote; `dvc remote add -d store" in said()
    config.write_text(good.replace(str(team.dvc), "store"))
    assert "DVC remote store is a folder of this checkout" in said()
    config.write_text(good)
    one.places = replace(one.places, git="upstream")
    assert "git has no remote 'upstream'; `git remote add upstream" in said()
    one.places = replace(one.places, git="origin", dvc=DvcRemote(one.root, "nowhere"))
    assert "DVC has no remote 'nowhere'" in said()
    one.places = replace(one.places, dvc=DvcRemote(one.root))
    assert one.publish(ready.key).state == "new"


def test_what_is_damaged_on_the_way_is_not_taken(ready: Ready, archive: Path, team: Team) -> None:
    one, two = team.machine("one"), team.machine("two")
    one.take(archive)
    one.publish(ready.key)

    def said() -> str:
        before = git(two.root, "for-each-ref")
        with pytest.raises(RegistryError) as caught:
            two.fetch(ready.key)
        assert git(two.root, "for-each-ref") == before
        assert not (two.root / ".dvc" / "cache").exists()
        assert list(two.store.home.iterdir()) == []
        return str(caught.value)

    stored = team.dvc / "files" / "md5" / ready.pointer_md5[:2] / ready.pointer_md5[2:]
    good = stored.read_bytes()
    stored.chmod(0o644)
    stored.write_bytes(good.replace(b"1", b"2"))
    stored.chmod(0o444)  # DVC believes what is write-protected
    assert f"DVC object {ready.pointer_md5}: its contents have another md5" in said()
    stored.unlink()
    assert "1 of 4 objects are missing" in said()
    assert one.publish(ready.key).new_objects == 1
    (record,) = team.library.matching(ready.key)
    weights = team.library.path_of(record, "model/weights.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"x")
    assert "model/weights.safetensors: not the file that the run recorded" in said()
    weights.write_bytes(content)
    assert two.fetch(ready.key).state == "new"


def test_a_run_that_was_never_published(ready: Ready, archive: Path, team: Team) -> None:
    one, two = team.machine("one"), team.machine("two")
    one.take(archive)
    one.publish(ready.key)
    (record,) = team.library.matching(ready.key)
    team.library.path_of(record, FILE).unlink()
    with pytest.raises(RegistryError, match=r"was not published; run `runkey publish .*` on there"):
        two.fetch(ready.key)


def test_a_snapshot_that_is_not_on_the_remote(ready: Ready, archive: Path, team: Team) -> None:
    one, two = team.machine("one"), team.machine("two")
    one.take(archive)
    done = one.publish(ready.key)
    git(team.remote, "update-ref", "-d", str(done.ref))
    with pytest.raises(RegistryError, match="git does not take the snapshot"):
        two.fetch(ready.key)
    assert not (two.root / ".dvc" / "cache").exists()
    assert one.publish(ready.key).new_ref
    assert two.fetch(ready.key).state == "new"
