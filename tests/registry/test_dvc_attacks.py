"""Archives with a right index and a wrong DVC part: objects, folders, entries of the run cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runkey.identity.record import ARTIFACTS, DETAILS
from runkey.registry.package import FILE, RUN, object_path
from tests.support.attacks import add_bad_object, change_json, packed, record_weights, refused
from tests.support.run_package import Ready, torch_weights, weights


def test_weights_in_dvc_alone_that_run_a_command(package: Path, colleague: Path) -> None:
    add_bad_object(package, torch_weights(eval), "model.pt")
    assert "model.pt: torch does not load it with weights_only=True" in refused(
        packed(package), colleague
    )


def test_an_object_with_another_md5(package: Path, colleague: Path) -> None:
    md5 = add_bad_object(package, b"good", "out.txt")
    object_path(package, md5).write_bytes(b"evil")
    assert f"DVC object {md5}: its contents have another md5" in refused(packed(package), colleague)


def test_a_dvc_folder_that_leads_outside(package: Path, colleague: Path) -> None:
    listed = [{"md5": "0" * 32, "relpath": "../../.bashrc"}]
    add_bad_object(package, json.dumps(listed).encode(), "out", ".dir")
    assert "'../../.bashrc' leaves its folder" in refused(packed(package), colleague)


@pytest.mark.parametrize("out", ["../outside", "/tmp/outside", ".git/hooks", ".dvc/config"])
def test_an_entry_that_writes_elsewhere(package: Path, colleague: Path, out: str) -> None:
    add_bad_object(package, b"x", out)
    assert "refused" in refused(packed(package), colleague)


def test_an_entry_under_the_name_of_another(ready: Ready, package: Path, colleague: Path) -> None:
    """DVC believes the name: with it, any stage could be given any output."""

    def change(part: Any) -> None:
        path, text = part["entries"].popitem()
        part["entries"][path] = text.replace("path: model\n", "path: stages\n")

    change_json(package / FILE, change)
    assert "its contents do not hash to its name" in refused(packed(package), colleague)


@pytest.mark.parametrize(
    "text",
    [
        "cmd: &a [*a]\n",
        "cmd: !!python/object/apply:os.system ['x']\n",
        "- a\n",
        "cmd: x\nwdir: ..\n",
        "{",
    ],
)
def test_an_entry_that_is_not_dvcs(package: Path, colleague: Path, text: str) -> None:
    def change(part: Any) -> None:
        part["entries"] = dict.fromkeys(part["entries"], text)

    change_json(package / FILE, change)
    assert "refused" in refused(packed(package), colleague)


def test_objects_of_another_run(package: Path, colleague: Path) -> None:
    change_json(
        package / RUN / ARTIFACTS / DETAILS, lambda details: details.update(pointer_md5="9" * 32)
    )
    assert "no entry has its run.json" in refused(packed(package), colleague)


def test_weights_of_dvc_that_are_not_the_runs(package: Path, colleague: Path) -> None:
    """MLflow's part is in order; DVC would put other weights in place."""
    record_weights(package, weights(1))
    text = refused(packed(package), colleague)
    assert "model/weights.safetensors: DVC object" in text
    assert "is not the file that the run recorded" in text
