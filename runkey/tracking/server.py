"""MLflow's pages on the store, as a process of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable

from runkey.errors import TrackingError
from runkey.tracking.store import Store, quiet_mlflow

_START_SECONDS = 180.0
_HOST = "127.0.0.1"


def serve(
    store: Store, port: int, say: Callable[[str], None], pages: Callable[[str], Iterable[str]]
) -> None:
    """Serve the store's pages until the process is interrupted (Ctrl-C).

    A store that is a server already is not served again: its pages are said.

    Args:
        store: what to show.
        port: local port; 0: any free one.
        say: told the pages, and what goes on.
        pages: lines that name pages of the server at an address.

    Raises:
        TrackingError: there is no store yet, the port is taken, or MLflow does not start.
    """
    if store.is_server:
        for line in pages(store.uri):
            say(line)
        return
    if store.database and not store.database.is_file():
        raise TrackingError(f"{store.database}: not found; `make repro` records the first run")
    port = port or free_port()
    _refuse_taken(port)
    say("starting MLflow's server (some 10 s) ...")
    process = start_server(store, port)
    try:
        address = f"http://{_HOST}:{port}"
        wait_until_healthy(address, process)
        for line in pages(address):
            say(line)
        say("Ctrl-C ends it")
        process.wait()
    except KeyboardInterrupt:
        say("stopped")
    finally:
        stop_server(process)


def start_server(store: Store, port: int) -> subprocess.Popen[str]:
    """`mlflow server` with one worker on a local port; the caller ends it by `stop_server`."""
    quiet_mlflow()
    # Jobs (for generative AI) would be a second process of 240 MB.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store.uri]
    command += ["--host", _HOST, "--port", str(port), "--workers", "1"]
    if store.artifacts:
        command += ["--default-artifact-root", store.artifacts.as_uri()]
    # A session of its own: MLflow's process starts the one that serves and would leave it behind.
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def stop_server(process: subprocess.Popen[str], kill: bool = False) -> None:
    """End the server with the processes that it started; `kill` leaves them no time."""
    # The group may be gone already, which is what is wanted.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
    process.wait()


def wait_until_healthy(address: str, process: subprocess.Popen[str]) -> None:
    """Return when the server answers.

    Raises:
        TrackingError: it ended, or did not answer in three minutes.
    """
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise TrackingError(f"mlflow server ended with code {process.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise TrackingError(f"mlflow server did not answer at {address} in {_START_SECONDS:.0f} s")


def free_port() -> int:
    """A local port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise TrackingError(
                f"port {port}: {error.strerror}; name another, or 0 for any free one"
            ) from None
