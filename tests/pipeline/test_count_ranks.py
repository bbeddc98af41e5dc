"""How many processes a training has, before they are joined: the memory plan is made for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runkey.params import Params, load_params
from runkey.pipeline.train import count_ranks

CPU = torch.device("cpu")
PARAMS = Path(__file__).parents[2] / "params.yaml"


def with_processes(count: int) -> Params:
    params = load_params(PARAMS)
    runtime = params.runtime.model_copy(update={"processes": count})
    return params.model_copy(update={"runtime": runtime})


def test_the_parameter_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert count_ranks(with_processes(3), CPU) == 3


def test_torchrun_has_started_them_already(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert count_ranks(with_processes(3), CPU) == 2
