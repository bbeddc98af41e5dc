"""Checkpoints that travel: send the newest one to the team's server, and go on from one of there.

    receive_checkpoint(claim, params, root)      before the training is built
    with shared_checkpoints(run):                around it

Only a training with a claim on a server shares its checkpoints: on others no machine could take its
key over. A thread sends them; nothing that goes wrong there reaches the training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, get_type_hints

import torch
from torch import nn

from runkey import paths
from runkey.errors import DataError, Interrupted, RegistryError, RunkeyError, StoppedError
from runkey.files import expect, open_plain, parse_json, sync_folder
from runkey.identity.record import POINTER, RunPointer
from runkey.params import Params
from runkey.pipeline.once import KeyClaim
from runkey.registry.checkpoints import (
    Manifest,
    SharedFile,
    SharedFolder,
    newest_shared,
    remove_earlier,
)
from runkey.registry.library import ServerLibrary, open_library
from runkey.tracking.log import check_log
from runkey.training.build import TrainContext, TrainData, build_training
from runkey.training.checkpoint import (
    SHARE,
    Checkpoint,
    DamagedError,
    FolderCheckpoints,
    Interval,
    find_checkpoints,
    newest_files,
    read_facts,
)
from runkey.training.state import LoopState
from runkey.training.tensors import all_finite, named_tensors
from runkey.units import MIB, format_bytes

logger = logging.getLogger(__name__)

_LOG = paths.TRAIN_LOG.name
_PIECE = MIB // 4
"""Bytes that are sent at once."""
_LOOK_SECONDS = 1.0
"""Between two looks for a new checkpoint, once the next one is due."""
_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 30.0, 600.0
"""Before the next attempt after one that failed; twice as long after each further one."""
_LAST_SECONDS = 60.0
"""How long the end of an interrupted training waits for its last checkpoint to be sent."""
_LOWER_PRIORITY = 10
"""By which the sending thread is nicer than the training."""


class _AbandonedError(Exception):
    """The training has ended while a file was being sent."""


class CheckpointSender:
    """Sends the newest checkpoint of a training's folder from time to time, in a thread."""

    def __init__(
        self,
        folder: Path,
        open_place: Callable[[], SharedFolder | None],
        *,
        key: str,
        generation: int,
        seconds: float,
        check: Callable[[], None] = lambda: None,
        on_first: Callable[[], None] = lambda: None,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        """Send nothing yet.

        Args:
            folder: of the training.
            open_place: returns where to send to; None: it is not known yet.
            key: of the training.
            generation: of this process's claim.
            seconds: least time between two sendings.
            check: raises RegistryError if another process has taken the key over.
            on_first: called when the first one has been sent.
            retry_seconds: before the next attempt after one that failed.
        """
        self.folder, self.key, self.generation = folder, key, generation
        self.sent: Manifest | None = None
        """The newest complete one."""
        self.bytes_sent = 0
        self.cost_seconds = 0.0
        """Processor time of the last sending."""
        self.failures = 0
        """Since the last success."""
        self._open_place, self._check, self._on_first = open_place, check, on_first
        self._seconds, self._retry_seconds = seconds, retry_seconds
        self._place: SharedFolder | None = None
        self._number = 0
        self._stored: dict[str, tuple[int, int]] = {}
        """Paths that the server has or may have, with inode and time of the file that was sent."""
        self._last, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="share", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def abandon(self) -> None:
        """Send nothing any more; give up what is being sent."""
        self._abandoned.set()
        self._last.set()
        self._thread.join(5.0)  # one that a silent server keeps waiting ends at its next piece

    def send_last(self, seconds: float = _LAST_SECONDS) -> None:
        """Send the newest checkpoint, and end; give up after so many seconds."""
        found = newest_files(self.folder)
        is_sent = self.sent and found and self.sent.step == found.step
        if found and not is_sent and not self.failures:
            logger.info(
                f"sending the checkpoint of step {found.step} to the server, for at most"
                f" {seconds:.0f} s"
            )
            self._last.set()
            self._thread.join(seconds)
            if not self.failures and (self.sent is None or self.sent.step != found.step):
                logger.warning("it was not sent: no answer in time, or no MLflow run yet")
        self.abandon()

    # What follows runs in the thread.

    def _keep(self) -> None:
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWER_PRIORITY)
        due = time.monotonic() + self._seconds
        while True:
            is_last = self._last.wait(max(due - time.monotonic(), 0.01))
            if self._abandoned.is_set():
                return
            try:
                due = time.monotonic() + self._send_newest()
            except _AbandonedError:
                return
            # Whatever goes wrong here, even a bug of ours, must not reach the training.
            except Exception as error:  # noqa: BLE001
                due = time.monotonic() + self._note_failure(error)
            if is_last:
                return

    def _note_failure(self, error: Exception) -> float:
        """Log the first of several failures; return the seconds to wait."""
        self.failures += 1
        if self.failures == 1:
            had = f"the newest sent is of step {self.sent.step}" if self.sent else "none was sent"
            why = str(error) if isinstance(error, RunkeyError) else f"unexpected {error!r}"
            logger.warning(f"checkpoint not sent to the server: {why}; training goes on, {had}")
        return float(min(self._retry_seconds * 2 ** (self.failures - 1), _LONGEST_RETRY_SECONDS))

    def _send_newest(self) -> float:
        """Send the newest checkpoint, if there is a newer one; return the seconds to wait."""
        look = min(_LOOK_SECONDS, self._seconds) or _LOOK_SECONDS
        found = newest_files(self.folder)
        if found is None or (self.sent and found.step == self.sent.step):
            return look
        self._place = self._place or self._open_place()
        if self._place is None:
            return look
        began = time.thread_time()
        with ExitStack() as opened:
            try:
                files = {
                    name: opened.enter_context(open_plain(self.folder / name))
                    for name in (*found.names, _LOG)
                }
            except FileNotFoundError:  # removed, since there are newer ones
                return look
            self._send(found.step, files)
        self.cost_seconds = time.thread_time() - began
        if self.failures:
            logger.info(f"checkpoints are sent again, now of step {found.step}")
        self.failures = 0
        return max(self._seconds, self.cost_seconds / SHARE)

    def _send(self, step: int, files: Mapping[str, IO[bytes]]) -> None:
        assert self._place
        before, is_first = self.sent, self.sent is None
        self._number += 1
        if is_first:  # what is sent half is found, and deleted
            self._place.tag(f"step {step} of generation {self.generation}")
        known = before.files if before else {}
        listed: dict[str, SharedFile] = {}
        for name, file in files.items():
            status = os.fstat(file.fileno())
            mark = status.st_ino, status.st_mtime_ns
            if name in known and name != _LOG and self._stored[known[name].path] == mark:
                listed[name] = known[name]
                continue
            path = f"g{self.generation}/{self._number:06d}-{name}"
            self._check()
            self._stored[path] = mark
            digest = hashlib.sha256()
            self._place.send(path, self._pieces(file, status.st_size, digest), status.st_size)
            listed[name] = SharedFile(path, status.st_size, digest.hexdigest())
        manifest = Manifest(self.key, self.generation, self._number, step, listed)
        self._check()
        self._stored[manifest.path] = 0, 0
        self._place.finish(manifest)
        self.sent = manifest
        self._place.tag(manifest.label)
        if is_first:
            self._on_first()
            logger.info(
                f"checkpoint of step {step} ({format_bytes(manifest.size)}) sent to the server:"
                " another machine can go on from it"
            )
        self._tidy(manifest, before)

    def _pieces(self, file: IO[bytes], left: int, digest: Any) -> Iterator[bytes]:
        while left:
            if self._abandoned.is_set():
                raise _AbandonedError
            piece = file.read(min(_PIECE, left))
            if not piece:
                raise RegistryError(f"{self.folder}: a file has become shorter")
            digest.update(piece)
            left -= len(piece)
            self.bytes_sent += len(piece)
            yield piece

    def _tidy(self, newest: Manifest, before: Manifest | None) -> None:
        """Delete what neither the newest sending nor the one before it needs."""
        assert self._place
        used = set[str]()
        for manifest in filter(None, (newest, before)):
            used |= {manifest.path, *(file.path for file in manifest.files.values())}
        # Manifests first: none may name a file that is gone.
        unused = sorted(set(self._stored) - used, key=lambda path: not path.endswith(".json"))
        for path in unused:
            with suppress(RegistryError):  # it was never stored, or is deleted at the end
                self._place.remove(path)
            del self._stored[path]


