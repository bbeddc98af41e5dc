"""Archives with a right index and a wrong DVC part: objects, folders, entries of the run cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from runkey.identity.record import ARTIFACTS, DETAILS
from runkey.registry.dvc_cache import DvcCache, md5_file
from runkey.registry.library import LocalLibrary
from runkey.registry.package import FILE, RUN, DvcPart, check, confirm, object_path
from runkey.registry.share import Checkout, import_run
from runkey.tracking.store import Store
from runkey.tracking.transfer import StoreRuns
from tests.support.attacks import add_bad_object, change_json, packed, record_weights, refused
from tests.support.run_package import (
    CODE_MD5,
    DATA,
    DEPS,
    LR,
    RECIPE,
    Ready,
    entry_text,
    git,
    torch_weights,
    weights,
)


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
    put_entry(package, DEPS, {"model": outs_of(package)["model"]})
    assert "no entry has its run.json" in refused(packed(package), colleague)


def test_weights_of_dvc_that_are_not_the_runs(package: Path, colleague: Path) -> None:
    """MLflow's part is in order; DVC would put other weights in place."""
    record_weights(package, weights(1))
    text = refused(packed(package), colleague)
    assert "model/weights.safetensors: DVC object" in text
    assert "is not the file that the run recorded" in text


# Entries with right names and right objects that would answer for another key.


def outs_of(package: Path) -> dict[str, str]:
    """Outputs of the run's own entry."""
    (text,) = json.loads((package / FILE).read_text())["entries"].values()
    return {out["path"]: out["md5"] for out in YAML(typ="safe", pure=True).load(text)["outs"]}


def put_entry(
    package: Path,
    deps: dict[str, str] = DEPS,
    outs: dict[str, str] | None = None,
    *,
    beside: bool = False,
    **more: Any,
) -> str:
    """Put an entry of DVC's form in place of the run's own, or beside it; return its path."""
    path, text = entry_text(deps, outs or outs_of(package), **({"params": LR} | more))

    def change(part: Any) -> None:
        part["entries"] = {**(part["entries"] if beside else {}), path: text}

    change_json(package / FILE, change)
    return path


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"params": {"params.yaml": {"lr": 0.2}}}, "lr = 0.2, and the run's key has 0.1; refused"),
        (
            {"params": {"params.yaml": {"lr": True}}},
            "lr = True, and the run's key has 0.1; refused",
        ),
        ({"params": {"params.yaml": {"model": {"init_from": "a.pt"}}}}, "model.init_from = 'a.pt'"),
        (
            {"deps": DEPS | {"data": "1" * 32 + ".dir"}},
            "reads other data, data, than the run's key",
        ),
        ({"deps": {"stages/train.py": CODE_MD5, "data": DATA[:31] + "1.dir"}}, "reads other data"),
        ({"cmd": "python -m stages.train --x"}, "not a command of the run's key; refused"),
    ],
)
def test_the_runs_entry_for_another_key(
    package: Path, colleague: Path, entry: dict[str, Any], why: str
) -> None:
    """The sender's files, which are the run's, would be restored for the tree of another key."""
    put_entry(package, **entry)
    assert why in refused(packed(package), colleague)


@pytest.mark.parametrize("lr", [0.1, 0.2])
def test_an_entry_beside_the_runs_own(package: Path, colleague: Path, lr: float) -> None:
    """For another key, with files of its own."""
    evil = add_bad_object(package, b'{"key": "another"}', "run.json")
    change_json(package / FILE, lambda part: part["entries"].popitem())
    own = outs_of(package)
    params = {"params.yaml": {"lr": lr}}
    put_entry(package, DEPS, {"model": own["model"], "run.json": evil}, beside=True, params=params)
    assert "has nothing to do with this run; refused" in refused(packed(package), colleague)


def test_an_entry_that_prepares_other_data(package: Path, colleague: Path) -> None:
    """It ends with what the run read, so it is of the run's chain."""
    prepared = add_bad_object(package, b"boxes", "prepared")
    change_json(package / FILE, lambda part: part["entries"].popitem())
    own = outs_of(package)
    put_entry(package, DEPS | {"prepared": prepared}, own)
    other = DEPS | {"data": "1" * 32 + ".dir"}
    more = {"cmd": "python -m stages.prepare", "beside": True}
    put_entry(package, other, {"prepared": prepared}, **more)
    assert "reads other data, data, than the run's key" in refused(packed(package), colleague)


