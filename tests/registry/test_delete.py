"""`runkey delete`: what belongs to runs and goes with them, and what stays."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from runkey.cli import app
from runkey.errors import RegistryError
from runkey.hashing import sha256_bytes
from runkey.identity.key import make_recipe
from runkey.identity.record import RunPointer
from runkey.registry.claims import newest, this_owner
from runkey.registry.delete import plan
from runkey.registry.gc import Scope, collect
from runkey.registry.library import LocalLibrary
from runkey.registry.once import Rhythm, decide
from runkey.registry.snapshot import snapshot_refs, take_snapshot
from tests.support.collectable import KEY, held
from tests.support.records import FILES, key_of, make_run
from tests.support.run_package import add_entry, entry_text

QUICK = Rhythm(beat_seconds=0.05, dead_after=0.4, poll_seconds=0.05)
POINTER, OTHER, DATA, EVALUATION = "1a" * 16, "2a" * 16, "3a" * 16, "4a" * 16
RUN = "a" * 32


def scope_of(house, **changes):
    scope = Scope(
        root=house.root,
        home=house.home,
        library=LocalLibrary(house.home),
        claims=house.claims,
        delete_run=house.deleted.append,
    )
    return replace(scope, **changes)


def apply(house, *addresses):
    return plan(scope_of(house), addresses, QUICK).apply()


def experiment(house, name, pointer):
    """A commit as DVC's experiments are, whose dvc.lock names a run.json."""
    house.repository.write("dvc.lock", f"stages:\n  train:\n    outs:\n    - md5: {pointer}\n")
    house.repository.git("add", "dvc.lock")
    tree = house.repository.git("write-tree")
    oid = house.repository.git("commit-tree", tree, "-m", name)
    house.repository.git("update-ref", f"refs/exps/ab/{'c' * 38}/{name}", oid)
    house.repository.git("rm", "-q", "-f", "--cached", "dvc.lock")
    return oid


def entries(house):
    """Paths of run-cache entries; DVC fails at a folder of them that is empty."""
    assert all(any(folder.iterdir()) for folder in house.root.glob(".dvc/cache/runs/*/*"))
    return {p.relative_to(house.root).as_posix() for p in house.root.glob(".dvc/cache/runs/*/*/*")}


@pytest.fixture
def lived(house):
    """A finished run of a key with all that a checkout may keep of one, and another key's run."""
    recipe = make_recipe("train", house.root)
    oid = take_snapshot(house.root, house.root, recipe)
    for key, run_id, pointer in ((recipe.key, RUN, POINTER), (key_of("b"), "b" * 32, OTHER)):
        make_run(house.root, key, run_id, pointer_md5=pointer, snapshot=oid)
        stages = (
            ({"data": DATA}, {"run.json": pointer}),
            ({"run.json": pointer}, {"e": EVALUATION}),
        )
        for deps, outs in stages:
            add_entry(house.root, *entry_text(deps, outs))
        model = house.root / "mlartifacts/models" / f"m-{run_id}" / "artifacts/data/data"
        model.mkdir(parents=True)
        (model / "run.json").write_text(json.dumps({"run_id": run_id}))
    for name, pointer in (("bold-cat", POINTER), ("same-again", POINTER), ("other-dog", OTHER)):
        applied = experiment(house, name, pointer)
        if name == "bold-cat":
            house.repository.git("update-ref", "refs/exps/exec/EXEC_APPLY", applied)
    house.folder(recipe.key, 5000)
    house.claim(recipe.key, state="finished", run_id=RUN)
    house.key = recipe.key
    return house


def left(house):
    """What is left of the run."""
    return {
        "records": [r.run.run_id for r in LocalLibrary(house.home).matching(house.key)],
        "artifacts": (house.root / "mlartifacts" / RUN).exists(),
        "model": (house.root / "mlartifacts/models" / f"m-{RUN}").exists(),
        "entries": len(entries(house)) - 2,
        "snapshots": len(snapshot_refs(house.root, house.key)),
        "experiments": house.repository.git("for-each-ref", "refs/exps/").count("\n") + 1 - 1,
        "folder": (house.home / house.key).exists(),
        "claims": len(house.claims.of(house.key)),
    }


NOTHING = {
    **{"records": [], "artifacts": False, "model": False, "entries": 0},
    **{"snapshots": 0, "experiments": 0, "folder": False, "claims": 0},
}


