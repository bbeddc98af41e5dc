"""A real Chromium, steered over its DevTools protocol: opens pages, reads them, photographs them.

    with open_chromium(tmp_path) as page:
        page.open(address)
        text = page.wait_for("baseline", "lr=0.0005")
        page.screenshot(tmp_path / "runs.png")
        assert page.requests_elsewhere(address) == []
        assert page.errors == []

Names are not resolved, so nothing leaves the machine; what a page asked for is written down first.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # containers let root make no sandbox; only our own pages are opened
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--lang=en-US",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--no-proxy-server",
    "--remote-debugging-port=0",
)
_START_SECONDS = 60.0
_LOAD_SECONDS = 60.0
_GOING = "Inspected target navigated or closed"


class _GoneOnError(AssertionError):
    """The document that was asked made way for the next one before it could answer."""


class Page:
    """One page of a browser, and what happened on it since it was opened."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._last_id = 0
        self.requests: list[str] = []
        """Addresses that the page and its workers asked for."""
        self.posts: list[str] = []
        """Those among them that something was sent to."""
        self.errors: list[str] = []
        """Errors in its console, and exceptions that nobody caught."""
        self._loaded: set[str] = set()
        self._documents: list[str] = []
        """The page's own, in order, as the ids of what loaded them; without frames."""
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        # Workers are targets of their own, which wait until they are listened to.
        self.call(
            "Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True
        )

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol; its result."""
        sent = self._send({"method": method, "params": params})
        while True:
            answer = json.loads(self._connection.recv(timeout=120))
            if answer.get("id") == sent:
                if "error" in answer:
                    kind = _GoneOnError if answer["error"]["message"] == _GOING else AssertionError
                    raise kind(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._note(answer)

    def open(self, address: str) -> None:
        """Go to an address; returns when its files are there, what scripts add comes later."""
        result = self.call("Page.navigate", url=address)
        assert "errorText" not in result, f"{address}: {result['errorText']}"
        # Asking the page whether it is complete may ask the one before it, which is about to go.
        # An anchor of the page that is open loads nothing.
        if loader := result.get("loaderId"):
            self._until_loaded(loader, address)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def text(self) -> str:
        """The text that can be seen."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def wait_for(self, *texts: str, seconds: float = 90.0, pause: float = 0.2) -> str:
        """The page's text as soon as all `texts` are in it; fails when they do not come."""
        end = time.monotonic() + seconds
        shown = ""
        while True:
            with suppress(_GoneOnError):
                shown = self.text()
            missing = [text for text in texts if text not in shown]
            if not missing:
                return shown
            if time.monotonic() > end:
                pytest.fail(f"not on the page after {seconds:.0f} s: {missing}\n{shown}")
            time.sleep(pause)

    def resize(self, width: int, height: int) -> None:
        """Set the size of what is seen, in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a PNG of what is seen; `whole`: of all that one could scroll to."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def requests_elsewhere(self, address: str) -> list[str]:
        """What was asked of any other host than that of `address`; of any, where it is a file."""
        own = urllib.parse.urlsplit(address)
        asked = [(one, urllib.parse.urlsplit(one)) for one in self.requests]
        return [
            one
            for one, parts in asked
            if parts.scheme not in ("data", "blob")
            and (parts.scheme, parts.netloc) != (own.scheme, own.netloc)
        ]

    def _send(self, message: dict[str, Any]) -> int:
        self._last_id += 1
        self._connection.send(json.dumps({"id": self._last_id, **message}))
        return self._last_id

    def _until_loaded(self, loader: str, address: str) -> None:
        end = time.monotonic() + _LOAD_SECONDS
        # A document that made way for another one may have taken the news of its load with it.
        while loader not in self._loaded and loader not in self._documents[:-1]:
            left = end - time.monotonic()
            assert left > 0, f"not loaded after {_LOAD_SECONDS:.0f} s: {address}"
            with suppress(TimeoutError):
                self._note(json.loads(self._connection.recv(timeout=left)))

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
            if params["request"]["method"] != "GET":
                self.posts.append(params["request"]["url"])
        elif method == "Page.lifecycleEvent" and params["name"] == "load":
            self._loaded.add(params["loaderId"])
        elif method == "Page.frameNavigated" and "parentId" not in params["frame"]:
            self._documents.append(params["frame"]["loaderId"])
        elif method == "Target.attachedToTarget":
            for command in ("Network.enable", "Runtime.runIfWaitingForDebugger"):
                self._send({"method": command, "sessionId": params["sessionId"]})
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", details).get("description", str(details)))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            parts = [str(one.get("value", one.get("description"))) for one in params["args"]]
            self.errors.append(" ".join(parts))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            self.errors.append(f"{entry['text']} {entry.get('url', '')}".strip())


@contextmanager
def open_chromium(folder: Path, width: int = 1600, height: int = 1000) -> Iterator[Page]:
    """A new browser with an empty profile; skips the test where there is no Chromium.

    Args:
        folder: where its profile may lie.
        width: of the page, in pixels.
        height: of the page, in pixels.
    """
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed; on Debian: apt-get install chromium")
    profile = Path(tempfile.mkdtemp(prefix="chromium-", dir=folder))
    # A session of its own: Chromium is a dozen processes, which end together.
    process = subprocess.Popen(
        [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        env=os.environ | {"HOME": str(profile)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        # No limit on an answer's size: a screenshot is one.
        with connect(_page_socket(profile, process), max_size=None, proxy=None) as connection:
            page = Page(connection)
            page.resize(width, height)
            yield page
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _page_socket(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """The address that the first page listens at."""
    told = profile / "DevToolsActivePort"
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, f"Chromium ended with code {process.returncode}"
        if told.is_file() and (lines := told.read_text().split()):
            listing = f"http://127.0.0.1:{lines[0]}/json/list"
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(listing, timeout=30) as answer:
                pages = [one for one in json.load(answer) if one["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise AssertionError(f"Chromium did not start in {_START_SECONDS:.0f} s")
