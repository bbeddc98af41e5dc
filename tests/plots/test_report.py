"""`runkey report`: a page that holds all it shows, of whatever run there is."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from runkey.cli import app
from runkey.errors import RunkeyError
from runkey.identity.record import RunEnvironment, RunManifest
from runkey.plots.report import recorded_run, write_report
from tests.support.logs import LOGS
from tests.support.records import key_of

VOID = {"meta", "link", "img", "br"}


class Parsed(HTMLParser):
    """Addresses, pictures and text of a page; fails on tags that are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def report(*arguments: str, to: str = "page.html") -> Parsed:
    app(["report", *arguments, "--to", to], standalone_mode=False)
    page = Parsed(Path(to))
    assert "script" not in page.seen
    outside = [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert outside == []
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    return page


def test_a_page_of_a_run(a_run, capsys):
    record = a_run("lr=0.0001", ap=0.512)
    page = report(record.label)
    assert capsys.readouterr().out == "page.html\n"
    for text in (record.key, record.run.run_id, "lr=0.0001", "AP 0.512", "1,809", "400"):
        assert text in page.text
    assert "2 of 3 parameters differ from the default" not in page.text
    assert "lr 0.0001" in page.text  # parameters
    assert "cpu x86_64" in page.text
    assert "白血球 & co" in page.text
    assert "best F1 at score" in page.text
    assert "0.847 0.432" in page.text
    assert "<script>alert(1)</script>" in page.text  # as text, not as a tag
    assert len([a for a in page.addresses if a.startswith("data:image/png")]) == 6
    assert Path("page.html").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"train": null}',
        '{"train": []}',
        '{"train": {"images": "many"}}',
        '{"train": {"images": 1e400}}',
        '{"train": {"classes": ["ball"]}}',
        '{"train": {"classes": {"ball": 7}}}',
        '{"train": {"objects_per_image": {"mean": null}}}',
        '{"train": {"box_side_pixels": {"5%": "wide"}}}',
        '{"train": {"images": 1}, "train": {"images": 2}}',
    ],
)
def test_odd_statistics_are_named_and_left_out(a_run, caplog, text):
    name = "prepared/statistics.json"
    page = report(a_run("odd", changed={name: text.encode()}).label)
    assert "This run has no statistics of its data." in page.text
    (line,) = (line for line in caplog.messages if name in line)
    assert line.endswith("; the report does without it")
    assert "\n" not in line


@pytest.mark.parametrize(
    "text", ['{"train": {}}', '{"train": {"classes": {"ball": {}}}, "val": {}}']
)
def test_statistics_without_some_values_are_shown(a_run, caplog, text):
    page = report(a_run("few", changed={"prepared/statistics.json": text.encode()}).label)
    assert "box side, pixels" in page.text
    assert caplog.messages == []


