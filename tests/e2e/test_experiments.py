"""Real DVC and MLflow: whatever starts a run, it lands whole in the one store."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from runkey.identity.key import make_recipe, training_folder
from runkey.identity.record import RunPointer
from runkey.params import load_params
from runkey.tracking.store import (
    free_port,
    locate_store,
    open_client,
    start_server,
    stop_server,
    wait_until_healthy,
)
from tests.support.points import read_jsonl
from tests.support.project import (
    Project,
    clean_environment,
    in_one_line,
    queue_workers,
    stop_queue,
    wait_for,
)
from tests.support.terminal import on_terminal, screen

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

REPOSITORY = Path(__file__).parents[2]
TITLES = {
    "Loss",
    "AP on the held-out images",
    "Training loss",
    "Learning rate",
    "Gradient norm",
    "Precision and recall at IoU 0.5",
    "Confusion matrix",
}


def runs(project: Project) -> dict[str, Any]:
    """The MLflow runs of the project's store by id."""
    store = locate_store(project.root)
    client = open_client(store)
    ids = [e.experiment_id for e in client.search_experiments()]
    return {run.info.run_id: run for run in client.search_runs(ids)}


def assert_whole(project: Project, run: Any) -> None:
    """Finished, evaluated, with its artifacts in the checkout's own folder."""
    assert run.info.status == "FINISHED"
    assert 0 <= run.data.metrics["eval/AP"] <= 1
    assert run.data.metrics["train/loss"] > 0
    assert run.data.params["key"].startswith("rk2-")
    digest = run.inputs.dataset_inputs[0].dataset.digest
    assert f"md5: {digest}" in (project.root / "data.dvc").read_text()
    artifacts = project.root / "mlartifacts" / run.info.run_id / "artifacts"
    assert run.info.artifact_uri == artifacts.as_uri()
    weights = "model/weights.safetensors"
    for name in (weights, "logs/train.jsonl", "plots/loss_and_ap.png", "run.json"):
        assert (artifacts / name).is_file(), name
    for name in ("evaluation/metrics.json", "plots/best.jpg", "plots/report.html"):
        assert (artifacts / name).is_file(), name


def test_the_first_repro_records_a_whole_run(project: Project) -> None:
    output = project.first_output  # type: ignore[attr-defined]
    assert "error" not in output.lower()
    (run,) = runs(project).values()
    assert_whole(project, run)
    manifest = project.json("run.json")
    assert (manifest["run_id"], manifest["key"]) == (run.info.run_id, run.data.params["key"])
    assert run.info.run_name == "baseline"
    assert manifest["witness"]["undeclared_files"] == []
    assert project.json("metrics/evaluate.json")["AP"] == run.data.metrics["eval/AP"]
    # The stage that evaluates sees what training saw when it kept these weights.
    entries = [e["values"] for e in read_jsonl(project.root / "logs/train.jsonl") if "values" in e]
    best = max(values["val/AP"] for values in entries if "val/AP" in values)
    assert project.json("metrics/evaluate.json")["AP"] == pytest.approx(best, abs=1e-9)


def test_what_the_pipeline_says_fits_100_columns_and_is_said_once(project: Project) -> None:
    lines = [line for line in project.first_output.splitlines() if line.strip()]
    assert [line for line in lines if len(line) > 100] == []
    assert "\x1b" not in project.first_output
    own = [line for line in lines if line != "Updating lock file 'dvc.lock'"]  # DVC's, each stage
    assert [line for line in own if own.count(line) > 1] == []


def test_the_result_is_printed_by_the_last_stage(project: Project) -> None:
    summary = project.summary()
    assert summary.startswith("  result ")
    assert summary in project.first_output
    found = project.json("metrics/evaluate.json")
    scores = [f"{name} {found[name]:.3f}" for name in ("AP", "AP75")]
    assert re.search(rf"{scores[0]}.*, {scores[1]} on 6 held-out images", project.first_output)
    told = {"DVC_STAGE": "plots", "RUNKEY_SUMMARY": "no"}
    drawn = project.run(sys.executable, "-m", "runkey", "draw", env=told)
    assert "result" not in drawn.stdout, "`make repro` prints it itself"
    project.dvc("checkout", "--force", "plots")  # the report may have another time


def test_the_second_repro_does_nothing(project: Project) -> None:
    before = set(runs(project))
    assert "Data and pipelines are up to date." in project.dvc("repro")
    assert set(runs(project)) == before
    done = project.run("git", "status", "--porcelain")
    assert done.stdout == ""


