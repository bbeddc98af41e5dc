"""A run's model in MLflow: the logged model, which is served from anywhere, and its registration.

model_id = log_model(store, run_id, described, folder, example)
promote(store, record, "detection", "production")     # models:/detection@production
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runkey.errors import TrackingError
from runkey.files import read_json
from runkey.hashing import sha256_file, sha256_json
from runkey.identity.code import import_closure
from runkey.identity.initial_weights import CARD
from runkey.identity.key import short_key
from runkey.identity.pinned_weights import TIMM_BODY
from runkey.identity.record import KEY, Record
from runkey.tracking.store import NOTE, Store, tracked

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LOADER = "runkey.inference.pyfunc"
_NOT_SERVED = ("runkey/api.py",)
"""What the loader's package names and serving does without."""
_NEEDED = (
    *("mlflow", "torch", "torchvision", "safetensors", "numpy", "pandas", "scipy", "pillow"),
    *("matplotlib", "pydantic", "pyyaml", "rich", "ruamel.yaml"),
)
"""Packages that the served code imports, whatever the model."""
_CONTENT = "runkey.content"
"""Tag of a logged model: hash of the files that it is loaded from."""
_RUN_JSON = "run.json"
"""File in MLflow's model, {"run_id": ...}, by which `runkey delete` finds the model of a run."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What MLflow's page of a model shows."""

    name: str
    key: str
    text: str
    """Markdown."""
    metrics: Mapping[str, float]


def log_model(
    store: Store,
    run_id: str,
    described: ModelDescription,
    files: Mapping[str, Path],
    example: Path,
) -> str:
    """Log a run's model and return its id; of an earlier one, if that has the same files.

    One that was cut off, by a kill, is completed.

    It holds weights, thresholds and the code that runs them, and has a signature and an example.
    `mlflow.pytorch.log_model` would trace and pickle the model (10 s).

    Args:
        store: where the run is.
        run_id: MLflow's.
        described: name, text and metrics of the model's page.
        files: what `load_model_folder` reads, by name.
        example: an image file.

    Raises:
        TrackingError: MLflow refuses or cannot be reached.
    """
    content = sha256_json({name: sha256_file(path) for name, path in files.items()})
    with tracked(store, "the model is not recorded") as client:
        from mlflow.entities import LoggedModelOutput

        known = _logged(client, run_id, content)
        if known is None:
            known = _begun(client, run_id, described, content)
            with tempfile.TemporaryDirectory() as folder:
                _save_model(Path(folder), run_id, files, example)
                client.log_model_artifacts(known, f"{folder}/model")
            client.finalize_logged_model(known, "READY")
            client.log_outputs(run_id, [LoggedModelOutput(known, step=0)])
        client.set_logged_model_tags(known, {NOTE: described.text})
        _log_metrics(client, run_id, known, described.metrics)
        return known


def _logged(client: MlflowClient, run_id: str, content: str | None) -> str | None:
    """The newest model of a run with these files; `content` None: with any that are complete."""
    run = client.get_run(run_id)
    outputs = run.outputs.model_outputs if run.outputs else []
    # MLflow gives them in no order.
    models = [client.get_logged_model(one.model_id) for one in outputs]
    for one in sorted(models, key=lambda model: model.creation_timestamp, reverse=True):
        if one.tags.get(_CONTENT) == content or (content is None and _CONTENT in one.tags):
            return str(one.model_id)
    return None


def _begun(client: MlflowClient, run_id: str, described: ModelDescription, content: str) -> str:
    """Return the id of a model with these files that is no output of the run yet, or of a new one.

    A process that was killed leaves one.
    """
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    for one in found:
        if one.tags.get(_CONTENT) == content:
            return str(one.model_id)
    tags = {KEY: described.key, _CONTENT: content}
    made = client.create_logged_model(experiment, described.name, source_run_id=run_id, tags=tags)
    return str(made.model_id)


def _log_metrics(
    client: MlflowClient, run_id: str, model_id: str, metrics: Mapping[str, float]
) -> None:
    """Put the run's metrics on the page of its model, unless it has them.

    MLflow adds them to the run as well, but for a point that is there: so each has the time and
    step of the run's own.
    """
    from mlflow.entities import Metric

    shown = client.get_logged_model(model_id).metrics or []
    have = {one.key: one.value for one in shown}
    now, new = time.time_ns() // 1_000_000, []
    for name, value in metrics.items():
        if have.get(name) != value:
            points = client.get_metric_history(run_id, name)
            same = [(one.step, one.timestamp) for one in points if one.value == value]
            step, timestamp = max(same, default=(0, now))
            new.append(Metric(name, value, timestamp, step, model_id=model_id))
    if new:
        client.log_batch(run_id, metrics=new)


