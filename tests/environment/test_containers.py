"""The Dockerfile and the Kubernetes Job: they parse, and name what is in this repository."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from runkey.cli import app
from runkey.errors import TRY_ELSEWHERE
from runkey.params import load_params, override
from runkey.params.load import parse_yaml

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "environment/docker/Dockerfile"
JOB = REPOSITORY / "environment/kubernetes/job.yaml"
# Fields as the API reference of Kubernetes 1.33 lists them, of the objects that the file uses.
FIELDS = {
    "ConfigMap": "apiVersion kind metadata data",
    "Job": "apiVersion kind metadata spec",
    "metadata": "name",
    "Job.spec": "activeDeadlineSeconds backoffLimit backoffLimitPerIndex completionMode completions"
    " maxFailedIndexes parallelism podFailurePolicy suspend template ttlSecondsAfterFinished",
    "podFailurePolicy": "rules",
    "rules": "action onExitCodes onPodConditions",
    "onExitCodes": "containerName operator values",
    "onPodConditions": "type status",
    "template": "metadata spec",
    "template.spec": "containers restartPolicy securityContext terminationGracePeriodSeconds"
    " volumes nodeSelector tolerations",
    "securityContext": "runAsNonRoot runAsUser runAsGroup fsGroup",
    "containers": "name image command args env envFrom resources volumeMounts workingDir",
    "env": "name value valueFrom",
    "valueFrom": "configMapKeyRef secretKeyRef",
    "configMapKeyRef": "name key optional",
    "envFrom": "configMapRef secretRef prefix",
    "secretRef": "name optional",
    "resources": "limits requests",
    "volumeMounts": "name mountPath readOnly subPath",
    "volumes": "name configMap emptyDir secret persistentVolumeClaim",
    "configMap": "name items optional",
    "emptyDir": "medium sizeLimit",
}
FREE = ("data", "limits", "requests")
"""Maps whose keys are names of ours or of resources."""


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile, and its arguments in one line."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = filter(None, text.replace("\\\n", " ").splitlines())
    return [(line.split(None, 1)[0], " ".join(line.split(None, 1)[1].split())) for line in lines]


def documents() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all(JOB.read_text())}


def trials() -> list[list[str]]:
    return [line.split() for line in documents()["ConfigMap"]["data"]["trials"].splitlines()]


def test_each_instruction_is_docker_s_and_names_what_is_here() -> None:
    known = {"FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "CMD"}
    found = instructions()
    assert {name for name, _ in found} <= known
    assert found[0][0] == "FROM"
    stages = [re.search(r" AS (\w+)$", text) for name, text in found if name == "FROM"]
    names = {one[1] for one in stages if one}
    for name, text in found:
        if name == "COPY" and (other := re.match(r"--from=(\w+) ", text)):
            assert other[1] in names
        elif name == "COPY":
            assert all((REPOSITORY / source).is_file() for source in text.split()[:-1]), text
        elif name == "RUN":
            done = subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr


def test_the_image_has_the_lock_s_cuda_and_is_found_by_make() -> None:
    found = instructions()
    text = (REPOSITORY / "conda-lock.yml").read_text()
    locked = re.findall(r"^- name: cuda-version\n  version: '?([\d.]+)", text, re.MULTILINE)
    (version,) = set(locked)
    base = [value for name, value in found if name == "FROM"][-1]
    assert re.match(rf"nvidia/cuda:{re.escape(version)}\.\d+-base-", base)
    pairs = [
        pair.split("=", 1) for name, value in found if name == "ENV" for pair in shlex.split(value)
    ]
    values: dict[str, str] = dict(pairs)  # type: ignore[arg-type]
    assert values["CONDA_OVERRIDE_CUDA"] == version
    (created,) = (text for name, text in found if "micromamba create" in text)
    assert f"--prefix {values['CONDA_PREFIX']} " in created
    assert values["PATH"].startswith(f"{values['CONDA_PREFIX']}/bin:")
    make = (REPOSITORY / "Makefile").read_text()
    for name in ("PYTHONNOUSERSITE", "DVC_NO_ANALYTICS", "MLFLOW_DISABLE_TELEMETRY"):
        assert f"export {name} := {values[name]}\n" in make
    # setup.sh itself uses such an environment: that is what tests/environment/test_setup.py shows.


def check_fields(value: Any, name: str, path: str = "") -> None:
    if isinstance(value, list):
        for one in value:
            check_fields(one, name, path)
    elif isinstance(value, dict) and name not in FREE:
        known = FIELDS.get(f"{path}.{name}", FIELDS.get(name, "")).split()
        assert set(value) <= set(known), f"{path}.{name}: {set(value) - set(known)}"
        for key, one in value.items():
            check_fields(one, key, name)


def test_the_job_has_documented_fields_alone() -> None:
    for kind, document in documents().items():
        check_fields(document, kind)
    wrong = documents()["Job"]
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    with pytest.raises(AssertionError, match="imagePulPolicy"):
        check_fields(wrong, "Job")


def test_the_job_s_parts_fit_together() -> None:
    job, config = documents()["Job"]["spec"], documents()["ConfigMap"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == len(trials()) == len(set(map(tuple, trials())))
    assert pod["restartPolicy"] == "Never", "backoffLimitPerIndex and podFailurePolicy need it"
    volumes = {one["name"] for one in pod["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == volumes
    for one in container["env"]:
        reference = one["valueFrom"]["configMapKeyRef"]
        assert reference["name"] == config["metadata"]["name"]
        assert reference["key"] in config["data"]
    rules = {one["action"]: one for one in job["podFailurePolicy"]["rules"]}
    never_again = rules["FailIndex"]["onExitCodes"]
    assert never_again["containerName"] == container["name"]
    assert never_again["operator"] == "NotIn"
    assert set(never_again["values"]) == {TRY_ELSEWHERE, 128 + 9, 128 + 15}
    # The Dockerfile's user, and its home.
    user = [value for name, value in instructions() if name == "USER"][-1]
    assert f"/home/{user}" in {one["mountPath"] for one in container["volumeMounts"]}
    assert ("WORKDIR", f"/home/{user}") in instructions()


def test_its_trials_have_options_and_parameters_that_exist() -> None:
    options = {o for p in typer.main.get_command(app).commands["trial"].params for o in p.opts}
    params = load_params(REPOSITORY / "params.yaml")
    for words in trials():
        assert {word for word in words if word.startswith("-")} <= options
        changes = dict(word.split("=", 1) for word in words if "=" in word)
        override(params, {name: parse_yaml(value) for name, value in changes.items()})


def test_its_script_clones_and_starts_the_trial_of_its_index(tmp_path: Path) -> None:
    (container,) = documents()["Job"]["spec"]["template"]["spec"]["containers"]
    subprocess.run(["git", "init", "-q", tmp_path / "remote"], check=True)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "trials").write_text(documents()["ConfigMap"]["data"]["trials"])
    (script,) = container["args"]
    assert script.count("/etc/runkey/trials") == 1
    done = subprocess.run(
        [*container["command"], script.replace("/etc/runkey", str(tmp_path))],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "REPOSITORY": str(tmp_path / "remote"),
            "COMMIT": "0123abc",
            "JOB_COMPLETION_INDEX": "3",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    expected = f"{tmp_path}/clone -m runkey trial 0123abc {' '.join(trials()[3])}\n"
    assert done.stdout == expected
