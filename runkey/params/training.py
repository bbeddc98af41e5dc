"""`optimizer`, `schedule`, `training`, `memory`, `evaluate` and `runtime`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from runkey.params.base import (
    BelowOne,
    Count,
    Fraction,
    NonNegativeFloat,
    OpenFraction,
    Percent,
    PositiveFloat,
    PositiveInt,
    Section,
)


class Clip(Section):
    """Gradient clipping, once per optimizer step, after unscaling."""

    mode: Literal["norm", "value", "percentile", "none"] = "norm"
    """norm: scale all gradients to at most this joint 2-norm; value: clamp each element;
    percentile: as norm, to a percentile of past norms (AutoClip, Seetharaman et al. 2020)."""
    threshold: PositiveFloat = 0.1
    """norm, value: largest norm, or largest absolute value.  DETR: 0.1."""
    percentile: Percent = 10.0
    """percentile: this percentile of the norms; AutoClip: 10."""
    history: PositiveInt = 1000
    """percentile: how many of the latest steps' norms it is of."""


class Optimizer(Section):
    """`optimizer`: AdamW (Loshchilov and Hutter 2019).  The rate is the top-level `lr`."""

    backbone_lr_factor: NonNegativeFloat = 1.0
    """The backbone's rate is lr times this; 0 freezes it.  DETR: 0.1."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay, per unit of rate."""
    decay_norm_and_bias: bool = True
    """Decay biases and norm weights too, as DETR does."""
    beta1: BelowOne = 0.9
    """Decay of the mean of gradients."""
    beta2: BelowOne = 0.999
    """Decay of the mean of squared gradients."""
    clip: Clip = Clip()
    """Gradient clipping."""


class Schedule(Section):
    """`schedule`: the factor on every rate, a pure function of the optimizer step.

    Warm-up multiplies each shape, save cosine (starts where warm-up ends) and onecycle (its own
    rise takes the place of warm-up).  Epochs are counted from the first step.
    """

    name: Literal[
        "constant", "step", "multistep", "exponential", "cosine", "onecycle", "cyclical", "plateau"
    ] = "cosine"
    """Shape after warm-up."""
    warmup_fraction: Fraction = 0.05
    """Part of all steps in which the rate rises linearly from warmup_start."""
    warmup_start: Fraction = 0.01
    """Factor at step 0 of the warm-up, and of onecycle's rise."""
    step_epochs: PositiveInt = 200
    """step: epochs between drops."""
    milestones: tuple[PositiveInt, ...] = ()
    """multistep: epochs at which the rate drops."""
    gamma: OpenFraction = 0.1
    """step, multistep, plateau: factor of a drop; exponential: factor per epoch, step by step."""
    min_factor: Fraction = 0.0
    """cosine, onecycle, cyclical, plateau: the lowest factor."""
    peak_fraction: OpenFraction = 0.3
    """onecycle: part of all steps spent rising (it takes the place of warm-up)."""
    cycle_epochs: PositiveFloat = 10.0
    """cyclical: epochs of one triangle, up and down."""
    patience: PositiveInt = 3
    """plateau: evaluations on end without improvement (of training.early_stopping.metric) before
    a drop."""
    min_delta: NonNegativeFloat = 0.0
    """plateau: smallest change that counts as improvement."""

    @model_validator(mode="after")
    def _milestones(self) -> Self:
        if self.name == "multistep" and not self.milestones:
            raise ValueError("multistep needs milestones, such as [200, 250]")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {list(self.milestones)} must rise")
        return self


class EarlyStopping(Section):
    """Stop when a metric of the evaluations no longer improves."""

    enabled: bool = True
    """false: always train all epochs."""
    metric: str = "val/AP"
    """Any metric logged at evaluations: val/AP, val/AP50, val/loss, ...  The weights with its best
    value are the model, whether or not training stops early."""
    mode: Literal["max", "min"] = "max"
    """max: larger is better."""
    patience: PositiveInt = 5
    """Evaluations on end without improvement before training stops."""
    min_delta: NonNegativeFloat = 0.0
    """Smallest change that counts as improvement, in the metric's unit."""


