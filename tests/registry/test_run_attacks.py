"""Archives with a right index and a wrong run: another key, other files, weights that run code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from runkey.identity.record import ARTIFACTS, CONTENT, DETAILS
from runkey.registry.package import RUN, check
from tests.support.attacks import change_json, packed, record_weights, refused
from tests.support.run_package import Ready, torch_weights, weights


def test_another_key_in_the_index(package: Path, colleague: Path) -> None:
    other = "rk2-" + "0" * 64
    assert "its run has another key" in refused(packed(package, other), colleague)


def test_a_key_that_its_recipe_does_not_give(package: Path, colleague: Path) -> None:
    def change(recipe: Any) -> None:
        recipe["preimages"]["params"]["lr"] = 0.2

    change_json(package / RUN / ARTIFACTS / "model/key.json", change)
    assert "do not hash to its key" in refused(packed(package), colleague)


def test_a_file_that_the_run_did_not_record(package: Path, colleague: Path) -> None:
    (package / RUN / ARTIFACTS / "model/weights.safetensors").write_bytes(weights(1))
    text = refused(packed(package), colleague)
    assert "model/weights.safetensors: not the file that the run recorded" in text


def test_a_recorded_file_outside(package: Path, colleague: Path) -> None:
    def change(details: Any) -> None:
        details["files"]["../../x"] = {"size": 1, "sha256": "0" * 64}

    change_json(package / RUN / ARTIFACTS / DETAILS, change)
    assert "'../../x' leaves its folder" in refused(packed(package), colleague)


def test_a_run_that_is_not_finished(package: Path, colleague: Path) -> None:
    change_json(package / RUN / CONTENT, lambda run: run.update(status="RUNNING"))
    assert "the run is RUNNING, not FINISHED" in refused(packed(package), colleague)


@pytest.mark.parametrize(
    "change",
    [
        {"params": {"lr": 1}},
        {"metrics": {"loss": [[0, 1, "x"]]}},
        {"metrics": {"loss": [0]}},
        {"datasets": [{"name": "x"}]},
        {"tags": []},
        {"started_ms": "now"},
    ],
)
def test_a_run_of_wrong_types(package: Path, colleague: Path, change: dict[str, Any]) -> None:
    def put(run: Any) -> None:
        for name, value in change.items():
            run[name] = {**run[name], **value} if isinstance(value, dict) else value

    change_json(package / RUN / CONTENT, put)
    assert "refused" in refused(packed(package), colleague)


def test_weights_that_run_a_command(package: Path, colleague: Path) -> None:
    record_weights(package, torch_weights(os.system), "model/weights.pt")
    text = refused(packed(package), colleague)
    assert "model/weights.pt: torch does not load it with weights_only=True" in text
    assert "posix.system" in text


def test_a_raw_pickle(package: Path, colleague: Path) -> None:
    record_weights(package, pickle.dumps({}), "model/cache.pkl")
    assert "model/cache.pkl: a pickle can run any code" in refused(packed(package), colleague)


def test_weights_that_are_no_zip(package: Path, colleague: Path) -> None:
    record_weights(package, pickle.dumps({}), "model/weights.pt")
    assert "torch does not load it with weights_only=True" in refused(packed(package), colleague)


def test_a_pickle_under_the_name_of_safetensors(package: Path, colleague: Path) -> None:
    record_weights(package, pickle.dumps({}))
    assert "not a whole safetensors file" in refused(packed(package), colleague)


def test_weights_of_an_older_run_are_taken(ready: Ready, package: Path) -> None:
    record_weights(package, torch_weights(), "model/weights.pt")
    assert check(package, ready.key, "run.zip").key == ready.key


@pytest.mark.parametrize("name", ["lr", "key.params"])
@pytest.mark.parametrize("shown", ["0.7", "", "0"])
def test_parameters_that_the_list_of_runs_would_show(
    package: Path, colleague: Path, name: str, shown: str
) -> None:
    change_json(package / RUN / CONTENT, lambda stored: stored["params"].update({name: shown}))
    assert f"its run has {name} = {shown!r}, and its key" in refused(packed(package), colleague)
