"""environment/export/web.py: npm brings what is locked, and without npm all else works."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


def get(folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "environment/export/web.py", str(folder)]
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def plant(folder: Path, script: str) -> str:
    """A program npm in a folder for PATH."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!{sys.executable}\n{script}")
    (folder / "npm").chmod(0o755)
    return str(folder)


def test_without_npm_it_says_what_is_missing(tmp_path: Path) -> None:
    done = get(tmp_path / "env", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "without npm `runkey report --try` makes no page" in done.stdout
    offline = plant(tmp_path / "bin", "import sys\nsys.exit('npm error network unreachable')")
    done = get(tmp_path / "env", offline)
    assert (done.returncode, done.stderr) == (0, "")
    assert "(npm error network unreachable)" in done.stdout
    assert not (tmp_path / "env").exists()


def test_another_package_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as package:
        for name in FILES:
            package.addfile(tarfile.TarInfo(f"package/dist/{name}"), io.BytesIO())
    script = f"import shutil\nshutil.copy({str(archive)!r}, 'package.tgz')\nprint('package.tgz')"
    done = get(tmp_path / "env", plant(tmp_path / "bin", script))
    assert done.returncode == 1
    assert "not the package that onnxruntime-web.txt has the hash of" in done.stderr
    assert not (tmp_path / "env").exists()


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    pinned = (ROOT / "environment/export/onnxruntime-web.txt").read_text().splitlines()[-1]
    (tmp_path / "env/onnxruntime-web").mkdir(parents=True)
    (tmp_path / "env/onnxruntime-web/version").write_text(f"{pinned}\n")
    done = get(tmp_path / "env", plant(tmp_path / "bin", "raise SystemExit(9)"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
