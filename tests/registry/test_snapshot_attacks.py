"""Archives with a right index and a wrong snapshot: git bundles of something else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from runkey.identity.record import DETAILS
from runkey.identity.run_folder import ARTIFACTS
from runkey.registry.team.package import BUNDLE, RUN
from tests.support.attacks import change_json, packed, refused
from tests.support.run_package import Ready, git


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
