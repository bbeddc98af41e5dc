"""One JSON is split the same way everywhere, with every class in each split, groups together."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from runkey.data.split import shared_groups, split_images
from runkey.errors import DataError


def made_up(seed, images=200, classes=12):
    """Images with several classes each, some of them rare, some images empty."""
    rng = random.Random(seed)
    weights = [1 / (1 + rank) ** 1.5 for rank in range(classes)]
    return {
        f"{number}.jpg": frozenset(rng.choices(range(classes), weights, k=rng.randint(0, 4)))
        for number in rng.sample(range(10_000), images)
    }


def choose(data, fraction, seed, **more):
    """The names in val."""
    found = split_images(data, {"val": fraction}, seed, **more).split_of
    return {name for name, split in found.items() if split == "val"}


@pytest.mark.parametrize("seed", range(20))
def test_every_class_of_two_images_is_in_both(seed):
    data = made_up(seed)
    val = choose(data, 0.2, seed)
    total = Counter(label for labels in data.values() for label in labels)
    held = Counter(label for number in val for label in data[number])

    for label, count in total.items():
        assert (0 < held[label] < count) if count > 1 else held[label] == 0
        assert abs(held[label] - 0.2 * count) <= max(3, 0.1 * count)
    assert abs(len(val) - 40) <= 4


@pytest.mark.parametrize("seed", range(20))
def test_every_class_of_three_images_is_in_all_three(seed):
    data = made_up(seed)
    found = split_images(data, {"val": 0.2, "test": 0.15}, seed).split_of
    of_class = {label: Counter() for label in range(12)}
    for name, labels in data.items():
        for label in labels:
            of_class[label][found[name]] += 1

    for counts in of_class.values():
        if counts.total() > 2:
            assert set(counts) == {"train", "val", "test"}
        for split, share in (("val", 0.2), ("test", 0.15)):
            assert abs(counts[split] - share * counts.total()) <= max(3, 0.1 * counts.total())
    sizes = Counter(found.values())
    assert abs(sizes["val"] - 40) <= 4
    assert abs(sizes["test"] - 30) <= 4


def test_a_test_split_takes_nothing_from_val():
    data = made_up(3)
    found = split_images(data, {"val": 0.2, "test": 0.3}, 5).split_of
    assert {name for name, split in found.items() if split == "val"} == choose(data, 0.2, 5)


@pytest.mark.parametrize("seed", range(5))
def test_many_rare_classes(seed):
    """Forty classes of two or three images each, two classes an image."""
    rng = random.Random(seed)
    data = {str(number): frozenset(rng.sample(range(40), 2)) for number in range(60)}
    val = choose(data, 0.2, seed)
    total = Counter(label for labels in data.values() for label in labels)
    held = Counter(label for number in val for label in data[number])

    missing = [label for label, count in total.items() if count > 1 and not 0 < held[label] < count]
    assert missing == []


def test_order_does_not_matter_and_the_seed_does():
    data = made_up(1)
    shuffled = dict(random.Random(2).sample(sorted(data.items()), len(data)))

    assert choose(data, 0.2, 7) == choose(shuffled, 0.2, 7)
    assert choose(data, 0.2, 7) != choose(data, 0.2, 8)


def test_it_is_the_same_on_every_machine():
    data = {str(number): frozenset({number % 3}) for number in range(20)}

    assert sorted(choose(data, 0.25, 0), key=int) == ["4", "7", "14", "17", "18"]


def test_images_without_objects_are_shared_out_too():
    data = {str(number): frozenset() for number in range(100)}

    assert len(choose(data, 0.3, 0)) == 30


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_images_are_one_each(fraction):
    assert len(choose({"a": frozenset({0}), "b": frozenset({0})}, fraction, 0)) == 1


@pytest.mark.parametrize("fractions", [(0.01, 0.01), (0.5, 0.49), (0.9, 0.05)])
def test_three_images_are_one_each(fractions):
    parts = dict(zip(("val", "test"), fractions, strict=True))
    found = split_images({"a": {0}, "b": {0}, "c": {0}}, parts, 0).split_of
    assert sorted(found.values()) == ["test", "train", "val"]


def test_a_class_that_cannot_be_in_both_is_trained_on():
    """Three classes of two images each, over three images: one of them must stay whole."""
    data = {"1": frozenset({0, 1}), "2": frozenset({1, 2}), "3": frozenset({2, 0})}
    for seed in range(10):
        val = choose(data, 0.34, seed)
        trained = frozenset().union(*(data[number] for number in data if number not in val))
        assert trained == {0, 1, 2}
        assert val


@pytest.mark.parametrize("seed", range(5))
def test_few_images_move_when_others_are_added(seed):
    """Of 200 images with rare classes, 20 more move at most an eighth; a plain share none."""
    data = made_up(seed, images=220)
    fewer = dict(list(data.items())[:200])
    parts = {"val": 0.2, "test": 0.2}
    before, after = (split_images(some, parts, 0).split_of for some in (fewer, data))
    moved = sum(before[name] != after[name] for name in fewer)
    assert moved <= 25


def videos(seed, count=30):
    """Frames of videos of 1 to 12 frames, each with some of six classes; two loose images."""
    rng = random.Random(seed)
    data = {
        f"video{number}_{frame:03d}.jpg": frozenset(rng.sample(range(6), 2))
        for number in range(count)
        for frame in range(rng.randint(1, 12))
    }
    return data | {"loose.jpg": frozenset({0}), "other.jpg": frozenset()}


@pytest.mark.parametrize("seed", range(10))
def test_groups_stay_together(seed):
    data = videos(seed)
    found = split_images(data, {"val": 0.2, "test": 0.2}, seed, r"^(video\d+)_")
    of_video = {}
    for name, split in found.split_of.items():
        of_video.setdefault(name.partition("_")[0], set()).add(split)
    assert all(len(splits) == 1 for splits in of_video.values())
    sizes = Counter(found.split_of.values())
    for split in ("val", "test"):
        assert abs(sizes[split] - 0.2 * len(data)) <= 6
        assert {
            label for name in data if found.split_of[name] == split for label in data[name]
        } == {*range(6)}
    assert found.notes[0] == (
        "data.group_by: 30 groups of images stay together; 2 images without a match, each by itself"
    )


def test_groups_that_are_too_large_are_named_and_trained_on():
    data = {f"v{n}_{i}": {0} for n, size in enumerate((60, 5, 50, 5, 5)) for i in range(size)}
    found = split_images(data, {"val": 0.1}, 0, r"(v\d)_")
    assert {found.split_of[f"{video}_0"] for video in ("v0", "v2")} == {"train"}
    assert found.notes == [
        "data.group_by: 5 groups of images stay together",
        "data.group_by: too large for val, which gets 12 of 125 images: 'v0 (60 images)',"
        " 'v2 (50 images)'",
        "data.group_by: val has 10 of 125 images, not 12, as groups stay together",
    ]


def test_the_smallest_group_is_taken_if_all_are_too_large():
    data = {f"v{n}_{i}": {0} for n, size in enumerate((60, 40, 50)) for i in range(size)}
    found = split_images(data, {"val": 0.1}, 0, r"(v\d)_")
    assert Counter(found.split_of.values()) == {"val": 40, "train": 110}
    assert found.notes[-1] == (
        "data.group_by: val has 40 of 150 images, not 15, as groups stay together"
    )


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(DataError) as caught:
        split_images({"b.jpg": {0}, "a.jpg": {0}}, {"val": 0.5}, 0, r"(video\d+)_")
    assert str(caught.value) == (
        r"params.yaml: data.group_by = '(video\\d+)_': matches no file name, such as 'a.jpg'; mend"
        " the pattern, or set it to null"
    )


def test_fewer_groups_than_splits_are_refused():
    data = {f"v{n}_{i}": {0} for n in range(2) for i in range(9)}
    with pytest.raises(DataError) as caught:
        split_images(data, {"val": 0.2, "test": 0.2}, 0, r"(v\d)_")
    assert str(caught.value) == (
        r"params.yaml: data.group_by = '(v\\d)_': makes 2 groups of images for 3 splits; use a"
        " pattern that makes smaller groups"
    )


def test_groups_in_two_jsons():
    names = {"train": ["v1_1", "v2_1"], "val": ["v2_2", "x"], "test": ["v3_1", "x"]}
    assert shared_groups(names, r"(v\d)_") == ["v2"]
