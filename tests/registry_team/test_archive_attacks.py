"""Archives that are made to do harm: each is refused in a line, and nothing is written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runkey.errors import RegistryError
from runkey.hashing import sha256_bytes
from runkey.identity.record import DETAILS
from runkey.identity.run_folder import ARTIFACTS, CONTENT
from runkey.registry.reading.local_library import LocalLibrary
from runkey.registry.team.archive import INDEX, pack
from runkey.registry.team.carry import import_run
from runkey.registry.team.dvc_part import FILE
from runkey.registry.team.package import BUNDLE, RUN, object_path

from .conftest import RECIPE, Ready, entry_text, git, weights


class Untouched:
    """MLflow's part of a store that nothing may reach."""

    def read(self, run_id: str, folder: Path) -> object:
        raise AssertionError("read")

    def write(self, folder: Path) -> Any:
        raise AssertionError("the MLflow run was written")

    def add(self, run_id: str, file: Path) -> None:
        raise AssertionError("added")


def refused(file: Path, colleague: Path) -> str:
    """What import says; fails if it takes the archive, or leaves anything anywhere."""
    outside = sorted(colleague.parent.rglob("*"))
    before = git(colleague, "for-each-ref"), sorted(colleague.rglob("*"))
    home = colleague / ".runkey"
    with pytest.raises(RegistryError) as caught:
        import_run(file, colleague, home, Untouched(), LocalLibrary(home))
    assert list(home.iterdir()) == []
    home.rmdir()
    after = git(colleague, "for-each-ref"), sorted(colleague.rglob("*"))
    new = {p for p in set(after[1]) - set(before[1]) if ".git" not in p.parts}
    assert (after[0], new) == (before[0], set())
    assert [p for p in sorted(colleague.parent.rglob("*")) if ".git" not in p.parts] == [
        p for p in outside if ".git" not in p.parts
    ]
    text = str(caught.value)
    assert "\n" not in text
    return text


def rewrite(archive: Path, change: Callable[[zipfile.ZipFile, dict[str, Any]], None]) -> None:
    """Write the archive again with an honest index, then let `change` add to both."""
    with zipfile.ZipFile(archive) as old:
        members = {i.filename: old.read(i) for i in old.infolist()}
    index = json.loads(members.pop(INDEX))
    with zipfile.ZipFile(archive, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
        change(new, index)
        if index is not None:
            new.writestr(INDEX, json.dumps(index))


def list_it(index: dict[str, Any], name: str, content: bytes) -> None:
    index["members"][name] = {"size": len(content), "sha256": sha256_bytes(content)}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../outside.txt", "leaves its folder"),
        ("run/../../outside.txt", "leaves its folder"),
        ("/outside.txt", "is absolute"),
        ("C:outside.txt", "is absolute"),
        ("run\\..\\outside.txt", "backslash"),
        ("run//twice", "shortest form"),
        ("./run/here", "shortest form"),
        (".git/hooks/post-checkout", "leads into .git"),
        ("run/.DVC/config", "leads into .git or .dvc"),
        ("run/line\nbreak", "control character"),
    ],
)
def test_names_that_lead_elsewhere(archive: Path, colleague: Path, name: str, why: str) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        new.writestr(name, b"x")
        list_it(index, name, b"x")

    rewrite(archive, change)
    assert why in refused(archive, colleague)


def test_a_name_with_a_nul(archive: Path, colleague: Path) -> None:
    rewrite(archive, lambda new, index: new.writestr("run/aXb", b"x"))
    archive.write_bytes(archive.read_bytes().replace(b"run/aXb", b"run/a\0b"))
    assert "not plain; refused" in refused(archive, colleague)


