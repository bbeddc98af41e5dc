"""The tree that ran as a commit: what is in it, what is refused, and what stays untouched."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.identity.key import make_recipe
from runkey.registry.snapshot import has_snapshot, snapshot_refs, take_snapshot


def take(repository, root=None, store_root=None):
    root = root or repository.root
    recipe = make_recipe("train", root)
    return recipe.key, take_snapshot(root, store_root or root, recipe)


def paths_in(repository, oid):
    return set(repository.git("ls-tree", "-r", "-z", "--name-only", oid).split("\0")) - {""}


def check_out(repository, oid, name="again"):
    again = repository.root.parent / name
    repository.git("worktree", "add", "-q", "--detach", str(again), oid)
    return again


def state(repository):
    """All that a snapshot must leave alone: the index, HEAD, every file and its times."""
    index = hashlib.sha256((repository.root / ".git/index").read_bytes()).hexdigest()
    files = {
        str(p): (p.lstat().st_mtime_ns, p.lstat().st_size)
        for p in repository.root.rglob("*")
        if ".git" not in p.parts
    }
    return index, repository.git("rev-parse", "HEAD"), repository.git("branch", "-a"), files


def test_a_clean_tree_is_its_commit(repository):
    key, oid = take(repository)
    assert oid == repository.git("rev-parse", "HEAD")
    assert snapshot_refs(repository.root, key) == {f"refs/runkey/{key}/{oid[:12]}": oid}
    assert has_snapshot(repository.root, oid)


def test_what_the_pipeline_writes_is_no_change(repository):
    repository.write("dvc.lock", "schema: '2.0'\nstages: {}\n")
    (repository.root / "metrics/train.json").unlink()  # DVC removes outputs before a stage runs
    repository.write("model/weights.pt", b"\0")
    assert take(repository)[1] == repository.git("rev-parse", "HEAD")


def test_the_tree_as_it_stands_and_what_it_needs_beside(repository):
    repository.write("gone.txt", "soon\n")
    head = repository.commit()
    repository.write("runkey/net.py", "import runkey.extra\nfrom runkey.tracking import late\n")
    repository.write("runkey/extra.py", "a = 1\n")
    repository.write("runkey/tracking/late.py", "beside_the_key = 1\n")
    repository.write("notes.txt", "nobody needs this\n")
    repository.write("staged.txt", "new, and known to git\n")
    repository.git("add", "staged.txt")
    (repository.root / "gone.txt").unlink()
    make_recipe("train", repository.root)  # what it parsed is kept in .runkey/
    before = state(repository)

    key, oid = take(repository)

    assert state(repository) == before
    assert repository.git("rev-parse", f"{oid}^") == head
    paths = paths_in(repository, oid)
    assert {"runkey/extra.py", "runkey/tracking/late.py", "staged.txt", "README.md"} <= paths
    assert {"notes.txt", "gone.txt"}.isdisjoint(paths)
    again = check_out(repository, oid)
    assert make_recipe("train", again).key == key
    assert (again / "runkey/net.py").read_bytes() == (
        repository.root / "runkey/net.py"
    ).read_bytes()


def test_a_file_taken_out_of_git_stays_out(repository):
    repository.write("secret.txt", "old\n")
    repository.commit()
    repository.git("rm", "-q", "--cached", "secret.txt")
    repository.write("secret.txt", "new\n")
    assert "secret.txt" not in paths_in(repository, take(repository)[1])


def test_the_same_tree_is_the_same_commit_for_anybody(repository, monkeypatch):
    repository.write("runkey/net.py", "width = 4\n")
    first = take(repository)[1]
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody Else")
    monkeypatch.setenv("GIT_AUTHOR_DATE", "2020-02-02T02:02:02Z")
    repository.git("config", "commit.gpgSign", "true")
    repository.git("config", "i18n.commitEncoding", "ISO-8859-1")
    repository.git("config", "core.splitIndex", "true")
    os.utime(repository.root / "runkey/net.py", (1, 1))
    assert take(repository)[1] == first
    assert not list((repository.root / ".git").glob("sharedindex.*"))


def test_variables_that_hooks_and_dvc_hand_down_do_not_count(repository, tmp_path, monkeypatch):
    repository.write("runkey/net.py", "width = 4\n")
    oid = take(repository)[1]
    other = tmp_path / "other"
    subprocess.run(["git", "init", "-q", other], check=True)
    for name, value in (
        ("GIT_DIR", other / ".git"),
        ("GIT_WORK_TREE", other),
        ("GIT_INDEX_FILE", other / "index"),
        ("GIT_OBJECT_DIRECTORY", other / ".git/objects"),
        ("GIT_PREFIX", "runkey/"),
    ):
        monkeypatch.setenv(name, str(value))
    assert take(repository)[1] == oid


def test_it_outlives_gc_and_gives_the_bytes_back(repository):
    wild = "wide = '\u00e4\u00f6'\r\n"
    repository.write("runkey/net.py", "import runkey.gr\u00f6\u00dfe\nimport runkey.link\n")
    repository.write("runkey/gr\u00f6\u00dfe.py", wild)
    repository.write("runkey/elsewhere/table.py", "rows = 1\n")
    (repository.root / "runkey/link.py").symlink_to("elsewhere/table.py")
    repository.write("name with  spaces\tand tab.txt", "x\n")
    repository.git("add", "name with  spaces\tand tab.txt")
    program = repository.write("run.sh", "#!/bin/sh\n")
    program.chmod(0o755)
    repository.git("add", "run.sh")
    key, oid = take(repository)
    repository.git("gc", "-q", "--prune=now")
    assert has_snapshot(repository.root, oid)
    again = check_out(repository, oid)
    for path in paths_in(repository, oid):
        assert (again / path).read_bytes() == (repository.root / path).read_bytes(), path
    assert (again / "runkey/link.py").is_symlink()
    assert (again / "run.sh").stat().st_mode & stat.S_IXUSR
    assert make_recipe("train", again).key == key


@pytest.mark.parametrize("setting", ["true", "input", "false"])
def test_line_ends_are_git_s_matter_and_the_key_stays(repository, setting):
    repository.git("config", "core.autocrlf", setting)
    repository.git("config", "core.safecrlf", "true")
    repository.write("runkey/net.py", "width = 4\r\nheight = 5\r\n")
    key, oid = take(repository)
    again = check_out(repository, oid)
    assert make_recipe("train", again).key == key
    if setting != "input":  # which asks for LF in every check-out
        assert (again / "runkey/net.py").read_bytes() == b"width = 4\r\nheight = 5\r\n"


def test_a_filter_that_loses_something_is_refused(repository):
    repository.git("config", "filter.short.clean", "head -n 1")
    repository.write(".gitattributes", "runkey/*.py filter=short\n")
    repository.write("runkey/net.py", "a = 1\nb = 2\n")
    with pytest.raises(RegistryError, match=r"runkey/net\.py: .* filter in \.gitattributes"):
        take(repository)


def test_an_ignored_file_that_the_run_needs_is_named(repository):
    repository.write(".gitignore", "/data\n/model\nextra.py\n")
    repository.write("runkey/net.py", "import runkey.extra\n")
    repository.write("runkey/extra.py", "a = 1\n")
    with pytest.raises(RegistryError, match=r"runkey/extra\.py: .*git ignores it \(\.gitignore:3"):
        take(repository)
    repository.git("add", "-f", "runkey/extra.py")
    assert "runkey/extra.py" in paths_in(repository, take(repository)[1])


def test_a_negated_rule_does_not_ignore(repository):
    repository.write(".gitignore", "/data\n/model\nextra*\n!extra.py\n")
    repository.write("runkey/net.py", "import runkey.extra\n")
    repository.write("runkey/extra.py", "a = 1\n")
    assert "runkey/extra.py" in paths_in(repository, take(repository)[1])


def test_weights_to_start_from(repository):
    repository.write(
        "params.yaml", "lr: 1e-4\nseed: 1\nmodel: {num_queries: 20, init_from: start.pt}\n"
    )
    repository.write("start.pt", b"\0" * 1000)
    assert "start.pt" in paths_in(repository, take(repository)[1])
    repository.write("start.pt", b"\0" * 11_000_000)
    with pytest.raises(RegistryError, match=r"start\.pt: .* 11 MB .*`dvc add start\.pt`"):
        take(repository)
    repository.write("start.pt.dvc", "outs:\n- md5: 0123\n  path: start.pt\n")
    repository.write(".gitignore", "/data\n/model\n/start.pt\n")
    paths = paths_in(repository, take(repository)[1])
    assert "start.pt.dvc" in paths
    assert "start.pt" not in paths


def test_a_link_out_of_the_repository_is_refused(repository, tmp_path):
    (tmp_path / "far.py").write_text("a = 1\n")
    (repository.root / "runkey/far.py").symlink_to(tmp_path / "far.py")
    repository.write("runkey/net.py", "import runkey.far\n")
    with pytest.raises(RegistryError, match=r"runkey/far\.py: a link to .* outside"):
        take(repository)


def test_before_the_first_commit(repository):
    (repository.root / ".git/HEAD").write_text("ref: refs/heads/unborn\n")
    key, oid = take(repository)
    assert repository.git("rev-list", "--count", oid) == "1"
    assert make_recipe("train", check_out(repository, oid)).key == key


def test_a_linked_worktree(repository):
    linked = repository.root.parent / "linked"
    repository.git("worktree", "add", "-q", "-b", "side", str(linked))
    (linked / "runkey/net.py").write_text("width = 5\n")
    key, oid = take(repository, linked)
    assert list(snapshot_refs(repository.root, key).values()) == [oid]
    assert repository.git("show", f"{oid}:runkey/net.py") == "width = 5"


def test_a_copy_with_a_repository_of_its_own(repository, monkeypatch):
    """As DVC's temporary folders: what it has committed alone is not known to the main one."""
    head = repository.git("rev-parse", "HEAD")
    copy = repository.root.parent / "copy"
    repository.git("clone", "-q", str(repository.root), str(copy))
    (copy / "runkey/net.py").write_text("width = 6\n")
    repository.git("commit", "-q", "-a", "-m", "only here", cwd=copy)
    (copy / "README.md").write_text("changed\n")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", head)
    _, oid = take(repository, copy, repository.root)
    assert repository.git("rev-parse", f"{oid}^") == head
    assert repository.git("show", f"{oid}:runkey/net.py") == "width = 6"
    assert repository.git("show", f"{oid}:README.md") == "changed"


