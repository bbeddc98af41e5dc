"""The training loop: epochs of steps, evaluations, the best weights, early stopping.

context = build_training(params, num_classes, device, data=data)
result = fit(context, evaluate, tracker=tracker, checkpoints=checkpoints)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from runkey.data.dataset import GlobalBatch
from runkey.errors import DataError, Interrupted, ModelError, StoppedError, TrainingError
from runkey.progress import Steps, movement_watched, note_movement, progress, want_bars
from runkey.training.build import Evaluate, Tracker, TrainContext, describe, safe_tracker
from runkey.training.checkpoint import Checkpoint, FolderCheckpoints
from runkey.training.distributed import (
    Interrupts,
    LostRankError,
    SharedError,
    broadcast_metrics,
    synchronised_batches,
)
from runkey.training.guard import Guard, shown_ids
from runkey.training.optimizer import current_rates
from runkey.training.progress import bar_text, epoch_line
from runkey.training.schedule import (
    check_watched,
    decide_stop,
    improvements,
    loss_gap,
)
from runkey.training.state import (
    Best,
    DelayedReader,
    LoopState,
    Running,
    StepValues,
    Stopwatch,
    Throughput,
    timed,
)
from runkey.training.step import StepResult, image_ids_of, is_out_of_memory, train_step
from runkey.training.tensors import host_weights
from runkey.units import counted

logger = logging.getLogger(__name__)


def fit(
    context: TrainContext,
    evaluate: Evaluate,
    *,
    tracker: Tracker | None = None,
    checkpoints: FolderCheckpoints | None = None,
    interrupts: Interrupts | None = None,
    limit: int | None = None,
) -> LoopState:
    """Train a model from its newest checkpoint on; its best weights, not the last, are the result.

    Args:
        context: from `build_training`; its model is changed.
        evaluate: metrics of a module in evaluation mode; called every `training.evaluate_every`
            epochs and after the last, with the averaged weights if `training.ema_decay` is set.
        tracker: records metrics and events; its failure does not stop training.
        checkpoints: where to resume from and save to; None: neither.
        interrupts: signals that end training at the boundary of a step; None: none are handled.
        limit: most padded pixels (images x height x width) of a forward pass that are known to fit
            in memory: larger micro-batches are split at once. None: any are tried.

    Raises:
        StoppedError: memory does not suffice for one image, or another rank has ended; a checkpoint
            has been written.
        DataError: an image cannot be read; a checkpoint has been written.
        TrainingError: losses that stay non-finite, or an early-stopping metric that evaluations do
            not log.
        Interrupted: a signal came; a checkpoint has been written.
    """
    world, interrupts = context.world, interrupts or Interrupts()
    if not world.is_main:  # rank 0 records and saves; all resume from its checkpoints
        tracker = checkpoints = None
    trainer = _Trainer(context, evaluate, safe_tracker(tracker), checkpoints, interrupts)
    try:
        trainer.resume(limit)
        with interrupts.held(), movement_watched():
            trainer.train()
        world.shutdown()
        world.gather(None)  # only now may each rank end alone
    finally:
        world.shutdown()
    trainer.log_end()
    return trainer.state


def take_step(
    context: TrainContext, state: LoopState, batch: GlobalBatch, watched: Sequence[float]
) -> StepResult:
    """Take one optimizer step, update the average, and count the step.

    The plateau schedule goes by `watched`, its metric at each evaluation so far.
    """
    factor = context.schedule.factor(state.step, watched)
    reseed = partial(context.step.reseed, context.seed, state.step, context.world.rank)
    with _explained(state.step + 1, batch, context.step.optimizer):
        result = train_step(context.step, batch, factor, limit=state.limit, reseed=reseed)
    if context.ema is not None:
        context.ema.update(result.skipped)
    state.step += 1
    return result


@contextmanager
def _explained(step: int, batch: GlobalBatch, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Turn what can go wrong in a step into one line that names the step and the way out."""
    try:
        yield
    except LostRankError:
        raise
    except TrainingError as error:
        lr = current_rates(optimizer)["train/lr"]
        if isinstance(error, SharedError):
            raise type(error)(f"step {step} (lr {lr:.3g}), {error}") from error
        ids = shown_ids(image_ids_of(batch))
        raise type(error)(f"step {step} (lr {lr:.3g}, images {ids}): {error}") from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise TrainingError(
                f"step {step}: memory ran out outside of the forward and backward passes, where"
                " smaller batches do not help; it needs a device with more memory"
            ) from None
        if "does not have a deterministic implementation" not in str(error):
            raise
        operation = str(error).split(" does not")[0]
        raise TrainingError(
            f"step {step}: {operation} has no deterministic form on this device; "
            "set training.deterministic: false"
        ) from error


