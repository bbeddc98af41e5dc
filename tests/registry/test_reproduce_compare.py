"""What counts as reproduced."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runkey.errors import RegistryError
from runkey.registry.reproduce import AP_TOLERANCE, LOSS_TOLERANCE, RunResult, compare_runs

WITNESS: dict[str, Any] = {
    "device": "cpu x86_64",
    "cpu": "AVX2: A CPU (avx2 fma)",
    "micro_batch": 8,
    "world_size": 1,
    "threads": 1,
    "precision": "off",
    "interpreter": "CPython 3.12.1 Linux x86_64",
    "package_differences": [],
    "commit": "a",
}
HASHES = {
    "model/weights.safetensors": "1" * 64,
    "evaluation/predictions.json": "2" * 64,
    "run.json": "3",
}
METRICS = {"eval/AP": 0.66, "eval/loss": 4.0, "eval/loss_l1": 1.0, "train/loss": 5.0}
FIRST = RunResult(WITNESS, HASHES, METRICS)
OTHER = WITNESS | {"threads": 2}
CHANGED = HASHES | {"model/weights.safetensors": "4" * 64}


def test_a_number_that_the_data_cannot_give_is_not_compared() -> None:
    """AP of large objects, where there are none, is NaN."""
    nothing = {"eval/AP_large": float("nan")}
    first = RunResult(WITNESS, HASHES, METRICS | nothing)
    elsewhere = compare_runs(first, RunResult(OTHER, CHANGED, METRICS))
    assert elsewhere.line == "reproduced within tolerance, on another kind of machine"
    # One that it could give and did not is far away.
    lost = compare_runs(FIRST, RunResult(OTHER, CHANGED, METRICS | {"eval/AP": float("nan")}))
    assert lost.line == "NOT reproduced: eval/AP within tolerance"


def test_the_same_bits() -> None:
    # The commit and run.json may differ: they say when and where.
    again = compare_runs(
        FIRST, RunResult(WITNESS | {"commit": "b"}, HASHES | {"run.json": "9"}, METRICS)
    )
    assert again.same_class
    assert again.identical
    assert again.holds
    assert again.line == "reproduced: bit-identical weights and predictions"
    assert [metric.name for metric in again.metrics] == ["eval/AP", "eval/loss"]


def test_other_bits_on_the_same_kind_of_machine_are_a_no_however_near() -> None:
    again = compare_runs(FIRST, RunResult(WITNESS, CHANGED, METRICS))
    assert again.within_tolerance
    assert not again.holds
    assert "model/weights.safetensors" in again.line


@pytest.mark.parametrize(
    ("metrics", "holds"),
    [
        ({"eval/AP": 0.66 + AP_TOLERANCE * 0.99}, True),
        ({"eval/AP": 0.66 - AP_TOLERANCE * 1.01}, False),
        ({"eval/loss": 4.0 * (1 + LOSS_TOLERANCE * 0.99)}, True),
        ({"eval/loss": 4.0 * (1 + LOSS_TOLERANCE * 1.1)}, False),
        ({"eval/AP": float("nan")}, False),
    ],
)
def test_another_kind_of_machine_is_judged_by_numbers(
    metrics: dict[str, float], holds: bool
) -> None:
    again = compare_runs(FIRST, RunResult(OTHER, CHANGED, METRICS | metrics))
    assert again.class_differences == ("threads 1 | 2",)
    assert again.holds is holds
    assert ("NOT" in again.line) is not holds


def test_a_number_that_the_repeat_lacks_is_a_no() -> None:
    again = compare_runs(FIRST, RunResult(OTHER, CHANGED, {"eval/loss": 4.0}))
    assert not again.holds
    assert "eval/AP" in again.line
    assert json.loads(json.dumps(again.as_dict(), allow_nan=False))["metrics"]["eval/AP"] == [
        0.66,
        None,
    ]


def test_without_numbers_only_the_bits_count() -> None:
    bare = RunResult(WITNESS, {"model/weights.pt": "1" * 64}, {})
    assert compare_runs(bare, bare).holds
    assert not compare_runs(bare, RunResult(OTHER, CHANGED, {})).holds


def test_other_packages_are_another_kind_of_machine() -> None:
    packages = {"package_differences": ["torch: locked 2, installed 1"]}
    again = compare_runs(FIRST, RunResult(WITNESS | packages, CHANGED, METRICS))
    assert again.class_differences == ("package_differences 0 other versions | 1 other version",)
    assert again.holds


def test_a_run_without_weights_cannot_be_compared() -> None:
    with pytest.raises(RegistryError, match=r"model/weights\.safetensors: the run recorded none"):
        compare_runs(RunResult(WITNESS, {}, {}), FIRST)


def test_other_instructions_are_another_class() -> None:
    """Rounding differs; of an older run they are not known."""
    other = "DEFAULT: A CPU (avx2 fma), ATEN_CPU_CAPABILITY=default"
    again = compare_runs(FIRST, RunResult(WITNESS | {"cpu": other}, CHANGED, METRICS))
    assert again.class_differences == (f"cpu {WITNESS['cpu']} | {other}",)
    assert again.holds
    older = {name: value for name, value in WITNESS.items() if name != "cpu"}
    again = compare_runs(RunResult(older, HASHES, METRICS), RunResult(WITNESS, CHANGED, METRICS))
    assert again.class_differences == (f"cpu not recorded | {WITNESS['cpu']}",)
