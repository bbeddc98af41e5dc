"""`runkey summary` and `runkey ui`: what the last pipeline gave, and MLflow's pages."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from runkey import paths
from runkey.cli.output import AsJson, library, print_beside, print_json, store, workspace
from runkey.errors import DataError
from runkey.identity.key import short_key
from runkey.progress import log_to_terminal

_HINTS = 2
_COMPARED = 3
"""How many of the last runs `runkey ui` has an address for."""
_PLACES = (
    (paths.MODEL, "weights, classes and parameters"),
    (paths.PREPARED / "contact_sheet.jpg", "the data with its boxes"),
    (paths.PLOTS / "report.html", "all of it on one page, for a browser"),
    (paths.PLOTS / "best.jpg", "images that went well, truth beside prediction"),
    (paths.PLOTS / "worst.jpg", "images that went badly"),
    (paths.PLOTS, "curves and tables; `dvc plots show` makes a page of them"),
)


def summary(as_json: AsJson = False) -> None:
    """Show the result of the last pipeline, and where to look."""
    root = workspace()
    trained = _read(root / paths.METRICS / "train.json")
    evaluated = _read(root / paths.METRICS / "evaluate.json")
    run = _read(root / paths.RUN_JSON)
    if as_json:
        print_json({"key": run["key"], "run": run["run_id"]} | trained | evaluated)
        return
    numbers = [f"{name} {evaluated[name]:.3f}" for name in ("AP", "AP50", "AP75")]
    minutes, seconds = divmod(round(trained["seconds"]), 60)
    key = short_key(str(run["key"]))
    rows = [
        ("result", "   ".join(numbers) + "   (COCO, on the held-out images)"),
        ("training", f"{minutes} min {seconds:02d} s, weights of epoch {trained['best_epoch']}"),
        ("key", f"{key}   (runkey show {key})"),
        *((str(place), text) for place, text in _PLACES if (root / place).exists()),
        ("make ui", _mlflow_line(run)),
        *_next(root),
    ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print_beside(f"  {name:<{width}}  ", text)


def _next(root: Path) -> list[tuple[str, str]]:
    """What to try next: by the hints that still hold at the end, and another value.

    What they saw was said while it trained, and is on the report.
    """
    from runkey.params import load_params
    from runkey.plots.hints import lasting_hints
    from runkey.plots.log import SAMPLES, read_log, read_samples

    log = root / paths.LOGS / "train.jsonl"
    hints = []
    if log.is_file():
        params = load_params(root / paths.PARAMS).flat(runtime=True)
        hints = lasting_hints(read_log(log), params, read_samples(log.with_name(SAMPLES)))
    changes = [f"{hint.change}   (hint: {hint.kind})" for hint in hints[:_HINTS]]
    another = "dvc exp run -S lr=5e-4, then runkey list, make ui or dvc metrics diff"
    first, *others = [*changes, another]
    return [("try", first), *(("", text) for text in others)]


def ui(
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Local port; 0: any free one.")
    ] = 0,
) -> None:
    """Serve MLflow's pages on the store until Ctrl-C; prints where to look."""
    from runkey.params import load_params
    from runkey.tracking.store import served

    log_to_terminal()
    experiment = load_params(workspace() / paths.PARAMS).runtime.experiment
    # Ended by a process manager as by Ctrl-C: MLflow's own processes end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    place = store()
    if place.is_server:
        print("\n".join(_pages(place.uri, experiment)))
        return
    try:
        with served(place, port) as (address, server):
            print("\n".join(_pages(address, experiment)))
            print("Ctrl-C ends it")
            server.wait()
    except KeyboardInterrupt:
        print("stopped")


def _pages(address: str, experiment: str) -> list[str]:
    """Lines that name the run list and the comparison of the last runs."""
    from runkey.registry.query import Condition, Field, Query
    from runkey.registry.rest import RestClient
    from runkey.registry.server_library import comparison_page, list_page
    from runkey.tracking.store import VIEW

    lines = ["all runs", f"  {list_page(RestClient(address), address, experiment, VIEW)}"]
    finished = Condition(Field("run", "status"), "=", "FINISHED")
    last = [record.run for record in library().find(Query(conditions=(finished,), limit=_COMPARED))]
    if len(last) > 1:
        names = ", ".join(f"{run.name} ({short_key(run.key)})" for run in last)
        lines += [f"comparison of the last {len(last)}: {names}"]
        lines += [f"  {comparison_page(address, last)}"]
    return lines


def _mlflow_line(run: dict[str, Any]) -> str:
    if not run.get("run_id"):
        return "(this run was not recorded in MLflow)"
    return "MLflow's pages on all runs"


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path.relative_to(path.parents[1])}: not found; `make repro` makes it"
        ) from None
    return content
