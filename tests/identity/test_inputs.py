"""What a stage reads is compared with its key: data edited in place, old prepared/; by real DVC."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runkey.errors import RecipeError
from runkey.identity import inputs
from runkey.identity.inputs import HASHES, INPUTS, FileHashes, Inputs, check_unchanged, tree_note
from runkey.identity.key import make_recipe
from runkey.params import load_params
from tests.support.identity_project import FILES

REPOSITORY = Path(__file__).parents[2]
PICTURE = "images/ü 1.jpg"
DATA = {"annotations/train.json": '{"id": 1}', PICTURE: "one", "images/2.jpg": "two"}
CODE = "runkey/data/boxes.py"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all/ tracked as a whole, with the sets `one` and `other`; `lone.txt` by itself; prepared."""
    root = tmp_path_factory.mktemp("inputs") / "repository"
    for name, text in FILES.items():
        write(root / name, text)
    for part in ("one", "other"):
        for name, text in DATA.items():
            write(root / "all" / part / name, text)
    write(root / "lone.txt", "lone")
    (root / "data.dvc").unlink()
    (root / "params.yaml").write_text("lr: 1e-4\nseed: 1\ndata: {path: all/one}\n")
    text = (
        (root / "dvc.yaml").read_text().replace("deps: [data,", "deps: ['${data.path}', lone.txt,")
    )
    (root / "dvc.yaml").write_text(text)
    write(root / ".dvcignore", "*.tmp\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    for arguments in (["init", "-q"], ["add", "-q", "all", "lone.txt"]):
        command = [str(Path(sys.executable).with_name("dvc")), *arguments]
        subprocess.run(command, cwd=root, check=True, capture_output=True)
    inputs = read(root, "prepare")
    inputs.begin_prepare()
    for name, text in {"train.json": "[1]", "cache_train.npy": "pixels"}.items():
        write(root / "prepared" / name, text)
    inputs.end_prepare()
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(template, tmp_path / "repository"))


def read(root: Path, stage: str = "train") -> Inputs:
    params = load_params(root / "params.yaml")
    return Inputs(root, params, make_recipe(stage, root, params), root / ".runkey")


def refused(check: Callable[[], None]) -> str:
    with pytest.raises(RecipeError) as caught:
        check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_unseen(path: Path, text: str) -> None:
    """With the same size, and the time of before."""
    found = path.stat()
    assert found.st_size == len(text.encode())
    path.write_text(text)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_what_is_as_the_key_says_passes(root: Path) -> None:
    read(root).check()
    read(root, "prepare").check()
    write(root / "all/other" / PICTURE, "changed, and of no stage")
    write(root / "all/one/note.tmp", "which DVC leaves out")
    write(root / CODE, "# A comment.\n" + (root / CODE).read_text())
    read(root).check()
    shutil.rmtree(root / "all")
    shutil.rmtree(root / "prepared")
    read(root).check()  # what is not there is not read


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda one: edit_unseen(one / PICTURE, "eno"), f"all/one/{PICTURE}: not what all.dvc"),
        (lambda one: (one / PICTURE).unlink(), f"all/one/{PICTURE}: not what all.dvc"),
        (lambda one: write(one / "new", ""), "all/one/new: not what all.dvc"),
        (lambda one: shutil.rmtree(one / "images"), "images/2.jpg and 1 more: not what all.dvc"),
        (lambda one: write(one.parents[1] / "lone.txt", "LONE"), "lone.txt: not what lone.txt.dvc"),
    ],
)
def test_data_that_changed_after_dvc_add_are_named(
    root: Path, change: Callable[[Path], None], named: str
) -> None:
    inputs = read(root)
    inputs.check()
    change(root / "all/one")
    line = refused(inputs.check)
    assert named in line
    assert refused(read(root).check) == refused(read(root, "prepare").begin_prepare) == line
    assert not (root / INPUTS).exists()  # prepare was about to write another


def test_the_way_out_takes_the_change_back(root: Path) -> None:
    write(root / "all/one" / PICTURE, "another")
    line = refused(read(root).check)
    command = next(part for part in line.split("`") if part.startswith("dvc checkout"))
    subprocess.run([sys.executable, "-m", *command.split()], cwd=root, check=True)
    read(root).check()


