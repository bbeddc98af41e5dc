"""An archive taken in for real: a real MLflow store, a real repository, DVC's cache."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runkey.errors import RegistryError, TrackingError
from runkey.identity.record import DETAILS, ORIGIN
from runkey.identity.record_cache import update_record
from runkey.registry.dvc_cache import DvcCache, files_of, pointer_md5
from runkey.registry.library import LocalLibrary
from runkey.registry.package import CONTENT, RUN, collect
from runkey.registry.share import Carried, Checkout, export_run, import_run
from runkey.registry.snapshot import has_snapshot
from runkey.tracking.store import Store, open_client
from runkey.tracking.transfer import StoreRuns
from tests.support.attacks import packed
from tests.support.run_package import (
    CODE_MD5,
    DEPS,
    Ready,
    add_entry,
    add_folder,
    add_object,
    entry_text,
    weights,
)


def checkout(store: Store, runs: StoreRuns | None = None) -> Checkout:
    library, runs = LocalLibrary(store.home), runs or StoreRuns(store, "tests")
    return Checkout(store.home.parent, store.home, library, runs)


def take(archive: Path, store: Store, runs: StoreRuns | None = None) -> Carried:
    return import_run(archive, checkout(store, runs))


def test_an_archive_gives_the_run_back(ready: Ready, archive: Path, store: Store) -> None:
    root = store.home.parent
    done = take(archive, store)
    assert done.is_new
    run = open_client(store).get_run(done.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "lr=0.1")
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_000, 1_700_000_060_000)
    assert run.data.tags[ORIGIN] == "a" * 32
    assert run.data.tags["key"] == run.data.params["key"] == ready.key
    loss = open_client(store).get_metric_history(done.run_id, "loss")
    assert [(m.step, str(m.value)) for m in loss] == [(0, "2.0"), (1, "nan")]
    assert has_snapshot(root, ready.snapshot)
    cache = DvcCache(root)
    entry = cache.entry_of(ready.pointer_md5)
    assert entry
    assert all(cache.object_path(m).is_file() for m in files_of(entry.outs, cache.listing).values())
    assert cache.object_path(ready.pointer_md5).stat().st_mode & 0o777 == 0o444
    (record,) = LocalLibrary(store.home).matching(ready.key)
    assert record.is_whole
    assert record.run.run_id == done.run_id
    assert [p.name for p in store.home.iterdir()] == ["runs.sqlite"]
    # Once more: it is known by its origin, and stays one run.
    again = take(archive, store)
    assert (again.run_id, again.is_new) == (done.run_id, False)
    # And on: the copy's copy still names the first one.
    further = archive.with_name("further.zip")
    export_run(record, checkout(store), further)
    assert take(further, store).run_id == done.run_id


class Breaks(StoreRuns):
    """A store that goes away before the last step."""

    def write(self, folder: Path) -> Any:
        raise TrackingError("gone")


def test_an_interrupted_import_shows_no_run_and_can_be_repeated(
    ready: Ready, archive: Path, store: Store
) -> None:
    with pytest.raises(TrackingError):
        take(archive, store, Breaks(store, "tests"))
    assert list(store.home.iterdir()) == []
    assert LocalLibrary(store.home).matching(ready.key) == []
    assert open_client(store).search_experiments(filter_string="name = 'tests'") == []
    assert take(archive, store).is_new


def test_a_half_copy_is_deleted_by_the_next(ready: Ready, archive: Path, store: Store) -> None:
    client = open_client(store)
    experiment = client.create_experiment("tests", (store.home.parent / "mlartifacts").as_uri())
    half = client.create_run(experiment, tags={ORIGIN: "a" * 32})
    client.log_text(half.info.run_id, "half", "dvc.json")
    done = take(archive, store)
    assert not (store.home.parent / "mlartifacts" / half.info.run_id).exists()
    assert client.get_run(half.info.run_id).info.lifecycle_stage == "deleted"
    found = client.search_runs([experiment], f"tags.{ORIGIN} = '{'a' * 32}'")
    assert [run.info.run_id for run in found] == [done.run_id]


def test_what_is_missing_is_named_before_a_file_is_written(
    ready: Ready, archive: Path, store: Store
) -> None:
    root = store.home.parent
    take(archive, store)
    (record,) = LocalLibrary(store.home).matching(ready.key)
    cache = DvcCache(root)
    entry = cache.entry_of(ready.pointer_md5)
    assert entry
    listed = files_of(entry.outs, cache.listing)
    cache.object_path(listed["model/weights.safetensors"]).unlink()
    target = archive.with_name("new.zip")
    with pytest.raises(RegistryError, match=r"DVC's cache lacks model/weights\.safetensors"):
        export_run(record, checkout(store), target)
    (cache.runs / entry.path).unlink()
    with pytest.raises(RegistryError, match="has no entry of this run"):
        export_run(record, checkout(store), target)
    assert not target.exists()


def test_each_evaluation_of_a_run_is_handed_on(ready: Ready, archive: Path, store: Store) -> None:
    """Two entries have an output of the same path, with another content each."""
    root = store.home.parent
    take(archive, store)
    for content in (b"first", b"second"):
        md5 = add_object(root, content)
        deps = {"run.json": ready.pointer_md5, "stages/train.py": CODE_MD5}
        params = {"params.yaml": {"evaluate.threshold": len(content)}}
        add_entry(root, *entry_text(deps, {"metrics.json": md5}, params=params))
    (record,) = LocalLibrary(store.home).matching(ready.key)
    done = export_run(record, checkout(store), archive.with_name("more.zip"))
    assert len(collect(DvcCache(root), ready.pointer_md5, "rk2-test").entries) == 3
    shutil.rmtree(DvcCache(root).runs)
    assert done.files == take(archive.with_name("more.zip"), store).files
    assert len(collect(DvcCache(root), ready.pointer_md5, "rk2-test").entries) == 3


def test_a_stage_of_another_run_with_the_same_outputs_is_left_out(
    ready: Ready, archive: Path, store: Store
) -> None:
    """`prepare` writes the same splits whatever the seed."""
    root = store.home.parent
    take(archive, store)
    prepared = add_object(root, b"splits")
    outs = {"model": add_folder(root, {"weights.safetensors": weights(5)})}
    pointer = add_object(root, b"another run.json")
    add_entry(root, *entry_text({"prepared.json": prepared}, outs | {"run.json": pointer}))
    for seed in (1, 1.0, 2):
        params = {"params.yaml": {"seed": seed, "model": {"init_from": "x"}, "unknown": 3}}
        add_entry(root, *entry_text(DEPS, {"prepared.json": prepared}, params=params))
    cache = DvcCache(root)
    assert len(collect(cache, pointer, "rk2-test").entries) == 4
    named = {"seed": "1", "model.init_from": "y"}
    own = collect(cache, pointer, "rk2-test", named).entries
    assert len(own) == 3
    assert not any("seed: 2" in text for text in own.values())


def test_a_failed_run_is_not_handed_on(ready: Ready, archive: Path, store: Store) -> None:
    done = take(archive, store)
    (record,) = LocalLibrary(store.home).matching(ready.key)
    failed = replace(record, run=replace(record.run, status="FAILED"))
    with pytest.raises(RegistryError, match=f"run {done.run_id} is FAILED; only a finished run"):
        export_run(failed, checkout(store), archive.with_name("new.zip"))


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_all_that_is_made_follows_the_umask(archive: Path, store: Store, umask: int) -> None:
    """Run, artifacts, records, DVC's objects and entries, git's objects, the archive."""
    root = store.home.parent
    there = set(root.rglob("*"))
    before = os.umask(umask)
    try:
        take(archive, store)
        (record,) = LocalLibrary(store.home).matching("rk2-")
        export_run(record, checkout(store), root / "new.zip")
    finally:
        os.umask(before)
    made = [path for path in set(root.rglob("*")) - there if ".git" not in path.parts]
    assert {"new.zip", "runs.sqlite", "record.json", "runs", "md5"} <= {path.name for path in made}
    for path in made:
        full = 0o777 if path.is_dir() else 0o666
        if "files" in path.parts and path.is_file():  # DVC's objects are read-only
            full = 0o444
        assert path.stat().st_mode & 0o777 == full & ~umask, path


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_run_in_another_encoding_is_taken(
    ready: Ready, store: Store, tmp_path: Path, encoding: str
) -> None:
    """JSON may be in each of them, and what reads it first takes each."""
    package = shutil.copytree(ready.folder, tmp_path / "package")
    content = package / RUN / CONTENT
    content.write_bytes(content.read_text(encoding="utf-8").encode(encoding))
    carried = take(packed(package, ready.key), store)
    assert [run.key for run in LocalLibrary(store.home).matching(ready.key)] == [ready.key]
    assert carried


def test_a_run_that_dvc_did_not_start_is_found_by_its_file(
    ready: Ready, archive: Path, store: Store
) -> None:
    """As torchrun and a person start it; `dvc repro` took it, or `dvc commit` its outputs."""
    root = store.home.parent
    take(archive, store)
    library = LocalLibrary(store.home)
    (record,) = library.matching(ready.key)
    assert record.details
    details = replace(record.details, pointer_md5=None)
    library.path_of(record, DETAILS).write_text(details.as_json())
    update_record(store.cache, record.run, details)
    (record,) = library.matching(ready.key)
    assert pointer_md5(library, record) == ready.pointer_md5
    by_hand = archive.with_name("by-hand.zip")
    export_run(record, checkout(store), by_hand)
    shutil.rmtree(DvcCache(root).folder)
    take(by_hand, store)
    assert DvcCache(root).entry_of(ready.pointer_md5)
    shutil.rmtree(DvcCache(root).runs)
    with pytest.raises(
        RegistryError, match="`dvc repro` where the tree has this key takes the run"
    ):
        export_run(record, checkout(store), archive.with_name("gone.zip"))
