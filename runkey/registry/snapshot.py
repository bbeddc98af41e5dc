"""Snapshots: the code of a run as a git commit of the tree that ran, committed before or not.

    oid = take_snapshot(workspace, store_root, recipe)    # refs/runkey/<key>/<12 digits> keeps it
    git worktree add --detach ../again <oid>              # the tree again; its key is the same

One holds the tracked files as they stand, and untracked ones that the run needs. dvc.lock and the
pipeline's outputs stay as committed; the user's index and working tree are not touched. Whatever
git refuses is a RegistryError with the last line that it printed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import batched
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict, Unpack

from runkey.errors import RegistryError, RunkeyError
from runkey.identity.code import code_rule, hash_code, import_closure
from runkey.identity.dvc_yaml import PIPELINE, Stage, covers, pointer_of, read_pipeline
from runkey.identity.initial_weights import own_files
from runkey.identity.key import DATA_PATH, Recipe, short_key
from runkey.params import load_params
from runkey.paths import LOCK, PARAMS, REQUIREMENTS

ELSEWHERE = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_IMPLICIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE"),
    *("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_QUARANTINE_PATH"),
    *("GIT_PREFIX", "GIT_NAMESPACE", "GIT_GRAFT_FILE", "GIT_SHALLOW_FILE"),
    *("GIT_REPLACE_REF_BASE", "GIT_LITERAL_PATHSPECS", "GIT_GLOB_PATHSPECS"),
)
"""Variables that make git look elsewhere than in its current folder; hooks and DVC pass them on."""


class GitOptions(TypedDict, total=False):
    """Options of `git`."""

    env: Mapping[str, str]
    """Beside the inherited variables, of which those that name another repository are dropped."""
    text: str
    """The command's input."""
    accept: Collection[int]
    """The exit codes that are no failure; else 0."""


def git(root: Path, *arguments: str, **options: Unpack[GitOptions]) -> str:
    """Run a git command in a folder; return what it prints, without the line end."""
    return git_bytes(root, *arguments, **options).decode("utf-8", "surrogateescape").rstrip("\n")


def git_bytes(root: Path, *arguments: str, **options: Unpack[GitOptions]) -> bytes:
    """Run a git command; return what it prints, byte for byte. All else as in `git`."""
    text = options.get("text", "").encode("utf-8", "surrogateescape")
    own = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            env=own | dict(options.get("env", {})),
            input=text,
            capture_output=True,
            check=False,
        )
    except OSError as error:
        raise RegistryError(
            f"git: not installed, or not to be started ({error.strerror})"
        ) from None
    if done.returncode not in options.get("accept", (0,)):
        output = (done.stderr.strip() or done.stdout.strip()).decode("utf-8", "replace")
        lines = (output or "no message").splitlines()
        cause = next((line for line in lines if line.startswith("fatal: ")), lines[-1])
        raise RegistryError(f"git {arguments[0]}: {cause.removeprefix('fatal: ').rstrip(':')}")
    return done.stdout


def has_git(root: Path) -> bool:
    """Return True if `root` lies in a git repository; False if none is at or above it.

    Raises:
        RegistryError: there is one, and git does not read it: it is another user's, or damaged, or
            git is not installed.
    """
    place = _repository(root.resolve())
    if place is None:
        return False
    try:
        # Not a repository that lies further up.
        git(root, "rev-parse", "--git-dir", env={_CEILINGS: str(place.parent), "LC_ALL": "C"})
    except RegistryError as error:
        why = str(error).removeprefix("git rev-parse: ")
        way_out = "`git status` there says more; restore it, or clone again"
        if (owner := "detected dubious ownership") in why:
            why = owner
            way_out = f"`git config --global --add safe.directory {place}` lets git read it"
        elif shutil.which("git") is None:
            way_out = "install git"
        raise RegistryError(
            f"{place / '.git'}: git does not read it, so no snapshot would keep the code of a run"
            f" ({why}); {way_out}"
        ) from None
    return True


_CEILINGS = "GIT_CEILING_DIRECTORIES"


