"""A step of the run in a workspace: replayed, looked at, and put into a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from runkey import paths
from runkey.data.batch import Window
from runkey.data.index import read_classes
from runkey.data.loader import TrainLoader, build_train_loader
from runkey.errors import TrainingError
from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.model.weights import load_initial_weights
from runkey.params import Params
from runkey.training.debug.bundle import Bundle
from runkey.training.debug.diagnose import Diagnosis, diagnose
from runkey.training.debug.replay import LOG, Start, find_start, logged_losses, replay
from runkey.training.device import choose_device
from runkey.training.distributed import World
from runkey.training.seed import set_up
from runkey.training.setup import Setup, build_setup
from runkey.training.state import host_weights
from runkey.training.tracker import Quiet


@dataclass(frozen=True)
class Debugged:
    """What came of it."""

    diagnosis: Diagnosis
    bundle: Bundle
    start: Start
    """Where the replay began."""
    logged: dict[str, float]
    """The step's losses as they were; empty if that was not logged."""

    @property
    def comparison(self) -> str:
        """Whether the replay is what was, in words; empty if that cannot be told."""
        losses = self.diagnosis.losses
        shared = [name for name in self.logged if name in losses]
        if not shared:
            return ""
        # As text: nan is nan.
        if all(str(self.logged[name]) == str(losses[name]) for name in shared):
            return "the losses are those of the log, to the last digit"
        was = "  ".join(f"{name} {self.logged[name]:.9g}" for name in shared)
        return f"the losses are not those of the log: {was}"


def debug_run(
    folder: Path,
    step: int,
    *,
    key: str,
    params: Params,
    root: Path,
    say: Callable[[str], None],
) -> Debugged:
    """Replay a step of a training that was interrupted, that failed, or that still runs.

    Args:
        folder: of the training; only read.
        step: from 1.
        key: of the run.
        params: of the run.
        root: the workspace, with the prepared data.
        say: told how it goes.

    Raises:
        TrainingError: no checkpoint, no such step, or a damaged file.
        DataError: the data set is not prepared.
    """
    start = find_start(folder, step)
    if start.fingerprint.get("key") != key:
        raise TrainingError(f"{folder}: trained by key {start.fingerprint.get('key')}, not {key}")
    loader = _loader(params, root, int(start.fingerprint["micro_batch"]))
    setup, num_classes = _build(params, root, loader)
    whence = f"{start.path.name}, after step {start.step}" if start.path else "the start"
    say(f"step {step} is replayed from {whence}")
    differing = _differing(start, setup)
    if differing:
        say(f"not bit for bit: {differing}")
    try:
        window = replay(setup, start, step, folder)
        bundle = _bundle(setup, step, key, num_classes, window)
        machinery = setup.machinery
        diagnosis = diagnose(machinery, window, seed=params.seed, step=step - 1)
    finally:
        loader.close()
    log = folder / LOG
    logged = logged_losses(log, step) if log.is_file() else {}
    return Debugged(diagnosis, bundle, start, logged)


def _loader(params: Params, root: Path, micro_batch: int) -> TrainLoader:
    runtime = params.runtime
    return build_train_loader(
        params.data,
        prepared=root / paths.PREPARED,
        root=root,
        seed=params.seed,
        batch_size=params.training.batch_size,
        micro_batch=micro_batch,
        max_objects=params.model.num_queries,
        workers=runtime.workers,
        prefetch=runtime.prefetch,
        pin_memory=runtime.pin_memory,
    )


def _build(params: Params, root: Path, loader: TrainLoader) -> tuple[Setup, int]:
    """The training as it was built at its start, and the number of classes."""
    training = params.training
    device, _ = choose_device(params.runtime.device)
    set_up(params.seed, deterministic=training.deterministic, cpu_threads=training.cpu_threads)
    names = [one.name for one in read_classes(root / paths.PREPARED / "classes.json")]
    model = build_model(params.model, len(names))
    load_initial_weights(model, params.model, names, root)
    setup = build_setup(
        model,
        build_criterion(params.model, len(names)),
        loader,
        lambda _: {},
        params,
        device=device,
        tracker=Quiet(),
        say=lambda _: None,
        world=World(),
    )
    return setup, len(names)


def _differing(start: Start, setup: Setup) -> str:
    """What is not as it was, and moves bits: in words."""
    here = {"device": setup.machinery.device.type, "world_size": 1}
    there = start.fingerprint
    pairs = [f"{name} {there[name]} -> {here[name]}" for name in here if there[name] != here[name]]
    return ", ".join(pairs)


def _bundle(setup: Setup, step: int, key: str, num_classes: int, window: Window) -> Bundle:
    scaler = setup.machinery.precision.scaler
    return Bundle(
        key=key,
        step=step - 1,
        rank=0,
        params=setup.params.model_dump(mode="json"),
        num_classes=num_classes,
        model=host_weights(setup.machinery.model),
        scaler={} if scaler is None else scaler.state_dict(),
        window=window,
        device=setup.machinery.device.type,
        torch_version=str(torch.__version__),
    )
