"""Once per key: whether the train stage trains, or reuses the result of a finished run.

    with once(params, root, recipe) as claim:
        if claim is not None:
            train(...)                  # else the stage's outputs are in place

Nothing here imports torch or mlflow.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from runkey import paths
from runkey.errors import (
    RecipeError,
    RegistryError,
    RunkeyError,
    TrackingError,
    TrainingError,
)
from runkey.files import copy_atomically
from runkey.identity.dvc_yaml import covers, read_pipeline
from runkey.identity.inputs import Inputs, check_unchanged
from runkey.identity.key import Recipe, short_key, training_folder
from runkey.identity.record import (
    REPRODUCES,
    REPRODUCES_SINCE,
    Details,
    LoggedRun,
    Record,
    RunPointer,
    this_host,
)
from runkey.identity.record_cache import update_record
from runkey.params import Params
from runkey.registry.checkpoints import remove_all
from runkey.registry.claims import open_claims
from runkey.registry.dvc_cache import download
from runkey.registry.library import Library, NotStoredError, ServerLibrary, open_library
from runkey.registry.once import Decision, HeldClaim, decide
from runkey.registry.package import note_taken, read_run, staging
from runkey.registry.rest import RestClient
from runkey.registry.snapshot import take_snapshot
from runkey.tracking.replay import clear_training, read_end, send_saved
from runkey.tracking.store import Store, locate_store, set_tag
from runkey.training.lock import locked

logger = logging.getLogger(__name__)

# Reuse: a finished run's outputs in place of a training.


def reuse_own(
    library: Library, record: Record, root: Path, store: Store, params: Params, line: str
) -> None:
    """Put the outputs of a run of this store in the workspace, and note the reuse on the run.

    Raises RegistryError, and puts nothing anywhere, if a file is missing, is not what was recorded,
    or is none of the stage's outputs.
    """
    download(library, record, _outputs(record, root, params), root)
    note = f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} on {this_host()}: {line}"
    try:
        set_tag(store, record.run.run_id, "reused", note, RestClient(store.uri).post)
        tags = dict(sorted((record.run.tags | {"reused": note}).items()))
        update_record(store.cache, replace(record.run, tags=tags))
    except (TrackingError, RegistryError, OSError) as error:
        logger.warning(f"the reuse is not noted on its run: {error}")


def reuse_teams(team: Library, record: Record, root: Path, store: Store, params: Params) -> None:
    """Put the outputs of a run of the team's server in the workspace, and copy the run here.

    Files are checked as by `runkey fetch`. Raises as `reuse_own`, also if one could run code, and
    TrackingError if MLflow refuses.
    """
    # Imported here: mlflow's import takes longer than the rest of a reuse.
    from runkey.tracking.describe import committed_params
    from runkey.tracking.transfer import StoreRuns

    experiment = params.runtime.experiment
    outputs = _outputs(record, root, params)
    with staging(store.home, "reuse") as folder:
        runs = StoreRuns(Store(team.place, None, store.home), experiment)
        package = read_run(runs, record, folder, f"{record.label} of {team.place}")
        if package.details.outputs != outputs:
            raise RegistryError(f"{record.label}: its record changed while it was read")
        for path in outputs:
            copy_atomically(package.files / path, root / path)
        note_taken(package, f"reused from {team.place}")
        StoreRuns(store, experiment, committed_params(root)).write(package.run)


def _outputs(record: Record, root: Path, params: Params) -> list[str]:
    """List the files of a run to put in place; a record from a server cannot name any other."""
    assert record.details
    stage = read_pipeline(root, params.flat())[record.details.stage]
    for path in record.details.outputs:
        if ".." in path.split("/") or not any(covers(out, path) for out in stage.outs):
            raise RegistryError(f"{record.label}: {path}: no output of the stage {stage.name}")
    for out in stage.outs:  # a log that lost lines is not kept
        if out != paths.LOGS.as_posix() and not any(covers(out, p) for p in record.details.outputs):
            raise RegistryError(
                f"{record.label}: its record has no {out}, which {stage.name} writes"
            )
    return record.details.outputs


@dataclass
class KeyClaim:
    """The right to train a key, and what is known when training begins."""

    store: Store
    inputs: Inputs
    claim: HeldClaim | None
    """The claim in the store; None if nothing is recorded, or no claim could be made."""
    folder: Path
    """Of this training: checkpoints, log, and what MLflow lacks."""
    why: str
    """The decision to train, in one line."""
    snapshot: str | None
    """Git commit of the tree that runs."""
    superseded: tuple[str, ...] = ()
    """MLflow runs of dead owners of the claim."""
    repeats: Record | None = None
    """The run that is reproduced."""
    is_whole: bool = field(default=False, init=False)
    """Whether the run is recorded completely; set when training has ended well."""
    details: Details | None = field(default=None, init=False)
    """Set when training has ended well."""

    def changed(self, run: LoggedRun) -> None:
        """Update the record of a run that MLflow has changed; called from the tracker's thread."""
        own = run.run_id not in self.superseded
        update_record(self.store.cache, run, self.details if own else None)
        if own and self.claim:
            self.claim.set_run(run.run_id)

    def check(self) -> None:
        """Raise RegistryError if another process has taken the key over."""
        if self.claim:
            self.claim.check()


