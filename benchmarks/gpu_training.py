"""GPU checks of training: host syncs of a step, a step that is not finite, kill -9 and resume.

    python3 -m benchmarks.gpu_training [syncs] [skip] [resume] [--out benchmarks/results/gpu]

G4 (syncs), G6 (skip) and G5 (resume) of the checks that need a GPU.  They run on a bare machine:
its own torch, no mlflow, dvc or pycocotools.  Each writes a JSON file with what it measured, the
device, the driver and the versions.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor, nn

from benchmarks.gpu_common import CLASSES, SyntheticLoader, about, training_params
from runkey.data.dataset import GlobalBatch
from runkey.training.build import Replacements, build_training
from runkey.training.checkpoint import FolderCheckpoints, Interval
from runkey.training.lock import locked
from runkey.training.loop import fit
from runkey.training.step import train_step

R50 = {
    "preset": "detr",
    "backbone": "resnet50",
    "norm": "live",
    "hidden_dim": 256,
    "num_heads": 8,
    "feedforward_dim": 2048,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "num_queries": 100,
    "dropout": 0.1,
}


class SyncCounter:
    """Counts the calls of torch that wait for the device, and where they come from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.places: dict[str, int] = {}
        self.count = 0

    def __enter__(self) -> SyncCounter:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._take  # type: ignore[assignment]
        if self._device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        self._catch.__exit__(None, None, None)

    def _take(self, message: object, _: object, file: str, line: int, *__: object) -> None:
        if "synchroniz" in str(message):
            self.count += 1
            place = f"{'/'.join(Path(file).parts[-3:])}:{line}"
            self.places[place] = self.places.get(place, 0) + 1


def check_syncs(device: torch.device) -> dict[str, Any]:
    """G4: syncs per training step in the whole loop, R50 at 800 x 1333, two images."""
    size, steps = ((800, 1333), 12) if device.type == "cuda" else ((96, 128), 5)
    params = training_params(R50, epochs=1, precision="bf16", ema_decay=0.999, batch_size=2)
    counts: list[int] = []
    with SyncCounter(device) as counter:

        class Counted(SyntheticLoader):
            def epoch(self, epoch: int, start_step: int = 0) -> Iterator[GlobalBatch]:
                """The same windows; what was counted until each is asked for."""
                for window in super().epoch(epoch, start_step):
                    counts.append(counter.count)
                    yield window

        loader = Counted(steps, 2, 2, size, pin=device.type == "cuda")
        context = build_training(params, CLASSES, device, replace=Replacements(loader=loader))
        fit(context, lambda _: {"val/loss": 1.0})
    each = [after - before for before, after in itertools.pairwise(counts)]
    # The first steps make optimizer state and handles.
    return {"check": "G4", "syncs_per_step": each, "most": max(each[3:]), "places": counter.places}


def check_skip(device: torch.device) -> dict[str, Any]:
    """G6: a gradient that is not finite leaves parameters and moments as they are, at no sync."""
    size = (800, 1333) if device.type == "cuda" else (96, 128)
    params = training_params(R50, epochs=1, precision="bf16", ema_decay=0.999, batch_size=2)
    loader = SyntheticLoader(8, 2, 2, size, pin=device.type == "cuda")
    parts = build_training(params, CLASSES, device, replace=Replacements(loader=loader)).step
    poison = torch.ones((), device=device)
    victim = next(p for p in parts.model.parameters() if p.requires_grad)
    victim.register_hook(lambda gradient: gradient * poison)
    syncs: dict[str, int] = {}
    skipped: dict[str, float] = {}
    same = {}
    for number, name in enumerate(("first", "second", "ordinary", "poisoned", "after")):
        poison.fill_(float("nan") if name == "poisoned" else 1.0)
        before = _bits(parts.model, parts.optimizer)
        with SyncCounter(device) as counter:
            result = train_step(parts, loader.window(number), 1.0)
        after = _bits(parts.model, parts.optimizer)
        syncs[name], skipped[name] = counter.count, float(result.skipped)
        same[name] = before == after
    return {"check": "G6", "syncs": syncs, "skipped": skipped, "nothing_changed": same}


