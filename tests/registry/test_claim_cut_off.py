"""Answers that are cut off in their body: asked for again, and no end of a claim's beat."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from runkey.errors import RegistryError
from runkey.registry.claims import ServerClaims
from runkey.registry.once import HeldClaim
from runkey.registry.rest import ATTEMPTS, RestClient, RestError
from tests.support.claims import FAST, a_claim

Answers = list[bytes]

WHOLE = b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"a": "b"}'
CUT_OFF = {
    "before the stated length": b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"a": ',
    "before any byte": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n",
    "in a chunk": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\n{"a": ',
    "between chunks": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n{"a": \r\n',
    "half JSON": b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"a": ',
    "JSON of another kind": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1",
    "in the status line": b"HTTP/1",
    "no answer": b"",
    "in a refusal": b'HTTP/1.1 404 Not Found\r\nContent-Length: 50\r\n\r\n{"error_code": "RES',
    "in the server's own error": b"HTTP/1.1 503 Busy\r\nContent-Length: 50\r\n\r\nbusy",
}


@contextmanager
def serve(
    answers: Answers, otherwise: bytes = WHOLE, to_get: bytes = b""
) -> Iterator[tuple[str, list[str]]]:
    """A server that gives each of `answers` once and then always `otherwise`; what it was sent."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            asked.append(f"{self.command} {self.path} {body}")
            usual = to_get if to_get and self.command == "GET" else otherwise
            self.wfile.write(answers.pop(0) if answers else usual)
            self.close_connection = True

        do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def until(reached: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("kind", CUT_OFF)
def test_an_answer_cut_off_once_is_asked_for_again(kind: str) -> None:
    with serve([CUT_OFF[kind]]) as (address, asked):
        client = RestClient(address)
        assert client.get("registered-models/get", {"name": "x"}) == {"a": "b"}
        assert len(asked) == 2


def test_whatever_may_be_repeated_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = CUT_OFF["before the stated length"]
    with serve([cut]) as (address, asked):
        client = RestClient(address)
        with pytest.raises(RegistryError, match=r"cannot be reached .*IncompleteRead"):
            client.post("registered-models/create", {"name": "x"})
        assert len(asked) == 1  # it may have happened, and must not happen twice
    with serve([cut]) as (address, asked):
        client = RestClient(address)
        assert client.post("registered-models/set-tag", {"name": "x"}, repeat=True) == {"a": "b"}
        assert asked[0] == asked[1]
    with serve([cut]) as (address, _):
        assert RestClient(address).send("DELETE", "registered-models/delete", {}) == {"a": "b"}
    with serve([cut]) as (address, _):
        assert RestClient(address).artifact_bytes("ab", "details.json") == b'{"a": "b"}'


@pytest.mark.parametrize("kind", ["in a chunk", "half JSON", "in a refusal"])
def test_one_that_is_always_cut_off_is_one_line(kind: str) -> None:
    with serve([], CUT_OFF[kind]) as (address, asked):
        with pytest.raises(RegistryError) as caught:
            RestClient(address).get("registered-models/get")
        assert str(caught.value).startswith(f"{address}: ")
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, RestError)  # nothing was refused
        assert len(asked) == ATTEMPTS


NOTHING = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
ABSENT = (
    b"HTTP/1.1 404 NOT FOUND\r\nContent-Length: 43\r\n\r\n"
    b'{"error_code": "RESOURCE_DOES_NOT_EXIST"  }'
)
STRANGE = b'HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n{"registered_model": {}}'


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([CUT_OFF["before the stated length"]], ""),
        ([CUT_OFF["half JSON"]], ""),
        ([CUT_OFF["before the stated length"]] * ATTEMPTS, "cannot be reached"),
        ([STRANGE], "did not answer as an MLflow server does (registered_model: name: Field req"),
    ],
)
def test_the_beat_of_a_claim_goes_on(answers: Answers, told: str, said: list[str]) -> None:
    with serve([*answers], NOTHING, ABSENT) as (address, asked):

        def beats() -> int:
            return sum("runkey.beat" in line for line in asked)

        claims = ServerClaims(RestClient(address))
        # With 0 it looks at every beat.
        with HeldClaim(claims, a_claim(), replace(FAST, dead_after=0)) as held:
            until(lambda: beats() > 2)
            held.check()
            held.finish("ab")
        assert '"finished"' in "".join(asked)
    if told:
        assert told in said[0]
        assert "training goes on" in said[0]
        assert [line.rpartition(": ")[2] for line in said[1:]] == ["kept again"]
    else:
        assert said == []
