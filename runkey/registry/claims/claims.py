"""Claims: which process trains a key.

A claim is a name that can be made once, in a folder or on a server.  It is never handed over: who
takes over a dead claim makes the next generation's name, and of several who try one succeeds.  Only
the newest generation of a key counts, and only its owner changes what stands in it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from runkey.identity.key import ANY_SCHEMA
from runkey.registry.claims.owner import Owner, is_running

State = Literal["running", "finished", "failed"]
StateNow = Literal["running", "finished", "failed", "dead", "silent"]
STATES: tuple[State, ...] = ("running", "finished", "failed")
_NAME = re.compile(rf"^({ANY_SCHEMA}-[0-9a-f]{{64}})(?:\.g([1-9][0-9]{{0,8}}))?$")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One generation of the claim on a key, as it was read."""

    key: str
    generation: int
    """From 1."""
    owner: Owner | None
    """None: what was written cannot be read (a machine that lost power while writing)."""
    state: State
    run_id: str | None
    """Of the MLflow run, once it is known."""
    beat: int
    """Counted up by the owner while it lives."""
    since_ms: int
    """When it was made by the owner's clock, in milliseconds since 1970; only for people."""

    @property
    def name(self) -> str:
        """`<key>.g<generation>`."""
        return f"{self.key}.g{self.generation}"

    @property
    def who(self) -> str:
        """For people: the owner, or that it is not known."""
        return self.owner.label if self.owner else "an unreadable claim"

    @property
    def since(self) -> str:
        """For people: local date and time."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_ms / 1000))

    def is_same(self, other: Claim | None) -> bool:
        """Whether both are one claim, however its state or beat went on."""
        mine = self.owner.nonce if self.owner else None
        theirs = other.owner.nonce if other and other.owner else None
        return other is not None and (self.name, mine) == (other.name, theirs)


class Claims(Protocol):
    """Where claims are kept.  All methods raise `RegistryError` when it cannot be reached."""

    @property
    def place(self) -> str:
        """For messages: a folder, or a server's address."""

    def of(self, key: str) -> list[Claim]:
        """All generations of a key, oldest first."""

    def all(self) -> list[Claim]:
        """All claims, by key and generation."""

    def make(self, claim: Claim) -> bool:
        """Make the claim's name, with its contents, at once and exclusively.

        Returns:
            Whether the claim is the caller's; False: the name is there and another's.
        """

    def update(self, claim: Claim) -> bool:
        """Write the state, run and beat of the caller's own claim.

        Returns:
            False: it is not there (somebody deleted it).
        """

    def remove(self, claim: Claim) -> None:
        """Delete a generation that is not the newest one of its key.

        Raises:
            RegistryError: it is the newest one, which must stay: without it the next generation
                would be the first again, and an owner that comes back would not see that it lost.
        """


def newest(claims: Claims, key: str) -> Claim | None:
    """The generation of a key that counts."""
    generations = claims.of(key)
    return generations[-1] if generations else None


def state_now(claim: Claim) -> StateNow:
    """What one look can tell of a claim.

    Returns:
        `dead`: its owner ran on this machine and is gone; `silent`: it says that it runs, but its
        owner cannot be seen from here, so that only its beat would tell.
    """
    if claim.state != "running":
        return claim.state
    seen = is_running(claim.owner) if claim.owner else None
    if seen is None:
        return "silent"
    return "running" if seen else "dead"


def in_order(found: Iterable[Claim]) -> list[Claim]:
    """By key, then by generation."""
    return sorted(found, key=lambda claim: (claim.key, claim.generation))


def split_name(name: str) -> tuple[str, int] | None:
    """Key and generation in `<key>` (the first) or `<key>.g<N>`; None: not the name of a claim."""
    match = _NAME.fullmatch(name)
    return (match[1], int(match[2] or 1)) if match else None
