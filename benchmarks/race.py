r"""A race from random weights: AP against CPU seconds, with RT-DETRv2 and D-FINE of transformers.

    python -m benchmarks.race sample=data blood-cells=../shared/data/blood-cells \
        raccoons:sample=../shared/data/raccoons --rate 5
    python -m benchmarks.race --table

Needs `make env-bench`.  The peers are their smallest models (RT-DETRv2-S, D-FINE-N), built from
configuration, trained by their own recipes: AdamW, rates, warm-up, average, clipping.  They get the
images, batches and augmentation that runkey's preset of the set trains on, padded to multiples of
32, and as a second arm twice the sides, since their strides are made for larger images.  `--rate`
multiplies their learning rate, which is made for long trainings.  One thread; CPU seconds count
from the first batch, evaluations left out.  Each arm adds a line to benchmarks/results/race.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import mean

# ruff: noqa: E402
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, as in stages/
from benchmarks.speed.peers import find_packages

find_packages()

import torch
from torch import Tensor, nn

from benchmarks.photos import REPOSITORY, Workspace
from benchmarks.speed.step import split_targets
from runkey import paths
from runkey.data.dataset import GlobalBatch, normalise
from runkey.data.index import index_file, read_classes, read_index
from runkey.data.loader import build_eval_loader, build_train_loader
from runkey.evaluation.run import detect, evaluate_detections
from runkey.model.matcher import Outputs
from runkey.model.postprocess import Postprocess
from runkey.params import Params
from runkey.params.load import override, parse_params, parse_yaml
from runkey.training.loop import take_step
from runkey.training.state import LoopState

RESULTS = REPOSITORY / "benchmarks/results/race.jsonl"
CPU = torch.device("cpu")
_EPOCHS = 999
"""More than anyone trains here; a preset with a constant rate knows no end."""
MOMENTS = (60.0, 120.0, 300.0, 600.0)
"""CPU seconds after which the weights are evaluated."""


@dataclass(frozen=True)
class Recipe:
    """How a peer trains, by its authors' configuration."""

    lr: float
    backbone_lr: float
    batch_size: int
    """That the rates are made for; they are scaled to another one linearly."""
    warm_up: int
    """Steps."""
    average_warm_up: int
    """n in the average's decay 0.9999 (1 - exp(-step / n))."""
    weight_decay: float = 1e-4
    clip: float = 0.1


RECIPES = {
    "RT-DETRv2-S": Recipe(1e-4, 1e-4, 16, 2000, 2000),
    "D-FINE-N": Recipe(8e-4, 4e-4, 128, 500, 1000),
}


def build_peer(name: str, classes: int, queries: int) -> nn.Module:
    """Build a peer with random weights, all of them trained, and as many queries as ours has."""
    from transformers import (
        DFineConfig,
        DFineForObjectDetection,
        HGNetV2Config,
        RTDetrResNetConfig,
        RTDetrV2Config,
        RTDetrV2ForObjectDetection,
    )

    common = {
        "num_labels": classes,
        "num_queries": queries,
        "freeze_backbone_batch_norms": False,
        "decoder_layers": 3,
    }
    if name == "RT-DETRv2-S":
        body = RTDetrResNetConfig(
            layer_type="basic",
            depths=[2, 2, 2, 2],
            hidden_sizes=[64, 128, 256, 512],
            out_features=["stage2", "stage3", "stage4"],
        )
        channels = [128, 256, 512]
        config = RTDetrV2Config(
            backbone_config=body, encoder_in_channels=channels, hidden_expansion=0.5, **common
        )
        return RTDetrV2ForObjectDetection(config)
    body = HGNetV2Config(
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 64, 256, 512],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=[64, 256, 512, 1024],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[3, 3, 3, 3],
        use_learnable_affine_block=True,
        hidden_sizes=[64, 256, 512, 1024],
        out_features=["stage3", "stage4"],
    )
    config = DFineConfig(
        backbone_config=body,
        encoder_in_channels=[512, 1024],
        encoder_hidden_dim=128,
        encoder_ffn_dim=512,
        encode_proj_layers=[1],
        feat_strides=[16, 32],
        num_feature_levels=2,
        depth_mult=0.5,
        hidden_expansion=0.34,
        d_model=128,
        decoder_in_channels=[128, 128],
        decoder_ffn_dim=512,
        decoder_n_points=[6, 6],
        **common,
    )
    return DFineForObjectDetection(config)


