"""Real DVC: a test split from prepare to the list of runs, and what another seed runs again."""

from __future__ import annotations

import re
import sys

import pytest

from tests.support.project import Project, in_one_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def runkey(project: Project, *arguments: str) -> str:
    return project.run(sys.executable, "-m", "runkey", *arguments).stdout


def test_another_seed_neither_splits_nor_profiles_again(project: Project) -> None:
    params = project.root / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("\nseed: 0", "\nseed: 1"))
    ran = re.findall(r"Running stage '(\w+)'", project.dvc("repro"))
    assert ran == ["check", "train", "evaluate", "plots"]
    params.write_text(text)


def test_a_test_split_is_the_result_and_val_stands_beside_it(project: Project) -> None:
    before = project.json("prepared/report.json")["kept"]
    params = project.root / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("\n  test_fraction: 0.0", "\n  test_fraction: 0.25"))
    output = in_one_line(project.dvc("repro"))

    kept = project.json("prepared/report.json")["kept"]
    count = kept["test"]["images"]
    assert kept["val"] == before["val"]
    assert kept["train"]["images"] + count == before["train"]["images"]
    few = project.json("metrics/evaluate.json")
    assert few["split"] == "test"
    assert {"AP", "AP_low", "AP50", "AP75"} <= set(few) & set(few["val"])
    assert {"val_loss", "test_loss"} <= set(few)
    for folder, split in (("evaluation", "test"), ("evaluation/val", "val")):
        stored = project.json(f"{folder}/metrics.json")
        assert stored["split"] == split
        assert stored["AP"] == (few if split == "test" else few["val"])["AP"]
        assert (project.root / folder / "predictions.json").is_file()
    assert not (project.root / "evaluation/val/thresholds.json").exists()
    assert f"on {count} test images" in output
    assert "on val, which chose the weights: AP" in output
    assert re.search(rf"result +AP {few['AP']:.3f}.* on the test images", project.summary())
    assert "on val" in project.summary()
    listed = runkey(project, "list").splitlines()
    assert listed[0].split()[3:5] == ["AP", "split"]
    assert " test " in listed[1]
    shown = runkey(project, "show", project.json("run.json")["key"])
    assert "eval test" in shown
    assert "eval/val" in shown
    page = (project.root / "plots/report.html").read_text(encoding="utf-8")
    assert "Results on the test split" in page
    assert "split" in runkey(project, "experiments").splitlines()[0]
    params.write_text(text)