class Guard(Section):
    """What happens when numbers go wrong.

    A step whose loss or gradients are not finite is skipped.  Too many of them: back to the last
    anchor, a checkpoint of finite numbers, and on with the images that come next.
    """

    max_skips: PositiveInt = 10
    """Skipped steps among the last window_steps that make training go back.  Those of fp16's loss
    scaler, which looks for its factor, do not count."""
    window_steps: PositiveInt = 1000
    """Optimizer steps."""
    max_rollbacks: Count = 3
    """How often training goes back before it stops with a report."""
    anchor_steps: PositiveInt = 500
    """Optimizer steps from anchor to anchor."""
    spike_score: NonNegativeFloat = 8.0
    """A loss this many robust standard deviations above the median of the latest ones is recorded
    as a spike (nothing else is done about it); 0: none is."""
    spike_history: PositiveInt = 100
    """How many of the latest finite losses are compared with."""

    @model_validator(mode="after")
    def _skips(self) -> Self:
        if self.max_skips > self.window_steps:
            raise ValueError(f"max_skips {self.max_skips} is more than {self.window_steps} steps")
        return self


class Training(Section):
    """`training`: how long, in what batches, in what precision."""

    epochs: PositiveInt = 30
    """Passes over the training images."""
    batch_size: PositiveInt = 8
    """Images per optimizer step (the effective batch), whatever the memory."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Images per forward pass; auto: as many as fit the device, by memory.json."""
    precision: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Automatic mixed precision; boxes, costs and losses stay in fp32.  auto: bf16 on a GPU
    that has it, off on a CPU."""
    ema_decay: BelowOne = 0.0
    """Decay per step of the moving average of the weights that is evaluated and kept; 0: none.
    After n steps it is (1 + n) / (10 + n) at most, so that the start is soon forgotten."""
    evaluate_every: PositiveInt = 1
    """Epochs between evaluations on the held-out images; the last epoch always has one."""
    deterministic: bool = True
    """Deterministic algorithms only: same seed and device, same bits."""
    channels_last: bool = True
    """Memory format of images and convolutions."""
    cpu_threads: PositiveInt | Literal["auto"] = "auto"
    """Threads of arithmetic on a CPU; auto: one per core.  The last bits of sums depend on it.
    Small models gain nothing from more than 1."""
    early_stopping: EarlyStopping = EarlyStopping()
    """When to stop before the last epoch."""
    guard: Guard = Guard()
    """What happens when numbers go wrong."""


class Memory(Section):
    """`memory`: what the training step may take."""

    budget_gib: PositiveFloat | Literal["device"] = "device"
    """GiB for the training process (CPU: its peak resident set); device: what the device has."""
    probe_batches: tuple[PositiveInt, PositiveInt] = (2, 4)
    """Images of the two forward passes whose memory is measured on a CPU; a GPU needs none."""

    @model_validator(mode="after")
    def _probes(self) -> Self:
        if self.probe_batches[0] >= self.probe_batches[1]:
            raise ValueError(f"probe_batches {list(self.probe_batches)} must rise")
        return self


class Evaluate(Section):
    """`evaluate`: COCO evaluation of the trained model."""

    batch_size: PositiveInt = 8
    """Images per forward pass; does not change the result."""
    sheet_images: Count = 8
    """Images in each of the two sheets, best and worst."""


class Runtime(Section):
    """`runtime`: how this machine runs it.  Nothing here changes results or is part of the key."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    processes: PositiveInt | Literal["auto"] = 1
    """Processes of this machine that share the images of each step; auto: one per GPU.  As with the
    micro-batch, rounding and the noise of dropout differ with it, the step's images do not."""
    workers: Count | Literal["auto"] = "auto"
    """Loader processes; auto: 0 with the decoded cache, else one per core, 8 at most."""
    prefetch: PositiveInt = 4
    """Batches that each worker prepares ahead."""
    pin_memory: bool = True
    """Page-locked host memory for copies to a GPU; ignored on a CPU."""
    checkpoint_seconds: NonNegativeFloat | Literal["auto"] = "auto"
    """Seconds between checkpoints; 0: after every optimizer step; auto: as often as 1% of the time
    allows, by what the last one cost, 15 s at least."""
    log_every: PositiveInt = 10
    """Optimizer steps between logged points."""
    progress: bool = True
    """A progress bar, where there is a terminal."""
    mlflow: bool = True
    """false: write the JSONL log only."""
    experiment: str = Field(default="detection", min_length=1)
    """MLflow experiment that runs are logged to."""
    system_metrics_seconds: NonNegativeFloat = 5.0
    """Seconds between samples of CPU, memory and GPU; 0: none."""
    reuse: bool = True
    """Take the result of a finished run of the same key instead of training again."""
    wait: bool = True
    """When another process trains the key: wait for its result; false: stop at once."""
    team_server: str = Field(default="none", pattern=r"^(none|https?://\S+)$")
    """MLflow server that `runkey publish` copies runs to and runs are reused from; none: the
    one of MLFLOW_TRACKING_URI, if that is a server."""
