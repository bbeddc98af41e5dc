"""A step in one small file, which replays where there is neither data set nor checkpoint."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runkey.data.batch import Batch, Window
from runkey.errors import TrainingError
from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.params import Params, parse_params
from runkey.training.debug.diagnose import Diagnosis, diagnose
from runkey.training.device import choose_device
from runkey.training.distributed import World
from runkey.training.setup import build_setup
from runkey.training.tracker import Quiet

_FORMAT = "runkey bad step 1"


@dataclass(frozen=True)
class Bundle:
    """All that a step's forward and backward passes depend on."""

    key: str
    """Of the run."""
    step: int
    """Steps done before it."""
    rank: int
    params: dict[str, Any]
    """Of the run, whole, as plain values."""
    num_classes: int
    model: dict[str, Tensor]
    """State dict before the step, on the host."""
    scaler: dict[str, Any]
    """State of fp16's loss scaler; empty without one."""
    window: Window
    device: str
    """cpu or cuda: where the run was trained."""
    torch_version: str

    def write(self, path: Path) -> None:
        """Write the file; nothing but tensors, numbers and text is in it.

        Raises:
            TrainingError: it cannot be written.
        """
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["window"] = [_as_plain(batch) for batch in self.window]
        try:
            torch.save({"format": _FORMAT, **content}, path)
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """Read the file, in which no code is run.

        Raises:
            TrainingError: it is not there, or no bundle.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise TrainingError(f"{path}: not found") from None
        except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise TrainingError(f"{path}: no bundle of `runkey debug-step`") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise TrainingError(f"{path}: no bundle of `runkey debug-step` of this version")
        window = tuple(Batch(**_from_plain(batch)) for batch in content.pop("window"))
        return cls(**content, window=window)

    def parsed_params(self) -> Params:
        """The run's parameters, on a GPU only if the run was and there is one."""
        device = "auto" if self.device == "cuda" else "cpu"
        plain = {**self.params, "runtime": {**self.params["runtime"], "device": device}}
        return parse_params(plain)

    def diagnose(self, model: nn.Module | None = None) -> Diagnosis:
        """Run the step under the probe.

        Args:
            model: of the same state dict, in place of the one that the parameters describe.
        """
        params = self.parsed_params()
        machinery = build_setup(
            model or build_model(params.model, self.num_classes),
            build_criterion(params.model, self.num_classes),
            _OneWindow(self.window),
            lambda _: {},
            params,
            device=choose_device(params.runtime.device)[0],
            tracker=Quiet(),
            say=lambda _: None,
            world=World(),
        ).machinery
        machinery.model.load_state_dict(self.model)
        if machinery.precision.scaler is not None:
            machinery.precision.scaler.load_state_dict(self.scaler)
        machinery.model.train()
        return diagnose(machinery, self.window, seed=params.seed, step=self.step, rank=self.rank)


class _OneWindow:
    """Stands for a loader: there is one step."""

    steps_per_epoch = 1

    def __init__(self, window: Window) -> None:
        self._window = window

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Window]:  # noqa: ARG002
        """The window."""
        yield self._window


def _as_plain(batch: Batch) -> dict[str, Any]:
    """A batch's fields, tensors copied out of the larger ones that they may be views of."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in fields.items()}


def _from_plain(fields: dict[str, Any]) -> dict[str, Any]:
    # torch.load gives tuples back as what they were; lists are for files of other makers.
    return {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
