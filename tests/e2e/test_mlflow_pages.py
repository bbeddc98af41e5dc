"""MLflow's pages in a real Chromium: `runkey ui` on a store with two runs, and what it names."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from runkey.identity.record import LoggedRun
from runkey.identity.record_cache import update_record
from runkey.params import load_params
from runkey.params.render import render_preset
from runkey.tracking.describe import describe_run
from runkey.tracking.mlflow_run import TrackedRun, open_run
from runkey.tracking.store import free_port, locate_store
from runkey.tracking.sync import RunSender, TrainingRun
from tests.support.chromium import Page, open_chromium

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SCREENSHOTS = REPOSITORY / ".screenshots"
PARTS = ("code", "params", "data", "environment")
AP = {"baseline": 0.6681, "lr=0.0005": 0.6127}
DATA = "4e07ac98afd05fc21423a795dc77f746.dir"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout in which the baseline and then another learning rate were trained."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "stages").mkdir()
    (root / "params.yaml").write_text(render_preset("sample"))
    (root / "data.dvc").write_text(f"outs:\n- md5: {DATA}\n  path: data\n")
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "start"]):
        subprocess.run([*git, *command], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("DVC_ROOT", raising=False)
        patch.chdir(root)
        text = (root / "params.yaml").read_text()
        record(root, "baseline", "a")
        (root / "params.yaml").write_text(re.sub("(?m)^lr: .*", "lr: 5e-4", text))
        record(root, "lr=0.0005", "b")
        yield root


def record(root: Path, name: str, digit: str) -> None:
    """A run as the stages record it; only the numbers are made up."""
    params = load_params(root / "params.yaml")
    records = locate_store().cache
    same = {part: f"{n}" * 64 for n, part in enumerate(PARTS)}

    def on_change(run: LoggedRun) -> None:
        update_record(records, run)

    description = describe_run(
        params,
        root,
        key=f"rk2-{digit * 64}",
        parts=same | {"params": digit * 64},
        tags={"device": "cpu x86_64", "host": "here"},
        counts={"train_images": 400},
    )
    training = TrainingRun(params.runtime.experiment, description, root / digit)
    tracker = open_run(locate_store(), training, root, on_change=on_change)
    for step in range(1, 21):
        tracker.log({"train/loss": 3.0 / step, "train/lr": params.lr * step / 20}, step)
    sender = RunSender(locate_store(), str(tracker.close()), on_change=on_change)
    evaluation = TrackedRun(None, sender)
    evaluation.log({"eval/AP": AP[name], "eval/AP50": AP[name] + 0.2}, 0)
    evaluation.close()


@pytest.fixture(scope="module")
def addresses(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What `runkey ui` names: the run list, the comparison of the last runs."""
    # The package as installed from this checkout, whatever is installed now.
    installed = tmp_path_factory.mktemp("installed") / "runkey-9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: runkey\nVersion: 9\n")
    (app,) = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"][
        "mlflow.app"
    ].items()
    (installed / "entry_points.txt").write_text(f"[mlflow.app]\n{' = '.join(app)}\n")
    python_path = f"{REPOSITORY}{os.pathsep}{installed.parent}"
    command = [sys.executable, "-m", "runkey", "ui", "--port", str(free_port())]
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if lines[-1] == "Ctrl-C ends it":
                break
        assert lines[0].startswith("starting MLflow's server")
        assert lines[1] == "all runs"
        assert lines[3].startswith("comparison of the last 2: lr=0.0005 (rk2-bbbbbbbbbbbb), base")
        yield [lines[2].strip(), lines[4].strip()]
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    assert rest.splitlines() == ["stopped"]
    assert process.returncode == 0


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_chromium(tmp_path_factory.mktemp("browser"), 2000, 1000) as opened:
        yield opened


