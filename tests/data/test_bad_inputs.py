"""Every kind of bad data set, and the one line that a user reads about it.

Each case is the good data set of conftest.py with one fault, as real files; all policies are
`fail` where the default would mend the fault without stopping.
"""

from __future__ import annotations

import json

import pytest

from runkey.errors import DataError, RunkeyError
from tests.support.bad_data.cases import CASES
from tests.support.bad_data.faults import annotation
from tests.support.bad_data.image_files import truncated


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_in_one_line(folder, case):
    case.change(folder)
    folder.write()

    with pytest.raises(DataError) as caught:
        folder.prepare(**case.options)

    assert str(caught.value) == case.line
    assert "\n" not in case.line
    report = folder.report()
    assert report["passed"] is False
    assert any(item["policy"] == "fail" for item in report["items"])
    assert not (folder.out / "train.safetensors").exists()


def test_no_data_folder(folder):
    with pytest.raises(DataError) as caught:
        folder.prepare(path="elsewhere/")

    assert str(caught.value) == (
        "elsewhere: no such folder; run `dvc pull data.dvc` or set data.path in params.yaml"
    )


def test_there_are_as_many_cases_as_promised():
    assert len({case.name for case in CASES}) == len(CASES) >= 40


def test_all_faults_are_found_before_the_first_is_told(folder):
    annotation(1, category_id=2)(folder)
    annotation(0, bbox=[1, 2, -3, 4])(folder)
    truncated(folder)
    folder.val["images"][1]["file_name"] = "gone.jpg"
    folder.write()

    with pytest.raises(RunkeyError, match=r"\(3 more such faults in prepared/report\.json\)$"):
        folder.prepare()

    kinds = [item["kind"] for item in folder.report()["items"]]
    assert kinds == ["unknown_category", "negative_box", "unreadable_image", "missing_image"]


def test_a_failed_run_leaves_no_index_of_an_earlier_one(folder):
    folder.run()
    assert (folder.out / "train.safetensors").exists()
    folder.train["annotations"][0]["category_id"] = 99

    with pytest.raises(DataError):
        folder.run()

    left = sorted(path.name for path in folder.out.iterdir())
    assert left == ["report.json"]
    assert json.loads((folder.out / "report.json").read_text())["passed"] is False
