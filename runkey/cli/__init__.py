"""The command line: `python -m runkey --help`.

One thin file per group of commands.  What costs seconds to import (torch, mlflow) is imported by
the command that needs it, so help and checks answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from runkey.cli import key, params, results, sample
from runkey.errors import report_errors

app = typer.Typer(
    name="runkey",
    help="Reproducible object detection: parameters, sample data and results of the pipeline.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("key")(key.key)
app.command("preset")(params.preset)
app.command("params")(params.show)
app.command("sample-data")(sample.sample_data)
app.command("summary")(results.summary)
app.command("ui")(results.ui)


@app.callback()
def options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error came from.")
    ] = False,
) -> None:
    """Reproducible object detection: parameters, sample data and results of the pipeline."""


def main() -> None:
    """Run the command line; errors that a user can mend are one line, exit code 1."""
    with report_errors():
        app()