def _library(claim: KeyClaim, params: Params) -> ServerLibrary | None:
    """Return the runs of the server that has this training's claim; None: nothing is shared."""
    if claim.claim is None or not params.runtime.share_checkpoint_minutes:
        return None
    library = open_library(claim.store.uri, claim.store.home)
    return library if isinstance(library, ServerLibrary) else None


@contextmanager
def shared_checkpoints(claim: KeyClaim, params: Params) -> Iterator[CheckpointSender | None]:
    """Send checkpoints while the block runs; if it is interrupted, the last one at its end."""
    library = _library(claim, params)
    if library is None or claim.claim is None:
        yield None
        return
    held, key = claim.claim, claim.claim.claim.key
    generation = held.claim.generation

    def open_place() -> SharedFolder | None:
        run = library.client.run(held.claim.run_id) if held.claim.run_id else None
        return SharedFolder(library.client, run) if run else None

    def remove_others() -> None:
        if generation > 1:
            held.check()
            remove_earlier(library, key, generation)

    sender = CheckpointSender(
        claim.folder,
        open_place,
        key=key,
        generation=generation,
        seconds=60 * params.runtime.share_checkpoint_minutes,
        check=held.check,
        on_first=remove_others,
    )
    sender.start()
    try:
        yield sender
    except (Interrupted, StoppedError, DataError):  # elsewhere or later it can go on
        sender.send_last()
        raise
    finally:
        sender.abandon()


