"""The train stage looks its key up first: as a process of its own, in a real repository."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.identity.key import make_recipe
from runkey.identity.record import REPRODUCES, REPRODUCES_SINCE, REPRODUCTION_OF
from runkey.params import load_params
from runkey.pipeline.once import reuse_own
from runkey.registry.claims import open_claims
from runkey.registry.library import open_library
from runkey.registry.once import decide
from runkey.tracking.store import Store
from tests.support.project import TINY, clean_environment, commit_recipe
from tests.support.records import FILES, make_run


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("once") / "repository"
    commit_recipe(root, TINY)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(template), str(copy)], check=True)
    return copy


def train(
    root: Path, *options: str, ok: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *options, "-m", "stages.train"],
        cwd=root,
        env=clean_environment() | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode == 0) is ok, done.stdout + done.stderr[-3000:]
    return done


def test_a_finished_run_is_taken_before_torch_is_imported(root: Path) -> None:
    record = make_run(root, make_recipe("train", root).key)
    done = train(root, "-X", "importtime")
    assert (
        " ".join(done.stdout.split())
        == (  # long lines are wrapped
            f"key {record.label}: finished run {record.run.run_id[:8]} of here is reused "
            f"warning: the reuse is not noted on its run: {root}/mlflow.db: no such table: tags"
        )
    )
    assert {path: (root / path).read_bytes() for path in FILES} == FILES
    imported = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "runkey.registry.once" in imported
    assert not {"torch", "mlflow", "dvc", "numpy"} & imported


@pytest.mark.parametrize("since", ["1700000000000", "1700000000001", ""])
def test_an_interrupted_reproduction_takes_the_run_that_it_recorded(root: Path, since: str) -> None:
    key = make_recipe("train", root).key
    first = make_run(root, key)
    repeat = make_run(root, key, "b" * 32, tags={"key": key, REPRODUCTION_OF: first.run.run_id})
    again = {REPRODUCES: first.run.run_id, REPRODUCES_SINCE: since}
    is_own = since == "1700000000000"  # when the repeat was started
    # Else it trains, which stops early, as the data are not there.
    done = train(root, ok=is_own, **again)
    taken = f"run {repeat.run.run_id[:8]}, recorded before the interruption, is taken"
    assert (taken in " ".join(done.stdout.split())) is is_own
    assert (root / "run.json").exists() is is_own


def test_a_comment_in_the_model_takes_the_finished_run(root: Path) -> None:
    """So it is when DVC, which hashes bytes, starts the stage."""
    record = make_run(root, make_recipe("train", root).key)
    path = root / "runkey/model/boxes.py"
    text = path.read_text()
    path.write_text(text.replace('"""', '"""Said again: ', 1) + "# A comment.\n")
    assert f"finished run {record.run.run_id[:8]} of here is reused" in train(root).stdout
    assert {path: (root / path).read_bytes() for path in FILES} == FILES
    assert " 0.5 *" in text
    path.write_text(text.replace(" 0.5 *", " 0.25 *"))
    assert make_recipe("train", root).key != record.key


def test_a_damaged_run_is_not_taken_and_its_files_are_not_touched(root: Path) -> None:
    record = make_run(root, make_recipe("train", root).key)
    artifacts = root / "mlartifacts" / record.run.run_id / "artifacts"
    (artifacts / "model" / "weights.pt").write_bytes(b"weightz")
    done = train(root, ok=False)  # the data are not there, so training stops early
    # A long line goes on in lines that begin with spaces.
    reused, refused, decided, *_ = done.stdout.replace("\n  ", " ").splitlines()
    assert reused.endswith("is reused")
    assert refused.startswith(f"warning: {record.label}: model/weights.pt: not what run ")
    assert decided.startswith(f"key {record.label}: no run of this key: trained here")
    assert not (root / "run.json").exists()
    assert not (root / "model").exists()
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["stages/train.py", "model/../stages/train.py", ".git/config"])
def test_a_record_cannot_write_beside_the_outputs(root: Path, path: str) -> None:
    key = make_recipe("train", root).key
    record = make_run(root, key, files=FILES | {path: b"import this"})
    before = (root / "stages/train.py").read_bytes()
    store = Store(f"sqlite:///{root}/mlflow.db", root / "mlartifacts", root / ".runkey")
    library, params = open_library(store.uri, store.home), load_params(root / "params.yaml")
    with pytest.raises(RegistryError, match="no output of the stage train"):
        reuse_own(library, record, root, store, params, "")
    assert (root / "stages/train.py").read_bytes() == before
    assert not (root / "model").exists()


@pytest.mark.parametrize("lacks", ["metrics/train.json", "run.json"])
def test_a_record_that_lacks_an_output_is_not_reused(root: Path, lacks: str) -> None:
    """DVC would end the stage for it, now and at each later try."""
    key = make_recipe("train", root).key
    record = make_run(root, key, files={path: FILES[path] for path in FILES if path != lacks})
    done = train(root, ok=False)
    said = " ".join(done.stdout.split())
    assert f"{record.label}: its record has no {lacks}, which train writes; not reused" in said
    assert not (root / "model").exists()


def test_a_key_that_is_trained_elsewhere_is_left_when_asked_to(root: Path) -> None:
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("\n  wait: true\n", "\n  wait: false\n"))
    home, key = root / ".runkey", make_recipe("train", root).key
    uri = f"sqlite:///{root}/mlflow.db"
    decision = decide(open_library(uri, home), open_claims(uri, home), key)
    assert decision.claim is not None
    with decision.claim as claim:
        done = train(root, ok=False)
        assert "trains it since" in done.stderr
        assert "runtime.wait" in done.stderr
        assert done.stderr.count("\n") == 1
        claim.finish(None)


def test_a_file_that_the_run_needs_and_git_ignores_stops_it_before_training(root: Path) -> None:
    (root / ".gitignore").write_text("runkey/training/private.py\n")
    (root / "runkey/training/private.py").write_text("X = 1\n")
    loop = root / "runkey/training/loop.py"
    loop.write_text(loop.read_text() + "\nfrom runkey.training import private  # noqa\n")
    done = train(root, ok=False)
    assert "runkey/training/private.py" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "training 1" not in done.stdout


def test_a_repository_that_git_does_not_read_stops_it_before_training(root: Path) -> None:
    (root / ".git/HEAD").unlink()
    done = train(root, ok=False)
    assert done.stderr.startswith(f"error: {root}/.git: git does not read it, so no snapshot would")
    assert done.stderr.count("\n") == 1
    shutil.rmtree(root / ".git")
    assert f"warning: {root}: not a git repository, so no snapshot keeps the code" in " ".join(
        train(root, ok=False).stdout.split()
    )


def test_nothing_is_reused_for_other_inputs_than_the_key_names(root: Path) -> None:
    make_run(root, make_recipe("train", root).key)
    (root / "prepared").mkdir()
    error = train(root, ok=False).stderr
    assert error.startswith("error: prepared/inputs.json: not found, so what prepared/ was made")
    (root / "prepared").rmdir()
    (root / "data").mkdir()
    (root / "data/image.jpg").touch()
    error = train(root, ok=False).stderr
    assert error.startswith("error: data: not what data.dvc says, so the key would be of other")
    assert error.count("\n") == 1
    assert not (root / "run.json").exists()


def test_commands_say_that_the_files_have_another_key_than_run_json(root: Path) -> None:
    key = make_recipe("train", root).key
    record = make_run(root, key)

    def tell(*arguments: str) -> str:
        command = [sys.executable, "-m", "runkey", *arguments]
        done = subprocess.run(
            command, cwd=root, env=clean_environment(), capture_output=True, text=True, check=False
        )
        return " ".join(done.stdout.split())

    (root / "metrics").mkdir(exist_ok=True)
    (root / "metrics/train.json").write_text('{"seconds": 1, "best_epoch": 1}')
    (root / "metrics/evaluate.json").write_text('{"AP": 0, "AP50": 0, "AP75": 0}')
    (root / "run.json").write_text(f'{{"key": "{key}", "stage": "train", "run_id": null}}')
    commands = (["list"], ["verify", record.label], ["verify", "--all"], ["summary"])
    note = f"run.json is of {record.label}, the files here now have the key rk2-"
    assert note not in tell("list")
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("\nseed: 0", "\nseed: 1"))
    assert [note in tell(*command) for command in commands] == [True] * len(commands)
    (root / "params.yaml").write_text(text)
    (root / "prepared").mkdir()
    assert "prepared/inputs.json: not found" in tell("summary")


def test_ctrl_c_leaves_who_waits_in_one_line(root: Path) -> None:
    home, key = root / ".runkey", make_recipe("train", root).key
    uri = f"sqlite:///{root}/mlflow.db"
    decision = decide(open_library(uri, home), open_claims(uri, home), key)
    assert decision.claim is not None
    with decision.claim as claim:
        waiting = subprocess.Popen(
            [sys.executable, "-m", "stages.train"],
            cwd=root,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.stdout is not None
        assert "waiting for its result" in waiting.stdout.readline()
        waiting.send_signal(signal.SIGINT)
        _, told = waiting.communicate(timeout=60)
        assert (waiting.returncode, told) == (130, "interrupted\n")
        claim.check()
        claim.finish(None)
