"""`runkey gc`: what may go and what must stay; real records, claims, worktrees, snapshots."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from runkey.cli import app
from runkey.errors import TrackingError
from runkey.identity.key import make_recipe
from runkey.identity.pointer import RunPointer, write_pointer
from runkey.registry.claims.claim_files import FileClaims
from runkey.registry.claims.claims import Claim
from runkey.registry.claims.owner import this_process
from runkey.registry.collect import Scope, collect
from runkey.registry.collect_files import mark_owner
from runkey.registry.reading.local_library import LocalLibrary
from runkey.registry.snapshot import snapshot_refs, take_snapshot
from tests.support.records import key_of, make_run

KEY = key_of("one")


def dead_owner():
    """The owner that a process of this machine was, which has ended."""
    code = (
        "import json; from runkey.registry.claims.owner import this_process as me;"
        " print(json.dumps(me().as_dict()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return replace(this_process(), **json.loads(done.stdout))


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
            owner=owner or this_process(),
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


def test_finished_runs_stay_whatever_became_of_their_keys(house):
    make_run(house.root, KEY, "a" * 32)
    make_run(house.root, KEY, "b" * 32, tags={"key": KEY, "reproduction_of": "a" * 32})
    make_run(house.root, key_of("no details"), "c" * 32, with_details=False)
    assert house.items() == []


def test_ended_runs_go_with_all_that_is_theirs(house):
    make_run(house.root, KEY, "a" * 32)
    for run_id, status in (("b" * 32, "FAILED"), ("c" * 32, "KILLED")):
        make_run(house.root, KEY, run_id, status=status, with_details=False)
    assert house.offered() == {("run", "b" * 32), ("run", "c" * 32)}
    assert all(item.size > 0 for item in house.items())
    house.apply()
    assert sorted(house.deleted) == ["b" * 32, "c" * 32]
    assert [p.name for p in (house.root / "mlartifacts").iterdir()] == ["a" * 32]
    assert [p.name for p in (house.home / "runs").glob("*.json")] == [f"{KEY}-{'a' * 32}.json"]
    assert house.items() == []


def test_artifacts_elsewhere_are_not_ours_to_delete(house, tmp_path):
    far = tmp_path / "far" / ("b" * 32) / "artifacts"
    far.mkdir(parents=True)
    (far / "weights.pt").write_bytes(b"1")
    make_run(house.root, KEY, "b" * 32, status="FAILED", files={}, artifact_uri=far.as_uri())
    house.apply()
    assert house.deleted == ["b" * 32]
    assert (far / "weights.pt").exists()


def test_a_running_run_goes_only_when_its_process_is_known_to_be_gone(house, gone):
    keys = {name: key_of(name) for name in ("alive", "dead", "failed", "none", "far")}
    for number, key in enumerate(keys.values()):
        make_run(house.root, key, f"{number}" * 32, status="RUNNING", with_details=False)
    far = replace(this_process(), boot="another machine")
    house.claim(keys["alive"], run_id="0" * 32)
    house.claim(keys["dead"], run_id="1" * 32, owner=gone)
    house.claim(keys["failed"], run_id="2" * 32, state="failed")
    house.claim(keys["far"], run_id="4" * 32, owner=far)
    assert house.offered() == {("run", "1" * 32), ("run", "2" * 32)}
    why = {item.name[-1]: item.why for item in house.items()}
    assert why["1"] == f"running, but its process {gone.label} is gone"


def test_a_checkpoint_goes_when_a_run_of_its_key_is_finished(house):
    house.folder(KEY, 5000)
    other = key_of("two")
    house.folder(other)
    make_run(house.root, KEY, "a" * 32)
    make_run(house.root, other, "b" * 32, status="RUNNING", with_details=False)
    house.folder("rk1-not-a-key")
    [item] = house.items()
    assert (item.kind, item.size >= 5000) == ("checkpoint", True)
    house.claim(KEY)  # as when it is trained again with runtime.reuse false
    assert house.items() == []


def test_a_training_without_a_claim_keeps_its_folder(house):
    """As with runtime.mlflow false: what shows that somebody trains is the lock."""
    folder = house.folder(KEY, 5000)
    make_run(house.root, KEY, "a" * 32)
    script = "import sys; from pathlib import Path\n"
    script += "from runkey.training.checkpoint.lock import locked\n"
    script += "with locked(Path(sys.argv[1]), print): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout.readline() == "held\n"
        assert house.items() == []
        trainer.kill()
    assert [item.kind for item in house.items()] == ["checkpoint"]


def test_a_failed_run_with_a_checkpoint_can_go_on_and_stays(house):
    checkpoint = house.folder(KEY)
    make_run(house.root, KEY, "b" * 32, status="KILLED", with_details=False)
    assert house.items() == []
    make_run(house.root, KEY, "a" * 32)
    assert {kind for kind, _ in house.offered()} == {"run", "checkpoint"}
    house.apply()
    assert not checkpoint.exists()


def test_a_training_that_was_resumed_is_not_dead(house, gone):
    make_run(house.root, KEY, "b" * 32, status="RUNNING", with_details=False)
    house.claim(generation=1, owner=gone, run_id="b" * 32)
    house.claim(generation=2, run_id="b" * 32)
    assert house.items() == []


def test_what_a_repeat_can_go_on_from_stays_for_a_day(house):
    make_run(house.root, KEY, "a" * 32)
    repeated = {"key": KEY, "reproduction_of": "a" * 32}
    make_run(house.root, KEY, "b" * 32, status="KILLED", with_details=False, tags=repeated)
    folder = house.folder(f"{KEY}-repeats-{'a' * 8}")
    write_pointer(folder, RunPointer("sqlite:///mlflow.db", run_id="b" * 32))
    assert house.items() == []
    assert {kind for kind, _ in house.offered(now=time.time() + 90_000)} == {"run", "checkpoint"}
    make_run(house.root, KEY, "c" * 32, tags=repeated)
    assert house.items() == []  # another one may train there
    run, checkpoint = house.items(now=time.time() + 4000)
    assert run.name.endswith("b" * 32)
    assert checkpoint.name == f"{KEY[:16]}-repeats-{'a' * 8}/"
    checkpoint.remove()
    assert not folder.exists()


def test_claims_that_newer_ones_replaced(house, gone):
    house.claim(generation=1, owner=gone)
    house.claim(generation=2, state="failed")
    house.claim(generation=3, owner=gone)
    far = replace(this_process(), boot="another machine")
    house.claim(key_of("two"), generation=1, owner=far)
    house.claim(key_of("two"), generation=2)
    names = [item.name for item in house.items()]
    assert names == [f"{KEY[:16]}.g1", f"{KEY[:16]}.g2"]
    house.apply()
    assert [claim.generation for claim in house.claims.of(KEY)] == [3]


def test_the_claim_that_shows_a_run_dead_stays_with_it(house, gone):
    make_run(house.root, KEY, "b" * 32, status="RUNNING", with_details=False)
    house.claim(generation=1, owner=gone, run_id="b" * 32)
    house.claim(generation=2)
    house.folder(KEY)  # from which the run can go on, so it stays
    assert house.items() == []


def test_a_snapshot_goes_with_the_last_run_that_needs_it(house):
    recipe = make_recipe("train", house.root)
    oid = take_snapshot(house.root, house.root, recipe)
    for run_id, status in (("a" * 32, "FINISHED"), ("b" * 32, "FAILED")):
        make_run(house.root, recipe.key, run_id, status=status, snapshot=oid)
    house.apply()
    assert snapshot_refs(house.root, recipe.key)
    (house.home / "runs" / f"{recipe.key}-{'a' * 32}.json").unlink()
    make_run(
        house.root,
        recipe.key,
        "c" * 32,
        status="FAILED",
        with_details=False,
        tags={"key": recipe.key, "snapshot": oid},
    )
    pointer = house.repository.write("run.json", json.dumps({"key": recipe.key}))
    house.apply()  # the result in the working tree may be another store's run
    assert snapshot_refs(house.root, recipe.key)
    pointer.unlink()
    make_run(
        house.root,
        recipe.key,
        "d" * 32,
        status="FAILED",
        with_details=False,
        tags={"key": recipe.key, "snapshot": oid},
    )
    house.apply()
    assert not snapshot_refs(house.root, recipe.key)


def test_worktrees_nobody_works_in(house, gone, monkeypatch):
    ended, used, unknown = map(house.worktree, ("rk1-ended-1", "rk1-used-2", "rk1-unknown-3"))
    mark_owner(used)
    with monkeypatch.context() as other:
        other.setattr("runkey.registry.collect_files.this_process", lambda: gone)
        mark_owner(ended)
    assert house.offered() == {("worktree", "reproduce/rk1-ended-1")}
    later = time.time() + 7200
    assert len(house.offered(now=later)) == 2  # the unknown one has stood still for long
    child = subprocess.Popen([sys.executable, "-c", "input()"], cwd=ended, stdin=subprocess.PIPE)
    try:
        assert house.items() == []  # DVC goes on when `runkey reproduce` alone is killed
    finally:
        child.communicate(b"\n", timeout=20)
    house.apply()
    assert not ended.exists()
    listed = house.repository.git("worktree", "list")
    assert "rk1-ended-1" not in listed
    assert "rk1-used-2" in listed
    assert unknown.exists()


def test_a_worktree_that_git_does_not_know_goes_too(house, gone, monkeypatch):
    path = house.folder("reproduce/rk1-lost-1")
    with monkeypatch.context() as other:
        other.setattr("runkey.registry.collect_files.this_process", lambda: gone)
        mark_owner(path)
    house.apply()
    assert not path.exists()


def test_half_written_files_of_long_ago(house):
    make_run(house.root, KEY, "a" * 32)
    old = [
        house.home / "runs/.abc.123",
        house.home / "claims/.claim.9f",
        house.root / ".runkey-x1/0",
        house.home / ".fetch-x1/0",
        house.root / ".run.json.77",
    ]
    for path in old:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
        os.utime(path, (1e9, 1e9))
        if path.parent.name.endswith("-x1"):
            os.utime(path.parent, (1e9, 1e9))
    (house.home / "runs/.now.5").write_text("{")
    assert len(house.items()) == 5
    house.apply()
    assert not any(path.exists() for path in old)
    assert (house.home / "runs/.now.5").exists()


def test_only_what_is_old_enough(house):
    now = time.time_ns() // 1_000_000
    for run_id, days in (("a" * 32, 1), ("b" * 32, 20)):
        started = now - days * 86_400_000 - 60_000
        make_run(house.root, KEY, run_id, status="FAILED", started_ms=started)
    assert house.offered(days=7) == {("run", "b" * 32)}


class Elsewhere:
    """The runs of a local store, asked as a server's are."""

    def __init__(self, library) -> None:
        self.library = library
        self.place = "a server"

    def matching(self, prefix):
        return [replace(record, details=None) for record in self.library.matching(prefix)]

    def with_details(self, record):
        return next(r for r in self.library.matching(record.key) if r.run == record.run)


