"""Data that are a part of a folder that DVC tracks: the key is of the part, by a real DVC."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.identity.errors import RecipeError
from runkey.identity.key import make_recipe
from runkey.identity.pipeline import tracked_md5

SETS = {"setA": ("1", "2"), "setB": ("1", "3"), "deep/er/setA": ("1", "2")}


def dvc(root: Path, *arguments: str) -> None:
    command = [str(Path(sys.executable).with_name("dvc")), *arguments]
    subprocess.run(command, cwd=root, check=True, capture_output=True)


def write_set(folder: Path, *texts: str) -> None:
    """A folder whose files DVC sorts by their whole paths."""
    for name, text in zip(("images/ü.jpg", "images.json"), texts, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`all` tracked as a whole, `alone` by itself with the files of all/setA; a remote."""
    root = tmp_path_factory.mktemp("tracked") / "repository"
    root.mkdir()
    for name, texts in SETS.items():
        write_set(root / "all" / name, *texts)
    write_set(root / "alone", *SETS["setA"])
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "init", "-q")
    dvc(root, "remote", "add", "-q", "-d", "store", str(root.with_name("store")))
    dvc(root, "add", "-q", "all", "alone")
    dvc(root, "push", "-q")
    return root


@pytest.fixture
def project(project: Path, tracked: Path) -> Path:
    """The small repository of the other tests, with these data."""
    for name in (".dvc", "all.dvc", "alone.dvc"):
        copy = shutil.copytree if (tracked / name).is_dir() else shutil.copy
        copy(tracked / name, project / name)
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("deps: [data,", "deps: ['${data.path}',"))
    return project


def key_of(project: Path, path: str) -> str:
    text = (project / "params.yaml").read_text().partition("data:")[0]
    (project / "params.yaml").write_text(f"{text}data: {{path: {path}}}\n")
    return make_recipe("train", project).key


def test_parts_of_one_tracked_folder_have_keys_of_their_own(project: Path) -> None:
    keys = {path: key_of(project, f"all/{path}") for path in (*SETS, "deep", "deep/er")}
    assert keys["setA"] == keys["deep/er/setA"] == key_of(project, "all/setA/")
    assert len(set(keys.values())) == len(keys) - 1
    assert key_of(project, "all") not in keys.values()


def test_a_part_has_the_key_that_it_has_when_tracked_by_itself(
    project: Path, tracked: Path
) -> None:
    assert key_of(project, "all/setA") == key_of(project, "alone")
    for path in ("all/setA", "all/deep/er/setA", "alone"):
        assert tracked_md5(path, tracked) == tracked_md5("alone", tracked)


def test_the_tracked_folder_itself_has_the_md5_of_its_dvc_file(tracked: Path) -> None:
    (line,) = [n for n in (tracked / "all.dvc").read_text().splitlines() if "md5: " in n]
    assert tracked_md5("all", tracked) == f"md5:{line.split()[-1]}"
    shutil.move(tracked / ".dvc/cache", tracked / "aside")
    assert tracked_md5("all", tracked) == f"md5:{line.split()[-1]}"
    shutil.move(tracked / "aside", tracked / ".dvc/cache")


def test_a_file_of_a_tracked_folder_has_its_own_md5(tracked: Path) -> None:
    assert tracked_md5("all/setA/images.json", tracked) == "md5:c81e728d9d4c2f636f067f89cc14862c"


def test_a_change_in_a_part_changes_its_key_alone(project: Path, tracked: Path) -> None:
    before = {path: tracked_md5(f"all/{path}", tracked) for path in SETS}
    changed = tracked.with_name("changed")
    shutil.copytree(tracked, changed)
    write_set(changed / "all/setB", "1", "4")
    dvc(changed, "add", "-q", "all")
    after = {path: tracked_md5(f"all/{path}", changed) for path in SETS}
    assert {path for path in SETS if before[path] != after[path]} == {"setB"}


def test_a_fresh_clone_says_how_to_get_the_list(tracked: Path) -> None:
    clone = tracked.with_name("clone")
    clone.mkdir()
    for name in ("all.dvc", ".dvc/config"):
        (clone / name).parent.mkdir(exist_ok=True)
        shutil.copy(tracked / name, clone / name)
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    with pytest.raises(RecipeError) as caught:
        tracked_md5("all/setA", clone)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("all.dvc: the md5 of all/setA, a part of all, is not known")
    (way_out,) = str(caught.value).split("`")[1::2]
    dvc(clone, *way_out.split()[1:])
    assert tracked_md5("all/setA", clone) == tracked_md5("all/setA", tracked)


def test_a_torn_list_counts_as_missing(tracked: Path) -> None:
    copy = tracked.with_name("torn")
    shutil.copytree(tracked, copy)
    for path in (copy / ".dvc/cache/files/md5").glob("*/*.dir"):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RecipeError, match=r"run `dvc pull all.dvc`"):
        tracked_md5("all/setA", copy)
    dvc(copy, "pull", "all.dvc")
    assert tracked_md5("all/setA", copy) == tracked_md5("all/setA", tracked)


def test_what_a_tracked_folder_does_not_hold(tracked: Path) -> None:
    with pytest.raises(RecipeError, match=r"^all.dvc: all has no setC; `dvc add all` lists it"):
        tracked_md5("all/setC", tracked)
    with pytest.raises(RecipeError, match=r"^all.dvc: all has no set; "):
        tracked_md5("all/set", tracked)
