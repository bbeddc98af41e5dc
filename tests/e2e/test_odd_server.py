"""The commands and the train stage as processes, before a server that answers oddly."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.odd_server import BODIES, KEY, SLOW, WIRE, OddAnswer, OddServer, body
from tests.support.project import Project, clean_environment, in_one_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FAULTS = SLOW | {
    "cut off": WIRE["cut off"],
    "not HTTP": WIRE["not HTTP"],
    "a redirect elsewhere": WIRE["a redirect elsewhere"],
    "500": body("oops", status="500 Oops"),
    "HTML": body(BODIES["HTML"], "Content-Type: text/html"),
    "null": body("null"),
}


def call(project: Project, address: str, *command: str) -> tuple[int, str, float]:
    """Return exit code, what was printed, and seconds."""
    env = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=project.root,
        env=clean_environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, in_one_line(done.stdout), time.monotonic() - began


@pytest.mark.parametrize("name", FAULTS)
def test_a_command_ends_in_one_line(name: str, project: Project) -> None:
    with OddServer(OddAnswer(name, FAULTS[name])) as server:
        commands = [
            *([command, KEY] for command in ("show", "verify", "get", "reproduce")),
            *(["list"], ["diff", KEY, "."], ["export", KEY, "run.zip"]),
            *(["delete", KEY, "--server"], ["fetch", KEY, "--server", server.address]),
        ]
        with ThreadPoolExecutor(2) as pool:
            calls = pool.map(
                lambda words: call(project, server.address, "runkey", *words), commands
            )
            for words, (code, said, seconds) in zip(commands, calls, strict=True):
                assert (code, said.count("error: ")) == (1, 1), f"{words}: {said}"
                assert server.address in said, f"{words}: {said}"
                assert seconds < 40, words


@pytest.mark.parametrize("name", ["nothing", "cut off", "500"])
def test_the_train_stage_keeps_what_it_could_not_send(name: str, project: Project) -> None:
    shutil.rmtree(project.root / "model")
    params = project.root / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("require_claim: true", "require_claim: false"))
    with OddServer(OddAnswer(name, FAULTS[name])) as server:
        code, said, seconds = call(project, server.address, "stages.train")
    assert code == 0, said
    assert "trained here without a claim" in said
    assert "the work goes on, values are kept and sent later" in said
    key = json.loads((project.root / "run.json").read_text())["key"]
    assert f"MLflow: `runkey replay {key[:16]}` sends the rest from" in said
    (log,) = project.root.glob(f".runkey/{key}*/train.jsonl")
    assert len(log.read_text().splitlines()) >= 6
    assert seconds < 90
    answer = project.run(sys.executable, "-m", "runkey", "replay", key[:16]).stdout
    assert "FINISHED" in answer
