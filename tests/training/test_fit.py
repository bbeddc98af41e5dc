"""The loop as a whole, on a small real task."""

import dataclasses
import math

import pytest
import torch

from runkey.errors import TrainingError
from runkey.training.distributed import World
from runkey.training.loop import fit
from runkey.training.seed import set_up

CPU = torch.device("cpu")


def run(toy, parameters=None, *, model=None, loader=None, evaluate=None, **options):
    parameters = parameters or toy.make_params()
    set_up(parameters.seed, deterministic=True)
    model = model or toy.ToyModel()
    return fit(
        model,
        toy.ToyCriterion(),
        loader or toy.ToyLoader(),
        evaluate or toy.val_loss,
        parameters,
        device=CPU,
        **options,
    )


_PATIENT = {"enabled": False, "metric": "val/loss", "mode": "min"}


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def without_clock(values):
    return {k: v for k, v in values.items() if "per_second" not in k and "wait" not in k}


def test_learns(toy):
    parameters = toy.make_params(lr=3e-3, training={"epochs": 12, "early_stopping": _PATIENT})
    result = run(toy, parameters)
    assert result.history[-1]["train/epoch_loss"] < 0.6 * result.history[0]["train/epoch_loss"]
    assert result.best_metrics["val/loss"] < result.history[0]["val/loss"]
    assert result.steps == 12 * 3
    assert result.stop_reason == "all 12 epochs done"


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_twice_the_same_bits(toy, ema):
    parameters = toy.make_params(training={"epochs": 2, "ema_decay": ema})
    results, trackers = [], []
    for _ in range(2):
        trackers.append(toy.MemoryTracker())
        model = toy.ToyModel  # dropout: its noise must come back too
        set_up(0, deterministic=True)
        results.append(run(toy, parameters, model=model(dropout=0.3), tracker=trackers[-1]))
        torch.rand(7)  # somebody else draws in between
    assert same(results[0].best_state, results[1].best_state)
    logged = [[(s, without_clock(v)) for s, v in t.logged] for t in trackers]
    assert logged[0] == logged[1]


def test_another_seed_gives_other_weights(toy):
    first = run(toy, toy.make_params(seed=0, training={"epochs": 1}))
    second = run(toy, toy.make_params(seed=1, training={"epochs": 1}))
    assert not same(first.best_state, second.best_state)


def test_noise_is_a_function_of_the_step(toy):
    """Dropout's draws do not depend on what was drawn before the step."""
    parameters = toy.make_params(training={"epochs": 1})
    states = []
    for draws in (0, 1000):
        set_up(0, deterministic=True)
        model = toy.ToyModel(dropout=0.5)

        class Drawing(toy.ToyLoader):
            def epoch(self, epoch, start_step=0):
                for window in super().epoch(epoch, start_step):
                    torch.rand(draws)  # noqa: B023
                    yield window

        loader = Drawing()
        states.append(run(toy, parameters, model=model, loader=loader).best_state)
    assert same(*states)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_micro_batch_changes_rounding_only(toy, micro_batch):
    parameters = toy.make_params(lr=1e-3, training={"epochs": 2})
    whole, parts = (
        run(toy, parameters, model=_seeded(toy), loader=toy.ToyLoader(micro_batch=size))
        for size in (8, micro_batch)
    )
    for name, tensor in whole.best_state.items():
        torch.testing.assert_close(parts.best_state[name], tensor, rtol=0, atol=2e-4)
    losses = [[epoch["train/epoch_loss"] for epoch in r.history] for r in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def _seeded(toy):
    torch.manual_seed(5)
    return toy.ToyModel(norm=False)  # batch norm's statistics are a micro-batch's own


def test_log_every_changes_no_weight(toy):
    results = [
        run(toy, toy.make_params(runtime={"log_every": every}), tracker=toy.MemoryTracker())
        for every in (1, 7)
    ]
    assert same(results[0].best_state, results[1].best_state)


def test_tracker_gets_every_value(toy):
    tracker = toy.MemoryTracker()
    result = run(toy, toy.make_params(runtime={"log_every": 2}), tracker=tracker)
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


def test_epoch_loss_is_the_mean_of_its_steps(toy):
    tracker = toy.MemoryTracker()
    result = run(toy, toy.make_params(training={"epochs": 2}), tracker=tracker)
    losses = [v["train/loss"] for _, v in tracker.logged if "train/loss" in v]
    assert len(losses) == 6
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [e["train/epoch_loss"] for e in result.history] == pytest.approx(means)


def test_logged_rate_is_the_schedules(toy):
    tracker = toy.MemoryTracker()
    run(
        toy,
        toy.make_params(lr=1e-3, schedule={"name": "multistep", "milestones": [1, 2]}),
        tracker=tracker,
    )
    rates = [v["train/lr"] for _, v in tracker.logged if "train/loss" in v]
    # Nine steps: warm-up of round(0.45) = 0 steps, drops at steps 3 and 6.
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 3 + [1e-5] * 3)