class Peer(nn.Module):
    """A peer behind the interface of our models: padded to multiples of 32, and back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, _: Tensor) -> Outputs:
        """Return the predictions for images without padding."""
        padded, scale = pad(images)
        found = self.model(padded)
        return Outputs(found.logits[None], found.pred_boxes[None] / scale)

    def loss(self, images: Tensor, labels: list[dict[str, Tensor]]) -> Tensor:
        """Return the loss of a batch; boxes cxcywh in 0..1 of the images without padding."""
        padded, scale = pad(images)
        boxes = [{"boxes": t["boxes"] * scale, "class_labels": t["labels"]} for t in labels]
        found: Tensor = self.model(padded, labels=boxes).loss
        return found


def pad(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pad to multiples of 32; return how much smaller boxes are as fractions of the result."""
    height, width = images.shape[-2:]
    below, right = -height % 32, -width % 32
    sides = torch.tensor([width / (width + right), height / (height + below)])
    return nn.functional.pad(images, (0, right, 0, below)), sides.repeat(2)


class Contestant:
    """A model and what trains it."""

    step: Callable[[GlobalBatch], None]
    evaluated: nn.Module


class Ours(Contestant):
    """Training as the stage `train` does it."""

    def __init__(self, params: Params, workspace: Workspace) -> None:
        self._context = workspace.build(params)
        self._state = LoopState()

    def step(self, batch: GlobalBatch) -> None:
        """Take a step at the constant rate of the preset."""
        take_step(self._context, self._state, batch, [])

    @property
    def evaluated(self) -> nn.Module:
        """Return the averaged model."""
        return self._context.evaluated_module


class Theirs(Contestant):
    """Training by a `Recipe`."""

    def __init__(self, name: str, params: Params, classes: int, rate: float) -> None:
        recipe = RECIPES[name]
        torch.manual_seed(params.seed)
        self._recipe, self._peer = (
            recipe,
            Peer(build_peer(name, classes, params.model.num_queries)).train(),
        )
        self.evaluated = copy.deepcopy(self._peer)
        factor = rate * params.training.batch_size / recipe.batch_size
        groups: dict[float, list[nn.Parameter]] = defaultdict(list)
        for label, parameter in self._peer.named_parameters():
            groups[recipe.backbone_lr if "backbone" in label else recipe.lr].append(parameter)
        self._optimizer = torch.optim.AdamW(
            [{"params": some, "lr": lr * factor} for lr, some in groups.items()],
            weight_decay=recipe.weight_decay,
        )
        rise = lambda step: min(1.0, (step + 1) / recipe.warm_up)  # noqa: E731
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, rise)
        self._steps = 0

    def step(self, batch: GlobalBatch) -> None:
        """Take a step as the peers' training loops do."""
        self._optimizer.zero_grad()
        for one in batch:  # more than one if images of two shapes are in it
            images, _ = normalise(one)
            loss = self._peer.loss(images, split_targets(one)) / len(batch)
            if not loss.isfinite():
                raise ValueError(f"step {self._steps}: the peer's loss is not finite")
            loss.backward()
        nn.utils.clip_grad_norm_(self._peer.parameters(), self._recipe.clip)
        self._optimizer.step()
        self._schedule.step()
        self._steps += 1
        decay = 0.9999 * (1 - math.exp(-self._steps / self._recipe.average_warm_up))
        with torch.no_grad():
            state = self._peer.state_dict()
            for name, value in self.evaluated.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(state[name], 1 - decay)
                else:
                    value.copy_(state[name])


