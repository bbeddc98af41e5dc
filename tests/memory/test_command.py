"""`runkey memory` and the picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from runkey.cli.memory import as_dict, print_memory
from runkey.memory.trace.events import timeline_of
from runkey.params.render import render
from runkey.plots.memory import draw_step
from runkey.units import GIB

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runkey", "memory", *arguments],
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_printed(prediction, capsys):
    print_memory(prediction, 4)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "A training step of 4 images of 90 x 120, bf16: " in text
    peak = timeline_of(prediction.trace(4)).peak_bytes
    total = next(line for line in lines if line.startswith("total "))
    assert total.split()[-1] == f"{peak / 2**20:,.0f}"
    for heading in ("parameters", "gradients", "optimizer", "activations", "inputs", "temporary"):
        assert heading in text
    for row in ("transformer.encoder", "model.checkpointing: true", "training.precision: off"):
        assert row in text
    # One shape: grouping changes nothing, so it is not offered.
    assert "data.group_by_aspect" not in text
    assert all(f"{gib} GiB" in text for gib in (8, 12, 16, 24, 40, 80))


def test_what_scripts_get(prediction):
    content = as_dict(prediction, 4)
    shown = content["shown"]
    assert sum(shown["classes"].values()) == shown["allocated_bytes"] < shown["upper_bytes"]
    assert [card["gib"] for card in content["cards"]] == [8, 12, 16, 24, 40, 80]
    assert json.loads(json.dumps(content))["gpu"]["upper_bytes"][3] == shown["upper_bytes"]


def test_the_picture_is_the_same_each_time(prediction, tmp_path):
    files = [draw_step(prediction, 4, tmp_path / name, None) for name in "ab"]
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in files[0]] == ["timeline.png", "timeline.svg"]
    svg = files[0][1].read_text()
    assert len(svg) < 600_000
    with Image.open(files[0][0]) as picture:
        assert picture.size[0] == 900


DRAW = """
import sys
from pathlib import Path
from runkey.memory.batch_shapes import prepared_shapes
from runkey.memory.predict import predict
from runkey.params import load_params
from runkey.pipeline.step_factory import step_factory
from runkey.plots.memory import draw_step
folder = Path(sys.argv[1])
params = load_params(folder / "params.yaml")
shapes = prepared_shapes(params, folder / "prepared")
factory = lambda other: step_factory(other, shapes.num_classes)
draw_step(predict(params, shapes, factory, alternatives=False), 4, Path(sys.argv[2]), None)
"""


@pytest.mark.slow
def test_processes_draw_the_same_picture(small_params, prepared, tmp_path):
    """Addresses differ from process to process, and with them the order of some frees."""
    (tmp_path / "params.yaml").write_text(render(small_params, "# small"))
    (tmp_path / "prepared").symlink_to(prepared)
    pictures = set()
    for name in "abc":
        drawn = tmp_path / name
        command = [sys.executable, "-c", DRAW, str(tmp_path), str(drawn)]
        subprocess.run(command, cwd=ROOT, check=True)
        pictures.add(b"".join(path.read_bytes() for path in sorted(drawn.iterdir())))
    assert len(pictures) == 1


def test_a_budget_is_a_line_or_a_word(prediction, tmp_path):
    """A line where it is near the peak; in words where it is far above."""
    peak_gib = timeline_of(prediction.trace(4)).peak_bytes / GIB
    pictures = [
        draw_step(prediction, 4, tmp_path / str(budget), budget)[0].read_bytes()
        for budget in (None, 1.5 * peak_gib, 24.0)
    ]
    assert len(set(pictures)) == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--shape", "800"], "--shape 800: not HEIGHTxWIDTH in pixels, such as 800x1333"),
        (["-S", "lr"], "-S lr: not NAME=VALUE, such as model.backbone=resnet101"),
        (["-S", "lr.x=1"], "lr.x: lr is not a section of params.yaml"),
        (["-S", "lr=fast"], "params.yaml: lr = 'fast': should be a number"),
    ],
)
def test_bad_questions_are_one_line(arguments, line):
    result = command(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"error: {line}\n"


def test_without_data_it_says_what_to_do(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    result = command(folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr == (
        f"error: {tmp_path}/prepared/train.safetensors: not found; run `dvc repro prepare`, or "
        "name a shape: `runkey memory --shape 800x1333`\n"
    )


@pytest.mark.slow
def test_any_parameters_of_any_shape():
    result = command("--shape", "96x128", "--batch", "9", "-S", "model.decoder_layers=1", "--json")
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["shown"]["images"] == content["batch_size"] == 9
    assert content["census"]["worst"] == [96, 128]
