"""One JSON is split the same way everywhere, with every class on both sides."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from runkey.data.prepare import choose_val


def made_up(seed, images=200, classes=12):
    """Images with several classes each, some of them rare, some images empty."""
    rng = random.Random(seed)
    weights = [1 / (1 + rank) ** 1.5 for rank in range(classes)]
    return {
        number: frozenset(rng.choices(range(classes), weights, k=rng.randint(0, 4)))
        for number in rng.sample(range(10_000), images)
    }


@pytest.mark.parametrize("seed", range(20))
def test_every_class_of_two_images_is_in_both(seed):
    data = made_up(seed)
    val = choose_val(data, 0.2, seed)
    total = Counter(label for labels in data.values() for label in labels)
    held = Counter(label for number in val for label in data[number])

    for label, count in total.items():
        assert (0 < held[label] < count) if count > 1 else held[label] == 0
        assert abs(held[label] - 0.2 * count) <= max(3, 0.1 * count)
    assert abs(len(val) - 40) <= 4


@pytest.mark.parametrize("seed", range(5))
def test_many_rare_classes(seed):
    """Forty classes of two or three images each, two classes an image."""
    rng = random.Random(seed)
    data = {number: frozenset(rng.sample(range(40), 2)) for number in range(60)}
    val = choose_val(data, 0.2, seed)
    total = Counter(label for labels in data.values() for label in labels)
    held = Counter(label for number in val for label in data[number])

    missing = [label for label, count in total.items() if count > 1 and not 0 < held[label] < count]
    assert missing == []


def test_order_does_not_matter_and_the_seed_does():
    data = made_up(1)
    shuffled = dict(random.Random(2).sample(sorted(data.items()), len(data)))

    assert choose_val(data, 0.2, 7) == choose_val(shuffled, 0.2, 7)
    assert choose_val(data, 0.2, 7) != choose_val(data, 0.2, 8)


def test_it_is_the_same_on_every_machine():
    data = {number: frozenset({number % 3}) for number in range(20)}

    assert sorted(choose_val(data, 0.25, 0)) == [4, 7, 14, 17, 18]


def test_images_without_objects_are_shared_out_too():
    data = {number: frozenset() for number in range(100)}

    assert len(choose_val(data, 0.3, 0)) == 30


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_images_are_one_each(fraction):
    assert len(choose_val({1: frozenset({0}), 2: frozenset({0})}, fraction, 0)) == 1


def test_a_class_that_cannot_be_in_both_is_trained_on():
    """Three classes of two images each, over three images: one of them must stay whole."""
    data = {1: frozenset({0, 1}), 2: frozenset({1, 2}), 3: frozenset({2, 0})}
    for seed in range(10):
        val = choose_val(data, 0.34, seed)
        trained = frozenset().union(*(data[number] for number in data if number not in val))
        assert trained == {0, 1, 2}
        assert val
