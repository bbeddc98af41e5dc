"""The evaluate stage: COCO metrics of the trained model."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from runkey import paths
from runkey.evaluation.coco import SIZES, CocoResult
from runkey.evaluation.files import (
    METRICS_JSON,
    PRECISION_RECALL,
    PREDICTIONS,
    RESAMPLED,
    ends,
    write_metrics,
    write_precision_recall,
    write_resampled,
    write_results,
)
from runkey.evaluation.intervals import bootstrap, describe_few_objects
from runkey.evaluation.per_image import judge_images
from runkey.evaluation.run import to_results_json
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
    # In fp32 whatever training.precision is, as everything that uses the model computes.
    validation = replace(build_validation(params, card.model, root, device), autocast=nullcontext)
    evaluation = validation(model.to(device))
    out = root / paths.EVALUATION
    loss = evaluation.losses["loss"]
    resampled = bootstrap(evaluation.result.matches, evaluation.result.recalls)
    write_metrics(out / METRICS_JSON, evaluation.result, resampled, loss=loss)
    write_resampled(out / RESAMPLED, resampled, validation.records, validation.classes)
    # Few, for DVC's tables; all numbers are in evaluation/metrics.json.
    few = {name: evaluation.result.summary[name] for name in ("AP", *_OTHERS)}
    few |= ends(resampled.intervals) | {"val_loss": loss}
    write_json(root / paths.METRICS / "evaluate.json", few)
    results = to_results_json(evaluation.detections, validation.classes)
    write_results(out / PREDICTIONS, results)
    write_precision_recall(out / PRECISION_RECALL, evaluation.result)
    judged = judge_images(validation.records, validation.classes, results)
    weights = sha256_file(root / paths.MODEL / WEIGHTS)
    thresholds = best_thresholds(judged, validation.classes, weights)
    write_json(out / THRESHOLDS, thresholds)
    check_unchanged(root, recipe)
    inputs.check()
    images = counted(len(validation.records), "held-out image")
    others = ", ".join(f"{n} {format_score({n: few[n]}, n)}" for n in _OTHERS)
    scores = f"AP {format_score(few, 'AP')}, {others} on {images}"
    result = f"**{scores}** ({_details(evaluation.result)})"
    run.describe(result)
    metrics = evaluation.metrics("eval/") | class_metrics(evaluation.result.per_class)
    metrics |= {f"eval/{n}": v for n, v in ends(resampled.intervals).items() if v is not None}
    run.add_evaluation(recipe.key, metrics)
    began = f"\n\nTrained from published weights: {card.pretrained}." if card.pretrained else ""
    run.save_model(card.model.preset, f"{result}{began}", metrics)
    logger.info(describe_thresholds(thresholds))
    objects = sum(one.objects for one in evaluation.result.per_class)
    if note := describe_few_objects(objects, few["AP"], resampled.intervals["AP"]):
        logger.info(note)
    logger.info(_details(evaluation.result))
    logger.info(scores)


def _details(result: CocoResult) -> str:
    """AP by object size, the worst class, the best."""
    by_size = [(size, result.summary[f"AP_{size}"]) for size in SIZES]
    text = ", ".join(f"{size} {ap:.3f}" for size, ap in by_size if ap is not None)
    classes = [(one.ap, one.name) for one in result.per_class if one.ap is not None]
    if len(classes) > 1:
        worst, best = min(classes), max(classes)
        text += f"; by class: from {worst[1]} {worst[0]:.3f} to {best[1]} {best[0]:.3f}"
    return f"AP by size: {text}"
