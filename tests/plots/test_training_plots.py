"""The pictures and tables of a training, from whatever log there is."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runkey.errors import DataError
from runkey.plots.curves import (
    gradient_norm,
    learning_rate,
    loss_and_ap,
    machine,
    mark_events,
    write_plot_tables,
    write_training_plots,
)
from runkey.plots.log import GrowingLog, TrainingLog, read_log
from runkey.plots.style import drawing
from tests.support.figures import figure_of, labels_of
from tests.support.logs import LOGS, write_log

MOST_BYTES = 150_000
ROOT = Path(__file__).parents[2]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Callable[[str], list[Path]]:
    """The pictures of the log of a kind, drawn once."""

    @cache
    def draw(kind: str) -> list[Path]:
        folder = tmp_path_factory.mktemp("drawn")
        return write_training_plots(LOGS[kind](folder / "train.jsonl"), folder / "out")

    return draw


@pytest.mark.parametrize("kind", LOGS)
def test_every_log_gives_every_picture(drawn, kind):
    written = drawn(kind)
    assert [path.name for path in written] == [
        "loss_and_ap.png",
        "learning_rate.png",
        "gradient_norm.png",
        "throughput.png",
        "machine.png",
    ]
    for path in written:
        assert 1_000 < path.stat().st_size < MOST_BYTES
        with Image.open(path) as picture:
            assert picture.width == 900
            assert len(picture.getcolors(100_000)) > 2  # something is drawn


def test_every_log_gives_the_tables(any_log, tmp_path):
    steps, epochs, evaluations = write_plot_tables(any_log, tmp_path / "out")
    header = "step,lr,loss,grad_norm,grad_norm_clipped"
    assert steps.read_text().splitlines()[0] == header
    assert epochs.read_text().splitlines()[0] == "epoch,train_loss"
    assert evaluations.read_text().splitlines()[0] == "epoch,val_loss,AP,AP50"
    for table in (steps, epochs, evaluations):
        # A column is empty as a whole or not at all: DVC draws an empty cell as a zero.
        for column in zip(*(row.values() for row in rows(table)), strict=True):
            assert not any(column) or all(np.isfinite(float(value)) for value in column)


def test_same_log_same_bytes(drawn, tmp_path):
    once = [path.read_bytes() for path in drawn("stopped early")]
    log = drawn("stopped early")[0].parents[1] / "train.jsonl"
    again = [path.read_bytes() for path in write_training_plots(log, tmp_path / "again")]
    assert once == again
    assert not any(b"matplotlib" in content for content in once)


def test_what_happened_is_marked_where_it_happened(log_of, tmp_path):
    """Each kind by a shape and a colour of its own, named with how often it came."""
    with drawing(tmp_path / "drawn.png", "") as (axes,):
        mark_events(axes, read_log(log_of("troubled")))
    names = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert names == [
        *("3 skipped steps", "2 loss spikes", "rollback", "failed evaluation"),
        *("batch split", "resumed", "2 hints"),
    ]
    marks = [
        line for line in axes.lines if line.get_marker() != "None" and line.get_color() != "white"
    ]
    assert [list(line.get_xdata()) for line in marks] == [
        *([33, 34, 35], [60, 61], [37], [200], [7], [120], [40, 60])
    ]
    assert len({line.get_marker() for line in marks}) == len(marks)
    across = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "None"]
    assert across == [37, 120]  # lines where training went back or began again


def test_events_are_on_every_curve_over_steps(drawn, log_of, tmp_path):
    with_events = drawn("troubled")
    log = log_of("troubled")
    kept = [line for line in log.read_text().splitlines(True) if '"seen"' not in line]
    log.write_text("".join(kept))
    without = write_training_plots(log, tmp_path / "without")
    same = [
        a.name
        for a, b in zip(with_events, without, strict=True)
        if a.read_bytes() == b.read_bytes()
    ]
    assert same == ["machine.png"]


@pytest.mark.parametrize("gpus", [0, 2, 8])
@pytest.mark.parametrize("count", [1, 300])
def test_the_machine_is_drawn_from_its_samples(tmp_path, count, gpus):
    busy = {f"system/gpu_{g}_utilization_percentage": 90 - g for g in range(gpus)}
    memory = {f"system/gpu_{g}_memory_usage_megabytes": 30_000 for g in range(gpus)}
    values = {"system/cpu_utilization_percentage": 50, "system/process_memory_megabytes": 900}
    lines = [json.dumps({"time": 5.0 * n, "values": values | busy | memory}) for n in range(count)]
    (tmp_path / "train.jsonl").touch()
    empty = read_log(tmp_path / "train.jsonl")
    assert empty == TrainingLog()
    (tmp_path / "system.jsonl").write_text("\n".join([*lines, '{"time": 1, "val']))
    log = read_log(tmp_path / "train.jsonl")
    assert [sample.seconds for sample in log.samples] == [5.0 * n for n in range(count)]
    drawn = machine(log, tmp_path / "drawn.png").read_bytes()
    assert drawn != machine(empty, tmp_path / "empty.png").read_bytes()
    assert len(drawn) < MOST_BYTES


def test_a_log_is_read_on_as_it_grows(log_of, tmp_path):
    log = log_of("stopped early")
    whole = log.read_bytes()
    path = tmp_path / "growing.jsonl"
    growing = GrowingLog(path)
    with pytest.raises(FileNotFoundError):
        growing.update()
    for end in (0, 1_000, 1_001, 5_000, len(whole)):
        path.write_bytes(whole[:end])
        growing.update()
    assert growing.log == read_log(log)
    path.write_bytes(whole[:2_000])  # another training in the same place
    growing.update()
    assert 0 < len(growing.log.steps) < 10


def test_an_early_stop_shows(drawn):
    """The two logs differ only in how they end."""
    done, stopped = drawn("complete")[0], drawn("stopped early")[0]
    assert done.name == stopped.name == "loss_and_ap.png"
    assert done.read_bytes() != stopped.read_bytes()


def test_tables_hold_the_values(log_of, tmp_path):
    steps, epochs, evaluations = write_plot_tables(log_of("complete"), tmp_path)
    assert [row["step"] for row in rows(steps)][:3] == ["1", "5", "10"]
    assert float(rows(steps)[1]["lr"]) == pytest.approx(1e-3 / 6, rel=1e-4)
    assert [row["epoch"] for row in rows(epochs)] == [str(e) for e in range(1, 13)]
    assert [row["epoch"] for row in rows(evaluations) if float(row["AP"]) == 0.64] == ["8"]


def test_long_logs_are_thinned(tmp_path):
    line = '{{"step": {0}, "time": 0, "values": {{"train/lr": 0.1}}}}\n'
    log = tmp_path / "train.jsonl"
    log.write_text("".join(line.format(step) for step in range(1, 7001)))
    steps, *_ = write_plot_tables(log, tmp_path)
    assert 1000 < len(rows(steps)) <= 2000


def test_a_cut_line_loses_nothing_else(log_of):
    whole = read_log(log_of("complete"))
    part = read_log(log_of("interrupted"))
    assert 0 < len(part.steps) < len(whole.steps)
    assert [p.step for p in part.steps] == [p.step for p in whole.steps][: len(part.steps)]
    assert part.events.keys() == {"training_start"}


def test_resumed_log_counts_each_step_once(log_of):
    log = read_log(log_of("resumed"))
    whole = read_log(log_of("complete"))
    steps = [p.step for p in log.steps]
    assert steps == sorted(set(steps))
    assert steps == [p.step for p in whole.steps]
    assert [p.step for p in log.epochs] == [p.step for p in whole.epochs]


def test_unfinished_log_marks_the_best_so_far(log_of):
    log = read_log(log_of("interrupted"))
    steps, values = log.series("val/AP")
    assert log.best_step() == steps[np.argmax(values)]
    assert read_log(log_of("complete")).best_step() == 160
    assert read_log(log_of("empty")).best_step() is None


def test_warmup_drop_threshold_and_share_are_found(log_of, tmp_path):
    log = read_log(log_of("complete"))
    (axes,) = figure_of(learning_rate, log, folder=tmp_path).axes
    assert labels_of(axes) == ["warm-up, about 30 steps"]
    assert [list(line.get_xdata()) for line in axes.lines[1:]] == [[165, 165]]
    assert [text.get_text() for text in axes.texts] == ["x 0.1"]
    _, shares = figure_of(gradient_norm, log, folder=tmp_path).axes
    (line,) = shares.lines
    assert list(line.get_xdata()) == [20 * e for e in range(1, 13)]
    assert line.get_ydata()[0] == 100
    assert line.get_ydata()[-1] < 100
    # A cosine is steep at its end, but drops nowhere.
    for place, point in enumerate(log.steps):
        point.values["train/lr"] = 1 + math.cos(math.pi * place / (len(log.steps) - 1))
    (axes,) = figure_of(learning_rate, log, folder=tmp_path).axes
    assert len(axes.lines) == 1
    assert labels_of(axes) == []


def test_threshold_is_the_one_that_was_logged(log_of, tmp_path):
    def drawn():
        return labels_of(figure_of(gradient_norm, log, folder=tmp_path).axes[0], "threshold")

    log = read_log(log_of("complete"))
    assert drawn() == ["threshold 0.5"]
    for number, point in enumerate(log.steps):  # clipping by percentile
        point.values["train/clip_threshold"] = 0.2 + number / 100
    [label] = drawn()
    assert label.startswith("threshold 0.2 to 0.")
    for point in log.steps:  # clipping by value
        del point.values["train/clip_threshold"]
    assert drawn() == []


def test_the_gap_is_shown_at_the_best_epoch_and_at_the_end(log_of, tmp_path):
    def drawn(path):
        figure = figure_of(loss_and_ap, read_log(path), folder=tmp_path)
        return labels_of(figure.axes[0], "generalisation")

    expected = "generalisation gap:\n-0.5 at the best epoch,\n-0.167 at the end"
    assert drawn(log_of("complete")) == [expected]
    expected = "generalisation gap:\n-0.5 at the best epoch,\nthe last"
    assert drawn(write_log(tmp_path / "log.jsonl", epochs=8)) == [expected]
    assert drawn(log_of("no evaluation")) == []


def test_the_rate_of_every_parameter_group_is_drawn(log_of, tmp_path):
    log = read_log(log_of("complete"))
    for point in log.steps:
        point.values["train/lr_backbone"] = 0.1 * point.values["train/lr"]
    (axes,) = figure_of(learning_rate, log, folder=tmp_path).axes
    assert labels_of(axes) == ["backbone", "all other parameters", "warm-up, about 30 steps"]


def test_no_log(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl: not found; run `dvc repro train` first"):
        write_training_plots(tmp_path / "train.jsonl", tmp_path)


def test_curves_need_neither_torch_nor_pyplot():
    """Reports of runs are drawn where nothing is trained; torch alone takes seconds to import."""
    check = (
        "import sys, runkey.plots.curves, runkey.plots.evaluation\n"
        "print(sorted({'torch', 'mlflow', 'dvc', 'pycocotools', 'matplotlib.pyplot'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_what_steps_and_epochs_log_alike_is_a_curve_that_goes_forward():
    log = TrainingLog()
    for step in range(1, 7):
        log.add({"step": step, "time": step, "values": {"train/loss": 1.0, "train/lr": step / 10}})
        if step % 3 == 0:
            epoch = {"train/epoch_loss": 1.0, "train/lr": step / 10}
            log.add({"step": step, "time": step, "values": epoch})
    assert log.series("train/lr")[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert log.series("train/epoch_loss")[0].tolist() == [3, 6]
