"""A copy of this repository with a data set of seconds, and real DVC in it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from runkey.params import parse_params
from runkey.params.render import render
from runkey.tracking.store import locate_store, open_client
from tests.support.once import made_once

REPOSITORY = Path(__file__).parents[2]

TINY: dict[str, Any] = {
    "lr": 1e-3,
    "seed": 0,
    "data": {"short_sides": [48], "long_side": 64},
    "model": {
        "hidden_dim": 16,
        "num_heads": 2,
        "feedforward_dim": 16,
        "decoder_layers": 1,
        "num_queries": 6,
    },
    "training": {"epochs": 2, "batch_size": 4},
    "evaluate": {"sheet_images": 2},
    "memory": {"probe_batches": [1, 2]},
    "runtime": {"experiment": "tiny", "system_metrics_seconds": 1.0},
}


class Project:
    """The copy, and commands run in it as from a newcomer's shell."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.first_output = ""
        """Of the first `dvc repro`, both streams."""

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run a command; it must end with exit code 0."""
        # Files, not pipes: DVC's queue workers keep the streams that they were started with, and
        # one that hangs at its end (seen) would keep a reader of a pipe waiting.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            code = subprocess.run(
                command,
                cwd=self.root,
                env=clean_environment() | dict(env or {}),
                stdout=out,
                stderr=err,
                timeout=timeout,
                check=False,
            ).returncode
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
        assert code == 0, f"{command}:\n{texts[0][-4000:]}\n{texts[1][-4000:]}"
        return subprocess.CompletedProcess(command, code, *texts)

    def dvc(self, *arguments: str) -> str:
        """Run DVC; its output, both streams."""
        done = self.run(str(Path(sys.executable).with_name("dvc")), *arguments)
        return done.stdout + done.stderr

    def summary(self) -> str:
        """What `make repro` says at its end."""
        return self.run(sys.executable, "-m", "runkey", "summary").stdout

    def json(self, path: str) -> Any:
        """A JSON file of the project."""
        return json.loads((self.root / path).read_text())


def begin_project(root: Path, params: Mapping[str, Any]) -> Project:
    """The copy with its data and parameters, committed; nothing has run."""
    begun = Project(root)
    copy_repository(root)
    shutil.rmtree(root / "data", ignore_errors=True)
    draw_data(root / "data")
    (root / "params.yaml").write_text(render(parse_params(params), "# tiny"))
    begun.run("git", "init", "-q")
    begun.dvc("add", "data")
    begun.run("git", "add", "-A")
    begun.run("git", "commit", "-q", "-m", "start")
    return begun


def commit_recipe(root: Path, params: Mapping[str, Any]) -> None:
    """Commit the copy with these parameters and a data.dvc whose data are not there."""
    copy_repository(root)
    (root / "params.yaml").write_text(render(parse_params(params), "# tiny"))
    (root / "data.dvc").write_text("outs:\n- md5: 0123abcd.dir\n  path: data\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "start"]):
        subprocess.run(["git", *command], cwd=root, check=True, env=clean_environment())


def in_one_line(said: str) -> str:
    """What stages said, without the line breaks that they put in after 100 columns."""
    return " ".join(said.split())


@pytest.fixture(scope="session")
def first_repro(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The copy after its first `dvc repro`, committed; tests change copies of it."""

    def make(folder: Path) -> None:
        begun = begin_project(folder / "repository", TINY)
        (folder / "output.txt").write_text(begun.dvc("repro"))
        begun.run("git", "add", "-A")
        begun.run("git", "commit", "-q", "-m", "results")

    folder = made_once(tmp_path_factory, "first-repro", make)
    project = Project(folder / "repository")
    project.first_output = (folder / "output.txt").read_text()
    return project


@pytest.fixture(scope="module")
def project(first_repro: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The copy after its first `dvc repro`, committed, for this module's tests to change."""
    copied = Project(tmp_path_factory.mktemp("pipeline") / "repository")
    shutil.copytree(first_repro.root, copied.root, symlinks=True)
    copied.first_output = first_repro.first_output
    # Runs name their artifacts by where they were made: the copy makes them its own, as it would at
    # its own next run; tests from another clone must not write into the first repository.
    open_client(locate_store(copied.root))
    yield copied
    stop_queue(copied)


def clean_environment() -> dict[str, str]:
    """This process's, without what names another repository, store or Python."""
    strange = ("DVC_", "MLFLOW_", "GIT_", "PYTEST_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(strange) and k != "PYTHONPATH"}
    who = {"NAME": "Tester", "EMAIL": "tester@example.org"}
    names = {f"GIT_{role}_{k}": v for role in ("AUTHOR", "COMMITTER") for k, v in who.items()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | names | {"PATH": path, "OMP_WAIT_POLICY": "PASSIVE", "DVC_NO_ANALYTICS": "1"}


def copy_repository(root: Path) -> None:
    """The files of the working tree that git knows or would add: what is tested is what is here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split("\0")
    for name in listed:
        skipped = name.startswith(("sample-data/", "metrics/")) or name in ("", "dvc.lock")
        if not skipped and (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, root / name)
    (root / "data.dvc").unlink()


def draw_data(data: Path) -> None:
    """Twelve and six pictures of coloured rectangles, in COCO's format."""
    rng = random.Random(0)
    categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
    colours = {3: (220, 40, 40), 7: (40, 40, 220)}
    (data / "annotations").mkdir(parents=True)
    for split, count in (("train", 12), ("val", 6)):
        (data / split).mkdir()
        images, annotations = [], []
        for number in range(1, count + 1):
            picture = Image.new("RGB", (64, 48), (200, 200, 190 + number))
            for category in (3, 7):
                x, y = rng.randrange(4, 40), rng.randrange(4, 28)
                box = [x, y, 16, 14]
                ImageDraw.Draw(picture).rectangle((x, y, x + 15, y + 13), colours[category])
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category,
                        "bbox": box,
                        "area": 16 * 14,
                        "iscrowd": 0,
                    }
                )
            name = f"{split}_{number}.png"
            picture.save(data / split / name)
            images.append({"id": number, "file_name": name, "width": 64, "height": 48})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (data / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def stop_queue(project: Project) -> None:
    """End DVC's workers, which otherwise wait for more work after the tests are gone."""
    project.dvc("queue", "stop", "--kill")
    end = time.monotonic() + 60
    while queue_workers(project.root) and time.monotonic() < end:
        time.sleep(0.5)
    for pid in queue_workers(project.root):
        os.kill(pid, 9)


def wait_for(happened: Callable[[], object], what: str, seconds: float = 300.0) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)


def queue_workers(root: Path) -> list[int]:
    """Processes that run in the copy and name its DVC queue on their command line."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = " ".join(process.info["cmdline"] or [])
        if "exp" in command and "queue-worker" in command and process.info["cwd"] == str(root):
            found.append(process.pid)
    return found
