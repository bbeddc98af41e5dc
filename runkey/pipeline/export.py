"""Export a trained model, and compare the export with the model before it is called done.

    result = export_model(Path("model"), Path("out"), choice, root=workspace)

The images compared are the run's own val images where data/ and prepared/ of the workspace are the
run's, else given ones. An export that differs by more than its precision may is left under
`out.refused`. The comparison is written to parity.json and recorded on the run.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from runkey.errors import DataError, ModelError
from runkey.evaluation.detections import DetectionArrays
from runkey.evaluation.per_image import judge_images
from runkey.evaluation.run import evaluate_detections
from runkey.evaluation.thresholds import best_thresholds
from runkey.files import json_safe, write_json
from runkey.hashing import sha256_file
from runkey.inference.detections import Detections
from runkey.inference.export import Format, Precision, check_choice, versions, write_export
from runkey.inference.model import find_thresholds
from runkey.inference.module import EXPORTED, InferenceModule, InferenceOptions
from runkey.inference.networks import FILES, Arrays, Card, Network, TorchNetwork, open_export
from runkey.inference.thresholds import score_by_class
from runkey.model.detr import Detector
from runkey.model.weights import WEIGHTS, ModelCard, load_model
from runkey.pipeline.record import Addition, add_to_run
from runkey.pipeline.run_images import Sample, detections_by_image, find_sample, read_recipe
from runkey.progress import progress
from runkey.registry.lineage import started_from
from runkey.tracking.store import Store
from runkey.units import format_bytes

logger = logging.getLogger(__name__)

PARITY = "parity.json"
MAX_SCORE_DIFFERENCE = 1e-5
"""Of an fp32 export, between its scores and the model's, best to worst."""
MAX_AP_DIFFERENCE = 5e-4
"""Of an fp32 export: AP is equal to three digits."""
MIN_BOXES_EQUAL = 0.9
"""Of an fp32 export that is compared without ground truth. Scores of other detections may be so
near that two change their rank."""
_NEAR = 1e-3
"""Fraction of the image by which equal boxes may differ."""
MAX_AP_LOSS = 0.2
"""Of an export in bf16 or int8, points of AP (of 100)."""


@dataclass(frozen=True, slots=True)
class ExportChoice:
    """What to export."""

    format: Format = "onnx"
    precision: Precision = "fp32"
    options: InferenceOptions = EXPORTED
    max_ap_loss: float = MAX_AP_LOSS
    """Points of AP that a choice other than fp32 with all layers may lose."""

    @property
    def name(self) -> str:
        """Such as `onnx-fp32`."""
        return f"{self.format}-{self.precision}"

    @property
    def is_exact(self) -> bool:
        """Whether nothing but rounding in fp32 may differ."""
        return self.precision == "fp32" and self.cut == InferenceOptions()

    @property
    def cut(self) -> InferenceOptions:
        """The options that leave out layers, so that scores are others."""
        return InferenceOptions(
            decoder_layers=self.options.decoder_layers, proposals_only=self.options.proposals_only
        )


@dataclass(frozen=True, slots=True)
class Parity:
    """How far an export is from the model, in torch and fp32, as `evaluate` runs it."""

    passed: bool
    compared: str
    images: int
    score_difference: float
    """The largest between scores of the same rank in an image."""
    labels_equal: float
    """Part of the detections whose rank has the same class."""
    boxes_equal: float
    """Part of the detections whose rank has the same class and, within 0.1% of the image, box."""
    box_difference: float
    """The largest of boxes with the same class at the same rank, as a fraction of the image."""
    ap: float | None
    ap_model: float | None
    """AP of the model on the same images; both are none without ground truth."""
    ap_lost: float | None
    """Points of AP."""
    faults: tuple[str, ...]
    """Why it did not pass."""

    @property
    def text(self) -> str:
        """One line: what was compared, and the result."""
        scores = f"scores within {self.score_difference:.1e}"
        if self.ap is None or self.ap_model is None:
            return f"{self.compared}: {scores} of the model's; no AP without ground truth"
        ap = f"AP {self.ap:.4f}, the model's {self.ap_model:.4f}"
        return f"{self.compared}: {ap}, {scores}"


@dataclass(frozen=True, slots=True)
class Exported:
    """An export, and how it compares."""

    folder: Path
    """Where it lies; of one that did not pass, a name with `.refused`."""
    card: Card
    parity: Parity
    size: int
    """Bytes of the model's files."""
    recorded: str
    """Where the comparison is recorded, or why it is not; one line."""