def test_a_link(archive: Path, colleague: Path) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        info = zipfile.ZipInfo("run/link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        new.writestr(info, b"/etc/passwd")
        list_it(index, "run/link", b"/etc/passwd")

    rewrite(archive, change)
    assert "'run/link' is a link" in refused(archive, colleague)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice(archive: Path, colleague: Path) -> None:
    rewrite(archive, lambda new, index: new.writestr(FILE, b"{}"))
    assert f"holds '{FILE}' twice" in refused(archive, colleague)


def test_a_member_that_is_not_listed(archive: Path, colleague: Path) -> None:
    rewrite(archive, lambda new, index: new.writestr("run/more", b"x"))
    assert "'run/more', which index.json does not list" in refused(archive, colleague)


def test_a_listed_member_that_is_not_there(archive: Path, colleague: Path) -> None:
    rewrite(archive, lambda new, index: list_it(index, "run/more", b"x"))
    assert "lacks 'run/more', which index.json lists" in refused(archive, colleague)


def test_a_member_that_belongs_to_no_run(archive: Path, colleague: Path) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        new.writestr("setup.py", b"x")
        list_it(index, "setup.py", b"x")

    rewrite(archive, change)
    assert "'setup.py' belongs to no run" in refused(archive, colleague)


def test_a_bomb_is_read_no_further_than_listed(archive: Path, colleague: Path) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        new.writestr("run/zeros", bytes(50_000_000), zipfile.ZIP_DEFLATED)
        index["members"]["run/zeros"] = {"size": 10, "sha256": "0" * 64}

    rewrite(archive, change)
    assert "'run/zeros' is larger than its 10 bytes" in refused(archive, colleague)


def test_a_bomb_that_says_its_size(archive: Path, colleague: Path) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        new.writestr("run/zeros", b"0")
        index["members"]["run/zeros"] = {"size": 10**18, "sha256": "0" * 64}

    rewrite(archive, change)
    assert "unpacks to 1000000000.0 GB" in refused(archive, colleague)


def test_a_changed_byte(archive: Path, colleague: Path) -> None:
    def change(new: zipfile.ZipFile, index: dict[str, Any]) -> None:
        index["members"][FILE]["sha256"] = "0" * 64

    rewrite(archive, change)
    assert f"'{FILE}' is not what index.json lists" in refused(archive, colleague)


def test_what_is_no_archive(colleague: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.zip"
    file.write_bytes(b"PK\x03\x04 and then nothing")
    assert "not an archive of runs, or damaged" in refused(file, colleague)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    assert "has no index.json" in refused(file, colleague)
    file.unlink()
    assert "no such file" in refused(file, colleague)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_cut_archive(archive: Path, colleague: Path, kept: float) -> None:
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * kept)])
    # The weights are a zip of their own, whose end may be taken for the archive's.
    text = refused(archive, colleague)
    assert "not an archive of runs, or damaged" in text or "has no index.json" in text


# What follows is packed by runkey itself: the index is right, the contents are not.


def packed(package: Path, key: str = RECIPE.key) -> Path:
    pack(package, key, package.parent / "bad.zip")
    return package.parent / "bad.zip"


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def add_bad_object(package: Path, content: bytes, name: str, suffix: str = "") -> str:
    """An object with its right md5, under the name of an output of an entry of its own."""
    md5 = hashlib.md5(content).hexdigest() + suffix
    path = object_path(package, md5)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    entry, text = entry_text({"stages/train.py": "2" * 32}, {name: md5})

    def change(part: Any) -> None:
        part["objects"][md5] = len(content)
        part["entries"][entry] = text

    change_json(package / FILE, change)
    return md5


def test_another_key_in_the_index(package: Path, colleague: Path) -> None:
    other = "rk1-" + "0" * 64
    assert "its run has another key" in refused(packed(package, other), colleague)


def test_a_key_that_its_recipe_does_not_give(package: Path, colleague: Path) -> None:
    def change(recipe: Any) -> None:
        recipe["preimages"]["params"]["lr"] = 0.2

    change_json(package / RUN / ARTIFACTS / "model/key.json", change)
    assert "do not hash to its key" in refused(packed(package), colleague)


