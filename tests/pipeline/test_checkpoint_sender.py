"""Checkpoints that are sent to a real server: whole ones are found again, by key and generation."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runkey.errors import RegistryError
from runkey.files import write_atomically
from runkey.identity.record import KEY
from runkey.pipeline.share import CheckpointSender
from runkey.registry.checkpoints import (
    Manifest,
    SharedFolder,
    all_shared,
    newest_shared,
    remove_all,
    remove_earlier,
)
from runkey.registry.library import ServerLibrary
from runkey.registry.rest import RestClient
from runkey.tracking.store import Store, start_server, stop_server, wait_until_healthy
from runkey.training.checkpoint import FolderCheckpoints, newest_files
from tests.support import checkpoint_kit as kit
from tests.support.records import key_of


class Sending:
    """A training that writes checkpoints, and its run on a server."""

    def __init__(self, folder: Path, address: str, key: str) -> None:
        self.folder, self.key = folder, key
        self.library = ServerLibrary(address, folder / "home")
        self.client = self.library.client
        self.run_id = make_run(self.client, key)
        self.training = kit.Training()
        folder.mkdir(exist_ok=True)
        self.checkpoints = FolderCheckpoints(
            folder, kit.FINGERPRINT | {"key": key}, interval=kit.Interval(0)
        )
        write_atomically(folder / "train.jsonl", "")

    def place(self) -> SharedFolder:
        run = self.client.run(self.run_id)
        assert run
        return SharedFolder(self.client, run)

    def save(self, *, anchor: bool = False) -> None:
        self.training.step()
        self.training.evaluate()
        self.checkpoints.save(self.training.checkpoint(), wait=True, anchor=anchor)

    def sender(self, generation: int = 1, **changes: Any) -> CheckpointSender:
        options: dict[str, Any] = {"key": self.key, "generation": generation, "seconds": 0.01}
        sender = CheckpointSender(
            self.folder, self.place, **options | {"retry_seconds": 0.1} | changes
        )
        sender.start()
        return sender

    def found(self) -> list[Manifest]:
        return [manifest for manifest, _ in newest_shared(self.library, self.key)]

    def names(self, folder: str = "") -> list[str]:
        inner = f"checkpoints/{folder}".rstrip("/")
        return sorted(f.path for f in self.client.artifact_files(self.run_id, inner))


def make_run(client: RestClient, key: str) -> str:
    with suppress(RegistryError):  # another test made it
        client.post("experiments/create", {"name": "shared"})
    where = client.experiment("shared").experiment_id
    tags = [{"key": KEY, "value": key}]
    made = client.post("runs/create", {"experiment_id": where, "start_time": 1, "tags": tags})
    return str(made["run"]["info"]["run_id"])


def until(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.02)


@pytest.fixture
def sending(address: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Sending]:
    begun = Sending(tmp_path / "training", address, key_of(request.node.name))
    yield begun
    begun.checkpoints.finish()


slow = pytest.mark.slow


@slow
def test_the_newest_is_sent_and_the_newest_two_are_kept(sending: Sending, tmp_path: Path) -> None:
    sending.save(anchor=True)
    sender = sending.sender()
    for step in (1, 2, 3, 4):
        until(lambda step=step: sender.sent and sender.sent.step == step)
        sending.save()
    sender.send_last()
    assert sender.sent
    assert sender.sent.step == 5
    newest, before = sending.found()
    assert (newest.step, before.step) == (5, 4)
    needed = newest_files(sending.folder)
    assert needed
    assert set(newest.files) == {*needed.names, "train.jsonl"}
    # The anchor was sent once.
    assert newest.files["anchor-00000001.ckpt"].path == "g1/000001-anchor-00000001.ckpt"
    used = {file.path for one in (newest, before) for file in one.files.values()}
    there = used | {newest.path, before.path}
    assert sending.names("g1") == sorted(f"checkpoints/{path}" for path in there)
    (tmp_path / "got").mkdir()
    largest = dict.fromkeys((".ckpt", ".pt", ".jsonl"), 10**7)
    sending.place().receive(newest, tmp_path / "got", largest)
    for name in newest.files:
        assert (tmp_path / "got" / name).read_bytes() == (sending.folder / name).read_bytes()


@slow
def test_the_newest_generation_replaces_those_before(sending: Sending) -> None:
    sending.save()
    first = sending.sender(generation=1)
    until(lambda: first.sent)
    first.abandon()
    sending.save()
    other = Sending(sending.folder, sending.library.place, sending.key)
    second = other.sender(
        generation=3, on_first=lambda: remove_earlier(other.library, other.key, 3)
    )
    until(lambda: second.sent)
    second.abandon()
    assert [(m.generation, m.step) for m in other.found()] == [(3, 2)]
    assert sending.names() == []
    assert [r.run.run_id for r, _ in all_shared(other.library) if r.key == other.key] == [
        other.run_id
    ]
    remove_all(other.library, other.key)
    assert other.found() == []
    assert other.names() == []


@slow
def test_what_was_cut_off_or_is_of_another_key_is_not_used(
    sending: Sending, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sending.save()
    sender = sending.sender()
    until(lambda: sender.sent)
    sender.abandon()
    (whole,) = sending.found()
    place = sending.place()
    # Sent half: there is no list of its files.
    place.send("g2/000001-step-00000009.ckpt", [b"half"], 4)
    assert sending.found() == [whole]
    # A list of another key, and one that is none.
    place.finish(replace(whole, key=key_of("other"), number=7))
    place.send("g1/000008.json", [b"{}"], 2)
    assert sending.found() == [whole]
    assert "of another key, or in another place; not used" in caplog.text
    # A file that was cut short on the server's disk.
    name, file = whole.checkpoint, whole.files[whole.checkpoint]
    data = (sending.folder / name).read_bytes()
    place.send(file.path, [data[:-1]], len(data) - 1)
    (tmp_path / "got").mkdir()
    largest = dict.fromkeys((".ckpt", ".pt", ".jsonl"), 10**7)
    with pytest.raises(RegistryError, match="not what was sent; it was cut short or changed"):
        place.receive(whole, tmp_path / "got", largest)
    (tmp_path / "small").mkdir()
    with pytest.raises(RegistryError, match=r"more than the .* that it can have here; refused"):
        place.receive(whole, tmp_path / "small", largest | {".ckpt": 10})


@slow
def test_a_server_that_dies_is_named_once_and_sent_to_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = Store(f"sqlite:///{tmp_path / 'mlflow.db'}", None, tmp_path)

    def start() -> Any:
        process = start_server(store, port)
        wait_until_healthy(f"http://127.0.0.1:{port}", process)
        return process

    server = start()
    try:
        sending = Sending(tmp_path / "training", f"http://127.0.0.1:{port}", key_of("dies"))
        sending.save()
        sender = sending.sender()
        until(lambda: sender.sent)
        stop_server(server, kill=True)
        sending.save()
        until(lambda: sender.failures > 2)
        assert caplog.text.count("checkpoint not sent to the server") == 1
        assert "training goes on, the newest sent is of step 1" in caplog.text
        server = start()
        until(lambda: sender.failures == 0)
        assert "checkpoints are sent again, now of step 2" in caplog.text
        sender.abandon()
    finally:
        stop_server(server)


def test_a_server_that_is_silent_keeps_no_training_waiting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = RestClient(f"http://127.0.0.1:{silent.getsockname()[1]}")
        place = SharedFolder.__new__(SharedFolder)
        place._client, place._root, place.run_id = client, "1/run/artifacts/checkpoints", "run"
        training = kit.Training()
        checkpoints = FolderCheckpoints(tmp_path, kit.FINGERPRINT, interval=kit.Interval(0))
        write_atomically(tmp_path / "train.jsonl", "")
        training.step()
        checkpoints.save(training.checkpoint(), wait=True)
        key = kit.FINGERPRINT["key"]
        sender = CheckpointSender(tmp_path, lambda: place, key=key, generation=1, seconds=0.0)
        sender.start()
        with silent.accept()[0]:
            began = time.monotonic()
            sender.send_last(seconds=0.2)
            assert time.monotonic() - began < 15  # far below the time that the server is given
            assert sender.sent is None
            assert sender.failures == 0
