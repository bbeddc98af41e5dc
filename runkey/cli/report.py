"""`runkey report`, `draw`, `watch` and `experiments`: pages, plots and tables of runs."""

from __future__ import annotations

import csv
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from runkey import paths
from runkey.cli import output
from runkey.cli.output import AsJson
from runkey.cli.project import summary
from runkey.errors import DataError, RegistryError, RunkeyError
from runkey.files import WriteError, read_json
from runkey.identity.initial_weights import weights_file
from runkey.identity.key import short_key, split_training, training_folder
from runkey.paths import TRAIN_LOG
from runkey.progress import log_to_terminal, say
from runkey.registry.dvc_cache import download
from runkey.registry.library import find_run, split_address
from runkey.registry.models import copy_model
from runkey.training.lock import holder_of

if TYPE_CHECKING:
    from runkey.plots.report import ReportedRun

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.5
_BEFORE = re.compile(r"-m stages\.(prepare|profile_memory|train)\b|\bdvc\S* (repro|exp run)\b")
_BEHIND = re.compile(r"-m (stages\.evaluate|runkey draw)\b")
"""Command lines of what trains soon, and of what runs after it."""
_WORKSPACE = "."
_EXAMPLE_BYTES = 300_000
"""Of an image file that goes into a page."""


def report(
    keys: Annotated[
        list[str] | None,
        Argument(
            help="Beginnings of keys; KEY:RUN for one of a key's runs; . for the last run here [.]."
        ),
    ] = None,
    to: Annotated[
        Path | None, Option("--to", help="The file [report-KEY.html].", dir_okay=False)
    ] = None,
    browser: Annotated[bool, Option("--browser", help="Open it in the web browser.")] = False,
    to_try: Annotated[
        bool,
        Option("--try", help="Write a page to try a run's model on images, in the browser."),
    ] = False,
    image: Annotated[
        Path | None,
        Option("--image", help="Example image for --try [a validation image].", exists=True),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a page about a run, or about what differs between runs; it opens offline."""
    from runkey.plots.report import write_report

    if image and not to_try:
        raise RunkeyError(f"--image {image}: goes with --try")

    with tempfile.TemporaryDirectory(prefix="runkey-report-") as folder:
        runs = [
            _run(address, Path(folder) / str(number))
            for number, address in enumerate(keys or [_WORKSPACE])
        ]
        digits = [run.label.partition("-")[2].replace(":", "-") for run in runs]
        kind = "try" if to_try else "report"
        target = to or Path("-".join([kind, *digits[:4]]) + ".html")
        try:
            if to_try:
                _write_try_page(runs, target, image)
            else:
                write_report(runs, target)
        except WriteError as error:
            raise RunkeyError(f"{error}; name another one with --to") from None
    answer = {"page": str(target), "keys": [run.key for run in runs]}
    output.print_answer(answer, str(target), as_json=as_json)
    if browser:
        webbrowser.open(target.resolve().as_uri())


def _write_try_page(runs: Sequence[ReportedRun], target: Path, image: Path | None) -> None:
    """Write a page to try the model of a run."""
    if len(runs) > 1:
        raise RunkeyError("--try takes one run; name one key")
    # Imported here: torch takes seconds.
    from runkey.inference.model import load_model_folder
    from runkey.inference.try_page import TryPage, check_before, export_network, write_try_page

    run, title = runs[0], f"{runs[0].label} {runs[0].run.name}".rstrip()
    is_here = run.folder == output.workspace()
    home = output.store().home
    model = run.folder / paths.MODEL if is_here else copy_model(output.library(), home, run)
    if (weights := weights_file(model)).is_file():
        check_before(weights.stat().st_size, title)
    card = load_model_folder(model, "cpu").card
    score = run.scores().get("AP")
    about = "" if score is None else f"AP {score:.3f} on the validation images"
    example = image or _example(run)
    picture = (example.name, example.read_bytes()) if example else None
    write_try_page(TryPage(card, export_network(model), title, about, picture), target)


def _example(run: ReportedRun) -> Path | None:
    """Return a small validation image with several objects, if the workspace has the run's data."""
    from runkey.data.index import index_file, read_index
    from runkey.identity.record import RunManifest

    root = output.workspace()
    with suppress(RunkeyError, OSError):
        if RunManifest.read(root / paths.RUN_JSON).parts["data"] == run.run.parts["data"]:
            folder = root / run.params.get("data.path", "data")
            images = sorted(
                read_index(index_file(root / paths.PREPARED, "val")), key=lambda one: one.id
            )
            several = [folder / one.file for one in images if len(one.labels) > 2] or [
                folder / one.file for one in images
            ]
            small = (file for file in several if file.stat().st_size < _EXAMPLE_BYTES)
            return next(small, None)
    return None


def draw(as_json: AsJson = False) -> None:
    """Draw the last run's plots/ and report anew (the stage `plots` of dvc.yaml)."""
    from runkey.pipeline.draw import REPORT
    from runkey.pipeline.draw import draw as draw_run

    log_to_terminal(stderr=True)
    draw_run(output.workspace())
    answer = {"folder": str(paths.PLOTS), "page": str(REPORT)}
    output.print_answer(answer, f"{paths.PLOTS}/ is drawn; see {REPORT}", as_json=as_json)
    # The last stage of `dvc repro` and `dvc exp run`; `make repro` prints the result itself.
    if "DVC_STAGE" in os.environ and os.environ.get("RUNKEY_SUMMARY") != "no":
        try:
            summary()
        except DataError as error:
            say(f"no result to show: {error}")


_SCORES = ("AP", "AP50", "val_loss", "train_loss", "seconds")
_NO_PARAMS = {"Experiment", "rev", "typ", "Created", "parent", "State", "Executor", "AP75"}
_NO_PARAMS |= {"epochs", "best_epoch", "split", "test_loss", *_SCORES}
_TASKS = ".dvc/tmp/exps/run"
"""Where DVC keeps what it knows of each task of its queue."""
_METRIC = re.compile(r"(val\.)?AP\d*(_low|_high)?")
"""Metrics of `evaluate` that are no column here: of the other split, and the ends of intervals."""


def experiments(as_json: AsJson = False) -> None:
    """Print DVC's experiments of this commit: AP, losses, time, what differs.

    Tasks of DVC's queue whose worker was killed are named, with the commands that start them again.
    """
    log_to_terminal(stderr=True)
    dvc = str(Path(sys.executable).with_name("dvc"))
    # Paths of code and outputs, whose hashes differ too, have a `/` or are these.
    hashes = "/|^(data|evaluation|logs|memory|model|plots|prepared|run.json|conda-lock.yml)$"
    command = [dvc, "exp", "show", "--csv", "--hide-queued", "--drop", hashes]
    try:
        asked = subprocess.run(
            command, cwd=output.workspace(), capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        raise RunkeyError(f"{dvc}: not found; `make env` installs it") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr.strip() or "no message").splitlines()
        why = next((line for line in lines if line.startswith("ERROR: ")), lines[-1])
        raise RunkeyError(f"dvc exp show: {why.removeprefix('ERROR: ')}") from None
    # DVC leaves out the columns that no row fills: `State` where nothing failed or was queued.
    always = {"Experiment": "", "State": ""}
    rows = [always | row for row in csv.DictReader(asked.stdout.splitlines())]
    commit = next((row for row in rows if row["rev"] != "workspace"), {})
    names = [name for name in commit if name not in _NO_PARAMS and not _METRIC.fullmatch(name)]
    scores_of: tuple[str, ...] = _SCORES
    if any(row.get("split") == "test" for row in rows):
        scores_of = (*_SCORES[:2], "split", *_SCORES[2:])
    leaves = Counter(name.rpartition(".")[2] for name in names)
    columns = ["experiment", *scores_of, "differs"]
    shown, lost = [], _lost_tasks([row["rev"] for row in rows if row["State"] == "Running"])
    for row in rows:
        # DVC gives a failed experiment the metrics of the working tree.
        is_done = row["State"] not in ("Failed", "Running")
        scores = [_number(row.get(name, "")) if is_done else "" for name in scores_of]
        changed = [name for name in names if row[name] != commit.get(name)]
        short = {name: name.rpartition(".")[2] for name in changed}
        items = (f"{short[n] if leaves[short[n]] == 1 else n}={row[n]}" for n in changed)
        if (rev := row["rev"]) in lost:
            changes = " ".join(f"-S {name}={row[name]}" for name in changed)
            logger.warning(_lost_line(row["Experiment"] or rev, changes, lost[rev]))
            row["State"] = "Lost"
        shown.append([_experiment(row), *scores, " ".join(items)])
    if as_json:
        output.print_json([dict(zip(columns, cells, strict=True)) for cells in shown])
    else:
        output.print_table(columns, shown, right=_SCORES, whole=("experiment", *scores_of))


def _experiment(row: Mapping[str, str]) -> str:
    """Return the name of an experiment, or of a commit, and its state if it is not done."""
    name = row["Experiment"] or row["rev"]
    return name if row["State"] in ("", "Success") else f"{name} ({row['State'].lower()})"


def _lost_tasks(revs: Sequence[str]) -> dict[str, int]:
    """Return the tasks, among those that DVC calls running, whose worker is gone.

    DVC never finds that out by itself. The value is the process that trains on, 0 if there is none.
    """
    if not revs:
        return {}
    import psutil

    root, workers, trainings = output.checkout(), 0, dict.fromkeys(revs, 0)
    for process in psutil.process_iter(["cwd", "cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        workers += "exp queue-worker" in command and process.info["cwd"] == str(root)
        for rev in revs:
            if "exp exec-run" in command and f"{root}/{_TASKS}/{rev}" in command:
                trainings[rev] = process.pid
    return {
        rev: pid
        for rev, pid in trainings.items()
        # A worker that lives has set a task up, or its files say how it ended.
        if not workers or (not pid and _has_not_ended(root / _TASKS, rev))
    }


def _has_not_ended(tasks: Path, rev: str) -> bool:
    """Return True if DVC started the process of a task and has not recorded its end."""
    files = tasks.glob(f"{rev}*/{rev}*.json")
    return any(read_json(file, dict[str, Any]).get("returncode") is None for file in files)


def _lost_line(name: str, changes: str, pid: int) -> str:
    """Say that a task is lost, and what to do."""
    before = f"wait until process {pid} has trained, then " if pid else ""
    return (
        f"{name}: its queue worker was killed, and DVC calls it running for good; {before}run `dvc"
        f" queue kill {name}`, `dvc queue remove {name}` and `dvc exp run --queue {changes}`: the"
        " training goes on from its checkpoint, and a finished one is reused"
    )


def _number(text: str) -> str:
    if text in ("val", "test"):
        return text
    try:
        return f"{float(text):.3g}"
    except ValueError:  # empty, or `!` where a commit lacks the file
        return ""


def _run(address: str, folder: Path) -> ReportedRun:
    from runkey.plots.report import is_shown, recorded_run, workspace_run

    if address == _WORKSPACE:
        return workspace_run(output.workspace())
    runs = output.library()
    record = find_run(runs, address)
    if record.details:
        wanted = [path for path in record.details.files if is_shown(path)]
        download(runs, record, wanted, folder)
    else:  # it runs or was interrupted: its logs are in its training folder
        training = training_folder(output.store().home, record.key, record.reproduction_of)
        (folder / TRAIN_LOG.parent).mkdir(parents=True)
        for log in filter(Path.is_file, training.glob("*.jsonl")):
            shutil.copy(log, folder / TRAIN_LOG.parent)
    return recorded_run(record, folder)


def watch(
    key: Annotated[str | None, Argument(help="Prefix of a key [the newest training here].")] = None,
) -> None:
    """Follow a training: loss, AP, learning rate, gradient norm, speed, hints.

    It waits for one that is about to begin, and ends with the training.
    """
    from runkey.plots.watch import follow

    log_to_terminal()
    _wait_for_start()
    with tempfile.TemporaryDirectory(prefix="runkey-watch-") as folder:
        log, title, params = _find(key, Path(folder))
        if not follow(log, title, params, lambda: holder_of(log.parent) is not None):
            say("interrupted; `dvc repro` goes on from its last checkpoint")
            output.answer_no()


def _wait_for_start() -> None:
    """Wait while a pipeline works here that has not yet begun to train."""
    said = False
    while _is_about_to_train() and not any(map(_is_trained, output.trainings(""))):
        if not said:
            logger.info("the pipeline here has not begun to train; waiting for it (Ctrl-C leaves)")
            said = True
        time.sleep(_PAUSE_SECONDS)


def _is_trained(folder: Path) -> bool:
    return (folder / TRAIN_LOG.name).is_file() and holder_of(folder) is not None


def _is_about_to_train() -> bool:
    """Return True if DVC or a stage up to train works in the checkout, and no stage behind it."""
    import psutil

    try:
        root = output.checkout()
    except RunkeyError:  # the store alone is named
        return False
    lines = [
        " ".join(process.info["cmdline"] or ())
        for process in psutil.process_iter(["cwd", "cmdline"])
        if process.info["cwd"] and Path(process.info["cwd"]).is_relative_to(root)
    ]
    return any(map(_BEFORE.search, lines)) and not any(map(_BEHIND.search, lines))


def _find(key: str | None, folder: Path) -> tuple[Path, str, Mapping[str, str]]:
    """Return log, title and parameters of a key's training, or of the newest one.

    The log of a training that is not here is downloaded into the folder.
    """
    if key:
        split_address(key)
    logs = [folder / TRAIN_LOG.name for folder in output.trainings((key or "").strip().lower())]
    if logs := [log for log in logs if log.is_file()]:
        log = max(logs, key=lambda log: (holder_of(log.parent) is not None, log.stat().st_mtime))
        whole, _ = split_training(log.parent)
        with suppress(RegistryError):  # the log is enough
            for run in (known.run for known in output.library().matching(whole)[-1:]):
                return log, f"{short_key(whole)}  {run.name}".rstrip(), run.params
        return log, short_key(whole), {}
    if key:
        record = find_run(output.library(), key)
        if record.details is None:
            host = record.run.tags.get("host", "another machine")
            raise RegistryError(
                f"{record.label}: {record.run.status}, and its log is not here but on {host};"
                f" `runkey open {record.label}` names its MLflow page"
            )
        download(output.library(), record, [TRAIN_LOG.as_posix()], folder)
        return folder / TRAIN_LOG, f"{record.label}  {record.run.name}", record.run.params
    if (log := output.workspace() / TRAIN_LOG).is_file():
        return log, "the last training here", {}
    raise RunkeyError(
        f"{output.store().home}: nothing is trained here; `dvc repro` begins a training"
    )
