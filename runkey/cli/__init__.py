"""The command line: `python -m runkey --help`.

One thin file per group of commands.  What costs seconds to import (torch, mlflow) is imported by
the command that needs it, so help and checks answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from runkey import __version__
from runkey.cli import (
    debug,
    diff,
    env,
    get,
    list_runs,
    memory,
    params,
    report,
    share,
    store,
    summary,
    verify,
)
from runkey.errors import report_errors
from runkey.progress import WIDTH

app = typer.Typer(
    name="runkey",
    help="Reproducible object detection: a pipeline, and a key for every run of it.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": WIDTH},
)
app.command("debug-step")(debug.debug_step)
app.command("diff")(diff.diff)
app.command("draw")(report.draw)
app.add_typer(env.app, name="env")
app.command("export")(share.export_run)
app.command("fetch")(share.fetch)
app.command("gc")(store.gc)
app.command("get")(get.get)
app.command("import")(share.import_run)
app.command("index")(store.index)
app.command("key")(params.key)
app.command("list")(list_runs.list_runs)
app.command("memory")(memory.memory)
app.command("open")(get.open_page)
app.command("params")(params.show)
app.command("preset")(params.preset)
app.command("publish")(share.publish)
app.command("replay")(store.replay)
app.command("report")(report.report)
app.command("reproduce")(verify.reproduce)
app.command("sample-data")(params.sample_data)
app.command("show")(list_runs.show_run)
app.command("summary")(summary.summary)
app.command("ui")(summary.ui)
app.command("verify")(verify.verify)
app.command("watch")(report.watch)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"runkey {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error came from.")
    ] = False,
) -> None:
    """Reproducible object detection: a pipeline, and a key for every run of it."""


def main() -> None:
    """Run the command line; errors that a user can mend are one line, exit code 1."""
    with report_errors():
        app()
