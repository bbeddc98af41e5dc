"""The documentation as a site: links, anchors and pictures are there, and it opens offline."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.chromium import Page, open_chromium

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / ".screenshots"
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "benchmarks").rglob("*.md"))),
]


def test_every_page_is_in_the_site_and_its_side_bar(site: Path) -> None:
    start = (site / "docs/README.html").read_text()
    navigation = start.split('class="sidebar-tree"')[1].split("</aside>")[0]
    for page in PAGES:
        html = page.removesuffix(".md") + ".html"
        assert (site / html).is_file()
        if page.startswith("docs/") and page != "docs/README.md":
            assert f'href="{html.removeprefix("docs/")}"' in navigation, page


def test_nothing_in_it_is_fetched_from_elsewhere(site: Path) -> None:
    """Links to other sites may be followed by who reads; scripts, styles and pictures are here."""
    for file in site.rglob("*.html"):
        text = file.read_text()
        fetched = re.findall(r"<(?:script|img|link|source)\b[^>]*?(?:src|href)=\"([^\"]*)\"", text)
        assert [one for one in fetched if re.match(r"(\w+:)?//", one)] == [], file


FAULTS = {
    "[gone](nope.md)": "cross-reference target not found: 'nope.md'",
    "[no file](../runkey/nope.py)": "cross-reference target not found: '../runkey/nope.py'",
    "[no heading](memory.md#nope)": "local id not found in doc 'docs/memory': 'nope'",
    "[no heading here](#nope)": "cross-reference target not found: 'nope'",
    "![](pictures/nope.png)": "image file not readable: docs/pictures/nope.png",
    '<img src="pictures/nope.jpg">': "image file not readable: docs/pictures/nope.jpg",
}


def test_a_fault_fails_the_build(
    build: Callable[[Path, Path], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.md", "docs", "benchmarks", "runkey", "environment"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in listed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    with (tmp_path / "docs/keys.md").open("a") as page:
        page.write("\n\n" + "\n\n".join(FAULTS) + "\n")
    (tmp_path / "docs/unlisted.md").write_text("# A page that no list names\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for fault, said in FAULTS.items():
        assert re.search(rf"docs/keys\.md:\d*: WARNING: .*{re.escape(said)}", done.stderr), fault
    assert "docs/unlisted.md: WARNING: document isn't included in any toctree" in done.stderr
    assert len(done.stderr.splitlines()) == len(FAULTS) + 1, done.stderr


@pytest.fixture
def browser(tmp_path: Path):
    with open_chromium(tmp_path, 1400, 900) as page:
        yield page


@pytest.mark.slow
def test_it_opens_in_a_browser_without_a_network(site: Path, browser: Page) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    browser.open((site / "index.html").as_uri())
    browser.wait_for("Documentation", "Start", seconds=20)
    browser.screenshot(SCREENSHOTS / "docs.png")
    for name in PAGES:
        address = (site / name.replace(".md", ".html")).as_uri()
        for width in (1400, 400):
            browser.resize(width, 900)
            browser.open(address)
            browser.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
            # Wide tables and outputs scroll by themselves.
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
            broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
            assert browser.evaluate(broken) == 0, name
            if name in ("README.md", "docs/memory.md", "docs/guide/schedules.md"):
                browser.screenshot(SCREENSHOTS / f"docs-{Path(name).stem}-{width}.png")
    browser.open((site / "search.html").as_uri() + "?q=anchor")
    assert "Numerical stability" in browser.wait_for("Numerical stability", seconds=20)
    assert browser.requests_elsewhere(site.as_uri()) == []
    assert browser.errors == []