def _bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """sha256 of all weights, buffers, moments and step counters."""
    digest = hashlib.sha256()
    tensors: list[Tensor] = [*model.state_dict().values()]
    for state in optimizer.state_dict()["state"].values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# Kill and resume.

KILLS = 3
RESUME_STEPS = 80
COMPACT = {"dropout": 0.1, "denoising": {"groups": 2}}


def check_resume(device: torch.device) -> dict[str, Any]:
    """G5: killed three times and started again, the training ends with the same bits."""
    kills = []
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        _run_worker(whole, device).wait()
        rng = random.Random(0)
        for number in range(1, KILLS + 1):
            worker = _run_worker(killed, device)
            wanted = RESUME_STEPS * number // (KILLS + 1) + rng.randrange(10)
            while _newest(killed) < wanted and worker.poll() is None:
                time.sleep(0.005)
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            kills.append(_newest(killed))
        ended = _run_worker(killed, device).wait()
        results = [json.loads((one / "result.json").read_text()) for one in (whole, killed)]
    return {
        "check": "G5",
        "steps": RESUME_STEPS,
        "newest_checkpoint_at_kills": kills,
        "exit_code": ended,
        "identical": results[0] == results[1],
        "uninterrupted": results[0],
        "resumed": results[1],
    }


def _run_worker(folder: Path, device: torch.device) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.gpu_training", "--device", device.type]
    return subprocess.Popen([*command, "--worker", str(folder)])


def _newest(folder: Path) -> int:
    """Step of the newest checkpoint in a folder."""
    steps = [int(path.stem.split("-")[1]) for path in folder.glob("step-*.ckpt")]
    return max(steps, default=0)


def train_to_the_end(folder: Path, device: torch.device) -> None:
    """A worker of `check_resume`: dropout, denoising, bf16, average, two micro-batches a step."""
    precision = "bf16" if device.type == "cuda" else "off"
    params = training_params(
        COMPACT, epochs=4, precision=precision, ema_decay=0.99, batch_size=8, cpu_threads=1
    )
    size = (120, 160) if device.type == "cuda" else (32, 48)
    loader = SyntheticLoader(RESUME_STEPS // 4, 8, 4, size, pin=device.type == "cuda")
    fingerprint = {
        "key": "gpu check",
        "micro_batch": 4,
        "world_size": 1,
        "device": device.type,
        "precision": precision,
    }
    with locked(folder):
        # A checkpoint after every step.
        checkpoints = FolderCheckpoints(folder, fingerprint, interval=Interval(0))
        fit(
            build_training(params, CLASSES, device, replace=Replacements(loader=loader)),
            lambda module: {"val/loss": float(sum(p.double().sum() for p in module.parameters()))},
            checkpoints=checkpoints,
        )
        checkpoints.finish()
        checkpoint = checkpoints.load()
    assert checkpoint is not None
    hashes = {name: _hash_tree(part) for name, part in checkpoint.parts.items()}
    (folder / "result.json").write_text(json.dumps(hashes | {"step": checkpoint.step}))


def _hash_tree(tree: Any) -> str:
    """sha256 of all tensors and numbers in nested dicts and lists."""
    digest = hashlib.sha256()
    leaves, shape = torch.utils._pytree.tree_flatten(tree)
    digest.update(str(shape).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(leaf.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def main() -> None:
    """Run the checks named, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", default=list(CHECKS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if chosen.worker:
        train_to_the_end(chosen.worker, device)
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.checks:
        started = time.perf_counter()
        result = CHECKS[name](device)
        result |= {"seconds": round(time.perf_counter() - started, 1)} | about(device)
        text = json.dumps(result, indent=1) + "\n"
        (chosen.out / f"training_{name}.json").write_text(text, encoding="utf-8")
        print(name, {k: v for k, v in result.items() if not isinstance(v, list)}, flush=True)


CHECKS: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "syncs": check_syncs,
    "skip": check_skip,
    "resume": check_resume,
}


if __name__ == "__main__":
    main()