def test_all_that_is_kept_of_a_run_goes_and_nothing_else(lived):
    before = left(lived)
    deletion = plan(scope_of(lived), [lived.key[:10]])
    kinds = [item.kind for item in deletion.items]
    assert kinds == [
        *("experiment", "experiment", "run-cache", "run-cache", "snapshot", "checkpoint"),
        *("model", "run"),
    ]
    assert all(item.size for item in deletion.items if item.kind in ("model", "run", "checkpoint"))
    assert left(lived) == before, "listing deletes nothing"
    assert deletion.apply() == [None] * 8
    assert left(lived) == NOTHING
    assert lived.deleted == [RUN]
    (other,) = LocalLibrary(lived.home).matching(key_of("b"))
    assert other.run.run_id == "b" * 32
    assert (lived.root / "mlartifacts/models" / f"m-{'b' * 32}").exists()
    assert collect(scope_of(lived)) == []
    with pytest.raises(RegistryError, match="no run of that key"):
        plan(scope_of(lived), [lived.key])
    decision = decide(LocalLibrary(lived.home), lived.claims, lived.key)
    assert decision.line.endswith("no run of this key: trained here")
    assert decision.claim


@pytest.mark.parametrize("done", range(9))
def test_an_interrupted_deletion_is_finished_by_the_same_command(lived, done):
    deletion = plan(scope_of(lived), [lived.key])
    for item in deletion.items[:done]:
        item.remove()
    if done == 5:
        (lived.root / "mlartifacts" / RUN / "artifacts/model/key.json").unlink()
    assert apply(lived, lived.key).count(None) == len(deletion.items) - done
    assert left(lived) == NOTHING


def test_a_killed_deletion_leaves_a_claim_that_is_dead(lived, gone):
    lived.claim(lived.key, generation=2, owner=gone)
    apply(lived, lived.key)
    assert left(lived) == NOTHING


def test_a_key_that_is_trained_now_is_refused(lived):
    lived.claim(lived.key, generation=2)
    with pytest.raises(RegistryError, match=r"trains it since .*; end that first, or wait"):
        plan(scope_of(lived), [lived.key])
    with pytest.raises(RegistryError, match="trains it since"):
        plan(scope_of(lived), [f"{lived.key}:aaaa"])


def test_a_training_without_a_claim_is_seen_by_its_lock(lived):
    with (
        held(lived.home / lived.key),
        pytest.raises(RegistryError, match=r"process \d+ trains it in"),
    ):
        plan(scope_of(lived), [lived.key])


def test_an_owner_elsewhere_is_watched_for_a_sign_of_life(lived):
    far = replace(this_owner(), boot="another machine")
    claim = lived.claim(lived.key, generation=2, owner=far)
    ended = threading.Event()

    def beat():
        number = 0
        while not ended.wait(0.05):
            number += 1
            lived.claims.update(replace(claim, beat=number))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(RegistryError, match="trains it since"):
            plan(scope_of(lived), [lived.key], QUICK)
    finally:
        ended.set()
        beating.join()
    apply(lived, lived.key)
    assert left(lived) == NOTHING


def test_a_training_that_begins_meanwhile_wins(lived):
    deletion = plan(scope_of(lived), [lived.key])
    lived.claim(lived.key, generation=2)
    with pytest.raises(RegistryError, match="a training has just begun; nothing is deleted"):
        deletion.apply()
    assert left(lived)["artifacts"]


def test_a_training_waits_for_the_deletion(lived):
    """Meanwhile the key is claimed, so that no other process trains what is half deleted."""
    deletion = plan(scope_of(lived), [lived.key])
    seen = []
    first = deletion.items[0]
    spy = replace(first, remove=lambda: seen.append(newest(lived.claims, lived.key)))
    replace(deletion, items=[spy, *deletion.items]).apply()
    assert (seen[0].generation, seen[0].state) == (2, "running")
    assert left(lived) == NOTHING


def test_one_run_of_a_key_leaves_the_others(house):
    recipe = make_recipe("train", house.root)
    oid = take_snapshot(house.root, house.root, recipe)
    for run_id, pointer in ((RUN, POINTER), ("b" * 32, OTHER)):
        make_run(house.root, recipe.key, run_id, pointer_md5=pointer, snapshot=oid)
    house.claim(recipe.key, state="finished", run_id=RUN)
    folder = house.folder(f"{recipe.key}-repeats-{'b' * 8}")
    RunPointer("x", run_id="b" * 32).write(folder)
    apply(house, f"{recipe.key}:aaaa")
    assert [r.run.run_id for r in LocalLibrary(house.home).matching(recipe.key)] == ["b" * 32]
    assert snapshot_refs(house.root, recipe.key)
    assert house.claims.of(recipe.key)
    assert folder.exists()
    apply(house, f"{recipe.key}:bbbb")
    assert not snapshot_refs(house.root, recipe.key)
    assert house.claims.of(recipe.key) == []
    assert not folder.exists()