def test_a_changed_plot_is_drawn_again_and_nothing_else_runs(project: Project) -> None:
    run_id = project.json("run.json")["run_id"]
    recorded = project.root / "mlartifacts" / run_id / "artifacts" / "plots"
    curve, report = project.root / "plots/loss_and_ap.png", project.root / "plots/report.html"
    before = curve.read_bytes(), report.read_bytes()
    assert (recorded / curve.name).read_bytes() == before[0]
    style = project.root / "runkey/plots/style.py"
    code = style.read_text()
    assert code.count('\nGREY = "') == 1
    style.write_text(code.replace('\nGREY = "', '\nBLUE = "#0000FF"\nGREY = "'))
    assert re.findall(r"Running stage '(\w+)'", project.dvc("repro")) == ["plots"]
    assert curve.read_bytes() != before[0]
    assert report.read_bytes() != before[1]
    assert (recorded / curve.name).read_bytes() == curve.read_bytes()
    assert project.json("run.json")["run_id"] == run_id
    project.run(sys.executable, "-m", "runkey", "verify", project.json("run.json")["key"])
    style.write_text(code)
    assert "Running stage" not in project.dvc("repro")
    assert (curve.read_bytes(), report.read_bytes()) == before
    project.run(sys.executable, "-m", "runkey", "draw")  # by hand: MLflow has what is here, again
    assert (recorded / curve.name).read_bytes() == curve.read_bytes() == before[0]
    project.dvc("commit", "--force", "plots")  # the report may have another time
    project.run("git", "commit", "-q", "-a", "--allow-empty", "-m", "pictures")


def test_every_kind_of_experiment_lands_in_the_store(project: Project) -> None:
    baseline = project.json("run.json")["run_id"]
    project.dvc("exp", "run", "-S", "lr=5e-5")
    assert "lr: 5e-05" in (project.root / "params.yaml").read_text()
    assert project.json("run.json")["run_id"] != baseline
    table = json.loads(project.dvc("metrics", "diff", "--json", "--all"))
    few = project.json("metrics/evaluate.json")
    assert set(few) == {
        *("AP", "AP_low", "AP_high", "AP50", "AP50_low", "AP50_high", "AP75", "val_loss", "split"),
    }
    # DVC leaves null out: an AP of 0 has no interval.
    known = {name for name, value in few.items() if value is not None}
    assert set(table["metrics/evaluate.json"]) == known
    assert "seconds" in table["metrics/train.json"]
    changed = json.loads(project.dvc("params", "diff", "--json"))
    assert changed["params.yaml"]["lr"] == {"old": 0.001, "new": 5e-5, "diff": 5e-5 - 0.001}

    project.dvc("exp", "run", "--temp", "-S", "lr=2e-4")
    for rate in ("3e-4", "4e-4"):
        project.dvc("exp", "run", "--queue", "-S", f"lr={rate}")
    project.dvc("queue", "start", "-j", "2")
    await_queue(project)

    found = runs(project)
    names = sorted(run.info.run_name for run in found.values())
    assert names == ["baseline", "lr=0.0002", "lr=0.0003", "lr=0.0004", "lr=5e-05"]
    for run in found.values():
        assert_whole(project, run)
    assert len({run.data.params["key"] for run in found.values()}) == 5
    elsewhere = [p for p in project.root.rglob("mlflow.db") if p.parent != project.root]
    assert elsewhere == []
    assert not list(project.root.rglob("mlruns"))


def test_a_restored_result_knows_its_run(project: Project) -> None:
    before = set(runs(project))
    project.run("git", "checkout", "-q", "params.yaml")
    project.dvc("repro")
    run_id = project.json("run.json")["run_id"]
    assert run_id in before
    assert runs(project)[run_id].info.run_name == "baseline"
    assert set(runs(project)) == before


def test_plots_are_shown(project: Project) -> None:
    project.dvc("plots", "diff", "HEAD", "workspace")
    page = (project.root / "dvc_plots" / "index.html").read_text()
    drawn = [json.loads(text) for text in re.findall(r"var spec = (\{.*?\});\n", page, re.DOTALL)]
    revisions = {spec["title"]["text"]: {row["rev"] for row in rows_of(spec)} for spec in drawn}
    assert set(revisions) == TITLES
    assert all(revisions.values())
    for spec in drawn:
        for row in rows_of(spec):  # DVC draws an empty cell as a zero
            assert "" not in row.values(), spec["title"]
    pictures = {path.suffix for path in (project.root / "dvc_plots" / "static").iterdir()}
    assert {".jpg", ".png"} <= pictures


def rows_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return list(spec["data"]["values"])


def test_the_table_of_experiments_has_ap_first_after_a_queue_too(project: Project) -> None:
    command = [sys.executable, "-m", "runkey", "experiments"]
    code, written = on_terminal(command, cwd=project.root, env=clean_environment(), columns=80)
    assert code == 0, written
    lines = [line for line in screen(written) if line]
    heads = lines[0].split()
    assert heads == ["experiment", "AP", "AP50", "val_loss", "train_loss", "seconds", "differs"]
    assert max(map(len, lines)) <= 80
    shown = json.loads(project.run(*command, "--json").stdout)
    assert {row["differs"] for row in shown} >= {"lr=0.0003", "lr=0.0004", "lr=5e-05", ""}
    assert all(row["AP"] for row in shown)
    assert [row["experiment"] for row in shown[:2]] == ["workspace", "master"]
    # A failed one has the metrics of the working tree in DVC's own table.
    subprocess.run(
        [Path(sys.executable).with_name("dvc"), "exp", "run", "--queue", "-S", "lr=-1"],
        cwd=project.root,
        env=clean_environment(),
        check=True,
    )
    project.dvc("queue", "start", "-j", "1")
    end = time.monotonic() + 300
    while "Failed" not in project.dvc("queue", "status"):
        assert time.monotonic() < end
        time.sleep(3)
    (failed,) = (
        row
        for row in json.loads(project.run(*command, "--json").stdout)
        if row["experiment"].endswith(" (failed)")
    )
    assert (failed["AP"], failed["seconds"], failed["differs"]) == ("", "", "lr=-1")