def test_of_a_dvc_file_of_dvc_2_line_ends_do_not_count(root: Path) -> None:
    """It hashed texts with LF; of others every byte counts."""
    text = "lines\r\nof text\r\n"
    (root / "lone.txt").write_bytes(text.encode())
    md5 = hashlib.md5(text.replace("\r", "").encode()).hexdigest()
    write(root / "lone.txt.dvc", f"outs:\n- md5: {md5}\n  size: 16\n  path: lone.txt\n")
    write(root / ".dvc/cache" / md5[:2] / md5[2:], text)
    read(root, "prepare").begin_prepare()
    (root / "lone.txt").write_bytes(text.upper().encode())
    assert refused(read(root, "prepare").begin_prepare).startswith("lone.txt: not what")


def test_data_are_compared_where_dvcs_cache_has_no_list_of_them(root: Path) -> None:
    write(root / "params.yaml", "lr: 1e-4\nseed: 1\ndata: {path: all}\n")
    shutil.rmtree(root / ".dvc/cache")
    inputs = read(root, "prepare")
    inputs.begin_prepare()
    edit_unseen(root / "all/other" / PICTURE, "eno")
    assert refused(inputs.end_prepare).startswith("all: not what all.dvc says")


def test_training_reads_images_alone(root: Path) -> None:
    inputs = read(root)
    write(root / "all/one/annotations/train.json", "{}")
    inputs.check("images")
    write(root / "all/one" / PICTURE, "another")
    inputs.check("none")
    assert PICTURE in refused(lambda: inputs.check("images"))


def test_a_new_file_in_the_data_does_not_end_a_training(root: Path) -> None:
    inputs = read(root)
    write(root / "all/one/images/new.jpg", "of the next version")
    inputs.check("images")
    assert "new.jpg" in refused(inputs.check)


def test_files_of_file_managers_and_network_drives_do_not_matter(root: Path) -> None:
    shutil.copy(REPOSITORY / ".dvcignore", root)
    inputs = read(root)
    for name in (".DS_Store", "._1.jpg", ".nfs000123", "Thumbs.db"):
        write(root / "all/one/images" / name, "")
    for name in (".DS_Store", ".nfs000123"):
        write(root / "prepared" / name, "")
    inputs.check()


def test_a_check_between_epochs_takes_a_hundredth_of_the_time(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = read(root)
    inputs.check_again("images")
    write(root / "all/one" / PICTURE, "another")
    monkeypatch.setattr(inputs, "_cost", 60.0)  # as of 100,000 files on a network drive
    inputs.check_again("images")
    monkeypatch.setattr(inputs, "_cost", 0.0)
    assert PICTURE in refused(lambda: inputs.check_again("images"))
    monkeypatch.setattr(inputs, "_cost", 60.0)
    assert PICTURE in refused(lambda: inputs.check("images"))


def test_hashes_that_cannot_be_written_are_made_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / ".runkey").rename(root / "away")
    write(root / ".runkey", "no folder, so nothing is written in it")
    monkeypatch.setattr(inputs, "_TICK_NS", 0)
    made, digest = [], hashlib.file_digest

    def count(*args: object) -> object:
        made.append(args)
        return digest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", count)
    read_now = read(root)
    read_now.check()
    assert len(made) == 6  # of data, lone.txt and prepared/
    read_now.check()
    assert len(made) == 6


def test_dvc_add_while_it_runs_does_not_change_what_was_read(root: Path) -> None:
    inputs, recipe = read(root), make_recipe("train", root)
    write(root / "all/one" / PICTURE, "another")
    command = [str(Path(sys.executable).with_name("dvc")), "add", "-q", "all"]
    subprocess.run(command, cwd=root, check=True)
    assert PICTURE in refused(inputs.check)
    assert "the data of key" in refused(lambda: check_unchanged(root, recipe))
    assert refused(read(root).check).startswith("prepared/: made from other data than")


@pytest.mark.parametrize(
    ("path", "old", "new", "part"),
    [
        ("params.yaml", "seed: 1", "seed: 2", "params"),
        (CODE, "late", "late as x", "code"),
        ("conda-lock.yml", "version: 2.10", "version: 2.11", "environment"),
    ],
)
def test_an_old_prepared_folder_is_refused(
    root: Path, path: str, old: str, new: str, part: str
) -> None:
    text = (root / path).read_text()
    changed = text.replace("import *", "import *  # it") if path == CODE else text.replace(old, new)
    if path == CODE:
        changed = text + "x = 1\n"
    (root / path).write_text(changed)
    assert refused(read(root).check).startswith(f"prepared/: made from other {part} than there are")
    (root / path).write_text(text)
    read(root).check()


