"""One training per key: reuse a run, wait for one, or train.

- finished somewhere: reuse it;
- claimed by a live owner: wait and look again, or refuse;
- claimed by an owner that is dead or failed: train as the claim's next generation;
- none of these: train as generation 1.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from runkey.errors import RecipeError, RegistryError, RunkeyError, StoppedError
from runkey.identity.key import short_key
from runkey.identity.record import Record
from runkey.progress import seconds_still
from runkey.registry.claims import Claim, Claims, FileClaims, state_now, this_owner
from runkey.registry.library import Library
from runkey.registry.rest import RestError, UnreachedError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """How often claims are written and read, in seconds."""

    beat_seconds: float = 10.0
    dead_after: float = 60.0
    """A claim whose last beat is so old is dead, by the clock of the store that keeps it."""
    poll_seconds: float = 2.0
    """Between two reads of a waiting process; after a while they become fewer."""
    longest_poll: float = 10.0
    stuck_after: float = 600.0
    """A training without a step, or progress of an evaluation, for so long has no beat."""

    @property
    def sure_after(self) -> float:
        """Seconds for which a claim that is old must stand still before the eyes of its heir.

        Longer than from one beat to the next: after a stop of the server, or of the whole machine,
        all claims are old, and their owners alive.
        """
        return min(1.5 * self.beat_seconds, self.dead_after)

    def pause(self, waited: float) -> float:
        """Return the seconds until the next look of a process that waited for so long."""
        return min(max(self.poll_seconds, waited / 20), max(self.longest_poll, self.poll_seconds))


_MOST_LOSSES = 10
"""Times that another process may win the same generation of a claim, and not be seen."""


class HeldClaim:
    """The claim of this process, a context manager around its training.

    Inside the block a thread writes the beat, unless training is stuck.  Leaving the block without
    `finish` marks the training as failed.  All methods may be called from several threads.
    """

    def __init__(self, claims: Claims, claim: Claim, rhythm: Rhythm) -> None:
        """Write nothing yet; the attribute `claim` is the claim as last written."""
        self.claim = claim
        self._claims, self._rhythm = claims, rhythm
        self._writing = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._looked = self._reached = _clock()
        self._taken_by: Claim | None = None
        self._unreached = self._stuck = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with self._writing:
            if self.claim.state == "running":
                self._try_to_write(state="failed")

    def set_run(self, run_id: str) -> None:
        """Record the MLflow run in the claim."""
        with self._writing:
            if run_id != self.claim.run_id:
                self._try_to_write(run_id=run_id)

    def check(self) -> None:
        """Raise RegistryError if another process took the key over; cheap enough for every step.

        It reads the claim itself only after a pause in which others may have taken over (the
        process was stopped, the machine slept); else the writing thread does.
        """
        # A server that does not answer blocks the writing thread, and must not block training.
        late = _clock() - self._reached > self._rhythm.dead_after / 2
        if late and self._writing.acquire(blocking=False):
            try:
                self._try_to_write()
            finally:
                self._writing.release()
        if taken_by := self._taken_by:
            raise RegistryError(
                f"key {short_key(self.claim.key)}: {taken_by.who} took over as generation"
                f" {taken_by.generation} while this process gave no sign of life; the result of"
                " this one is not needed"
            )

    def finish(self, run_id: str | None = None) -> None:
        """Mark the key as trained, the run being recorded whole; raises as `check` does."""
        with self._writing:
            changes: dict[str, Any] = {"run_id": run_id or self.claim.run_id, "state": "finished"}
            if self._unreached and _clock() - self._reached < self._rhythm.beat_seconds:
                # A silent server takes 20 s. Others will find the run, or no sign of life.
                self.claim = replace(self.claim, **changes)
            else:
                self._try_to_write(**changes)  # it reads who holds the newest claim
            self.check()

    def _keep(self) -> None:
        # Soon after a server came back, since others look for this beat then.
        while not self._ended.wait(self._rhythm.beat_seconds / (4 if self._unreached else 1)):
            with self._writing:
                if self._taken_by or self.claim.state != "running":
                    return
                if not self._is_stuck():
                    self._try_to_write()

    def _is_stuck(self) -> bool:
        """Return True if training takes no steps; log when that begins and ends."""
        before, self._stuck = self._stuck, seconds_still() > self._rhythm.stuck_after
        if self._stuck and not before:
            logger.warning(
                f"claim of {short_key(self.claim.key)}: no step for {seconds_still():.0f} s; its"
                " beat stops until there is one, and others may train the same key"
            )
        elif before and not self._stuck:
            logger.info(f"claim of {short_key(self.claim.key)}: training moves, beats again")
        return self._stuck

    def _try_to_write(self, **changes: Any) -> None:
        """Write the claim with its next beat, unless another process has taken over.

        Unreachable claims do not stop a training: the next beat tries again, and finds out then if
        another process took over.  No error ends the writing thread, not even a bug of ours: it is
        logged, since others would take a claim without a beat for dead.
        """
        self.claim = replace(self.claim, **changes)
        rhythm, now = self._rhythm, _clock()
        # A claim that beats is not taken over: every third beat looks, and the first after a gap.
        is_due = now - self._looked > 2.5 * rhythm.beat_seconds
        has_gap = now - self._reached > rhythm.dead_after / 2
        try:
            if (changes or is_due or has_gap) and self._is_lost():
                return
            self.claim = replace(self.claim, beat=self._claims.next_beat(self.claim.beat))
            # Deleted by hand: the name is free, so it is made again, or somebody else did.
            if not self._claims.update(self.claim) and not self._claims.make(self.claim):
                self._is_lost()
            self._reached = now
        except Exception as error:  # noqa: BLE001 - see above
            self._reached = _clock()  # so that `check` does not look at every step
            self._looked = 0.0
            if not self._unreached:
                self._unreached = True
                why = str(error) if isinstance(error, RunkeyError) else f"unexpected {error!r}"
                logger.warning(
                    f"claim of {short_key(self.claim.key)}: {why}; training goes on, after"
                    f" {self._rhythm.dead_after:.0f} s of this others may train the same key"
                )
            return
        if self._unreached:
            self._unreached = False
            logger.info(f"claim of {short_key(self.claim.key)}: kept again")

    def _is_lost(self) -> bool:
        """Read who holds the newest claim; return True if it is another process."""
        last = self._claims.newest(self.claim.key, self.claim.generation)
        self._looked = _clock()
        if last is not None and not self.claim.is_same(last):
            self._taken_by = last
        return self._taken_by is not None


_REQUIRED = "not trained without a claim (runtime.require_claim: false does so)"


def _refuses(error: RunkeyError) -> bool:
    """Return True if a server refuses the login, or what it may do."""
    return isinstance(error, RestError) and error.status in (401, 403)


def _clock() -> float:
    """Return the seconds since boot, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do about a key; without a record and a claim: train unclaimed."""

    line: str
    """What was decided and why."""
    record: Record | None = None
    """A whole run to reuse."""
    library: Library | None = None
    """Where the record is."""
    claim: HeldClaim | None = None
    """This process's claim; train inside its `with` block."""
    superseded: tuple[str, ...] = ()
    """MLflow ids of dead owners' runs that this training replaces, oldest first."""


