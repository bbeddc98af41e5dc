"""How the code of two runs differs: a git diff of the files that their keys hold.

The files come from the runs' snapshots, or from the working tree.  Of a run without a snapshot only
the hashes are known, and a file stands there without its lines.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from runkey.errors import RegistryError
from runkey.identity.closure import code_rule, hash_code
from runkey.identity.syntax import RULE
from runkey.registry.diff.code_tree import same_code
from runkey.registry.diff.pairs import Pair, differing
from runkey.registry.git import git, git_bytes, has_git

Change = Literal["added", "removed", "changed"]
# The user's own settings for diffs would change what a script reads.
_PLAIN = ("--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--src-prefix=a/")


class Source(Protocol):
    """Where the files of one side are read."""

    def read(self, path: str) -> bytes | None:
        """The bytes of a file; None: not there."""


@dataclass(frozen=True)
class SnapshotSource:
    """The files of a snapshot."""

    root: Path
    oid: str

    def read(self, path: str) -> bytes | None:
        """See `Source`."""
        try:
            # `./`: the repository may lie below the top folder of git.
            return git_bytes(self.root, "cat-file", "blob", f"{self.oid}:./{path}")
        except RegistryError:
            return None


@dataclass(frozen=True)
class TreeSource:
    """The files of a folder."""

    root: Path

    def read(self, path: str) -> bytes | None:
        """See `Source`."""
        file = self.root / path
        return file.read_bytes() if file.is_file() else None


@dataclass(frozen=True)
class FileChange:
    """A file that is not the same on both sides."""

    path: str
    change: Change
    a: str | None
    """Its hash, as the key holds it."""
    b: str | None
    insertions: int | None
    """Lines; None where the file's text is not known."""
    deletions: int | None


@dataclass(frozen=True)
class CodeDiff:
    """The difference of two code parts."""

    files: list[FileChange]
    patch: str
    """Of the files whose text is known."""
    unknown: list[str]
    """Files whose text no snapshot here has."""
    incomparable: list[str]
    """Files that may differ or not: their hashes are made by different rules, and the text of one
    side is not here."""


def compare_code(
    a: Mapping[str, Any], b: Mapping[str, Any], source_a: Source | None, source_b: Source | None
) -> CodeDiff:
    """Compare the code of two keys file by file.

    Where the keys are made by different rules, files on both sides are compared by their text,
    under the newer rule: a comment makes no difference.

    Args:
        a: the code part of the first key.
        b: of the second.
        source_a: where the first one's files are; None: nowhere here.
        source_b: where the second one's are.
    """
    pairs = differing(a["files"], b["files"])
    rules = code_rule(a), code_rule(b)
    texts = {
        pair.name: (
            _text(pair.a, pair, source_a, rules[0]),
            _text(pair.b, pair, source_b, rules[1]),
        )
        for pair in pairs
    }
    incomparable: list[str] = []
    if rules[0] != rules[1]:
        both = [pair.name for pair in pairs if pair.a is not None and pair.b is not None]
        incomparable = [path for path in both if None in texts[path]]
        same = {
            path for path in both if path not in incomparable and _does_same(path, *texts[path])
        }
        pairs = [pair for pair in pairs if pair.name not in {*incomparable, *same}]
        texts = {pair.name: texts[pair.name] for pair in pairs}
    known = {path: (x, y) for path, (x, y) in texts.items() if x is not None and y is not None}
    lines, patch = _git_diff(known, {pair.name: pair for pair in pairs}) if known else ({}, "")
    files = [
        FileChange(pair.name, _change(pair), pair.a, pair.b, *lines.get(pair.name, (None, None)))
        for pair in pairs
    ]
    unknown = [pair.name for pair in pairs if pair.name not in lines]
    return CodeDiff(files, patch, unknown, incomparable)


def _does_same(path: str, a: bytes | None, b: bytes | None) -> bool:
    assert a is not None
    return same_code(path, b, hash_code(path, a), RULE)


def _change(pair: Pair) -> Change:
    if pair.a is None:
        return "added"
    return "removed" if pair.b is None else "changed"


def _text(recorded: str | None, pair: Pair, source: Source | None, rule: str) -> bytes | None:
    """A file's text with LF at line ends, as keys see it; None if it is not the recorded one."""
    if recorded is None:
        return b""
    content = source.read(pair.name) if source else None
    if content is None:
        return None
    content = content.replace(b"\r\n", b"\n")
    return content if same_code(pair.name, content, recorded, rule) else None


def _git_diff(
    texts: Mapping[str, tuple[bytes, bytes]], pairs: Mapping[str, Pair]
) -> tuple[dict[str, tuple[int | None, int | None]], str]:
    """Lines added and removed by path, and the patch, made in a repository for the purpose."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        git(root, "init", "-q", "--template=")
        trees = []
        for side in (0, 1):
            for path, both in texts.items():
                file = root / path
                file.unlink(missing_ok=True)
                if (pairs[path].a, pairs[path].b)[side] is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(both[side])
            git(root, "-c", "core.autocrlf=false", "add", "-A", "-f", ".")
            trees.append(git(root, "write-tree"))
        numbers = git(root, "diff", *_PLAIN, "--numstat", "-z", *trees)
        patch = git_bytes(root, "diff", *_PLAIN, "--dst-prefix=b/", *trees)
    text = patch.decode("utf-8", "replace")
    rows = [row.split("\t", 2) for row in numbers.split("\0") if row]
    return {path: (_number(plus), _number(minus)) for plus, minus, path in rows}, text


def _number(text: str) -> int | None:
    """Lines as git counts them; it gives `-` for a file that is no text."""
    return None if text == "-" else int(text)


def snapshot_source(root: Path, oid: str | None) -> SnapshotSource | None:
    """The source of a snapshot, if the repository of `root` has it."""
    if oid is None or not has_git(root):
        return None
    try:
        git(root, "cat-file", "-e", f"{oid}^{{tree}}")
    except RegistryError:
        return None
    return SnapshotSource(root, oid)
