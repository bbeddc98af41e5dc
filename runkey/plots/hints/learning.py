"""Rules about what is learnt: clipping, learning rate, overfitting, classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runkey.plots.hints.hint import CLASS_SCORES, MOST_NAMES, Hint
from runkey.plots.hints.values import FEWEST, finite, now, recent, skipped_lately
from runkey.plots.log import TrainingLog, number

_LATEST = 3
"""Epochs that must all say that the loss has risen: one alone may, of a training that goes well."""
_HIGH = 2e-3
"""Of AdamW's rates; above it a loss that stays is not for want of more."""
_GAP = 1.4
"""Held-out loss over training loss.  On the sample 0.9 to 1; without augmentation 1.3 in epoch 15,
2 at the end, and AP 0.05 lower (benchmarks/results/techniques.json)."""


def clipping(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    """Every step is clipped, or none."""
    before, after = recent(log, "train/grad_norm"), recent(log, "train/grad_norm_clipped")
    if len(before) < FEWEST or len(before) != len(after):
        return
    if settings.get("optimizer.clip.mode") == "percentile":
        return  # the threshold follows the norms by itself
    share = float((before > 1.001 * after).mean())
    typical, high = (float(f"{np.percentile(before, q):.2g}") for q in (50, 90))
    threshold = now("optimizer.clip.threshold", settings)
    if share >= 0.98 and typical >= 2 * np.median(after):
        yield Hint(
            "clipping",
            f"gradients are clipped in {share:.0%} of the steps, from a norm of about {typical:g}"
            f" to {np.median(after):.2g}: every step has the same length",
            f"raise {threshold} to about {high:g} to clip outliers alone",
        )
    limit = settings.get("optimizer.clip.threshold")
    norm_mode = settings.get("optimizer.clip.mode") == "norm"
    if norm_mode and share == 0 and len(log.epochs) >= 3 and isinstance(limit, (int, float)):
        largest = float(np.max(before))
        if largest < limit / 2:
            yield Hint(
                "clipping",
                f"clipping never acts: the largest gradient norm is {largest:.2g}",
                f"lower {threshold} to about {high:g}, or set optimizer.clip.mode: none",
            )


def rate(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    """The learning rate is too high or too low, by the loss."""
    lr = now("lr", settings)
    _, losses = finite(log, "train/epoch_loss")
    if skipped := skipped_lately(log):
        were = "step was" if skipped == 1 else "steps were"
        yield Hint(
            "lr_high",
            f"{skipped} {were} skipped in the last epoch: loss or gradients were not finite",
            f"lower {lr} to a third, or set training.precision: off",
        )
    elif len(losses) > _LATEST and losses[-_LATEST:].min() > 1.1 * (
        least := _least_before(losses, settings)
    ):
        yield Hint(
            "lr_high",
            f"the training loss has risen from {least:.3g} to {losses[-1]:.3g}",
            f"lower {lr} to a third, or raise {now('schedule.warmup_fraction', settings)}",
        )
    _, scores = finite(log, "val/AP")
    fallen = 1 - losses[-1] / losses[0] if len(losses) else 1.0
    slow = len(losses) >= 4 and 0 <= fallen < 0.05 and not _rising(log)
    given = settings.get("lr")
    slow = slow and not (isinstance(given, (int, float)) and given > _HIGH)
    if slow and (not len(scores) or scores.max() < 0.1):
        yield Hint(
            "lr_low",
            f"the training loss has fallen by {fallen:.1%} in {len(losses)} epochs",
            f"raise {lr} three times, or lower {now('schedule.warmup_fraction', settings)}",
        )


def _least_before(losses: NDArray[np.float64], settings: Mapping[str, Any]) -> float:
    """The least of the earlier epochs' losses; with a cyclical rate, of those a cycle ago."""
    earlier = losses[:-_LATEST]
    cycle = settings.get("schedule.cycle_epochs")
    if settings.get("schedule.name") == "cyclical" and isinstance(cycle, (int, float)):
        earlier = losses[: -max(_LATEST, round(cycle))]
    return float(earlier.min()) if len(earlier) else math.inf


def _rising(log: TrainingLog) -> bool:
    """Whether the rate is higher than an epoch ago: warm-up, or a schedule's way up."""
    steps, rates = log.of_steps("train/lr")
    if not len(rates):
        return False
    ago = float(np.interp(steps[-1] - (log.steps_per_epoch or 1.0), steps, rates))
    return bool(rates[-1] > 1.02 * ago)


def overfitting(log: TrainingLog, settings: Mapping[str, Any]) -> Iterator[Hint]:
    """The loss of held-out images rises, or is far above that of training."""
    steps, held_out = finite(log, "val/loss")
    train_steps, train = finite(log, "train/epoch_loss")
    if len(steps) < 4 or not len(train):
        return
    trained = np.interp(steps, train_steps, train)
    best = int(np.argmin(held_out))
    risen = len(held_out) - best > 3 and held_out[-1] > 1.05 * held_out[best]
    if risen and trained[-1] < trained[best]:
        epoch = steps[best] / (log.steps_per_epoch or 1.0)
        seen = (
            f"since epoch {epoch:.0f} the loss of held-out images has risen from"
            f" {held_out[best]:.3g} to {held_out[-1]:.3g}, while that of training fell from"
            f" {trained[best]:.3g} to {trained[-1]:.3g}"
        )
    elif np.all(held_out[-3:] > _GAP * trained[-3:]):
        seen = (
            f"the loss of held-out images is {held_out[-1]:.3g}, that of training images"
            f" {trained[-1]:.3g}"
        )
    else:
        return
    yield Hint(
        "overfitting",
        seen,
        f"strengthen data.augment, raise {now('optimizer.weight_decay', settings)} or"
        f" {now('model.dropout', settings)}, or lower {now('training.epochs', settings)};"
        " the best weights are kept",
    )


def classes(log: TrainingLog) -> Iterator[Hint]:
    """Classes that no detection finds."""
    fields = log.events.get(CLASS_SCORES, {})
    never, classes = fields.get("never_found", []), fields.get("classes", 0)
    if never and number(fields.get("mean_AP50")) > 0.2:
        shown = ", ".join(map(str, never[:MOST_NAMES]))
        count = fields.get("never_found_count", len(never))
        more = f" and {count - MOST_NAMES} more" if count > MOST_NAMES else ""
        yield Hint(
            "class",
            f"{count} of {classes} classes are never found (AP50 0): {shown}{more}",
            "add images of these classes, which helps most; or raise training.epochs, or look at"
            " their names and boxes in prepared/contact_sheet.jpg",
        )
