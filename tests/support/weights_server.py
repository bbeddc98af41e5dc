"""A server that stands in for the places of published weights, and what goes wrong with one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class WeightsServer(ThreadingHTTPServer):
    """Serves the files of a folder by their names."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[str] = []
        """Paths of all requests."""
        self.cut: int | None = None
        """Bytes after which an answer ends."""
        self.goes_on = threading.Event()
        """Cleared: an answer waits after half of its bytes."""
        self.goes_on.set()
        self.is_waiting = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: WeightsServer

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        file = self.server.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        half = len(data) // 2
        self.wfile.write(data[:half])
        self.wfile.flush()
        if not self.server.goes_on.is_set():
            self.server.is_waiting.set()
            self.server.goes_on.wait(60)
        with suppress(ConnectionError):  # the client was killed
            self.wfile.write(data[half : self.server.cut])

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[WeightsServer]:
    """Serve a folder until the block ends."""
    with WeightsServer(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.goes_on.set()
            server.shutdown()