@contextmanager
def once(params: Params, root: Path, recipe: Recipe) -> Iterator[KeyClaim | None]:
    """Claim the key for this process; yield None if a result is reused, which is in place then.

    Raises RegistryError if another process trains the key and `runtime.wait` is false, or if a file
    that the run needs cannot be kept with it; RecipeError if the inputs are not what the key says.
    """
    store, label = locate_store(), f"key {short_key(recipe.key)}"
    inputs = Inputs(root, params, recipe, store.home)
    inputs.check()
    library = open_library(store.uri, store.home) if params.runtime.mlflow else None
    repeats = _to_repeat(library, recipe.key) if library else None
    first = repeats.run.run_id if repeats else None
    folder = training_folder(store.home, recipe.key, first)
    decision: Decision | None
    if library and not first:
        if params.runtime.reuse:
            _send_saved(store, folder, label)
        decision = _reuse_or_train(params, root, recipe, store, library)
    elif library and (repeat := _earlier_repeat(library, recipe.key, first)):
        line = f"{label}: run {repeat.run.run_id[:8]}, recorded before the interruption, is taken"
        logger.info(line)
        reuse_own(library, repeat, root, store, params, line)
        decision = None
    else:
        how = "without looking for a run (runtime.mlflow is false)"
        if first:
            how = f"again to compare with run {first[:8]}"
        decision = Decision(line=f"{label}: trained {how}")
        logger.info(decision.line)
    if decision is None:
        yield None
        return
    with decision.claim or nullcontext() as held:
        snapshot = take_snapshot(root, paths.store_root(), recipe) if library else None
        if library and not snapshot:
            logger.warning(
                f"{root}: not a git repository, so no snapshot keeps the code of this run, and it"
                " cannot be reproduced; `git init` before the next one"
            )
        # The runs of dead owners, without the one that this training continues.
        pointer = RunPointer.read(folder)
        if pointer is None and decision.superseded:
            pointer = RunPointer.restore(folder, store.uri, decision.superseded[-1])
        dead = tuple(r for r in decision.superseded if pointer is None or r != pointer.run_id)
        claim = KeyClaim(store, inputs, held, folder, decision.line, snapshot, dead, repeats)
        yield claim
        if held:
            held.finish()
    _clear(claim)
    if held and claim.is_whole and isinstance(library, ServerLibrary):
        _remove_shared(library, recipe.key)
    try:
        check_unchanged(root, recipe)
        inputs.check()
    except RunkeyError as error:
        # DVC would note the result in dvc.lock for the files as they are now.
        raise RecipeError(
            f"{error}; the run is recorded under {short_key(recipe.key)}, and this stage ends here,"
            " since DVC would take its result for that of the files as they are now: run it again"
        ) from None