# Resuming from another machine's checkpoint, which anyone who may write to the server can forge.


def receive_checkpoint(claim: KeyClaim, params: Params, root: Path) -> None:
    """Put the newest checkpoint of the team's server in the training's folder, if it is further.

    The caller holds the folder. One that is not whole, not of this key or does not fit is refused
    with one line, and the one before it is tried; without any, training goes on from what is here.
    """
    library = _library(claim, params)
    # Only who takes a key over can find one.
    if library is None or claim.claim is None or claim.claim.claim.generation == 1:
        return
    here = find_checkpoints(claim.folder)
    step = here[0].step if here else 0
    try:
        found = newest_shared(library, claim.claim.claim.key)
    except RegistryError as error:
        logger.warning(f"checkpoints on the server are not looked up: {error}")
        return
    receiving = claim.folder / "receiving"
    for manifest, place in found:
        if manifest.step <= step:
            return
        try:
            shutil.rmtree(receiving, ignore_errors=True)
            receiving.mkdir()
            _receive(manifest, place, receiving, params, root)
            _install(receiving, manifest, claim)
        except (RegistryError, OSError) as error:
            logger.warning(f"checkpoint of {manifest.label} from the server: {error}; not used")
        else:
            logger.info(
                f"checkpoint of {manifest.label} ({format_bytes(manifest.size)}) received from"
                f" {library.place}"
            )
            return
        finally:
            shutil.rmtree(receiving, ignore_errors=True)


def _receive(
    manifest: Manifest, place: SharedFolder, folder: Path, params: Params, root: Path
) -> None:
    """Copy a checkpoint to a folder and check all that is in it; RegistryError names a fault."""
    data = TrainData.read(root, 1)
    # A training like the one to come, to try the checkpoint on: one that failed half-way would
    # leave a mixture behind.
    trial = build_training(params, len(data.class_names), torch.device("cpu"))
    size = sum(t.numel() * t.element_size() for t in trial.step.model.state_dict().values())
    # Model, average and two moments; the same in float32 where the model has less.
    largest = {".ckpt": 8 * size + 64 * MIB, ".pt": 2 * size + 16 * MIB, ".jsonl": 256 * MIB}
    place.receive(manifest, folder, largest)
    try:
        if (folder / _LOG).is_file():
            check_log(folder / _LOG)
        for name in manifest.files:
            if name.endswith(".ckpt"):
                _check_checkpoint(folder / name, manifest.key, trial)
    except (DamagedError, ValueError) as error:
        raise RegistryError(f"{error}; refused") from None
    except Exception as error:  # noqa: BLE001  whatever a hostile file makes torch raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise RegistryError(f"does not fit this training ({text[:200]}); refused") from None


