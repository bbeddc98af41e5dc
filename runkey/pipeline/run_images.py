"""The images that a model in use is compared on: the val images of its run, or given ones.

    sample = find_sample(card, recipe, root, images=(), limit=None)
    for pixels in sample.batches(): ...

They are the run's if data/, prepared/ and the parameters of the workspace that decide them are
those of the run's key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runkey import paths
from runkey.data.coco import find_sources
from runkey.data.decode import decode_rgb
from runkey.data.index import ClassName, ImageRecord, index_file, read_classes, read_index
from runkey.data.loader import build_eval_loader
from runkey.errors import DataError, RunkeyError
from runkey.evaluation.run import same_shape_batches
from runkey.files import FormatError, read_json
from runkey.identity.inputs import Inputs
from runkey.identity.key import make_recipe
from runkey.identity.record import KEY_JSON
from runkey.inference.detections import Detections
from runkey.inference.networks import Arrays
from runkey.inference.preprocess import Preprocess, read_image
from runkey.model.weights import ModelCard
from runkey.params import Params, load_params
from runkey.units import counted

_CALIBRATION_IMAGES = 64
_LARGEST_JSON = 200_000_000
"""Bytes of a COCO file that is read for its licences."""


def read_recipe(model: Path) -> Mapping[str, Any] | None:
    """Read the key.json beside a model's weights; None if there is none, or a damaged one."""
    try:
        recipe = read_json(model / Path(KEY_JSON).name, dict[str, Any])
        return recipe if recipe["key"] and isinstance(recipe["preimages"]["params"], dict) else None
    except (OSError, FormatError, KeyError, TypeError):
        return None


class Pixels(NamedTuple):
    """Images of one shape, preprocessed."""

    images: NDArray[np.uint8]
    """[B, 3, h, w]."""
    ids: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    """(height, width) of the original images."""


def detections_by_image(answers: Arrays, pixels: Pixels) -> dict[int, Detections]:
    """Return a network's detections in pixels, by image id; their classes have no names."""
    found = {}
    for id_, size, scores, labels, boxes in zip(pixels.ids, pixels.sizes, *answers, strict=True):
        frame = np.array(size[::-1] * 2, dtype=np.float32)
        found[id_] = Detections(boxes * frame, scores, labels, classes=(), image_size=size)
    return found


@dataclass(frozen=True, slots=True)
class Sample:
    """Images to compare models on."""

    what: str
    """Such as `the run's 100 val images`."""
    count: int
    batches: Callable[[], Iterator[Pixels]]
    """Yields every image once."""
    records: list[ImageRecord] = field(default_factory=list)
    """Their ground truth; empty: there is none, so no AP."""
    classes: list[ClassName] = field(default_factory=list)
    calibration: Callable[[], list[NDArray[np.uint8]]] = list
    """Loads training images, uint8 [3, h, w], preprocessed, to quantise with."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """`data` and `licence` of an export's card."""


def find_sample(
    card: ModelCard,
    recipe: Mapping[str, Any] | None,
    root: Path | None,
    images: Sequence[Path] = (),
    limit: int | None = None,
) -> Sample:
    """Return the given images, else the run's own val images if the workspace has them.

    Args:
        card: of the model.
        recipe: key.json of the run; None: not known.
        root: a workspace; None: none.
        images: image files.
        limit: most val images, drawn by the run's seed.

    Raises:
        DataError: neither; names what differs, and the way out.
    """
    if images:
        given = partial(_given, card, images)
        return Sample(counted(len(images), "given image"), len(images), given)
    if recipe is None:
        reason = "which run made the model is not known (no key.json beside it)"
    elif root is None:
        reason = "the current folder is in no repository"
    else:
        try:
            return _own(card, recipe, _own_params(recipe, root), root, limit)
        except RunkeyError as error:
            reason = str(error)
    raise DataError(f"no val images of the run to compare on: {reason}; or name some by --images")