def test_a_repository_below_the_top_of_git(repository):
    below = repository.root / "below"
    below.mkdir()
    for path in repository.git("ls-files").splitlines():
        repository.git("mv", "-k", "--", path.split("/")[0], "below/")
    repository.commit()
    (below / "runkey/net.py").write_text("import runkey.extra\n")
    (below / "runkey/extra.py").write_text("")
    key, oid = take(repository, below)
    assert "below/runkey/extra.py" in paths_in(repository, oid)
    assert make_recipe("train", check_out(repository, oid) / "below").key == key


def test_files_that_git_is_told_to_overlook(repository):
    repository.git("update-index", "--assume-unchanged", "runkey/net.py")
    repository.git("update-index", "--skip-worktree", "README.md")
    repository.write("runkey/net.py", "width = 7\n")
    (repository.root / "README.md").unlink()  # as in a sparse check-out
    _, oid = take(repository)
    assert repository.git("show", f"{oid}:runkey/net.py") == "width = 7"
    assert "README.md" in paths_in(repository, oid)


def test_outside_git_there_is_none(repository, monkeypatch):
    for path in sorted((repository.root / ".git").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (repository.root / ".git").rmdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.root.parent))
    assert take(repository)[1] is None


def remove_head(git):
    (git / "HEAD").unlink()


