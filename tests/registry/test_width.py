"""Whatever is said fits 100 columns, is readable without colour, and is said once."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import typer.main

from runkey.cli import app
from runkey.params import load_params
from tests.support.command_line import Run
from tests.support.records import FILES, key_of, make_run
from tests.support.terminal import on_terminal, screen

REPOSITORY = Path(__file__).parents[2]
WIDTH = 100
A, B = key_of("a"), key_of("b")
HOST = "gpu-node-17.cluster.institute.example.org"
TOLD = {"time": 1.0, "event": "hint.loader", "step": 3, "fields": {"seen": "..", "change": ".."}}
"""That the training was told; its log says at the end what is still so."""
LOG = [
    TOLD,
    *(
        {"step": step, "time": float(step), "values": {"train/data_wait_share": 0.4}}
        for step in range(1, 41)
    ),
    *(
        {"step": step, "time": float(step), "values": {"train/epoch_loss": 5.0 - step / 40}}
        for step in (20, 40)
    ),
]


@pytest.fixture
def runs(root: Path) -> Path:
    """Two runs with long names of everything, and what the last one left in the workspace."""
    params = {
        name: json.dumps(value) for name, value in load_params(Path("params.yaml")).flat().items()
    }
    for key, lr in ((A, "0.001"), (B, "5e-05")):
        make_run(
            root,
            key,
            name=f"lr={lr} data.augment.crop_short_sides=[400, 500, 600] optimizer.clip.mode=norm",
            params=params | {"lr": lr, "key": key, "key.params": key[4:]},
            metrics={f"eval/AP_{n}_of_a_long_name": float(lr) * n for n in range(40)},
            tags={"key": key, "host": HOST, "device": "cuda NVIDIA H100 80GB HBM3 MIG 3g.40gb"},
            files=FILES | {f"evaluation/{'a_long_name_' * 5}{n}.jpg": b"x" for n in range(9)},
            decision=f"key {key[:16]}: claim of {HOST}:12345 was dead (no heartbeat): taken over",
        )  # fmt: skip
    for place, content in {
        "metrics/train.json": {"seconds": 228.4, "best_epoch": 24},
        "metrics/evaluate.json": {"AP": 0.655, "AP50": 0.937, "AP75": 0.755},
        "run.json": {"key": A, "run_id": "a" * 32},
    }.items():
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).write_text(json.dumps(content) + "\n")
    (root / "logs").mkdir(exist_ok=True)
    (root / "logs/train.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LOG))
    return root


COMMANDS = (
    ("list",),
    ("list", "--columns", "+lr,key.params,data.augment.crop_short_sides,decision"),
    ("show", A),
    ("show", A, "--all"),
    ("get", A, "--to", "here", "--force"),
    ("verify", A),
    ("verify", "--all"),
    ("open", A, B),
    ("report", A, B, "--to", "page.html"),
    ("summary",),
    ("gc",),
    ("params",),
)
ALIKE = ("list", "verify")
"""Commands whose lines may be the same: these runs are much alike."""
TYPE_ALL = """
import json, sys
from runkey.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["runkey", *words]
    print("$", *words, flush=True)
    try:
        main()
    except SystemExit:
        pass
"""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands(runs: Path, run: Run, command: tuple[str, ...]) -> None:
    code, out, err = run(*command)
    assert code in (0, 3), err
    lines = [line for line in (out + err).splitlines() if line.strip()]
    assert lines
    assert [line for line in lines if len(line) > WIDTH and not has_long_path(line)] == []
    assert "\x1b" not in out + err
    if command[0] not in ALIKE:
        assert [line for line in lines if lines.count(line) > 1] == []


def test_a_terminal_is_told_the_same(runs: Path, run: Run) -> None:
    """All commands on a real terminal: bars are gone at the end, and the lines are a pipe's."""
    piped = {command: "".join(run(*command)[1:]) for command in COMMANDS}
    typed = [sys.executable, "-c", TYPE_ALL, json.dumps(COMMANDS)]
    environment = {"PYTHONPATH": str(REPOSITORY), "HOME": str(runs)}
    code, written = on_terminal(typed, cwd=runs, env=environment)
    assert code == 0, written
    assert "\x1b[1m" in written  # headings are bold, so it was taken for a terminal
    said = "\n".join(screen(written)).split("\n$ ")
    assert len(said) == len(COMMANDS)
    for command, text in zip(COMMANDS, said, strict=True):
        lines = [line for line in text.splitlines()[1:] if line.strip()]
        assert [line for line in lines if len(line) > WIDTH and not has_long_path(line)] == []
        told = [line.rstrip() for line in piped[command].splitlines() if line.strip()]
        assert lines == told, command


def test_an_error_is_one_line_but_on_a_terminal(runs: Path, run: Run) -> None:
    code, _, err = run("show", "not-a-key")
    assert code == 1
    assert len(err) > WIDTH
    assert err.count("\n") == 1
    typed = [sys.executable, "-m", "runkey", "show", "not-a-key"]
    code, written = on_terminal(typed, cwd=runs, env={"PYTHONPATH": str(REPOSITORY)})
    assert code == 1
    lines = [line for line in screen(written) if line]
    assert max(map(len, lines)) <= WIDTH
    assert " ".join(line.strip() for line in lines) == err.strip()


def has_long_path(line: str) -> bool:
    """An address or a path is not broken."""
    return any("/" in word and len(word) > WIDTH / 2 for word in line.split())


def test_the_summary_says_what_to_change(runs: Path, run: Run) -> None:
    _, out, _ = run("summary")
    words = " ".join(out.split())
    assert "try raise runtime.workers (now auto) or runtime.prefetch" in words
    assert "to keep decoded images (hint: loader) dvc exp run" in words


def test_the_experiment_to_try_first_helped_on_the_sample(runs: Path, run: Run) -> None:
    _, out, _ = run("summary")
    advice = re.search(r"dvc exp run -S training\.epochs=(\d+),", " ".join(out.split()))
    assert advice
    lines = (REPOSITORY / "benchmarks/results/photos.jsonl").read_text().splitlines()
    preset = {"schedule.name": "constant", "model.initial_box": 0.15}
    ap_of: dict[int, list[float]] = defaultdict(list)
    for row in map(json.loads, lines):
        if row["set"] == "sample" and row["changes"] in ({}, preset):
            ap_of[row["epochs"]].append(row["AP"])
    before = ap_of[load_params(REPOSITORY / "presets/sample.yaml").training.epochs]
    assert len(before) >= 3
    assert min(ap_of[int(advice[1])]) > max(before) + 0.01


def test_help(root: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    for path in paths_of(typer.main.get_command(app)):
        code, out, _ = run(*path, "--help")
        assert code == 0
        assert max(map(len, out.splitlines())) <= WIDTH, path
        assert [
            line for line in out.splitlines() if line.startswith("  ") and line.endswith("...")
        ] == []


def paths_of(command: Any, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words that call a command and each one in it."""
    inner = getattr(command, "commands", {})
    return [before, *(p for name, one in inner.items() for p in paths_of(one, (*before, name)))]
