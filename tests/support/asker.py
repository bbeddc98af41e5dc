"""A process that asks for keys as the train stage does, driven line by line over stdin.

    python -m tests.support.asker URI ROOT SECONDS_BEAT SECONDS_DEAD SECONDS_POLL

Its training takes the stated time, writes files with its own name in them and records a real run:
a record's file and artifacts beside a local store, or an MLflow run over REST on a server.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runkey.errors import RegistryError
from runkey.identity.record import DETAILS, Record
from runkey.registry.claims import open_claims
from runkey.registry.dvc_cache import download
from runkey.registry.library import open_library
from runkey.registry.once import Decision, HeldClaim, Rhythm, decide
from runkey.registry.rest import RestClient, RestError
from tests.support.claims import Lines
from tests.support.records import make_run

WEIGHTS = "model/weights.pt"
EXPERIMENT = "detection"


class LocalStore:
    """Runs as files, as the local store's record and artifacts are."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self, key: str) -> str:
        run_id = uuid.uuid4().hex
        self._write(key, run_id, "RUNNING")
        return run_id

    def finish(self, key: str, run_id: str) -> None:
        self._write(key, run_id, "FINISHED", files={WEIGHTS: run_id.encode()})

    def kill(self, key: str, run_id: str) -> None:
        self._write(key, run_id, "KILLED")

    def _write(self, key: str, run_id: str, status: str, files: Any = None) -> None:
        finished = status == "FINISHED"
        make_run(self.root, key, run_id, status=status, files=files or {}, with_details=finished)


class ServerStore:
    """Runs made on a tracking server over REST; it keeps artifacts on this machine."""

    def __init__(self, address: str, root: Path) -> None:
        self.client, self.root = RestClient(address), root

    def start(self, key: str) -> str:
        tags = [{"key": "key", "value": key}]
        content = {"experiment_id": self._experiment(), "start_time": _now_ms(), "tags": tags}
        run = self.client.post("runs/create", content)["run"]
        return str(run["info"]["run_id"])

    def finish(self, key: str, run_id: str) -> None:
        made = make_run(self.root, key, run_id, files={WEIGHTS: run_id.encode()})
        info = self.client.get("runs/get", {"run_id": run_id})["run"]["info"]
        folder = Path(info["artifact_uri"].removeprefix("file://"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        (self.root / "mlartifacts" / run_id / "artifacts").rename(folder)
        assert made.details
        (folder / DETAILS).write_text(made.details.as_json(), encoding="utf-8")
        params = [{"key": name, "value": value} for name, value in made.run.params.items()]
        self.client.post("runs/log-batch", {"run_id": run_id, "params": params})
        self._end(run_id, "FINISHED")

    def kill(self, key: str, run_id: str) -> None:
        self._end(run_id, "KILLED")

    def _end(self, run_id: str, status: str) -> None:
        self.client.post("runs/update", {"run_id": run_id, "status": status, "end_time": _now_ms()})

    def _experiment(self) -> str:
        try:
            made = self.client.post("experiments/create", {"name": EXPERIMENT})
            return str(made["experiment_id"])
        except RestError as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise
        query = {"experiment_name": EXPERIMENT}
        found = self.client.get("experiments/get-by-name", query)
        return str(found["experiment"]["experiment_id"])


def main(uri: str, root: Path, rhythm: Rhythm) -> None:
    """Answer every line on stdin, a question as JSON, with events as JSON lines."""
    _tell("ready")
    for line in sys.stdin:
        question = json.loads(line)
        asked = question["at"]
        time.sleep(max(0.0, asked - time.monotonic()))
        try:
            _answer(uri, root, rhythm, question)
        except Exception:  # noqa: BLE001  whatever it is, the round has to count it
            _tell("error", text=traceback.format_exc())


def _answer(uri: str, root: Path, rhythm: Rhythm, question: dict[str, Any]) -> None:
    home, key = root / ".runkey", question["key"]
    on_server = uri.startswith("http")
    store = ServerStore(uri, root) if on_server else LocalStore(root)
    library = open_library(uri, home)
    decision = decide(
        library,
        open_claims(uri, home),
        key,
        reuse=question.get("reuse", True),
        wait=question.get("wait", True),
        rhythm=rhythm,
    )
    if decision.record:
        _tell("reused", line=decision.line, weights=_fetch(decision, root), **_run(decision.record))
    elif decision.claim:
        try:
            _train(decision.claim, store, decision, question["seconds"])
        except RegistryError as error:
            _tell("lost", text=str(error))
    else:
        _tell("alone", line=decision.line)


def _train(held: HeldClaim, store: Any, decision: Decision, seconds: float) -> None:
    key = held.claim.key
    with held:
        for run_id in decision.superseded:
            store.kill(key, run_id)
        run_id = store.start(key)
        held.set_run(run_id)
        _tell("trains", line=decision.line, claim=asdict(held.claim))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.02)
            held.check()
        store.finish(key, run_id)
        held.finish(run_id)
    _tell("trained", line=decision.line, run_id=run_id)


def _fetch(decision: Decision, root: Path) -> str:
    assert decision.library
    assert decision.record
    assert decision.record.details
    target = root / "workspaces" / uuid.uuid4().hex
    download(decision.library, decision.record, decision.record.details.outputs, target)
    return (target / WEIGHTS).read_text(encoding="utf-8")


def _run(record: Record) -> dict[str, str]:
    return {"run_id": record.run.run_id}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _tell(event: str, **more: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, "at": time.monotonic(), **more}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    logging.getLogger("runkey").setLevel(logging.INFO)
    logging.getLogger("runkey").addHandler(Lines(lambda text: _tell("said", text=text)))
    beat, dead, poll = map(float, sys.argv[3:6])
    main(
        sys.argv[1],
        Path(sys.argv[2]),
        Rhythm(beat_seconds=beat, dead_after=dead, poll_seconds=poll),
    )
