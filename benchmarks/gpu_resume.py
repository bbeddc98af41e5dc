"""A training on a GPU that is killed three times and started again, against one that is not."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor

from benchmarks.gpu_common import CLASSES, SyntheticLoader, training_params
from runkey.training.build import Replacements, build_training
from runkey.training.checkpoint import FolderCheckpoints, Interval
from runkey.training.lock import locked
from runkey.training.loop import fit

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
