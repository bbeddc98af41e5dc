"""`data`: where images come from, what is done about faults, sizes, cache and augmentation."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from runkey.params.base import (
    Count,
    Fraction,
    NonNegativeFloat,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Section,
)


class Checks(Section):
    """What to do about each kind of fault: fix it, drop the item, or fail before any work."""

    malformed_image: Literal["drop", "fail"] = "fail"
    """An entry of `images` with a missing or wrong id, file_name, width or height."""
    malformed_annotation: Literal["drop", "fail"] = "fail"
    """One of `annotations` with a missing or wrong id, image_id, category_id, bbox or iscrowd."""
    missing_image: Literal["drop", "fail"] = "fail"
    """The JSON names an image file that is not there."""
    unreadable_image: Literal["drop", "fail"] = "fail"
    """The file is no image, or is cut short."""
    unsafe_path: Literal["drop", "fail"] = "fail"
    """An absolute file name, or one that leaves the data folder by `..` or by a link (DVC's own
    links into its cache are followed)."""
    too_large_image: Literal["drop", "fail"] = "fail"
    """More pixels than `data.max_megapixels` (decompression bomb)."""
    size_mismatch: Literal["fix", "drop", "fail"] = "fail"
    """Width and height in the JSON are not the file's.  fix: scale the boxes to the file's size."""
    exif_rotation: Literal["fix", "drop", "fail"] = "fix"
    """The file asks viewers to turn it.  fix: turn it if the JSON's size agrees, else do not."""
    unusual_mode: Literal["fix", "drop", "fail"] = "fix"
    """Grey, palette, CMYK, transparent or 16-bit pixels.  fix: convert to 8-bit RGB."""
    duplicate_image: Literal["drop", "fail"] = "fail"
    """An image id, or a file name, that occurs twice.  drop: keep the first."""
    duplicate_annotation: Literal["fix", "drop", "fail"] = "fix"
    """An annotation id that occurs twice.  fix: give it a new one; drop: keep the first."""
    unknown_category: Literal["drop", "fail"] = "fail"
    """An annotation of a category id that `categories` does not list."""
    unknown_image: Literal["drop", "fail"] = "fail"
    """An annotation of an image id that `images` does not list."""
    empty_box: Literal["drop", "fail"] = "drop"
    """A box without area (width or height 0)."""
    negative_box: Literal["fix", "drop", "fail"] = "fail"
    """A negative width or height.  fix: swap the corners."""
    not_finite_box: Literal["drop", "fail"] = "fail"
    """A box with NaN, infinity, or something that is no number among its four."""
    outside_box: Literal["drop", "fail"] = "drop"
    """A box wholly outside its image."""
    overhanging_box: Literal["fix", "drop", "fail"] = "fix"
    """A box that reaches over its image's edge by more than a pixel.  fix: clip it."""
    bad_area: Literal["fix", "drop", "fail"] = "fix"
    """An `area` that is no positive number.  fix: take width x height of the box."""
    leaked_image: Literal["drop", "fail"] = "fail"
    """The same file, by name or by content, in train and in val.  drop: leave it out of train."""


class Augment(Section):
    """Random changes of training images; boxes are carried along.  All zero: none."""

    flip_probability: Fraction = 0.5
    """Chance of a left-right mirror image.  0 where left and right mean something (digits)."""
    zoom: NonNegativeFloat = 0.25
    """Scale is exp(u), u uniform in +-zoom."""
    aspect: NonNegativeFloat = 0.1
    """Width to height changes by exp(u), u uniform in +-aspect."""
    shift: Fraction = 0.1
    """Largest move, as a part of width and of height."""
    crop_probability: Fraction = 0.0
    """Chance of DETR's random crop (in place of zoom, aspect and shift)."""
    crop_short_sides: tuple[PositiveInt, ...] = (400, 500, 600)
    """Short sides, in pixels, that an image is thought resized to before the random crop."""
    crop_min: PositiveInt = 384
    """Smallest side of the random crop, pixels at that size."""
    crop_max: PositiveInt = 600
    """Largest side of the random crop, pixels at that size."""
    min_visible: float = Field(default=0.35, ge=0, lt=1)
    """A box is kept if more than this part of its area stays in the picture."""
    brightness: Fraction = 0.2
    """Factor uniform in 1 +- brightness, on the device."""
    contrast: Fraction = 0.2
    """Factor uniform in 1 +- contrast about the image's mean, on the device."""
    saturation: Fraction = 0.0
    """Factor uniform in 1 +- saturation about the pixel's grey value, on the device."""

    @model_validator(mode="after")
    def _crop_range(self) -> Self:
        if self.crop_min > self.crop_max:
            raise ValueError(f"crop_min {self.crop_min} is larger than crop_max {self.crop_max}")
        return self


class Data(Section):
    """`data`: images, checks, sizes and augmentation."""

    path: str = "data"
    """Folder with annotations/ and images, relative to the repository; tracked by data.dvc."""
    val_fraction: OpenFraction = 0.2
    """Part of the images held out, when the data come with one JSON instead of train and val."""
    max_megapixels: PositiveFloat = 100.0
    """Largest image that is decoded, in 10^6 pixels."""
    checks: Checks = Checks()
    """What to do about each kind of fault."""
    short_sides: tuple[PositiveInt, ...] = Field(default=(120,), min_length=1)
    """Short side after resizing, pixels; training picks one at random, evaluation the largest."""
    long_side: PositiveInt = 160
    """Upper bound of the long side after resizing, pixels; wins over the short side."""
    group_by_aspect: bool = True
    """Batches hold landscape or portrait images only: the worst padded shape is half as large."""
    cache_gib: NonNegativeFloat = 1.0
    """Largest decoded uint8 cache of a split, GiB; a larger one is decoded anew. 0: no cache."""
    max_objects: Count = 0
    """Objects per training image, the largest kept; 0: as many as the model has queries."""
    augment: Augment = Augment()
    """Random changes of training images."""

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if max(self.short_sides) > self.long_side:
            raise ValueError(
                f"short_sides {list(self.short_sides)} exceed long_side {self.long_side}"
            )
        return self
