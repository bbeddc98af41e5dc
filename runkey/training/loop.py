"""The training loop: epochs of steps, evaluations, the best weights, an early stop.

result = fit(model, criterion, loader, evaluate, params, device=device, tracker=tracker)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from runkey.data.dataset import GlobalBatch
from runkey.errors import DataError, Interrupted, ModelError, StoppedError
from runkey.model.criterion import Criterion
from runkey.params import Params
from runkey.training.build import Evaluate, Loader, Setup, build_setup
from runkey.training.checkpoint.file import Checkpoints
from runkey.training.device import seed_step
from runkey.training.distributed import (
    World,
    broadcast_metrics,
    ending_together,
    synchronised_batches,
)
from runkey.training.early_stopping import MetricComparator, decide_stop, loss_gap, watched_value
from runkey.training.guard import Guard, begin, explained, take_content
from runkey.training.interrupts import Interrupts
from runkey.training.metrics import LateReader, Pace, Quiet, Reading, Stopwatch, Tracker, timed
from runkey.training.progress import Display, bar_text, epoch_line, open_display
from runkey.training.state import FitResult, LoopState, Running
from runkey.training.step import StepResult, train_step

# The numbers of a running epoch on their way to the tracker, the bar and the epoch's line.


class EpochRecorder:
    """Takes each step's result, and hands its values on one step later."""

    def __init__(self, setup: Setup, state: LoopState, display: Display, guard: Guard) -> None:
        """Start an epoch, or go on in the middle of one, as the state says."""
        self._running = running = state.running
        self.pace = Pace.after(running.images, running.wait_seconds, running.seconds)
        """Of the whole epoch."""
        self.recent = Pace()
        """Since the last logged step."""
        self._setup, self._state, self._display, self._guard = setup, state, display, guard
        self._reader = LateReader()

    def record(self, result: StepResult, factor: float) -> None:
        """Queue the values of the step that `state.step` now counts."""
        for pace in (self.pace, self.recent):
            pace.images += len(result.image_ids)
        lr = self._setup.params.lr * factor
        reading = Reading(self._state.step, result.image_ids, lr, {}, result.faults)
        self._take(self._reader.push(reading, _scalars(result)))

    def settle(self) -> None:
        """Wait for the last step, so that the state holds all numbers up to it."""
        self._take(self._reader.flush())
        running, pace = self._running, self.pace
        running.images, running.wait_seconds = pace.images, pace.wait_seconds
        running.seconds = pace.seconds

    def finish(self) -> dict[str, float]:
        """Wait for the last step; the epoch's values by metric name.

        Losses are means under `train/epoch_loss` and so on, so that they lie on one axis with the
        evaluation's; gradient norms are means, the rate is the last.
        """
        self.settle()
        running = self._running
        values = {
            name.replace("/loss", "/epoch_loss"): value
            for name, value in running.means.means().items()
        }
        values |= _pace_values(self.pace)
        return values if running.lr is None else values | {"train/lr": running.lr}

    def _take(self, reading: Reading | None) -> None:
        """Judge, log and show a step whose values have arrived on the host."""
        if reading is None:
            return
        self._guard.note(reading)
        values = {name: value for name, value in reading.values.items() if name != "skipped"}
        self._running.means.add(values)
        self._running.lr = reading.lr
        if reading.step > 1 and reading.step % self._setup.params.runtime.log_every:
            return
        values |= _pace_values(self.recent)
        values["train/lr"] = reading.lr
        values["train/epoch"] = reading.step / self._setup.loader.steps_per_epoch
        self.recent.restart()
        self._setup.tracker.log(values, reading.step)
        text = bar_text(values, self._setup.seconds_left(self._state.step, self._state.seconds))
        self._display.update(self._state.step, self._state.epoch + 1, text)


def _scalars(result: StepResult) -> dict[str, Tensor]:
    """A step's scalars by metric name, and whether it was skipped."""
    values = {f"train/{name}": value for name, value in result.losses.items()}
    values |= {
        "train/grad_norm": result.clipped.before,
        "train/grad_norm_clipped": result.clipped.after,
        "skipped": result.skipped,
    }
    if result.clipped.threshold is not None:
        values["train/clip_threshold"] = result.clipped.threshold
    if result.scale is not None:
        values["train/loss_scale"] = result.scale
    return values


