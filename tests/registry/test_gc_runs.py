"""`runkey gc`: which runs may go and what goes with them; real records, claims, snapshots."""

import json
import time
from dataclasses import replace

from runkey.identity.key import make_recipe
from runkey.identity.record_cache import remove_record
from runkey.registry.claims import this_owner
from runkey.registry.gc import Scope, collect
from runkey.registry.library import LocalLibrary
from runkey.registry.snapshot import snapshot_refs, take_snapshot
from tests.support.collectable import KEY
from tests.support.records import key_of, make_run


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
    assert [r.run.run_id for r in LocalLibrary(house.home).matching(KEY)] == ["a" * 32]
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
    far = replace(this_owner(), boot="another machine")
    house.claim(keys["alive"], run_id="0" * 32)
    house.claim(keys["dead"], run_id="1" * 32, owner=gone)
    house.claim(keys["failed"], run_id="2" * 32, state="failed")
    house.claim(keys["far"], run_id="4" * 32, owner=far)
    assert house.offered() == {("run", "1" * 32), ("run", "2" * 32)}
    why = {item.name[-1]: item.why for item in house.items()}
    assert why["1"] == f"running, but its process {gone.label} is gone"


def test_a_training_that_was_resumed_is_not_dead(house, gone):
    make_run(house.root, KEY, "b" * 32, status="RUNNING", with_details=False)
    house.claim(generation=1, owner=gone, run_id="b" * 32)
    house.claim(generation=2, run_id="b" * 32)
    assert house.items() == []


def test_a_snapshot_goes_with_the_last_run_that_needs_it(house):
    recipe = make_recipe("train", house.root)
    oid = take_snapshot(house.root, house.root, recipe)
    for run_id, status in (("a" * 32, "FINISHED"), ("b" * 32, "FAILED")):
        make_run(house.root, recipe.key, run_id, status=status, snapshot=oid)
    house.apply()
    assert snapshot_refs(house.root, recipe.key)
    remove_record(house.home / "runs.sqlite", "a" * 32)
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

    def find(self, query):
        return self.library.find(query)

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