def _repository(root: Path) -> Path | None:
    """Return the nearest folder with `.git`, as far up as git itself looks."""
    ceilings = os.environ.get(_CEILINGS, "").split(os.pathsep)
    across = bool(os.environ.get("GIT_DISCOVERY_ACROSS_FILESYSTEM"))
    for folder in (root, *root.parents):
        is_other_disk = not across and folder.stat().st_dev != root.stat().st_dev
        if folder != root and (is_other_disk or str(folder) in ceilings):
            break
        if os.path.lexists(folder / ".git"):
            return folder
    return None


def has_commit(root: Path, oid: str) -> bool:
    """Return True if a commit and its tree are in the repository."""
    return _succeeds(root, "cat-file", "-e", f"{oid}^{{tree}}")


def _succeeds(root: Path, *arguments: str) -> bool:
    try:
        git(root, *arguments)
    except RegistryError:
        return False
    return True


# Which files a run needs to run again.


_ALWAYS = (str(PIPELINE), str(PARAMS), str(LOCK), str(REQUIREMENTS), ".dvc/config", ".dvcignore")


def needed_files(root: Path, recipe: Recipe) -> set[str]:
    """List the files that the recipe's stages need, as posix paths relative to `root`.

    These are all files that they import (also those that the key leaves out), what dvc.yaml
    declares, the parameters, the lock and the initial weights. A file that DVC tracks is replaced
    by its .dvc file. Of a symbolic link both the link and its target are needed; RegistryError if
    it leaves the repository.
    """
    flat = load_params(root / PARAMS).flat()
    paths = {path for path in _ALWAYS if (root / path).is_file()}
    paths |= set(recipe.preimages["code"]["files"])
    for name, cmd in recipe.cmd.items():
        paths |= set(import_closure(Stage(name, cmd, (), (), ()).module, root, ()))
    for dep in recipe.preimages["data"]:
        paths.add(str(flat[DATA_PATH]).rstrip("/") if dep == "data" else dep)
    for name, found in own_files(flat, root.absolute()).items():
        if _lies_inside(flat[name]):
            paths |= {f.relative_to(root.absolute()).as_posix() for f in found}
    return {file for path in paths for file in _real_files(pointer_of(path, root) or path, root)}


def _lies_inside(value: object) -> bool:
    """Return True if a parameter names a file of the repository; the key has the hash of others."""
    path = PurePosixPath(str(value))
    return not path.is_absolute() and ".." not in path.parts


def _real_files(path: str, root: Path) -> Iterator[str]:
    """`path` with its links resolved, and every link on the way."""
    home = root.resolve()
    for part in reversed((PurePosixPath(path), *PurePosixPath(path).parents[:-1])):
        link = root / part
        if not link.is_symlink():
            continue
        yield str(part)
        target = link.resolve()
        if not target.is_relative_to(home):
            raise RegistryError(
                f"{path}: a link to {link.readlink()}, outside the repository, so that no snapshot"
                " can hold what the run needs; put the file itself there"
            )
        rest = PurePosixPath(path).relative_to(part)
        yield from _real_files((target.relative_to(home) / rest).as_posix(), home)
        return
    yield path


# Taking a snapshot.


REFS = "refs/runkey"
LARGEST_MB = 10
"""Of an untracked file, in 10^6 bytes; larger ones belong to DVC."""

_MESSAGE = "runkey: the tree that ran"
# The same author and date for everybody, so that the same tree gives the same commit.
_WHO = (
    dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "runkey")
    | dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "runkey@localhost")
    | dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), "2000-01-01T00:00:00+00:00")
)
# Overrides user settings that would leave files out, refuse some, or give another commit.
_SETTINGS = (
    *("-c", "core.fsmonitor=false", "-c", "core.splitIndex=false"),
    *("-c", "core.sparseCheckout=false", "-c", "core.safecrlf=false"),
    *("-c", "core.filesRefLockTimeout=10000", "-c", "i18n.commitEncoding=UTF-8"),
)
Git = Callable[..., str]
"""`git` with the folder and the environment given."""


def _zero_ended(paths: Iterable[str]) -> str:
    return "".join(f"{path}\0" for path in paths)


