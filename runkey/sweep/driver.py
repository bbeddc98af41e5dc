"""The driver of a sweep: find what is finished, start the rest, each key once, and keep the record.

Nothing has to be remembered between two starts: finished keys are found in the store, keys that
others train are waited for, and dead ones go on from their checkpoints.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from runkey.errors import TRY_ELSEWHERE, RegistryError, TrainingError
from runkey.identity.key import ANY_KEY, Recipe, make_recipe, training_folder, with_params
from runkey.identity.record import Record
from runkey.params import Params
from runkey.params.load import as_text, override
from runkey.paths import TRAIN_LOG
from runkey.plots.log import GrowingLog
from runkey.registry.claims import newest, open_claims, state_now
from runkey.sweep.executor import Executor, Trial
from runkey.sweep.space import Point, as_changes
from runkey.sweep.trial import AP, Place, finished
from runkey.training.lock import holder_of

logger = logging.getLogger(__name__)

State = Literal["finished", "elsewhere", "waiting", "running", "failed", "pruned"]
_POLL_SECONDS = 1.0
_RETRY_SECONDS = 15.0
_MOST_TRIES = 3
"""Of a trial that ends with code 75 and that no other process trains."""
_VAL_AP = "val/AP"
_SPEED_FREE = ("lr", "seed", "optimizer.", "schedule.", "training.epochs", "training.early_", "key")
"""Beginnings of parameters that do not change how long an epoch takes."""


@dataclass
class Entry:
    """A point of a sweep, and what is known of its training."""

    point: Point
    params: Params
    trial: Trial
    state: State = "waiting"
    ap: float | None = None
    """Of the finished run."""
    note: str = ""
    """Why it failed or was pruned, or who trains it."""
    tries: int = 0
    retry_at: float = 0.0
    """By the monotonic clock, seconds."""
    epoch: int = 0
    curve: dict[int, float] = field(default_factory=dict)
    """val AP by epoch, as far as it was trained here."""
    log: GrowingLog | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """Of the training."""
        return self.trial.key

    @property
    def val_ap(self) -> float | None:
        """At the last evaluation."""
        return self.curve[max(self.curve)] if self.curve else None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be done."""
        return self.state in ("finished", "failed", "pruned")

    def as_dict(self) -> dict[str, Any]:
        """Format for the record of a sweep."""
        return {
            "point": self.point,
            "key": self.key,
            "state": self.state,
            "AP": self.ap,
            "val_AP": self.val_ap,
            "epoch": self.epoch,
            "note": self.note,
        }


class Source(Protocol):
    """What proposes the points of a sweep."""

    @property
    def count(self) -> int:
        """Return the most points."""

    def propose(self, entries: Sequence[Entry]) -> Point | None:
        """Return the next point, given those before it; None: no more."""

    def is_hopeless(self, entry: Entry, entries: Sequence[Entry]) -> bool:
        """Return True if a running training should be ended, by its evaluations so far."""


@dataclass
class FixedPoints:
    """The points of a grid, a list or a random draw."""

    points: list[Point]

    @property
    def count(self) -> int:
        """See `Source`."""
        return len(self.points)

    def propose(self, entries: Sequence[Entry]) -> Point | None:
        """See `Source`."""
        return self.points[len(entries)] if len(entries) < len(self.points) else None

    def is_hopeless(self, entry: Entry, entries: Sequence[Entry]) -> bool:  # noqa: ARG002
        """See `Source`."""
        return False


Bound = Callable[[Params, str], int | None]
"""Parameters and key to the most bytes that the training takes; TrainingError: it never fits."""


