"""The training loop: epochs of steps, evaluations, the best weights, an early stop.

result = fit(model, criterion, loader, evaluate, params, device=device, tracker=tracker)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from runkey.data.batch import Window
from runkey.errors import DataError, Interrupted, StoppedError
from runkey.model.criterion import Criterion
from runkey.params import Params
from runkey.training.checkpoint.content import Checkpoints
from runkey.training.distributed import World
from runkey.training.epoch_end import close_epoch, finish
from runkey.training.explain import explained
from runkey.training.guard.guard import Guard
from runkey.training.interrupts import Interrupts
from runkey.training.meters import Stopwatch, timed
from runkey.training.progress import open_display
from runkey.training.recorder import EpochRecorder
from runkey.training.resume import begin, take_content
from runkey.training.seed import seed_step
from runkey.training.setup import Evaluate, Loader, Setup, build_setup
from runkey.training.state import FitResult, LoopState
from runkey.training.step import StepResult, train_step
from runkey.training.together import ended_together, windows_together
from runkey.training.tracker import Quiet, Tracker


def fit(
    model: nn.Module,
    criterion: Criterion,
    loader: Loader,
    evaluate: Evaluate,
    params: Params,
    *,
    device: torch.device,
    tracker: Tracker | None = None,
    say: Callable[[str], None] = lambda _: None,
    world: World | None = None,
    checkpoints: Checkpoints | None = None,
    interrupts: Interrupts | None = None,
    limit: int | None = None,
) -> FitResult:
    """Train a model, from its newest checkpoint on; its best weights, not the last, are the result.

    Args:
        model: called as `model(images, padding_mask, targets)`; moved to `device` and changed.
        criterion: its losses.
        loader: the training data, already cut into micro-batches.
        evaluate: metrics of a module in evaluation mode; called every `training.evaluate_every`
            epochs and after the last, with the averaged weights if `training.ema_decay` is set.
        params: lr, seed, optimizer, schedule, training and runtime are read.
        device: where to train.
        tracker: takes the metrics; its failure does not stop training.
        say: prints a line.
        world: this process among others; None for the only one.
        checkpoints: where training goes on from and is saved; None: neither.
        interrupts: signals that end training at the boundary of a step; None: none are handled.
        limit: most padded pixels (images x height x width) of a forward pass that memory is known
            to suffice for: larger micro-batches are cut at once.  None: any are tried.

    Raises:
        StoppedError: memory does not suffice for one image, or another rank has ended; a checkpoint
            has been written.
        DataError: an image cannot be read; a checkpoint has been written.
        TrainingError: no data, nothing to train, losses that stay non-finite, or an early-stopping
            metric that evaluations do not log.
        Interrupted: a signal came; a checkpoint has been written.
    """
    setup = build_setup(
        model,
        criterion,
        loader,
        evaluate,
        params,
        device=device,
        tracker=tracker or Quiet(),
        say=say,
        world=world or World(),
        checkpoints=checkpoints,
        interrupts=interrupts,
    )
    with ended_together(setup.world):
        state = begin(setup)
        state.limit = min((n for n in (state.limit, limit) if n is not None), default=None)
        with setup.interrupts.held():
            _train(setup, state)
    return finish(setup, state)


def _train(setup: Setup, state: LoopState) -> None:
    """The epochs that are left; afterwards the newest checkpoint is of the end."""
    clock, guard = Stopwatch(), Guard(setup, state)
    _save_first_anchor(setup, state)
    total, epochs = setup.schedule.total_steps, setup.params.training.epochs
    with open_display(
        total, epochs, wanted=setup.params.runtime.progress and setup.world.is_main
    ) as display:
        while not state.stop_reason:
            recorder = EpochRecorder(setup, state, display, guard)
            try:
                _train_epoch(setup, state, recorder, guard, clock)
                close_epoch(setup, state, recorder.finish(), guard, clock)
                _at_boundary(setup, state, guard)
            except Interrupted as stop:
                where, how = _keep(setup, state, recorder)
                text = f"stopped by {stop.number.name} after {where}; {how}"
                raise Interrupted(stop.number, text) from None
            except (StoppedError, DataError) as error:
                where, how = _keep(setup, state, recorder)
                raise type(error)(f"{error}; stopped after {where}; {how}") from error
    if setup.checkpoints:
        setup.checkpoints.save(take_content(setup, state), wait=True)


def _train_epoch(
    setup: Setup, state: LoopState, recorder: EpochRecorder, guard: Guard, clock: Stopwatch
) -> None:
    """The steps of the running epoch that are not done yet."""
    setup.machinery.model.train()
    watched = state.watched(setup.watched)
    done = state.step - state.epoch * setup.loader.steps_per_epoch
    windows = windows_together(setup.loader.epoch(state.epoch, done), setup.world, setup.interrupts)
    for window in timed(windows, recorder.pace, recorder.recent):
        result, factor = take_step(setup, state, window, watched)
        # Hands on the values of the step before: what is decided by a step's values is decided one
        # step late, wherever a checkpoint made them known earlier.
        recorder.record(result, factor)
        guard.act()
        state.seconds += clock.lap()
        _at_boundary(setup, state, guard, recorder, is_cut=_note_splits(setup, state, result))
    if state.step != (state.epoch + 1) * setup.loader.steps_per_epoch:
        raise ValueError(f"epoch {state.epoch + 1}: the loader's windows are not steps_per_epoch")


def take_step(
    setup: Setup, state: LoopState, window: Window, watched: Sequence[float]
) -> tuple[StepResult, float]:
    """One optimizer step and what goes with it; its result, and the schedule's factor.

    Args:
        setup: the training.
        state: its step is counted on.
        window: the step's images.
        watched: the metric that plateau goes by, at each evaluation so far.
    """
    factor = setup.schedule.factor(state.step, watched)
    reseed = partial(seed_step, setup.params.seed, state.step, setup.world.rank)
    with explained(state.step + 1, window, setup.params.lr * factor):
        result = train_step(setup.machinery, window, factor, limit=state.limit, reseed=reseed)
    if setup.ema is not None:
        setup.ema.update(result.skipped)
    state.step += 1
    return result, factor


def _note_splits(setup: Setup, state: LoopState, result: StepResult) -> bool:
    """Keep and tell what memory did not suffice for in the last step; whether there was any."""
    for split in result.splits:
        state.limit = split.limit if state.limit is None else min(state.limit, split.limit)
        setup.say(f"step {state.step}: {split.text}")
        setup.tracker.event("split", step=state.step, **asdict(split))
    return bool(result.splits)


def _save_first_anchor(setup: Setup, state: LoopState) -> None:
    """Have something to go back to from the very start."""
    checkpoints = setup.checkpoints
    if checkpoints and state.step == 0 and checkpoints.newest is None:
        checkpoints.save(take_content(setup, state), anchor=True)


def _at_boundary(
    setup: Setup,
    state: LoopState,
    guard: Guard,
    recorder: EpochRecorder | None = None,
    *,
    is_cut: bool = False,
) -> None:
    """Between two steps: save a checkpoint if it is time, stop if a signal came.

    One is saved after going back, too, so that every later step can be replayed from a checkpoint
    without going back again; and with a new limit of memory, so that no step has to find it anew.
    """
    went_back = guard.has_just_gone_back
    anchor = recorder is not None and guard.wants_anchor()
    now = went_back or anchor or is_cut
    if setup.checkpoints and (now or setup.checkpoints.due(state.step)):
        if recorder:
            recorder.settle()
        setup.checkpoints.save(take_content(setup, state), wait=went_back, anchor=anchor)
    if setup.world.size == 1:  # several ranks agree on it with the next window
        setup.interrupts.check()


def _keep(setup: Setup, state: LoopState, recorder: EpochRecorder) -> tuple[str, str]:
    """Save a checkpoint at this boundary of a step; which one it is, and how to go on."""
    recorder.settle()
    where = f"step {state.step} of {setup.schedule.total_steps}"
    if setup.checkpoints is None:
        return where, "nothing is saved"
    setup.checkpoints.save(take_content(setup, state), wait=True)
    if not setup.world.is_main:
        return where, "`dvc repro` goes on from rank 0's newest checkpoint"
    match setup.checkpoints.newest:
        case state.step:
            return where, "`dvc repro` goes on from there"
        case None:
            return where, "there is no checkpoint, so `dvc repro` starts anew"
        case older:
            return where, f"`dvc repro` goes on from step {older}"
