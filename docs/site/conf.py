"""How Sphinx makes a site of README.md, docs/ and benchmarks/ (`make docs`).

The pages are what a git host shows: plain Markdown with relative links, which MyST follows here.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]

project = "runkey"
html_title = "runkey"
extensions = ["myst_parser"]
root_doc = "docs/README"

# Other folders are not even walked: environments and stores hold 100,000 files.
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
include_patterns = [*PAGES, "docs/**.md", "benchmarks/**.md"]
exclude_patterns = [
    path.name for path in ROOT.iterdir() if path.name not in (*PAGES, "docs", "benchmarks")
]

nitpicky = True  # a reference that leads nowhere is a warning, and warnings are errors
myst_heading_anchors = 4
myst_enable_extensions = ["html_image"]  # <img> is checked and copied, too
highlight_language = "none"

html_theme = "furo"
html_permalinks_icon = "#"
html_copy_source = False
html_show_copyright = False
html_show_search_summary = (
    False  # it would fetch pages, which browsers refuse where these are files
)
html_static_path = ["site.css"]
html_css_files = ["site.css"]
templates_path = ["."]
html_additional_pages = {"index": "forward.html"}

_SECTION = re.compile(r"^## +(.+)$", re.MULTILINE)
_PAGE = re.compile(r"^(?:- |\d+\. |\| *)\[([^]]+)\]\(([^)#]+)\.md\)", re.MULTILINE)


def table_of_contents(page: str, text: str) -> str:
    """Sphinx's table of contents for a page that lists others, out of the list itself.

    Args:
        page: name of the page, as `docs/README`.
        text: its Markdown. Items of lists and rows of tables that begin with a link to a page
            count, under the `##` heading above them.

    Returns:
        The directives that fill the side bar; a page that no list names fails the build.
    """
    parts = _SECTION.split(text)
    folder = PurePosixPath(page).parent
    tables = []
    for title, section in zip(["", *parts[1::2]], parts[::2], strict=True):
        entries = [f"{text} <{_absolute(folder / name)}>" for text, name in _PAGE.findall(section)]
        if entries:
            caption = [f":caption: {title}"] if title else []
            tables.append("\n".join(["```{toctree}", ":hidden:", *caption, *entries, "```"]))
    return "\n\n".join(tables)


def _absolute(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/" + "/".join(parts)


def _add_table_of_contents(_app: Sphinx, page: str, source: list[str]) -> None:
    if page.endswith(("/README", "/index")):
        source[0] += "\n" + table_of_contents(page, source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_table_of_contents)
