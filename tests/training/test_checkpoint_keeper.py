"""Checkpoints in a folder: what is kept, what is loaded, what is said when it goes wrong."""

import os
import shutil
import subprocess
import threading

import pytest
import torch

from runkey.training.checkpoint import newest_fingerprint, read_facts
from tests.support import checkpoint_kit as kit


def run(training, checkpoints, steps, wait=True):
    for _ in range(steps):
        training.step()
        checkpoints.save(training.checkpoint(), wait=wait)
    checkpoints.finish()


def names(folder, pattern="*"):
    return sorted(path.name for path in folder.glob(pattern))


def when_written(path):
    """Not its whole status: reading it changes that, too."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_goes_on_from_the_newest(tmp_path, open_checkpoints):
    training = kit.Training()
    run(training, open_checkpoints(), 3)
    loaded = open_checkpoints().load()
    expected = training.checkpoint()
    assert (loaded.step, loaded.state, loaded.position) == (3, expected.state, expected.position)
    assert kit.equal(loaded.parts["model"], dict(expected.parts["model"]))
    assert kit.equal(loaded.parts["optimizer"], expected.parts["optimizer"])
    assert loaded.changes == ""
    assert names(tmp_path) == ["step-00000002.ckpt", "step-00000003.ckpt"]


def test_a_loaded_training_goes_on_as_the_other(open_checkpoints):
    training = kit.Training()
    run(training, open_checkpoints(), 2)
    other, content = kit.Training(), open_checkpoints().load()
    other.state.step = content.step
    other.model.load_state_dict(content.parts["model"])
    other.optimizer.load_state_dict(content.parts["optimizer"])
    training.step()
    other.step()
    assert kit.equal(dict(other.model.state_dict()), dict(training.model.state_dict()))
    assert kit.equal(other.optimizer.state_dict(), training.optimizer.state_dict())


def test_training_goes_on_while_it_is_written(open_checkpoints, monkeypatch):
    """What the copy held when `save` returned is what is on disk."""
    training, checkpoints, go_on = kit.Training(), open_checkpoints(), threading.Event()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (go_on.wait(30), sync(file)))
    training.step()
    expected = {k: v.clone() for k, v in training.model.state_dict().items()}
    checkpoints.save(training.checkpoint())
    for _ in range(3):
        training.step()
    assert not kit.equal(expected, dict(training.model.state_dict()))
    go_on.set()
    checkpoints.finish()
    loaded = open_checkpoints().load()
    assert loaded.step == 1
    assert kit.equal(loaded.parts["model"], expected)


def test_is_not_due_while_one_is_written_unless_each_step_is(open_checkpoints, monkeypatch):
    go_on = threading.Event()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (go_on.wait(30), sync(file)))
    training = kit.Training()
    seldom, each = open_checkpoints(seconds=1e-9), open_checkpoints(seconds=0)
    for checkpoints in (seldom, each):
        assert checkpoints.due()
        checkpoints.save(training.checkpoint())
    assert not seldom.due()
    assert each.due()
    go_on.set()
    seldom.finish()
    each.finish()
    assert seldom.due()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_bad_file_falls_back_and_says_so(tmp_path, open_checkpoints, damage, lines):
    training = kit.Training()
    run(training, open_checkpoints(), 3)
    newest = tmp_path / "step-00000003.ckpt"
    content = newest.read_bytes()
    match damage:
        case "cut":
            newest.write_bytes(content[: len(content) // 2])
        case "flipped":
            newest.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
        case "empty":
            newest.write_bytes(b"")
        case "foreign":
            torch.save({"model": {}}, newest)
    again = open_checkpoints()
    assert again.load().step == again.newest == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"{newest}: it")
    assert lines[0].endswith("; the one before it is used, if there is one")
    # Nor does it count as one of the two that are kept.
    training.state.step = 2
    run(training, again, 1)
    assert names(tmp_path) == [
        "step-00000002.ckpt",
        "step-00000003.ckpt",
        "step-00000003.ckpt.bad",
    ]
    assert open_checkpoints().load().step == 3


def test_all_files_bad_is_a_new_start(tmp_path, open_checkpoints, lines):
    run(kit.Training(), open_checkpoints(), 2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"nothing")
    again = open_checkpoints()
    assert again.load() is None
    assert again.newest is None
    assert len(lines) == 2


def test_another_key_is_refused(tmp_path, open_checkpoints, lines):
    other = "rk2-" + "b" * 64
    run(kit.Training(), open_checkpoints(key=other), 1)
    assert open_checkpoints().load() is None
    assert f"step-00000001.ckpt: it is of another key, {other}; " in lines[0]


def test_another_micro_batch_or_device_is_told(open_checkpoints):
    run(kit.Training(), open_checkpoints(), 1)
    loaded = open_checkpoints(micro_batch=2, device="cuda").load()
    assert loaded.changes == "micro_batch 4 -> 2, device cpu -> cuda"


def test_the_fingerprint_is_known_before_a_model_is_built(tmp_path, open_checkpoints):
    assert newest_fingerprint(tmp_path / "none") is None
    assert newest_fingerprint(tmp_path) is None
    run(kit.Training(), open_checkpoints(micro_batch=3), 2)
    assert newest_fingerprint(tmp_path) == kit.FINGERPRINT | {"micro_batch": 3}
    (tmp_path / "step-00000002.ckpt").write_bytes(b"")
    assert newest_fingerprint(tmp_path)["micro_batch"] == 3


def test_best_weights_are_written_once_each(tmp_path, open_checkpoints):
    training, checkpoints = kit.Training(), open_checkpoints()
    run(training, checkpoints, 1)
    assert names(tmp_path, "best*") == []
    training.evaluate()
    run(training, checkpoints, 2)
    (first,) = tmp_path.glob("best-00000001-*.pt")
    written = when_written(first)
    run(training, checkpoints, 3)
    assert when_written(first) == written
    again = open_checkpoints()
    loaded = again.load()
    assert kit.equal(loaded.best_weights, training.state.best_weights)
    training.state.best_weights = loaded.best_weights
    run(training, again, 1)
    assert when_written(first) == written
    training.evaluate()
    run(training, again, 1)
    assert len(names(tmp_path, "best*")) == 2  # the older checkpoint still needs the first
    run(training, again, 1)
    assert names(tmp_path, "best-00000007*") == names(tmp_path, "best*")


@pytest.mark.parametrize("damage", ["gone", "other", "cut"])
def test_a_checkpoint_without_its_best_weights_is_not_used(
    tmp_path, open_checkpoints, damage, lines
):
    training, checkpoints = kit.Training(), open_checkpoints()
    run(training, checkpoints, 1)
    training.evaluate()
    run(training, checkpoints, 1)
    (best,) = tmp_path.glob("best*")
    match damage:
        case "gone":
            best.unlink()
        case "other":
            shutil.copy(tmp_path / "step-00000001.ckpt", best)
        case "cut":
            best.write_bytes(best.read_bytes()[:-1])
    assert open_checkpoints().load().step == 1
    assert "its best weights, best-00000001-" in lines[0]


def test_what_a_killed_process_left_goes(tmp_path, open_checkpoints):
    run(kit.Training(), open_checkpoints(), 1)
    (tmp_path / "step-00000002.ckpt.tmp").write_bytes(b"half")
    (tmp_path / "best.pt.tmp").write_bytes(b"half")
    (tmp_path / "train.jsonl").write_text("{}\n")
    open_checkpoints()
    assert names(tmp_path) == ["step-00000001.ckpt", "train.jsonl"]


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_numbers_that_are_not_finite_are_never_written(tmp_path, open_checkpoints, part, lines):
    training = kit.Training()
    checkpoints = open_checkpoints()
    run(training, checkpoints, 2)
    if part == "model":
        training.model[0].weight.data[0, 0, 0, 0] = float("nan")
    else:
        moments = training.optimizer.state_dict()["state"][0]
        moments["exp_avg_sq"][0] = float("inf")
    training.state.step += 1
    checkpoints.save(training.checkpoint(), wait=True)
    checkpoints.save(training.checkpoint(), wait=True)
    assert names(tmp_path) == ["step-00000001.ckpt", "step-00000002.ckpt"]
    assert lines == [
        f"{tmp_path}: no checkpoint is written (weights or moments are not finite); "
        "training goes on, the newest is of step 2"
    ]


def test_anchors(tmp_path, open_checkpoints):
    training, checkpoints = kit.Training(), open_checkpoints()
    checkpoints.save(training.checkpoint(), anchor=True)
    run(training, checkpoints, 3)
    assert checkpoints.load_anchor(3).step == 0
    checkpoints.save(training.checkpoint(), anchor=True)
    assert checkpoints.load_anchor(3).step == 3
    assert checkpoints.load_anchor(2).step == 0  # training could go on from step 2
    run(training, checkpoints, 1)
    again = open_checkpoints()
    assert again.load_anchor(2) is None  # no more
    assert again.load_anchor(9).step == 3
    assert again.load().step == 4
    assert names(tmp_path) == ["anchor-00000003.ckpt", "step-00000003.ckpt", "step-00000004.ckpt"]


def test_a_full_disk_is_said_once_and_nothing_is_lost(small_disk, open_checkpoints, lines):
    training = kit.Training(width=600)
    checkpoints = open_checkpoints(small_disk)
    run(training, checkpoints, 2)
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * shutil.disk_usage(small_disk).free)
    before = {path.name: path.read_bytes() for path in small_disk.glob("*.ckpt")}
    run(training, checkpoints, 2)
    assert lines == [
        f"{small_disk}: no checkpoint is written (No space left on device); training goes on, "
        "the newest is of step 2"
    ]
    assert {path.name: path.read_bytes() for path in small_disk.glob("*.ckpt")} == before
    assert names(small_disk, "*.tmp") == []
    assert checkpoints.newest == 2
    filler.unlink()
    run(training, checkpoints, 1)
    assert lines[1:] == [f"{small_disk}: checkpoints are written again, now of step 5"]
    assert open_checkpoints(small_disk).load().step == 5


def test_after_a_failure_it_is_tried_again_later(small_disk, open_checkpoints):
    training = kit.Training(width=600)
    checkpoints = open_checkpoints(small_disk, retry_seconds=60)
    (small_disk / "filler").write_bytes(b"\0" * shutil.disk_usage(small_disk).free)
    assert checkpoints.due()
    run(training, checkpoints, 1)
    assert not checkpoints.due()


def test_a_read_only_folder_is_gone_on_from(small_disk, open_checkpoints, lines):
    training = kit.Training()
    run(training, open_checkpoints(small_disk), 1)
    (small_disk / "best.pt.tmp").touch()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    checkpoints = open_checkpoints(small_disk)
    assert checkpoints.load().step == 1
    run(training, checkpoints, 2)
    assert len(lines) == 1
    assert "no checkpoint is written (Read-only file system); training goes on" in lines[0]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    run(training, checkpoints, 1)
    assert open_checkpoints(small_disk).load().step == 4


def test_facts_name_what_trains(tmp_path, open_checkpoints):
    run(kit.Training(), open_checkpoints(), 1)
    facts = read_facts(tmp_path / "step-00000001.ckpt")
    assert facts == {"step": 1, "fingerprint": kit.FINGERPRINT, "best": None, "best_hash": None}