def take_snapshot(workspace: Path, store_root: Path, recipe: Recipe) -> str | None:
    """Keep the workspace as it stands, in the repository of the main checkout (`store_root`).

    Returns:
        The commit; HEAD itself if nothing differs from it; None outside git.

    Raises:
        RegistryError: git does not read the repository; the run needs a file that git ignores, or
            an untracked one that is too large. The text names it.
    """
    if not (has_git(workspace) and has_git(store_root)):
        return None
    top = Path(git(workspace, "rev-parse", "--show-toplevel"))
    prefix = git(workspace, "rev-parse", "--show-prefix")
    stages = read_pipeline(workspace, load_params(workspace / PARAMS).flat()).values()
    outputs = [prefix + out for out in ("dvc.lock", *(out for one in stages for out in one.outs))]
    needed = {prefix + path for path in needed_files(workspace, recipe)}
    with tempfile.TemporaryDirectory() as folder:
        # The workspace of `dvc exp run --temp|--queue` lies in a temporary repository of its own.
        env = _WHO | {
            "GIT_DIR": git(store_root, "rev-parse", "--absolute-git-dir"),
            "GIT_WORK_TREE": str(top),
            "GIT_INDEX_FILE": f"{folder}/index",
        }
        store = partial(git, top, *_SETTINGS, env=env)
        parent = _parent(top, store)
        _fill_index(top, store, parent, needed, outputs)
        _check_filters(top, store, needed, Path(folder) / "tree")
        content, oid = store("write-tree"), parent
        if oid is None or store("rev-parse", f"{oid}^{{tree}}") != content:
            parents = ("-p", parent) if parent else ()
            oid = store("commit-tree", content, *parents, "-m", _MESSAGE)
        if oid not in snapshot_refs(store_root, recipe.key).values():
            store("update-ref", ref_of(recipe.key, oid), oid)
    return oid


def snapshot_refs(root: Path, key: str) -> dict[str, str]:
    """Return the commit of every ref that keeps a snapshot of the key, by the ref's name."""
    printed = git(root, "for-each-ref", "--format=%(refname) %(objectname)", f"{REFS}/{key}/")
    return {ref: oid for ref, _, oid in (line.partition(" ") for line in printed.splitlines())}


def has_snapshot(root: Path, oid: str) -> bool:
    """Return True if the commit and its tree are there, and a ref of ours keeps them from gc."""
    refs = ("for-each-ref", f"--points-at={oid}", f"{REFS}/")
    return has_commit(root, oid) and bool(git(root, *refs))


def _parent(top: Path, store: Git) -> str | None:
    """The workspace's HEAD, else DVC's baseline: the first one that the repository knows."""
    head = git(top, "rev-parse", "--quiet", "--verify", "HEAD^{commit}", accept=(0, 1, 128))
    for oid in (head, os.environ.get("DVC_EXP_BASELINE_REV", "")):
        commit = f"{oid}^{{commit}}"
        if known := store("rev-parse", "--quiet", "--verify", commit, accept=(0, 1, 128)):
            return known
    return None


def _fill_index(
    top: Path, store: Git, parent: str | None, needed: set[str], outputs: list[str]
) -> None:
    """Bring the temporary index from the parent's tree to the working tree.

    `outputs`, which running changes, stay as they were committed.
    """
    before: set[str] = set()
    if parent:
        store("read-tree", parent)
        before = set(store("ls-files", "-z").split("\0")) - {""}
    # The workspace's own index, and what a sparse check-out left out.
    listed = git(top, "ls-files", "-z", "-v").split("\0")
    tracked = {entry[2:] for entry in listed if entry}
    skipped = {entry[2:] for entry in listed if entry[:1] in ("S", "s")}
    missing = {path for path in skipped if not os.path.lexists(top / path)}
    own = {p for p in before | tracked if any(covers(out, p) for out in outputs)}
    _check_untracked(top, store, needed - tracked)
    # A file that was taken out with `rm --cached` stays out.
    gone = _zero_ended(before - tracked - needed - own)
    store("update-index", "-z", "--force-remove", "--stdin", text=gone)
    kept = _zero_ended((tracked | needed) - (own - needed) - missing)
    store("update-index", "-z", "--add", "--remove", "--replace", "--stdin", text=kept)