def test_default_name_and_json(a_run, capsys):
    record = a_run("one", kind="empty")
    app(["report", record.label, "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told == {"page": f"report-{record.label[4:]}.html", "keys": [record.key]}
    assert Path(told["page"]).is_file()


def test_of_two_runs_only_what_differs_is_on_top(a_run):
    one, two = a_run("lr=0.0001", ap=0.5), a_run("lr=0.0005", ap=0.625, lr="0.0005")
    page = report(one.label, two.label)
    top, _, _ = page.text.partition("The whole report of this run")
    assert f"lr {one.run.params['lr']} {two.run.params['lr']}" in top
    assert "AP 0.500 0.625 (+0.125)" in top
    assert "params" in top
    assert "runkey/loop.py 0.500bbbbbbb 0.625bbbbbbb" in top
    assert "runkey/same.py" not in top
    assert "torch 2.10 b0.5 2.10 b0.625" in top
    assert "environment" not in top
    assert "model.dropout" not in top
    assert "seed" not in top
    assert page.text.count("The whole report of this run") == 2


def test_how_sure_ap_is_stands_beside_it(a_run):
    def files(ap, truth, *values):
        scores = {"AP": ap, "AP_low": ap - 0.04, "AP_high": ap + 0.03, "AP50": 0.8}
        one = {"AP": ap, "AP_low": ap - 0.1, "AP_high": ap + 0.1, "AP50": 0.6, "AR": 0.5}
        scores["per_class"] = {"kite": one | {"objects": 7, "by_size": {}}}
        resampled = {"truth": truth, "deviations": {"AP": 2.0, "AP50": None}}
        resampled |= {"AP": values, "AP50": values}
        return {
            "evaluation/metrics.json": json.dumps(scores).encode(),
            "evaluation/resampled.json": json.dumps(resampled).encode(),
        }

    one = a_run("lr=0.0001", changed=files(0.5, "images", 0.4, 0.5, 0.6))
    two = a_run("lr=0.0005", changed=files(0.55, "images", 0.44, 0.55, 0.66))
    three = a_run("lr=0.0009", changed=files(0.52, "others", 0.5, 0.5, 0.6))
    text = report(one.label).text
    assert "AP 0.500 95%: 0.460 to 0.530 AP50 0.800" in text
    assert "kite 7 0.500 0.400 to 0.600 0.600 0.500" in text
    top, _, _ = report(one.label, two.label, three.label).text.partition("The whole report")
    assert (
        f"{two.label} AP: +0.050 (95%: +0.034 to +0.066, paired by image): more than noise" in top
    )
    assert f"{three.label} AP: +0.020; the 95% intervals of the two, on different images" in top


def test_an_ap_of_test_is_not_compared_with_one_of_val(a_run):
    def scores(split, ap):
        ball = {"AP": ap, "AP50": ap, "AR": ap, "objects": 3, "by_size": {}}
        return json.dumps({"split": split, "AP": ap, "per_class": {"ball": ball}}).encode()

    files = {
        "evaluation/metrics.json": scores("test", 0.612),
        "evaluation/val/metrics.json": scores("val", 0.655),
    }
    of_test, of_val = a_run("tested", changed=files), a_run("older", ap=0.5)
    page = report(of_test.label)
    assert "Results on the test split" in page.text
    assert "on val, which chose the weights, AP is 0.655" in page.text
    assert "AP 0.612" in page.text
    page = report(of_val.label, of_test.label)
    assert "AP on test 0.612" in page.text
    assert "AP on val 0.500 0.655 (+0.155)" in page.text
    assert "ball on test 0.612" in page.text
    assert "Results on the test split" in page.text
    assert "Results on the validation split" in page.text


def test_runs_of_one_key_say_so(a_run):
    one = a_run("one", kind="empty")
    page = report(one.label, one.label)
    assert (
        "The runs have one key: code, parameters, data and environment are the same." in page.text
    )


@pytest.mark.parametrize("kind", ["interrupted", "empty", "one epoch"])
def test_a_run_that_was_interrupted_has_a_page(an_interrupted_run, a_run, kind):
    record = an_interrupted_run(kind)
    page = report(record.label)
    assert "killed" in page.text
    assert "Not recorded: the run did not end well." in page.text
    assert len([a for a in page.addresses if a.startswith("data:image/png")]) == 4


def test_a_run_that_was_interrupted_is_compared(an_interrupted_run, a_run):
    page = report(a_run("whole").label, an_interrupted_run("empty").label)
    assert "2 runs compared" in page.text
    assert "AP 0.500" in page.text


def test_the_last_run_of_a_workspace_has_a_page(checkout):
    witness = RunEnvironment(
        **{"device": "cpu x86_64", "micro_batch": 4, "world_size": 1, "threads": 2},
        **{"interpreter": "CPython 3.12", "packages": {}, "package_differences": [], "files": []},
        **{"undeclared_files": [], "commit": None, "dirty": False},
    )
    parts = {"code": "ab" * 32}
    manifest = RunManifest(
        key=key_of("here"), stage="train", parts=parts, run_id=None, witness=witness
    )
    manifest.write(checkout / "run.json")
    assert "This run has no log." in report(".").text
    log = LOGS["complete"](checkout / "logs" / "train.jsonl")
    lines = log.read_text().splitlines()
    entries = [json.loads(line) | {"time": 1000 + n / 10} for n, line in enumerate(lines)]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = report(".")
    assert "MLflow run none" in page.text
    assert len(lines) == 63
    assert "duration 6 s" in page.text  # from the first metrics to the last
    assert "device cpu x86_64" in page.text
    assert "packages as locked" in page.text


def test_a_run_without_any_file_has_a_page(an_interrupted_run, checkout):
    record = an_interrupted_run("empty")
    (checkout / ".runkey" / record.key / "train.jsonl").unlink()
    assert "This run has no log." in report(record.label).text


def test_pages_that_cannot_be_made(a_run, checkout):
    record = a_run("one", kind="empty")
    with pytest.raises(RunkeyError, match="no run of that key"):
        report("rk2-0000")
    (checkout / "a").write_text("")
    with pytest.raises(RunkeyError, match=r"a/page\.html: .*; name another one with --to"):
        report(record.label, to="a/page.html")
    with pytest.raises(RunkeyError, match=r"run\.json: not found; `dvc repro train` writes it"):
        report(".")


def test_what_training_met_on_its_way_is_told(a_run, checkout):
    record = a_run("one", kind="empty")
    met = [
        {"event": "skipped_step", "fields": {"step": 7, "image_ids": [1, 2], "why": None}},
        {"event": "skipped_step", "fields": {"step": 9, "image_ids": list(range(99))}},
        {"event": "hint.loader", "fields": {"seen": "it waits", "change": "raise workers"}},
    ]
    artifacts = checkout / "mlartifacts" / record.run.run_id / "artifacts"
    lines = [json.dumps({"time": 1, **entry}) + "\n" for entry in met]
    (artifacts / "logs" / "train.jsonl").write_text("".join(lines))
    text = Parsed(write_report([recorded_run(record, artifacts)], Path("page.html"))).text
    assert "skipped step 2 step 9, image_ids [0, 1, 2" in text
    assert "it waits raise workers" in text
    assert "hint.loader" not in text


def test_every_value_of_a_run_is_escaped(a_run):
    page = report(a_run('<b>bold</b>"', kind="empty").label)
    assert "b" not in page.seen[page.seen.index("h1") : page.seen.index("ul")]
    assert '<b>bold</b>"' in page.text