def decide(
    library: Library,
    claims: Claims,
    key: str,
    *,
    reuse: bool = True,
    wait: bool = True,
    elsewhere: Sequence[Library] = (),
    not_this: Collection[str] = (),
    rhythm: Rhythm | None = None,
    require: bool = False,
    before_claim: Callable[[], object] = lambda: None,
) -> Decision:
    """Find a run of the key, or make this process the one that trains it.

    Args:
        library: the runs of this process's store.
        claims: of the same store.
        key: `rk2-<64 hex digits>`.
        reuse: False: train without looking for a run.
        wait: wait if another process trains the key; False: refuse at once.
        elsewhere: further stores to look in, such as the team's server.
        not_this: MLflow ids of damaged runs, which are not offered again.
        rhythm: how often to read and write claims.
        require: no claim, no training: a server that does not answer, or refuses, is an error.
        before_claim: called before a training is begun; may raise what a server refuses.

    Raises:
        RegistryError: another process trains it and `wait` is False, or there is no claim and
            `require` is True.
    """
    search = _Search(
        [library, *elsewhere], claims, key, not_this, rhythm or Rhythm(), require, before_claim
    )
    if not reuse:
        before_claim()
        line = f"{search.label}: trained without looking for a run (runtime.reuse is false)"
        return Decision(line=line)
    return search.decide(wait=wait)


