"""AdamW and what goes with it: gradient clipping, the moving average, gradients over ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from runkey import params
from runkey.errors import TrainingError
from runkey.training.distributed import World
from runkey.training.tensors import FlatLayout, flat_groups

# Optimizer: AdamW over named parameter groups.

_BACKBONE = "backbone."
_NO_DECAY = "/no_decay"


def build_optimizer(module: nn.Module, section: params.Optimizer, lr: float) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter 2019) for the trainable parameters of a module.

    Groups are named `backbone` or `rest`, with `/no_decay` for biases and norm weights if those
    have no weight decay. Each keeps its peak rate as `base_lr`; `set_rates` scales it. A factor of
    0 for the backbone's rate freezes it: its parameters no longer require gradients after this.
    Raises TrainingError if nothing is left to train.
    """
    if section.backbone_lr_factor == 0:
        for name, parameter in module.named_parameters():
            if name.startswith(_BACKBONE):
                parameter.requires_grad_(False)
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = "backbone" if name.startswith(_BACKBONE) else "rest"
            if parameter.ndim < 2 and not section.decay_norm_and_bias:
                group += _NO_DECAY
            groups.setdefault(group, []).append(parameter)
    if not groups:
        raise TrainingError("params.yaml: every parameter of the model is frozen; nothing to train")
    return torch.optim.AdamW(
        [
            {
                "name": name,
                "params": parameters,
                "base_lr": lr * (section.backbone_lr_factor if "backbone" in name else 1.0),
                "weight_decay": 0.0 if name.endswith(_NO_DECAY) else section.weight_decay,
            }
            for name, parameters in sorted(groups.items())
        ],
        lr=lr,
        betas=(section.beta1, section.beta2),
        fused=True,
    )


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its peak rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def current_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Read the rates of the parameter groups, by metric name.

    They are `train/lr` of the main group and `train/lr_backbone`. Groups that differ in weight
    decay only share a rate. `train/lr` is the backbone's if nothing else is trained.
    """
    rates = {
        group["name"].removesuffix(_NO_DECAY): float(group["lr"])
        for group in optimizer.param_groups
    }
    main = "rest" if "rest" in rates else next(iter(rates))
    return {"train/lr": rates.pop(main)} | {f"train/lr_{name}": lr for name, lr in rates.items()}


def trained_parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the parameters of all groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def guarded_step(optimizer: torch.optim.AdamW, skip: Tensor) -> None:
    """Take one step, or none where `skip` is 1, decided on the device without a host sync.

    A skipped step leaves parameters, moments and step counters as they were, bit for bit: the
    fused kernel has this for loss scaling, and reads it from an attribute.
    """
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]


# Gradient clipping, without a host sync.

# Marks the places of a history that have no norm yet. Not NaN: a checkpoint holds finite numbers.
_NO_NORM = -1.0

ClipMode = Literal["norm", "value", "percentile", "none"]


@dataclass(frozen=True, slots=True)
class Clipped:
    """Joint 2-norms before and after clipping: scalars on the gradients' device."""

    before: Tensor
    after: Tensor
    threshold: Tensor | None
    """Largest norm that passes unchanged; None in the modes that do not limit norms."""


class Clipper:
    """Gradient clipping; the percentile mode remembers past norms.

    norm scales all gradients by one factor, so that the joint 2-norm is at most `threshold`
    (Pascanu et al. 2013). percentile does the same with a percentile of the last norms, this
    step's included (AutoClip, Seetharaman et al. 2020). value clamps each element to +-`threshold`;
    none changes nothing.
    """

    def __init__(
        self,
        mode: ClipMode,
        threshold: float,
        device: torch.device,
        *,
        percentile: float = 10.0,
        history: int = 1000,
    ) -> None:
        """Start without a history; percentile: 0..100, of the latest `history` norms."""
        self._mode, self._limit, self._quantile = mode, threshold, percentile / 100
        length = history if mode == "percentile" else 0
        self._norms = torch.full((length,), _NO_NORM, device=device)

    def clip(self, gradients: list[Tensor]) -> Clipped:
        """Clip gradients (unscaled, one or more, on one device) in place, once per step."""
        before = joint_norm(gradients)
        match self._mode:
            case "norm":
                limit = torch.full_like(before, self._limit)
                return Clipped(before, _scale_to(gradients, before, self._limit), limit)
            case "percentile":
                limit = self._percentile_with(before)
                return Clipped(before, _scale_to(gradients, before, limit), limit)
            case "value":
                torch._foreach_clamp_min_(gradients, -self._limit)
                torch._foreach_clamp_max_(gradients, self._limit)
                return Clipped(before, joint_norm(gradients), None)
        return Clipped(before, before, None)

    def _percentile_with(self, norm: Tensor) -> Tensor:
        """Add a norm to the history unless it is not finite; return the history's percentile."""
        longer = torch.cat((self._norms[1:], norm.to(self._norms.dtype)[None]))
        self._norms = torch.where(norm.isfinite(), longer, self._norms)
        known = torch.where(self._norms >= 0, self._norms, torch.nan)
        return torch.nanquantile(known, self._quantile)

    def state_dict(self) -> dict[str, Tensor]:
        """Return `norms` [history], the latest last, -1 where there is none yet."""
        return {"norms": self._norms}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        self._norms = state["norms"].to(self._norms.device, copy=True)


