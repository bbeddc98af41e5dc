"""The command line: every command with help, errors in one line, nothing slow imported early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from runkey.cli import COMMANDS, app
from runkey.params.render import render_preset
from tests.support.command_line import REPOSITORY, Run


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository with params.yaml, one commit, and nothing else."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "params.yaml").write_text(render_preset("sample"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "start"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def all_commands(group: Any) -> list[Any]:
    """A group, its commands, and those of the groups in it."""
    inner = getattr(group, "commands", {}).values()
    return [group, *(found for one in inner for found in all_commands(one))]


def test_every_command_and_option_has_help() -> None:
    commands = all_commands(typer.main.get_command(app))
    assert {command.name for command in commands} >= {"preset", "summary", "ui", "key", "check"}
    for command in commands:
        assert command.help, command.name
        for parameter in command.params:
            if parameter.name != "help":
                assert parameter.help, f"{command.name} {parameter.name}"


def test_every_command_that_ends_speaks_json() -> None:
    without = []
    for command in all_commands(typer.main.get_command(app)):
        options = {option for parameter in command.params for option in parameter.opts}
        if not hasattr(command, "commands") and "--json" not in options:
            without.append(command.name)
    assert without == ["ui", "watch"]  # those show something until it is over


def imported_by(*arguments: str) -> set[str]:
    """Names of the modules that a command has imported when it ends; of packages the whole name."""
    code = (
        f"import sys; sys.argv = ['runkey', *{arguments!r}]\n"
        "from runkey.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(out.stdout.splitlines()[-1].split())


def test_parameters_are_read_without_slow_packages() -> None:
    slow = {"torch", "mlflow", "dvc", "numpy", "pandas", "scipy", "sklearn", "matplotlib", "rich"}
    assert not slow & imported_by("params")


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("no-such-command",)])
def test_no_command_is_imported_to_list_them(arguments: tuple[str, ...]) -> None:
    modules = imported_by(*arguments)
    own = {name for name in modules if name.split(".")[0] == "runkey"}
    below = ("cli", "errors", "files", "hashing", "paths", "progress", "units", "version")
    assert own <= {"runkey", *(f"runkey.{name}" for name in below)}
    assert not {"pydantic", "yaml", "ruamel.yaml", "numpy", "urllib.request"} & modules


def test_the_list_of_commands_says_what_each_says_itself() -> None:
    group = typer.main.get_command(app)
    for name, (_, text) in COMMANDS.items():
        assert group.commands[name].get_short_help_str(200) == text, name


def test_commands_that_read_no_parameters_do_not_import_their_schema() -> None:
    assert not {"runkey.params", "numpy"} & imported_by("list")


def test_module_runs(repository: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "runkey", "params"],
        cwd=repository,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "lr = 0.001" in out.stdout.splitlines()


def test_params_prints_what_dvc_would_read(repository: Path, run: Run) -> None:
    path = repository / "params.yaml"
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 5e-05"))
    code, out, _ = run("params", "--json")
    assert code == 0
    values = json.loads(out)
    assert values["lr"] == 5e-5
    assert values["runtime.mlflow"] is True
    assert values["model.loss.giou"] == 2.0


def test_a_fault_in_params_is_one_line(repository: Path, run: Run) -> None:
    (repository / "params.yaml").write_text("lr: 1e-3\nseed: 0\ntrainig: {}\n")
    code, out, err = run("params")
    assert (code, out) == (1, "")
    assert err.startswith("error: params.yaml: unknown key trainig; did you mean training?")
    assert err.count("\n") == 1


def test_outside_a_repository_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("params")
    assert code == 1
    assert err == (
        f"error: no folder with params.yaml and stages/ at or above {tmp_path};"
        " change to a folder of the repository\n"
    )


def test_preset_is_written_as_a_complete_file(repository: Path, run: Run) -> None:
    code, out, _ = run("preset", "blood-cells")
    assert code == 0
    assert out.startswith("params.yaml is preset blood-cells: ")
    assert (repository / "params.yaml").read_text() == render_preset("blood-cells")
    assert run("preset", "blood-cells")[1] == "params.yaml is preset blood-cells already\n"


def test_preset_replaces_a_missing_params_file(repository: Path, run: Run) -> None:
    (repository / "params.yaml").unlink()
    assert run("preset", "sample")[0] == 0
    assert (repository / "params.yaml").read_text() == render_preset("sample")


def test_preset_from_a_folder_below_is_written_at_the_root(
    repository: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "notes").mkdir()
    monkeypatch.chdir(repository / "notes")
    assert run("preset", "blood-cells")[0] == 0
    assert (repository / "params.yaml").read_text() == render_preset("blood-cells")
    assert list((repository / "notes").iterdir()) == []


def test_presets_are_listed_in_short_lines(repository: Path, run: Run) -> None:
    code, out, _ = run("preset")
    assert code == 0
    names = sorted(path.stem for path in (REPOSITORY / "presets").iterdir())
    assert [line.split()[0] for line in out.splitlines()] == [*names, "auto"]
    assert max(map(len, out.splitlines())) <= 100


def test_own_changes_are_not_lost_by_a_preset(repository: Path, run: Run) -> None:
    params = repository / "params.yaml"
    params.write_text(params.read_text().replace("seed: 0", "seed: 7"))
    before = params.read_bytes()
    code, _, err = run("preset", "blood-cells")
    assert code == 1
    assert err.startswith("error: params.yaml: has changes that are not committed;")
    assert params.read_bytes() == before
    assert run("preset", "blood-cells", "--force")[0] == 0
    assert b"seed: 7" not in params.read_bytes()


def test_committed_changes_may_be_replaced(repository: Path, run: Run) -> None:
    params = repository / "params.yaml"
    params.write_text(params.read_text().replace("seed: 0", "seed: 7"))
    git = ["git", "-C", str(repository), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "commit", "-q", "-am", "seed"], check=True)
    assert run("preset", "sample")[0] == 0


def test_unknown_preset_names_the_known(repository: Path, run: Run) -> None:
    code, _, err = run("preset", "nix")
    assert code == 1
    assert err == (
        "error: preset nix: not found"
        " (known: blood-cells, coco-detr-r101, coco-detr-r50, photos, sample)\n"
    )


def test_sample_data_does_not_write_over_anything(repository: Path, run: Run) -> None:
    own = repository / "data" / "annotations"
    own.mkdir(parents=True)
    code, _, err = run("sample-data")
    assert code == 1
    assert err.startswith(f"error: {repository}/data: is not empty;")
    assert err.count("\n") == 1


def test_sample_data_needs_the_repository_of_runkey(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    maker = tmp_path / "sample-data" / "make_sample.py"
    monkeypatch.setattr("runkey.cli.project._SAMPLE_MAKER", maker)
    text = "not found; it is in runkey's repository, not in a wheel"
    assert run("sample-data", str(tmp_path / "out")) == (1, "", f"error: {maker}: {text}\n")


def test_summary_before_any_run_says_what_to_do(repository: Path, run: Run) -> None:
    code, _, err = run("summary")
    assert (code, err) == (1, "error: metrics/train.json: not found; `make repro` makes it\n")


def test_summary_shows_the_result_and_where_to_look(repository: Path, run: Run) -> None:
    (repository / "metrics").mkdir()
    (repository / "model").mkdir()
    (repository / "metrics" / "train.json").write_text('{"seconds": 272.4, "best_epoch": 28}')
    scores = {"AP": 0.6314, "AP_low": 0.6, "AP_high": 0.66, "AP50": 0.9, "AP75": 0}
    (repository / "metrics" / "evaluate.json").write_text(json.dumps(scores))
    (repository / "run.json").write_text('{"key": "rk2-0123456789abcdef", "run_id": "cafe"}')
    code, out, _ = run("summary")
    assert code == 0
    assert "AP 0.631 (95%: 0.600 to 0.660)   (COCO, on the held-out images)\n" in out
    assert "  AP50 0.900   AP75 0.000\n" in out
    assert "4 min 32 s, weights of epoch 28" in out
    assert "rk2-0123456789ab   (runkey show rk2-0123456789ab)\n" in out
    assert "MLflow's pages on all runs" in out
    assert "model" in out
    assert "plots/best.jpg" not in out  # it is not there
    _, told, _ = run("summary", "--json")
    assert json.loads(told) == {
        "key": "rk2-0123456789abcdef",
        "run": "cafe",
        "seconds": 272.4,
        "best_epoch": 28,
        **scores,
    }


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-1e999"])
def test_summary_refuses_a_time_that_is_no_number(repository: Path, run: Run, seconds: str) -> None:
    (repository / "metrics").mkdir()
    text = f'{{"seconds": {seconds}, "best_epoch": 28}}'
    (repository / "metrics" / "train.json").write_text(text)
    code, _, err = run("summary")
    assert code == 1
    assert err.startswith("error: metrics/train.json: seconds: Input should be a finite number")
    assert err.count("\n") == 1


def _commit(repository: Path) -> None:
    dvc, git = str(Path(sys.executable).with_name("dvc")), ["git", "-c", "user.name=t"]
    for command in (
        [dvc, "init", "-q"],
        [*git, "add", "."],
        [*git, "-c", "user.email=t@t", "commit", "-q", "-m", "start"],
    ):
        subprocess.run(command, cwd=repository, check=True)


def test_experiments_where_none_was_queued_or_failed(repository: Path, run: Run) -> None:
    """DVC's table has no column `State` then."""
    (repository / "m.json").write_text('{"AP": 0.5, "AP50": 0.75}')
    (repository / "dvc.yaml").write_text("metrics:\n- m.json\n")
    _commit(repository)
    code, out, _ = run("experiments", "--json")
    assert code == 0
    assert [(row["AP"], row["differs"]) for row in json.loads(out)] == [("0.5", "")] * 2


def test_experiments_before_the_results_are_committed(repository: Path, run: Run) -> None:
    """As after `make repro` in a new clone: DVC writes `!` for what a commit lacks."""
    (repository / "dvc.yaml").write_text("metrics:\n- m.json\n")
    _commit(repository)
    (repository / "m.json").write_text('{"AP": 0.5, "AP50": 0.75}')
    code, out, _ = run("experiments", "--json")
    assert code == 0
    assert [row["AP"] for row in json.loads(out)] == ["0.5", ""]


def test_ui_without_a_store_says_what_to_do(
    repository: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    code, _, err = run("ui")
    assert code == 1
    assert err == f"error: {repository}/mlflow.db: not found; `make repro` records the first run\n"
