"""Where the loop skips a step, gives up with a line that names it, or refuses to begin."""

import dataclasses
import math

import pytest
import torch

from runkey.errors import TrainingError
from runkey.training.device import configure_torch
from runkey.training.distributed import World
from tests.support import toy
from tests.support.fitting import fit
from tests.support.toy import PATIENT, run


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


def fit_not_finite(steps, parameters, **options):
    configure_torch(0, deterministic=True)
    criterion = NotFinite(toy.ToyCriterion(), steps)
    return fit(toy.ToyModel(), criterion, toy.ToyLoader(), toy.val_loss, parameters, **options)


def test_skipped_steps_are_counted_and_left_out_of_means():
    tracker = toy.MemoryTracker()
    result = fit_not_finite({2, 5}, toy.make_params(), tracker=tracker)
    assert result.skipped_steps == 2
    events = [fields for kind, fields in tracker.events if kind == "skipped_step"]
    assert [fields["step"] for fields in events] == [2, 5]
    assert len(events[0]["image_ids"]) == 8
    assert all(math.isfinite(e["train/epoch_loss"]) for e in result.history)
    assert all(t.isfinite().all() for t in result.best_weights.values())


def test_gives_up_when_no_step_is_finite():
    """Without checkpoints there is nothing to go back to; see tests/training_guard."""
    parameters = toy.make_params(training={"epochs": 99, "early_stopping": PATIENT})
    with pytest.raises(
        TrainingError, match=r"^step 10 .*not finite in 10 of .* 10 steps"
    ) as caught:
        fit_not_finite(set(range(999)), parameters)
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
def test_failures_name_the_step(error, text):
    criterion = Failing(toy.ToyCriterion(), error)
    with pytest.raises(TrainingError, match=text):
        fit(
            toy.ToyModel(),
            criterion,
            toy.ToyLoader(),
            toy.val_loss,
            toy.make_params(schedule={"name": "constant", "warmup_fraction": 0}),
        )


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match=r"^something else$"):
        fit(
            toy.ToyModel(),
            Failing(toy.ToyCriterion(), RuntimeError("something else")),
            toy.ToyLoader(),
            toy.val_loss,
            toy.make_params(),
        )


def test_refuses_a_metric_that_is_not_there():
    parameters = toy.make_params(training={"early_stopping": {"metric": "val/map"}})
    with pytest.raises(TrainingError, match=r"'val/map' is not logged .*: val/AP, val/loss$"):
        run(parameters)


def test_refuses_no_data():
    with pytest.raises(TrainingError, match="no training images"):
        run(loader=toy.ToyLoader(images=0))


def test_refuses_more_processes_than_images_of_a_step():
    with pytest.raises(TrainingError, match=r"^9 processes share training.batch_size = 8 images"):
        run(world=World(rank=0, size=9))