def _pace_values(pace: Pace) -> dict[str, float]:
    return {
        "train/images_per_second": pace.images_per_second,
        "train/data_wait_share": pace.data_wait_share,
    }


# The end of an epoch and of a training: evaluation, the best weights, an early stop, a line.


def close_epoch(
    setup: Setup, state: LoopState, values: dict[str, float], guard: Guard, clock: Stopwatch
) -> None:
    """Evaluate if that is due, log and print the epoch; note the end of training."""
    epochs, every = setup.params.training.epochs, setup.params.training.evaluate_every
    number = state.epoch + 1
    due = number % every == 0 or number == epochs
    if due:
        guard.act_before_evaluation()
    is_best = due and _evaluate(setup, state, values)
    state.epoch, state.running = number, Running()
    state.seconds += clock.lap()
    values |= {
        "train/epoch": float(number),
        "train/skipped_steps": float(state.skipped_steps),
        "train/loss_spikes": float(state.guard.spikes),
    }
    state.history.append({"epoch": float(number), "step": float(state.step)} | values)
    setup.tracker.log(values, state.step)
    setup.say(
        epoch_line(
            number,
            epochs,
            values,
            setup.seconds_left(state.step, state.seconds),
            watched=setup.watched,
            is_best=is_best,
        )
    )
    if not state.stop_reason and number == epochs:
        state.stop_reason = f"all {epochs} epochs done"


def _evaluate(setup: Setup, state: LoopState, values: dict[str, float]) -> bool:
    """Evaluate, add the metrics to `values`, keep the best weights; whether these are the best."""
    stopping = setup.params.training.early_stopping
    module = setup.evaluated_module.eval()
    metrics = broadcast_metrics(lambda: _judge(setup, state, module), setup.world, setup.interrupts)
    value = watched_value(metrics, stopping.metric)
    values |= metrics | loss_gap(values, metrics)
    state.evaluations.append(metrics)
    if stopping.enabled:
        judge = MetricComparator(stopping.mode, stopping.min_delta)
        history = state.watched(stopping.metric)
        verdict = decide_stop(history, judge, stopping.patience, stopping.metric)
        state.stop_reason = verdict.reason
    # The smallest change is for patience alone: better weights are better by however little.
    return state.offer(value, metrics, module, MetricComparator(stopping.mode))


def _judge(setup: Setup, state: LoopState, module: nn.Module) -> dict[str, float]:
    """The evaluation's metrics; of a model whose predictions are not finite, NaN.

    That is the worst there is, so such weights are never the best; whether training goes on is the
    guard's business, which sees the same in the next steps.
    """
    try:
        with torch.no_grad():
            return {name: float(value) for name, value in setup.evaluate(module).items()}
    except ModelError as error:
        setup.say(f"evaluation after step {state.step}: {error}; it counts as the worst")
        setup.tracker.event("evaluation_failed", step=state.step, reason=str(error))
        return {setup.watched: math.nan}


def finish(setup: Setup, state: LoopState) -> FitResult:
    """Say how training ended, and hand over what it leaves behind."""
    result = state.result()
    setup.say(
        f"{result.stop_reason}; kept the weights of epoch {result.best_epoch} "
        f"({setup.watched} {result.best_metrics[setup.watched]:.4g}){_gap_text(result)}"
    )
    setup.tracker.event(
        "training_end",
        reason=result.stop_reason,
        best_epoch=result.best_epoch,
        best_step=result.best_step,
        steps=result.steps,
        skipped_steps=result.skipped_steps,
        seconds=result.seconds,
    )
    return result


def _gap_text(result: FitResult) -> str:
    """How far the held-out loss was above the training loss, in words; empty if not known."""
    gaps = {e["step"]: e["val/loss_gap"] for e in result.history if "val/loss_gap" in e}
    if result.best_step not in gaps:
        return ""
    last = list(gaps.values())[-1]
    return (
        f"; held-out loss minus training loss: {gaps[result.best_step]:.3g} there, {last:.3g} at "
        "the end"
    )


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
    with ending_together(setup.world):
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
    windows = synchronised_batches(
        setup.loader.epoch(state.epoch, done), setup.world, setup.interrupts
    )
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
    setup: Setup, state: LoopState, window: GlobalBatch, watched: Sequence[float]
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