def _check_untracked(top: Path, store: Git, untracked: set[str]) -> None:
    """Refuse untracked files that must not go into a commit unasked."""
    for path in sorted(untracked):
        size = (top / path).lstat().st_size
        if size > LARGEST_MB * 1e6:
            raise RegistryError(
                f"{path}: the run needs it, git does not track it, and {size / 1e6:.0f} MB are too"
                f" many for a snapshot; `dvc add {path}`"
            )
    arguments = ("check-ignore", "-z", "--stdin", "--verbose")
    names = _zero_ended(sorted(untracked))
    fields = store(*arguments, text=names, accept=(0, 1)).split("\0")[:-1]  # 1: none is ignored
    # A pattern with `!` un-ignores a file.
    if ignored := [row for row in batched(fields, 4) if not row[2].startswith("!")]:
        file, line, rule, path = ignored[0]
        more = f" (and {len(ignored) - 1} more)" if len(ignored) > 1 else ""
        raise RegistryError(
            f"{path}{more}: the run needs it and git ignores it ({file}:{line} {rule}), so that no"
            f" snapshot would have it; `git add -f {path}`, or `dvc add` it"
        )


def _check_filters(top: Path, store: Git, needed: set[str], folder: Path) -> None:
    """Refuse files that a check-out would not give back: clean filters may lose something.

    In text CRLF counts as LF, as in keys, because git may be set to turn one into the other.
    """
    files = [path for path in needed if not (top / path).is_symlink()]
    store("checkout-index", "-z", "--stdin", f"--prefix={folder}/", text=_zero_ended(files))
    for path in files:
        data, restored = (top / path).read_bytes(), (folder / path).read_bytes()
        if b"\0" not in data:
            data, restored = (text.replace(b"\r\n", b"\n") for text in (data, restored))
        if restored != data:
            raise RegistryError(
                f"{path}: the run needs it, and a filter in .gitattributes stores it so that git"
                " would not give the same back; take it out of the filter, or `dvc add` it"
            )


# The code of a snapshot beside the code part of a key.


def same_code(path: str, data: bytes, digest: str, rule: str) -> bool:
    """Return True if a file of code has the hash that a key holds."""
    try:
        return hash_code(path, data, rule) == digest
    except RunkeyError:  # no Python
        return False


def changed_files(root: Path, oid: str, code: Mapping[str, Any]) -> dict[str, str]:
    """Find files of a recipe's code part that a commit lacks or has with other content.

    Returns:
        What is wrong by path relative to the workspace `root`, in words; empty when all agree.
    """
    listed = set(git(root, "ls-tree", "-r", "-z", "--name-only", oid).split("\0"))
    wrong = {path: "is not in it" for path in code["files"] if path not in listed}
    there = [path for path in code["files"] if path not in wrong]
    with checked_out(root, oid, there) as folder:
        for path in there:
            data = (folder / path).read_bytes()
            if not same_code(path, data, code["files"][path], code_rule(code)):
                wrong[path] = "is another one in it"
    return wrong


@contextmanager
def checked_out(root: Path, oid: str, paths: Iterable[str]) -> Iterator[Path]:
    """Check out files of a commit to a temporary folder; paths are relative to `root`."""
    prefix = git(root, "rev-parse", "--show-prefix")
    with tempfile.TemporaryDirectory() as folder:
        env = {"GIT_INDEX_FILE": f"{folder}/index"}
        git(root, *_SETTINGS, "read-tree", oid, env=env)
        command = ("checkout-index", "-z", "--stdin", f"--prefix={folder}/tree/")
        git(root, *_SETTINGS, *command, env=env, text=_zero_ended(paths))
        yield Path(folder, "tree", prefix)