class _StepMetrics:
    """Metrics of the steps, on their way to guard, tracker, bar and the epoch's line."""

    def __init__(self, trainer: _Trainer, bar: Steps) -> None:
        self._context, self._state = trainer.context, trainer.state
        self._guard, self._tracker, self._bar = trainer.guard, trainer.tracker, bar
        self._recent = Throughput()
        """Since the last logged step."""
        self._reader = DelayedReader()

    def add(self, result: StepResult, wait_seconds: float, seconds: float) -> None:
        batch = result.batch
        for period in (self._state.running, self._recent):
            period.add(len(batch.image_ids), wait_seconds, seconds)
        step = StepValues(self._state.step, batch.image_ids, result.rates, {}, batch.faults)
        self._take(self._reader.push(step, result.scalars))

    def settle(self) -> None:
        """Wait for the last step, so that the state holds all numbers up to it."""
        self._take(self._reader.flush())

    def of_epoch(self) -> dict[str, float]:
        """Wait for the last step; return the epoch's values by metric name.

        Losses are means under `train/epoch_loss` and so on, so that they share an axis with the
        evaluation's; gradient norms are means, learning rates are the last step's.
        """
        self.settle()
        running = self._state.running
        values = {
            name.replace("/loss", "/epoch_loss"): value for name, value in running.means().items()
        }
        return values | running.as_metrics() | running.rates

    def _take(self, step: StepValues | None) -> None:
        if step is None:
            return
        context, state = self._context, self._state
        self._guard.note(step)
        values = {name: value for name, value in step.values.items() if name != "skipped"}
        state.running.add_values(values)
        state.running.rates = step.rates
        if step.step > 1 and step.step % context.runtime.log_every:
            return
        values |= self._recent.as_metrics() | step.rates
        values["train/epoch"] = step.step / context.loader.steps_per_epoch
        self._recent = Throughput()
        self._tracker.log(values, step.step)
        text = bar_text(values, _seconds_left(context, state))
        epoch = f"epoch {state.epoch + 1}/{context.settings.epochs}"
        self._bar.advance(state.step - self._bar.done, text, epoch)


def _seconds_left(context: TrainContext, state: LoopState) -> float:
    """Time that the remaining steps take if they are like those so far."""
    return state.seconds / state.step * (context.schedule.total_steps - state.step)


