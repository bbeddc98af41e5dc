"""`runkey index`: the records' files, written again from MLflow."""

from __future__ import annotations

import sys

from runkey.cli.output import AsJson, print_json
from runkey.cli.place import store


def index(as_json: AsJson = False) -> None:
    """Write the records of all runs again from MLflow; needed only if they were lost."""
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

    counts = rebuild(place.home, recorded_runs(place, say))
    if as_json:
        print_json(counts.as_dict())
        return
    print(
        f"{counts.runs} runs in MLflow: {counts.written} records written, {counts.removed} removed"
    )
