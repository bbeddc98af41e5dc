"""`model.init_from` and `backbone_weights`: a file, a folder or a run's key, by content."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from runkey.errors import RecipeError
from runkey.identity.initial_weights import find_initial_weights, link_weights
from runkey.identity.inputs import tree_note
from runkey.identity.key import make_recipe
from runkey.params import load_params
from runkey.paths import INITIAL_WEIGHTS
from tests.support.records import key_of, make_run

NAME = "model.init_from"
FILES = {"model/weights.safetensors": b"weights", "model/model.json": b"classes"}
KEY = key_of("start")


def write(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def identity(root, value):
    return find_initial_weights(NAME, value, root).identity


def test_one_content_has_one_identity_wherever_it_lies(project):
    write(project / "got")
    shutil.copytree(project / "got/model", project / "bare")
    make_run(project, KEY, files=FILES)

    own = identity(project, "got/model/weights.safetensors")
    names = ["got", "got/model", "bare", "bare/weights.safetensors", str(project / "got")]
    names += [KEY, KEY[:12], KEY[4:12]]
    assert {name: identity(project, name) for name in names} == dict.fromkeys(names, own)

    write(project / "bare", {"model.json": b"other classes"})
    assert identity(project, "bare") != own
    write(project / "got", {"model/weights.safetensors": b"other weights"})
    assert identity(project, "got") not in (own, identity(project, "bare"))


def test_the_key_of_a_training_holds_the_identity(project):
    make_run(project, KEY, files=FILES)
    write(project / "got")
    text = (project / "params.yaml").read_text()
    keys = set()
    for value in (KEY[:10], KEY, "got"):
        (project / "params.yaml").write_text(
            text.replace("model:\n", f"model:\n  init_from: {value}\n")
        )
        recipe = make_recipe("train", project)
        assert recipe.preimages["params"][NAME] == identity(project, KEY)
        keys.add(recipe.key)
    assert len(keys) == 1


def test_a_note_says_that_weights_have_changed_in_place(project):
    write(project / "start")
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("model:\n", "model:\n  init_from: start\n"))
    key = make_recipe("train", project).key
    (project / "run.json").write_text(json.dumps({"stage": "train", "key": key}))
    home = project / ".runkey"
    assert tree_note(project, home=home) == ""
    write(project / "start", {"model/weights.safetensors": b"changed"})
    assert tree_note(project, home=home).endswith("`dvc repro` trains it")


def name_weights(project, value):
    params = project / "params.yaml"
    text = re.sub(r"  init_from: .*\n", "", params.read_text())
    params.write_text(text.replace("model:\n", f"model:\n  init_from: {value}\n"))
    link_weights(load_params(params).flat(), project)
    return sorted(path.name for path in (project / INITIAL_WEIGHTS).iterdir())


def test_links_lead_to_the_files_that_may_change(project):
    make_run(project, KEY, files=FILES)
    write(project / "start")
    name_weights(project, "start")
    links = {path.name: path.read_bytes() for path in (project / INITIAL_WEIGHTS).iterdir()}
    del links["README"]
    assert links == {f"{NAME}.{Path(name).name}": data for name, data in FILES.items()}
    for fixed in (KEY, ".weights/resnet50-0676ba61.pth", "null"):
        if fixed.startswith("."):
            text = (project / "params.yaml").read_text()
            (project / "params.yaml").write_text(
                text.replace("model:\n", "model:\n  backbone: resnet50\n")
            )
        assert name_weights(project, fixed) == ["README"], fixed


def test_a_run_is_found_in_the_store_in_use(project, tmp_path, monkeypatch):
    other = tmp_path / "other"
    make_run(other, KEY, files=FILES)
    with pytest.raises(RecipeError, match="no finished run of that key"):
        find_initial_weights(NAME, KEY, project)
    # The worktree of `runkey reproduce` has no store of its own.
    assert find_initial_weights(NAME, KEY, project, main=other).run.key == KEY
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}/mlflow.db")
    found = find_initial_weights(NAME, KEY, project)
    assert found.run.key == KEY
    assert found.file.is_relative_to(other / ".runkey")


def test_a_finished_run_is_taken_and_no_repetition_of_it(project):
    make_run(project, KEY, "0" * 32, status="FAILED", files={"model/weights.pt": b"half"})
    make_run(project, KEY, "1" * 32, files=FILES, tags={"key": KEY, "reproduction_of": "2" * 32})
    make_run(project, KEY, "2" * 32, files=FILES, started_ms=1_800_000_000_000)
    found = find_initial_weights(NAME, KEY, project)
    assert found.run is not None
    assert found.run.run.run_id == "2" * 32


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("gone.pt", "gone.pt: no such file; name a weights file, a folder that `runkey get` made"),
        ("empty", "empty: holds no weights.safetensors; name a weights file"),
        ("model", "model: is what train writes, and DVC deletes it before; name the run's key"),
        ("./model/weights.safetensors", "is what train writes, and DVC deletes it before"),
        (".", ".: is what train writes, and DVC deletes it before"),
        ("link", "link: is what train writes, and DVC deletes it before"),
        ("rk2-0123456789ab", "no such file, and no finished run of that key is recorded here"),
        (key_of("running")[:16], "no finished run of that key is recorded here"),
        (key_of("bare")[:16], "what is recorded of that run here has no weights"),
        ("rk2-ffff", "rk2-ffff: 2 keys begin so: rk2-ffff"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(project, value, said):
    (project / "empty").mkdir()
    (project / "link").symlink_to("model")
    write(project)
    make_run(project, key_of("running"), status="RUNNING", files=FILES)
    make_run(project, key_of("bare"), "3" * 32, files={"run.json": b"{}"})
    for number in range(2):
        make_run(project, f"rk2-ffff{number:060x}", f"{number:032x}", files=FILES)
    with pytest.raises(RecipeError) as caught:
        identity(project, value)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"params.yaml: {NAME} = {value}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(project):
    write(project / "got")
    path = project / "got/model/weights.safetensors"
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(RecipeError, match=r"got: cannot be read \("):
        identity(project, "got")
