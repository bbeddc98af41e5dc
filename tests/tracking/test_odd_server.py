"""MLflow's own client before a server that is none: one line, in time; training goes on."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from runkey.errors import TrackingError
from runkey.identity.record import Details
from runkey.tracking.mlflow_run import Pace
from runkey.tracking.store import Store, in_one_line
from runkey.tracking.transfer import StoreRuns, delete_run, write_details
from tests.support import odd_server
from tests.support.mlflow_store import FAST
from tests.support.odd_server import RECORD, RUN, SLOW, WIRE, OddAnswer, OddServer, server_answers
from tests.support.points import read_jsonl
from tests.support.trainer import begin, log_of

CHOSEN = [
    "nothing",
    "a byte each 0.8 s",
    pytest.param("a page token that repeats", marks=pytest.mark.slow),
    pytest.param("pages without end", marks=pytest.mark.slow),
    "folders without end",
    "a gzip bomb",
    "100 Continue for ever",
]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # MLflow takes whole seconds
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(odd_server, "DRIP_SECONDS", 0.05)


def ask(address: str, folder: Path) -> list[str]:
    """Ask as publish, gc and reproduce do; return the lines that come."""
    store, lines = Store(address, None, folder), []
    (folder / "read").mkdir(parents=True)
    for question in (
        lambda: StoreRuns(store, "detection").read(RUN, folder / "read"),
        lambda: delete_run(store, RUN),
        lambda: write_details(store, RUN, Details.from_dict(RECORD, "")),
    ):
        try:
            question()
        except TrackingError as error:
            lines.append(str(error))
    return lines


@pytest.mark.parametrize("name", CHOSEN)
def test_no_answer_holds_mlflows_client(name: str, tmp_path: Path) -> None:
    only = "artifacts" if name == "folders without end" else ""
    with OddServer(OddAnswer(name, (SLOW | WIRE)[name], only)) as server:
        began = time.monotonic()
        lines = ask(server.address, tmp_path)
        assert time.monotonic() - began < 20
        assert len(server.asked) < 21_000
    assert lines, "a run was read where there is none"
    for line in lines:
        assert line.startswith((f"{server.address}: run {RUN} could not be ", f"run {RUN}: it has"))
        assert "\n" not in line


@pytest.mark.slow
def test_drawn_answers_are_one_line(tmp_path: Path) -> None:
    with OddServer() as server:
        fixed = len([*odd_server.fixed_answers()])
        for number, answer in enumerate(itertools.islice(server_answers(3), fixed, fixed + 200)):
            server.answer = answer
            for line in ask(server.address, tmp_path / str(number)):
                assert "\n" not in line, answer.name


@pytest.mark.parametrize("name", ["noise", "cut off", "null, 200 OK"])
def test_training_goes_on_and_keeps_its_values(name: str, tmp_path: Path, said: list[str]) -> None:
    answers = {answer.name: answer for answer in odd_server.fixed_answers()}
    with OddServer(answers[name]) as server:
        tracker = begin(Store(server.address, None, tmp_path), tmp_path / "key", pace=FAST)
        for step in range(1, 4):
            tracker.log({"train/loss": 1.0 / step}, step)
        assert tracker.close() is None
    assert [entry["step"] for entry in read_jsonl(log_of(tracker).path)] == [1, 2, 3]
    assert any("the work goes on" in line for line in said)
    assert said[-1].startswith("MLflow: `runkey replay rk2-")


def test_a_silent_server_does_not_hold_a_training_that_ends(tmp_path: Path) -> None:
    pace = Pace(flush_seconds=0.2, retry_seconds=0.3, close_seconds=60, killed_seconds=0.5)
    with OddServer(OddAnswer("nothing", SLOW["nothing"])) as server:
        tracker = begin(Store(server.address, None, tmp_path), tmp_path / "key", pace=pace)
        tracker.log({"train/loss": 1.0}, 1)
        began = time.monotonic()
        assert tracker.run_id(60) is None
        assert tracker.close() is None
        assert time.monotonic() - began < 20
    assert [entry["step"] for entry in read_jsonl(log_of(tracker).path)] == [1]


def test_the_cause_of_a_failed_request_is_what_is_printed() -> None:
    before = (
        "API request to http://h/api failed with exception HTTPConnectionPool(host='h', port=1)"
    )
    error = OSError(f"{before}: Max retries exceeded with url: /api (Caused by 'too many 500')")
    assert in_one_line(error) == "OSError: (Caused by 'too many 500')"
