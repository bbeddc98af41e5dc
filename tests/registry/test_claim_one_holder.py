"""Property: whatever the order of steps, never two processes hold the newest claim of a key."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from runkey.errors import RegistryError
from runkey.registry.claims import FileClaims, newest
from runkey.registry.once import HeldClaim, Rhythm
from tests.support.claims import KEY, a_claim

LOOKS_ALWAYS = Rhythm(beat_seconds=60, dead_after=0)
STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["look", "look", "make", "make", "beat", "clear"]),
    ),
    max_size=40,
)


class Asker:
    """Asks as `decide` does, but step by step, so that others come in between."""

    def __init__(self, claims: FileClaims) -> None:
        self.claims = claims
        self.seen = 0
        self.held: HeldClaim | None = None

    def look(self) -> None:
        last = newest(self.claims, KEY)
        self.seen = last.generation if last else 0

    def make(self) -> None:
        """Take over what was seen last, however long ago that was."""
        claim = a_claim(self.seen + 1)
        if self.claims.make(claim) and claim.is_same(newest(self.claims, KEY)):
            self.held = HeldClaim(self.claims, claim, LOOKS_ALWAYS)

    def beat(self) -> None:
        if self.held:
            self.held.set_run(f"{self.held.claim.beat}")

    def clear(self) -> None:
        """As `runkey gc` does: whatever is not the newest."""
        for claim in self.claims.of(KEY)[:-1]:
            self.claims.remove(claim)

    @property
    def holds(self) -> bool:
        try:
            if self.held:
                self.held.check()
        except RegistryError:
            return False
        return self.held is not None


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_never_two_holders(steps: list[tuple[int, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        claims = FileClaims(Path(folder))
        askers = [Asker(claims) for _ in range(3)]
        highest = 0
        for number, step in steps:
            getattr(askers[number], step)()
            assert sum(asker.holds for asker in askers) <= 1
            generations = [claim.generation for claim in claims.of(KEY)]
            assert max(generations, default=0) >= highest  # never counted down
            highest = max(generations, default=0)