def child_of(house, value, digest):
    """A run that was started from weights with a hash, which params.yaml named so."""
    preimages = {"params": {"model.init_from": f"sha256:{digest}"}}
    files = FILES | {
        "model/key.json": json.dumps({"preimages": preimages}).encode(),
        "model/weights.pt": b"other weights",
    }
    key = key_of("child")
    params = {"key": key, "model.init_from": value, "model.backbone_weights": "none"}
    return make_run(house.root, key, "c" * 32, files=files, params=params)


WEIGHTS = FILES["model/weights.pt"]


@pytest.mark.parametrize("value", ["best/model/weights.pt", "best/model", KEY, KEY[:16]])
def test_the_only_copy_of_what_a_run_was_started_from_stays(house, value):
    make_run(house.root, KEY, RUN)
    child = child_of(house, value, sha256_bytes(WEIGHTS))
    with pytest.raises(RegistryError) as refused:
        plan(scope_of(house), [KEY])
    assert str(refused.value) == (
        f"{KEY[:16]}: {child.label} was started from its weights (model.init_from), and there is no"
        f" other copy here; name {child.label} too, or put the file of `runkey get {KEY[:16]}"
        f" --only model` at {value}"
    )
    plan(scope_of(house), [KEY, child.key])
    copy = house.root / value / ("" if value.endswith(".pt") else "weights.pt")
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(b"not they")
    with pytest.raises(RegistryError, match="no other copy"):
        plan(scope_of(house), [KEY])
    copy.write_bytes(WEIGHTS)
    plan(scope_of(house), [KEY])


def test_a_repeat_with_the_same_weights_is_a_copy(house):
    make_run(house.root, KEY, RUN)
    make_run(house.root, KEY, "b" * 32)
    child_of(house, "gone.pt", sha256_bytes(WEIGHTS))
    plan(scope_of(house), [f"{KEY}:aaaa"])
    with pytest.raises(RegistryError, match="no other copy"):
        plan(scope_of(house), [KEY])


def test_other_initial_weights_are_no_reason(house):
    make_run(house.root, KEY, RUN)
    child_of(house, "gone.pt", "0" * 64)
    plan(scope_of(house), [KEY])


# As it is typed.


@pytest.fixture
def typed(house, monkeypatch):
    monkeypatch.chdir(house.root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("runkey.tracking.transfer.delete_run", lambda store, run: None)
    make_run(house.root, KEY, RUN, name="lr=5e-05")

    def run(*words):
        result = CliRunner().invoke(app, ["delete", *words])
        return result.exit_code, " ".join(result.output.split()), str(result.exception or "")

    return run


def test_the_command_lists_and_then_deletes(typed, house):
    code, said, _ = typed(KEY[:12])
    assert code == 0
    assert f"run {KEY[:16]}:aaaaaaaa" in said
    assert "lr=5e-05, FINISHED, AP 0.500" in said
    assert said.endswith("1 item, 40 B; --apply deletes them")
    assert LocalLibrary(house.home).matching(KEY)
    code, said, _ = typed(KEY, "--apply", "--json")
    answer = json.loads(said)
    assert (answer["applied"], answer["items"][0]["deleted"], answer["bytes"]) == (True, True, 40)
    assert LocalLibrary(house.home).matching(KEY) == []


def test_a_result_in_the_working_tree_is_named(typed, house):
    house.repository.write("run.json", json.dumps({"key": KEY}))
    _, said, _ = typed(KEY)
    assert said.endswith("`dvc repro --force train` trains it again")


def test_what_cannot_be_deleted_is_one_line_and_is_not_forgotten(typed, house):
    folder = house.root / "mlartifacts" / RUN / "artifacts" / "logs"
    if os.geteuid():
        folder.chmod(0o500)
    elif subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        code, said, error = typed(KEY, "--apply")
    finally:
        if os.geteuid():
            folder.chmod(0o700)
        else:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    assert (code, error) == (1, "1 of 1 could not be deleted")
    assert f"run {KEY[:16]}:aaaaaaaa: not deleted: {folder}" in said
    assert LocalLibrary(house.home).matching(KEY)
    assert typed(KEY, "--apply")[0] == 0
    assert LocalLibrary(house.home).matching(KEY) == []


def test_a_servers_runs_need_a_flag_of_their_own(typed, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://name:secret@127.0.0.1:9")
    code, _, error = typed(KEY)
    assert (code, error) == (
        1,
        "runs are on http://127.0.0.1:9; --server deletes them there, for everybody who uses it",
    )
