"""Real signals to a training: what is saved, what is said, and that it goes on as if none came."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from runkey.errors import DataError, Interrupted
from runkey.training.device import configure_torch
from runkey.training.distributed import Interrupts
from tests.support import toy
from tests.support.fitting import fit


class Signalling:
    """Sends this process a signal when it is called for the n-th time."""

    def __init__(self, at, number=signal.SIGTERM):
        self.at, self.number, self.calls = at, number, 0

    def call(self):
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def train():
    """Trains with a signal at the n-th loading, step or evaluation."""

    def train(at=0, where="step", checkpoints=None, number=signal.SIGTERM):
        sender = Signalling(at, number)

        class Loader(toy.ToyLoader):
            def epoch(self, epoch, start_step=0):
                for window in super().epoch(epoch, start_step):
                    if where == "loading":
                        sender.call()
                    yield window

        class Criterion(toy.ToyCriterion):
            def __call__(self, *arguments):
                if where == "step":
                    sender.call()
                return super().__call__(*arguments)

        def evaluate(module):
            if where == "evaluation":
                sender.call()
            return toy.val_loss(module)

        parameters = toy.make_params(training={"epochs": 4, "ema_decay": 0.9})
        configure_torch(0, deterministic=True)
        with Interrupts() as interrupts:
            return fit(
                toy.ToyModel(dropout=0.3),
                Criterion(),
                Loader(micro_batch=4),
                evaluate,
                parameters,
                checkpoints=checkpoints,
                interrupts=interrupts,
            )

    return train


@pytest.mark.parametrize(
    ("where", "at", "step"),
    [
        ("step", 1, 1),  # in the first micro-batch: the step is finished
        ("step", 5, 3),  # in the last one of an epoch
        ("loading", 1, 0),  # a wait is not
        ("loading", 6, 5),
        ("evaluation", 2, 6),  # nor an evaluation
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops_at_a_boundary_and_goes_on(train, where, at, step, number):
    whole = toy.SavedInMemory(due=False)
    expected = train(checkpoints=whole)
    stopped = toy.SavedInMemory(due=False)
    with pytest.raises(Interrupted) as caught:
        train(at, where, stopped, number)
    assert caught.value.number == number
    assert str(caught.value) == (
        f"stopped by {number.name} after step {step} of 12; `dvc repro` goes on from there"
    )
    again = toy.SavedInMemory(stopped.content, due=False)
    result = train(checkpoints=again)
    assert result.best.step == expected.best.step
    for name, tensor in expected.best_weights.items():
        assert torch.equal(result.best_weights[name], tensor), name
    assert result.best.metrics == expected.best.metrics
    model, ours = whole.content.parts["model"], again.content.parts["model"]
    assert all(torch.equal(model[name], ours[name]) for name in model)


def test_says_so_when_nothing_is_saved(train):
    with pytest.raises(Interrupted, match=r"after step 3 of 12; nothing is saved$"):
        train(5, "step")


def test_a_loader_that_fails_costs_no_step():
    """As when one of its processes is killed for want of memory."""

    class Failing(toy.ToyLoader):
        def epoch(self, epoch, start_step=0):
            for number, window in enumerate(super().epoch(epoch, start_step)):
                if (epoch, number) == (1, 2):
                    raise DataError("a loader process was killed")
                yield window

    kept = toy.SavedInMemory(due=False)
    with pytest.raises(DataError) as caught:
        fit(
            toy.ToyModel(),
            toy.ToyCriterion(),
            Failing(),
            toy.val_loss,
            toy.make_params(),
            checkpoints=kept,
        )
    text = "a loader process was killed; stopped after step 5 of 9; `dvc repro` goes on from there"
    assert str(caught.value) == text
    assert kept.content.step == 5
    assert kept.content.state["running"]["counts"]["train/loss"] == 2


def test_signals_are_handled_as_before_afterwards(train):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted):
        train(1, "step")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def send_and_note(done):
    os.kill(os.getpid(), signal.SIGTERM)
    done.append("went on")


def test_at_once_outside_of_held():
    done = []
    with Interrupts(), pytest.raises(Interrupted, match="stopped by SIGTERM"):
        send_and_note(done)
    assert done == []


def test_held_until_the_block_ends():
    done = []
    with Interrupts() as interrupts, pytest.raises(Interrupted), interrupts.held():
        send_and_note(done)
    assert done == ["went on"]
    assert interrupts.signal == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_exit_codes_and_the_second_signal(number):
    script = textwrap.dedent(
        f"""
        import os, sys, time
        from runkey.errors import report_errors
        from runkey.training.distributed import Interrupts
        with report_errors(), Interrupts() as interrupts, interrupts.held():
            for _ in range(int(sys.argv[1])):
                os.kill(os.getpid(), {int(number)})
            print("still here", flush=True)
        """
    )
    ended = [
        subprocess.run(
            [sys.executable, "-c", script, times],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for times in ("1", "2")
    ]
    name = signal.Signals(number).name
    assert (ended[0].returncode, ended[0].stdout) == (128 + number, "still here\n")
    assert ended[0].stderr.splitlines() == [
        f"{name}: stopping as soon as nothing is lost; again ends it at once",
        f"stopped by {name}; `dvc repro` goes on from the checkpoint, if there is one",
    ]
    assert (ended[1].returncode, ended[1].stdout) == (-number, "")
