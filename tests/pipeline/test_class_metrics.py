"""The AP of each class as metrics: names that MLflow takes, each once."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.store.tracking.sqlalchemy_store import _validate_metric

from runkey.evaluation.coco import ClassResult
from runkey.pipeline.record import class_metrics
from runkey.tracking.sync import legal_name

NAMES = (
    *(
        "kite",
        "kite (red)",
        "kite [red]",
        "kite _red_ id 2",
        "a/b",
        "a/../b",
        "../x",
        "/",
        ".",
        "..",
        "",
        " ",
        "-",
    ),
    *("x" * 400, "x" * 401, "Platelets ", "_", "C#", "ünïcode", "50%", "tab\there", "\u202fnarrow"),
)


def result(number: int, name: str, ap: float | None) -> ClassResult:
    return ClassResult(name, number, 1, ap, ap, ap, {})


def test_every_class_has_one_name_that_mlflow_takes() -> None:
    found = class_metrics([result(n, name, n / 100) for n, name in enumerate(NAMES)])
    assert sorted(found.values()) == [n / 100 for n in range(len(NAMES))]
    assert found["class_AP/kite"] == 0.0
    for name in found:
        assert legal_name(name) == name
        _validate_metric(name, 0.5, 1, 0)


@pytest.mark.parametrize("ap", [None])
def test_a_class_without_objects_has_none(ap: float | None) -> None:
    assert class_metrics([result(1, "kite", ap)]) == {}


def test_the_page_is_an_entry_point_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'runkey = "runkey.tracking.store:create_app"' in text
