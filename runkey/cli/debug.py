"""`runkey debug-step [KEY | BUNDLE]`: replay one step, and find where its numbers went wrong."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runkey.cli import output
from runkey.cli.output import AsJson, print_json
from runkey.errors import TrainingError
from runkey.identity.key import ANY_SCHEMA, SCHEMAS
from runkey.progress import log_to_terminal

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from runkey.training.debug.replay import Diagnosis


def debug_step(
    run: Annotated[
        str,
        typer.Argument(
            help="Key of a training in this checkout that has not ended well, or a bad-step-*.pt; "
            "nothing: the key of this workspace."
        ),
    ] = "",
    step: Annotated[
        int | None, typer.Option(help="Optimizer step, from 1; nothing: the latest bad one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the bundle goes; nothing: the training's folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a step; name the first module that made NaN or inf out of finite numbers.

    The step is computed from the checkpoint before it, with the same images, noise and weights.
    A bundle is written, bad-step-STEP.pt, with which another machine replays it without data set
    and checkpoint.
    """
    if run.endswith(".pt"):
        _from_bundle(Path(run), as_json=as_json)
    else:
        _from_folder(run, step, out, as_json=as_json)


def _from_bundle(path: Path, *, as_json: bool) -> None:
    import torch

    from runkey.training.debug.replay import Bundle

    bundle = Bundle.read(path)
    diagnosis = bundle.diagnose()
    if as_json:
        print_json(_as_dict(diagnosis, bundle.step + 1, path))
        return
    print(f"step {bundle.step + 1} of key {bundle.key[:12]}, from {path}")
    if bundle.torch_version != torch.__version__:
        print(f"torch {bundle.torch_version} -> {torch.__version__}: not bit for bit")
    _print(diagnosis)


def _from_folder(run: str, step: int | None, out: Path | None, *, as_json: bool) -> None:
    from runkey import paths
    from runkey.identity.key import make_recipe
    from runkey.params import load_params
    from runkey.training.debug.replay import bad_steps, debug_run

    root, home = output.workspace(), output.store().home
    params = load_params(root / paths.PARAMS)
    own = make_recipe("train", root, params).key
    folder = _folder(home, run or own)
    key = folder.name.partition("-repeats-")[0]
    if not as_json:
        log_to_terminal()
    if key != own:
        logger.warning(f"code, parameters or data here are not those of {key[:12]}: key {own[:12]}")
    if step is None:
        step = next(reversed(bad_steps(folder)), None)
    if step is None:
        raise TrainingError(f"{folder}: tells of no bad step; name one with --step")
    debugged = debug_run(folder, step, key=key, params=params, root=root)
    path = out or folder / f"bad-step-{step}.pt"
    debugged.bundle.write(path)
    if as_json:
        print_json(_as_dict(debugged.diagnosis, step, path))
        return
    _print(debugged.diagnosis)
    if debugged.comparison:
        print(debugged.comparison)
    print(f"replay it elsewhere: runkey debug-step {path}")


def _folder(home: Path, key: str) -> Path:
    """The one training folder whose key begins so."""
    found = sorted(
        path for path in home.glob(f"{ANY_SCHEMA}-*") if path.is_dir() and _fits(path.name, key)
    )
    if len(found) > 1 and (home / key).is_dir():
        return home / key
    if len(found) == 1:
        return found[0]
    several = f"several trainings: {', '.join(path.name for path in found)}"
    raise TrainingError(
        f"{home}: {several if found else 'holds no training'} of key {key}"
        + ("" if found else "; one that ended well leaves nothing to replay")
    )


def _fits(name: str, key: str) -> bool:
    return name.startswith((key, *(f"{schema}-{key}" for schema in SCHEMAS)))


def _print(diagnosis: Diagnosis) -> None:
    print("\n".join(diagnosis.finding.lines()))
    print("  ".join(f"{name} {value:.6g}" for name, value in diagnosis.losses.items()))


def _as_dict(diagnosis: Diagnosis, step: int, bundle: Path) -> dict[str, object]:
    return {
        "step": step,
        "finding": diagnosis.finding.as_dict(),
        "losses": diagnosis.losses,
        "bundle": str(bundle),
    }
