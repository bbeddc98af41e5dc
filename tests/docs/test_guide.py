"""The parameters, commands, metrics and hints that docs/guide/ names exist."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides

from runkey.params import Params, as_text, load_params
from runkey.params.render import allowed

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide"
INDEX = GUIDE / "index.md"
TECHNIQUES = sorted(page for page in GUIDE.glob("*.md") if page != INDEX)
PAGES = [INDEX, *TECHNIQUES]
SECTIONS = "data|model|optimizer|schedule|training|memory|evaluate|runtime"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(rf"(?<![\w./-])((?:{SECTIONS})\.[a-z_][a-z0-9_.]*[a-z0-9_])(?![\w/])")
METRIC = re.compile(r"\b((?:train|val|eval|system)/[A-Za-z]\w*)")
HINT = re.compile(r"\bhints? `([^`]+)`")
EVENT = re.compile(r"\bevents? `([^`]+)`(?:, `([^`]+)` and `([^`]+)`)?")
ROW = re.compile(r"^\| `([a-z_.]+)` \| ([^|]+) \| `([^|]*)` \|", re.MULTILINE)


def by_name(page: Path) -> str:
    return page.stem


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def said_on(page: Path) -> str:
    """A page without the targets of its links."""
    return re.sub(r"\]\([^)]*\)", "]", text_of(page))


def parameters() -> dict[str, dict[str, Any]]:
    """JSON schema of each parameter, by dotted name."""
    schema = Params.model_json_schema()

    def walk(section: dict[str, Any], before: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, field in section["properties"].items():
            inner = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2])
            if inner and "properties" in inner:
                yield from walk(inner, f"{before}{name}.")
            else:
                yield f"{before}{name}", field

    return dict(walk(schema, ""))


KNOWN = parameters()
CODE = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("runkey", "stages")
    for path in sorted((ROOT / folder).rglob("*.py"))
)


def unknown_parameters(text: str) -> set[str]:
    """Dotted names in a text that are neither a parameter nor a section of some."""
    sections = {name.rsplit(".", n)[0] for name in KNOWN for n in range(1, name.count(".") + 1)}
    return set(NAMED.findall(text)) - KNOWN.keys() - sections


def unknown_names(text: str) -> set[str]:
    """Metrics, hints and events in a text that no code writes or reads."""
    metrics = {name for name in METRIC.findall(text) if f'"{name}"' not in CODE}
    hints = {kind for kind in HINT.findall(text) if not re.search(rf'Hint\(\s*"{kind}"', CODE)}
    events = {kind for found in EVENT.findall(text) for kind in found if kind}
    return metrics | hints | {kind for kind in events if not re.search(rf'\(\s*"{kind}",', CODE)}


def changes(text: str) -> list[list[str]]:
    """The NAME=VALUE of each `dvc exp run` and `runkey memory` in a page's consoles."""
    consoles = (
        code.replace("\\\n", " ") for kind, code in FENCE.findall(text) if kind == "console"
    )
    lines = [line for code in consoles for line in code.splitlines() if " -S " in line]
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [[b for a, b in pairwise(line) if a == "-S"] for line in words]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_names_exist(page: Path) -> None:
    assert not unknown_parameters(said_on(page))
    assert not unknown_names(said_on(page))


@pytest.mark.parametrize("page", TECHNIQUES, ids=by_name)
def test_parameters_are_as_the_schema_has_them(page: Path) -> None:
    """Range and value of each row: as the schema and params.yaml have them."""
    values = load_params(ROOT / "params.yaml").model_dump(mode="json")
    rows = ROW.findall(text_of(page))
    assert rows or page.stem == "dependencies"
    for name, admitted, value in rows:
        assert admitted == allowed(KNOWN[name]).replace(" | ", ", "), name
        here = values
        for part in name.split("."):
            here = here[part]
        assert value == as_text(here), name


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_changes_can_be_made(page: Path, tmp_path: Path) -> None:
    """Each -S line, as DVC writes it into params.yaml, gives parameters that are admitted."""
    for line in changes(text_of(page)):
        path = tmp_path / "params.yaml"
        shutil.copy(ROOT / "params.yaml", path)
        apply_overrides(path, line)
        values = load_params(path).flat(runtime=True)
        assert {change.split("=")[0] for change in line} <= values.keys()


def test_the_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([a-z-]+\.md)", text_of(INDEX)))
    assert {page.name for page in TECHNIQUES} <= linked


def test_the_checks_find_faults() -> None:
    good = (
        "`data.augment`, `lr`, `memory/memory.json`, hint `loader`, event `split`, `val/loss_gap`"
    )
    assert not unknown_parameters(good) | unknown_names(good)
    bad = "`data.zoom` `training.epoch` hint `lodaer` event `spilt` `val/gap`"
    assert unknown_parameters(bad) == {"data.zoom", "training.epoch"}
    assert unknown_names(bad) == {"lodaer", "spilt", "val/gap"}
    page = (
        "```console\n$ dvc exp run -S lr=1 \\\n    -S 'a=[1,2]'  # -S no=1\n$ dvc exp show\n```\n"
    )
    assert changes(page) == [["lr=1", "a=[1,2]"]]
