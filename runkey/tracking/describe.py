"""What is said about a run when it begins: its name, parameters, tags and data set."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from runkey.errors import ParamsError
from runkey.identity.pipeline import tracked_md5

if TYPE_CHECKING:
    # The schema takes 0.2 s, which every command that only reads would pay.
    from runkey.params import Params

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
