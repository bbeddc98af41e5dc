"""The guide's tables are those of the measured results, and its pictures are of runs in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.techniques.collect import CURVES, FOLDER
from benchmarks.techniques.pictures import PICTURES, draw
from benchmarks.techniques.tables import GUIDE, fill, read_rows, table
from benchmarks.techniques.variants import BASELINE, VARIANTS
from runkey.params import load_params

ROOT = Path(__file__).parents[2]
PAGES = sorted({page for variant in VARIANTS for page in variant.pages})


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_table_of_the_results(page: str) -> None:
    text = (GUIDE / f"{page}.md").read_text(encoding="utf-8")
    rows = read_rows()
    assert f"<!-- techniques: {page} -->" in text
    assert fill(text, rows) == text, "python -m benchmarks.techniques tables"
    assert fill(text, [row | {"AP": 0.123} for row in rows]) != text
    assert len(table(page, rows).splitlines()) > 3, "no run of this page is in the results"


@pytest.mark.parametrize("page", sorted(PICTURES))
def test_a_picture_is_drawn_from_runs_in_the_results(page: str, tmp_path: Path) -> None:
    curves = json.loads(CURVES.read_text(encoding="utf-8"))
    drawn = draw(PICTURES[page], curves, tmp_path / "drawn.png")
    assert drawn.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (FOLDER / f"{page}.png").stat().st_size < 150_000


def test_variants_change_what_there_is() -> None:
    known = load_params(ROOT / "presets" / "sample.yaml").flat(runtime=True) | BASELINE
    for variant in VARIANTS:
        assert set(variant.settings) <= set(known), variant.name
        for name, value in variant.settings.items():
            assert known[name] != value or name == "runtime.workers", f"{variant.name}: {name}"
