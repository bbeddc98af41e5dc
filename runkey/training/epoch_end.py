"""The end of an epoch and of a training: evaluation, the best weights, an early stop, a line."""

from __future__ import annotations

import math

import torch
from torch import nn

from runkey.errors import ModelError
from runkey.training.early_stopping import Judge, judge_history, loss_gap, watched_value
from runkey.training.guard.guard import Guard
from runkey.training.meters import Stopwatch
from runkey.training.progress import epoch_line
from runkey.training.setup import Setup
from runkey.training.state import FitResult, LoopState, Running
from runkey.training.together import metrics_together


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
    metrics = metrics_together(lambda: _judge(setup, state, module), setup.world, setup.interrupts)
    value = watched_value(metrics, stopping.metric)
    values |= metrics | loss_gap(values, metrics)
    state.evaluations.append(metrics)
    if stopping.enabled:
        judge = Judge(stopping.mode, stopping.min_delta)
        history = state.watched(stopping.metric)
        verdict = judge_history(history, judge, stopping.patience, stopping.metric)
        state.stop_reason = verdict.reason
    # The smallest change is for patience alone: better weights are better by however little.
    return state.offer(value, metrics, module, Judge(stopping.mode))


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
