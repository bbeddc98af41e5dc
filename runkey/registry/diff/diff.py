"""What differs between two runs, or between a run and the tree as it stands, and how.

    diff = compare(run_side(library, "rk2-1d0c", root), tree_side(root), root)

First the four parts of the key, by their hashes; then each part that differs, by what it hashes;
then what the runs gave (metrics) and what they were run with (witness).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runkey.identity.key import PARTS
from runkey.registry.diff.diff_code import CodeDiff, compare_code
from runkey.registry.diff.diff_data import FilesDiff, ImagesDiff, compare_files, compare_images
from runkey.registry.diff.diff_sides import Side
from runkey.registry.diff.pairs import Pair, differing
from runkey.registry.dvc_cache import DvcCache


@dataclass(frozen=True, kw_only=True)
class Diff:
    """The comparison of A and B.  Every `Pair` is of values that differ."""

    same_key: bool
    parts: dict[str, Pair]
    """Every part with its two hashes, the same ones too."""
    commands: list[Pair]
    """Of the stages, by name."""
    params: list[Pair]
    code: CodeDiff
    excluded: list[Pair]
    """Files and folders that the code part leaves out on one side only: True where it does."""
    data: list[Pair]
    """md5 by name of the data."""
    images: ImagesDiff | None
    """None if either side's images are not known."""
    files: FilesDiff | None
    """Of the data folder; where images are not known and DVC's cache has both folders' lists."""
    packages: list[Pair]
    """Locked packages, as `version build`; of one version and build, with their hashes."""
    metrics: list[Pair]
    witness: list[Pair]
    installed: list[Pair]
    """Versions of what was really installed, where both runs say."""
    artifacts: list[Pair]
    """sha256 by path of kept files; only of runs of one key."""
    equal_metrics: int
    equal_artifacts: int


def compare(a: Side, b: Side, root: Path) -> Diff:
    """What differs from A to B.

    Args:
        a: the one side.
        b: the other.
        root: the checkout whose DVC cache may have the data.
    """
    known = a.recipe is not None and b.recipe is not None
    kept_a, kept_b = (_kept(side) if a.key == b.key else {} for side in (a, b))
    metrics_a, metrics_b = (s.record.run.metrics if s.record else {} for s in (a, b))
    on_both = a.record is not None and b.record is not None
    data_a, data_b = a.preimage("data"), b.preimage("data")
    images = compare_images(a.images, b.images) if a.images and b.images else None
    code_a, code_b = (side.preimage("code") for side in (a, b))
    return Diff(
        same_key=a.key == b.key,
        parts={part: Pair(part, a.parts.get(part), b.parts.get(part)) for part in PARTS},
        commands=_commands(a, b) if known else [],
        params=differing(a.params, b.params) if known else _as_texts(a.params, b.params),
        code=compare_code(code_a, code_b, a.code, b.code) if known else CodeDiff([], "", [], []),
        excluded=_excluded(a, b) if known else [],
        data=differing(data_a, data_b) if known else [],
        images=images,
        files=_data_files(data_a, data_b, root) if known and images is None else None,
        packages=_packages(a, b) if known else [],
        metrics=differing(metrics_a, metrics_b) if on_both else [],
        witness=differing(_witness(a), _witness(b)) if on_both else [],
        installed=differing(a.packages, b.packages) if a.packages and b.packages else [],
        artifacts=differing(kept_a, kept_b),
        equal_metrics=_equal(metrics_a, metrics_b),
        equal_artifacts=_equal(kept_a, kept_b),
    )


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> int:
    return sum(1 for name in a.keys() & b.keys() if a[name] == b[name])


def _as_texts(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Pair]:
    """The names on both sides whose values differ as text, which is all that MLflow has."""
    both = a.keys() & b.keys()
    return differing({n: str(a[n]) for n in both}, {n: str(b[n]) for n in both})


def _commands(a: Side, b: Side) -> list[Pair]:
    assert a.recipe
    assert b.recipe
    return differing(a.recipe.cmd, b.recipe.cmd)


def _excluded(a: Side, b: Side) -> list[Pair]:
    listed = [dict.fromkeys(side.preimage("code")["excluded"], True) for side in (a, b)]
    return differing(*listed)


def _data_files(a: Mapping[str, str], b: Mapping[str, str], root: Path) -> FilesDiff | None:
    """By the lists of files that DVC's cache has of both data folders."""
    changed = differing(a, b)
    if not changed:
        return None
    cache = DvcCache(root)
    sides: list[dict[str, str]] = []
    for names in (a, b):
        files: dict[str, str] = {}
        for pair in changed:
            md5 = names.get(pair.name, "").removeprefix("md5:")
            listed = cache.files({pair.name: md5}) if md5 else {}
            if md5 and len(listed) < 2:  # the folder itself alone: its list is not there
                return None
            files |= {path: one for path, one in listed.items() if not path.endswith("/")}
        sides.append(files)
    return compare_files(*sides)


def _packages(a: Side, b: Side) -> list[Pair]:
    environments = [side.preimage("environment") for side in (a, b)]
    rows = [_rows(environment["packages"]) for environment in environments]
    pairs = []
    for pair in differing(*rows):
        old, new = (" + ".join(r[0] for r in side) if side else None for side in (pair.a, pair.b))
        if old == new:  # one version and build, two files
            old, new = (" + ".join(r[1] for r in side) for side in (pair.a, pair.b))
        pairs.append(Pair(pair.name, old, new))
    platforms = [{"(platform)": environment["platform"]} for environment in environments]
    return differing(*platforms) + pairs


def _rows(packages: list[list[str]]) -> dict[str, list[tuple[str, str]]]:
    """(version and build, hash) of each package of a name; a name may be locked twice."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for name, version, build, digest in packages:
        rows.setdefault(name, []).append((f"{version} {build}".strip(), digest))
    return rows


def _witness(side: Side) -> dict[str, Any]:
    """What a run was really run with, in one flat list."""
    assert side.record
    details, tags = side.record.details, side.record.run.tags
    if details is None:
        return {name: tags[name] for name in ("device", "micro_batch", "host") if name in tags}
    return {**details.witness, "host": details.host, "snapshot": details.snapshot}


def _kept(side: Side) -> dict[str, str]:
    details = side.record.details if side.record else None
    return {path: file.sha256 for path, file in details.files.items()} if details else {}