def test_an_output_that_the_run_did_not_record(package: Path, colleague: Path) -> None:
    more = add_bad_object(package, b"import this", "stages/extra.py")
    change_json(package / FILE, lambda part: part["entries"].popitem())
    put_entry(package, DEPS, outs_of(package) | {"stages/extra.py": more})
    text = refused(packed(package), colleague)
    assert "stages/extra.py: in DVC's entry, and the run recorded no such file" in text


@pytest.mark.parametrize("change", [{"key": "rk2-" + "1" * 64}, {"parts": {"code": "0"}}])
def test_a_run_json_of_another_key(package: Path, colleague: Path, change: dict[str, Any]) -> None:
    path = package / RUN / ARTIFACTS / "run.json"
    record_weights(package, json.dumps(json.loads(path.read_text()) | change).encode(), "run.json")
    assert "run.json is of another key" in refused(packed(package), colleague)


def test_a_run_json_that_the_record_does_not_name(package: Path, colleague: Path) -> None:
    path = package / RUN / ARTIFACTS / "run.json"
    record_weights(package, path.read_bytes() + b"\n", "run.json")
    assert "names another run.json than the run's" in refused(packed(package), colleague)


def test_a_record_of_another_stage(package: Path, colleague: Path) -> None:
    details = package / RUN / ARTIFACTS / DETAILS
    change_json(details, lambda stored: stored.update(stage="evaluate"))
    assert "record.json is of the stage 'evaluate'" in refused(packed(package), colleague)


@pytest.mark.parametrize(
    ("deps", "params", "why"),
    [
        ({"stages/train.py": "2" * 32}, {}, "its stages/train.py is not as in the run's snapshot"),
        (
            {"runkey/model": "2" * 32 + ".dir"},
            {},
            "its runkey/model is not as in the run's snapshot",
        ),
        ({"prepared": "2" * 32 + ".dir"}, {}, "its prepared is not as in the run's snapshot"),
        ({}, {"params.yaml": {"more": 1}}, "its more is no parameter of the key"),
        ({}, {"other.yaml": {"more": 1}}, "it reads parameters from other files than params.yaml"),
    ],
)
def test_what_cannot_be_confirmed_is_left_out(
    package: Path,
    store: Store,
    said: list[str],
    deps: dict[str, str],
    params: dict[str, Any],
    why: str,
) -> None:
    """The run is taken in, since its key answers for it; DVC's entry, which may not be its, is not.

    Such an entry would restore the run's files in a tree with this other code.
    """
    entry = put_entry(package, DEPS | deps, params=params or LR)
    root = store.home.parent
    here = Checkout(root, store.home, LocalLibrary(store.home), StoreRuns(store, "tests"))
    done = import_run(packed(package), here)
    assert done.is_new
    assert not (DvcCache(root).runs / entry).exists()
    (line,) = [text for text in said if "is left out" in text]
    assert why in line
    assert "`dvc repro` runs that stage" in line


def test_a_snapshot_that_is_not_the_code_of_the_key(
    ready: Ready, package: Path, said: list[str]
) -> None:
    """Its files are what the entry read, and not what the key was made of."""
    other = b"print('something else')\n"
    root = ready.root
    (root / "stages" / "train.py").write_bytes(other)
    git(root, "commit", "-q", "-a", "-m", "other")
    oid, md5 = git(root, "rev-parse", "HEAD"), md5_file(root / "stages" / "train.py")
    git(root, "reset", "-q", "--hard", "HEAD~1")
    put_entry(package, DEPS | {"stages/train.py": md5})
    run = check(package, ready.key, "run.zip")
    part = DvcPart(**json.loads((package / FILE).read_text()))
    entries = part.check(lambda digest: object_path(package, digest), run)
    lying = replace(run, details=replace(run.details, snapshot=oid))
    assert confirm(entries, lying, root) == list(part.entries)
    assert "the snapshot is not the key's: stages/train.py is another one in it" in said[0]


def test_a_run_without_a_snapshot_brings_no_entry(
    ready: Ready, package: Path, said: list[str]
) -> None:
    run = check(package, ready.key, "run.zip")
    part = DvcPart(**json.loads((package / FILE).read_text()))
    entries = part.check(lambda digest: object_path(package, digest), run)
    assert confirm(entries, run, ready.root) == []
    outside = replace(run, details=replace(run.details, snapshot=None))
    assert confirm(entries, outside, ready.root) == list(part.entries)
    assert "the run has no snapshot" in said[0]
    assert RECIPE.key == run.key
