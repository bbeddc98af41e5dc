"""What a run's status means now: MLflow goes on saying RUNNING of one whose process is gone."""

from __future__ import annotations

from runkey.identity.record import LoggedRun, Record
from runkey.registry.claims import Claims, newest, state_now
from runkey.registry.query import Condition, Field, Query, SearchableLibrary

DEAD = "DEAD"
"""MLflow has it as RUNNING, but nobody trains it any more."""


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


def known_runs(library: SearchableLibrary) -> list[LoggedRun]:
    """Runs that names of metrics, parameters and tags are looked up in: the newest ones."""
    finished = Condition(Field("run", "status"), "=", "FINISHED")
    found = library.find(Query(limit=1)) + library.find(Query(conditions=(finished,), limit=1))
    return [record.run for record in found]
