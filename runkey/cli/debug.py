"""`runkey debug-step`, `debug-images`: look into a training.

`debug-step [KEY | BUNDLE]` replays one step, and finds where its numbers went wrong; `debug-images`
draws the augmented images of an epoch.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from runkey import paths
from runkey.cli import output
from runkey.cli.output import AsJson
from runkey.errors import TrainingError
from runkey.identity.key import make_recipe, split_training
from runkey.progress import log_to_terminal, say

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from runkey.training.debug import Bundle


def debug_step(
    run: Annotated[
        str,
        Argument(
            help="Key of a training in this checkout that has not ended well, or a bad-step-*.pt; "
            "nothing: the key of this workspace."
        ),
    ] = "",
    step: Annotated[
        int | None, Option(help="Optimizer step, from 1; nothing: the latest bad one.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="Where the bundle goes; nothing: the training's folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a step; name the first module that made NaN or inf out of finite numbers.

    The step is computed from the checkpoint before it, with the same images, noise and weights.
    A bundle is written, bad-step-STEP.pt, with which another machine replays it without data set
    and checkpoint.
    """
    import torch

    from runkey.training.debug import Bundle, compare_with_log, diagnose_bundle, logged_losses

    folder = None
    if run.endswith(".pt"):
        path = Path(run)
        bundle = Bundle.read(path)
    else:
        folder, bundle = _replayed(run, step, quiet=as_json)
        path = out or folder / f"bad-step-{bundle.step + 1}.pt"
        bundle.write(path)
    number, diagnosis = bundle.step + 1, diagnose_bundle(bundle)
    if as_json:
        output.print_json({"step": number, **asdict(diagnosis), "bundle": str(path)})
        return
    if folder is None:
        say(f"step {number} of key {bundle.key[:12]}, from {path}")
        if bundle.torch_version != torch.__version__:
            say(f"torch {bundle.torch_version} -> {torch.__version__}: not bit for bit")
    say(*diagnosis.finding.lines())
    say("  ".join(f"{name} {value:.6g}" for name, value in diagnosis.losses.items()))
    if folder is not None:
        log = folder / paths.TRAIN_LOG.name
        if comparison := compare_with_log(diagnosis.losses, logged_losses(log, number)):
            say(comparison)
        say(f"replay it elsewhere: runkey debug-step {path}")


def debug_images(
    epoch: Annotated[int, Option(min=1, help="Epoch, from 1.")] = 1,
    out: Annotated[Path, Option(help="JPEG to write.")] = Path("training-images.jpg"),
    as_json: AsJson = False,
) -> None:
    """Draw training images with their boxes as params.yaml has them augmented.

    They are the first batches of that epoch: the same images, pixels and boxes that a training with
    these parameters gets. `dvc repro prepare` must have run.
    """
    from runkey.data.index import read_classes
    from runkey.data.loader import build_train_loader
    from runkey.params import load_params
    from runkey.plots.sheets import training_sheet

    root = output.workspace()
    params = load_params(root / paths.PARAMS)
    # In this process: a few images are not worth starting others.
    runtime = params.runtime.model_copy(update={"workers": 0})
    params = params.model_copy(update={"runtime": runtime})
    classes = read_classes(root / paths.PREPARED / "classes.json")
    loader = build_train_loader(params, root, params.training.batch_size)
    batches = (batch for step in loader.epoch(epoch - 1) for batch in step)
    training_sheet(batches, classes, out, total=len(loader.sampler.ids), epoch=epoch)
    output.print_answer(
        {"epoch": epoch, "picture": str(out)},
        f"training images of epoch {epoch}, with their boxes: {out}",
        as_json=as_json,
    )


def _replayed(run: str, step: int | None, *, quiet: bool) -> tuple[Path, Bundle]:
    """Replay a training of this checkout up to a step; return its folder, and that step."""
    from runkey.params import load_params
    from runkey.training.debug import bad_steps, build_bundle

    root = output.workspace()
    params = load_params(root / paths.PARAMS)
    own = make_recipe("train", root, params).key
    folder = _folder(run or own)
    key, _ = split_training(folder)
    if not quiet:
        log_to_terminal()
    if key != own:
        logger.warning(f"code, parameters or data here are not those of {key[:12]}: key {own[:12]}")
    if step is None and (step := next(reversed(bad_steps(folder)), None)) is None:
        raise TrainingError(f"{folder}: tells of no bad step; name one with --step")
    return folder, build_bundle(folder, step, key=key, params=params, root=root)


def _folder(key: str) -> Path:
    """The one training folder whose key begins so."""
    home, found = output.store().home, output.trainings(key)
    if home / key in found:
        return home / key
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise TrainingError(f"{home}: several trainings: {names} of key {key}")
    raise TrainingError(
        f"{home}: holds no training of key {key}; one that ended well leaves nothing to replay"
    )