def test_a_file_that_the_run_did_not_record(package: Path, colleague: Path) -> None:
    (package / RUN / ARTIFACTS / "model/weights.pt").write_bytes(weights([1]))
    text = refused(packed(package), colleague)
    assert "model/weights.pt: not the file that the run recorded" in text


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


def record_weights(package: Path, content: bytes, name: str = "model/weights.pt") -> None:
    """Put a file into the run, recorded with its right hash."""
    path = package / RUN / ARTIFACTS / name
    path.write_bytes(content)
    stored = {"size": len(content), "sha256": sha256_bytes(content)}
    change_json(
        package / RUN / ARTIFACTS / DETAILS, lambda details: details["files"].update({name: stored})
    )


def test_weights_that_run_a_command(package: Path, colleague: Path) -> None:
    record_weights(package, weights(os.system))
    text = refused(packed(package), colleague)
    assert "model/weights.pt: loading it would use posix.system" in text


def test_a_raw_pickle(package: Path, colleague: Path) -> None:
    record_weights(package, pickle.dumps({}), "model/cache.pkl")
    assert "model/cache.pkl: a pickle can run any code" in refused(packed(package), colleague)


def test_weights_that_are_no_zip(package: Path, colleague: Path) -> None:
    record_weights(package, pickle.dumps({}))
    assert "not weights in torch's zip format" in refused(packed(package), colleague)


def test_weights_in_dvc_alone_that_run_a_command(package: Path, colleague: Path) -> None:
    add_bad_object(package, weights(eval), "model.pt")
    assert "model.pt: loading it would use" in refused(packed(package), colleague)


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
    record_weights(package, weights([1]))
    text = refused(packed(package), colleague)
    assert "model/weights.pt: DVC object" in text
    assert "is not the file that the run recorded" in text


def test_a_bundle_with_another_ref(ready: Ready, package: Path, colleague: Path) -> None:
    git(ready.root, "branch", "-f", "evil")
    git(ready.root, "bundle", "create", "-q", str(package / BUNDLE), "evil")
    assert "refs/heads/evil, not just" in refused(packed(package), colleague)


def test_a_bundle_of_another_commit(ready: Ready, package: Path, colleague: Path) -> None:
    change_json(
        package / RUN / ARTIFACTS / DETAILS, lambda details: details.update(snapshot="1" * 40)
    )
    assert "not just" in refused(packed(package), colleague)


def test_a_commit_name_that_is_an_option(package: Path, colleague: Path) -> None:
    change_json(
        package / RUN / ARTIFACTS / DETAILS,
        lambda details: details.update(snapshot="--upload-pack"),
    )
    assert "names no commit" in refused(packed(package), colleague)


def test_a_tree_that_leads_into_git(
    ready: Ready, package: Path, colleague: Path, tmp_path: Path
) -> None:
    """git's own check (fsck) finds a tree with `.git` in it, which a check-out would follow."""
    root = tmp_path / "evil"
    shutil.copytree(ready.root, root)
    blob = git(root, "hash-object", "-w", "params.yaml")
    tree = (
        subprocess.run(
            ["git", "mktree"],
            cwd=root,
            input=f"100644 blob {blob}\t.GIT\n".encode(),
            capture_output=True,
            check=True,
        )
        .stdout.decode()
        .strip()
    )
    oid = git(root, "commit-tree", tree, "-m", "x")
    ref = f"refs/runkey/{ready.key}/{oid[:12]}"
    git(root, "update-ref", ref, oid)
    (package / BUNDLE).unlink()
    git(root, "bundle", "create", "-q", str(package / BUNDLE), ref)
    change_json(package / RUN / ARTIFACTS / DETAILS, lambda details: details.update(snapshot=oid))
    assert f"git does not take the snapshot {oid[:12]}" in refused(packed(package), colleague)


def test_a_bundle_that_is_damaged(package: Path, colleague: Path) -> None:
    content = bytearray((package / BUNDLE).read_bytes())
    content[-30] ^= 1
    (package / BUNDLE).write_bytes(content)
    assert "snapshot" in refused(packed(package), colleague)
