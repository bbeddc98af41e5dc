"""The page of `runkey report` in a real Chromium: it asks for nothing and complains of nothing."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from runkey.identity.record import Record
from runkey.plots.report import recorded_run, write_report
from tests.support.chromium import open_chromium
from tests.support.records import key_of, make_run

SCREENSHOTS = Path(__file__).parents[2] / ".screenshots"
LOG = "".join(
    f'{{"step": {step}, "time": {step}, "values": {{"train/loss": {9 / step}, "train/lr": 0.1,'
    f' "train/epoch": {step / 10}}}}}\n'
    for step in range(1, 41)
)


def run(folder: Path, name: str, ap: float) -> Record:
    key = key_of(name)
    files = {
        "logs/train.jsonl": LOG.encode(),
        "evaluation/metrics.json": f'{{"AP": {ap}, "per_class": {{}}}}'.encode(),
    }
    return make_run(folder, key, files=files, name=name, params={"lr": name[3:], "key": key})


def test_the_page_opens_offline(tmp_path: Path) -> None:
    records = [run(tmp_path, "lr=0.0001", 0.5), run(tmp_path, "lr=0.0005", 0.625)]
    runs = [recorded_run(r, tmp_path / "mlartifacts" / r.run.run_id / "artifacts") for r in records]
    path = write_report(runs, tmp_path / "report.html")
    with open_chromium(tmp_path, 1100, 900) as page:
        page.open(path.as_uri())
        text = page.wait_for("2 runs compared", "0.625 (+0.125)", seconds=20)
        assert all(r.label in text for r in records)
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.evaluate("document.images.length") > 4
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.requests_elsewhere(path.as_uri()) == []
        assert page.errors == []
        SCREENSHOTS.mkdir(exist_ok=True)
        page.screenshot(SCREENSHOTS / "report.png", whole=True)
    with Image.open(SCREENSHOTS / "report.png") as picture:
        assert picture.height > 900