@pytest.mark.parametrize("name", ["train.json", "cache_train.npy", "more.json"])
def test_a_prepared_file_that_prepare_did_not_write_so_is_refused(root: Path, name: str) -> None:
    write(root / "prepared" / name, "pixelz")
    assert refused(read(root).check).startswith(f"prepared/{name}: not as prepare wrote it")
    (root / "prepared" / name).unlink()
    if name == "more.json":
        read(root).check()
    else:
        assert refused(read(root).check).startswith(f"prepared/{name}: not as prepare wrote it")


@pytest.mark.parametrize("text", [None, "", "[]", '{"parts": 3}', "[" * 100_000])
def test_inputs_json_that_is_missing_or_torn_is_refused(root: Path, text: str | None) -> None:
    (root / INPUTS).unlink() if text is None else write(root / INPUTS, text)
    line = refused(read(root).check)
    assert line.startswith("prepared/inputs.json: not ")
    assert line.endswith("`dvc repro` makes it anew")


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    """Its hash comes from the file of hashes: here a wrong one, put there by hand."""
    path, home = tmp_path / "file", tmp_path / ".runkey"
    write(path, "text")
    os.utime(path, (1e9, 1e9))
    hashes = FileHashes(home)
    right = hashes.md5(path)
    hashes.close()
    assert not hashes._new  # it is too young: a change in the same tick of the clock is not seen
    found = path.stat()
    state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    hashes._new.append((state, "0" * 32, 2e9))
    hashes.close()
    assert FileHashes(home).md5(path) == "0" * 32
    edit_unseen(path, "next")
    assert FileHashes(home).md5(path) not in ("0" * 32, right)
    (home / HASHES).write_text("no database")
    assert FileHashes(home).md5(path) == FileHashes(tmp_path / "other").md5(path)


def test_it_is_said_that_the_files_have_another_key_than_run_json(root: Path) -> None:
    assert tree_note(root) == ""
    key = make_recipe("train", root).key
    write(root / "run.json", f'{{"stage": "train", "key": "{key}"}}')
    assert tree_note(root) == ""
    write(root / "params.yaml", "lr: 2e-4\nseed: 1\ndata: {path: all/one}\n")
    now = make_recipe("train", root).key
    assert tree_note(root) == (
        f"run.json is of {key[:16]}, the files here now have the key {now[:16]};"
        f" `runkey diff {key[:16]} .` says why, `dvc repro` trains it"
    )
    write(root / "params.yaml", "lr: [")
    assert "the key of the files here is not known: params.yaml" in tree_note(root)


def test_the_answer_is_kept_until_a_file_changes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_TICK_NS", 0)
    home = root / ".runkey"
    key = make_recipe("train", root).key
    write(root / "run.json", json.dumps({"stage": "train", "key": key}))
    assert tree_note(root, home=home) == ""
    made = []

    def count(*args: object) -> object:
        made.append(args)
        return make_recipe(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(inputs, "make_recipe", count)
    write(home / "claims" / "some", "changes nothing")
    write(root / "all" / "one" / "more.txt", "all.dvc says what is in all/")
    assert tree_note(root, home=home) == ""
    assert not made
    for name in (CODE, "params.yaml", "all.dvc"):
        text = (root / name).read_text()
        edit_unseen(root / name, text.replace("1", "2").replace("3", "4"))
        tree_note(root, home=home)
        assert len(made) == 1, name
        made.clear()
    write(root / "torch.py", "")  # hides the installed one
    tree_note(root, home=home)
    assert len(made) == 1


def test_the_answer_is_not_kept_where_files_may_change_unseen(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = root / ".runkey"
    key = make_recipe("train", root).key
    write(root / "run.json", json.dumps({"stage": "train", "key": key}))
    tree_note(root, home=home)
    assert not (home / inputs.NOTE).exists()  # a file is younger than the clock's tick
    monkeypatch.setattr(inputs, "_TICK_NS", 0)
    (root / "linked").symlink_to(tmp_path)
    tree_note(root, home=home)
    assert not (home / inputs.NOTE).exists()
    (root / "linked").unlink()
    monkeypatch.setattr(inputs, "_MOST_FILES", 5)
    tree_note(root, home=home)
    assert not (home / inputs.NOTE).exists()
