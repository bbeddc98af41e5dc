"""What a run's status means now: MLflow goes on saying RUNNING of one whose process is gone."""

from __future__ import annotations

from collections.abc import Iterable

from runkey.identity.record import LoggedRun, Record
from runkey.registry.claims.claims import Claims, newest, state_now
from runkey.registry.reading.query import Query, SearchableLibrary, fixed_field

DEAD = "DEAD"
"""MLflow has it as RUNNING, but nobody trains it any more."""
_KNOWN = 10


def status_now(record: Record, claims: Claims) -> str:
    """MLflow's status, or `DEAD`.

    Args:
        record: the run.
        claims: of its store; asked only about runs that are RUNNING.

    Raises:
        RegistryError: the claims cannot be read.
    """
    # A reproduction trains beside the claim of its key.
    if record.run.status != "RUNNING" or record.reproduction_of:
        return record.run.status
    claim = newest(claims, record.key)
    if claim is None or claim.run_id is None:
        return record.run.status
    alive = claim.run_id == record.run.run_id and state_now(claim) in ("running", "silent")
    return record.run.status if alive else DEAD


def known_runs(library: SearchableLibrary, names: Iterable[str]) -> list[LoggedRun]:
    """Runs to look names of metrics, parameters and tags up in: the newest; none if none is new."""
    if all(fixed_field(name) for name in names):
        return []
    return [record.run for record in library.find(Query(limit=_KNOWN))]
