"""A run's model as MLflow shows it: with a signature, an example, and the run that made it.

`mlflow.pytorch.log_model` traces and pickles the model (10 s) and keeps its weights a second time.
What is written here is small: MLflow's description, the example, and the run's id.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from runkey.errors import ParamsError, TrackingError
from runkey.identity.dvc_yaml import tracked_md5
from runkey.tracking.log import JsonlLog
from runkey.tracking.store import Store, open_client

if TYPE_CHECKING:
    from runkey.params import Params


# Samples of the machine while a run goes on: MLflow's own monitors, read from our thread.


class _Monitor(Protocol):
    """MLflow's BaseMetricsMonitor, which has no types."""

    def collect_metrics(self) -> None: ...

    def aggregate_metrics(self) -> dict[str, float]: ...

    def clear_metrics(self) -> None: ...


class SampleLog:
    """Samples on their way to a log; may be closed while another thread takes them."""

    def __init__(self, log: JsonlLog, interval_seconds: float) -> None:
        """Args: log: where to.  interval_seconds: between two samples."""
        self.interval_seconds = interval_seconds
        self._log = log
        self._lock = threading.Lock()
        self._closed = False
        self._sampler: SystemSampler | None = None

    def take(self, started_ms: int) -> None:
        """Take a sample if it is time; its step is the training's age in whole seconds.

        So it goes on rising in a training that goes on after an interruption.  Of several samples
        in one second MLflow gets the first, the log has all.

        Args:
            started_ms: when the training began, in milliseconds since 1970.
        """
        with self._lock:
            if self._closed:
                return
            if self._sampler is None:
                self._sampler = SystemSampler()
            if self._sampler.due(self.interval_seconds):
                age_ms = time.time_ns() // 1_000_000 - started_ms
                self._log.log(self._sampler.sample(), max(age_ms, 0) // 1000)

    def finish(self) -> None:
        """Take no more; see `JsonlLog.finish`."""
        with self._lock:
            self._closed = True
            self._log.finish()


class SystemSampler:
    """Reads CPU and memory of the machine, this process's memory, and GPUs where there are any."""

    def __init__(self) -> None:
        # Here, for commands that only read import this package and count in milliseconds.
        import psutil

        self._monitors = _monitors()
        self._process = psutil.Process()
        self._last_seconds = time.monotonic()

    def due(self, interval_seconds: float) -> bool:
        """Whether the last sample is at least that old."""
        return time.monotonic() - self._last_seconds >= interval_seconds

    def sample(self) -> dict[str, float]:
        """One sample, under the names that MLflow's UI shows as system metrics."""
        self._last_seconds = time.monotonic()
        values = {"system/process_memory_megabytes": self._process.memory_info().rss / 1e6}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{k}": float(v) for k, v in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values


def _monitors() -> list[_Monitor]:
    """MLflow's monitors of CPU and memory, and of GPUs (whose constructor raises without one)."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    cpu: Callable[[], _Monitor] = CPUMonitor
    gpu: Callable[[], _Monitor] = GPUMonitor
    try:
        return [cpu(), gpu()]
    except (ImportError, RuntimeError):
        return [cpu()]


# What is said about a run when it begins: its name, parameters, tags and data set.


_NAME_CHARACTERS = 80
_NAME_ITEMS = 4


@dataclass(frozen=True, slots=True)
class Dataset:
    """The data set that a run was trained on, as MLflow shows it."""

    name: str
    digest: str
    """DVC's md5 of the folder; the same text as in data.dvc.  At most 36 characters."""
    source: str
    """JSON for MLflow's page: {"uri": "data"}."""
    profile: str | None = None
    """JSON of counts, such as {"images": 400}."""


@dataclass(frozen=True, slots=True)
class RunDescription:
    """A new run."""

    name: str
    params: Mapping[str, str]
    """The resolved parameters under dotted names, the key and its parts."""
    tags: Mapping[str, str]
    dataset: Dataset | None = None
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    """Milliseconds since 1970."""


def describe_run(
    params: Params,
    root: Path,
    *,
    key: str,
    parts: Mapping[str, str],
    tags: Mapping[str, str],
    counts: Mapping[str, int],
) -> RunDescription:
    """The description of a training run.

    Args:
        params: the resolved parameters.
        root: the workspace.
        key: the recipe key.
        parts: its parts by name (code, params, data, environment).  They are logged as params, as
            MLflow's comparison page then says which part differs.
        tags: the witness, as text.
        counts: what the data set holds, such as {"train_images": 400}.
    """
    from runkey.params import as_text

    values = {name: as_text(value) for name, value in params.flat().items()}
    values |= {"key": key} | {f"key.{part}": digest for part, digest in parts.items()}
    own = {"mlflow.source.name": "python -m stages.train", "mlflow.source.type": "LOCAL"}
    if experiment := os.environ.get("DVC_EXP_NAME"):
        own["dvc.experiment"] = experiment
    return RunDescription(
        name=run_name(params, committed_params(root)),
        params=values,
        tags={**own, "key": key, **tags},
        dataset=read_dataset(root, params.data.path, counts),
    )


def run_name(params: Params, baseline: Params | None) -> str:
    """What differs from the baseline, such as `lr=5e-05 epochs=12`; `baseline` if nothing does.

    Names are cut to their last part where that is unambiguous; at most four values are named.
    """
    from runkey.params import as_text, parse_params

    values = params.flat()
    before = (baseline or parse_params({"lr": params.lr, "seed": params.seed})).flat()
    changed = {name: value for name, value in values.items() if before.get(name) != value}
    if not changed:
        return "baseline"
    leaves = [name.rsplit(".", 1)[-1] for name in values]
    items = [
        f"{leaf if leaves.count(leaf := name.rsplit('.', 1)[-1]) == 1 else name}={as_text(value)}"
        for name, value in changed.items()
    ]
    named = " ".join(items[:_NAME_ITEMS])
    named = named if len(named) <= _NAME_CHARACTERS else f"{named[: _NAME_CHARACTERS - 1]}…"
    return named if len(items) <= _NAME_ITEMS else f"{named} +{len(items) - _NAME_ITEMS}"


def committed_params(root: Path) -> Params | None:
    """params.yaml as git's HEAD has it (the baseline commit inside a DVC experiment).

    None where there is no git, no commit, or no valid file in it.
    """
    from ruamel.yaml import YAML

    from runkey.params import parse_params

    try:
        shown = subprocess.run(
            ["git", "-C", str(root), "show", "HEAD:./params.yaml"],
            capture_output=True,
            check=True,
            encoding="utf-8",
            timeout=20,
        )
        return parse_params(YAML(typ="safe", pure=True).load(shown.stdout))
    except (OSError, subprocess.SubprocessError, ParamsError):
        return None


def read_dataset(root: Path, data_path: str, counts: Mapping[str, int]) -> Dataset | None:
    """The data set with the digest that its .dvc file holds; None if it is not tracked by DVC."""
    md5 = tracked_md5(data_path.rstrip("/"), root)
    if md5 is None:
        return None
    return Dataset(
        name=Path(data_path).name,
        digest=md5.removeprefix("md5:"),
        source=json.dumps({"uri": data_path}),
        profile=json.dumps(dict(counts)),
    )


_LOADER = "runkey.evaluation.pyfunc"
_POINTER = "run.json"
_NEEDED = ("mlflow", "numpy", "pandas", "pillow", "torch", "torchvision")


def log_model(
    store: Store,
    run_id: str,
    name: str,
    example: Path,
    outputs: Mapping[str, str],
    tags: Mapping[str, str],
) -> str:
    """Record the model of a run, once.

    Args:
        store: where the run is.
        run_id: MLflow's id; its artifacts hold `model/`.
        name: of the model.
        example: an image file.
        outputs: MLflow type by name of the columns that the model answers.
        tags: of the model.

    Returns:
        MLflow's id of the model; that of an earlier one, if the run has one.

    Raises:
        TrackingError: MLflow refuses or cannot be reached.
    """
    client = open_client(store)
    with warnings.catch_warnings():
        # When they are imported: MLflow of its own type hints, its parts of what is outdated.
        warnings.simplefilter("ignore")
        import pandas as pd
        from mlflow.entities import LoggedModelOutput
        from mlflow.exceptions import MlflowException
        from mlflow.models.signature import ModelSignature
        from mlflow.pyfunc import save_model
        from mlflow.types.schema import ColSpec, Schema

    signature = ModelSignature(
        Schema([ColSpec("binary", "image")]),
        Schema([ColSpec(kind, column) for column, kind in outputs.items()]),
    )
    # MLflow compares column names with a range, which pandas 3 refuses for its own kind of text.
    columns = pd.Index(["image"], dtype=object)
    try:
        run = client.get_run(run_id)
        if run.outputs and run.outputs.model_outputs:
            return str(run.outputs.model_outputs[0].model_id)
        model = client.create_logged_model(
            run.info.experiment_id, name, source_run_id=run_id, tags=dict(tags)
        )
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            data.mkdir()
            (data / _POINTER).write_text(json.dumps({"run_id": run_id}) + "\n", encoding="utf-8")
            save_model(
                f"{folder}/model",
                loader_module=_LOADER,
                data_path=str(data),
                signature=signature,
                input_example=pd.DataFrame([[example.read_bytes()]], columns=columns),
                pip_requirements=[f"{package}=={version(package)}" for package in _NEEDED],
            )
            client.log_model_artifacts(model.model_id, f"{folder}/model")
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    except (MlflowException, OSError) as error:
        text = " ".join(str(error).split())
        raise TrackingError(f"MLflow: the model is not recorded ({text[:160]})") from None
    return str(model.model_id)
