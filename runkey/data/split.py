"""Split the images of one JSON: val, then test, the rest is train; related images stay together.

Iterative stratification for multi-label data (Sechidis, Tsoumakas, Vlahavas 2011). Hashes of seed
and name replace random numbers, so neither the order nor the ids of a JSON matter.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from unicodedata import normalize

from runkey.data.index import SplitName
from runkey.errors import DataError
from runkey.units import counted

_LISTED = 3
_LONGEST = 40


@dataclass(frozen=True, slots=True)
class Group:
    """Images that stay together: one image, or all that `data.group_by` gives one name."""

    name: str
    images: tuple[str, ...]
    """File names."""
    classes: Counter[int]
    """Number of its images that show each class."""
    is_named: bool
    """True if `data.group_by` has given the name."""


@dataclass(frozen=True, slots=True)
class ImageSplit:
    """The split of the images of one JSON."""

    split_of: dict[str, SplitName]
    """Split of each file name."""
    notes: list[str] = field(default_factory=list)
    """What `data.group_by` found, one line each."""


def split_images(
    classes_of: Mapping[str, Collection[int]],
    fractions: Mapping[SplitName, float],
    seed: int,
    group_by: str | None = None,
) -> ImageSplit:
    """Choose val and test by file name, with every class in all splits.

    The images of val do not depend on the fraction of test. A class of as many images as there are
    splits is in each of them, unless other classes of the same few images prevent it; then, and if
    it has fewer, train has it before val, and val before test.

    Args:
        classes_of: classes of each file name, none for an image without objects.
        fractions: of val and test, in this order; without those that are 0.
        seed: of the hashes.
        group_by: regular expression with one group, searched in the file names.

    Raises:
        DataError: there are fewer groups than splits, or `group_by` matches no name.
    """
    groups = _groups(classes_of, group_by)
    if len(groups) <= len(fractions):
        raise DataError(
            f"params.yaml: data.group_by = {group_by!r}: makes {counted(len(groups), 'group')} of"
            f" images for {len(fractions) + 1} splits; use a pattern that makes smaller groups"
        )
    groups.sort(key=lambda g: hashlib.sha256(f"{seed}:{g.name}".encode()).digest())
    result: dict[str, SplitName] = dict.fromkeys(classes_of, "train")
    notes = _describe(groups, group_by)
    total, rest = len(classes_of), groups
    for place, (split, fraction) in enumerate(fractions.items()):
        left = sum(len(group.images) for group in rest)
        chosen = _Stratification(rest, fraction * total / left, len(fractions) - place)
        held = chosen.choose()
        for group in held.values():
            result |= dict.fromkeys(group.images, split)
        if group_by:
            notes += _note_sizes(split, chosen, held.values(), total)
        rest = [group for group in rest if group.name not in held]
    return ImageSplit(result, notes)


def _groups(classes_of: Mapping[str, Collection[int]], group_by: str | None) -> list[Group]:
    """Group the file names; a name that `group_by` does not match is a group of its own."""
    named: defaultdict[str, list[str]] = defaultdict(list)
    alone: list[str] = []
    for name in sorted(classes_of):
        group = _group_of(name, group_by) if group_by else None
        if group is not None:
            named[group].append(name)
        else:
            alone.append(name)
    if group_by and not named:
        raise DataError(
            f"params.yaml: data.group_by = {group_by!r}: matches no file name, such as"
            f" {_short(min(classes_of))}; mend the pattern, or set it to null"
        )
    # The first character keeps a group from having the name of an image.
    groups = [_group(f"/{name}", images, classes_of, True) for name, images in named.items()]
    return groups + [_group(name, [name], classes_of, False) for name in alone]


def _group_of(name: str, group_by: str) -> str | None:
    """Return what the pattern finds in a name; composed accents and separate ones are equal."""
    found = re.search(normalize("NFC", group_by), normalize("NFC", name))
    return found[1] if found else None


def _group(
    name: str, images: list[str], classes_of: Mapping[str, Collection[int]], is_named: bool
) -> Group:
    classes = Counter(label for image in images for label in set(classes_of[image]))
    return Group(name, tuple(images), classes, is_named)


def shared_groups(names_of: Mapping[SplitName, Iterable[str]], group_by: str) -> list[str]:
    """Return the groups that more than one of the given splits has, sorted."""
    seen: defaultdict[str, set[SplitName]] = defaultdict(set)
    for split, names in names_of.items():
        for name in names:
            if (group := _group_of(name, group_by)) is not None:
                seen[group].add(split)
    return sorted(name for name, splits in seen.items() if len(splits) > 1)


def list_groups(names: list[str]) -> str:
    """Return some names of groups for a message."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(_short, names[:_LISTED])) + more


def _short(name: str) -> str:
    return ascii(name if len(name) <= _LONGEST else name[:_LONGEST] + "...")


def _describe(groups: list[Group], group_by: str | None) -> list[str]:
    if not group_by:
        return []
    named = [group for group in groups if group.is_named]
    alone = len(groups) - len(named)
    text = f"data.group_by: {counted(len(named), 'group')} of images stay together"
    return [text + (f"; {counted(alone, 'image')} without a match, each by itself" * (alone > 0))]


