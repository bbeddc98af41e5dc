"""A training that goes wrong in a step and is killed: python -m tests.support.killed_training

    FOLDER HOW PASS STEP

HOW and PASS: see `plant`; STEP: the one before which the process gets SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from torch import nn

from runkey import params
from runkey.data.dataset import GlobalBatch
from runkey.tracking.log import JsonlLog
from tests.support.planted import How, plant
from tests.support.squares import SquaresLoader, detector_params, make_detector, train_detector

LAYER = "transformer.encoder.layers.0.self_attn.out_proj"


def parameters() -> params.Params:
    """Of the training; the schedule goes by the evaluations."""
    return detector_params(schedule={"name": "plateau", "patience": 1})


def planted_model(how: How, number: int) -> nn.Module:
    """Its model at the start."""
    model = make_detector(parameters())
    plant(model, LAYER, how, {number})
    return model


def main(folder: str, how: How, number: str, last: str) -> None:
    """Train until the end."""

    def change(step: int, window: GlobalBatch) -> GlobalBatch:
        if step == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
        return window

    train_detector(
        parameters(),
        model=planted_model(how, int(number)),
        loader=SquaresLoader(change=change),
        folder=Path(folder),
        seconds=0,
        tracker=JsonlLog(Path(folder) / "train.jsonl"),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
