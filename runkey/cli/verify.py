"""`runkey verify` and `runkey reproduce`: check a recorded run, or train it again."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option, confirm

from runkey.cli import output
from runkey.cli.output import AsJson, Key, Line
from runkey.errors import RegistryError, RunkeyError
from runkey.identity.key import ANY_KEY
from runkey.identity.record import Record
from runkey.identity.record_cache import update_record
from runkey.progress import each, log_to_terminal, say
from runkey.registry.library import find_run, open_library, run_reader
from runkey.units import counted

if TYPE_CHECKING:
    from runkey.registry.reproduce import ForeignCode, RunComparison
    from runkey.registry.verify import CheckResult, Report, Sources


def reproduce(
    key: Key,
    keep: Annotated[
        bool, Option("--keep", help="Leave the worktree that it was trained in.")
    ] = False,
    any_environment: Annotated[
        bool,
        Option("--any-environment", help="Go on where packages are not as locked then."),
    ] = False,
    trust: Annotated[
        bool, Option("--trust", help="Execute code of others without asking; for scripts.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a run again from its snapshot, data and lock; compare weights and numbers.

    Of a run that was imported or fetched, this executes code of others: it asks first.
    """
    from runkey.registry.reproduce import foreign_code
    from runkey.registry.reproduce import reproduce as repeat_run

    library, store = output.library(), output.store()
    record = find_run(library, key)
    is_shared = store.is_server or store.home.parent.resolve() != output.checkout()
    foreign = foreign_code(record, output.checkout(), is_shared=is_shared)
    if foreign and not trust:
        _ask(record, foreign)
    # A process manager or a closed terminal ends it as Ctrl-C does: the pipeline ends first.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as after `nohup`
            signal.signal(number, signal.default_int_handler)
    log_to_terminal(stderr=True)
    comparison, outcome = repeat_run(
        record,
        library,
        output.checkout(),
        store.home,
        sys.stderr if as_json else sys.stdout,  # with --json, stdout holds only that
        keep=keep,
        any_environment=any_environment,
    )
    _record(record, comparison, outcome)
    if as_json:
        output.print_json({"key": record.key, "run": record.run.run_id, **outcome})
    else:
        _print_reproduction(record, comparison, outcome)
    if not comparison.holds:
        output.answer_no()


def _ask(record: Record, foreign: ForeignCode) -> None:
    """Ask whether to execute other people's code; RegistryError on no or without a terminal."""
    text = f"{record.label}: {foreign}"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise RegistryError(f"{text}; --trust executes it")
    output.print_beside("", text, stderr=True)
    if not confirm("Execute it?", err=True):
        raise RegistryError(f"{record.label}: not trained again")


def _record(record: Record, comparison: RunComparison, outcome: dict[str, Any]) -> None:
    """Write the outcome to the first run: to its record and its tag `reproduced`."""
    from mlflow.exceptions import MlflowException

    from runkey.tracking.transfer import write_details

    store = output.store()
    # Read it again: others may have written to it during the training.
    latest = find_run(output.library(), f"{record.key}:{record.run.run_id}")
    if latest.details is None:
        raise RegistryError(f"{record.label}: run {record.run.run_id} has lost its record.json")
    details = replace(latest.details, outcomes=[*latest.details.outcomes, outcome])
    tags = {"reproduced": f"{comparison.line} (run {outcome['run_id']})"}
    try:
        run = write_details(store, record.run.run_id, details, tags)
    except MlflowException as error:
        raise RegistryError(
            f"{record.label}: {comparison.line}; MLflow did not record it: {error.message}"
        ) from None
    update_record(store.cache, run, details)


def _print_reproduction(record: Record, comparison: RunComparison, outcome: dict[str, Any]) -> None:
    """Print both runs side by side, and the result."""
    rows = [
        (path, _short(a), _short(b), _answer(a == b, "same bits"))
        for path, (a, b) in comparison.files.items()
    ]
    for metric in comparison.metrics:
        near = _answer(metric.is_near, f"within {metric.tolerance:.3g}")
        text = "equal" if metric.first == metric.repeat else near
        rows.append((metric.name, f"{metric.first:.6g}", f"{metric.repeat:.6g}", text))
    first, second = record.run.run_id[:8], _short(outcome["run_id"])[:8]
    say()
    output.print_table(("", f"run {first}", f"repeat {second}", ""), rows)
    for difference in comparison.class_differences:
        say(f"witness: {difference}")
    say(f"{record.label} {comparison.line} ({outcome['seconds']:.0f} s)")


