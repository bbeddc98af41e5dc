"""A small repository of its own with one stage, in git."""

import os
import subprocess
from pathlib import Path

import pytest

NUMPY_IN_LOCK = """\
- name: numpy
  version: 2.10
  manager: conda
  platform: linux-64
  dependencies: {python: ''}
  url: https://channel.example/linux-64/numpy-2.10-py312_0.conda
  hash: {md5: '11', sha256: '22'}
  category: main
"""

FILES = {
    ".gitignore": "/data\n/model\n*.log\n",
    "params.yaml": "lr: 1e-4\nseed: 1\nmodel:\n  num_queries: 20\n",
    "data.dvc": "outs:\n- md5: 0123abcd.dir\n  path: data\n",
    "dvc.yaml": """\
stages:
  train:
    cmd: python -m stages.train
    deps: [data, stages/train.py, conda-lock.yml]
    params: [lr, seed, model]
    outs: [model]
    metrics:
    - metrics/train.json: {cache: false}
""",
    "dvc.lock": "schema: '2.0'\n",
    "metrics/train.json": "{}\n",
    "requirements.txt": "numpy==2.10\n",
    "stages/__init__.py": "",
    "stages/train.py": "from runkey import net\nimport runkey.tracking\n",
    "runkey/__init__.py": "",
    "runkey/net.py": "width = 3\n",
    "runkey/tracking/__init__.py": "",
    "README.md": "# A repository\n",
    "conda-lock.yml": f"version: 1\npackage:\n{NUMPY_IN_LOCK}",
}


class Repository:
    """A folder, and git in it as a user without settings has it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def git(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run git; what it prints."""
        done = subprocess.run(
            ["git", *arguments],
            cwd=cwd or self.root,
            env=os.environ | IDENTITY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"git {arguments}: {done.stderr}"
        return done.stdout.strip()

    def write(self, path: str, text: str | bytes) -> Path:
        """Write a file; its folder is made."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    def commit(self) -> str:
        """Commit all that git does not ignore."""
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "a commit", "--allow-empty")
        return self.git("rev-parse", "HEAD")


IDENTITY = {
    f"GIT_{role}_{what}": value
    for role in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Tester"), ("EMAIL", "tester@example.org"))
}


def make_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """The files above in a first commit; for the test, git knows neither user nor settings."""
    for name in list(os.environ):
        if name.startswith(("GIT_", "DVC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    # Neither this machine's settings nor a user's name.
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    made = Repository(root)
    for name, text in FILES.items():
        made.write(name, text)
    made.git("init", "-q", "-b", "main")
    made.commit()
    return made


@pytest.fixture
def repository(tmp_path, monkeypatch):
    return make_repository(tmp_path / "Werk statt", monkeypatch)
