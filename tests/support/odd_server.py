"""A real HTTP server that answers as no MLflow server should: the first faults by hand, then drawn.

`server_answers(seed)` draws answers without end; `OddServer` gives one of them to every request, or
to those of one path, and right ones to the others, so that a fault meets each place that reads.

    with OddServer() as server:
        for answer in itertools.islice(server_answers(0), 100):
            server.answer = answer
            ask(server.address)
"""

from __future__ import annotations

import gzip
import json
import random
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from runkey.errors import RunkeyError
from runkey.identity.record import Details, LoggedRun, Record
from runkey.registry.claims import open_claims, state_now, status_now
from runkey.registry.dvc_cache import download
from runkey.registry.library import open_library, run_reader
from runkey.registry.models import promotions, registered_run
from runkey.registry.once import decide
from runkey.registry.query import Field, Query
from runkey.registry.rest import list_page
from tests.support.claims import FAST, a_claim
from tests.support.records import FILES, key_of

KEY, RUN = key_of("odd"), "a" * 32
RECORD: dict[str, Any] = {
    "schema": "record1",
    "stage": "train",
    "files": {"run.json": {"sha256": "0" * 64, "size": 2}},
    "outputs": ["run.json"],
    "witness": {"device": "cpu"},
    "evaluations": {"rk2-0": {"AP": 0.5}},
    "outcomes": [],
    "host": "there",
    "snapshot": None,
    "pointer_md5": None,
    "decision": "trained",
}
_OWNER = {"pid": 1, "boot": "b", "namespace": "n", "started": 1, "host": "there", "nonce": "c"}
_CLAIM = {"owner": json.dumps(_OWNER), "since_ms": "1", "run": RUN, "state": "running", "beat": "1"}
_RUN: dict[str, Any] = {
    "info": {
        "run_id": RUN,
        "run_uuid": RUN,
        "experiment_id": "1",
        "run_name": "odd",
        "status": "FINISHED",
        "start_time": 1_700_000_000_000,
        "end_time": 1_700_000_060_000,
        "artifact_uri": f"mlflow-artifacts:/1/{RUN}/artifacts",
        "lifecycle_stage": "active",
    },
    "data": {
        "params": [{"key": "key", "value": KEY}, {"key": "lr", "value": "0.1"}],
        "metrics": [{"key": "eval/AP", "value": 0.5, "timestamp": 1_700_000_050_000, "step": 0}],
        "tags": [{"key": "key", "value": KEY}],
    },
}
_EXPERIMENT = {
    "experiment_id": "1",
    "name": "detection",
    "artifact_location": "mlflow-artifacts:/1",
    "lifecycle_stage": "active",
    "tags": [{"key": "x", "value": "y"}],
}
_MODEL = {"name": KEY, "tags": [{"key": f"runkey.{k}", "value": v} for k, v in _CLAIM.items()]}
RIGHT: dict[str, Any] = {
    "experiments/search": {"experiments": [_EXPERIMENT]},
    "experiments/get-by-name": {"experiment": _EXPERIMENT},
    "runs/search": {"runs": [_RUN]},
    "runs/get": {"run": _RUN},
    "runs/create": {"run": _RUN},
    "runs/update": {"run_info": _RUN["info"]},
    "registered-models/search": {"registered_models": [_MODEL]},
    "registered-models/get": {"registered_model": _MODEL},
    "registered-models/create": {"registered_model": _MODEL},
    "registered-models/alias": {"model_version": {"run_id": RUN}},
    "model-versions/get": {"model_version": {"run_id": RUN}},
    "logged-models/": {"model": {"info": {"source_run_id": RUN}}},
    "metrics/get-history": {"metrics": _RUN["data"]["metrics"]},
    "artifacts/list": {"files": [{"path": "run.json", "is_dir": False, "file_size": 2}]},
    "mlflow-artifacts/artifacts?": {"files": []},
    "get-artifact": RECORD,
}
"""Right answers by a part of the path; others are answered by {}."""


class Wire:
    """The connection to one client."""

    def __init__(self, connection: socket.socket, path: str, body: bytes) -> None:
        self.connection, self.path, self.asked = connection, path, body

    def right(self) -> bytes:
        """Return what MLflow would answer."""
        if "get-artifact" in self.path:
            name = parse_qs(urlsplit(self.path).query).get("path", [""])[0]
            if name in FILES:
                return FILES[name]
        found = next((value for part, value in RIGHT.items() if part in self.path), {})
        return json.dumps(found).encode()

    def send(self, body: bytes, *headers: str, status: str = "200 OK") -> None:
        """Send a whole answer."""
        self.raw(head(f"Content-Length: {len(body)}", *headers, status=status) + body)

    def raw(self, data: bytes, pause: float = 0.0) -> None:
        """Send bytes; with a pause after each of them."""
        if not pause:
            self.connection.sendall(data)
        for number in range(len(data) if pause else 0):
            self.connection.sendall(data[number : number + 1])
            time.sleep(pause)


