"""`runkey index`: the records' files, written again from MLflow."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from runkey.cli.output import AsJson, print_json
from runkey.cli.place import store
from runkey.identity.record import Record
from runkey.progress import progress


def index(as_json: AsJson = False) -> None:
    """Write the records of all runs again from MLflow; needed only if they were lost."""
    from runkey.registry.checks.mlflow_run import count_runs
    from runkey.registry.reading.index import Rebuilt, rebuild

    place = store()
    if place.is_server:
        if as_json:
            print_json(Rebuilt().as_dict())
        else:
            print("a tracking server is asked each time: there are no records to write")
        return
    from runkey.tracking.scan import recorded_runs

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    records = recorded_runs(place, say)
    if place.database and place.database.is_file() and (total := count_runs(place.uri)):
        records = _watched(records, total)
    counts = rebuild(place.home, records)
    if as_json:
        print_json(counts.as_dict())
        return
    print(
        f"{counts.runs} runs in MLflow: {counts.written} records written, {counts.removed} removed"
    )


def _watched(records: Iterable[Record], total: int) -> Iterator[Record]:
    """The records, with the progress of whoever takes them."""
    with progress("index", total, "runs") as steps:
        for record in records:
            yield record
            steps.advance()