class Scripted:
    """An evaluation with given values; keeps the weights that it was shown."""

    def __init__(self, values, name="val/AP"):
        self.values, self.name, self.seen = list(values), name, []

    def __call__(self, module):
        self.seen.append({k: v.clone() for k, v in module.state_dict().items()})
        return {self.name: self.values[len(self.seen) - 1]}


def scripted_params(toy, epochs, *, enabled=True, patience=2, every=1, **training):
    stopping = {"metric": "val/AP", "mode": "max", "patience": patience, "enabled": enabled}
    return toy.make_params(
        training={"epochs": epochs, "evaluate_every": every, "early_stopping": stopping} | training
    )


NAN = float("nan")


@pytest.mark.parametrize("enabled", [True, False])
def test_best_weights_not_the_last(toy, enabled):
    evaluate = Scripted([0.1, 0.4, 0.3, 0.35])
    result = run(toy, scripted_params(toy, 4, enabled=enabled, patience=3), evaluate=evaluate)
    assert (result.best_epoch, result.best_step, result.best_metrics) == (2, 6, {"val/AP": 0.4})
    assert same(result.best_state, evaluate.seen[1])
    assert not same(result.best_state, evaluate.seen[3])


def test_better_by_less_than_min_delta_is_still_the_model(toy):
    evaluate = Scripted([0.4, 0.41, 0.42, 0.9])
    parameters = toy.make_params(
        training={"epochs": 4}
        | {"early_stopping": {"metric": "val/AP", "patience": 2, "min_delta": 0.1}}
    )
    result = run(toy, parameters, evaluate=evaluate)
    assert result.best_epoch == 3
    assert result.stop_reason.startswith("early stop: best val/AP 0.4 at evaluation 1 of 3")


def test_early_stop_counts_evaluations_not_epochs(toy):
    evaluate = Scripted([0.5, 0.4, 0.4, 0.9])
    result = run(toy, scripted_params(toy, 9, every=2), evaluate=evaluate)
    assert len(evaluate.seen) == 3
    assert result.steps == 6 * 3
    assert [e["epoch"] for e in result.history if "val/AP" in e] == [2, 4, 6]


def test_the_last_epoch_has_an_evaluation(toy):
    evaluate = Scripted([0.5, 0.6])
    result = run(toy, scripted_params(toy, 3, every=2), evaluate=evaluate)
    assert [e["epoch"] for e in result.history if "val/AP" in e] == [2, 3]
    assert result.best_epoch == 3


def test_nan_is_never_the_best(toy):
    result = run(toy, scripted_params(toy, 3, patience=9), evaluate=Scripted([NAN, -1.0, NAN]))
    assert result.best_epoch == 2
    result = run(toy, scripted_params(toy, 2, patience=9), evaluate=Scripted([NAN, NAN]))
    assert result.best_epoch == 1
    assert math.isnan(result.best_metrics["val/AP"])


def test_plateau_drops_the_rate(toy):
    tracker = toy.MemoryTracker()
    stopping = {"metric": "val/AP", "patience": 9}
    run(
        toy,
        toy.make_params(
            lr=1e-3,
            schedule={"name": "plateau", "patience": 1, "warmup_fraction": 0},
            training={"epochs": 4, "early_stopping": stopping},
        ),
        evaluate=Scripted([0.5, 0.4, 0.6, 0.6]),
        tracker=tracker,
    )
    rates = [v["train/lr"] for _, v in tracker.logged if "train/loss" in v]
    assert rates == pytest.approx([1e-3] * 6 + [1e-4] * 6)


def test_evaluates_and_keeps_the_average(toy):
    evaluate = Scripted([0.5])
    model = toy.ToyModel()
    result = run(toy, scripted_params(toy, 1, ema_decay=0.9), model=model, evaluate=evaluate)
    assert same(result.best_state, evaluate.seen[0])
    assert not same(result.best_state, dict(model.state_dict()))


