"""One key, one training: whether to reuse a run, wait for one, or train.

- finished somewhere: reuse it;
- claimed, and the owner lives: wait and look again, or leave;
- claimed, and the owner is dead, or failed: train as the claim's next generation;
- none of these: train as generation 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from runkey.errors import RegistryError
from runkey.identity.errors import RecipeError
from runkey.identity.key import short_key
from runkey.identity.record import Record
from runkey.registry.claims.claims import Claim, Claims, newest, state_now
from runkey.registry.claims.keeper import HeldClaim, Rhythm
from runkey.registry.claims.owner import this_process
from runkey.registry.library import Library

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do about a key.  Without a record and a claim: train, with nobody knowing."""

    line: str
    """What was decided and why."""
    record: Record | None = None
    """A whole run to be reused."""
    library: Library | None = None
    """Where the record lies."""
    claim: HeldClaim | None = None
    """This process's claim; training happens in a `with` block of it."""
    superseded: tuple[str, ...] = ()
    """MLflow ids of the runs of dead owners that this training replaces, oldest first."""


class _Watch:
    """How long a claim's beat has stood still, by the clock of the process that watches.

    Only time in which this process looked counts: one that was stopped itself, together with the
    owner, would else find the owner dead when both go on.
    """

    def __init__(self, rhythm: Rhythm) -> None:
        self._rhythm = rhythm
        self._seen: Claim | None = None
        self._looked = 0.0
        self._still = 0.0

    def death_of(self, claim: Claim) -> str | None:
        """Why the claim, as just read, counts as dead; None: it does not (yet)."""
        if state_now(claim) == "dead":
            return "process gone"
        now = time.monotonic()
        if claim == self._seen:
            self._still += min(now - self._looked, 2 * self._rhythm.poll_seconds)
        else:
            self._seen, self._still = claim, 0.0
        self._looked = now
        if self._still >= self._rhythm.dead_after:
            return f"no sign of life for {self._still:.0f} s"
        return None


def decide(
    library: Library,
    claims: Claims,
    key: str,
    *,
    reuse: bool = True,
    wait: bool = True,
    say: Say = print,
    elsewhere: Sequence[Library] = (),
    not_this: Collection[str] = (),
    rhythm: Rhythm | None = None,
) -> Decision:
    """Find a run of the key, or make this process the one that trains it.

    Args:
        library: the runs of this process's store.
        claims: of the same store.
        key: `rk2-<64 hex digits>`.
        reuse: False: train without looking.
        wait: when another process trains the key, wait for it; False: refuse at once.
        say: told once whom it waits for, and what cannot be reached.
        elsewhere: further stores to look in, such as the team's server.
        not_this: MLflow ids of runs that turned out damaged and must not be offered again.
        rhythm: how often to look and beat.

    Raises:
        RegistryError: another process trains it and `wait` is False.
    """
    label = f"key {short_key(key)}"
    if not reuse:
        return Decision(line=f"{label}: trained without looking for a run (runtime.reuse is false)")
    lookup = _Lookup([library, *elsewhere], key, not_this, say)
    asking = _Asking(claims, key, rhythm or Rhythm(), say)
    try:
        return _decide(lookup, asking, label, wait=wait)
    except _UnreachedError as error:
        found = lookup.first()
        return found or Decision(line=f"{label}: {error}; trained here without a claim")


class _UnreachedError(Exception):
    """The claims cannot be reached; the text says why."""


@dataclass(frozen=True)
class _Lookup:
    """Where finished runs of a key are looked up."""

    libraries: Sequence[Library]
    key: str
    not_this: Collection[str]
    say: Say

    def first(self) -> Decision | None:
        """The first store's run that can be reused."""
        for number, library in enumerate(self.libraries):
            try:
                record = _whole_run(library, self.key, self.not_this)
            except (RegistryError, RecipeError) as error:
                self.say(f"key {short_key(self.key)}: not looked up in {library.place}: {error}")
                continue
            if record is not None and record.details is not None:
                where = f" ({library.place})" if number else ""
                run = f"finished run {record.run.run_id[:8]} of {record.details.host}{where}"
                line = f"key {short_key(self.key)}: {run} is reused"
                return Decision(line=line, record=record, library=library)
        return None