def add_worktree(main: Path, oid: str, folder: Path, way_out: str) -> Path:
    """Check out a snapshot in a new folder; return the workspace, which may lie below it.

    If the commit is not there, the RegistryError ends with the way out.
    """
    if not has_commit(main, oid):
        raise RegistryError(f"snapshot {oid[:12]}: not in git here; {way_out}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Hooks, such as DVC's own, are meant for the user's checkouts.
    no_hooks = ("-c", "core.hooksPath=/dev/null")
    git(main, *no_hooks, "worktree", "add", "--detach", str(folder), oid)
    return folder / git(main, "rev-parse", "--show-prefix")


def remove_worktree(main: Path, folder: Path) -> None:
    """Delete a worktree, as far as possible, and git's note of it; OSError if a part is left."""
    errors: list[BaseException] = []
    shutil.rmtree(folder, onexc=lambda *failed: errors.append(failed[2]))
    if has_git(main):
        git(main, "worktree", "prune")
    for error in errors:
        raise error


# Snapshots between repositories: by a remote, or by a bundle in a file.


_OID = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


def ref_of(key: str, oid: str) -> str:
    """Return the name of the ref that keeps a snapshot; refuse what names no commit."""
    if not _OID.fullmatch(oid):
        raise RegistryError(f"{short_key(key)}: {oid[:60]!r} names no commit; refused")
    return f"{REFS}/{key}/{oid[:12]}"


def check_remote(root: Path, remote: str) -> None:
    """Raise RegistryError if git has no remote of that name."""
    try:
        git(root, "remote", "get-url", "--", remote)
    except RegistryError:
        raise RegistryError(
            f"git has no remote {remote!r}; `git remote add {remote} <address>`, or --git-remote"
        ) from None


def push_snapshot(root: Path, remote: str, key: str, oid: str) -> bool:
    """Send a snapshot to a remote; return True if it was not there yet."""
    ref = ref_of(key, oid)
    if git(root, "ls-remote", "--", remote, ref).startswith(oid):
        return False
    git(root, "push", "--quiet", "--no-verify", "--", remote, f"{oid}:{ref}")
    return True


def fetch_snapshot(root: Path, source: str, key: str, oid: str, where: str) -> None:
    """Get a snapshot from a remote, repository or bundle; git checks every object (fsck).

    Raises:
        RegistryError: `source`, called `where`, lacks it, is damaged, or has another commit under
            its name.
    """
    ref = ref_of(key, oid)
    checked = ("-c", "transfer.fsckObjects=true")
    options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules")
    try:
        git(root, *checked, "fetch", *options, "--", source, f"{ref}:{ref}")
    except RegistryError as error:
        why = str(error).removeprefix("git -c: ")
        raise RegistryError(
            f"{short_key(key)}: git does not take the snapshot {oid[:12]} from {where} ({why})"
        ) from None
    if git(root, "rev-parse", "--verify", f"{ref}^{{commit}}") != oid:
        git(root, "update-ref", "-d", ref)
        raise RegistryError(f"{short_key(key)}: {ref} of {where} is not the commit {oid[:12]}")


def bundle_snapshot(root: Path, key: str, oid: str, path: Path) -> None:
    """Write a snapshot with its history to a file."""
    try:
        git(root, "bundle", "create", "--quiet", str(path), ref_of(key, oid))
    except RegistryError:
        raise RegistryError(
            f"{short_key(key)}: the snapshot {oid[:12]} is not in this repository;"
            f" `runkey verify {short_key(key)}` says what else is missing"
        ) from None


def unbundle_snapshot(root: Path, path: Path, key: str, oid: str, staging: Path) -> None:
    """Get a snapshot from a bundle that may come from anybody, by a new repository in `staging`.

    Raises:
        RegistryError: it is no bundle, holds other refs or damaged objects, or lacks the commit.
    """
    expected = f"{oid} {ref_of(key, oid)}"
    heads = git(root, "bundle", "list-heads", str(path)).splitlines()
    if heads != [expected]:
        shown = ", ".join(heads)[:200] or "nothing"
        raise RegistryError(f"{path.name}: holds {shown}, not just {expected}; refused")
    # git 2.39 checks a remote's objects, but not a bundle's: make a remote of the bundle first.
    git(root, "init", "--quiet", "--bare", "--template=", str(staging))
    fetch_snapshot(staging, str(path), key, oid, path.name)
    fetch_snapshot(root, str(staging), key, oid, path.name)