def _note_sizes(
    split: SplitName, chosen: _Stratification, held: Iterable[Group], total: int
) -> list[str]:
    """Name the groups that are too large for a split, and its size if it is not the wanted one."""
    notes = []
    if large := [g for g in chosen.order if len(g.images) > chosen.largest]:
        large.sort(key=lambda group: (-len(group.images), group.name))
        named = [f"{g.name.removeprefix('/')} ({counted(len(g.images), 'image')})" for g in large]
        notes.append(
            f"data.group_by: too large for {split}, which gets {chosen.wanted} of {total} images:"
            f" {list_groups(named)}"
        )
    images = sum(len(group.images) for group in held)
    if images != chosen.wanted:
        notes.append(
            f"data.group_by: {split} has {images} of {total} images, not {chosen.wanted}, as groups"
            " stay together"
        )
    return notes


class _Stratification:
    """The growing split. All randomness is in `order`; all counts are of images."""

    def __init__(self, order: list[Group], fraction: float, leave: int) -> None:
        """Args: order: the groups; fraction: of their images; leave: groups that stay at least."""
        self.order, self.fraction = order, fraction
        images = sum(len(group.images) for group in order)
        self.wanted = min(max(1, round(fraction * images)), images - leave)
        self.largest = max(self.wanted, min(len(group.images) for group in order))
        """Images of the largest group that may be chosen."""
        self.most_groups = len(order) - leave
        self.size = 0
        self.chosen: dict[str, Group] = {}
        self.placed: set[str] = set()
        self.held: Counter[int] = Counter()
        """Chosen images of each class."""
        self.total: Counter[int] = Counter()
        self.members: dict[int, list[Group]] = defaultdict(list)
        """Groups with each class, in `order`."""
        for group in order:
            self.total.update(group.classes)
            for label in group.classes:
                self.members[label].append(group)

    def choose(self) -> dict[str, Group]:
        """Choose groups, at least one; return them by name."""
        for label in sorted(self.members, key=lambda label: (len(self.members[label]), label)):
            self.assign(label)
        self.assign_empty()
        for label in sorted(self.members):
            self.repair(label)
        self.balance(keep_shares=True)
        if any(len(group.images) > 1 for group in self.order):
            self.balance(keep_shares=False)  # the shares of groups are coarse
        if not self.chosen:
            fits = [group for group in self.order if len(group.images) <= self.largest]
            self.put(fits[0], True)
        return self.chosen

    def put(self, group: Group, choose: bool) -> None:
        self.placed.add(group.name)
        if choose and group.name not in self.chosen and self._has_room(group):
            self.chosen[group.name] = group
            self.size += len(group.images)
            self.held.update(group.classes)
        elif not choose and group.name in self.chosen:
            del self.chosen[group.name]
            self.size -= len(group.images)
            self.held.subtract(group.classes)

    def _has_room(self, group: Group) -> bool:
        return len(group.images) <= self.largest and len(self.chosen) < self.most_groups

    def assign(self, label: int) -> None:
        """Assign the groups of a class that no rarer class has assigned."""
        count = self.total[label]
        quota = min(max(1, round(self.fraction * count)), count - 1)
        if len(self.members[label]) == 1:
            quota = 0
        for group in self.members[label]:
            if group.name not in self.placed:
                # Choosing it brings the count nearer to the quota.
                self.put(group, 2 * self.held[label] + group.classes[label] < 2 * quota)

    def assign_empty(self) -> None:
        """Fill up with groups without objects."""
        for group in self.order:
            if not group.classes:
                self.put(group, len(group.images) < 2 * (self.wanted - self.size))

    def repair(self, label: int) -> None:
        """Move a group of a class that is in one split only, if other classes allow it."""
        held, count = self.held[label], self.total[label]
        if len(self.members[label]) < 2 or 0 < held < count:
            return
        for group in self.members[label]:
            to_held = held == 0
            if (not to_held or self._has_room(group)) and self._keeps_classes(group, to_held):
                self.put(group, to_held)
                return
        if held:  # a class that is never evaluated is better than one that is never trained
            self.put(self.members[label][0], False)

    def balance(self, *, keep_shares: bool) -> None:
        """Move groups until the size is as wanted, as long as every class stays in both splits."""
        for group in self.order:
            missing = self.wanted - self.size
            to_held = missing > 0
            if (
                len(group.images) < 2 * abs(missing)
                and (group.name in self.chosen) != to_held
                and (not to_held or self._has_room(group))
                and self._keeps_classes(group, to_held)
                and (not keep_shares or self._keeps_shares(group, to_held))
            ):
                self.put(group, to_held)

    def _keeps_classes(self, group: Group, to_held: bool) -> bool:
        """Return True if each class stays in both splits after a move."""
        sign = 1 if to_held else -1
        after = {n: self.held[n] + sign * count for n, count in group.classes.items()}
        if to_held:
            return all(number < self.total[label] for label, number in after.items())
        return all(number >= 1 for number in after.values())

    def _keeps_shares(self, group: Group, to_held: bool) -> bool:
        """Return True if a move brings no class further from its share."""
        gaps = [self.held[label] - self.fraction * self.total[label] for label in group.classes]
        return all(gap < 0 if to_held else gap > 0 for gap in gaps)
