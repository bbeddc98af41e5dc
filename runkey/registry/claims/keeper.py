"""A claim that this process holds: kept alive while it trains, given up when it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from runkey.errors import RegistryError, RunkeyError
from runkey.identity.key import short_key
from runkey.registry.claims.claims import Claim, Claims, newest


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """How often claims are written and looked at, in seconds."""

    beat_seconds: float = 10.0
    dead_after: float = 60.0
    """A claim whose beat stands still for so long is dead, by the clock of whoever watches it."""
    poll_seconds: float = 2.0
    """Between two looks of a process that waits."""


class HeldClaim:
    """The claim of this process, in a `with` block while it trains.

    Inside the block a thread writes the beat.  A block that is left without `finish` says that the
    training failed.  All methods may be called from several threads.
    """

    def __init__(
        self, claims: Claims, claim: Claim, rhythm: Rhythm, say: Callable[[str], None]
    ) -> None:
        """Nothing is written yet.

        Args:
            claims: where it is kept.
            claim: as this process made it.
            rhythm: how often it is written.
            say: told when it cannot be written, and when it can again.
        """
        self._claims, self._claim, self._rhythm, self._say = claims, claim, rhythm, say
        self._writing = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._looked = _clock()
        self._taken_by: Claim | None = None
        self._unreached = False

    @property
    def claim(self) -> Claim:
        """As it was written last."""
        return self._claim

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        with self._writing:
            if self._claim.state == "running":
                self._claim = replace(self._claim, state="failed")
                self._try_to_write()

    def set_run(self, run_id: str) -> None:
        """Say which MLflow run it is, as soon as that is known."""
        with self._writing:
            if run_id != self._claim.run_id:
                self._claim = replace(self._claim, run_id=run_id)
                self._try_to_write()

    def check(self) -> None:
        """Return if the key is still this process's to train; cheap, for every step.

        It looks by itself only after a pause that was long enough for others to take over (the
        process was stopped, the machine slept); else the beating thread does.

        Raises:
            RegistryError: another process took over; the text says which.
        """
        # A server that does not answer holds the writing thread up, and must not hold up training.
        late = _clock() - self._looked > self._rhythm.dead_after / 2
        if late and self._writing.acquire(blocking=False):
            try:
                self._try_to_write()
            finally:
                self._writing.release()
        if taken_by := self._taken_by:
            raise RegistryError(
                f"key {short_key(self._claim.key)}: {taken_by.who} took over as generation"
                f" {taken_by.generation} while this process gave no sign of life; the result of"
                " this one is not needed"
            )

    def finish(self, run_id: str | None = None) -> None:
        """Say that the key is trained.  The run must be recorded whole by now.

        Args:
            run_id: of the MLflow run; None: as `set_run` said.

        Raises:
            RegistryError: another process took over.
        """
        with self._writing:
            self._look()
            self.check()
            self._claim = replace(
                self._claim, run_id=run_id or self._claim.run_id, state="finished"
            )
            self._try_to_write()

    def _keep(self) -> None:
        while not self._ended.wait(self._rhythm.beat_seconds):
            with self._writing:
                if self._taken_by or self._claim.state != "running":
                    return
                self._try_to_write()

    def _look(self) -> None:
        """Find out who holds the newest claim, if the claims can be reached."""
        try:
            last = newest(self._claims, self._claim.key)
        except Exception as error:  # noqa: BLE001 - see _try_to_write
            self._note_unreached(error)
            return
        self._note_newest(last)

    def _try_to_write(self) -> None:
        """Write the claim with its next beat, unless another process has taken over.

        Claims that cannot be reached do not stop a training: the next beat tries again, and whoever
        took over in between is found then.  No error ends the beating thread, not even one of ours:
        it is reported, and others would take a claim without a beat for dead.
        """
        try:
            last = newest(self._claims, self._claim.key)
            self._note_newest(last)
            if self._taken_by:
                return
            self._claim = replace(self._claim, beat=self._claim.beat + 1)
            # Deleted by hand: the name is free, so it is made again, or somebody else did.
            if not self._claims.update(self._claim) and not self._claims.make(self._claim):
                self._note_newest(newest(self._claims, self._claim.key))
        except Exception as error:  # noqa: BLE001 - see above
            self._note_unreached(error)
            return
        if self._unreached:
            self._unreached = False
            self._say(f"claim of {short_key(self._claim.key)}: kept again")

    def _note_newest(self, last: Claim | None) -> None:
        self._looked = _clock()
        if last is not None and not self._claim.is_same(last):
            self._taken_by = last

    def _note_unreached(self, error: Exception) -> None:
        self._looked = _clock()  # the next look waits its turn
        if not self._unreached:
            self._unreached = True
            why = str(error) if isinstance(error, RunkeyError) else f"unexpected {error!r}"
            self._say(
                f"claim of {short_key(self._claim.key)}: {why}; training goes on, after"
                f" {self._rhythm.dead_after:.0f} s of this others may train the same key"
            )


def _clock() -> float:
    """Seconds since boot, with those that the machine slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
