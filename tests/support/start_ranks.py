"""Two real processes that train together over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]


class Ranks:
    """Processes of one world, started together."""

    def __init__(self, command: list[str], size: int, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=os.environ
                | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                }
                | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def end(self, timeout: float = 120) -> list[tuple[int, str, str]]:
        """Wait for all; exit code, stdout and stderr of each."""
        limit = time.monotonic() + timeout
        ended = []
        for process in self.processes:
            out, err = process.communicate(timeout=max(0.1, limit - time.monotonic()))
            ended.append((process.returncode, out, err))
        return ended

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def command(scenario: str, folder: Path, *argument: str) -> list[str]:
    """The command line of a rank; its results go to the folder."""
    out = str(folder / "out-%.pt")
    return [sys.executable, "-m", "tests.support.ranks", scenario, out, *argument]


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Ranks]]:
    """Start ranks; those that are left at the end are killed."""
    started: list[Ranks] = []

    def begin(command: list[str], size: int = 2, **environment: str) -> Ranks:
        started.append(Ranks(command, size, **environment))
        return started[-1]

    yield begin
    for ranks in started:
        ranks.kill()


@pytest.fixture(scope="session")
def results(
    start: Callable[..., Ranks], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Any]]:
    """What a function of tests/support/ranks.py returns on each rank."""

    def run(scenario: str, *argument: str, size: int = 2) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        ended = start(command(scenario, folder, *argument), size).end()
        assert all(code == 0 for code, _, _ in ended), ended
        return [torch.load(folder / f"out-{rank}.pt") for rank in range(size)]

    return run


@pytest.fixture
def train(start: Callable[..., Ranks], tmp_path: Path) -> Callable[..., list[tuple[int, str, str]]]:
    """Train the toy on two ranks in `tmp_path`, with something that happens; how they ended."""

    def run(*what: str) -> list[tuple[int, str, str]]:
        return start(command("train", tmp_path, str(tmp_path / "checkpoints"), *what)).end()

    return run