def _own_params(recipe: Mapping[str, Any], root: Path) -> Params:
    """The workspace's parameters, if its data and prepared/ are those of the run.

    Raises:
        RunkeyError: they are not; why.
    """
    params = load_params(root / paths.PARAMS)
    here = make_recipe("prepare", root, params)
    theirs = recipe["preimages"]
    if here.preimages["data"] != theirs["data"]:
        raise DataError(f"{params.data.path}: not the data that the run was trained on")
    values = theirs["params"]
    differing = [
        f"{name} {value!r} (the run's: {values[name]!r})"
        for name, value in here.preimages["params"].items()
        if name in values and values[name] != value
    ]
    if differing:
        raise DataError(f"{paths.PARAMS}: other than the run's: {', '.join(differing[:3])}")
    if not index_file(root / paths.PREPARED, "val").is_file():
        raise DataError(f"{paths.PREPARED}/: not found; run `dvc repro prepare`")
    Inputs(root, params, make_recipe("evaluate", root, params), paths.home_of(root)).check("images")
    return params


def _own(
    card: ModelCard, recipe: Mapping[str, Any], params: Params, root: Path, limit: int | None
) -> Sample:
    prepared = root / paths.PREPARED
    records = list(read_index(index_file(prepared, "val")))
    train = read_index(index_file(prepared, "train"))
    count = len(records)
    draw = np.random.default_rng(int(recipe["preimages"]["params"]["seed"]))
    picked = draw.choice(len(train), min(_CALIBRATION_IMAGES, len(train)), replace=False)
    load = partial(_load, card, root / params.data.path)
    what, batches = f"the run's {counted(count, 'val image')}", partial(_all_val, params, root)
    if limit is not None and limit < count:
        records = [records[index] for index in sorted(draw.choice(count, limit, replace=False))]
        what, batches = (
            f"{limit} of the run's {count} val images",
            partial(_one_by_one, records, load),
        )
    data = {
        **recipe["preimages"]["data"],
        "path": str(params.data.path),
        "images": {"train": len(train), "val": count},
    }
    return Sample(
        what,
        len(records),
        batches,
        records,
        read_classes(prepared / "classes.json"),
        lambda: [load(train[index]) for index in picked],
        {"data": data, "licence": _licences(root, params)},
    )


def _all_val(params: Params, root: Path) -> Iterator[Pixels]:
    """All val images, as `evaluate` loads them."""
    loader = build_eval_loader(params, root)
    try:
        for batch in (part for mixed in loader for part in same_shape_batches(mixed)):
            sizes = tuple((int(h), int(w)) for h, w in batch.original_sizes.tolist())
            yield Pixels(np.ascontiguousarray(batch.images.numpy()), batch.image_ids, sizes)
    finally:
        loader.close()


def _one_by_one(
    records: Sequence[ImageRecord], load: Callable[[ImageRecord], NDArray[np.uint8]]
) -> Iterator[Pixels]:
    for record in records:
        yield Pixels(load(record)[None], (record.id,), ((record.height, record.width),))


def _load(card: ModelCard, folder: Path, record: ImageRecord) -> NDArray[np.uint8]:
    """An image of the index as the network takes it, uint8 [3, h, w]."""
    decoding = (record.rotate, record.mirror, record.intensity_range)
    image = decode_rgb(folder / record.file, *decoding).permute(1, 2, 0).numpy()
    return Preprocess(card.sizes)(image)


def _given(card: ModelCard, images: Sequence[Path]) -> Iterator[Pixels]:
    for number, path in enumerate(images):
        image = read_image(path, card.sizes.intensity_range)
        size = (image.shape[0], image.shape[1])
        yield Pixels(Preprocess(card.sizes)(image)[None], (number,), (size,))


def _licences(root: Path, params: Params) -> list[str]:
    """What the COCO files of the data say about licences and authors."""
    found: dict[str, None] = {}
    with suppress(RunkeyError, OSError, FormatError, LookupError, TypeError, AttributeError):
        for source in find_sources(root / params.data.path, str(params.data.path)):
            if source.json.stat().st_size > _LARGEST_JSON:
                continue
            tree = read_json(source.json, dict[str, Any], _LARGEST_JSON)
            entries = [f"{one.get('name')} {one.get('url') or ''}" for one in tree["licenses"]]
            author = (tree.get("info") or {}).get("contributor")
            entries += [f"by {author}"] if author else []
            found |= dict.fromkeys(entry.strip() for entry in entries)
    return list(found)
