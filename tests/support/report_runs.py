"""Runs of a local store with all that a page shows, and some that end early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from runkey.identity.record import Record
from tests.support.logs import LOGS
from tests.support.records import key_of, make_run

ROOT = Path(__file__).parents[2]
CLASSES = {
    "<script>alert(1)</script>": {"AP": 0.4, "AP50": 0.6, "AR": 0.5, "objects": 7},
    "白血球 & co": {"AP": 0.7, "AP50": 0.9, "AR": 0.8, "objects": 5},
}
THRESHOLDS = {
    "iou": 0.5,
    "weights": "ab" * 32,
    "classes": {
        name: {"score": 0.4321, "precision": 0.9, "recall": 0.8, "f1": 0.8471} for name in CLASSES
    },
}
SIZES = {
    "small": {"AP": 0.3, "objects": 3},
    "medium": {"AP": 0.6, "objects": 4},
    "large": {"AP": None, "objects": 0},
}


def files_of(folder: Path, kind: str, ap: float) -> dict[str, bytes]:
    """The artifacts of a run whose log is of a kind; its AP is in its code, too."""
    preimages = {
        "code": {"files": {"runkey/same.py": "aa" * 32, "runkey/loop.py": f"{ap:.3f}" + "b" * 59}},
        "environment": {"packages": [["torch", "2.10", f"b{ap}", "sha"], ["same", "1", "0", "x"]]},
    }
    log = LOGS[kind](folder / "train.jsonl")
    picture = folder / "confusion.png"
    Image.new("RGB", (60, 40), "white").save(picture)
    scores = {
        **{"AP": ap, "AP50": 0.8, "AP75": 0.6, "AP_small": None, "loss": 2.5},
        "per_class": {name: c | {"by_size": SIZES} for name, c in CLASSES.items()},
    }
    of_split = {
        "images": 400,
        "objects": 1809,
        "objects_per_image": {"mean": 4.5, "maximum": 8},
        "classes": {name: {"objects": c["objects"], "images": 1} for name, c in CLASSES.items()},
        "sizes_by_area": {"small": 848, "medium": 867, "large": 94},
        "box_side_pixels": {"5%": 15.0, "50%": 34.0, "95%": 96.0},
    }
    return {
        "logs/train.jsonl": log.read_bytes(),
        "logs/system.jsonl": b'{"time": 1, "values": {"system/cpu_utilization_percentage": 50}}\n',
        "evaluation/metrics.json": json.dumps(scores).encode(),
        "evaluation/confusion.png": picture.read_bytes(),
        "evaluation/predictions.json": b"[]",
        "evaluation/thresholds.json": json.dumps(THRESHOLDS).encode(),
        "prepared/statistics.json": json.dumps({"train": of_split, "val": of_split}).encode(),
        "model/weights.pt": b"weights",
        "model/key.json": json.dumps({"preimages": preimages}).encode(),
    }


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with an empty local store, which commands take for theirs."""
    root = tmp_path / "checkout"
    (root / "stages").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", root)
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def a_run(checkout: Path, tmp_path: Path) -> Callable[..., Record]:
    """Makes a finished run: name, AP, lr, kind of its log, content of files that it has instead."""

    def make(
        name: str,
        ap: float = 0.5,
        lr: str = "0.0001",
        kind: str = "complete",
        changed: Mapping[str, bytes] | None = None,
    ) -> Record:
        key = key_of(name)
        folder = tmp_path / key
        folder.mkdir()
        parts = dict.fromkeys(("code", "data", "environment"), "ab" * 32)
        return make_run(
            checkout,
            key,
            files=files_of(folder, kind, ap) | dict(changed or {}),
            name=name,
            params={
                **{"lr": lr, "seed": "0", "model.dropout": "0.1", "key": key},
                **{f"key.{part}": digest for part, digest in parts.items()},
                "key.params": key.removeprefix("rk2-"),
            },
        )

    return make


@pytest.fixture
def an_interrupted_run(checkout: Path) -> Callable[[str], Record]:
    """Makes a run that wrote no record: its log, of a kind, lies where it was trained."""

    def make(kind: str) -> Record:
        key = key_of(kind)
        record = make_run(checkout, key, files={}, status="KILLED", with_details=False, name=kind)
        LOGS[kind](checkout / ".runkey" / key / "train.jsonl")
        return record

    return make