def test_training_ends_well_when_mlflow_goes_away_in_the_middle(
    project: Project, tmp_path: Path
) -> None:
    copy = Project(tmp_path / "copy")
    shutil.copytree(project.root, copy.root, ignore=shutil.ignore_patterns("mlartifacts", "tmp"))
    params = (copy.root / "params.yaml").read_text()
    params = params.replace("  epochs: 2\n", "  epochs: 400\n")
    params = params.replace("  evaluate_every: 1\n", "  evaluate_every: 400\n")
    (copy.root / "params.yaml").write_text(params)
    key = make_recipe("train", copy.root, load_params(copy.root / "params.yaml")).key
    store, port = locate_store(copy.root), free_port()
    server = start_server(store, port)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(address, server)
        training = subprocess.Popen(
            [sys.executable, "-m", "stages.train"],
            cwd=copy.root,
            env=clean_environment() | {"MLFLOW_TRACKING_URI": address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        folder = training_folder(store.home, key)
        while training.poll() is None:
            if (pointer := RunPointer.read(folder)) and pointer.sent.get("train.jsonl"):
                break
            time.sleep(0.1)
    finally:
        stop_server(server, kill=True)
    assert training.poll() is None, "training ended before MLflow had anything of it"
    output, _ = training.communicate(timeout=900)
    assert training.returncode == 0, output
    said = in_one_line(output)
    assert "; the work goes on, values are kept and sent later" in said
    run_id = copy.json("run.json")["run_id"]
    assert re.search(rf"MLflow: run {run_id} lacks \d+ values", said)
    entries = list(read_jsonl(copy.root / "logs" / "train.jsonl"))
    assert entries[-1]["event"] == "training_end"
    assert (copy.root / "model" / "weights.safetensors").is_file()


def test_a_task_whose_queue_worker_was_killed_is_named_and_goes_on(
    project: Project, tmp_path: Path
) -> None:
    copy = Project(tmp_path / "copy")
    shutil.copytree(project.root, copy.root, ignore=shutil.ignore_patterns("mlartifacts", "tmp"))
    params = (copy.root / "params.yaml").read_text()
    params = params.replace("  epochs: 2\n", "  epochs: 400\n")
    params = params.replace("  checkpoint_seconds: auto\n", "  checkpoint_seconds: 0\n")
    (copy.root / "params.yaml").write_text(params)
    copy.run("git", "commit", "-q", "-a", "-m", "long")
    copy.dvc("exp", "run", "--queue", "-S", "lr=7e-4")
    copy.dvc("queue", "start", "-j", "1")
    try:
        wait_for(lambda: any(copy.root.glob(".runkey/rk2-*/step-*.ckpt")), "a checkpoint")
        assert "(lost)" not in copy.run(sys.executable, "-m", "runkey", "experiments").stdout
        for pid in queue_workers(copy.root):
            os.kill(pid, signal.SIGKILL)
        assert not queue_workers(copy.root)
        shown = copy.run(sys.executable, "-m", "runkey", "experiments")
        said = in_one_line(shown.stderr)
        assert "(lost)" in shown.stdout
        (training,) = re.findall(r"wait until process (\d+) has trained, then", said)
        for process in [*psutil.Process(int(training)).children(recursive=True)]:
            process.kill()
        os.kill(int(training), signal.SIGKILL)
        shown = copy.run(sys.executable, "-m", "runkey", "experiments")
        said = in_one_line(shown.stderr)
        assert "wait until" not in said
        commands = re.findall(r"`dvc ([^`]+)`", said)
        assert [command.split()[0] for command in commands] == ["queue", "queue", "exp"]
        assert commands[-1] == "exp run --queue -S lr=0.0007"
        for command in commands:
            copy.dvc(*command.split())
        copy.dvc("queue", "start", "-j", "1")
        outputs = copy.root / ".dvc/tmp/exps/run"
        wait_for(
            lambda: any("resuming after step" in f.read_text() for f in outputs.glob("*/*.out")),
            "the training to go on",
        )
    finally:
        stop_queue(copy)


def await_queue(project: Project) -> None:
    """Wait until no task is queued or running, as long as somebody works on them.

    A busy machine takes its time; a queue that DVC's workers have left never ends.
    """
    seen = time.monotonic()
    while True:
        status = project.dvc("queue", "status")
        assert "Failed" not in status, status
        if "Queued" not in status and "Running" not in status:
            return
        if queue_workers(project.root):
            seen = time.monotonic()
        assert time.monotonic() - seen < 60, f"nobody works on the queue:\n{status}"
        time.sleep(3)
