"""What a server that is none, or a hostile one, can do to a command: one line, in time."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from runkey import http_limits
from runkey.errors import RegistryError, RunkeyError
from runkey.registry.claims import open_claims
from runkey.registry.library import open_library
from runkey.registry.once import HeldClaim, Rhythm, decide
from runkey.registry.rest import RestClient, UnreachedError
from tests.support import odd_server
from tests.support.claims import FAST, a_claim
from tests.support.mlflow_store import until
from tests.support.odd_server import (
    KEY,
    RUN,
    SLOW,
    WIRE,
    OddAnswer,
    OddServer,
    body,
    faults,
    server_answers,
)

COUNT = int(os.environ.get("RUNKEY_FUZZ_COUNT", "12"))
"""Drawn answers."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "0.2")
    monkeypatch.setattr(odd_server, "DRIP_SECONDS", 0.01)


def test_a_right_server_is_understood(tmp_path: Path) -> None:
    with OddServer() as server:
        library = open_library(server.address, tmp_path)
        (record,) = library.matching(KEY)
        assert (record.run.run_id, record.run.metrics) == (RUN, {"eval/AP": 0.5})
        assert library.with_details(record).details is not None
        (claim,) = open_claims(server.address, tmp_path).all()
        assert (claim.who, claim.beat, claim.run_id) == ("there:1", 1, RUN)
        assert faults(server.address, tmp_path) == []


@pytest.mark.parametrize("seed", [0])
def test_odd_answers_are_one_line_in_time(seed: int, tmp_path: Path) -> None:
    drawn = itertools.islice(server_answers(seed), len([*odd_server.fixed_answers()]), None)
    found = {}
    with OddServer() as server:
        for answer in itertools.islice(drawn, COUNT):
            server.answer = answer
            found[answer.name] = faults(server.address, tmp_path, 5.0)
    assert {name: texts for name, texts in found.items() if texts} == {}


@pytest.mark.slow
def test_every_fixed_fault_is_one_line_in_time(tmp_path: Path) -> None:
    found = {}
    with OddServer() as server:
        for answer in odd_server.fixed_answers():
            server.answer = answer
            found[answer.name] = faults(server.address, tmp_path, 10.0)
    assert {name: texts for name, texts in found.items() if texts} == {}


@pytest.mark.parametrize("name", [*SLOW, "endless", "100 Continue for ever"])
def test_the_limit_in_seconds_is_for_the_whole_answer(name: str) -> None:
    send = (SLOW | WIRE)[name]
    with OddServer(OddAnswer(name, send)) as server:
        began = time.monotonic()
        with pytest.raises(UnreachedError, match=r"\((no whole|the answer has more)"):
            RestClient(server.address).get("runs/get", {"run_id": RUN})
        assert time.monotonic() - began < 2


def test_a_file_has_time_as_long_as_it_comes_and_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(20_000)

    def slowly(wire: odd_server.Wire) -> None:  # 0.4 s: later than 0.2, faster than 16 kB/s
        wire.raw(odd_server.head(f"Content-Length: {len(data)}"))
        for start in range(0, len(data), 1000):
            wire.raw(data[start : start + 1000])
            time.sleep(0.02)

    with OddServer(OddAnswer("slow file", slowly)) as server:
        with RestClient(server.address).artifact(RUN, "model/weights.pt") as file:
            assert file.read() == data
        with pytest.raises(UnreachedError, match="no whole answer"):
            RestClient(server.address).artifact_bytes(RUN, "record.json")
        server.answer = OddAnswer("endless", WIRE["endless"])
        file = RestClient(server.address).artifact(RUN, "model/weights.pt", largest=len(data))
        with file, pytest.raises(UnreachedError, match=r"has more than 1 MiB"):
            file.read()


@pytest.mark.parametrize(
    "name", ["a page token that repeats", "pages without end", "empty pages without end"]
)
def test_pages_come_to_an_end(name: str, tmp_path: Path) -> None:
    with OddServer(OddAnswer(name, WIRE[name])) as server:
        with pytest.raises(RegistryError, match=r"an MLflow server does .*pages without end"):
            open_library(server.address, tmp_path).matching(KEY)
        assert len(server.asked) <= 1001


