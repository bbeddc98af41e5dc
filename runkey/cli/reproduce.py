"""`runkey reproduce KEY`: train a run again, and say whether the result is the same."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runkey import paths
from runkey.cli import place
from runkey.cli.output import AsJson, Key, answer_no, print_json, print_table
from runkey.errors import RegistryError

if TYPE_CHECKING:
    from runkey.identity.record import Record
    from runkey.registry.checks.reproduce import Repeat


def reproduce(
    key: Key,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the worktree that it was trained in.")
    ] = False,
    any_environment: Annotated[
        bool,
        typer.Option("--any-environment", help="Go on where packages are not as locked then."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a run again from its snapshot, data and lock; compare weights and numbers."""
    from runkey.registry.checks.reproduce import Request
    from runkey.registry.checks.reproduce import reproduce as repeat_run
    from runkey.registry.library import find_run

    library, store = place.library(), place.store()
    record = find_run(library, key)

    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    say(f"{record.label}: run {record.run.run_id}, {record.run.name or 'without a name'}")
    request = Request(
        library=library,
        record=record,
        main=place.checkout(),
        home=store.home,
        say=say,
        # JSON on stdout stays alone there.
        output=sys.stderr if as_json else sys.stdout,
        keep=keep,
        any_environment=any_environment,
    )
    # Ended by a process manager or a closed terminal as by Ctrl-C: the pipeline ends first.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    repeat = repeat_run(request)
    _record(record, repeat)
    if as_json:
        print_json({"key": record.key, "run": record.run.run_id, **repeat.outcome})
    else:
        _print(record, repeat)
    if not repeat.verdict.holds:
        answer_no()


def _record(record: Record, repeat: Repeat) -> None:
    """Write the outcome on the first run: its record and its tag `reproduced`.

    Raises:
        RegistryError: MLflow refuses; the comparison is printed with it.
    """
    from mlflow.exceptions import MlflowException

    from runkey.identity.record import update_record
    from runkey.registry.checks.reproduce import with_outcome
    from runkey.registry.library import find_run
    from runkey.tracking.records import write_details

    store = place.store()
    # Read again: training took its time, and others may have written since.
    latest = find_run(place.library(), f"{record.key}:{record.run.run_id}")
    if latest.details is None:
        raise RegistryError(f"{record.label}: run {record.run.run_id} has lost its record.json")
    details = with_outcome(latest.details, repeat)
    tags = {"reproduced": f"{repeat.verdict.line} (run {repeat.run_id})"}
    try:
        run = write_details(store, record.run.run_id, details, tags)
    except MlflowException as error:
        raise RegistryError(
            f"{record.label}: {repeat.verdict.line}; MLflow did not record it: {error.message}"
        ) from None
    if not store.is_server:
        update_record(store.home / paths.RECORDS, run, details)


def _print(record: Record, repeat: Repeat) -> None:
    """Both side by side, and the verdict."""
    verdict = repeat.verdict
    rows = []
    for file in verdict.files:
        told = _said(file.is_same, "same bits")
        rows.append((file.path, _short(file.first), _short(file.repeat), told))
    for number in verdict.numbers:
        near = _said(number.is_near, f"within {number.limit:.3g}")
        told = "equal" if number.first == number.repeat else near
        rows.append((number.name, f"{number.first:.6g}", f"{number.repeat:.6g}", told))
    first, second = record.run.run_id[:8], _short(repeat.run_id)[:8]
    print()
    print_table(("", f"run {first}", f"repeat {second}", ""), rows)
    for difference in verdict.class_differences:
        print(f"witness: {difference}")
    print(f"{record.label} {verdict.line} ({repeat.seconds:.0f} s)")


def _said(good: bool, words: str) -> str:
    return words if good else f"NOT {words}"


def _short(value: Any) -> str:
    return str(value)[:12] if value else "none"