def wait_for_other(
    library: Library, claims: Claims, key: str, *, wait: bool = True, rhythm: Rhythm | None = None
) -> Record | None:
    """Return the whole run of a key, after another process that trains it has ended.

    None: there is none and no process trains it, so this machine may.

    Raises:
        StoppedError: another process trains it and `wait` is False.
        RegistryError: the store cannot be reached.
    """
    search = _Search([library], claims, key, (), rhythm or Rhythm(), require=True)
    waits_for: Claim | None = None
    while (found := search.find_run()) is None:
        claim = claims.newest(key)
        if claim is None or claim.state != "running" or search.death_of(claim):
            found = search.find_run()  # it may have ended since
            break
        if not claim.is_same(waits_for):
            waits_for = claim
            if not wait:
                raise StoppedError(f"{search.label}: {claim.line}")
            logger.info(f"{search.label}: {claim.line}; waiting for its result (Ctrl-C leaves)")
        time.sleep(search.rhythm.poll_seconds)
    return found.record if found else None


@dataclass
class _Search:
    """Looks for a finished run of a key, or for the right to train it."""

    libraries: Sequence[Library]
    claims: Claims
    key: str
    not_this: Collection[str]
    rhythm: Rhythm
    require: bool = False
    before_claim: Callable[[], object] = lambda: None
    seen: Claim | None = None
    looked: float = 0.0
    still: float = 0.0
    first: int = 1
    """A generation that was there: claims are read from it on."""
    pause: float = 0.0
    """Seconds before this look."""

    @property
    def label(self) -> str:
        return f"key {short_key(self.key)}"

    def decide(self, *, wait: bool) -> Decision:
        """Look until there is a run to reuse or a claim of this process."""
        begin = reached = time.monotonic()
        waits_for: Claim | None = None
        losses: Counter[int] = Counter()
        try:
            found = self.find_run()  # most often there is a run: claims are not read
        except RegistryError as error:
            raise self._stopped(error) from None
        while found is None:
            held = None
            try:
                # The claim is read before the runs: if it is finished, the run is among them then.
                claim = self.claims.newest(self.key, self.first)
                self.first = claim.generation if claim else self.first
                death = self.death_of(claim) if claim and claim.state == "running" else None
                is_free = claim is None or claim.state != "running" or death is not None
                if is_free and not (found := self.find_run()):
                    generation = claim.generation + 1 if claim else 1
                    held = self._make(generation)
                    losses[generation] += 1
                    # The next look shows the first claim, unless the store contradicts itself.
                    if not held and losses[generation] > _MOST_LOSSES:
                        waits_for = None
                        raise RegistryError(
                            f"{self.claims.place}: claim {generation} can be neither made nor read"
                        )
                reached = time.monotonic()
            except RegistryError as error:
                must = self.require and not isinstance(self.claims, FileClaims)
                if must and _refuses(error):
                    raise self._stopped(error) from None
                # A process that waits for a training survives a restart of the server.
                if waits_for is None or time.monotonic() - reached > self.rhythm.dead_after:
                    if must:
                        raise self._stopped(error) from None
                    line = f"{self.label}: {error}; trained here without a claim"
                    # Without a wait the runs were just looked up.
                    return (self.find_run() if waits_for else None) or Decision(line=line)
            else:
                if held:
                    return self._won(held, claim, death)
                if is_free:
                    time.sleep(min(0.1, self.rhythm.poll_seconds))
                    continue
                if claim and not claim.is_same(waits_for):
                    waits_for = claim
                    text = f"{self.label}: {claim.line}"
                    if not wait:
                        way_out = "set runtime.wait to true to wait for its result"
                        raise RegistryError(f"{text}; {way_out}, or try again later")
                    what = "its result"
                    if not claim.owner:  # a live one writes its claim again at its next beat
                        what = f"a sign of life for {self.rhythm.dead_after:.0f} s"
                    logger.info(f"{text}; waiting for {what} (Ctrl-C leaves)")
            self.pause = self.rhythm.pause(time.monotonic() - begin)
            time.sleep(self.pause)
        if waits_for:
            waited = time.monotonic() - begin
            return replace(found, line=f"{found.line}, after {waited:.0f} s of waiting")
        return found

    def _stopped(self, error: RegistryError) -> RegistryError:
        return RegistryError(f"{error}; {_REQUIRED}")

    def find_run(self) -> Decision | None:
        """Return the decision to reuse the first store's whole run, if there is one.

        RegistryError if a server cannot be asked, and the training requires one.
        """
        for number, library in enumerate(self.libraries):
            try:
                record = self._whole_run(library)
            except (RegistryError, RecipeError) as error:
                # Who cannot look would train again what is there; a team's server may be away.
                away = isinstance(error, UnreachedError) and number == 0
                if self.require and (away or isinstance(error, RestError)):
                    raise
                logger.warning(f"{self.label}: not looked up in {library.place}: {error}")
                continue
            if record and record.details:
                run = f"finished run {record.run.run_id[:8]} of {record.details.host}"
                where = f" ({library.place})" if number else ""
                line = f"{self.label}: {run}{where} is reused"
                return Decision(line=line, record=record, library=library)
        return None

    def _whole_run(self, library: Library) -> Record | None:
        """Return the run that stands for the key, as `canonical` chooses, among the whole ones."""
        runs = [r for r in library.matching(self.key) if r.run.status == "FINISHED"]
        runs = [r for r in runs if r.run.run_id not in self.not_this]
        runs.sort(key=lambda record: record.reproduction_of is not None)
        return next((r for r in map(library.with_details, runs) if r.is_whole), None)

    def death_of(self, claim: Claim) -> str | None:
        """Return why the claim, as just read, counts as dead, or None.

        Its last beat must be old by the store's clock, and its beat must stand still for a while
        before this process's eyes.  Where the store's clock is not known, that alone counts.  Only
        time in which this process looked counts: if it was stopped together with the owner, it must
        not find the owner dead when both continue.
        """
        if state_now(claim) == "dead":
            return "process gone"
        now = time.monotonic()
        if claim == self.seen:
            self.still += min(now - self.looked, 2 * max(self.pause, self.rhythm.poll_seconds))
        else:
            self.seen, self.still = claim, 0.0
        self.looked, silent = now, self.still
        if self.still >= self.rhythm.sure_after:
            silent = max(silent, self.claims.age_seconds(claim) or 0.0)
        if silent >= self.rhythm.dead_after:
            return f"no sign of life for {silent:.0f} s"
        return None

    def _make(self, generation: int) -> HeldClaim | None:
        """Claim a generation for this process; None: another process was first."""
        self.before_claim()
        claim = Claim(
            key=self.key,
            generation=generation,
            owner=this_owner(),
            beat=self.claims.next_beat(0),
            since_ms=time.time_ns() // 1_000_000,
        )
        # A process that was stopped before this line may make a generation that others have
        # superseded and removed: only the newest one counts.
        if not self.claims.make(claim):
            return None
        last = self.claims.of(self.key)[-1:]
        self.first = last[0].generation if last else generation
        won = bool(last) and claim.is_same(last[0])
        return HeldClaim(self.claims, claim, self.rhythm) if won else None

    def _won(self, held: HeldClaim, before: Claim | None, death: str | None) -> Decision:
        """Decide for the winner of a claim: train, unless a run was finished just before."""
        if found := self.find_run():
            assert found.record is not None
            with held:
                held.finish(found.record.run.run_id)
            return found
        number = held.claim.generation
        then = f"trained here as generation {number}"
        if before is None:
            why = "no run of this key: trained here"
        elif death:
            why = f"claim of {before.who} was dead ({death}): taken over as generation {number}"
        elif before.state == "failed":
            why = f"training by {before.who} failed: {then}"
        else:
            run = f"run {before.run_id[:8]}" if before.run_id else "the run"
            why = f"{run} of {before.who} is finished but not there, or damaged: {then}"
        line = f"{self.label}: {why}"
        return Decision(line=line, claim=held, superseded=self._left_running(number))

    def _left_running(self, generation: int) -> tuple[str, ...]:
        """Return runs of earlier generations that are still marked RUNNING.

        More than one, if an owner died before it could end the run that it replaced.
        """
        if generation == 1:
            return ()
        try:
            earlier = [c for c in self.claims.of(self.key) if c.generation < generation]
        except RegistryError as error:
            logger.warning(f"runs of dead owners stay as they are: {error}")
            return ()
        return tuple(c.run_id for c in earlier if c.state == "running" and c.run_id)