@dataclass(frozen=True)
class _Asking:
    """The claims, as one process asks them."""

    claims: Claims
    key: str
    rhythm: Rhythm
    say: Say

    def newest(self) -> Claim | None:
        """The claim that counts."""
        try:
            return newest(self.claims, self.key)
        except RegistryError as error:
            raise _UnreachedError(str(error)) from None

    def make(self, generation: int) -> HeldClaim | None:
        """This process's claim of a generation; None: another process was first."""
        claim = Claim(
            key=self.key,
            generation=generation,
            owner=this_process(),
            state="running",
            run_id=None,
            beat=0,
            since_ms=time.time_ns() // 1_000_000,
        )
        try:
            # A process that was stopped before this line may make a generation that others have
            # left behind and cleared away: only the newest one counts.
            won = self.claims.make(claim) and claim.is_same(newest(self.claims, self.key))
        except RegistryError as error:
            raise _UnreachedError(str(error)) from None
        return HeldClaim(self.claims, claim, self.rhythm, self.say) if won else None

    def left_running(self, generation: int) -> tuple[str, ...]:
        """Runs of generations before this one that nobody ended.

        More than one, when an owner died before it could say so of the one that it replaced.
        """
        try:
            earlier = [c for c in self.claims.of(self.key) if c.generation < generation]
        except RegistryError as error:
            self.say(f"runs of dead owners stay as they are: {error}")
            return ()
        return tuple(c.run_id for c in earlier if c.state == "running" and c.run_id)


def _decide(lookup: _Lookup, asking: _Asking, label: str, *, wait: bool) -> Decision:
    """Look and ask until there is a run to reuse or a claim of this process."""
    watch = _Watch(asking.rhythm)
    begin = reached = time.monotonic()
    waits_for: Claim | None = None
    found = lookup.first()  # most often there is a run: claims are not asked for
    while found is None:
        try:
            # The claim is read before the runs: what it says is finished is among them then.
            claim = asking.newest()
            death = watch.death_of(claim) if claim and claim.state == "running" else None
            if claim is None or claim.state != "running" or death:
                found = lookup.first()
                if found is None and (held := asking.make(claim.generation + 1 if claim else 1)):
                    return _won(lookup, asking, held, claim, death, label)
                continue
            reached = time.monotonic()
        except _UnreachedError:
            # Who waits for a training outlasts a server that is started again.
            if waits_for is None or time.monotonic() - reached > asking.rhythm.dead_after:
                raise
        else:
            if not claim.is_same(waits_for):
                waits_for = claim
                _say_whom(claim, asking.say, label, wait=wait)
        time.sleep(asking.rhythm.poll_seconds)
    if waits_for:
        return replace(
            found, line=f"{found.line}, after {time.monotonic() - begin:.0f} s of waiting"
        )
    return found


def _say_whom(claim: Claim, say: Say, label: str, *, wait: bool) -> None:
    """Say who is waited for, once; or refuse."""
    text = f"{label}: {claim.who} trains it since {claim.since}"
    if not wait:
        raise RegistryError(
            f"{text}; set runtime.wait to true to wait for its result, or try again later"
        )
    say(f"{text}; waiting for its result (Ctrl-C leaves)")


def _won(
    lookup: _Lookup,
    asking: _Asking,
    held: HeldClaim,
    before: Claim | None,
    death: str | None,
    label: str,
) -> Decision:
    """What the winner of a claim does: train, unless a run was finished just before."""
    if found := lookup.first():
        assert found.record is not None
        with held:
            held.finish(found.record.run.run_id)
        return found
    number = held.claim.generation
    if before is None:
        why = "no run of this key: trained here"
    elif death:
        why = f"claim of {before.who} was dead ({death}): taken over as generation {number}"
    elif before.state == "failed":
        why = f"training by {before.who} failed: trained here as generation {number}"
    else:
        run = f"run {before.run_id[:8]}" if before.run_id else "the run"
        why = (
            f"{run} of {before.who} is finished but not there, or damaged:"
            f" trained here as generation {number}"
        )
    return Decision(line=f"{label}: {why}", claim=held, superseded=asking.left_running(number))


def _whole_run(library: Library, key: str, not_this: Collection[str]) -> Record | None:
    """The run that stands for the key, as `canonical` chooses, among those that can be reused."""
    finished = [r for r in library.matching(key) if r.run.status == "FINISHED" and r.key == key]
    for record in sorted(finished, key=lambda record: record.reproduction_of is not None):
        if record.run.run_id not in not_this:
            whole = library.with_details(record)
            if whole.is_whole:
                return whole
    return None