@dataclass
class _Trainer:
    """One run of the loop: a context, its state, and where it records and saves."""

    context: TrainContext
    evaluate: Evaluate
    tracker: Tracker
    checkpoints: FolderCheckpoints | None
    interrupts: Interrupts
    state: LoopState = field(default_factory=LoopState)

    def resume(self, limit: int | None) -> None:
        checkpoint = self.checkpoints.load() if self.checkpoints else None
        checkpoint = self.context.world.broadcast(checkpoint)
        choices = describe(self.context)
        if checkpoint is None:
            self.tracker.resume(None)
            self.tracker.event("training_start", **choices)
        else:
            self.context.restore(checkpoint.parts)
            self.tracker.resume(checkpoint.position)
            total, changes = self.context.schedule.total_steps, checkpoint.changes
            exactly = f", not bit for bit: {changes}" if changes else ""
            logger.info(f"resuming after step {checkpoint.step} of {total}{exactly}")
            self.tracker.event("resumed", step=checkpoint.step, changes=changes)
            self.state = LoopState.from_plain(checkpoint.state, checkpoint.best_weights)
        self.lower_limit(limit)
        self.guard = Guard(self.context, self.state, self.tracker, self.checkpoints)

    def train(self) -> None:
        """Train the remaining epochs; afterwards the newest checkpoint is of the end."""
        context, checkpoints = self.context, self.checkpoints
        self.clock = Stopwatch()
        if checkpoints and self.state.step == 0 and checkpoints.newest is None:
            # An anchor to roll back to from the very start.
            checkpoints.save(self._checkpoint(), anchor=True)
        want_bars(context.runtime.progress and context.world.is_main)
        # No lines where there is no terminal: each epoch logs one of its own.
        with progress("train", context.schedule.total_steps, lines=False) as bar:
            self.metrics = _StepMetrics(self, bar)
            try:
                while not self.state.stop_reason:
                    self._train_epoch()
                    self._close_epoch()
                    self._at_boundary(anchor=False)
            except Interrupted as stop:
                where, how = self._save_before_stop()
                text = f"stopped by {stop.number.name} after {where}; {how}"
                raise Interrupted(stop.number, text) from None
            except (StoppedError, DataError) as error:
                where, how = self._save_before_stop()
                raise type(error)(f"{error}; stopped after {where}; {how}") from error
        if checkpoints:
            checkpoints.save(self._checkpoint(), wait=True)

    def log_end(self) -> None:
        state, metric = self.state, self.context.watched_metric
        assert state.best  # the last epoch always has an evaluation
        best = state.best
        logger.info(
            f"{state.stop_reason}; kept the weights of epoch {best.epoch} "
            f"({metric} {best.metrics[metric]:.4g}){_gap_text(state.history, best.step)}"
        )
        self.tracker.event(
            "training_end",
            reason=state.stop_reason,
            best_epoch=best.epoch,
            best_step=best.step,
            steps=state.step,
            skipped_steps=state.skipped_steps,
            seconds=state.seconds,
        )

    def lower_limit(self, pixels: int | None) -> None:
        """Keep the pixel limit if it is lower than before, or the first."""
        limits = [limit for limit in (self.state.limit, pixels) if limit is not None]
        self.state.limit = min(limits, default=None)

    def _checkpoint(self) -> Checkpoint:
        """What has to be saved at this boundary of a step; tensors are not copied."""
        return Checkpoint(
            step=self.state.step,
            state=self.state.as_plain(),
            parts={name: part.state_dict() for name, part in self.context.parts.items()},
            position=self.tracker.position(),
            best_weights=self.state.best_weights,
        )

    def _train_epoch(self) -> None:
        context, state = self.context, self.state
        context.step.model.train()
        watched = state.watched(context.watched_metric)
        per_epoch = context.loader.steps_per_epoch
        batches = context.loader.epoch(state.epoch, state.step - state.epoch * per_epoch)
        for batch, waited in timed(synchronised_batches(batches, context.world, self.interrupts)):
            result = take_step(context, state, batch, watched)
            note_movement()
            seconds = self.clock.lap()
            state.seconds += seconds
            # Passes on the values of the step before: what a step's values lead to is decided one
            # step late, wherever a checkpoint made them known earlier.
            self.metrics.add(result, waited, seconds)
            self.guard.act()
            is_split = self._note_splits(result)
            self._at_boundary(anchor=self.guard.wants_anchor(), is_split=is_split)
        if state.step != (state.epoch + 1) * per_epoch:
            raise ValueError(f"epoch {state.epoch + 1}: the loader's batches are not as announced")

    def _note_splits(self, result: StepResult) -> bool:
        """Keep and log what did not fit in memory in the last step; whether there was any."""
        state = self.state
        for split in result.batch.splits:
            self.lower_limit(split.limit)
            logger.info(f"step {state.step}: {split.text}")
            self.tracker.event("split", step=state.step, **asdict(split))
        return bool(result.batch.splits)

    def _at_boundary(self, *, anchor: bool, is_split: bool = False) -> None:
        """Between two steps: save a checkpoint if it is due, stop if a signal came.

        One is also saved after a rollback, so that every later step can be replayed from a
        checkpoint without another rollback; and with a new pixel limit, so that no step has to
        find it again.
        """
        rolled_back = self.guard.has_just_rolled_back
        now = rolled_back or anchor or is_split
        if self.checkpoints and (now or self.checkpoints.due()):
            self.metrics.settle()
            self.checkpoints.save(self._checkpoint(), wait=rolled_back, anchor=anchor)
        if self.context.world.size == 1:  # several ranks agree on it with the next batch
            self.interrupts.check()

    def _save_before_stop(self) -> tuple[str, str]:
        """Save a checkpoint at this boundary of a step; return which step, and how to continue."""
        self.metrics.settle()
        where = f"step {self.state.step} of {self.context.schedule.total_steps}"
        if not self.context.world.is_main:
            return where, "`dvc repro` goes on from rank 0's newest checkpoint"
        if self.checkpoints is None:
            return where, "nothing is saved"
        self.checkpoints.save(self._checkpoint(), wait=True)
        match self.checkpoints.newest:
            case self.state.step:
                return where, "`dvc repro` goes on from there"
            case None:
                return where, "there is no checkpoint, so `dvc repro` starts anew"
            case older:
                return where, f"`dvc repro` goes on from step {older}"

    def _close_epoch(self) -> None:
        """Evaluate if that is due, log the epoch, and decide on the end of training."""
        state, settings, values = self.state, self.context.settings, self.metrics.of_epoch()
        number = state.epoch + 1
        due = number % settings.evaluate_every == 0 or number == settings.epochs
        if due:
            self.guard.act_before_evaluation()
        is_best = due and self._evaluate(values)
        state.epoch, state.running = number, Running()
        state.seconds += self.clock.lap()
        values |= {
            "train/epoch": float(number),
            "train/skipped_steps": float(state.skipped_steps),
            "train/loss_spikes": float(state.guard.spikes),
        }
        state.history.append({"epoch": float(number), "step": float(state.step)} | values)
        self.tracker.log(values, state.step)
        line = epoch_line(
            number,
            settings.epochs,
            values,
            _seconds_left(self.context, state),
            watched=self.context.watched_metric,
            is_best=is_best,
        )
        logger.info(line)
        if not state.stop_reason and number == settings.epochs:
            every = "all " if settings.epochs > 1 else ""
            state.stop_reason = f"{every}{counted(settings.epochs, 'epoch')} done"

    def _evaluate(self, values: dict[str, float]) -> bool:
        """Evaluate and add the metrics to `values`; return True if the weights are the best."""
        state, stopping = self.state, self.context.settings.early_stopping
        module = self.context.evaluated_module.eval()
        metrics = broadcast_metrics(self._metrics, self.context.world, self.interrupts)
        check_watched(metrics, stopping.metric)
        values |= metrics | loss_gap(values, metrics)
        state.evaluations.append(metrics)
        history = state.watched(stopping.metric)
        state.stop_reason = decide_stop(history, stopping)
        # The smallest change is for patience alone: better weights are better by however little.
        # The first weights are kept even if the metric is NaN, so that there always is a model.
        better = improvements(history, stopping.mode)
        is_best = len(history) in (1, max(better, default=0))
        if is_best:
            state.best = Best(dict(metrics), state.epoch + 1, state.step)
            state.best_weights = host_weights(module)
        return is_best

    def _metrics(self) -> dict[str, float]:
        """The evaluation's metrics; NaN if the model's predictions are not finite.

        NaN is the worst value, so such weights are never the best; whether training goes on is up
        to the guard, which sees the same in the next steps.
        """
        try:
            with torch.no_grad():
                metrics = self.evaluate(self.context.evaluated_module)
                return {name: float(value) for name, value in metrics.items()}
        except ModelError as error:
            step = self.state.step
            logger.info(f"evaluation after step {step}: {error}; it counts as the worst")
            self.tracker.event("evaluation_failed", step=step, reason=str(error))
            return {self.context.watched_metric: math.nan}


def _gap_text(history: list[dict[str, float]], best_step: int) -> str:
    """The generalisation gap in words; empty if it is not known."""
    gaps = {epoch["step"]: epoch["val/loss_gap"] for epoch in history if "val/loss_gap" in epoch}
    if best_step not in gaps:
        return ""
    last = list(gaps)[-1]
    at_end = ", the last" if last == best_step else f", {gaps[last]:.3g} at the end"
    return (
        f"; generalisation gap (val loss - train loss): {gaps[best_step]:.3g} at the best "
        f"epoch{at_end}"
    )
