"""What questions mean: conditions, names, order."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from runkey.errors import RegistryError
from runkey.identity.record import LoggedRun
from runkey.registry.query import (
    RUN,
    STARTED,
    Condition,
    Field,
    Query,
    Value,
    choose,
    filters,
    find_field,
    number,
    order_by,
    parse_condition,
)

LR = Field("params", "lr")
NAMES = ("AP", "lr", "status", "name", "started", "key", "seconds", "tags.host")
OPERATORS = ("=", "!=", "<", "<=", ">", ">=", "~")
MISTAKES = ("==", "=>", "=<", "=~", "~=", "<>", "!", "><", "<<", "=!")


def logged(**changes: Any) -> LoggedRun:
    fields: dict[str, Any] = {
        "run_id": "a" * 32,
        "experiment_id": "1",
        "name": "lr=5e-05 warm start",
        "status": "FINISHED",
        "started_ms": 1_000_000,
        "ended_ms": 1_060_000,
        "artifact_uri": "file:///x",
        "params": {"key": "rk2-0", "lr": "5e-05", "training.epochs": "24", "model.name": "x"},
        "metrics": {"eval/AP": 0.5, "eval/loss": 1.0, "train/loss": 2.0},
        "tags": {"key": "rk2-0", "host": "here"},
    }
    return LoggedRun(**{**fields, **changes})


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("lr=5e-5", True),
        ("lr=0.00005", True),
        ("lr = 5e-05", True),
        ("lr!=5e-5", False),
        ("lr<1e-4", True),
        ("lr>=1e-4", False),
        ("epochs=24", True),
        ("epochs=24.0", True),
        ("training.epochs>24", False),
        ("AP>0.4", True),
        ("eval/AP>0.6", False),
        ("metrics.eval/AP<=0.5", True),
        ("status=finished", True),
        ("status!=FINISHED", False),
        ("name~WARM", True),
        ("name~cold", False),
        ("tags.host=here", True),
        ("host~her", True),
        ("seconds=60", True),
        ("started<1970-01-03", True),
        ("started>2026-11-01T10:00", False),
        (f"run={'a' * 32}", True),
        ("run~aaa", True),
        ("key~rk2", True),
        ("AP~0.5", True),
        ("status~FINI", True),
        ("params.nothing=1", False),
        ("params.nothing!=1", False),
        ("model.name<3", False),
    ],
)
def test_a_condition(condition: str, holds: bool) -> None:
    run = logged()
    parsed = parse_condition(condition, lambda: [run])
    assert parsed.holds(parsed.field.of(run)) is holds


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("lr", "not a condition"),
        ("=3", "not a condition"),
        ("lr>high", "compares numbers"),
        ("loss=1", "eval/loss, train/loss end so; say which"),
        ("epochz=24", "like it: epochs"),
        ("zzzzzz=1", "no run has a value of that name"),
        ("started>yesterday", "not a time"),
        ("ended>1", "not a time"),
        *((f"{name}{operator}", "not a condition") for name in NAMES for operator in OPERATORS),
        *((f"{name}{wrong}1", "not a condition") for name in NAMES for wrong in MISTAKES),
        *((f"AP{one}high", "compares numbers; 'high' is none") for one in OPERATORS[:-1]),
        *((f"eval/loss{one}nan", "compares numbers; 'nan' is none") for one in OPERATORS[:-1]),
        ("seconds=long", "compares numbers"),
        ("lr>nan", "compares numbers"),
        ("AP=0.5,lr=1", "compares numbers"),
        ("status=FINISH", "not one of RUNNING, FINISHED, FAILED, KILLED$"),
        ("status!=dead", "KILLED; a DEAD run is RUNNING to MLflow"),
        ("key=rk2-7252", "no whole key; key~rk2-7252 finds a part"),
        ("run=aaaa", "no whole run; run~aaaa finds a part"),
    ],
)
def test_what_is_no_condition(condition: str, says: str) -> None:
    with pytest.raises(RegistryError, match=says):
        parse_condition(condition, lambda: [logged()])


def test_names_without_runs_to_look_in() -> None:
    assert find_field("lr", list) == LR
    assert find_field("val/AP", list) == Field("metrics", "val/AP")


def ordered(values: list[Value], **question: Any) -> list[int]:
    query = Query(sort=LR, **question)

    def of(number: int, field: Field) -> Value:
        return {STARTED: float(number), RUN: f"{number:032}", LR: values[number]}[field]

    return choose(range(len(values)), query, of)


def test_order() -> None:
    nan = math.nan
    assert ordered([1.0, None, 3.0, nan, 2.0]) == [2, 4, 0, 3, 1]
    assert ordered([1.0, None, 3.0, nan, 2.0], descending=False) == [0, 4, 2, 3, 1]
    assert ordered([1.0, None, 3.0, nan, 2.0], limit=2) == [2, 4]
    assert ordered(["9", "10", "5e-05"]) == [1, 0, 2]
    assert ordered(["9", "10", "auto"]) == [2, 0, 1]
    assert ordered([1.0, 1.0, 1.0], descending=False) == [2, 1, 0], "equal ones: newest first"


def test_numbers() -> None:
    assert [number(v) for v in ("5e-05", "-3", 2.0, None, "auto", "[1]")] == [
        5e-05, -3.0, 2.0, None, None, None,
    ]  # fmt: skip


def asked(*conditions: Condition, **question: Any) -> list[tuple[str, bool]]:
    found = filters(Query(conditions=conditions, **question))
    return [
        (text.removeprefix("tags.key LIKE 'rk%'").removeprefix(" AND "), e) for text, e in found
    ]


def test_what_a_server_is_asked() -> None:
    metric, name = Field("metrics", "eval/AP"), Field("run", "name")
    assert asked() == [("", True)]
    assert asked(Condition(metric, ">", "0.6")) == [("metrics.`eval/AP` > 0.6", True)]
    assert asked(Condition(LR, "=", "5e-5")) == [
        ("params.`lr` = '5e-05'", True),
        ("params.`lr` = '5e-5'", True),
    ]
    assert asked(Condition(Field("params", "n"), "=", "8")) == [
        ("params.`n` = '8'", True),
        ("params.`n` = '8.0'", True),
    ]
    assert asked(Condition(LR, "<", "1")) == [("", False)]
    assert asked(Condition(name, "~", "a_b")) == [("attributes.run_name ILIKE '%a_b%'", False)]
    both = asked(Condition(name, "~", "x"), Condition(Field("run", "status"), "=", "FAILED"))
    assert both == [("attributes.run_name ILIKE '%x%' AND attributes.status = 'FAILED'", True)]
    for quote in ("it's", 'a"b', "a`b", "a\\b"):
        assert asked(Condition(name, "=", quote)) == [("", False)]
    assert order_by(Query()) == ("attributes.start_time DESC",)
    assert order_by(Query(sort=metric, descending=False)) == ("metrics.`eval/AP` ASC",)
    assert order_by(Query(sort=LR)) is None


def test_times_are_of_the_users_clock() -> None:
    parsed = parse_condition("started>=2026-11-22T14:30", list)
    noon = time.mktime((2026, 11, 22, 14, 30, 0, 0, 0, -1))
    assert float(parsed.value) == noon * 1000
