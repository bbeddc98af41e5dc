"""`runkey gc`: which checkpoints may go; those that a training can go on from stay."""

import time

import pytest

from runkey.identity.key import training_folders
from runkey.identity.record import RunPointer
from runkey.tracking.replay import DESCRIPTION, find_training
from tests.support.collectable import KEY, held
from tests.support.records import key_of, make_run


def test_a_checkpoint_goes_when_a_run_of_its_key_is_finished(house):
    house.folder(KEY, 5000)
    other = key_of("two")
    house.folder(other)
    make_run(house.root, KEY, "a" * 32)
    make_run(house.root, other, "b" * 32, status="RUNNING", with_details=False)
    house.folder("rk2-not-a-key")
    [item] = house.items()
    assert (item.kind, item.size >= 5000) == ("checkpoint", True)
    house.claim(KEY)  # as when it is trained again with runtime.reuse false
    assert house.items() == []


def test_a_training_without_a_claim_keeps_its_folder(house):
    """As with runtime.mlflow false: what shows that somebody trains is the lock."""
    folder = house.folder(KEY, 5000)
    make_run(house.root, KEY, "a" * 32)
    with held(folder):
        assert house.items() == []
    assert [item.kind for item in house.items()] == ["checkpoint"]


@pytest.mark.parametrize("suffix", ["-backup", ".bak", "-repeats-", f"-repeats-{'a' * 9}", "0"])
def test_a_copy_of_a_folder_belongs_to_nobody(house, suffix):
    """Somebody made it, and what it is for nobody else knows."""
    make_run(house.root, KEY, "a" * 32)
    copied, own = (house.folder(f"{KEY}{end}") for end in (suffix, ""))
    for folder in (copied, own):
        (folder / DESCRIPTION).write_text("{}")
    assert training_folders(house.home) == training_folders(house.home, KEY[4:16]) == [own]
    assert find_training(house.home, KEY[:12]) == own
    (item,) = house.items()
    assert item.name == f"{KEY[:16]}/"
    house.apply()
    assert copied.is_dir()
    assert training_folders(house.home) == []
    assert find_training(house.home, KEY[:12]) is None


def test_a_failed_run_with_a_checkpoint_can_go_on_and_stays(house):
    checkpoint = house.folder(KEY)
    make_run(house.root, KEY, "b" * 32, status="KILLED", with_details=False)
    assert house.items() == []
    make_run(house.root, KEY, "a" * 32)
    assert {kind for kind, _ in house.offered()} == {"run", "checkpoint"}
    house.apply()
    assert not checkpoint.exists()


def test_what_a_repeat_can_go_on_from_stays_for_a_day(house):
    make_run(house.root, KEY, "a" * 32)
    repeated = {"key": KEY, "reproduction_of": "a" * 32}
    make_run(house.root, KEY, "b" * 32, status="KILLED", with_details=False, tags=repeated)
    folder = house.folder(f"{KEY}-repeats-{'a' * 8}")
    RunPointer("sqlite:///mlflow.db", run_id="b" * 32).write(folder)
    assert house.items() == []
    assert {kind for kind, _ in house.offered(now=time.time() + 90_000)} == {"run", "checkpoint"}
    make_run(house.root, KEY, "c" * 32, tags=repeated)
    assert house.items() == []  # another one may train there
    run, checkpoint = house.items(now=time.time() + 4000)
    assert run.name.endswith("b" * 32)
    assert checkpoint.name == f"{KEY[:16]}-repeats-{'a' * 8}/"
    checkpoint.remove()
    assert not folder.exists()
