"""Limits on what an HTTP server may answer: seconds for the whole answer, and bytes.

A socket's timeout bounds one read only: a server that sends a byte within it, again and again,
keeps its client waiting for ever.
"""

from __future__ import annotations

import io
import os
import socket
import time
from functools import partial
from http.client import HTTPException, HTTPResponse
from typing import Any

from runkey.errors import RunkeyError
from runkey.units import MIB

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
"""Environment variable, MLflow's own: seconds for one answer."""
SECONDS = 20.0
LARGEST = 64 * MIB
"""Bytes of an answer that is not a file; a thousand runs take 15 MB."""
_SLOWEST = 16 * 1024
"""Bytes a second that earn a large answer more time."""
_FILES = ("get-artifact?", "/mlflow-artifacts/artifacts/")
"""Parts of addresses that are answered by files, which may be of any size."""


def answer_seconds() -> float:
    """Return the seconds for one answer; RunkeyError if the variable holds no such number."""
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text or SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise RunkeyError(f"{TIMEOUT}={text}: not a number of seconds from 1 to 86400; unset it")
    return seconds


class _Limited(io.RawIOBase):
    """The bytes of one answer as they come from a socket."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self.largest: int | None = LARGEST
        self.earns_time = False
        self._sock, self._raw = sock, raw
        self._seconds = sock.gettimeout() or SECONDS
        self._began, self._received = time.monotonic(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        seconds = self._seconds + (self._received / _SLOWEST if self.earns_time else 0)
        left = self._began + seconds - time.monotonic()
        self._sock.settimeout(max(left, 0.001))
        try:
            size = self._raw.readinto(buffer) if left > 0 else None
        except TimeoutError:
            size = None
        if size is None:
            raise TimeoutError(f"no whole answer in {seconds:.0f} s")
        self._received += size
        if self.largest is not None and self._received > self.largest:
            raise HTTPException(f"the answer has more than {self.largest // MIB} MiB")
        return size

    def readall(self) -> bytes:
        # The default reads 8 KiB at a time.
        data, buffer = bytearray(), bytearray(MIB)
        while size := self.readinto(buffer):
            data += memoryview(buffer)[:size]
        return bytes(data)

    def close(self) -> None:
        self._raw.close()
        super().close()


class LimitedResponse(HTTPResponse):
    """An answer that comes whole within its connection's timeout, or not at all.

    A file gets a second more for each 16 kB, so that a large one may come over a slow line.
    """

    def __init__(self, sock: socket.socket, *args: Any, is_file: bool, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._limited = _Limited(sock, self.fp.detach())
        self.fp = io.BufferedReader(self._limited)
        self._is_file = is_file

    def begin(self) -> None:
        """Read the head, which is small and quick also where a file follows."""
        super().begin()
        if self._is_file:
            self.limit(None, earns_time=True)

    def limit(self, largest: int | None = LARGEST, *, earns_time: bool = False) -> None:
        """Read no more than so many bytes, from the first one on."""
        self._limited.largest, self._limited.earns_time = largest, earns_time


class LimitedConnection:
    """Mixin for connections of `http.client` and urllib3, whose answers it limits."""

    response_class: Any

    def putrequest(self, method: str, url: str, *args: Any, **options: Any) -> None:
        """Set what limits the answer to come, and go on as the connection does."""
        is_file = method == "GET" and any(part in url for part in _FILES)
        self.response_class = partial(LimitedResponse, is_file=is_file)
        super().putrequest(method, url, *args, **options)  # type: ignore[misc]
