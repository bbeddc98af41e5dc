"""The helper itself: what it says of a page is so."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from tests.support.chromium import open_chromium

PAGE = """<!doctype html><meta charset=utf-8><title>t</title>
<h1>first</h1><p style="display:none">hidden</p>
<script>setTimeout(() => { document.body.append('later ' + 6 * 7) }, 300)</script>
"""
BAD = """<!doctype html><img src="http://example.invalid/pixel.png">
<script>
console.error('broken', 3);
setTimeout(() => { document.body.append('thrown'); nothing_of_that_name() }, 0)
</script>
<p>bad
"""
GOING_ON = """<!doctype html><link rel=icon href="data:,"><script>
const steps = Number(location.search.slice(1));
onload = () => {
  if (steps) location.replace('?' + (steps - 1)); else document.body.append('here');
};
</script><body>"""


class _Hops(BaseHTTPRequestHandler):
    """Documents of which each goes on to the next, and each into another process."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        if int(self.path.partition("?")[2]) % 2:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(GOING_ON.encode())

    def log_message(self, format: str, *args: object) -> None:
        """No lines of its own."""


def test_text_requests_and_errors_of_pages(tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text(PAGE)
    (tmp_path / "bad.html").write_text(BAD)
    with open_chromium(tmp_path, 800, 600) as page:
        good = (tmp_path / "good.html").as_uri()
        page.open(good)
        text = page.wait_for("first", "later 42", seconds=20)
        assert "hidden" not in text
        assert page.requests == [good]
        assert page.requests_elsewhere(good) == []
        assert page.errors == []
        page.screenshot(tmp_path / "good.png")

        bad = (tmp_path / "bad.html").as_uri()
        page.open(bad)
        page.wait_for("bad", "thrown", seconds=20)
        assert page.requests_elsewhere(bad) == ["http://example.invalid/pixel.png"]
        assert "broken 3" in page.errors
        assert any("nothing_of_that_name is not defined" in error for error in page.errors)
    with Image.open(tmp_path / "good.png") as picture:
        assert picture.size == (800, 600)


def test_a_page_that_goes_on_while_it_is_asked(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hops)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with open_chromium(tmp_path) as page:
            page.open(f"http://127.0.0.1:{server.server_port}/?40")
            assert page.wait_for("here", seconds=60, pause=0).strip() == "here"
            assert len({one for one in page.requests if one.startswith("http")}) == 41
    finally:
        server.shutdown()
        server.server_close()