def _save_model(folder: Path, run_id: str, files: Mapping[str, Path], example: Path) -> None:
    """Write to `folder`/model what MLflow loads."""
    with warnings.catch_warnings():
        # Importing them warns of MLflow's own type hints and of outdated packages.
        warnings.simplefilter("ignore")
        import pandas as pd
        from mlflow.models.signature import ModelSignature
        from mlflow.pyfunc import save_model
        from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

        from runkey.inference.pyfunc import OUTPUT_COLUMNS, PREDICT_PARAMS

        data = folder / "data"
        data.mkdir()
        for name, path in files.items():
            shutil.copyfile(path, data / name)
        (data / _RUN_JSON).write_text(json.dumps({"run_id": run_id}) + "\n")
        # MLflow compares column names with a range, which pandas 3 refuses for its string type.
        columns = pd.Index(["image"], dtype=object)
        save_model(
            str(folder / "model"),
            loader_module=_LOADER,
            data_path=str(data),
            code_paths=[str(_copy_code(folder / "code"))],
            signature=ModelSignature(
                Schema([ColSpec("binary", "image")]),
                Schema([ColSpec(kind, column) for column, kind in OUTPUT_COLUMNS.items()]),
                ParamSchema(
                    [ParamSpec(n, kind, value) for n, (kind, value) in PREDICT_PARAMS.items()]
                ),
            ),
            input_example=pd.DataFrame([[example.read_bytes()]], columns=columns),
            pip_requirements=[
                f"{package}=={version(package)}" for package in packages_of(files[CARD])
            ],
        )


def packages_of(card: Path) -> tuple[str, ...]:
    """Return the packages that serve a model.

    Args:
        card: its `model.json`.
    """
    backbone = str(read_json(card)["model"]["backbone"])
    return (*_NEEDED, "timm") if backbone.startswith(TIMM_BODY) else _NEEDED


def _copy_code(folder: Path) -> Path:
    """Copy the files of the package that the loader imports; return the package's folder."""
    package = Path(__file__).parents[1]
    target = folder / package.name
    if package.parent.name == "site-packages":  # among others, which are no part of it
        skipped = shutil.ignore_patterns("__pycache__")
        return Path(shutil.copytree(package, target, ignore=skipped))
    for file in import_closure(_LOADER, package.parent, _NOT_SERVED):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package.parent / file, folder / file)
    return target


@dataclass(frozen=True, slots=True)
class Promoted:
    """An alias of a registered model after `promote`."""

    name: str
    alias: str
    version: str
    run_id: str
    before: tuple[str, str] | None
    """Version and run id that the alias named before, if it named another one."""


def promote(store: Store, record: Record, alias: str, name: str | None = None) -> Promoted:
    """Make a run's model a version of a registered model, and point an alias at it.

    A run that is promoted again keeps its version.

    Args:
        store: where the run is.
        record: the run.
        alias: such as `production`.
        name: of the registered model; None: the name of the run's experiment.

    Raises:
        TrackingError: the run has no evaluated model, or MLflow refuses.
    """
    run_id = record.run.run_id
    with tracked(store, f"{record.label} cannot be promoted") as client:
        from mlflow.exceptions import MlflowException

        model_id = _logged(client, run_id, None)
        if model_id is None:
            raise TrackingError(
                f"{record.label}: run {run_id[:8]} has no model in MLflow, as it was not evaluated"
                " there; run `dvc repro -f evaluate` where it was trained"
            )
        name = name or _experiment_name(client, record)
        try:
            client.create_registered_model(name, description=_REGISTERED)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version_now = _version(client, name, model_id, run_id) or _add_version(
            client, name, model_id, record
        )
        before = _aliased(client, name, alias)
        client.set_registered_model_alias(name, alias, version_now)
    changed = before if before and before[0] != version_now else None
    return Promoted(name, alias, version_now, run_id, changed)


_REGISTERED = (
    "Models that `runkey promote` chose from training runs; the alias says which one is used."
)


def withdraw(store: Store, record: Record, alias: str, name: str | None = None) -> Promoted:
    """Remove an alias from a run's model; the version stays.

    Raises:
        TrackingError: the alias names no model of the run, or MLflow refuses.
    """
    run_id = record.run.run_id
    with tracked(store, f"{record.label} cannot be withdrawn") as client:
        name = name or _experiment_name(client, record)
        before = _aliased(client, name, alias)
        if before is None or before[1] != run_id:
            of = f"is of run {before[1][:8]}" if before else "names no model"
            raise TrackingError(f"{record.label}: {name}@{alias} {of}; nothing is removed")
        client.delete_registered_model_alias(name, alias)
    return Promoted(name, alias, before[0], run_id, before)


def _experiment_name(client: MlflowClient, record: Record) -> str:
    return str(client.get_experiment(record.run.experiment_id).name)


def _version(client: MlflowClient, name: str, model_id: str, run_id: str) -> str | None:
    """The version of a registered model that is this logged model."""
    # Not by name: MLflow's filters know no way to write a quote.
    found = client.search_model_versions(f"run_id = '{run_id}'")
    source = client.get_logged_model(model_id).artifact_location
    same = [str(one.version) for one in found if one.name == name and one.source == source]
    return same[0] if same else None


def _add_version(client: MlflowClient, name: str, model_id: str, record: Record) -> str:
    model = client.get_logged_model(model_id)
    note = model.tags.get(NOTE, "")
    made = client.create_model_version(
        name,
        # Not models:/ID, which MLflow looks up in another store, the global one.
        source=model.artifact_location,
        run_id=record.run.run_id,
        model_id=model_id,
        tags={KEY: record.key},
        description=f"{short_key(record.key)}\n\n{note}".strip(),
    )
    return str(made.version)


def _aliased(client: MlflowClient, name: str, alias: str) -> tuple[str, str] | None:
    """Version and run that an alias names."""
    from mlflow.exceptions import MlflowException

    try:
        found: Any = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return str(found.version), str(found.run_id or "")