def race(
    contestant: Contestant, params: Params, workspace: Workspace, seconds: float
) -> Iterator[dict[str, float]]:
    """Train, and yield AP at each of `MOMENTS`."""
    prepared = workspace.root / paths.PREPARED
    records = list(read_index(index_file(prepared, "val")))
    classes = read_classes(prepared / "classes.json")
    loader = build_train_loader(params, workspace.root, params.training.batch_size)
    tests = build_eval_loader(params, workspace.root)
    moments = [moment for moment in MOMENTS if moment <= seconds]
    used, batches = 0.0, (batch for epoch in count() for batch in loader.epoch(epoch))
    for steps, batch in enumerate(batches, start=1):
        started = time.process_time()
        contestant.step(batch)
        used += time.process_time() - started
        if used >= moments[0]:
            found = detect(contestant.evaluated, Postprocess(softmax=False), tests, CPU)
            summary = evaluate_detections(records, classes, found).summary
            yield {"seconds": moments.pop(0), "steps": steps, "AP": summary["AP"] or 0.0}
            if not moments:
                return


def run(wanted: argparse.Namespace) -> None:
    """Race on every set with every seed, and keep each result."""
    torch.set_num_threads(1)
    for name, recipe, folder in wanted.sets:
        preset = parse_params(parse_yaml((REPOSITORY / f"presets/{recipe}.yaml").read_text()))
        fixed = {
            "training.cpu_threads": 1,
            "data.checks": {"level": "drop"},
            "training.epochs": _EPOCHS,
            # As many steps as the preset's.
            "schedule.warmup_fraction": preset.schedule.warmup_fraction
            * preset.training.epochs
            / _EPOCHS,
        }
        for seed in wanted.seeds:
            params = override(preset, fixed | {"seed": seed})
            for label in wanted.contestants:
                who, _, scale = label.partition("@")
                sides = int(scale or 1)
                sized = {
                    "data.short_sides": [sides * side for side in params.data.short_sides],
                    "data.long_side": sides * params.data.long_side,
                }
                arm = override(params, sized)
                workspace = Workspace.prepared(f"{name}@{sides}", folder, wanted.work, arm)
                torch.manual_seed(seed)
                contestant: Contestant
                if who == "runkey":
                    contestant = Ours(arm, workspace)
                else:
                    classes = read_classes(workspace.root / paths.PREPARED / "classes.json")
                    contestant = Theirs(who, arm, len(classes), wanted.rate)
                curve = list(race(contestant, arm, workspace, wanted.seconds))
                row = {"set": name, "who": label, "rate": wanted.rate, "seed": seed, "curve": curve}
                with wanted.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def table(path: Path) -> str:
    """Return the mean AP over seeds after each of `MOMENTS`."""
    groups: dict[tuple[str, str, float], list[list[dict[str, float]]]] = defaultdict(list)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rate = row["rate"] if row["who"] != "runkey" else 1.0
        groups[row["set"], row["who"], rate].append(row["curve"])
    heads = " | ".join(f"{moment:g} s" for moment in MOMENTS)
    lines = [f"| set | who | rate | seeds | {heads} |", "|---" * (4 + len(MOMENTS)) + "|"]
    for (name, who, rate), curves in sorted(groups.items()):
        cells = []
        for moment in MOMENTS:
            points = [p for curve in curves for p in curve if p["seconds"] == moment]
            steps = mean(p["steps"] for p in points) if points else 0
            cells.append(f"{mean(p['AP'] for p in points):.3f} ({steps:.0f})" if points else "-")
        lines.append(f"| {name} | {who} | {rate:g} | {len(curves)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _set(text: str) -> tuple[str, str, Path]:
    label, _, folder = text.partition("=")
    name, _, preset = label.partition(":")
    return name, preset or name, Path(folder)


def main() -> None:
    """Race, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sets", nargs="*", type=_set, metavar="NAME[:PRESET]=FOLDER")
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=["runkey", *(f"{name}@{sides}" for name in RECIPES for sides in (1, 2))],
        metavar="NAME[@SIDES]",
    )
    parser.add_argument("--rate", type=float, default=1.0, help="times the peers' learning rate")
    parser.add_argument("--seconds", type=float, default=600.0, help="CPU seconds of a training")
    parser.add_argument("--seeds", type=lambda t: [int(s) for s in t.split(",")], default=[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "runkey-race"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    wanted = parser.parse_args()
    print(table(wanted.results)) if wanted.table else run(wanted)


if __name__ == "__main__":
    main()
