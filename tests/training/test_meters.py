"""Late reading, means, pace, and what is printed."""

import time

import pytest
import torch

from runkey.progress import progress, want_bars
from runkey.training.progress import bar_text, clock, epoch_line
from runkey.training.state import (
    DelayedReader,
    Running,
    StepValues,
    Stopwatch,
    Throughput,
    timed,
)
from tests.support import toy


def test_values_come_one_step_late():
    reader = DelayedReader()
    values = {"loss": torch.tensor(2.0), "norm": torch.tensor(3.0)}
    assert reader.push(StepValues(1, (7, 8), {"train/lr": 0.1}, {}), values) is None
    values = {"loss": torch.tensor(4.0), "norm": torch.tensor(5.0)}
    first = reader.push(StepValues(2, (9,), {"train/lr": 0.2}, {}), values)
    assert (first.step, first.image_ids, first.rates) == (1, (7, 8), {"train/lr": 0.1})
    assert first.values == {"loss": 2.0, "norm": 3.0}
    assert reader.flush().values == {"loss": 4.0, "norm": 5.0}
    assert reader.flush() is None


def test_a_reading_does_not_change_with_its_tensor():
    reader, loss = DelayedReader(), torch.tensor(2.0)
    reader.push(StepValues(1, (), {"train/lr": 0.1}, {}), {"loss": loss})
    loss.fill_(9)
    assert reader.flush().values == {"loss": 2.0}


def test_means_leave_out_what_is_not_finite():
    running = Running()
    for value in (1.0, float("nan"), 3.0, float("inf")):
        running.add_values({"loss": value, "other": 1.0})
    running.add_values({"never": float("nan")})
    assert running.means() == {"loss": 2.0, "other": 1.0}


def test_waiting_is_counted():
    def slow():
        for ids in ([1, 2, 3], [4, 5]):
            time.sleep(0.05)
            yield toy.make_window(ids, 2)

    pace, watch = Throughput(), Stopwatch()
    for number, (window, waited) in enumerate(timed(slow())):
        assert len(window) == 2 - number
        time.sleep(0.05)
        pace.add(3 - number, waited, watch.lap())
    assert pace.images == 5
    assert pace.wait_seconds >= 0.1
    metrics = pace.as_metrics()
    assert 0.2 < metrics["train/data_wait_share"] < 0.8
    assert metrics["train/images_per_second"] == pytest.approx(5 / pace.seconds, rel=0.1)


def test_an_epoch_goes_on_where_another_process_left_it():
    pace = Running(images=30, wait_seconds=1.0, seconds=10.0)
    metrics = pace.as_metrics()
    assert metrics["train/images_per_second"] == pytest.approx(3.0, rel=0.1)
    assert metrics["train/data_wait_share"] == pytest.approx(0.1, rel=0.1)
    pace.add(30, 0.0, 5.0)
    assert pace.as_metrics()["train/images_per_second"] == pytest.approx(4.0)


def test_laps_add_up():
    watch = Stopwatch()
    time.sleep(0.05)
    first = watch.lap()
    assert first >= 0.05
    assert watch.lap() < first


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (130, "2m10s"), (11100, "3h05m")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


VALUES = {
    "train/epoch_loss": 3.2111,
    "train/epoch_loss_l1": 1.0,
    "train/grad_norm": 0.4123,
    "train/lr": 8.1e-4,
    "train/images_per_second": 52.13,
    "train/data_wait_share": 0.012,
    "val/AP": 0.51234,
    "val/AP50": 0.8,
    "val/AP75": 0.4,
    "val/loss": 2.5,
}


def test_epoch_line():
    line = epoch_line(7, 30, VALUES, 130, watched="val/AP", is_best=True)
    assert line.splitlines() == [
        "epoch  7/30  loss 3.211  grad 0.412  lr 8.10e-04  52.1 img/s  wait 1%  left 2m10s",
        "             val/AP 0.5123 (best)  val/AP50 0.8  val/loss 2.5",
    ]
    line = epoch_line(7, 30, VALUES, 130, watched="val/AP75", is_best=False)
    assert "val/AP75 0.4" in line
    assert "best" not in line
    train_only = {k: v for k, v in VALUES.items() if "val" not in k}
    line = epoch_line(7, 30, train_only, 130, watched="val/AP", is_best=False)
    assert line.endswith("wait 1%  left 2m10s")


def test_no_epoch_line_is_wider_than_100_columns():
    large = {name: value * 1e4 for name, value in VALUES.items() if "share" not in name}
    values = large | {"train/lr": 1e-4, "train/data_wait_share": 1.0, "val/AP75": 0.123456}
    text = epoch_line(1000, 1000, values, 360_000, watched="val/AP75", is_best=True)
    assert max(map(len, text.splitlines())) <= 100


def test_bar_text():
    assert bar_text(VALUES | {"train/loss": 3.0}, 41) == (
        "loss 3  grad 0.412  lr 8.10e-04  52.1 img/s  wait 1%  left 41s"
    )


def test_no_bar_without_a_terminal(capsys):
    for wanted in (False, True):
        want_bars(wanted)
        with progress("train", 10, lines=False) as steps:
            steps.advance(1, "text", "epoch 1/2")
    assert capsys.readouterr() == ("", "")
