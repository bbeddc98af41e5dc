"""A run's model on a real MLflow server: loaded, promoted, timed and handed on over REST."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.clones import Team, runkey
from tests.support.project import REPOSITORY, Project, in_one_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

USE = """\
import sys, numpy, runkey
image = numpy.zeros((48, 64, 3), numpy.uint8)
by_key, by_alias = (runkey.load(name, "cpu") for name in sys.argv[1:])
print(by_key.card.key, by_alias.card.key == by_key.card.key)
print((by_alias(image, score=0).scores == by_key(image, score=0).scores).all())
"""


def on_server(project: Project, team: Team, *words: str) -> str:
    """Type `runkey` where the server is the store."""
    command = (sys.executable, "-m", "runkey", *words)
    return project.run(*command, env={"MLFLOW_TRACKING_URI": team.address}).stdout


def test_a_published_run_is_promoted_timed_and_loaded_elsewhere(team: Team, tmp_path: Path) -> None:
    label, store = team.key[:16], {"MLFLOW_TRACKING_URI": team.address}
    with pytest.raises(AssertionError, match="as it was not evaluated") as refused:
        on_server(team.first, team, "promote", label)
    assert "run `dvc repro -f evaluate` where it was trained" in in_one_line(str(refused.value))
    dvc = str(Path(sys.executable).with_name("dvc"))
    team.first.run(dvc, "repro", "-f", "-s", "evaluate", env=store)
    for _ in range(2):
        said = on_server(team.first, team, "promote", label)
        assert said == f"{label}: tiny version 1 is models:/tiny@production\n"

    elsewhere = Project(tmp_path)
    words = (sys.executable, "-c", USE, label, "models:/tiny@production")
    used = elsewhere.run(*words, env=store | {"PYTHONPATH": str(REPOSITORY)}).stdout
    assert used.splitlines() == [f"{team.key} True", "True"]

    options = ("--seconds", "0", "--runtimes", "torch", "--json")
    measured = json.loads(on_server(team.first, team, "speed", label, *options))
    client = MlflowClient(team.address)
    (version,) = client.search_model_versions("name = 'tiny'")
    run = client.get_run(version.run_id)
    assert measured["recorded"].endswith(f"recorded on run {version.run_id[:8]}")
    assert run.data.tags["speed"].startswith("torch ")
    files = {file.path for file in client.list_artifacts(version.run_id, "speed")}
    assert files == {"speed/speed.json", "speed/frontier.png"}

    with pytest.raises(AssertionError, match="is promoted as tiny@production"):
        on_server(team.first, team, "delete", label, "--server", "--apply")
    gone = on_server(team.first, team, "promote", label, "--remove")
    assert gone == f"{label}: tiny version 1 is no longer models:/tiny@production\n"


def test_a_fetched_run_knows_the_run_that_it_was_started_from(team: Team) -> None:
    parent, params = team.key[:16], team.first.root / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("init_from: null", f"init_from: {parent}"))
    team.first.dvc("repro", "train")
    child = team.first.json("run.json")["key"][:16]
    assert child != parent
    runkey(team.first, "publish", child)
    params.write_text(text)
    away = team.clone("away")
    runkey(away, "fetch", child)
    top, below = runkey(away, "show", child, "--lineage").splitlines()
    assert top.startswith(f"{parent}: missing here; `runkey fetch {parent}`")
    assert below.startswith(f"`- {child}")
    assert f"init_from={parent}" in below
    runkey(away, "fetch", parent)
    assert runkey(away, "show", child, "--lineage").startswith(f"{parent}  AP ")
    assert f"started from {parent}" in runkey(away, "show", child)
