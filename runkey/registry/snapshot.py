"""The code of a run, kept as a commit: the tree that ran, whatever of it was committed before.

    oid = take_snapshot(workspace, store_root, recipe)    # refs/runkey/<key>/<12 digits> keeps it
    git worktree add --detach ../again <oid>              # the tree again; its key is the same

It holds the tracked files as they stand, and untracked ones that the run needs.  Left as they were
committed are dvc.lock and the pipeline's own outputs, which change by running.  Neither the user's
index nor a file of the working tree is touched.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from runkey.errors import RegistryError
from runkey.identity.code import import_closure
from runkey.identity.dvc_yaml import PIPELINE, Stage, covers, pointer_of, read_pipeline
from runkey.identity.key import DATA_PATH, FILE_PARAMS, Recipe
from runkey.identity.manifest import REQUIREMENTS
from runkey.params import load_params
from runkey.paths import LOCK, PARAMS

# git, run as a command.


# What makes git look elsewhere than in its current folder; hooks and DVC hand them down.
_ELSEWHERE = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_IMPLICIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE"),
    *("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_QUARANTINE_PATH"),
    *("GIT_PREFIX", "GIT_NAMESPACE", "GIT_GRAFT_FILE", "GIT_SHALLOW_FILE"),
    *("GIT_REPLACE_REF_BASE", "GIT_LITERAL_PATHSPECS", "GIT_GLOB_PATHSPECS"),
)


def git(
    root: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
    accept: Collection[int] = (0,),
) -> str:
    """What a git command prints, without the line end.

    Args:
        root: folder that it is run in; inherited variables that name another repository are void.
        arguments: after `git`.
        env: variables beside this process's own.
        text: its standard input.
        accept: exit codes that are no failure.

    Raises:
        RegistryError: git is not installed, or the command failed; the text has its last line.
    """
    printed = git_bytes(root, *arguments, env=env, text=text, accept=accept)
    return printed.decode("utf-8", "surrogateescape").rstrip("\n")


def git_bytes(
    root: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
    accept: Collection[int] = (0,),
) -> bytes:
    """What a git command prints, byte for byte; all else as in `git`."""
    own = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            env=own | dict(env or {}),
            input=None if text is None else text.encode("utf-8", "surrogateescape"),
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise RegistryError("git: not installed; the code of a run is kept with it") from None
    if done.returncode not in accept:
        told = (done.stderr.strip() or done.stdout.strip()).decode("utf-8", "replace")
        said = (told or "no message").splitlines()
        raise RegistryError(f"git {arguments[0]}: {said[-1].removeprefix('fatal: ')}")
    return done.stdout


def has_git(root: Path) -> bool:
    """Whether `root` lies in a git repository (and git is installed)."""
    try:
        git(root, "rev-parse", "--git-dir")
    except RegistryError:
        return False
    return True


# Which files a run needs to run again: what its snapshot must hold, tracked by git or not.


_ALWAYS = (str(PIPELINE), str(PARAMS), str(LOCK), str(REQUIREMENTS), ".dvc/config", ".dvcignore")


def needed_files(root: Path, recipe: Recipe) -> set[str]:
    """The files that the recipe's stages need, relative to `root`, posix.

    All that they import (telemetry too, which the key leaves out), what dvc.yaml declares beside
    it, parameters, lock, weights to start from; in place of a file that DVC tracks its .dvc file.
    Of a symbolic link both the link and what it points to.

    Args:
        root: the workspace.
        recipe: made in it.

    Raises:
        RegistryError: a file is a link that leaves the repository.
    """
    flat = load_params(root / PARAMS).flat()
    paths = {path for path in _ALWAYS if (root / path).is_file()}
    paths |= set(recipe.preimages["code"]["files"])
    for name, cmd in recipe.cmd.items():
        paths |= set(import_closure(Stage(name, cmd, (), (), ()).module, root, ()))
    for dep in recipe.preimages["data"]:
        paths.add(str(flat[DATA_PATH]).rstrip("/") if dep == "data" else dep)
    paths |= {str(flat[name]) for name in FILE_PARAMS if _lies_inside(flat.get(name))}
    return {file for path in paths for file in _real_files(pointer_of(path, root) or path, root)}


def _lies_inside(value: object) -> bool:
    """Whether a parameter is a file of the repository.

    One outside it has no place in a snapshot; the key holds its hash, so that no other file can
    pass for it.
    """
    if value in (None, "none", "imagenet") or Path(str(value)).is_absolute():
        return False
    return ".." not in Path(str(value)).parts


def _real_files(path: str, root: Path) -> Iterator[str]:
    """`path` without links in it, and every link on the way."""
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


REFS = "refs/runkey"
LARGEST_MB = 10
"""Of an untracked file, in 10^6 bytes; larger ones belong to DVC."""

_MESSAGE = "runkey: the tree that ran"
# The same for everybody, so that the same tree has the same commit.
_WHO = {
    f"GIT_{role}_{what}": value
    for role in ("AUTHOR", "COMMITTER")
    for what, value in (
        ("NAME", "runkey"),
        ("EMAIL", "runkey@localhost"),
        ("DATE", "2000-01-01T00:00:00+00:00"),
    )
}
# A user's settings that would leave files behind, refuse some, or give another commit.
_SETTINGS = tuple(
    word
    for setting in (
        "core.fsmonitor=false",
        "core.splitIndex=false",
        "core.sparseCheckout=false",
        "core.safecrlf=false",
        "core.filesRefLockTimeout=10000",
        "i18n.commitEncoding=UTF-8",
    )
    for word in ("-c", setting)
)


@dataclass(frozen=True)
class _Tree:
    """The working tree of the run, seen through the repository that the snapshot is kept in.

    The two differ in `dvc exp run --temp|--queue`, whose folder is a repository of its own that is
    deleted afterwards.
    """

    top: Path
    """Top folder of the workspace's repository."""
    prefix: str
    """Of the workspace in it: empty, or ending in `/`."""
    git_dir: str
    """Of the main checkout."""
    index: Path
    """A temporary one."""

    def git(
        self,
        *arguments: str,
        text: str | None = None,
        accept: Collection[int] = (0,),
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Run git on the tree, the main repository and the temporary index."""
        places = self._env() | dict(env or {})
        return git(self.top, *_SETTINGS, *arguments, env=places, text=text, accept=accept)

    def checked_out(self, oid: str, path: str) -> bytes:
        """The bytes that a check-out of a blob writes, filters applied."""
        arguments = ("cat-file", "--filters", f"--path={path}", oid)
        return git_bytes(self.top, *_SETTINGS, *arguments, env=self._env())

    def _env(self) -> dict[str, str]:
        places = {"GIT_DIR": self.git_dir, "GIT_WORK_TREE": str(self.top)}
        return places | {"GIT_INDEX_FILE": str(self.index)}


def take_snapshot(workspace: Path, store_root: Path, recipe: Recipe) -> str | None:
    """Keep the tree as it stands.

    Args:
        workspace: folder that the stage runs in.
        store_root: the main checkout, whose repository keeps the snapshot; may be the same.
        recipe: of the run.

    Returns:
        The commit; HEAD itself if nothing differs from it; None outside git.

    Raises:
        RegistryError: the run needs a file that git ignores, or an untracked one that is too large;
            the text names it.
    """
    if not (has_git(workspace) and has_git(store_root)):
        return None
    top = Path(git(workspace, "rev-parse", "--show-toplevel"))
    prefix = git(workspace, "rev-parse", "--show-prefix")
    git_dir = git(store_root, "rev-parse", "--absolute-git-dir")
    with tempfile.TemporaryDirectory() as folder:
        tree = _Tree(top, prefix, git_dir, Path(folder) / "index")
        needed = {prefix + path for path in needed_files(workspace, recipe)}
        parent = _parent(tree)
        _fill_index(tree, parent, needed, _outputs(workspace))
        oid = _commit(tree, parent)
        ref = f"{REFS}/{recipe.key}/{oid[:12]}"
        if oid not in snapshot_refs(store_root, recipe.key).values():
            tree.git("update-ref", ref, oid)
    return oid


def snapshot_refs(root: Path, key: str) -> dict[str, str]:
    """Commit by name of every ref that keeps a snapshot of the key."""
    printed = git(root, "for-each-ref", "--format=%(refname) %(objectname)", f"{REFS}/{key}/")
    words = [line.split(" ") for line in printed.splitlines()]
    return {ref: oid for ref, oid in words}  # noqa: C416 (dict() does not know that they are pairs)


def has_snapshot(root: Path, oid: str) -> bool:
    """Whether the commit and its tree are there, and a ref of ours keeps them from git's gc."""
    try:
        git(root, "cat-file", "-e", f"{oid}^{{tree}}")
        return bool(git(root, "for-each-ref", f"--points-at={oid}", f"{REFS}/"))
    except RegistryError:
        return False


def _parent(tree: _Tree) -> str | None:
    """What the workspace has checked out, else DVC's baseline: whichever the repository knows."""
    try:
        head = git(tree.top, "rev-parse", "--verify", "HEAD^{commit}")
    except RegistryError:
        head = ""  # no commit yet
    for oid in (head, os.environ.get("DVC_EXP_BASELINE_REV", "")):
        try:
            return tree.git("rev-parse", "--verify", f"{oid}^{{commit}}")
        except RegistryError:
            continue
    return None


def _outputs(workspace: Path) -> list[str]:
    """What running changes, relative to the workspace."""
    stages = read_pipeline(workspace, load_params(workspace / PARAMS).flat())
    return ["dvc.lock", *(out for stage in stages.values() for out in stage.outs)]


def _fill_index(tree: _Tree, parent: str | None, needed: set[str], outputs: list[str]) -> None:
    """Bring the temporary index from the parent's tree to the working tree."""
    before: set[str] = set()
    if parent:
        tree.git("read-tree", parent)
        before = set(tree.git("ls-files", "-z").split("\0")) - {""}
    tracked, missing = _tracked(tree)
    own = {p for p in before | tracked if any(covers(tree.prefix + out, p) for out in outputs)}
    untracked = needed - tracked
    _refuse(tree, untracked)
    # With `rm --cached` a file is meant to stay out.
    _update(tree, before - tracked - needed - own, "--force-remove")
    _update(tree, (tracked | needed) - (own - needed) - missing, "--add", "--remove", "--replace")
    _check_bytes(tree, needed)


def _tracked(tree: _Tree) -> tuple[set[str], set[str]]:
    """The files in the workspace's own index, and those that a sparse check-out left out."""
    listed = git(tree.top, "ls-files", "-z", "-v").split("\0")
    pairs = [(entry[0], entry[2:]) for entry in listed if entry]
    skipped = {path for tag, path in pairs if tag in "Ss"}
    return {path for _, path in pairs}, {p for p in skipped if not os.path.lexists(tree.top / p)}


def _update(tree: _Tree, paths: Iterable[str], *options: str) -> None:
    tree.git("update-index", "-z", *options, "--stdin", text="".join(f"{p}\0" for p in paths))


def _refuse(tree: _Tree, untracked: set[str]) -> None:
    """Stop at files that must not go into a commit unasked."""
    for path in sorted(untracked):
        size = (tree.top / path).lstat().st_size
        if size > LARGEST_MB * 1e6:
            raise RegistryError(
                f"{path}: the run needs it, git does not track it, and {size / 1e6:.0f} MB are too"
                f" many for a snapshot; `dvc add {path}`"
            )
    ignored = _ignored(tree, untracked)
    if ignored:
        path, rule = next(iter(sorted(ignored.items())))
        more = f" (and {len(ignored) - 1} more)" if len(ignored) > 1 else ""
        raise RegistryError(
            f"{path}{more}: the run needs it and git ignores it ({rule}), so that no snapshot would"
            f" have it; `git add -f {path}`, or `dvc add` it"
        )


def _ignored(tree: _Tree, paths: set[str]) -> dict[str, str]:
    """The rule, as `file:line pattern`, by path of each file that git ignores."""
    names = "".join(f"{path}\0" for path in sorted(paths))
    arguments = ("check-ignore", "-z", "--stdin", "--verbose")
    fields = tree.git(*arguments, text=names, accept=(0, 1)).split("\0")  # 1: none is ignored
    rows = zip(fields[0::4], fields[1::4], fields[2::4], fields[3::4], strict=False)
    # A pattern with `!` takes a file out again.
    return {p: f"{file}:{line} {rule}" for file, line, rule, p in rows if rule[:1] not in ("", "!")}


def _check_bytes(tree: _Tree, needed: set[str]) -> None:
    """Stop at files that a check-out would not give back: clean filters may lose something.

    In text CRLF counts as LF, as in keys; git may be told to turn one into the other.
    """
    listed = tree.git("ls-files", "-s", "-z").split("\0")
    for entry in listed:
        head, _, path = entry.partition("\t")
        if path not in needed or not head.startswith("100"):
            continue
        oid, content = head.split()[1], (tree.top / path).read_bytes()
        if _blob_oid(content, len(oid)) == oid:
            continue
        given = tree.checked_out(oid, path)
        if b"\0" not in content:
            content, given = (data.replace(b"\r\n", b"\n") for data in (content, given))
        if given != content:
            raise RegistryError(
                f"{path}: the run needs it, and a filter in .gitattributes stores it so that git"
                " would not give the same back; take it out of the filter, or `dvc add` it"
            )


def _blob_oid(content: bytes, digits: int) -> str:
    """The name that git gives these bytes; its repositories have sha1 or sha256."""
    digest = hashlib.new("sha1" if digits == 40 else "sha256", usedforsecurity=False)
    digest.update(b"blob %d\0" % len(content) + content)
    return digest.hexdigest()


def _commit(tree: _Tree, parent: str | None) -> str:
    oid = tree.git("write-tree")
    if parent and tree.git("rev-parse", f"{parent}^{{tree}}") == oid:
        return parent
    parents = ("-p", parent) if parent else ()
    return tree.git("commit-tree", oid, *parents, "-m", _MESSAGE, env=_WHO)
