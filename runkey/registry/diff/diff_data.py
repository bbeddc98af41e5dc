"""How the data of two runs differ: image by image where their lists are known, else by file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runkey.data.image_list import ImageList


@dataclass(frozen=True)
class ImagesDiff:
    """Files of images, relative to the data folder, by what became of them from A to B."""

    added: list[str]
    removed: list[str]
    relabelled: list[str]
    """Other boxes or other classes."""
    replaced: list[str]
    """Another picture of the same name."""
    moved: list[str]
    """From one split to the other."""
    total_a: int
    total_b: int

    def by_kind(self) -> dict[str, list[str]]:
        """The lists by name."""
        kinds = ("added", "removed", "relabelled", "replaced", "moved")
        return {kind: getattr(self, kind) for kind in kinds}

    @property
    def is_empty(self) -> bool:
        """Whether the images are the same."""
        return not any(self.by_kind().values())


@dataclass(frozen=True)
class FilesDiff:
    """Files of a data folder by what became of them from A to B."""

    added: list[str]
    removed: list[str]
    changed: list[str]

    def by_kind(self) -> dict[str, list[str]]:
        """The lists by name."""
        return {"added": self.added, "removed": self.removed, "changed": self.changed}


def compare_images(a: ImageList, b: ImageList) -> ImagesDiff:
    """What became of each image from A to B; one that is relabelled and replaced is in both."""
    old = {file: (split, one) for split, members in a.items() for file, one in members.items()}
    new = {file: (split, one) for split, members in b.items() for file, one in members.items()}
    both = sorted(old.keys() & new.keys())
    return ImagesDiff(
        added=sorted(new.keys() - old.keys()),
        removed=sorted(old.keys() - new.keys()),
        relabelled=[f for f in both if old[f][1].labels != new[f][1].labels],
        replaced=[f for f in both if old[f][1].content != new[f][1].content],
        moved=[f for f in both if old[f][0] != new[f][0]],
        total_a=len(old),
        total_b=len(new),
    )


def compare_files(a: Mapping[str, str], b: Mapping[str, str]) -> FilesDiff:
    """What became of each file from A to B, by its md5."""
    return FilesDiff(
        added=sorted(b.keys() - a.keys()),
        removed=sorted(a.keys() - b.keys()),
        changed=sorted(path for path in a.keys() & b.keys() if a[path] != b[path]),
    )