def test_a_damaged_run_is_left_out_and_named(tmp_path: Path, said: list[str]) -> None:
    whole = odd_server.RIGHT["runs/search"]["runs"][0]
    damaged = copy.deepcopy(whole)
    damaged["info"]["status"] = "LOST"
    other = copy.deepcopy(whole)
    other["data"]["params"] = other["data"]["tags"] = [{"key": "key", "value": KEY[:-4] + "beef"}]
    answer = json.dumps({"runs": [damaged, whole, other]})
    with OddServer(OddAnswer("damaged", body(answer), "runs/search")) as server:
        found = open_library(server.address, tmp_path).matching(KEY)
    assert [record.run.run_id for record in found] == [RUN]
    assert [record.key for record in found] == [KEY]  # never a run of another key
    (line,) = said
    assert line.startswith(f"{server.address}: 1 run damaged there and left out (info.status: ")


def test_a_redirect_is_named_and_never_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    with OddServer() as other, OddServer() as server:
        to = body("", f"Location: {other.address}/x", status="302 Found")
        server.answer = OddAnswer("redirect", to)
        with pytest.raises(RegistryError, match=rf"another address, {other.address}/x"):
            RestClient(server.address).get("runs/get", {"run_id": RUN})
        assert other.asked == []


def test_the_timeout_is_mlflows_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon")
    with pytest.raises(RunkeyError, match=r"MLFLOW_HTTP_REQUEST_TIMEOUT=soon: not a number"):
        RestClient("http://127.0.0.1:9")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    assert http_limits.answer_seconds() == 20


def test_the_beat_outlives_every_answer(said: list[str], tmp_path: Path) -> None:
    """A server that answers a hundred times oddly, and right again: the claim beats on."""
    with (
        OddServer() as server,
        HeldClaim(open_claims(server.address, tmp_path), a_claim(), FAST) as held,
    ):
        to_all = (answer for answer in server_answers(1) if not answer.only)
        for answer in itertools.islice(to_all, 200, 300):
            server.answer = answer
            time.sleep(0.01)
        server.answer = None
        count = len(server.asked)
        until(lambda: len(server.asked) >= count + 3)
        held.check()
    assert any("training goes on" in line for line in said)


def test_a_silent_server_is_not_asked_again_and_again(said: list[str], tmp_path: Path) -> None:
    """Each question takes the whole limit: two before a training, none more at its end."""
    with OddServer(OddAnswer("nothing", SLOW["nothing"])) as server:
        claims = open_claims(server.address, tmp_path)
        line = decide(open_library(server.address, tmp_path), claims, KEY).line
        assert line.endswith("trained here without a claim")
        assert len(server.asked) == 2
        with HeldClaim(claims, a_claim(), Rhythm(beat_seconds=1.0)) as held:
            until(lambda: any("training goes on" in text for text in said))
            count = len(server.asked)
            held.finish()
        assert (held.claim.state, len(server.asked)) == ("finished", count)


def test_claims_that_contradict_themselves_are_no_endless_loop(tmp_path: Path) -> None:
    """The name is taken, says the server, and shows no claim of it."""
    taken = body('{"error_code": "RESOURCE_ALREADY_EXISTS", "message": "x"}', status="400 Bad")

    absent = body('{"error_code": "RESOURCE_DOES_NOT_EXIST"}', status="404 Not Found")

    def send(wire: odd_server.Wire) -> None:
        (taken if "create" in wire.path else absent if "get?" in wire.path else body("{}"))(wire)

    with OddServer(OddAnswer("contradiction", send)) as server:
        library = open_library(server.address, tmp_path)
        line = decide(library, open_claims(server.address, tmp_path), KEY, rhythm=FAST).line
    assert line.endswith("claim 1 can be neither made nor read; trained here without a claim")


class TlsServer(OddServer):
    """The server behind a certificate that no authority signed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.certificate, key = folder / "certificate.pem", folder / "key.pem"
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        make = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            *names,
        ]
        subprocess.run([*make, "-keyout", key, "-out", self.certificate], check=True)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(self.certificate, key)

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):  # the client does not trust it
            super()._serve(self._tls.wrap_socket(connection, server_side=True))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_works_with_the_certificate_and_says_which_variable_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "MLFLOW_TRACKING_SERVER_CERT_PATH"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    with TlsServer(tmp_path) as server:
        address = server.address.replace("http:", "https:")
        with pytest.raises(UnreachedError, match=rf"self-signed .*name its .* in {variable}"):
            RestClient(address).run(RUN)
        for path, why in {"none.pem": "No such file", "key.pem": "holds no certificate"}.items():
            monkeypatch.setenv(variable, str(tmp_path / path))
            with pytest.raises(RegistryError, match=rf"{variable}=.*{path}: {why}"):
                RestClient(address)
        monkeypatch.setenv(variable, str(server.certificate))
        run = RestClient(address).run(RUN)
        assert run is not None
        assert run.run_id == RUN