def _send_saved(store: Store, folder: Path, label: str) -> None:
    """Send a training that ended while MLflow was away, so that it is found and not repeated."""
    try:
        ended = read_end(folder)
        if ended and ended.status == "FINISHED":
            logger.info(f"{label}: trained before, while MLflow was away; sending it")
            send_saved(store, folder)
    except (TrackingError, TrainingError, RecipeError) as error:
        logger.warning(f"{error}")


def _clear(claim: KeyClaim) -> None:
    """Remove what only an interrupted training needs; keep what MLflow lacks."""
    try:
        with locked(claim.folder):
            clear_training(claim.folder, everything=claim.is_whole)
    except (TrainingError, OSError) as error:  # another process trains there; a read-only folder
        logger.info(f"{claim.folder}: not removed ({error})")


def _remove_shared(library: ServerLibrary, key: str) -> None:
    """Delete the key's checkpoints from the server: its run is recorded."""
    try:
        remove_all(library, key)
    except RegistryError as error:
        logger.warning(f"checkpoints on the server stay there: {error}; `runkey gc` names them")


def _reuse_or_train(
    params: Params, root: Path, recipe: Recipe, store: Store, library: Library
) -> Decision | None:
    """Decide to train; None if a result is reused, whose files are in place then."""
    claims = open_claims(store.uri, store.home)
    team = params.runtime.team_server
    is_other = team != "none" and team.rstrip("/") != store.uri.rstrip("/")
    elsewhere = (open_library(team, store.home),) if is_other else ()
    damaged: set[str] = set()

    def check_writes() -> None:
        if params.runtime.require_claim and store.is_server:
            RestClient(store.uri).check_writes(params.runtime.experiment)

    while True:
        decision = decide(
            library,
            claims,
            recipe.key,
            reuse=params.runtime.reuse,
            wait=params.runtime.wait,
            elsewhere=elsewhere,
            not_this=damaged,
            require=params.runtime.require_claim,
            before_claim=check_writes,
        )
        logger.info(decision.line)
        if decision.record is None:
            return decision
        assert decision.library
        try:
            if decision.library is library:
                reuse_own(library, decision.record, root, store, params, decision.line)
            else:
                reuse_teams(decision.library, decision.record, root, store, params)
        except (RegistryError, TrackingError) as error:
            if params.runtime.require_claim and _is_away(decision.library, decision.record):
                way_out = "try again when it is up; runtime.reuse: false trains it again"
                raise RegistryError(f"{error}; not reused: {way_out}") from None
            logger.warning(f"{error}; not reused")
            damaged.add(decision.record.run.run_id)
        else:
            return None


def _is_away(library: Library, record: Record) -> bool:
    """Return True if a server does not say whether it has a run's files: they may be whole."""
    try:
        with library.open_file(record, paths.RUN_JSON.as_posix()):
            return False
    except NotStoredError:
        return False
    except RegistryError:
        return isinstance(library, ServerLibrary)


def _to_repeat(library: Library, key: str) -> Record | None:
    """Find the run that `runkey reproduce` wants repeated."""
    wanted = os.environ.get(REPRODUCES)
    if not wanted:
        return None
    for record in library.matching(key):
        if record.run.run_id == wanted:
            return record
    raise RegistryError(f"{REPRODUCES}: run {wanted} of key {key} is not in {library.place}")


def _earlier_repeat(library: Library, key: str, first: str | None) -> Record | None:
    """Return the whole run that an interrupted reproduction of the run `first` recorded."""
    since = int(os.environ.get(REPRODUCES_SINCE) or sys.maxsize)
    found = [r for r in library.matching(key) if r.reproduction_of == first]
    recent = [r for r in found if r.run.status == "FINISHED" and r.run.started_ms >= since]
    return next((r for r in map(library.with_details, recent) if r.is_whole), None)
