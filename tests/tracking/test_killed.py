"""Trainers killed while they log and send, for real: every point is in MLflow, and once.

`RUNKEY_TEST_TRACKING_URI` names a further server to try, on PostgreSQL perhaps.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Set
from pathlib import Path

import pytest

from runkey.identity.record import RunPointer
from runkey.tracking.store import Store, open_client
from tests.support.mlflow_store import Server
from tests.support.points import assert_the_same_points, read_jsonl
from tests.support.trainer import KEY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
KILLS = 6


class Trainer:
    """Processes of `tests.support.trainer`, one after another in one folder."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store

    def start(self, steps: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.support.trainer", str(self.folder), self.store.uri]
        if self.store.artifacts:
            command += ["--artifacts", str(self.store.artifacts)]
        command += ["--steps", str(steps)]
        return subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @property
    def sent(self) -> int:
        """Bytes of the log that MLflow is known to have."""
        pointer = RunPointer.read(self.folder)
        return pointer.sent.get("train.jsonl", 0) if pointer else 0

    def kill_one(self, rng: random.Random, meanwhile: Callable[[], None] | None = None) -> None:
        """Let one train until something of it was sent, and kill it at some moment after that."""
        before = self.sent
        process = self.start(10**6)
        while self.sent == before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        if meanwhile:
            meanwhile()
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()

    def finish(self) -> str:
        """Let one train to the end; what it said."""
        entries = read_jsonl(self.folder / "train.jsonl")
        last = max(entry["step"] for entry in entries if "values" in entry)
        process = self.start(last + 200)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        return said


def runs_of_all(store: Store) -> set[str]:
    """Ids of the runs that trainers of such tests made there."""
    client = open_client(store)
    experiments = [one.experiment_id for one in client.search_experiments()]
    return {run.info.run_id for run in client.search_runs(experiments, f"tags.key = '{KEY}'")}


def check(trainer: Trainer, kills: int, others: Set[str] = frozenset()) -> None:
    store, pointer = trainer.store, RunPointer.read(trainer.folder)
    assert pointer is not None
    assert pointer.run_id is not None
    points = assert_the_same_points(trainer.folder / "train.jsonl", store, pointer.run_id)
    assert points.total() > 1000
    run = open_client(store).get_run(pointer.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["resumed"] == str(kills)
    assert runs_of_all(store) - others == {pointer.run_id}


def test_on_a_database(store: Store, tmp_path: Path) -> None:
    trainer, rng = Trainer(tmp_path / "key", store), random.Random(0)
    for _ in range(KILLS):
        trainer.kill_one(rng)
    assert trainer.finish() == ""
    check(trainer, KILLS)


def test_on_a_server_that_is_killed_too(server: Server, store: Store, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "key", Store(server.address, None, tmp_path))
    rng = random.Random(1)
    for number in range(KILLS):
        trainer.kill_one(rng, server.kill if number % 2 else None)
        if number % 2:
            server.start()
    assert trainer.finish() == ""
    check(trainer, KILLS)


@pytest.mark.skipif(
    "RUNKEY_TEST_TRACKING_URI" not in os.environ, reason="RUNKEY_TEST_TRACKING_URI names no server"
)
def test_on_the_server_of_the_environment(tmp_path: Path) -> None:
    store = Store(os.environ["RUNKEY_TEST_TRACKING_URI"], None, tmp_path)
    trainer, others = Trainer(tmp_path / "key", store), runs_of_all(store)
    rng = random.Random(2)
    for _ in range(KILLS):
        trainer.kill_one(rng)
    assert trainer.finish() == ""
    check(trainer, KILLS, others)