def test_the_run_list_shows_what_matters_at_once(page: Page, addresses: list[str]) -> None:
    page.open(addresses[0])
    columns = ("eval/AP", "eval/AP50", "lr", "training.epochs", "key.data", "device", "Dataset")
    values = ("0.6681", "0.6127", "0.001", "0.0005", *(d * 64 for d in "ab023"), DATA)
    page.wait_for(*AP, *columns, *values)
    page.screenshot(SCREENSHOTS / "mlflow_runs.png")
    assert "shared view" not in page.text()
    _asks_nobody_else(page, addresses[0])


def test_a_new_browser_lands_on_the_runs_and_nothing_is_collected(
    addresses: list[str], tmp_path: Path
) -> None:
    server = addresses[0].partition("/#")[0]
    with open_chromium(tmp_path, 2000, 1000) as first:
        first.open(server)
        text = first.wait_for(*AP, "eval/AP", "Training runs of runkey")
        assert f"{server}/#/experiments/1/runs" in first.evaluate("location.href")
        for unwanted in ("collects usage data", "Observability", "Ask questions about"):
            assert unwanted not in text
        first.open(f"{server}/#/")  # the link `Home`
        first.evaluate("location.hash = '#/'")
        assert "collects usage data" not in first.wait_for("Welcome to MLflow")
        first.evaluate("location.hash = '#/settings'")
        first.wait_for("Enable telemetry", "Off")
        _asks_nobody_else(first, server)
        first.evaluate("localStorage.setItem('mlflow.workflowType_v1', '\"genai\"')")
        first.open(f"{server}/?again#/experiments")
        first.wait_for("detection")
        kept = first.evaluate("localStorage.getItem('mlflow.workflowType_v1')")
        assert kept == '"genai"', "what a user chose stays"
        columns = f"JSON.parse(localStorage.getItem('{_COLUMNS}')).selectedColumns"
        assert first.evaluate(columns)[:2] == ["duration", "metrics.`eval/AP`"]
        chosen = '{"selectedColumns": ["params.`seed`"]}'
        first.evaluate(f"localStorage.setItem('{_COLUMNS}', '{chosen}')")
        first.open(f"{server}/?columns#/experiments/1/runs")
        assert "eval/AP50" not in first.wait_for(*AP, "seed")
        assert first.evaluate(columns) == ["params.`seed`"], "what a user chose stays"


def test_the_run_page_tells_the_result_and_what_differs(page: Page, addresses: list[str]) -> None:
    page.open(addresses[0])
    page.wait_for(*AP)
    runs = "[...document.querySelectorAll('a')].find(one => one.innerText === 'lr=0.0005').click()"
    page.evaluate(runs)
    page.wait_for("Parameters that differ from the committed ones: lr 0.001 -> 0.0005.")
    page.screenshot(SCREENSHOTS / "mlflow_run.png")


def test_the_comparison_says_what_differs(page: Page, addresses: list[str]) -> None:
    page.open(addresses[1])
    page.wait_for(*AP, "Show diff only", "key.params")
    page.evaluate(_SHOW_DIFFERENCES)
    text = page.wait_for("0.668", "0.613", "0.001", "0.0005", "a" * 64, "b" * 64)
    page.resize(1600, 1800)
    page.screenshot(SCREENSHOTS / "mlflow_compare.png")
    assert "2" * 64 not in text  # the data are the same
    _asks_nobody_else(page, addresses[1])


_COLUMNS = 'MLflowLocalStorage-1.1-ExperimentPage-["1"]-ReactComponentState'
"""Where MLflow's pages keep the columns that a user chose for the first experiment."""
_SHOW_DIFFERENCES = """
document.querySelectorAll('[role=switch]').forEach(one => {
  if (one.getAttribute('aria-checked') === 'false') one.click()
})
"""


def _asks_nobody_else(page: Page, address: str) -> None:
    """No telemetry leaves, neither from the page and its workers nor by way of the server."""
    assert page.requests_elsewhere(address) == []
    assert [one for one in page.posts if "telemetry" in one.lower()] == []
