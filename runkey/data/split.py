"""Split one data set into train and val by image id, with every class in both.

Iterative stratification for multi-label data (Sechidis, Tsoumakas, Vlahavas 2011). Hashes of seed
and image id replace random numbers, so the result does not depend on the order of the JSON.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping


def choose_val(
    classes_of: Mapping[int, frozenset[int]], val_fraction: float, seed: int
) -> frozenset[int]:
    """Choose the validation images.

    A class of two images or more is in both splits, unless other classes of the same few images
    prevent it; then, and if only one image has it, it is in train.

    Args:
        classes_of: image id -> its classes (empty for an image without objects).
        val_fraction: fraction of validation images, 0..1.
        seed: another seed chooses other images.

    Returns:
        Ids of the val images; of two images or more at least one and not all.
    """
    order = sorted(classes_of, key=lambda number: _rank(seed, number))
    split = _Split(classes_of, order, val_fraction)
    for label in sorted(split.total, key=lambda label: (split.total[label], label)):
        split.assign(label)
    split.assign_empty()
    for label in sorted(split.total):
        split.repair(label)
    split.balance()
    return frozenset(split.val)


class _Split:
    """The growing splits. All randomness is in `order`."""

    def __init__(
        self, classes_of: Mapping[int, frozenset[int]], order: list[int], fraction: float
    ) -> None:
        self.classes_of = classes_of
        self.order = order
        self.fraction = fraction
        self.total = Counter(label for labels in classes_of.values() for label in labels)
        self.val: set[int] = set()
        self.train: set[int] = set()
        self.held: Counter[int] = Counter()
        """Images of each class in val."""
        self.members: dict[int, list[int]] = {label: [] for label in self.total}
        """Images of each class, in `order`."""
        for number in order:
            for label in classes_of[number]:
                self.members[label].append(number)
        self.wanted = min(max(1, round(fraction * len(order))), len(order) - 1)

    def put(self, number: int, in_val: bool) -> None:
        if in_val and number not in self.val:
            self.held.update(self.classes_of[number])
        elif not in_val and number in self.val:
            self.held.subtract(self.classes_of[number])
        (self.val if in_val else self.train).add(number)
        (self.train if in_val else self.val).discard(number)

    def assign(self, label: int) -> None:
        """Assign the images of a class that no rarer class has assigned."""
        count = self.total[label]
        quota = min(max(1, round(self.fraction * count)), count - 1)
        for number in self.members[label]:
            if number not in self.val and number not in self.train:
                self.put(number, self.held[label] < quota)

    def assign_empty(self) -> None:
        """Fill val up to its size with images without objects."""
        for number in self.order:
            if not self.classes_of[number]:
                self.put(number, len(self.val) < self.wanted)

    def repair(self, label: int) -> None:
        """Move an image of a class that is in one split only, if other classes allow it."""
        held = self.held[label]
        if self.total[label] < 2 or 0 < held < self.total[label]:
            return
        for number in self.members[label]:
            to_val = held == 0
            if self._allowed(number, to_val, slack=False):
                self.put(number, to_val)
                return
        if held:  # a class that is never evaluated is better than one that is never trained
            self.put(self.members[label][0], in_val=False)

    def balance(self) -> None:
        """Move images until val has its size, as long as every class keeps its share."""
        for number in self.order:
            if len(self.val) == self.wanted:
                return
            to_val = len(self.val) < self.wanted
            if (number in self.val) != to_val and self._allowed(number, to_val, slack=True):
                self.put(number, to_val)

    def _allowed(self, number: int, to_val: bool, slack: bool) -> bool:
        """True if a move keeps each class in both splits (slack: and its share about right)."""
        for label in self.classes_of[number]:
            share = self.fraction * self.total[label]
            after = self.held[label] + (1 if to_val else -1)
            least, most = (math.floor(share), math.ceil(share)) if slack else (0, math.inf)
            stays = self.total[label] - after >= 1 if to_val else after >= 1
            if not stays or not (after <= most if to_val else after >= least):
                return False
        return True


def _rank(seed: int, number: int) -> bytes:
    return hashlib.sha256(f"{seed}:{number}".encode()).digest()
