"""The evaluate stage: COCO metrics of the trained model, on test if there is one, and on val."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from runkey import paths
from runkey.data.index import SplitName, index_file
from runkey.evaluation.coco import SIZES, CocoResult
from runkey.evaluation.cross_check import check_metrics
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.files import (
    METRICS_JSON,
    OTHER,
    PRECISION_RECALL,
    PREDICTIONS,
    RESAMPLED,
    ends,
    write_metrics,
    write_precision_recall,
    write_resampled,
    write_results,
)
from runkey.evaluation.intervals import Bootstrap, bootstrap, describe_few_objects
from runkey.evaluation.per_image import judge_images
from runkey.evaluation.run import Evaluation, Validation
from runkey.evaluation.thresholds import best_thresholds, describe_thresholds
from runkey.files import write_json
from runkey.hashing import sha256_file
from runkey.identity.inputs import Inputs, check_unchanged
from runkey.identity.key import make_recipe
from runkey.inference.thresholds import THRESHOLDS
from runkey.model.weights import WEIGHTS, load_model
from runkey.params import load_params
from runkey.pipeline.record import FinishedRun, class_metrics
from runkey.pipeline.validation import build_validation
from runkey.progress import want_bars
from runkey.training.device import choose_device, configure_torch
from runkey.units import counted, format_score

logger = logging.getLogger(__name__)

_OTHERS = ("AP50", "AP75")


def evaluate(root: Path) -> None:
    """Write evaluation/ and metrics/evaluate.json, and add both to the training's MLflow run.

    The result is that of test if there is a test split; then that of val is beside it.

    Raises:
        ModelError: model/ cannot be read.
        DataError: the data set is not prepared.
        RecipeError: what this reads is not that of the run.
    """
    params = load_params(root / paths.PARAMS)
    want_bars(params.runtime.progress)
    run, recipe = FinishedRun(params, root), make_recipe("evaluate", root, params)
    inputs = Inputs(root, params, recipe, paths.home_of(paths.store_root()))
    inputs.check()
    run.check(params)
    device, _ = choose_device(params.runtime.device)
    configure_torch(
        params.seed,
        deterministic=params.training.deterministic,
        cpu_threads=params.training.cpu_threads,
    )
    model, card = load_model(root / paths.MODEL)
    model = model.to(device)
    out = root / paths.EVALUATION
    has_test = index_file(root / paths.PREPARED, "test").is_file()
    splits: tuple[SplitName, ...] = ("test", "val") if has_test else ("val",)
    evaluated: list[_Evaluated] = []
    for split in splits:
        validation = build_validation(params, card.model, root, device, split)
        # In fp32 whatever training.precision is, as everything that uses the model computes.
        validation = replace(validation, autocast=nullcontext)
        folder = out / OTHER if evaluated else out
        check = params.runtime.cross_check
        evaluated.append(_evaluate_split(split, validation, model, folder, cross_check=check))
    headline, val = evaluated[0], evaluated[-1]
    losses = {f"{one.split}_loss": one.loss for one in evaluated}
    few = headline.few() | {"split": headline.split} | losses
    if has_test:
        few["val"] = val.few()
    write_json(root / paths.METRICS / "evaluate.json", few)
    weights = sha256_file(root / paths.MODEL / WEIGHTS)
    # By val alone: what was chosen by test would look better on test than it is.
    judged = judge_images(val.validation.records, val.detections)
    thresholds = best_thresholds(judged, val.validation.classes, weights)
    write_json(out / THRESHOLDS, thresholds)
    check_unchanged(root, recipe)
    inputs.check()
    began = f"\n\nTrained from published weights: {card.pretrained}." if card.pretrained else ""
    _record(run, recipe.key, card.model.preset, evaluated, began)
    logger.info(describe_thresholds(thresholds))
    for one in reversed(evaluated):
        objects = sum(each.objects for each in one.result.per_class)
        known = one.result.summary["AP"], one.resampled.intervals["AP"]
        if note := describe_few_objects(objects, *known):
            logger.info(f"{one.split}: {note}" if has_test else note)
    logger.info(_details(headline.result))
    if has_test:
        logger.info(f"on val, which chose the weights: {val.scores()}")
    logger.info(headline.scores())


@dataclass(frozen=True, kw_only=True)
class _Evaluated:
    """The evaluation on a split."""

    split: SplitName
    validation: Validation
    evaluation: Evaluation
    resampled: Bootstrap

    @property
    def result(self) -> CocoResult:
        return self.evaluation.result

    @property
    def detections(self) -> DetectionArrays:
        return self.evaluation.detections

    @property
    def loss(self) -> float:
        return self.evaluation.losses["loss"]

    def few(self) -> dict[str, Any]:
        """Few metrics, for DVC's tables; all are in evaluation/metrics.json."""
        summary = self.result.summary
        return {n: summary[n] for n in ("AP", *_OTHERS)} | ends(self.resampled.intervals)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the metrics that are defined, by their names in MLflow."""
        known = {n: v for n, v in ends(self.resampled.intervals).items() if v is not None}
        return self.evaluation.metrics(prefix) | {f"{prefix}{n}": v for n, v in known.items()}

    def scores(self) -> str:
        """Such as `AP 0.661 (95%: ...), AP50 0.927, AP75 0.774 on 100 held-out images`."""
        few, kind = self.few(), "test" if self.split == "test" else "held-out"
        others = ", ".join(f"{n} {format_score({n: few[n]}, n)}" for n in _OTHERS)
        images = counted(len(self.validation.records), f"{kind} image")
        return f"AP {format_score(few, 'AP')}, {others} on {images}"


def _evaluate_split(
    split: SplitName, validation: Validation, model: nn.Module, out: Path, *, cross_check: bool
) -> _Evaluated:
    """Evaluate on a split, and write its files."""
    evaluation = validation(model)
    result, loss = evaluation.result, evaluation.losses["loss"]
    if cross_check:
        check_metrics(result, validation.records, validation.classes, evaluation.detections)
    resampled = bootstrap(result.matches, result.recalls)
    write_metrics(out / METRICS_JSON, result, resampled, loss=loss, split=split)
    write_resampled(out / RESAMPLED, resampled, validation.records, validation.classes)
    write_results(out / PREDICTIONS, evaluation.detections, validation.classes)
    write_precision_recall(out / PRECISION_RECALL, result)
    return _Evaluated(
        split=split,
        validation=validation,
        evaluation=evaluation,
        resampled=resampled,
    )


def _record(
    run: FinishedRun, key: str, preset: str, evaluated: Sequence[_Evaluated], began: str
) -> None:
    """Add the evaluations to the run; the first one is the result.

    `began` says on the model's page which weights it was trained from.
    """
    headline, *others = evaluated
    result = f"**{headline.scores()}** ({_details(headline.result)})"
    metrics = headline.metrics("eval/") | class_metrics(headline.result.per_class)
    for one in others:
        result += f"\n\nOn {one.split}, which chose the weights: {one.scores()}."
        metrics |= one.metrics(f"eval/{one.split}/")
    run.describe(result)
    run.add_evaluation(key, metrics, headline.split)
    run.save_model(preset, f"{result}{began}", metrics)


def _details(result: CocoResult) -> str:
    """AP by object size, the worst class, the best."""
    by_size = [(size, result.summary[f"AP_{size}"]) for size in SIZES]
    text = ", ".join(f"{size} {ap:.3f}" for size, ap in by_size if ap is not None)
    classes = [(one.ap, one.name) for one in result.per_class if one.ap is not None]
    if len(classes) > 1:
        worst, best = min(classes), max(classes)
        text += f"; by class: from {worst[1]} {worst[0]:.3f} to {best[1]} {best[0]:.3f}"
    return f"AP by size: {text}"
