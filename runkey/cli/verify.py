"""`runkey verify KEY | --all`: whether runs still are what they say they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from runkey.cli import place
from runkey.cli.output import AsJson, answer_no, print_beside, print_json
from runkey.errors import RunkeyError
from runkey.identity.key import ANY_KEY
from runkey.progress import each

if TYPE_CHECKING:
    from runkey.identity.record import Record
    from runkey.registry.checks.findings import Finding, Report
    from runkey.registry.checks.verify import Sources

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
    from runkey.registry.checks.verify import verify_run
    from runkey.registry.library import find_run

    record = find_run(place.library(), key)
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
    from runkey.registry.checks.findings import Finding, counted
    from runkey.registry.checks.verify import unrecorded, verify_run
    from runkey.registry.open import open_library

    torn: list[str] = []
    store = place.store()
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
    from runkey.registry.checks.mlflow_run import run_reader
    from runkey.registry.checks.verify import Sources
    from runkey.registry.checks.verify_cache import CacheCheck

    store, root = place.store(), place.checkout()
    pointers = [r.details.pointer_md5 for r in records if r.details and r.details.pointer_md5]
    return Sources(
        library=place.library(),
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
