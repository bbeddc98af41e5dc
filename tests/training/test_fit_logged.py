"""What the loop tells while it trains: values for the tracker, a line per epoch."""

import pytest

from tests.support import toy
from tests.support.toy import run, same


def test_tracker_gets_every_value():
    tracker = toy.MemoryTracker()
    result = run(toy.make_params(runtime={"log_every": 2}), tracker=tracker)
    step_logs = [(s, v) for s, v in tracker.logged if "train/loss" in v]
    epoch_logs = [(s, v) for s, v in tracker.logged if "train/epoch_loss" in v]
    assert [s for s, _ in step_logs] == [1, 2, 4, 6, 8]
    assert [s for s, _ in epoch_logs] == [3, 6, 9]
    assert set(step_logs[0][1]) == {
        "train/loss",
        "train/loss_classification",
        "train/loss_l1",
        "train/grad_norm",
        "train/grad_norm_clipped",
        "train/clip_threshold",
        "train/lr",
        "train/lr_backbone",
        "train/images_per_second",
        "train/data_wait_share",
        "train/epoch",
    }
    assert set(epoch_logs[0][1]) == {
        "train/epoch_loss",
        "train/epoch_loss_classification",
        "train/epoch_loss_l1",
        "train/grad_norm",
        "train/grad_norm_clipped",
        "train/clip_threshold",
        "train/lr",
        "train/lr_backbone",
        "train/images_per_second",
        "train/data_wait_share",
        "train/epoch",
        "train/skipped_steps",
        "train/loss_spikes",
        "val/loss_gap",
        "val/loss",
        "val/AP",
    }
    assert [v["train/epoch"] for _, v in step_logs] == pytest.approx(
        [s / 3 for s in (1, 2, 4, 6, 8)]
    )
    assert [kind for kind, _ in tracker.events] == ["training_start", "training_end"]
    assert tracker.events[0][1]["precision"] == "fp32"
    assert result.history[1]["val/loss"] == epoch_logs[1][1]["val/loss"]
    assert all(0 <= v["train/data_wait_share"] <= 1 for _, v in tracker.logged)
    assert all(v["train/images_per_second"] > 0 for _, v in tracker.logged)
    assert all(v["train/grad_norm_clipped"] <= 0.1 + 1e-6 for _, v in step_logs)


def test_epoch_loss_is_the_mean_of_its_steps():
    tracker = toy.MemoryTracker()
    result = run(toy.make_params(training={"epochs": 2}), tracker=tracker)
    losses = [v["train/loss"] for _, v in tracker.logged if "train/loss" in v]
    assert len(losses) == 6
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [e["train/epoch_loss"] for e in result.history] == pytest.approx(means)


def test_every_groups_rate_is_logged():
    tracker = toy.MemoryTracker()
    optimizer = {"backbone_lr_factor": 0.1, "decay_norm_and_bias": False}
    schedule = {"name": "multistep", "milestones": [2]}
    run(toy.make_params(lr=1e-3, schedule=schedule, optimizer=optimizer), tracker=tracker)
    main = [v["train/lr"] for _, v in tracker.logged]
    backbone = [v["train/lr_backbone"] for _, v in tracker.logged]
    assert main[0] == pytest.approx(1e-3)
    assert main[-1] == pytest.approx(1e-4)
    assert backbone == pytest.approx([rate / 10 for rate in main])


def test_logged_rate_is_the_schedules():
    tracker = toy.MemoryTracker()
    run(
        toy.make_params(lr=1e-3, schedule={"name": "multistep", "milestones": [1, 2]}),
        tracker=tracker,
    )
    rates = [v["train/lr"] for _, v in tracker.logged if "train/loss" in v]
    # Nine steps: warm-up of round(0.45) = 0 steps, drops at steps 3 and 6.
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 3 + [1e-5] * 3)


def test_a_tracker_that_breaks_does_not_stop_training(lines):
    class Broken(toy.MemoryTracker):
        def log(self, values, step):
            if step >= 4:
                raise OSError("disk full")
            super().log(values, step)

    broken = run(tracker=Broken())
    assert same(broken.best_weights, run().best_weights)
    assert len(broken.history) == 3
    assert [line for line in lines if "tracking" in line] == [
        "tracking stopped, training goes on: OSError: disk full"
    ]


def test_logs_one_line_per_epoch(lines):
    run()
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 3
    for word in ("loss ", "grad ", "lr ", "img/s", "wait ", "val/loss ", "left "):
        assert word in epochs[0]
    assert epochs[-1].splitlines()[0].endswith("left 0s")
    assert "(best)" in epochs[0]
    assert lines[0] == "precision: fp32 (auto: mixed precision does not pay on a CPU)"
    assert lines[-1].startswith("all 3 epochs done; kept the weights of epoch ")
