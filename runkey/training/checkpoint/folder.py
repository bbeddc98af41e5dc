"""The checkpoints in a training's folder, written and read at once; `keeper` does it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from runkey.training.checkpoint.content import Content
from runkey.training.checkpoint.file import (
    TEMPORARY,
    DamagedError,
    give_name,
    read_facts,
    read_file,
    sync_folder,
    temporary_name,
    write_temporary,
)
from runkey.training.checkpoint.names import BAD, Saved, best_name, find_saved, obsolete

Fingerprint = Mapping[str, str | int]
"""What trains: `key`, `micro_batch`, `world_size`, `device` (cpu, cuda), `precision`."""

_FACTS = {"step", "fingerprint", "best", "best_hash"}


class CheckpointFolder:
    """Files `step-*.ckpt`, `anchor-*.ckpt`, `best-*.pt`.  One process writes, see `locked`."""

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        """Args: path: the folder.  fingerprint: another `key` is refused, the rest only told."""
        self.path = path
        self._fingerprint = dict(fingerprint)
        self._best: tuple[Mapping[str, Tensor], str, str] | None = None
        """Best weights that are on disk, name and hash of their file."""

    def clear(self) -> None:
        """Remove what a killed process has left half written.

        Raises:
            OSError: the folder cannot be written.
        """
        for path in self.path.glob("*" + TEMPORARY):
            path.unlink()

    def write(self, saved: Saved, tensors: Any, best: Mapping[str, Tensor], best_step: int) -> None:
        """Write a checkpoint, the best weights first if they are new; remove what may go.

        Args:
            saved: which.
            tensors: `state`, `parts` and `position` of a `Content`.
            best: its best weights; empty: none yet.
            best_step: the step that they are of.

        Raises:
            OSError: it cannot be written; what was there still is.
        """
        if best and (self._best is None or self._best[0] is not best):
            self._best = best, *self._write_best(best, best_step)
        name, digest = self._best[1:] if best and self._best else (None, None)
        facts = {
            "step": saved.step,
            "fingerprint": self._fingerprint,
            "best": name,
            "best_hash": digest,
        }
        path = self.path / saved.name
        write_temporary(path, facts, tensors)
        give_name(path)
        self._remove_obsolete()

    def _write_best(self, best: Mapping[str, Tensor], step: int) -> tuple[str, str]:
        """Name and hash of the file, which is named for its content: it never changes."""
        unnamed = self.path / "best.pt"
        digest = write_temporary(unnamed, {"key": self._fingerprint["key"]}, dict(best))
        name = best_name(step, digest)
        temporary_name(unnamed).replace(self.path / name)
        sync_folder(self.path)
        return name, digest

    def _remove_obsolete(self) -> None:
        saved = find_saved(self.path)
        for one in obsolete(saved):
            (self.path / one.name).unlink()
        used = {self._best[1]} if self._best else set()
        for one in set(saved) - set(obsolete(saved)):
            with suppress(DamagedError):  # it can be of no use, nor what it names
                used.add(read_facts(self.path / one.name)["best"])
        for path in self.path.glob("best-*.pt"):
            if path.name not in used:
                path.unlink()

    def newest(self, wanted: Callable[[Saved], bool], say: Callable[[str], None]) -> Content | None:
        """The newest checkpoint that is whole and of this key; None: there is none.

        Args:
            wanted: which to look at.
            say: told, in one line each, which could not be used, and why.
        """
        for saved in filter(wanted, find_saved(self.path) if self.path.is_dir() else []):
            path = self.path / saved.name
            try:
                return self._read(saved)
            except DamagedError as error:
                say(f"{path}: {error}; the one before it is used, if there is one")
                # Else it would count as one of the two newest, which are kept.
                with suppress(OSError):
                    path.rename(path.with_name(path.name + BAD))
        return None

    def _read(self, saved: Saved) -> Content:
        facts, tensors, _ = read_file(self.path / saved.name)
        if not facts.keys() >= _FACTS:
            raise DamagedError("it is another kind of file")
        theirs = facts["fingerprint"]
        if theirs["key"] != self._fingerprint["key"]:
            raise DamagedError(f"it is of another key, {theirs['key']}")
        best: dict[str, Tensor] = {}
        if facts["best"]:
            best = self._read_best(facts["best"], facts["best_hash"])
            self._best = best, facts["best"], facts["best_hash"]
        return Content(
            step=saved.step,
            state=tensors["state"],
            parts=tensors["parts"],
            position=tensors["position"],
            best_weights=best,
            changes=_changes(theirs, self._fingerprint),
        )

    def _read_best(self, name: str, digest: str) -> dict[str, Tensor]:
        try:
            _, weights, found = read_file(self.path / name)
        except DamagedError as error:
            raise DamagedError(f"its best weights, {name}: {error}") from error
        if found != digest:
            raise DamagedError(f"its best weights, {name}, are others than were written")
        return dict(weights)


def newest_fingerprint(path: Path) -> Fingerprint | None:
    """What trained the newest checkpoint in a folder that can be read; None: there is none.

    Cheap and unchecked: for what has to be decided before a training can be built.
    """
    for saved in find_saved(path) if path.is_dir() else []:
        with suppress(DamagedError, KeyError):
            fingerprint: Fingerprint = read_facts(path / saved.name)["fingerprint"]
            return fingerprint
    return None


def _changes(theirs: Fingerprint, ours: Fingerprint) -> str:
    """`micro_batch 4 -> 2, device cpu -> cuda`; empty if all is the same."""
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    return ", ".join(f"{name} {theirs.get(name)} -> {ours[name]}" for name in differing)
