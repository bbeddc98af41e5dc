"""Hints: each from a log that calls for it, none from a log that does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runkey.evaluation.coco import ClassResult
from runkey.params import load_params
from runkey.plots.hints import (
    CLASS_SCORES,
    DATA,
    Hint,
    HintingTracker,
    all_hints,
    class_scores,
    data_facts,
    find_hints,
    lasting_hints,
    logged_hints,
)
from runkey.plots.log import Point, TrainingLog, read_log
from runkey.tracking.log import JsonlLog

ROOT = Path(__file__).parents[2]
PARAMS = {
    "lr": 1e-4,
    "model.backbone_weights": "none",
    "optimizer.clip.mode": "norm",
    "optimizer.clip.threshold": 0.5,
    "training.batch_size": 8,
    "training.micro_batch": 2,
    "runtime.workers": "auto",
}
EPOCHS, STEPS = 6, 10


def made(step=None, epoch=None, samples=(), **events) -> TrainingLog:
    """A log of six epochs; healthy but for what `step(step)` and `epoch(epoch)` change."""
    log = TrainingLog(samples=list(samples))
    for number in range(1, EPOCHS * STEPS + 1):
        values = {
            "train/grad_norm": 0.4 + 0.3 * (number % 3),
            "train/data_wait_share": 0.02,
            "train/lr": 1e-4,
            "train/epoch": number / STEPS,
        } | (step(number) if step else {})
        values["train/grad_norm_clipped"] = min(values["train/grad_norm"], 0.5)
        log.add({"step": number, "time": number, "values": values})
        if number % STEPS == 0:
            at = number // STEPS
            values = {
                "train/epoch_loss": 10 / (1 + at),
                "val/loss": 11 / (1 + at),
                "val/AP": 0.1 * at,
                "train/skipped_steps": 0,
                "train/epoch": at,
            } | (epoch(at) if epoch else {})
            log.add({"step": number, "time": number, "values": values})
    for kind, fields in events.items():
        log.add({"time": 0, "event": kind, "fields": fields})
    return log


def samples(**values) -> list[Point]:
    return [Point(n, n, {f"system/{name}": v for name, v in values.items()}) for n in range(20)]


GPU = {"gpu_0_utilization_percentage": 90, "gpu_0_memory_usage_percentage": 80}
SCORES = {"classes": 3, "mean_AP50": 0.4, "never_found": ["cat"], "never_found_count": 1}
CASES = {
    "loader": ({"step": lambda s: {"train/data_wait_share": 0.3}}, [], "30% of its time"),
    "host_memory": ({}, samples(system_memory_usage_percentage=95), "95% of the host's memory"),
    "host": ({}, samples(**GPU | {"gpu_0_utilization_percentage": 35}), "busy 35% of the time"),
    "gpu_memory": ({}, samples(**GPU | {"gpu_0_memory_usage_percentage": 99}), "99% of the GPU"),
    "lr_high": (
        {"epoch": lambda e: {"train/epoch_loss": 5 if e < 4 else 6}},
        [],
        "the training loss has risen from 5 to 6",
    ),
    "lr_low": (
        {"epoch": lambda e: {"train/epoch_loss": 9.0 - 0.01 * e, "val/AP": 0.001}},
        [],
        "fallen by 0.6% in 6 epochs",
    ),
    "overfitting": (
        {"epoch": lambda e: {"val/loss": 5 + 0.3 * abs(e - 2)}},
        [],
        "since epoch 2 the validation loss has risen from 5 to 6.2",
    ),
    "class": ({CLASS_SCORES: SCORES}, [], "1 of 3 classes never found (AP50 0): cat"),
}


FACTS = {
    "images": 400,
    "objects": 1809,
    "judged_objects": 441,
    "quarter_below": 11.2,
    "stride": 8,
    "rare": [],
    "rare_count": 0,
}
"""Of the sample: data that call for no hint."""
CASES |= {
    "scratch": ({DATA: FACTS | {"images": 160, "objects": 173}}, [], "only 160 images with 173"),
    "small_objects": ({DATA: FACTS | {"quarter_below": 4.8}}, [], "are under 4.8 pixels"),
    "few_objects": (
        {DATA: FACTS | {"rare": ["king (8)"], "rare_count": 1}},
        [],
        "1 class with under 10 objects to train on: king (8)",
    ),
    "few_val": (
        {DATA: FACTS | {"judged_objects": 46}},
        [],
        "measured on 46 objects: an AP50 of 0.8",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_hint_comes_when_it_should_and_alone(kind):
    changed, machine, seen = CASES[kind]
    [hint] = find_hints(made(**changed, samples=machine), PARAMS)
    assert hint.kind == kind
    assert seen in hint.seen
    assert "." in hint.change or "lr" in hint.change  # names a parameter
    assert max(map(len, hint.lines())) <= 100


def test_data_that_call_for_nothing():
    assert find_hints(made(**{DATA: FACTS}), PARAMS) == []
    few = FACTS | {"images": 160, "objects": 173}
    for weights in ({"model.backbone_weights": "imagenet"}, {"model.init_from": "rk2-8cd8"}):
        assert find_hints(made(**{DATA: few}), PARAMS | weights) == []


def statistics(path: Path, **train: object) -> Path:
    """A statistics.json as prepare writes it, of the sample but for `train`."""
    of_train = {
        "images": 400,
        "objects": 1809,
        "classes": {"one": {"objects": 237, "images": 182}, "two": {"objects": 218, "images": 170}},
        "box_side_of_image": {"5%": 0.068, "25%": 0.092, "50%": 0.15},
        "image_sizes": {"most_common": [{"width": 256, "height": 192, "images": 400}]},
    } | train
    path.write_text(json.dumps({"train": of_train, "val": {"objects": 441}}))
    return path


@pytest.mark.parametrize(
    ("train", "kinds"),
    [
        ({}, []),
        ({"images": 160, "objects": 173}, ["scratch"]),
        ({"box_side_of_image": {"25%": 0.05}}, ["small_objects"]),
        ({"classes": {"king": {"objects": 8, "images": 8}}}, ["few_objects"]),
    ],
)
def test_what_the_data_call_for_is_logged_before_the_first_step(tmp_path, caplog, train, kinds):
    params = load_params(ROOT / "presets/sample.yaml")
    facts = data_facts(statistics(tmp_path / "statistics.json", **train), params, stride=8)
    path = tmp_path / "train.jsonl"
    caplog.set_level("INFO")
    for _ in range(2):  # the second training starts again, before the first checkpoint
        tracker = JsonlLog(path)
        hinting = HintingTracker(tracker, path, params.flat(runtime=True), facts)
        hinting.resume(None)
        hinting.event("training_start", device="cpu")
        hinting.log({"train/loss": 1.0}, 1)
        tracker.close()
    log = read_log(path)
    assert [hint.kind for hint in logged_hints(log)] == kinds
    assert [hint.kind for hint in lasting_hints(log, params.flat())] == kinds
    assert len(caplog.messages) == len(kinds)
    assert path.read_text().count('"hint.') == len(kinds)


def test_statistics_that_cannot_be_read_give_no_hint(tmp_path):
    params = load_params(ROOT / "presets/sample.yaml")
    file = tmp_path / "statistics.json"
    assert data_facts(file, params, 8) == {}
    for text in ("[]", "{", '{"train": {}, "val": 3}', '{"train": null}'):
        file.write_text(text)
        assert data_facts(file, params, 8) == {}


def test_ap_that_no_longer_rises():
    def hints(scores: list[float]) -> list[Hint]:
        log = TrainingLog()
        for epoch, score in enumerate(scores, 1):
            values = {"train/epoch_loss": 10 / (1 + epoch), "val/AP": score, "train/epoch": epoch}
            log.add({"step": 10 * epoch, "time": epoch, "values": values})
        return find_hints(log, PARAMS)

    rising = [0.1, 0.2, 0.25, 0.28, 0.3, 0.31]
    assert hints(rising + [0.3] * 4) == []
    (hint,) = hints(rising + [0.305] * 5)
    assert (hint.kind, hint.seen) == ("plateau", "AP has not risen since epoch 6 (0.310)")
    assert hints([0.01] * 12) == []  # learns nothing: `lr_low`, or wrong boxes


def test_a_healthy_training_gets_none():
    machine = samples(**GPU, system_memory_usage_percentage=50)
    assert find_hints(made(samples=machine), PARAMS) == []


def test_the_other_sides():
    idle = made(samples=samples(**GPU | {"gpu_0_memory_usage_percentage": 20}))
    assert [h.seen for h in find_hints(idle, PARAMS)] == ["only 20% of the GPU's memory is in use"]
    (hint,) = find_hints(idle, PARAMS)
    assert hint.change.startswith("set training.micro_batch (now 2) to auto")


@pytest.mark.parametrize("micro_batch", ["auto", 8])
def test_an_idle_gpu_is_no_reason_for_more_images_a_step(micro_batch):
    """They cost AP 0.09 on the sample; a step that is whole already has nothing to gain."""
    idle = {"gpu_0_utilization_percentage": 11, "gpu_0_memory_usage_percentage": 1}
    log = made(samples=samples(**GPU | idle))
    assert find_hints(log, PARAMS | {"training.micro_batch": micro_batch}) == []
    assert {hint.kind for hint in find_hints(log, PARAMS)} == {"host", "gpu_memory"}


@pytest.mark.parametrize("norm", [0.01, 0.4, 5, 500])
def test_clipping_is_no_reason_for_a_hint(norm):
    """Whether it acts in every step, some or none made no difference (docs/guide/clipping.md)."""
    assert find_hints(made(step=lambda s: {"train/grad_norm": norm + s % 3}), PARAMS) == []


def test_the_loss_scale_of_fp16_may_skip_some_steps():
    def skip(count: int, precision: str) -> list[Hint]:
        start = {"training_start": {"precision": precision}}
        log = made(epoch=lambda e: {"train/skipped_steps": count * (e > 5)}, **start)
        return find_hints(log, PARAMS)

    assert skip(2, "float16 autocast") == skip(0, "fp32") == []
    few, many = skip(1, "fp32"), skip(STEPS // 2, "float16 autocast")
    assert [h.seen.split(":")[0] for h in few] == ["1 step was skipped in the last epoch"]
    assert [h.kind for h in many] == ["lr_high"]


def test_a_rate_on_its_way_up_or_high_is_not_called_too_low():
    def slow(rate: Callable[[int], float], lr: float = 1e-4) -> list[Hint]:
        log = made(
            step=lambda s: {"train/lr": rate(s)},
            epoch=lambda e: {"train/epoch_loss": 9.0 - 0.01 * e, "val/AP": 0.001},
        )
        return find_hints(log, PARAMS | {"lr": lr})

    assert slow(lambda s: 1e-5 * s) == slow(lambda s: 0.1, lr=0.1) == []
    assert [hint.kind for hint in slow(lambda s: 1e-3 / s)] == ["lr_low"]


def test_a_cycle_of_the_rate_is_compared_with_the_one_before():
    def hints(losses: list[float]) -> list[Hint]:
        log = made(epoch=lambda e: {"train/epoch_loss": losses[e - 1]})
        return find_hints(log, PARAMS | {"schedule.name": "cyclical", "schedule.cycle_epochs": 3})

    assert hints([9, 7, 5, 8, 6, 5.4]) == []
    (hint,) = hints([9, 7, 5, 8, 8, 8])
    assert (hint.kind, hint.seen) == ("lr_high", "the training loss has risen from 5 to 8")


def test_a_gap_between_the_losses_that_stays():
    def gap(factor: float) -> list[Hint]:
        return find_hints(made(epoch=lambda e: {"val/loss": factor * 10 / (1 + e)}), PARAMS)

    assert gap(1.3) == []
    (hint,) = gap(1.5)
    assert (hint.kind, hint.seen) == (
        "overfitting",
        "the validation loss is 2.14, the training loss 1.43",
    )


def test_a_change_names_the_value_that_it_has():
    log = made(step=lambda s: {"train/data_wait_share": 0.3})
    as_logged = {name: v if isinstance(v, str) else json.dumps(v) for name, v in PARAMS.items()}
    for params in (PARAMS, as_logged):  # MLflow has them as text
        (loader,) = find_hints(log, params)
        assert loader.change.startswith("raise runtime.workers (now auto) or runtime.prefetch;")
    assert "raise runtime.workers or" in find_hints(log, {})[0].change


def test_every_log_can_be_asked(any_log):
    assert isinstance(find_hints(read_log(any_log), PARAMS), list)


def test_what_was_told_and_came_to_nothing():
    def told(log: TrainingLog) -> TrainingLog:
        fields = {"seen": "1 of 3 classes are never found", "change": "more images"}
        log.add({"time": 0, "event": "hint.class", "fields": fields})
        return log

    found, lost = SCORES | {"never_found": [], "never_found_count": 0}, SCORES
    running = told(made(**{CLASS_SCORES: found}))
    assert [h.seen for h in all_hints(running, PARAMS)] == ["1 of 3 classes are never found"]
    ended = told(made(**{CLASS_SCORES: found, "training_end": {}}))
    assert [h.seen for h in all_hints(ended, PARAMS)] == [
        "1 of 3 classes are never found (no longer at the end)"
    ]
    assert lasting_hints(ended, PARAMS) == []
    (standing,) = lasting_hints(told(made(**{CLASS_SCORES: lost, "training_end": {}})), PARAMS)
    assert standing.seen.endswith("(AP50 0): cat")


def test_classes_that_are_never_found():
    def of(name, ap50):
        return ClassResult(name, 1, 5, ap50, ap50, ap50, {})

    scores = class_scores([of("cat", 0.0), of("dog", 0.8), of("none there", None)])
    assert scores == {
        "classes": 2,
        "mean_AP50": 0.4,
        "never_found": ["cat"],
        "never_found_count": 1,
    }
    many = class_scores([of("x" * 500, 0.0)] * 1203)
    assert len(json.dumps(many)) < 2_000  # a tag of the run
    assert class_scores([])["mean_AP50"] == 0


def test_a_run_logs_a_hint_once_even_after_an_interruption(tmp_path, caplog):
    caplog.set_level("INFO", "runkey.plots")
    path = tmp_path / "train.jsonl"

    def train(first: int, last: int) -> None:
        tracker = JsonlLog(path)
        hinting = HintingTracker(tracker, path, PARAMS)
        hinting.resume(None)
        for entry in (p for p in whole.steps if first < p.step <= last):
            hinting.log(entry.values, entry.step)
            if entry.step % STEPS == 0:
                hinting.log(dict(whole.epochs[entry.step // STEPS - 1].values), entry.step)
        tracker.close()

    whole = made(step=lambda s: {"train/data_wait_share": 0.3})
    train(0, 30)
    train(20, 60)  # ten steps come again
    assert caplog.messages == ["\n".join(find_hints(whole, PARAMS)[0].lines())]
    log = read_log(path)
    assert [p.step for p in log.steps] == list(range(1, 61))
    assert [hint.kind for hint in logged_hints(log)] == ["loader"]
    assert log.last_event("hint.loader")["step"] == 20
    assert path.read_text().count("hint.loader") == 1


def test_scores_of_classes_are_recorded_with_their_epoch(tmp_path):
    path = tmp_path / "train.jsonl"
    tracker = JsonlLog(path)
    hinting = HintingTracker(tracker, path, PARAMS)
    for step in (3, 6, 9):
        if step != 6:  # without an evaluation
            hinting.set_class_scores({"classes": 2, "mean_AP50": 0.0})
        hinting.log({"train/loss": 1.0}, step)
        hinting.log({"train/epoch_loss": 1.0}, step)
    tracker.close()
    events = [e["fields"] for e in map(json.loads, path.read_text().splitlines()) if "event" in e]
    assert events == [{"step": step, "classes": 2, "mean_AP50": 0.0} for step in (3, 9)]


def test_hints_that_fail_cost_no_log(tmp_path, caplog):
    path = tmp_path / "train.jsonl"
    tracker = JsonlLog(path)
    hinting = HintingTracker(tracker, tmp_path / "elsewhere", PARAMS)
    for epoch in made().epochs:
        hinting.log(epoch.values, epoch.step)
    tracker.close()
    [line] = caplog.messages
    assert line.startswith("no more hints: FileNotFoundError: ")
    assert len(read_log(path).epochs) == EPOCHS


def test_asking_imports_no_matplotlib():
    """`runkey watch` looks every second, beside a training."""
    check = (
        "import sys, runkey.plots.hints\n"
        "print(sorted({'torch', 'mlflow', 'pycocotools', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