class Sweep:
    """The points of a sweep, and their trainings."""

    def __init__(
        self,
        place: Place,
        commit: str,
        recipe: Recipe,
        params: Params,
        source: Source,
        bound: Bound = lambda *_: None,
        begun: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Start nothing yet.

        Args:
            place: this checkout and its store.
            commit: the snapshot that is trained.
            recipe: of the snapshot.
            params: of the snapshot.
            source: of the points.
            bound: of the memory of a training.
            begun: the points of an earlier process, as its record has them.
        """
        self.place, self.commit, self.source = place, commit, source
        self.entries: list[Entry] = []
        """One for each point so far; points of the same key share nothing but the run."""
        self._recipe, self._params, self._bound, self._begun = recipe, params, bound, begun
        self._claims = open_claims(place.store.uri, place.store.home)

    def extend(self, most: int) -> list[Entry]:
        """Take points of the source until `most` are not over; return the new ones.

        Raises ParamsError for a point that params.yaml does not allow.
        """
        new = []
        while sum(not one.is_over for one in self.entries) < most:
            point = self.source.propose(self.entries)
            if point is None:
                break
            new.append(self._entry(point))
            self.entries.append(new[-1])
        return new

    def _entry(self, point: Point) -> Entry:
        root = self.place.root
        params = override(self._params, point)
        if params.data.path == self._params.data.path:
            recipe = with_params(self._recipe, root, params, root)
        else:
            recipe = make_recipe(self._recipe.stage, root, params, root)
        entry = Entry(point, params, Trial(recipe.key, self.commit, as_changes(point)))
        self.look(entry)
        number = len(self.entries)
        then = self._begun[number] if number < len(self._begun) else {}
        if entry.state == "waiting" and then.get("key") == entry.key and then["state"] == "pruned":
            entry.state, entry.note, entry.epoch = "pruned", then["note"], then["epoch"]
            entry.curve = {entry.epoch: then["val_AP"]}
        try:
            if not entry.is_over:
                self._bound(params, entry.key)
        except TrainingError as error:
            entry.state, entry.note = "failed", str(error)
        return entry

    def peak(self, key: str) -> int | None:
        """Return the bound of a running training's memory, as soon as it is predicted."""
        params = next(one.params for one in self.entries if one.key == key)
        with suppress(TrainingError):  # the trial says it
            return self._bound(params, key)
        return None

    def look(self, entry: Entry) -> None:
        """Read from the store what has become of a training that does not run here."""
        if record := finished(self.place.library, entry.key):
            entry.state, entry.ap, entry.note = "finished", record.run.metrics[AP], ""
            return
        entry.state, entry.note = "waiting", ""
        claim = newest(self._claims, entry.key)
        if claim and claim.state == "running" and state_now(claim) != "dead":
            entry.state, entry.note = "elsewhere", claim.line
        elif (holder := holder_of(self.place.folder(entry.key))) is not None:
            entry.state, entry.note = "elsewhere", f"process {holder} prepares it"

    def run(self, executor: Executor, changed: Callable[[Entry], object]) -> None:
        """Train what is not finished; `changed` is called with each entry that changes."""
        running: dict[str, Entry] = {}
        while True:
            for one in executor.poll():
                entry = running.pop(one.key)
                self._end(entry, one.code, one.said)
                changed(entry)
            for entry in running.values():
                if self._follow(entry):
                    changed(entry)
                    if self.source.is_hopeless(entry, self.entries):
                        entry.state, entry.note = "pruned", f"val AP {entry.val_ap:.3f}"
                        executor.cancel(entry.key)
            for entry in self.extend(executor.capacity()):
                changed(entry)
            self._start(executor, running, changed)
            if not running and all(entry.is_over for entry in self.entries):
                return
            time.sleep(_POLL_SECONDS)

    def _start(
        self, executor: Executor, running: dict[str, Entry], changed: Callable[[Entry], object]
    ) -> None:
        """Submit what there is room for; those that others train last, to wait for their result."""
        now = time.monotonic()
        ready = [e for e in self.entries if e.state == "waiting" and e.retry_at <= now]
        nothing_else = not ready and not any(e.state == "running" for e in self.entries)
        if nothing_else:
            ready = [e for e in self.entries if e.state == "elsewhere"]
        ready.sort(key=lambda entry: -(self.peak(entry.key) or 0))  # the largest first
        for entry in ready:
            if entry.key in running:
                continue
            bound = self.peak(entry.key)
            trial = replace(entry.trial, peak_bytes=bound, wait=nothing_else)
            if not executor.has_room(trial):
                continue
            executor.submit(trial)
            running[entry.key] = entry
            if not nothing_else:
                entry.state, entry.note = "running", ""
                entry.log = GrowingLog(self._log_file(entry.key))
                changed(entry)

    def _log_file(self, key: str) -> Path:
        return training_folder(self.place.store.home, key) / TRAIN_LOG.name

    def _follow(self, entry: Entry) -> bool:
        """Read how far a training here is; return True if it was evaluated since."""
        if entry.log is None or entry.state != "running":
            return False
        with suppress(OSError):  # not begun, or recorded just now
            entry.log.update()
        entry.epoch, before = len(entry.log.log.epochs), len(entry.curve)
        for epoch, one in enumerate(entry.log.log.epochs, 1):
            if math.isfinite(score := one.values.get(_VAL_AP, math.nan)):
                entry.curve[epoch] = score
        return len(entry.curve) > before

    def _end(self, entry: Entry, code: int, said: str) -> None:
        """Note how a trial ended, on every point of its key."""
        if entry.state == "pruned":
            return
        entry.retry_at = time.monotonic() + _RETRY_SECONDS
        same = [one for one in self.entries if one.key == entry.key]
        for one in same:
            one.state = "waiting"
        try:
            for one in same:
                self.look(one)
        except RegistryError as error:  # the server is away: the next try finds out
            logger.warning(f"{entry.trial.label}: {error}")
            return
        if entry.state != "waiting":
            return
        entry.tries += 1
        if code != TRY_ELSEWHERE or entry.tries >= _MOST_TRIES:
            for one in same:
                one.state, one.note = "failed", said.removeprefix("error: ")

    def expected_seconds(self) -> tuple[float, int] | None:
        """Return how long the trainings of this sweep take one after the other, and by what.

        That is the number of earlier runs of this repository with the same data, model and batch
        that it was measured on; None if there is none for one of the points.
        """
        runs = [r for r in self.place.library.matching(ANY_KEY) if _counts(r)]
        total, used = 0.0, set[str]()
        for entry in self.entries:
            if entry.state in ("finished", "failed"):
                continue
            wanted = dict(_slow(entry.params))
            alike = [r for r in runs if all(r.run.params.get(n) == v for n, v in wanted.items())]
            if not alike:
                return None
            used |= {r.run.run_id for r in alike}
            total += statistics.median(map(_epoch_seconds, alike)) * entry.params.training.epochs
        return (total, len(used)) if used else None


def _slow(params: Params) -> Iterator[tuple[str, str]]:
    """Yield the parameters that decide how long an epoch takes, as runs record them."""
    for name, value in params.flat().items():
        if not name.startswith(_SPEED_FREE):
            yield name, as_text(value)


def _counts(record: Record) -> bool:
    run = record.run
    whole = run.status == "FINISHED" and run.ended_ms and not run.resumed
    return bool(whole and run.params.get("training.epochs", "").isdecimal())


def _epoch_seconds(record: Record) -> float:
    """Return the seconds of a run for each of its epochs, start and evaluation included."""
    run = record.run
    assert run.ended_ms
    return (run.ended_ms - run.started_ms) / 1000 / int(run.params["training.epochs"])