def test_on_a_server_runs_and_claims_are_left_alone(house, gone):
    make_run(house.root, KEY, "a" * 32)
    make_run(house.root, KEY, "b" * 32, status="FAILED")
    house.claim(key_of("two"), owner=gone)
    house.claim(key_of("two"), generation=2)
    house.folder(KEY)
    scope = Scope(
        root=house.root,
        home=house.home,
        library=Elsewhere(LocalLibrary(house.home)),
        claims=house.claims,
        delete_run=house.deleted.append,
    )
    assert [item.kind for item in collect(scope)] == ["checkpoint"]


@pytest.fixture
def here(house, monkeypatch):
    monkeypatch.chdir(house.root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return house


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["gc", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_lists_and_deletes_nothing_by_itself(here):
    make_run(here.root, KEY, "a" * 32)
    here.folder(KEY, 2_500_000)
    said = run()
    assert f"{KEY[:16]}/" in said
    assert "1 may go, 2.5 MB; --apply deletes them" in said
    assert (here.home / KEY).exists()
    told = json.loads(run("--apply", "--json"))
    assert told["items"][0]["deleted"] is True
    assert told["bytes"] >= 2_500_000
    assert not (here.home / KEY).exists()
    assert run() == "nothing to delete\n"


def test_what_cannot_be_deleted_is_said_and_the_rest_goes(here, monkeypatch):
    make_run(here.root, KEY, "b" * 32, status="FAILED")
    make_run(here.root, key_of("two"), "c" * 32)
    here.folder(key_of("two"))

    def refuse(store, run_id):
        raise TrackingError(f"run {run_id}: the database is locked")

    monkeypatch.setattr("runkey.tracking.remove.delete_run", refuse)
    result = CliRunner().invoke(app, ["gc", "--apply"])
    assert result.exit_code == 1
    assert "the database is locked" in " ".join(result.output.split())
    assert "1 of 2 could not be deleted" in str(result.exception)
    assert list((here.home / "runs").glob(f"{KEY}*"))
    assert not (here.home / key_of("two")).exists()
