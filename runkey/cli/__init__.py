"""The command line: `runkey --help`.

One file per group of commands.  Slow imports (torch, mlflow) are inside the command that needs
them, so that help and the reading commands answer at once.
"""

from __future__ import annotations

# ruff: noqa: E402
from runkey.errors import report_early_interrupt

report_early_interrupt()  # the imports below take half a second

from typing import Annotated

from typer import Exit, Option, Typer

from runkey import __version__
from runkey.cli import (
    convert,
    debug,
    memory,
    profile,
    project,
    report,
    runs,
    share,
    store,
    use,
    verify,
)
from runkey.errors import report_errors
from runkey.progress import WIDTH, log_to_terminal, say

app = Typer(
    name="runkey",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": WIDTH},
)
app.command("convert")(convert.convert)
app.command("debug-images")(debug.debug_images)
app.command("debug-step")(debug.debug_step)
app.command("delete")(store.delete)
app.command("diff")(runs.diff)
app.command("draw")(report.draw)
app.add_typer(project.env, name="env")
app.command("experiments")(report.experiments)
app.command("export")(share.export_run)
app.command("export-model")(use.export_model)
app.command("fetch")(share.fetch)
app.command("gc")(store.gc)
app.command("get")(runs.get)
app.command("import")(share.import_run)
app.command("index")(store.index)
app.command("key")(project.key)
app.command("list")(runs.list_runs)
app.command("memory")(memory.memory)
app.command("open")(runs.open_page)
app.command("params")(project.show)
app.command("predict")(use.predict)
app.command("preset")(project.preset)
app.command("profile")(profile.profile)
app.command("promote")(use.promote)
app.command("publish")(share.publish)
app.command("replay")(store.replay)
app.command("report")(report.report)
app.command("reproduce")(verify.reproduce)
app.command("sample-data")(project.sample_data)
app.command("show")(runs.show_run)
app.command("speed")(use.speed)
app.command("summary")(project.summary)
app.command("ui")(store.ui)
app.command("verify")(verify.verify)
app.command("watch")(report.watch)
app.command("weights")(project.weights)


def _say_version(asked: bool) -> None:
    if asked:
        say(f"runkey {__version__}")
        raise Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        Option("--version", help="Print the version.", callback=_say_version, is_eager=True),
    ] = False,
    traceback: Annotated[
        bool, Option("--traceback", help="Show the Python traceback of an error.")
    ] = False,
) -> None:
    """Reproducible object detection: a pipeline, and a key for every run of it."""


def main() -> None:
    """Run the command line; an error that a user can mend is one line, exit code 1."""
    log_to_terminal(stderr=True)
    with report_errors():
        try:
            app()
        except SystemExit as ended:
            # typer catches Ctrl-C and says nothing.
            stopped = ended.__context__ and ended.__context__.__cause__
            if isinstance(stopped, KeyboardInterrupt):
                raise stopped from None
            raise
