"""The command line: `runkey --help`.

One file per group of commands, imported when one of them is used.  Slow imports (torch, mlflow) are
inside the command that needs them, so that the reading commands answer at once.
"""

from __future__ import annotations

# ruff: noqa: E402
from runkey.errors import report_early_interrupt

report_early_interrupt()  # the imports below take a while

import gc
from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Annotated, Any

from typer import Exit, Option, Typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from runkey import __version__
from runkey.errors import report_errors
from runkey.progress import WIDTH, log_to_terminal, say

COMMANDS = {
    "convert": (
        "convert.convert",
        "Make a COCO folder of YOLO or Pascal VOC labels; needs `make env-convert`.",
    ),
    "debug-images": (
        "debug.debug_images",
        "Draw training images with their boxes as params.yaml has them augmented.",
    ),
    "debug-step": (
        "debug.debug_step",
        "Replay a step; name the first module that made NaN or inf out of finite numbers.",
    ),
    "delete": (
        "store.delete",
        "List all that is kept of runs, finished ones too; with --apply delete it.",
    ),
    "diff": ("runs.diff", "Compare two runs: the parts of their keys, metrics, machines."),
    "draw": (
        "report.draw",
        "Draw the last run's plots/ and report anew (the stage `plots` of dvc.yaml).",
    ),
    "experiments": (
        "report.experiments",
        "Print DVC's experiments of this commit: AP, losses, time, what differs.",
    ),
    "export": (
        "share.export_run",
        "Write a run to one file: results, DVC's entries, snapshot and MLflow run.",
    ),
    "export-model": (
        "use.export_model",
        "Write a model that runs without this project: ONNX, torch or OpenVINO.",
    ),
    "fetch": ("share.fetch", "Get a published run from the team, so that `dvc repro` restores it."),
    "gc": ("store.gc", "List what may be deleted: failed runs, old checkpoints, dead claims."),
    "get": (
        "runs.get",
        "Copy a run's files here; check each against the hash that the run recorded.",
    ),
    "import": (
        "share.import_run",
        "Import a run from a file, all of it checked; `dvc repro` then restores it.",
    ),
    "index": (
        "store.index",
        "Write the cache of runs again from MLflow; needed only if it was lost.",
    ),
    "key": (
        "project.key",
        "Print the key of a stage for the working tree; nothing needs to have run.",
    ),
    "list": ("runs.list_runs", "List recorded runs, newest first."),
    "memory": (
        "memory.memory",
        "Predict the memory of a training step: by class, by module, on common GPUs.",
    ),
    "open": (
        "runs.open_page",
        "Print the address of a run's MLflow page; of several runs, of their comparison.",
    ),
    "params": ("project.show", "Check params.yaml; print every value, defaults filled in."),
    "predict": (
        "use.predict",
        "Detect objects in images and videos; write lists, labels and drawn images.",
    ),
    "preset": (
        "project.preset",
        "Write a preset as a complete params.yaml; without a name, list them.",
    ),
    "profile": (
        "profile.profile",
        "Run some training steps on the prepared data; show where their time goes.",
    ),
    "promote": (
        "use.promote",
        "Register a run's model in MLflow, and point an alias at its version.",
    ),
    "publish": (
        "share.publish",
        "Publish a run to the team: results, DVC's entries, snapshot and MLflow run.",
    ),
    "replay": (
        "store.replay",
        "Send MLflow what it lacks of a training that ended while it was away.",
    ),
    "report": (
        "report.report",
        "Write a page about a run, or about what differs between runs; it opens offline.",
    ),
    "reproduce": (
        "verify.reproduce",
        "Train a run again from its snapshot, data and lock; compare weights and numbers.",
    ),
    "sample-data": (
        "project.sample_data",
        "Draw the sample data, numbered balls, from scikit-learn's digits and photos.",
    ),
    "show": (
        "runs.show_run",
        "Show a run: status, key, metrics, parameters, environment, files, location.",
    ),
    "speed": (
        "use.speed",
        "Measure AP and time of each way to run a model: runtime, number format, layers.",
    ),
    "sweep": (
        "sweep.sweep",
        "Train a grid, a list, random points or a search over parameters, each key once.",
    ),
    "trial": (
        "sweep.trial",
        "Train a snapshot with changed parameters, in a worktree; safe to start anywhere.",
    ),
    "summary": ("project.summary", "Show the result of the last pipeline, and where to look next."),
    "ui": (
        "store.ui",
        "Serve MLflow's pages on the store until Ctrl-C, and print their addresses.",
    ),
    "verify": (
        "verify.verify",
        "Hash a run's files again; check MLflow run, snapshot, DVC entry, environment.",
    ),
    "watch": (
        "report.watch",
        "Follow a training: loss, AP, learning rate, gradient norm, speed, hints.",
    ),
    "weights": (
        "project.weights",
        "Download published weights, checked by hash; without a name, list them.",
    ),
    "env": ("project.env", "Compare what is installed with the lock; get a run's lock."),
}
"""The function of each command, and what the list of commands says of it: the start of its help.

A command is imported when it is used: all of them together take as long as everything else that
`runkey --help` does.
"""


class _Commands(MutableMapping[str, Any]):
    """The commands of `COMMANDS` by name, each built when it is asked for."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            module, function = COMMANDS[name][0].split(".")
            found = getattr(import_module(f"runkey.cli.{module}"), function)
            if not isinstance(found, Typer):
                alone = Typer(add_completion=False, rich_markup_mode=None)
                alone.command(name)(found)
                found = alone
            self._built[name] = get_command(found)
            self._built[name].name = name
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Group(TyperGroup):
    """The command `runkey`, which imports of its commands the one that is used."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"commands": {}})
        self.commands = _Commands()

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        limit = formatter.width - 6 - max(map(len, COMMANDS))
        texts = {name: TyperCommand(name, help=text) for name, (_, text) in COMMANDS.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(n, one.get_short_help_str(limit)) for n, one in texts.items()])


app = Typer(
    cls=_Group,
    name="runkey",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": WIDTH},
)


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
    # Imports make objects by the ten thousand; looking for cycles among them takes as long.
    gc.set_threshold(20_000)
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