def _answer(good: bool, words: str) -> str:
    return words if good else f"NOT {words}"


def _short(value: Any) -> str:
    return str(value)[:12] if value else "none"


def verify(
    key: Annotated[str, Argument(help="Prefix of a key; KEY:RUN for one of its runs.")] = "",
    every: Annotated[bool, Option("--all", help="Verify all runs, a line each.")] = False,
    quick: Annotated[bool, Option("--quick", help="Do not hash: presence and sizes only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hash a run's files again; check MLflow run, snapshot, DVC entry, environment."""
    if bool(key) == every:
        raise BadParameter("give one KEY, or --all")
    if every:
        _verify_all(quick=quick, as_json=as_json)
        return
    from runkey.registry.verify import verify_run

    record = find_run(output.library(), key)
    report = verify_run(record, _sources(quick=quick))
    report.findings += _tree_result()
    title = (f"{record.label}  ", f"{record.run.name or 'without a name'}  (run {report.run_id})")
    lines = [line for result in report.findings for line in _lines(result)]
    lines.append(report.summary)
    output.print_answer(report.as_dict(), title, *lines, as_json=as_json, yes=report.is_right)


def _verify_all(*, quick: bool, as_json: bool) -> None:
    from runkey.registry.verify import CheckResult, find_unrecorded, summarize, verify_run

    torn: list[str] = []
    store = output.store()
    runs = open_library(store.uri, store.home, torn.append)
    records, beside = [], []
    for record in each("read records", runs.matching(ANY_KEY), "runs"):
        try:
            records.append(runs.with_details(record))
        except RunkeyError as error:
            beside.append(CheckResult("files", "fault", str(error)))
    beside += [
        CheckResult("record", "fault", text, "`runkey index` writes it again") for text in torn
    ]
    beside += _tree_result()
    beside += find_unrecorded(store.uri, {record.run.run_id for record in records})
    sources = _sources(quick=quick)
    reports = []
    for record in each("verify", records, "runs"):
        reports.append(verify_run(record, sources))
        if not as_json:
            _print_line(reports[-1])
    results = [*beside, *(result for report in reports for result in report.findings)]
    right = all(result.state != "fault" for result in results)
    dicts = [report.as_dict() for report in reports]
    answer = {"right": right, "runs": dicts, "beside": [asdict(one) for one in beside]}
    lines = [line for result in beside for line in _lines(result)]
    total = f"{counted(len(reports), 'run')} in {runs.place}: {summarize(results)}"
    output.print_answer(answer, *lines, total, as_json=as_json, yes=right)


def _tree_result() -> list[CheckResult]:
    """Warn if the current folder's files have another key than its run.json."""
    from runkey.registry.verify import CheckResult

    return [CheckResult("workspace", "warning", note) for note in [output.tree_note()] if note]


def _sources(*, quick: bool) -> Sources:
    """The places of the current folder's store and checkout."""
    from runkey.registry.verify import Sources

    store = output.store()
    return Sources(
        library=output.library(),
        stored=run_reader(store.uri),
        root=output.checkout(),
        is_shared=store.is_server,
        quick=quick,
    )


_STATES = {"ok": "ok", "warning": "warning", "fault": "FAULT"}


def _lines(result: CheckResult) -> Iterator[Line]:
    yield f"  {_STATES[result.state]:<7}  {result.check:<11}  ", result.text
    if result.way_out and result.state != "ok":
        yield f"  {'':<7}  {'':<11}  -> ", result.way_out


def _print_line(report: Report) -> None:
    """Print one line of a run, with the first thing that is wrong."""
    first = next(iter(report.of("fault") or report.of("warning")), None)
    state = _STATES[first.state] if first else "ok"
    text = f"{report.summary}: {first.check}: {first.text}" if first else report.record.run.name
    output.print_beside(f"  {state:<7}  {report.record.label}:{report.run_id[:8]}  ", text)