def export_model(
    model: Path,
    out: Path,
    choice: ExportChoice,
    *,
    store: Store | None,
    root: Path | None = None,
    images: Sequence[Path] = (),
    limit: int | None = None,
) -> Exported:
    """Export a model into a new folder, and compare it with the model.

    Args:
        model: folder with model.json and weights.safetensors.
        out: folder to make.
        choice: format, precision, options.
        store: where the run is recorded; None: nothing is recorded.
        root: the workspace whose data/ and prepared/ may be the run's.
        images: image files to compare on if the workspace has not the run's data.
        limit: compare on so many val images at most, drawn by the run's seed.

    Raises:
        ModelError: the folder holds no model, or the choice does not go together.
        LockError: what the format needs is not installed.
        DataError: there are no images to compare on.
    """
    if out.exists():
        raise ModelError(f"{out}: is there already; name a new folder with --out")
    check_choice(choice.format, choice.precision)
    detector, card = load_model(model)
    recipe = read_recipe(model)
    sample = find_sample(card, recipe, root, images, limit)
    if not sample.records and not choice.is_exact:
        raise DataError(
            f"{choice.name}: AP lost cannot be measured on {sample.what}, which have no ground"
            " truth; export in the run's repository, or take --precision fp32"
        )
    made = _card(model, card, recipe, choice, sample, store)
    made["thresholds"] = _thresholds(model, detector, choice, sample)
    out.parent.mkdir(parents=True, exist_ok=True)
    calibrations = (sample.calibration(), []) if choice.precision == "int8" else ([],)
    _remove_killed(out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-{os.getpid()}-", dir=out.parent) as name:
        for number, calibration in enumerate(calibrations):
            folder = Path(name) / str(number)
            write_export(detector, made, folder, options=choice.options, calibration=calibration)
            parity = compare_export(detector, folder, choice, sample)
            about = {"calibration_images": len(calibration)} if choice.precision == "int8" else {}
            write_json(folder / PARITY, _parity_json(made, choice, parity) | about)
            if parity.passed:
                break
            if number + 1 < len(calibrations):
                logger.info(f"{parity.text}: {'; '.join(parity.faults)}; now convolutions in fp32")
        target = out if parity.passed else out.with_name(f"{out.name}.refused")
        if target != out and target.is_dir():
            shutil.rmtree(target)
        folder.rename(target)
    size = sum(file.stat().st_size for file in target.glob("model.*"))
    recorded = add_to_run(store, made["key"], _addition(choice, parity, size))
    return Exported(target, made, parity, size, recorded)


def _remove_killed(out: Path) -> None:
    """Remove the temporary folders of exports to `out` whose process is gone."""
    temporary = re.compile(rf"\.{re.escape(out.name)}-(\d+)-[a-z0-9_]{{8}}")
    for folder in out.parent.iterdir():
        match = temporary.fullmatch(folder.name)
        if match and not Path("/proc", match[1]).exists():
            shutil.rmtree(folder, ignore_errors=True)


# --- the comparison


def compare_export(
    detector: Detector, folder: Path, choice: ExportChoice, sample: Sample
) -> Parity:
    """Run an export and the model on the same images.

    Args:
        detector: the trained model.
        folder: of the export.
        choice: what was exported: it decides how far the two may differ.
        sample: the images, and their ground truth.
    """
    whole: Network = TorchNetwork(InferenceModule(detector))
    same = whole
    if choice.cut != InferenceOptions():
        same = TorchNetwork(InferenceModule(detector, choice.cut))
    exported = open_export(folder).network
    found: dict[str, dict[int, Detections]] = {"export": {}, "model": {}}
    differences, equal, near, total = [0.0, 0.0], 0, 0, 0
    with progress("compare", sample.count, "images") as steps:
        for pixels in sample.batches():
            answers = exported(pixels.images)
            expected = same(pixels.images)
            reference = expected if same is whole else whole(pixels.images)
            found["export"] |= detections_by_image(answers, pixels)
            found["model"] |= detections_by_image(reference, pixels)
            difference, box_difference, hits, close = _differences(answers, expected)
            differences = [max(differences[0], difference), max(differences[1], box_difference)]
            equal, near, total = equal + hits, near + close, total + answers[1].size
            steps.advance(len(pixels.ids))
    scores = [_ap(sample, found[name]) for name in ("export", "model")]
    lost = None if None in scores else 100 * (scores[1] - scores[0])  # type: ignore[operator]
    boxes_equal = near / max(total, 1)
    faults = tuple(_faults(choice, differences[0], boxes_equal, lost))
    return Parity(
        passed=not faults,
        compared=sample.what,
        images=sample.count,
        score_difference=differences[0],
        labels_equal=equal / max(total, 1),
        boxes_equal=boxes_equal,
        box_difference=differences[1],
        ap=scores[0],
        ap_model=scores[1],
        ap_lost=lost,
        faults=faults,
    )


def _differences(answers: Arrays, expected: Arrays) -> tuple[float, float, int, int]:
    """The largest differences of scores and boxes, and how many classes, and boxes, are equal."""
    (scores, labels, boxes), (their_scores, their_labels, their_boxes) = answers, expected
    if scores.shape != their_scores.shape or not np.isfinite(scores).all():
        return float("inf"), float("inf"), 0, 0
    same = labels == their_labels
    apart = np.abs(boxes - their_boxes).max(-1)[same]
    farthest = float("inf") if np.isnan(apart).any() else float(apart.max(initial=0))
    near = int((apart < _NEAR).sum())
    return float(np.abs(scores - their_scores).max()), farthest, int(same.sum()), near


def _ap(sample: Sample, found: Mapping[int, Detections]) -> float | None:
    if not sample.records:
        return None
    try:
        return evaluate_detections(sample.records, sample.classes, found).summary["AP"]
    except ModelError:  # NaN or infinity
        return 0.0


def _faults(
    choice: ExportChoice, score_difference: float, boxes_equal: float, lost: float | None
) -> Iterator[str]:
    if choice.is_exact:
        if not score_difference <= MAX_SCORE_DIFFERENCE:
            yield f"scores differ by {score_difference:.1e}, at most {MAX_SCORE_DIFFERENCE:.0e}"
        if lost is None and boxes_equal < MIN_BOXES_EQUAL:
            yield f"{boxes_equal:.0%} of the boxes are equal, at least {MIN_BOXES_EQUAL:.0%}"
        if lost is not None and not abs(lost) < 100 * MAX_AP_DIFFERENCE:
            yield f"AP differs by {abs(lost):.2f} points; it must be equal to three digits"
    elif lost is not None and not lost <= choice.max_ap_loss:
        yield f"loses {lost:.2f} points of AP, at most {choice.max_ap_loss:g}"


# --- card, parity.json, the run's record


def _card(
    model: Path,
    card: ModelCard,
    recipe: Mapping[str, Any] | None,
    choice: ExportChoice,
    sample: Sample,
    store: Store | None,
) -> Card:
    sizes = card.sizes
    made: Card = {
        "format": 1,
        "key": recipe["key"] if recipe else None,
        "export": choice.format,
        "precision": choice.precision,
        "file": FILES[choice.format],
        "classes": [{"index": one.index, "id": one.id, "name": one.name} for one in card.classes],
        "sizes": {
            "short_side": sizes.short_side,
            "long_side": sizes.long_side,
            "intensity_range": sizes.intensity_range,
        },
        "thresholds": {},
        "preset": card.model.preset,
        "options": {name: value for name, value in asdict(choice.options).items() if value},
        "environment": versions(choice.format),
    }
    if card.pretrained:
        made["pretrained"] = asdict(card.pretrained)
    if (model / WEIGHTS).is_file():
        made["weights"] = sha256_file(model / WEIGHTS)
    if recipe:
        made["parts"] = recipe.get("parts", {})
        made["data"] = {"md5": recipe["preimages"].get("data")}
        cache = store.cache if store else None
        if began := started_from(recipe["preimages"]["params"], {}, cache):
            made["started_from"] = asdict(began)
    return cast(Card, dict(made) | dict(sample.about))


def _thresholds(
    model: Path, detector: Detector, choice: ExportChoice, sample: Sample
) -> dict[str, float]:
    """Each class's score of best F1; without some layers, measured again on the sample."""
    if choice.cut == InferenceOptions():
        return dict(find_thresholds(model))
    network = TorchNetwork(InferenceModule(detector, choice.cut))
    found: dict[int, Detections] = {}
    for pixels in sample.batches():
        found |= detections_by_image(network(pixels.images), pixels)
    judged = judge_images(sample.records, DetectionArrays.from_images(found))
    return dict(score_by_class(best_thresholds(judged, sample.classes, weights="")))


def _parity_json(card: Card, choice: ExportChoice, parity: Parity) -> dict[str, Any]:
    limits: dict[str, float] = {"ap_lost": choice.max_ap_loss}
    if choice.is_exact:
        limits = {"score_difference": MAX_SCORE_DIFFERENCE, "ap_difference": MAX_AP_DIFFERENCE}
    named = {"key": card["key"], "export": card["export"], "precision": card["precision"]}
    parts: dict[str, Any] = json_safe({**named, **asdict(parity), "limits": limits})
    return {"format": 1} | parts


def _addition(choice: ExportChoice, parity: Parity, size: int) -> Addition:
    """What is recorded on the run: metrics, a tag, and the comparison in its record."""
    values: dict[str, float] = {"size_mb": size / 1e6, "score_difference": parity.score_difference}
    if parity.ap is not None and parity.ap_lost is not None:
        values |= {"AP": parity.ap, "AP_lost": parity.ap_lost}
    finite = {name: value for name, value in values.items() if np.isfinite(value)}
    outcome = "passed" if parity.passed else f"refused: {'; '.join(parity.faults)}"
    return Addition(
        metrics={f"export/{choice.name}/{name}": value for name, value in finite.items()},
        tags={f"export.{choice.name}": f"{outcome} ({parity.text})"},
        exports={choice.name: {"time": int(time.time()), **asdict(parity), **finite}},
    )


def describe(exported: Exported) -> list[str]:
    """Return the lines that the command prints."""
    parity, card = exported.parity, exported.card
    made = f"{card['export']} {card['precision']}"
    lines = [f"{made}, {parity.text}"]
    lines += [f"refused: {fault}" for fault in parity.faults]
    place = f"{exported.folder}/: {card['file']} ({format_bytes(exported.size)})"
    lines += [f"{place}, card.json, detect.py, {PARITY}; {exported.recorded}"]
    return lines