def test_best_state_loads_anywhere(toy, tmp_path):
    result = run(toy, toy.make_params(training={"epochs": 1}))
    assert all(t.is_contiguous() and not t.requires_grad for t in result.best_state.values())
    torch.save(result.best_state, tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    toy.ToyModel().load_state_dict(loaded, strict=True)


def test_a_tracker_that_breaks_does_not_stop_training(toy):
    class Broken(toy.MemoryTracker):
        def log(self, values, step):
            if step >= 4:
                raise OSError("disk full")
            super().log(values, step)

    tracker, lines = Broken(), []
    broken = run(toy, tracker=tracker, say=lines.append)
    assert same(broken.best_state, run(toy).best_state)
    assert len(broken.history) == 3
    assert [line for line in lines if "tracking" in line] == [
        "tracking stopped, training goes on: OSError: disk full"
    ]


def test_says_one_line_per_epoch(toy):
    lines = []
    run(toy, say=lines.append)
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 3
    for word in ("loss ", "grad ", "lr ", "img/s", "wait ", "val/loss ", "left "):
        assert word in epochs[0]
    assert epochs[-1].splitlines()[0].endswith("left 0s")
    assert "(best)" in epochs[0]
    assert lines[0] == "precision: fp32 (auto: mixed precision does not pay on a CPU)"
    assert lines[-1].startswith("all 3 epochs done; kept the weights of epoch ")


class NotFinite:
    """A criterion whose loss, but not its costs, is not finite at given steps."""

    def __init__(self, criterion, steps):
        self.criterion, self.steps, self.step = criterion, steps, 0

    def normaliser(self, counts):
        self.step += 1
        return self.criterion.normaliser(counts)

    def __call__(self, outputs, targets, normaliser):
        losses = self.criterion(outputs, targets, normaliser)
        if self.step not in self.steps:
            return losses
        return dataclasses.replace(losses, total=losses.total * float("inf"))


def fit_not_finite(toy, steps, parameters, **options):
    set_up(0, deterministic=True)
    criterion = NotFinite(toy.ToyCriterion(), steps)
    return fit(
        toy.ToyModel(), criterion, toy.ToyLoader(), toy.val_loss, parameters, device=CPU, **options
    )


def test_skipped_steps_are_counted_and_left_out_of_means(toy):
    tracker = toy.MemoryTracker()
    result = fit_not_finite(toy, {2, 5}, toy.make_params(), tracker=tracker)
    assert result.skipped_steps == 2
    events = [fields for kind, fields in tracker.events if kind == "skipped_step"]
    assert [fields["step"] for fields in events] == [2, 5]
    assert len(events[0]["image_ids"]) == 8
    assert all(math.isfinite(e["train/epoch_loss"]) for e in result.history)
    assert all(t.isfinite().all() for t in result.best_state.values())


def test_gives_up_when_no_step_is_finite(toy):
    """Without checkpoints there is nothing to go back to; see tests/training_guard."""
    parameters = toy.make_params(training={"epochs": 99, "early_stopping": _PATIENT})
    with pytest.raises(
        TrainingError, match=r"^step 10 .*not finite in 10 of .* 10 steps"
    ) as caught:
        fit_not_finite(toy, set(range(999)), parameters)
    assert "\n" not in str(caught.value)


class Failing:
    """A criterion that fails in its second step."""

    def __init__(self, criterion, error):
        self.criterion, self.error, self.step = criterion, error, 0

    def normaliser(self, counts):
        self.step += 1
        return self.criterion.normaliser(counts)

    def __call__(self, outputs, targets, normaliser):
        if self.step == 2:
            raise self.error
        return self.criterion(outputs, targets, normaliser)


FAILURES = {
    "criterion": (
        TrainingError("costs are not finite: boxes"),
        r"^step 2 \(lr 0.01, images \d+(, \d+){7}\): costs are not finite: boxes$",
    ),
    "memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        r"^step 2 .*: memory ran out with a single image, \d+, of 16 x 16 pixels; that needs a",
    ),
    "deterministic": (
        RuntimeError("scatter_foo does not have a deterministic implementation, but you set"),
        r"^step 2: scatter_foo has no deterministic form .*training.deterministic: false$",
    ),
}


@pytest.mark.parametrize(("error", "text"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_name_the_step(toy, error, text):
    criterion = Failing(toy.ToyCriterion(), error)
    with pytest.raises(TrainingError, match=text):
        fit(
            toy.ToyModel(),
            criterion,
            toy.ToyLoader(),
            toy.val_loss,
            toy.make_params(schedule={"name": "constant", "warmup_fraction": 0}),
            device=CPU,
        )


def test_other_errors_pass_unchanged(toy):
    with pytest.raises(RuntimeError, match=r"^something else$"):
        fit(
            toy.ToyModel(),
            Failing(toy.ToyCriterion(), RuntimeError("something else")),
            toy.ToyLoader(),
            toy.val_loss,
            toy.make_params(),
            device=CPU,
        )


def test_refuses_a_metric_that_is_not_there(toy):
    parameters = toy.make_params(training={"early_stopping": {"metric": "val/map"}})
    with pytest.raises(TrainingError, match=r"'val/map' is not logged .*: val/AP, val/loss$"):
        run(toy, parameters)


def test_refuses_no_data(toy):
    with pytest.raises(TrainingError, match="no training images"):
        run(toy, loader=toy.ToyLoader(images=0))


def test_refuses_more_processes_than_images_of_a_step(toy):
    with pytest.raises(TrainingError, match=r"^9 processes share training.batch_size = 8 images"):
        run(toy, world=World(rank=0, size=9))


def test_overfits_one_batch(toy):
    parameters = toy.make_params(
        lr=3e-3, training={"epochs": 110, "evaluate_every": 110, "early_stopping": _PATIENT}
    )
    result = run(toy, parameters, loader=toy.ToyLoader(images=8), model=_seeded(toy))
    first, last = result.history[0], result.history[-1]
    assert last["train/epoch_loss"] < 0.1 * first["train/epoch_loss"]