def _check_checkpoint(path: Path, key: str, trial: TrainContext) -> None:
    """Raise whatever error if a checkpoint does not fit the training `trial`, which it changes."""
    facts = read_facts(path)
    fingerprint = expect(dict[str, str | int], facts["fingerprint"])
    micro_batch, best = fingerprint["micro_batch"], facts["best"]
    if type(micro_batch) is not int or not 1 <= micro_batch <= trial.settings.batch_size:
        raise DamagedError(f"{path.name}: its micro_batch is {ascii(micro_batch)[:40]}")
    if best is not None and (Path(best).name != best or not (path.parent / best).is_file()):
        raise DamagedError(f"{path.name}: its best weights are not there")
    for file in filter(None, (path, best and path.parent / best)):
        _check_unpacked(file)
    checkpoint = FolderCheckpoints(path.parent, {"key": key}, interval=Interval(0)).read(path)
    if f"-{checkpoint.step:08d}." not in path.name or checkpoint.state["step"] != checkpoint.step:
        raise DamagedError(f"{path.name}: it is of step {checkpoint.step!r:.40}")
    _check_state(checkpoint, trial)
    scaler = expect(dict[str, float], checkpoint.parts.get("scaler", {}))
    if checkpoint.parts.keys() - {"scaler"} != trial.parts.keys() or len(scaler) > 8:
        raise DamagedError(f"{path.name}: it has other parts than this training")
    for name, part in trial.parts.items():
        if name != "optimizer":
            _check_form(name, part.state_dict(), checkpoint.parts[name])
    _check_optimizer(trial.step.optimizer, checkpoint.parts["optimizer"])
    if checkpoint.best_weights:
        own = trial.evaluated_module.state_dict()
        _check_form("best weights", own, checkpoint.best_weights)
    everything = {"parts": checkpoint.parts, "best": checkpoint.best_weights}
    if not all_finite(tensor for _, tensor in named_tensors(everything)):
        raise DamagedError(f"{path.name}: its weights or moments are not finite")
    trial.restore(checkpoint.parts)


def _check_unpacked(path: Path) -> None:
    """Raise DamagedError if torch would read more from a file than it has: it stores, not packs."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise DamagedError(f"{path.name}: it is packed, which torch's files are not")


def _check_state(checkpoint: Checkpoint, trial: TrainContext) -> None:
    hints = get_type_hints(LoopState)
    named = [(f.name, hints[f.name]) for f in dataclasses.fields(LoopState)]
    plain = dataclasses.make_dataclass("State", [n for n in named if n[0] != "best_weights"])
    parse_json(json.dumps(checkpoint.state), plain)
    state = LoopState.from_plain(checkpoint.state, checkpoint.best_weights)
    state.watched(trial.watched_metric)
    position = expect(dict[str, int], checkpoint.position)
    has_best = bool(checkpoint.best_weights)
    if min(state.step, state.epoch, *position.values()) < 0 or has_best != (state.best is not None):
        raise DamagedError("its state contradicts itself")


def _check_form(name: str, own: Any, given: Any) -> None:
    """Raise DamagedError unless nested values have the same names, types and shapes."""
    fits = isinstance(given, Mapping if isinstance(own, Mapping) else type(own))
    if fits and isinstance(own, torch.Tensor):
        fits = (own.shape, own.dtype) == (given.shape, given.dtype) and 0 not in given.stride()
    elif fits and isinstance(own, Mapping):
        fits = own.keys() == given.keys()
    if not fits:
        raise DamagedError(f"{name}: another shape, type or other names than in this training")
    for key in own if isinstance(own, Mapping) else ():
        _check_form(f"{name}.{key}", own[key], given[key])


def _check_optimizer(optimizer: torch.optim.Optimizer, given: Mapping[str, Any]) -> None:
    """Raise DamagedError unless the moments have the shapes of their parameters."""
    own = optimizer.state_dict()["param_groups"]
    groups = [{n: v for n, v in group.items() if n != "lr"} for group in given["param_groups"]]
    if groups != [{n: v for n, v in group.items() if n != "lr"} for group in own]:
        raise DamagedError("optimizer: other groups than in this training")
    for group in given["param_groups"]:
        expect(float, group["lr"])
    parameters: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
    for index, moments in given["state"].items():
        for name, value in moments.items():
            expected = (torch.Size(), parameters[index].shape)
            if not isinstance(value, torch.Tensor) or value.shape not in expected:
                raise DamagedError(f"optimizer: {ascii(name)[:40]} of another shape")


def _install(received: Path, manifest: Manifest, claim: KeyClaim) -> None:
    """Move the files of a checked checkpoint to the training's folder, the checkpoint last.

    The training gets an MLflow run of its own, with the whole log: positions in a log that was here
    before are not those in the received one.
    """
    if (pointer := RunPointer.read(claim.folder)) and pointer.run_id:
        claim.superseded = (*claim.superseded, pointer.run_id)
    (claim.folder / POINTER).unlink(missing_ok=True)
    for name in sorted(manifest.files, key=lambda one: (one.endswith(".ckpt"), one)):
        with (received / name).open("rb") as file:
            os.fsync(file.fileno())
        (received / name).replace(claim.folder / name)
    sync_folder(claim.folder)
