"""`runkey verify KEY | --all`: whether runs still are what they say they are."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runkey import paths
from runkey.cli import output
from runkey.cli.output import AsJson, Key, answer_no, print_beside, print_json, print_table
from runkey.errors import RegistryError, RunkeyError
from runkey.identity.key import ANY_KEY
from runkey.progress import each

if TYPE_CHECKING:
    from runkey.identity.record import Record
    from runkey.registry.reproduce import Repeat
    from runkey.registry.verify import Sources
    from runkey.registry.verify_places import Finding, Report


# `runkey reproduce KEY`: train a run again, and say whether the result is the same.


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
    from runkey.registry.library import find_run
    from runkey.registry.reproduce import Request
    from runkey.registry.reproduce import reproduce as repeat_run

    library, store = output.library(), output.store()
    record = find_run(library, key)

    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    say(f"{record.label}: run {record.run.run_id}, {record.run.name or 'without a name'}")
    request = Request(
        library=library,
        record=record,
        main=output.checkout(),
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
        _print_reproduction(record, repeat)
    if not repeat.verdict.holds:
        answer_no()


def _record(record: Record, repeat: Repeat) -> None:
    """Write the outcome on the first run: its record and its tag `reproduced`.

    Raises:
        RegistryError: MLflow refuses; the comparison is printed with it.
    """
    from mlflow.exceptions import MlflowException

    from runkey.identity.record import update_record
    from runkey.registry.library import find_run
    from runkey.registry.reproduce import with_outcome
    from runkey.tracking.transfer import write_details

    store = output.store()
    # Read again: training took its time, and others may have written since.
    latest = find_run(output.library(), f"{record.key}:{record.run.run_id}")
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


def _print_reproduction(record: Record, repeat: Repeat) -> None:
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


_MARKS = {"ok": "ok", "warning": "warning", "fault": "FAULT"}


def verify(
    key: Annotated[
        str, typer.Argument(help="Beginning of a key; KEY:RUN for one of its runs.")
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="Verify all runs, a line each.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not hash: presence and sizes only.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Hash a run's files again; check MLflow run, snapshot, DVC entry, environment."""
    if bool(key) == every:
        raise typer.BadParameter("give one KEY, or --all")
    if every:
        _verify_all(quick=quick, as_json=as_json)
    else:
        _verify_one(key, quick=quick, as_json=as_json)


def _verify_one(key: str, *, quick: bool, as_json: bool) -> None:
    from runkey.registry.library import find_run
    from runkey.registry.verify import verify_run

    record = find_run(output.library(), key)
    report = verify_run(record, _sources([record], quick=quick))
    if as_json:
        print_json(report.as_dict())
    else:
        print_beside(
            f"{report.label}  ", f"{report.name or 'without a name'}  (run {report.run_id})"
        )
        for finding in report.findings:
            _print(finding)
        print(report.summary)
    if not report.is_right:
        answer_no()


def _verify_all(*, quick: bool, as_json: bool) -> None:
    """Every run, and what there is beside the records."""
    from runkey.registry.server_library import open_library
    from runkey.registry.verify import unrecorded, verify_run
    from runkey.registry.verify_places import Finding, counted

    torn: list[str] = []
    store = output.store()
    runs = open_library(store.uri, store.home, torn.append)
    records, beside = [], []
    for record in each("read records", runs.matching(ANY_KEY), "runs"):
        try:
            records.append(runs.with_details(record))
        except RunkeyError as error:
            beside.append(Finding("files", "fault", str(error)))
    beside += [Finding("record", "fault", text, "`runkey index` writes it again") for text in torn]
    beside += unrecorded(store.uri, {record.run.run_id for record in records})
    sources = _sources(records, quick=quick)
    reports = []
    for record in each("verify", records, "runs"):
        reports.append(verify_run(record, sources))
        if not as_json:
            _print_line(reports[-1])
    findings = [*beside, *(finding for report in reports for finding in report.findings)]
    if as_json:
        print_json(_all_as_dict(reports, beside))
    else:
        for finding in beside:
            _print(finding)
        print(f"{len(reports)} runs in {runs.place}: {counted(findings)}")
    if any(finding.state == "fault" for finding in findings):
        answer_no()


def _sources(records: list[Record], *, quick: bool) -> Sources:
    """Where the store of the current folder and its checkout keep things.

    Raises:
        RunkeyError: the current folder lies in no repository.
    """
    from runkey.identity.record import this_host
    from runkey.registry.verify import Sources
    from runkey.registry.verify_places import CacheCheck, run_reader

    store, root = output.store(), output.checkout()
    pointers = [r.details.pointer_md5 for r in records if r.details and r.details.pointer_md5]
    return Sources(
        library=output.library(),
        stored=run_reader(store.uri),
        root=root,
        cache=CacheCheck(root, pointers),
        host=this_host(),
        is_shared=store.is_server,
        quick=quick,
    )


def _print(finding: Finding) -> None:
    print_beside(f"  {_MARKS[finding.state]:<7}  {finding.check:<11}  ", finding.text)
    if finding.way_out and finding.state != "ok":
        print_beside(f"  {'':<7}  {'':<11}  -> ", finding.way_out)


def _print_line(report: Report) -> None:
    """One run's line: what is wrong first."""
    first = next(iter(report.of("fault") or report.of("warning")), None)
    mark = _MARKS[first.state] if first else "ok"
    told = f"{report.summary}: {first.check}: {first.text}" if first else report.name
    print_beside(f"  {mark:<7}  {report.label}:{report.run_id[:8]}  ", told)


def _all_as_dict(reports: list[Report], beside: list[Finding]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "right": all(report.is_right for report in reports) and not beside,
        "runs": [report.as_dict() for report in reports],
        "beside": [asdict(finding) for finding in beside],
    }
