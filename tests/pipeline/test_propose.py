"""`runkey preset auto`: what it proposes follows from data, machine and measured speed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runkey.errors import DataError
from runkey.params import Params, load_params, override
from runkey.params.load import parse_params, parse_yaml
from runkey.params.render import preset_files
from runkey.pipeline.propose import Proposal, propose
from runkey.pipeline.survey import DataFacts, Machine, Speed, survey_data
from tests.support.command_line import Run, root, run

__all__ = ["root", "run"]

SIZE = (640, 480)
PHOTOS = preset_files().get("photos", Path("photos.yaml"))
pytestmark = pytest.mark.skipif(not PHOTOS.is_file(), reason="there is no preset photos yet")


def write_data(
    root: Path,
    *,
    train: int = 160,
    val: int = 40,
    side: float = 200,
    classes: tuple[str, ...] = ("cat",),
) -> None:
    """Write annotations without images: one object of `side` pixels in each, classes in turn."""
    folder = root / "data/annotations"
    folder.mkdir(parents=True, exist_ok=True)
    categories = [{"id": n + 1, "name": name} for n, name in enumerate(classes)]
    for split, count in (("train", train), ("val", val)):
        if not count:
            continue
        images = [
            {"id": n, "file_name": f"{n}.jpg", "width": SIZE[0], "height": SIZE[1]}
            for n in range(count)
        ]
        boxes = [
            {
                "id": n,
                "image_id": n,
                "category_id": n % len(classes) + 1,
                "bbox": [0, 0, side, side],
            }
            for n in range(count)
        ]
        text = {"images": images, "annotations": boxes, "categories": categories}
        name = f"instances_{split}.json" if val else "instances.json"
        (folder / name).write_text(json.dumps(text))


def machine_of(rate: float, many: float = 1.0) -> Callable[[Params, DataFacts], Speed]:
    """A machine of `rate` images/s at the preset's size, slower by the pixels of larger images.

    `many` is the gain of more threads.
    """
    base = load_params(PHOTOS).data.long_side

    def measure(params: Params, _: DataFacts) -> Speed:
        threads = params.training.cpu_threads
        assert isinstance(threads, int)
        gain = many if threads > 1 else 1.0
        return Speed(rate * gain * (base / params.data.long_side) ** 2, threads, 2**30)

    return measure


MACHINE = Machine("", cores=4, memory_bytes=2**33, busy_cores=0.2, disk_bytes=2**35)


def proposed(
    root: Path, minutes: float = 10, rate: float = 12, many: float = 1.0, machine: Machine = MACHINE
) -> Proposal:
    now = load_params(root / "params.yaml")
    return propose(survey_data(root, now), machine, now, minutes, machine_of(rate, many))


def test_the_same_data_and_speed_give_the_same_parameters(root: Path) -> None:
    write_data(root)
    first, second = proposed(root), proposed(root)
    assert first == second
    assert first.preset == "photos"
    assert {subject for subject, _ in first.reasons} >= {
        "data", "machine", "preset", "model.num_queries", "data.long_side", "training.epochs",
    }  # fmt: skip
    assert all(reason for _, reason in first.reasons)


def test_epochs_follow_from_time_and_speed(root: Path) -> None:
    write_data(root)
    epochs = [proposed(root, minutes).params.training.epochs for minutes in (5, 10, 20)]
    # 10 minutes: (600 - 10 s of start - 10 evaluations of 40 images at 0.4) x 12 x 0.9 / 160.
    assert epochs[1] == int((590 - 10 * 40 * 0.4 / 12) * 12 * 0.9 / 160)
    assert 1.8 < epochs[1] / epochs[0] < 2.2
    assert proposed(root, 600).params.training.epochs == 100
    few = proposed(root, 1, rate=2)
    assert few.params.training.epochs < 12
    assert any(one.endswith("gives 12") for one in few.warnings)
    for one in (few, proposed(root, 0.5, rate=0.1)):
        assert one.params.training.evaluate_every <= one.params.training.epochs
        assert one.params.data.augment.plain_epochs <= one.params.training.epochs


def test_small_objects_get_larger_images_as_far_as_the_time_allows(root: Path) -> None:
    base = load_params(PHOTOS).data
    sizes = []
    for side in (200.0, 12.0, 4.0):
        write_data(root, side=side)
        sizes.append(proposed(root, 60))
    large, small, tiny = (one.params.data for one in sizes)
    assert (large.long_side, large.short_sides) == (base.long_side, base.short_sides)
    assert small.long_side > base.long_side
    assert max(small.short_sides) > max(base.short_sides)
    strides = [one.params.model.feature_strides for one in sizes]
    assert strides == [load_params(PHOTOS).model.feature_strides, (8,), (8,)]
    assert tiny.long_side == SIZE[0]  # the originals hold no more
    assert not sizes[1].warnings or "1 object in 10" not in sizes[1].warnings[0]
    assert "1 object in 10 is under" in sizes[2].warnings[0]
    assert "the images are no larger" in sizes[2].warnings[0]
    write_data(root, side=12.0)
    hasty = proposed(root, 3)
    assert hasty.params.data.long_side < small.long_side
    assert "more minutes allow larger images" in hasty.warnings[0]
    write_data(root, side=200.0)  # large objects allow smaller images than the preset's
    hasty = proposed(root, 3, rate=6)
    assert 192 <= hasty.params.data.long_side < base.long_side
    assert f"{base.long_side} leaves less than 12 epochs" in dict(hasty.reasons)["data.long_side"]


def test_queries_hold_the_fullest_image(root: Path) -> None:
    write_data(root)
    file = root / "data/annotations/instances_train.json"
    coco = json.loads(file.read_text())
    for number in range(70):
        coco["annotations"].append(
            {"id": 1000 + number, "image_id": 3, "category_id": 1, "bbox": [number, 0, 90, 90]}
        )
    file.write_text(json.dumps(coco))
    model = proposed(root).params.model
    assert model.num_queries == 90  # 71 x 1.25
    assert model.denoising.groups == 1


def write_cells(root: Path, *, images: int = 100, per_image: int = 12, spread: float = 0.1) -> None:
    """Write images that are full of objects, whose log sizes lie `spread` around one size."""
    write_data(root, train=images)
    file = root / "data/annotations/instances_train.json"
    coco = json.loads(file.read_text())
    coco["annotations"] = [
        {"id": n, "image_id": n % images, "category_id": 1, "bbox": [0, 0, side, side]}
        for n in range(images * per_image)
        for side in (90 * math.exp(spread * (-1) ** n),)
    ]
    file.write_text(json.dumps(coco))


def test_many_small_objects_of_one_size_are_learnt_from_random_weights(root: Path) -> None:
    write_cells(root)
    found = proposed(root)
    assert (found.preset, found.params.model.backbone) == ("blood-cells", "compact")
    assert found.params.model.backbone_weights == "none"
    why = "blood-cells: 1,200 objects, 12 in an image, whose sizes spread by only 10% within"
    assert dict(found.reasons)["preset"].startswith(why)
    assert found.params.model.initial_box == 0.16  # 90 / sqrt(640 x 480)
    assert found.params.data.long_side == load_params(preset_files()["blood-cells"]).data.long_side
    for others in (
        {"spread": 0.4},  # perspective, or several magnifications
        {"images": 50},
        {"images": 400, "per_image": 3},
    ):
        write_cells(root, **others)
        assert proposed(root).preset == "photos"


def test_boxes_start_at_the_size_of_the_objects(root: Path) -> None:
    for side, start in ((200, 0.36), (4, 0.02), (470, 0.85)):  # of sqrt(640 x 480)
        write_data(root, side=side)
        assert proposed(root).params.model.initial_box == start


def test_images_that_are_held_out_are_not_trained_on(root: Path) -> None:
    write_data(root, train=200, val=0)
    epochs = []
    for fraction in (0.0, 0.4):
        now = override(load_params(root / "params.yaml"), {"data.test_fraction": fraction})
        found = propose(survey_data(root, now), MACHINE, now, 10, machine_of(12))
        epochs.append(found.params.training.epochs)
    assert epochs[1] / epochs[0] == pytest.approx(0.8 / 0.4, rel=0.05)


@pytest.mark.parametrize(
    ("classes", "flips"),
    [
        (("cat", "dog"), True),
        (("7", "8"), False),
        (("seven", "cat"), False),
        (("left_hand", "cat"), False),
        (("bright light", "cleft"), True),
    ],
)
def test_classes_that_a_mirror_changes_are_not_flipped(
    root: Path, classes: tuple[str, ...], flips: bool
) -> None:
    write_data(root, classes=classes)
    assert bool(proposed(root).params.data.augment.flip_probability) == flips


def test_threads_are_taken_if_they_gain(root: Path) -> None:
    write_data(root)
    for gain, threads in ((1.1, 1), (1.6, 4)):
        assert proposed(root, many=gain).params.training.cpu_threads == threads
    busy = replace(MACHINE, busy_cores=3.0)  # a measurement would say nothing
    assert proposed(root, many=1.6, machine=busy).params.training.cpu_threads == 1


def test_decoded_images_are_kept_where_they_fit(root: Path) -> None:
    assert (
        load_params(PHOTOS).data.cache_gib == proposed(root_with(root, 160)).params.data.cache_gib
    )
    data = load_params(PHOTOS).data
    pixels = 1.35 * max(data.short_sides) * 1.35 * data.long_side
    needed = math.ceil(5_000 * 3 * pixels / 2**30)
    assert proposed(root_with(root, 5_000), 600).params.data.cache_gib == needed > data.cache_gib
    small = replace(MACHINE, disk_bytes=2**30)
    assert proposed(root_with(root, 5_000), 600, machine=small).params.data.cache_gib == 1.0


def root_with(root: Path, images: int) -> Path:
    write_data(root, train=images)
    return root


def test_what_describes_the_data_and_the_machine_stays(root: Path) -> None:
    write_data(root, train=100, val=0)
    (root / "data").rename(root / "scans")
    now = override(
        load_params(preset_files()["sample"]),
        {"data.path": "scans", "data.val_fraction": 0.4, "runtime.experiment": "scans"},
    )
    found = propose(survey_data(root, now), MACHINE, now, 10, machine_of(12)).params
    assert (found.data.path, found.data.val_fraction) == ("scans", 0.4)
    assert found.runtime.experiment == "scans"
    assert found.lr == load_params(PHOTOS).lr


def test_few_objects_are_said(root: Path) -> None:
    write_data(root, train=60, val=30, classes=("cat", *(f"c{n}" for n in range(9))))
    warnings = " ".join(proposed(root, 60).warnings)
    assert "fewer than 10 objects: cat (6), c0 (6), c1 (6), c2 (6), c3 (6) and 5 more" in warnings
    assert "AP is measured on 30 objects: at AP50 0.8 it is known to +-0.14" in warnings


def test_data_that_are_not_there(root: Path, run: Run) -> None:
    code, _, err = run("preset", "auto")
    assert code == 1
    assert err.startswith("error: data: no such folder; run `dvc pull data.dvc` or set data.path")
    with pytest.raises(DataError, match="data: no such folder"):
        survey_data(root, load_params(PHOTOS))
    write_data(root)
    file = root / "data/annotations/instances_train.json"
    coco = json.loads(file.read_text()) | {"annotations": []}
    file.write_text(json.dumps(coco))
    with pytest.raises(DataError, match="no object to learn"):
        survey_data(root, load_params(PHOTOS))
    write_data(root)
    write_data(root, val=1)
    (root / "data/annotations/instances_val.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match="no object in val, on which AP is measured"):
        survey_data(root, load_params(PHOTOS))


@pytest.mark.parametrize("minutes", ["nan", "inf", "1e300", "0", "-1"])
def test_no_number_of_minutes(root: Path, run: Run, minutes: str) -> None:
    write_data(root)
    code, _, err = run("preset", "auto", "--minutes", minutes, "--print")
    assert code != 0
    assert "--minutes" in err


def test_odd_boxes_and_images(root: Path) -> None:
    write_data(root)
    file = root / "data/annotations/instances_train.json"
    coco = json.loads(file.read_text())
    for one, side in zip(coco["annotations"], (1e300, 10**400, "x", -5, None), strict=False):
        one["bbox"] = [0, 0, side, side]
    file.write_text(json.dumps(coco))
    facts = survey_data(root, load_params(PHOTOS))
    assert facts.train.objects == 156
    assert facts.train.boxes.max() == SIZE[0]
    for one in coco["images"]:
        one |= {"width": 20_000, "height": 15_000}
    for one in coco["annotations"]:
        one["bbox"] = [0, 0, 20, 20]
    file.write_text(json.dumps(coco))
    found = proposed(root, 600)
    assert found.params.data.long_side == 1344
    assert "cut the images into tiles" in found.warnings[0]


def test_as_it_is_typed_with_real_training_steps(root: Path, run: Run) -> None:
    write_data(root, train=40, val=10)
    code, out, err = run("preset", "auto", "--minutes", "2", "--print")
    assert (code, err) == (0, "")
    params = parse_params(parse_yaml(out))
    assert out.startswith(
        "# auto: photos for 2 minutes, by `runkey preset auto`.\n#\n# data: 40 + 10"
    )
    assert "measured here" in out
    assert max(map(len, out.splitlines())) <= 100
    code, out, _ = run("preset", "auto", "--minutes", "2", "--json")
    answer = json.loads(out)
    assert (code, answer["written"], answer["from"]) == (0, True, "photos")
    written = load_params(root / "params.yaml")
    assert written.model == params.model
    code, _, err = run("preset", "auto")
    assert code == 1
    assert "has changes that are not committed" in err
