"""Files that a stage opens and its key does not cover: real processes of a small repository."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.identity.key import make_recipe
from tests.support.repository import NUMPY_IN_LOCK

REPOSITORY = Path(__file__).parents[2]
MAIN = """\
import importlib, io, json, os, shutil
from multiprocessing import get_context
from pathlib import Path
from lib.model import net
from runkey.identity.audit import watch_loader, watch_reads

def load(path):
    try:
        return open(path).read()
    except Exception as error:
        return str(error)

if __name__ == "__mp_main__":
    watch_loader(Path(), "probe")
if __name__ == "__main__":
    try:
        {before}
        watch_reads(Path(), "probe")
    except Exception as error:
        print(type(error).__name__, error)
    for text in {texts}:
        try:
            exec(text)
            print("done")
        except Exception as error:
            print(type(error).__name__, error)
"""
FILES = {
    "params.yaml": "lr: 1e-4\nseed: 1\n",
    "data.dvc": "outs:\n- md5: 0123abcd.dir\n  path: data\n",
    "data/1.jpg": "image",
    "dvc.yaml": """\
stages:
  probe:
    cmd: python -m stages.probe
    deps: [data, lib/model, runkey/paths.py, stages/probe.py]
    params: [seed]
    outs: [prepared]
""",
    "conda-lock.yml": f"version: 1\npackage:\n{NUMPY_IN_LOCK}",
    "stages/__init__.py": "",
    "lib/__init__.py": "",
    "lib/late.py": "",
    "lib/unused.py": "",
    "lib/model/__init__.py": "",
    "lib/model/net.py": "def read():\n    from lib import late\n",
    "lib/model/table.json": "[1]",
    "lib/model/.hidden": "[1]",
    "extra/labels.json": "[1]",
    ".hidden/prior.json": "[1]",
    "top.txt": "[1]",
}


def run(
    project: Path, *texts: str, before: str = "pass", python: str | Path = sys.executable
) -> list[str]:
    """Run the stage `probe` with some statements in it; return what it printed, a line of each."""
    (project / "stages/probe.py").write_text(MAIN.format(texts=texts, before=before))
    done = subprocess.run(
        [python, "-m", "stages.probe"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "runkey", tmp_path / "runkey")
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


READ = {
    "json.load(open('extra/labels.json'))": "extra/labels.json",
    "Path(os.getcwd(), 'stages/../extra/labels.json').read_text()": "extra/labels.json",
    "os.read(os.open(b'extra/labels.json', os.O_RDONLY), 3)": "extra/labels.json",
    "io.FileIO('extra/labels.json')": "extra/labels.json",
    "open('extra/labels.json', 'r+')": "extra/labels.json",
    "open('.hidden/prior.json')": ".hidden/prior.json",
    "shutil.copy('top.txt', 'prepared')": "top.txt",
    "exec(open('lib/unused.py').read())": "lib/unused.py",
    "Path('lib/model/.x.swp').touch(); open('lib/model/.x.swp')": "lib/model/.x.swp",
}


def test_a_file_that_is_no_part_of_the_key_is_refused(project: Path) -> None:
    assert run(project, *READ) == [
        f"RecipeError {path}: read by the stage probe, and no part of its key; add it to the deps"
        " of the stage in dvc.yaml, or put it into the data folder"
        for path in READ.values()
    ]


@pytest.mark.parametrize("stage", ["prepare", "profile_memory", "train", "evaluate"])
def test_what_modules_read_when_they_are_imported_is_watched(stage: str) -> None:
    """Stages import what they run after `watch_reads`; `ranks` tells train who it is."""
    text = f"import sys, stages.{stage}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    late = ("data", "model", "memory", "evaluation", "plots", "training", f"pipeline.{stage}")
    found = {name for name in done.stdout.split() for part in late if name == f"runkey.{part}"}
    assert found <= ({"runkey.training"} if stage == "train" else set())


def test_the_way_out_puts_it_into_the_key(project: Path) -> None:
    (project / "stages/probe.py").touch()
    before = make_recipe("probe", project).key
    text = (project / "dvc.yaml").read_text()
    text = text.replace("[data,", "[data, extra/labels.json, lib/unused.py,")
    (project / "dvc.yaml").write_text(text)
    after = make_recipe("probe", project)
    assert {"extra/labels.json", "lib/unused.py"} <= set(after.preimages["code"]["files"])
    assert after.key != before
    assert run(project, "open('extra/labels.json'); exec(open('lib/unused.py').read())") == ["done"]


COVERED = (
    "import html.entities; net.read()",
    "json.load(open('lib/model/table.json')); json.load(open('lib/model/.hidden'))",
    "open('params.yaml'); open('conda-lock.yml'); open('data/1.jpg')",
    "Path('prepared').mkdir(); Path('prepared/a').write_text(''); open('prepared/a')",
    "open('new.txt', 'w'); open('new.txt', 'a'); os.listdir('extra')",
    "Path('.runkey').mkdir(exist_ok=True); Path('.runkey/log').write_text(''); open('.runkey/log')",
    "import runkey.registry.query",  # on the exclude list, as is what it imports
    "open('/etc/hostname'); open(0)",  # outside the repository
)


def test_what_the_key_covers_is_read(project: Path) -> None:
    assert run(project, *COVERED) == ["done"] * len(COVERED)


def test_an_environment_may_be_a_link(project: Path) -> None:
    (project / ".venv").symlink_to(sys.prefix)
    python = project / ".venv/bin/python"
    assert run(project, "import numpy", before="import ruamel.yaml", python=python) == ["done"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("lib/unused.py", "importlib.import_module('lib.un' + 'used')"),
        ("sortedcontainers.py", "__import__('sorted' + 'containers')"),  # hides a package
        ("pygments/__init__.py", "exec('import pyg' 'ments')"),
    ],
)
def test_a_module_that_is_no_part_of_the_key_is_refused(
    project: Path, path: str, text: str
) -> None:
    (project / path).parent.mkdir(exist_ok=True)
    (project / path).touch()
    told = (
        f"RecipeError {path}: imported by the stage probe, and no part of its key; import it by an"
        " `import` statement or add it to the deps of the stage in dvc.yaml; if it hides an"
        " installed package, rename it"
    )
    assert run(project, before=text) == [told]  # before the watch began
    compiled = "import sys; sys.dont_write_bytecode = True"
    assert run(project, text, before=compiled) == [told]


def test_code_that_reports_reads_what_it_likes(project: Path) -> None:
    (project / "runkey/plots/own.py").write_text("def read():\n    return open('top.txt').read()\n")
    assert run(project, "from runkey.plots import own; print(own.read())") == ["[1]", "done"]


def test_data_that_dvc_does_not_see_are_refused(project: Path) -> None:
    """The list of data.dvc names one image: not what .dvcignore names, nor what a link holds."""
    listed = b'[{"md5": "78805a221a988e79ef3f42d7c5bfd418", "relpath": "1.jpg"}]'
    md5 = hashlib.md5(listed).hexdigest()
    cached = project / ".dvc/cache/files/md5" / md5[:2] / f"{md5[2:]}.dir"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(listed)
    (project / "data.dvc").write_text(f"outs:\n- md5: {md5}.dir\n  path: data\n")
    (project / "data/link").symlink_to("../extra")
    assert run(project, "open('data/1.jpg')", "open('data/link/labels.json')") == [
        "done",
        "RecipeError data/link/labels.json: read by the stage probe, and not in the list of"
        " data.dvc (DVC leaves out what .dvcignore names, and folders that are links); put the file"
        " itself there, then `dvc add data`",
    ]


def test_a_loader_process_is_watched(project: Path) -> None:
    """Started as torch starts it: it imports the stage's module under another name."""
    text = (
        "print(*get_context('forkserver').Pool(1).map(load, ['data/1.jpg', 'extra/labels.json']),"
        " sep='|')"
    )
    image, refused = run(project, text)[0].split("|")
    assert image == "image"
    assert refused.startswith("extra/labels.json: read by the stage probe, and no part of its key;")
