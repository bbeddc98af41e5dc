"""`make gpu-checks` on a bare machine: nothing that it imports is missing there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
MISSING = ("dvc", "dvc_data", "mlflow", "openvino", "pycocotools", "transformers")


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)


def test_the_gpu_checks_import_nothing_that_a_gpu_machine_lacks() -> None:
    done = run(
        f"import sys; sys.modules |= dict.fromkeys({MISSING!r})\n"
        "import benchmarks.gpu_checks, benchmarks.gpu_random_shapes\n"
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_check_is_refused_with_those_that_there_are() -> None:
    done = run("import sys; sys.argv = ['', 'G77']; from benchmarks.gpu_checks import main; main()")
    assert done.returncode == 2
    assert "no check G77; there are G3, G9, G7, G4, G10" in done.stderr


def test_every_body_whose_memory_is_checked_can_be_built() -> None:
    done = run(
        "from benchmarks.gpu_memory import bodies\n"
        "from runkey.model.backbones import check\n"
        "for one in bodies(): check(one.params.model)\n"
    )
    assert done.returncode == 0, done.stderr
