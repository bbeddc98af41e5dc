"""`dvc exp run --temp`: the snapshot outlives the folder that the stage ran in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.identity.key import make_recipe
from runkey.registry.snapshot import has_snapshot, snapshot_refs

REPOSITORY = Path(__file__).parents[2]
TRAIN = """\
import json, os, subprocess, sys
from pathlib import Path
from runkey import net, extra
import runkey.tracking

done = subprocess.run([sys.executable, os.environ["TAKE_HERE"]], capture_output=True, text=True,
                      env=os.environ | {"PYTHONPATH": os.environ["RUNKEY_SOURCE"]})
Path("model").mkdir(exist_ok=True)
Path("model/out.txt").write_text(done.stdout + done.stderr)
Path("metrics").mkdir(exist_ok=True)
Path("metrics/train.json").write_text(json.dumps({"width": net.width}))
print(done.stdout + done.stderr)
"""


def dvc(root, *arguments):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHONPATH"))}
    who = {"GIT_AUTHOR_NAME": "T", "GIT_COMMITTER_NAME": "T"}
    mail = {"GIT_AUTHOR_EMAIL": "t@example.org", "GIT_COMMITTER_EMAIL": "t@example.org"}
    here = {
        "TAKE_HERE": str(REPOSITORY / "tests" / "support" / "take_here.py"),
        "RUNKEY_SOURCE": str(REPOSITORY),
        "DVC_NO_ANALYTICS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        env=kept | who | mail | here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_snapshot_of_a_temporary_folder_lies_in_the_main_repository(repository, tmp_path):
    root = repository.root
    (root / "data.dvc").unlink()
    (root / "dvc.lock").unlink()
    repository.write("data/one.txt", "1\n")
    repository.write("stages/train.py", TRAIN)
    dvc(root, "init")
    dvc(root, "add", "data")
    head = repository.commit()
    repository.write("runkey/net.py", "width = 4\n")
    repository.write("runkey/extra.py", "import json\n")

    said = dvc(root, "exp", "run", "--temp", "-C", "runkey/extra.py", "-S", "lr=5e-5")
    key, oid, where = next(
        line.split(maxsplit=3)[1:] for line in said.splitlines() if line.startswith("snapshot rk2")
    )
    assert "/.dvc/tmp/exps/" in where
    assert not Path(where).exists()
    assert not repository.git("diff", "--cached", "--name-only")
    repository.git("gc", "-q", "--prune=now")

    assert has_snapshot(root, oid)
    assert list(snapshot_refs(root, key).values()) == [oid]
    assert repository.git("rev-parse", f"{oid}^") == head
    again = tmp_path / "again"
    repository.git("worktree", "add", "-q", "--detach", str(again), oid)
    assert (again / "runkey/net.py").read_text() == "width = 4\n"
    assert (again / "runkey/extra.py").read_text() == "import json\n"
    assert make_recipe("train", again).key == key
    assert make_recipe("train", root).key != key  # lr is another there