def head(*headers: str, status: str = "200 OK") -> bytes:
    """Return the head of an answer."""
    lines = [f"HTTP/1.1 {status}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


Send = Callable[[Wire], None]


@dataclass(frozen=True)
class OddAnswer:
    """One way to answer."""

    name: str
    send: Send
    only: str = ""
    """Part of the paths that are answered so; the others are answered right."""


DRIP_SECONDS = 0.8
"""Between the bytes of a slow answer."""


class OddServer:
    """The server; `answer` may be changed while it runs."""

    def __init__(self, answer: OddAnswer | None = None) -> None:
        self.answer = answer
        self.asked: list[str] = []
        """Method, path and body of every request."""

    def __enter__(self) -> Self:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the client has left
            connection.settimeout(60)
            with connection.makefile("rb") as file:
                method, path, *_ = (file.readline().decode("latin-1").split() or ["", ""]) + [""]
                length = 0
                while (line := file.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                body = file.read(length)
            self.asked.append(f"{method} {path} {body.decode('utf-8', 'replace')}")
            wire, answer = Wire(connection, path, body), self.answer
            if answer and answer.only in path:
                answer.send(wire)
            else:
                wire.send(wire.right())


def body(data: bytes | str, *headers: str, status: str = "200 OK") -> Send:
    """Answer with this body."""
    content = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return lambda wire: wire.send(content, *headers, status=status)


def raw(data: bytes) -> Send:
    """Answer with these bytes, the head included."""
    return lambda wire: wire.raw(data)


def _cut(wire: Wire) -> None:
    right = wire.right()
    wire.raw(head(f"Content-Length: {len(right)}") + right[: len(right) // 2])


def _longer(wire: Wire) -> None:
    wire.raw(head(f"Content-Length: {len(wire.right()) + 100}") + wire.right())


def _shorter(wire: Wire) -> None:
    wire.raw(head(f"Content-Length: {len(wire.right()) // 2}") + wire.right())


def _chunks_cut(wire: Wire) -> None:
    right = wire.right()
    size = f"{len(right):x}\r\n".encode()
    wire.raw(head("Transfer-Encoding: chunked") + size + right[: len(right) // 2])


def _no_last_chunk(wire: Wire) -> None:
    right = wire.right()
    wire.raw(head("Transfer-Encoding: chunked") + f"{len(right):x}\r\n".encode() + right + b"\r\n")


def _gzipped(wire: Wire) -> None:
    wire.send(gzip.compress(wire.right()), "Content-Encoding: gzip")


def _bomb(wire: Wire) -> None:
    wire.send(_packed(), "Content-Encoding: gzip")


@cache
def _packed() -> bytes:
    return gzip.compress(b" " * (256 << 20))


def _drip(wire: Wire) -> None:
    wire.raw(head(f"Content-Length: {len(wire.right())}"))
    wire.raw(wire.right() + b" " * 1000, DRIP_SECONDS)


def _drip_head(wire: Wire) -> None:
    wire.raw(head(*(f"X-{number}: y" for number in range(50))), DRIP_SECONDS)


def _silent(wire: Wire) -> None:
    wire.connection.settimeout(30)
    wire.connection.recv(1)  # until the client leaves


def _again(start: bytes, part: bytes) -> Send:
    """Send the first bytes, and then the same part until the client leaves."""

    def send(wire: Wire) -> None:
        wire.raw(start)
        while True:
            wire.raw(part)

    return send


def _to_itself(wire: Wire) -> None:
    wire.send(b"", f"Location: {wire.path}", status="302 Found")


def _pages(token: Callable[[], str], *, full: bool) -> Send:
    """Answer a search right, with a token for one more page."""

    def send(wire: Wire) -> None:
        right = json.loads(wire.right())
        if isinstance(right, dict):
            right = {name: value if full else [] for name, value in right.items()}
            right["next_page_token"] = token()
        wire.send(json.dumps(right).encode())

    return send


def _folders(wire: Wire) -> None:
    wire.send(b'{"files": [{"path": "deeper", "is_dir": true}]}')


def _fresh_token() -> str:
    return f"{random.getrandbits(64):x}"


DEEP = "[" * 100_000 + "]" * 100_000
SLOW: dict[str, Send] = {
    "a byte each 0.8 s": _drip,
    "its head a byte each 0.8 s": _drip_head,
    "nothing": _silent,
}
"""Answers that only a limit in seconds ends."""
WIRE: dict[str, Send] = {
    "cut off": _cut,
    "shorter than stated": _longer,
    "longer than stated": _shorter,
    "a chunk cut off": _chunks_cut,
    "no last chunk": _no_last_chunk,
    "a chunk of a wrong size": raw(head("Transfer-Encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n"),
    "a negative chunk": raw(head("Transfer-Encoding: chunked") + b"-5\r\n{}\r\n0\r\n\r\n"),
    "closed at once": raw(b""),
    "half a status line": raw(b"HTTP/1"),
    "not HTTP": raw(b"220 mail.example.org ESMTP\r\n"),
    "noise": raw(bytes(range(256)) * 8),
    "a negative length": raw(head("Content-Length: -1") + b"{}"),
    "a length that is none": raw(head("Content-Length: ten") + b"{}"),
    "an enormous length": raw(head(f"Content-Length: {10**30}") + b"{}"),
    "two lengths": raw(head("Content-Length: 2", "Content-Length: 900") + b"{}"),
    "a status of 7 digits": raw(b"HTTP/1.1 2000000 OK\r\n\r\n{}"),
    "status 0": raw(b"HTTP/1.1 000 OK\r\n\r\n{}"),
    "HTTP/9.9": raw(b"HTTP/9.9 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
    "endless": _again(head(), b" " * 65536),
    "endless heads": _again(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "an endless line of the head": _again(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 4096),
    "endless chunks": _again(head("Transfer-Encoding: chunked"), b"1\r\n \r\n" * 1000),
    "100 Continue for ever": _again(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "gzip": _gzipped,
    "a gzip bomb": _bomb,
    "gzip that is none": body("{}", "Content-Encoding: gzip"),
    "an unknown encoding": body("{}", "Content-Encoding: rot13"),
    "a charset that is none": body("{}", "Content-Type: application/json; charset=klingon"),
    "control characters in the head": raw(head("X: \x1b[31m\x00") + b"{}"),
    "a redirect to itself": _to_itself,
    "a redirect to a file": body("", "Location: file:///etc/passwd", status="302 Found"),
    "a redirect to nowhere": body("", "Location: http://[::", status="301 Moved"),
    "a redirect without an address": body("", status="307 Temporary Redirect"),
    "a redirect elsewhere": body("", "Location: http://127.0.0.1:9/", status="308 Permanent"),
    "304": body("", status="304 Not Modified"),
    "204": raw(head(status="204 No Content")),
    "a page token that repeats": _pages(lambda: "again", full=True),
    "pages without end": _pages(_fresh_token, full=True),
    "empty pages without end": _pages(_fresh_token, full=False),
    "folders without end": _folders,
    "retry after a day": body("", "Retry-After: 86400", status="503 Busy"),
}
BODIES: dict[str, str | bytes] = {
    "null": "null",
    "a list": "[]",
    "a number": "1",
    "a text": '"x"',
    "NaN": "NaN",
    "nothing at all": "",
    "HTML": "<html><body>Log in</body></html>",
    "200 OK": "200 OK",
    "deep lists": DEEP,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "5,000 digits": f'{{"runs": {"9" * 5000}}}',
    "not UTF-8": b'{"runs": "\xff\xfe"}',
    "UTF-16": '{"runs": []}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "half a surrogate": '{"message": "\\ud800", "error_code": "\\ud800"}',
    "zero bytes": b"\x00" * 64,
    "two objects": "{}{}",
    "a comma too many": '{"runs": [],}',
    "escapes": '{"error_code": "\\u001b[2J", "message": "\\u001b[31m\\n\\nx"}',
    "null everywhere": json.dumps(dict.fromkeys(["runs", "experiments", "run", "experiment"])),
    "an error of lists": '{"error_code": [], "message": {}}',
    "a long error": json.dumps({"error_code": "X" * 99_999, "message": "y " * 99_999}),
}
VALUES: tuple[Any, ...] = (
    None, True, [], {}, "", "x", "\u202e", -1, 0, 10**18, 10**30, 10**400, 1.5, 1e300,
    float("nan"), float("-inf"), [[]], {"": {}}, "\x1b[31m", "../../etc", "\ud800", "SCHEDULED",
    "UNKNOWN", "9" * 5000, "a" * 100_000, [None], "http://[", "1e999", "rk2-", DEEP[:2000],
)  # fmt: skip
STATUSES = (
    "200 OK", "201 Created", "400 Bad Request", "401 Unauthorized", "403 Forbidden",
    "404 Not Found", "409 Conflict", "418 Teapot", "429 Too Many", "500 Oops", "502 Bad Gateway",
    "503 Busy", "599 Odd",
)  # fmt: skip


def fixed_answers() -> Iterator[OddAnswer]:
    """Yield each fault that is written down above, once."""
    for name, send in (WIRE | SLOW).items():
        yield OddAnswer(name, send)
    for name, data in BODIES.items():
        for status in ("200 OK", "404 Not Found", "500 Oops"):
            yield OddAnswer(f"{name}, {status}", body(data, status=status))


def server_answers(seed: int) -> Iterator[OddAnswer]:
    """Yield the fixed faults once, and then without end faults that the seed draws."""
    yield from fixed_answers()
    draw = random.Random(seed)
    paths = ["", *RIGHT]
    while True:
        only = draw.choice(paths)
        kind = draw.random()
        if kind < 0.15:
            name = draw.choice(sorted(WIRE))
            yield OddAnswer(f"{name} at {only or 'all'}", WIRE[name], only)
        elif kind < 0.3:
            name, status = draw.choice(sorted(BODIES)), draw.choice(STATUSES)
            send = body(BODIES[name], status=status)
            yield OddAnswer(f"{name}, {status} at {only or 'all'}", send, only)
        else:
            number = draw.getrandbits(32)
            yield OddAnswer(f"changed {number} at {only or 'all'}", _changed(number), only)


def _changed(number: int) -> Send:
    """Answer right but for one to three values."""

    def send(wire: Wire) -> None:
        draw = random.Random(number)
        right = json.loads(wire.right() or b"{}")
        for _ in range(draw.randint(1, 3)):
            right = _change(right, draw)
        text = json.dumps(right)
        if draw.random() < 0.1:  # and some bytes
            place = draw.randrange(len(text))
            text = text[:place] + draw.choice('{}[]",:0\x00') + text[place + 1 :]
        wire.send(text.encode(), status=draw.choice(("200 OK",) * 9 + STATUSES[2:]))

    return send


def _change(value: Any, draw: random.Random) -> Any:
    inner = (
        sorted(value)
        if isinstance(value, dict)
        else list(range(len(value)))
        if isinstance(value, list)
        else []
    )
    if not inner or draw.random() < 0.15:
        return draw.choice(VALUES)
    place = draw.choice(inner)
    changed = value.copy()
    if isinstance(value, dict) and draw.random() < 0.15:
        del changed[place]
    else:
        changed[place] = _change(value[place], draw)
    return changed


# --- what is asked


def questions(address: str, home: Path) -> dict[str, Callable[[], object]]:
    """Return by name everything that is asked of a server without MLflow's own client."""
    details = Details.from_dict(RECORD, "")
    run = LoggedRun.from_mlflow(_RUN["info"], {"key": KEY}, {}, {"key": KEY})
    library, claims = open_library(address, home), open_claims(address, home)
    record, claim = Record(run=run, details=details), a_claim(key=KEY)
    by_ap = Query(sort=Field("metrics", "eval/AP"), limit=5)

    def read() -> bytes:
        with library.open_file(record, "run.json") as file:
            return file.read()

    return {
        "matching": lambda: [status_now(one, claims) for one in library.matching(KEY)],
        "find": lambda: [json.dumps(one.as_dict()).encode() for one in library.find(by_ap)],
        "details": lambda: library.with_details(Record(run=run, details=None)),
        "open_file": read,
        "download": lambda: download(library, record, ["run.json"], home / "downloaded"),
        "run_reader": lambda: (run_reader(address) or (lambda _: None))(RUN),
        "alias": lambda: registered_run(address, "models:/detection@production"),
        "version": lambda: registered_run(address, "models:/detection/1"),
        "model id": lambda: registered_run(address, f"models:/m-{'0' * 32}"),
        "promotions": lambda: [str(one) for one in promotions(address)],
        "list_page": lambda: list_page(address, "detection", "runkey"),
        "claims": lambda: [f"{one.line}: {state_now(one)}" for one in claims.all()],
        "make": lambda: claims.make(claim),
        "update": lambda: claims.update(claim),
        "remove": lambda: claims.remove(claim),
        "decide": lambda: decide(library, claims, KEY, wait=False, rhythm=FAST).line,
    }


def faults(address: str, home: Path, most_seconds: float = 20.0) -> list[str]:
    """Ask everything; return what ended otherwise than well or in one line, or too late."""
    found = []
    for name, question in questions(address, home).items():
        began = time.monotonic()
        try:
            question()
        except RunkeyError as error:
            if "\n" in str(error) or len(str(error)) > 1000:
                found.append(f"{name}: not one line: {str(error)[:200]!r}")
            if not any(part in str(error) for part in ("127.0.0.1", KEY[:16], RUN)):
                found.append(f"{name}: names neither server nor run: {error}")
        except Exception:  # noqa: BLE001 - this is what is looked for
            found.append(f"{name}: {traceback.format_exc()}")
        if (seconds := time.monotonic() - began) > most_seconds:
            found.append(f"{name}: took {seconds:.1f} s")
    return found