def joint_norm(gradients: list[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together, a scalar; NaN or inf if any holds one."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def _scale_to(gradients: list[Tensor], norm: Tensor, limit: float | Tensor) -> Tensor:
    """Scale gradients in place so that their joint norm is at most `limit`; return it after."""
    # 1e-6 as in torch: a norm at the limit is never multiplied by more than 1.
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)
    return norm * factor


# Moving average of the weights.

# Tensors start at multiples of this many elements, as they would on their own.
_ALIGNMENT = 64


class Ema:
    """Moving average of a module's weights (Polyak and Juditsky 1992), which is evaluated and kept.

    average += (1 - decay) * (weights - average). The decay grows as (1 + n) / (10 + n) with the n
    steps so far, up to `decay`: a short training is not averaged with its random start. Floating
    buffers (batch norm's statistics) are averaged in the same way, others copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0
        pairs = [
            (average, weight)
            for average, weight in zip(_state(self.module), _state(module), strict=True)
            # A frozen weight never moves, so neither does its average.
            if not isinstance(weight, nn.Parameter) or weight.requires_grad
        ]
        self._averages = [average for average, _ in pairs if average.is_floating_point()]
        self._weights = [weight for average, weight in pairs if average.is_floating_point()]
        self._copies = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._flat = [_flatten(*group) for group in flat_groups(self._averages, _ALIGNMENT)]

    def current_decay(self) -> float:
        """Return the decay of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Take one step towards the module's present weights, without a host sync.

        Where the scalar `skipped` is 1, the averages stay as they are, bit for bit. The decay's n
        counts that step all the same: the host does not know yet.
        """
        before = [flat.clone() for flat in self._flat]
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.current_decay())
        for flat, old in zip(self._flat, before, strict=True):
            torch.where(skipped > 0, old, flat, out=flat)
        for average, weight in self._copies:  # already restored if the step was skipped
            average.copy_(weight)
        self.updates += 1

    def state_dict(self) -> dict[str, object]:
        """Return the averaged tensors and the number of updates."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from what `state_dict` gave."""
        self.module.load_state_dict(state["module"])  # type: ignore[arg-type]
        self.updates = int(state["updates"])  # type: ignore[call-overload]


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _flatten(tensors: list[Tensor], layout: FlatLayout) -> Tensor:
    """Move tensors of one dtype into one flat tensor, of which they are views afterwards."""
    flat = tensors[0].new_zeros(layout.size)
    for tensor, view in zip(tensors, layout.views(flat), strict=True):
        view.copy_(tensor)
        tensor.data = view
    return flat


# Gradients over ranks.

_BUCKET_BYTES = 25 * 2**20
"""Most bytes of a bucket, unless one parameter has more."""
_FEWEST_BUCKETS = 4
"""Of a model that is smaller; the costs of each are measured by `benchmarks.ranks`."""


class GradientExchange:
    """Sum of each gradient over ranks, sent in buckets while a backward pass computes the others.

        with exchange.overlap():       # in a rank's last micro-batch
            loss.backward()
        exchange.finish()

    A bucket is copied into one flat tensor, of which its gradients are views afterwards, and sent
    when all its gradients and all buckets before it are finished. So the copy adds one bucket to
    the memory of a step. Every rank sends the same buckets in the same order, whatever happens to
    it: `finish` sends those that are left, with zeros for gradients that are missing. The sums are
    the same bits on all ranks, and do not depend on when a bucket is sent.
    """

    def __init__(self, parameters: Iterable[Tensor], world: World) -> None:
        """Plan the buckets.

        Args:
            parameters: on all ranks in the same order, about that in which a backward pass finishes
                their gradients.
            world: the ranks.
        """
        self._world = world
        self._buckets = [(group, FlatLayout(group)) for group in _buckets(list(parameters))]
        self._index = {id(p): i for i, (group, _) in enumerate(self._buckets) for p in group}
        self._missing: list[set[int]] = []
        self._waits: list[Callable[[], None]] = []

    @property
    def has_begun(self) -> bool:
        """Whether a part of this rank's gradients has been sent, and `finish` was not called."""
        return bool(self._waits)

    @contextmanager
    def overlap(self) -> Iterator[None]:
        """Send each bucket as soon as a backward pass in this block has finished it."""
        self._missing = [{id(p) for p in group} for group, _ in self._buckets]
        hooks = [
            p.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]
            for group, _ in self._buckets
            for p in group
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, parameter: Tensor) -> None:
        """Take note of a finished gradient; called by the backward pass."""
        index = self._index[id(parameter)]
        if index < len(self._waits):
            raise RuntimeError("a gradient has changed after it was sent to the other ranks")
        self._missing[index].discard(id(parameter))
        while len(self._waits) < len(self._buckets) and not self._missing[len(self._waits)]:
            self._send()

    def finish(self) -> None:
        """Send the buckets that are left, and wait for all; raises LostRankError."""
        while len(self._waits) < len(self._buckets):
            self._send()
        waits, self._waits = self._waits, []
        for wait in waits:
            wait()

    @torch.no_grad()
    def _send(self) -> None:
        group, layout = self._buckets[len(self._waits)]
        has_all = all(p.grad is not None for p in group)
        flat = group[0].new_empty(layout.size) if has_all else group[0].new_zeros(layout.size)
        views = layout.views(flat)
        ours = [(v, p.grad) for v, p in zip(views, group, strict=True) if p.grad is not None]
        if ours:
            torch._foreach_copy_([v for v, _ in ours], [g for _, g in ours])
        for parameter, view in zip(group, views, strict=True):
            parameter.grad = view
        self._waits.append(self._world.start_all_reduce(flat))


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters of one dtype, in order, as many as fit in a bucket."""
    size = min(_BUCKET_BYTES, sum(p.nbytes for p in parameters) // _FEWEST_BUCKETS)
    bucket: list[Tensor] = []
    for parameter in parameters:
        held = sum(p.nbytes for p in bucket)
        if bucket and (held + parameter.nbytes > size or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
