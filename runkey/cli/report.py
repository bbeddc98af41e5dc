"""`runkey report KEY...`: one HTML page about a run, or about what differs between several."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runkey import paths
from runkey.cli.output import AsJson, print_json
from runkey.cli.place import library, store, workspace
from runkey.errors import RunkeyError

if TYPE_CHECKING:
    from runkey.plots.report.source import Run

_WORKSPACE = "."


def report(
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            help="Beginnings of keys; KEY:RUN for one of a key's runs; . for the last run here [.]."
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="The file [report-KEY.html].", dir_okay=False)
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in the web browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a page about a run, or about what differs between runs; it opens offline."""
    from runkey.plots.report.page import write_report

    with tempfile.TemporaryDirectory(prefix="runkey-report-") as folder:
        runs = [
            _run(address, Path(folder) / str(number))
            for number, address in enumerate(keys or [_WORKSPACE])
        ]
        digits = [run.label.partition("-")[2].replace(":", "-") for run in runs]
        target = to or Path("-".join(["report", *digits[:4]]) + ".html")
        try:
            write_report(runs, target)
        except OSError as error:
            raise RunkeyError(f"{target}: {error.strerror}; name another one with --to") from None
    if as_json:
        print_json({"page": str(target), "keys": [run.key for run in runs]})
    else:
        print(target)
    if browser:
        import webbrowser

        webbrowser.open(target.resolve().as_uri())


def _run(address: str, folder: Path) -> Run:
    """A run, with those of its files that a page shows put into a folder."""
    from runkey.plots.report.source import LOG, is_wanted, recorded_run, workspace_run
    from runkey.registry.download import download
    from runkey.registry.library import find_run

    if address == _WORKSPACE:
        return workspace_run(workspace())
    runs = library()
    record = find_run(runs, address)
    if record.details:
        wanted = [path for path in record.details.files if is_wanted(path)]
        download(runs, record, wanted, folder)
        return recorded_run(record, folder)
    # It runs, or was interrupted: what there is of it lies where it trains.
    training = paths.training_folder(store().home, record.key, record.reproduction_of)
    (folder / LOG.parent).mkdir(parents=True)
    for log in training.glob("*.jsonl"):
        shutil.copyfile(log, folder / LOG.parent / log.name)
    return recorded_run(record, folder)
