"""DVC's cache as files, against what DVC itself wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from runkey.dvc_transfer import commit_stages
from runkey.errors import RegistryError
from runkey.identity.dvc_yaml import cache_folder
from runkey.registry.dvc_cache import DvcCache, files_of, md5_file
from tests.support.recorded_checkout import Checkout, run


def test_a_runs_entry_and_those_around_it(checkout: Checkout) -> None:
    cache = DvcCache(checkout.root)
    entry = cache.entry_of(md5_file(checkout.root / "run.json"))
    assert entry
    assert entry.outs.keys() == {"model", "run.json", "metrics/train.json"}
    assert entry.deps.keys() == {"make.py", "prepared/images.bin"}
    # It took a file of a folder that the stage before it gave.
    outs = [set(one.outs) for one in cache.chain(entry)]
    assert outs == [{"prepared"}, set(entry.outs), {"evaluation"}]
    assert cache.chain(entry)[1] == entry


def test_outputs_that_dvc_did_not_make_are_put_into_its_cache(checkout: Checkout) -> None:
    pointer = md5_file(checkout.root / "run.json")
    before = DvcCache(checkout.root).entry_of(pointer)
    shutil.rmtree(cache_folder(checkout.root))
    assert DvcCache(checkout.root).entry_of(pointer) is None
    commit_stages(checkout.root, ["prepare", "train"])
    cache = DvcCache(checkout.root)
    entry = cache.entry_of(pointer)
    assert entry == before
    files = files_of(entry.outs, cache.listing)
    assert all(cache.object_path(md5).is_file() for md5 in files.values())
    assert [set(one.outs) for one in cache.chain(entry)] == [{"prepared"}, set(entry.outs)]
    shutil.rmtree(checkout.root / "model")
    with pytest.raises(
        RegistryError, match=r"`dvc commit train`.*model.*`dvc repro` takes the run"
    ):
        commit_stages(checkout.root, ["prepare", "train"])


def test_all_objects_are_there_uncached_outputs_too(checkout: Checkout) -> None:
    cache = DvcCache(checkout.root)
    entry = cache.entry_of(md5_file(checkout.root / "run.json"))
    assert entry
    files = files_of(entry.outs, cache.listing)
    assert sorted(files) == [
        "metrics/train.json",
        "model/",
        "model/key.json",
        "model/weights.pt",
        "run.json",
    ]
    for md5 in files.values():
        assert md5_file(cache.object_path(md5)) == md5.removesuffix(".dir")


def test_what_is_not_there(checkout: Checkout) -> None:
    cache = DvcCache(checkout.root)
    assert cache.entry_of("0" * 32) is None
    # evaluate took run.json and did not write it.
    assert cache.entry_of(md5_file(checkout.root / "make.py")) is None
    shutil.rmtree(cache.folder)
    assert cache.entry_of(md5_file(checkout.root / "run.json")) is None


@pytest.mark.parametrize(
    "content", [b"", b"[", b'{"a": 1}', json.dumps([{"relpath": "x", "md5": "../../etc"}]).encode()]
)
def test_a_torn_folder_object_lists_nothing(checkout: Checkout, content: bytes) -> None:
    cache = DvcCache(checkout.root)
    entry = cache.entry_of(md5_file(checkout.root / "run.json"))
    assert entry
    place = cache.object_path(entry.outs["model"])
    place.chmod(0o600)
    place.write_bytes(content)
    assert files_of({"model": entry.outs["model"]}, cache.listing) == {
        "model/": entry.outs["model"]
    }


def test_settings_say_where_the_cache_is(checkout: Checkout, tmp_path: Path) -> None:
    root = checkout.root
    assert cache_folder(root) == root / ".dvc" / "cache"
    run(root, "dvc", "cache", "dir", str(tmp_path / "shared"))
    assert cache_folder(root) == tmp_path / "shared"
    run(root, "dvc", "config", "--local", "cache.dir", "../mine")
    # A relative path given to DVC is meant from the current folder.
    assert cache_folder(root) == tmp_path / "mine"
    # git keeps .dvc/config, so a worktree has it; config.local stays behind.
    checkout.git("add", ".dvc/config")
    checkout.git("commit", "-q", "-m", "settings")
    checkout.git("worktree", "add", "-q", "--detach", str(tmp_path / "tree"))
    assert cache_folder(tmp_path / "tree") == tmp_path / "shared"
    (root / ".dvc" / "config.local").write_text("nonsense\n")
    with pytest.raises(RegistryError, match=r"config\.local: not a DVC settings file"):
        cache_folder(root)


def test_a_torn_entry_hides_no_whole_one(checkout: Checkout) -> None:
    pointer = md5_file(checkout.root / "run.json")
    cache = DvcCache(checkout.root)
    entry = cache.entry_of(pointer)
    assert entry
    whole = cache.runs / entry.path
    for digit in "0f":  # read before and after it
        whole.with_name(digit * 64).write_text(whole.read_text() + "more: [")
    assert DvcCache(checkout.root).entry_of(pointer) == entry