def break_config(git):
    (git / "config").write_text("[core\n")


def lose_main_repository(git):
    shutil.rmtree(git)
    git.write_text("gitdir: /nowhere/.git/worktrees/x\n")


def empty(git):
    shutil.rmtree(git)
    git.mkdir()


def belong_to_somebody_else(git):
    for path in (git.parent, git):
        os.chown(path, 12345, 12345)


REFUSED = {
    remove_head: "not a git repository",
    break_config: "bad config line",
    lose_main_repository: "not a git repository: /nowhere",
    empty: "not a git repository",
    belong_to_somebody_else: "detected dubious ownership",
}


@pytest.mark.parametrize(("damage", "why"), REFUSED.items())
@pytest.mark.parametrize("below", [True, False])
def test_a_repository_that_git_does_not_read_is_refused(repository, damage, why, below):
    """Also if another repository, further up, could take the snapshot."""
    if damage is belong_to_somebody_else and os.geteuid():
        pytest.skip("only root can give files away")
    if below:
        repository.git("init", "-q", cwd=repository.root.parent)
    git = repository.root / ".git"
    damage(git)
    with pytest.raises(RegistryError) as caught:
        take(repository)
    line = str(caught.value)
    assert line.startswith(f"{git}: git does not read it, so no snapshot would keep the code of a")
    assert why in line
    assert "\n" not in line
    if damage is belong_to_somebody_else:
        command = line.split("`")[-2]
        assert command == f"git config --global --add safe.directory {git.parent}"


def test_the_way_out_of_dubious_ownership(repository, monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "settings"))
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own tests use it
    with pytest.raises(RegistryError) as caught:
        take(repository)
    command = str(caught.value).split("`")[-2].split(" ", maxsplit=5)
    subprocess.run(command, check=True)
    assert take(repository)[1] == repository.git("rev-parse", "HEAD")


def test_a_repository_without_git_installed_is_refused(repository, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RegistryError, match=r"\.git: git does not read it.*; install git$"):
        take(repository)
    shutil.rmtree(repository.root / ".git")
    assert take(repository)[1] is None


def test_a_snapshot_without_its_ref_is_not_kept(repository):
    repository.write("runkey/net.py", "width = 4\n")
    key, oid = take(repository)
    [ref] = snapshot_refs(repository.root, key)
    repository.git("update-ref", "-d", ref)
    assert not has_snapshot(repository.root, oid)
    assert not has_snapshot(repository.root, "0" * 40)
    assert take(repository) == (key, oid)
    assert has_snapshot(repository.root, oid)


@pytest.mark.slow
def test_eight_at_the_same_time(repository):
    repository.write("runkey/net.py", "import runkey.extra\n")
    repository.write("runkey/extra.py", "a = 1\n")
    source = Path(__file__).parents[2]
    env = os.environ | {"DVC_ROOT": str(repository.root), "PYTHONPATH": str(source)}
    script = str(source / "tests" / "support" / "take_here.py")
    children = [
        subprocess.Popen(
            [sys.executable, script],
            cwd=repository.root,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    ends = [child.communicate(timeout=120) for child in children]
    assert {error for _, error in ends} == {""}
    _, key, oid, _ = ends[0][0].split(maxsplit=3)
    assert len({said for said, _ in ends}) == 1
    assert snapshot_refs(repository.root, key) == {f"refs/runkey/{key}/{oid[:12]}": oid}
