"""The command line: `python -m runkey --help`.

One thin file per group of commands.  What costs seconds to import (torch, mlflow) is imported by
the command that needs it, so help and checks answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from runkey import __version__
from runkey.cli import (
    archive,
    debug_step,
    diff,
    env,
    gc,
    get,
    index,
    key,
    list_runs,
    memory,
    open_page,
    params,
    replay,
    report,
    reproduce,
    results,
    sample,
    show_run,
    team,
    verify,
    watch,
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
app.command("debug-step")(debug_step.debug_step)
app.command("diff")(diff.diff)
app.add_typer(env.app, name="env")
app.command("export")(archive.export_run)
app.command("fetch")(team.fetch)
app.command("gc")(gc.gc)
app.command("get")(get.get)
app.command("import")(archive.import_run)
app.command("index")(index.index)
app.command("key")(key.key)
app.command("list")(list_runs.list_runs)
app.command("memory")(memory.memory)
app.command("open")(open_page.open_page)
app.command("params")(params.show)
app.command("preset")(params.preset)
app.command("publish")(team.publish)
app.command("replay")(replay.replay)
app.command("report")(report.report)
app.command("reproduce")(reproduce.reproduce)
app.command("sample-data")(sample.sample_data)
app.command("show")(show_run.show)
app.command("summary")(results.summary)
app.command("ui")(results.ui)
app.command("verify")(verify.verify)
app.command("watch")(watch.watch)


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
