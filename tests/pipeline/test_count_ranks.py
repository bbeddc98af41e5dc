"""How many processes a training has, before they are joined: the memory plan is made for them."""

from __future__ import annotations

import pytest
import torch

from runkey.training.distributed import count_ranks

CPU = torch.device("cpu")


def test_the_parameter_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert count_ranks(3, CPU, 8) == 3


def test_torchrun_has_started_them_already(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert count_ranks(3, CPU, 8) == 2
