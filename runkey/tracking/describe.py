"""Describe a run to MLflow: name, parameters, tags and data set."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runkey.errors import ParamsError
from runkey.files import FormatError
from runkey.hashing import sha256_bytes
from runkey.identity.dvc_yaml import tracked_md5
from runkey.identity.key import short_key
from runkey.params import Params, as_text, parse_params
from runkey.params.load import parse_yaml
from runkey.tracking.store import NOTE

_NAME_CHARACTERS = 80
_NAME_ITEMS = 4
BASELINE = "baseline"
"""Name of a run with the committed parameters."""
DIFFERS = "differs"
"""Tag: the parameters that differ from the committed ones."""
_NOTHING = "none"
_OWN_NOTE = "mlflow.note.runkey"
"""Tag that MLflow's pages do not show: hash of the description that we wrote."""


@dataclass(frozen=True, slots=True)
class RunDescription:
    """Name, parameters, tags and data of a run, logged to MLflow when it starts."""

    name: str
    params: Mapping[str, str]
    """Resolved parameters under dotted names, the key and its parts."""
    tags: Mapping[str, str]
    dataset: Mapping[str, str] | None = None
    """Fields of MLflow's `Dataset`; see `read_dataset`."""
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)


def describe_run(
    params: Params,
    root: Path,
    *,
    key: str,
    parts: Mapping[str, str],
    tags: Mapping[str, str],
    counts: Mapping[str, int],
    name: str | None = None,
) -> RunDescription:
    """Describe a training run, by default named by what differs from the committed parameters.

    The hashes of the key's `parts` become params, so that MLflow's comparison page shows which one
    differs; `tags` are the run environment, `counts` the data set's size ("train_images": 400).
    """
    values = {name: as_text(value) for name, value in params.flat().items()}
    values |= {"key": key} | {f"key.{part}": digest for part, digest in parts.items()}
    own = {"mlflow.source.name": "python -m stages.train", "mlflow.source.type": "LOCAL"}
    if experiment := os.environ.get("DVC_EXP_NAME"):
        own["dvc.experiment"] = experiment
    before = _texts(committed_params(root) or _defaults(params))
    changes = [f"{n} {before[n]} -> {v}" for n, v in _texts(params).items() if before[n] != v]
    own[DIFFERS] = ", ".join(changes) or _NOTHING
    own |= note_tags(describe_in_words(own[DIFFERS]))
    return RunDescription(
        name=name or run_name(_texts(params), before),
        params=values,
        tags={**own, "key": key, **tags},
        dataset=read_dataset(root, params.data.path, counts),
    )


def note_tags(text: str) -> dict[str, str]:
    """Return the tags that make a text a run's description, see `is_edited`."""
    return {NOTE: text, _OWN_NOTE: sha256_bytes(text.encode())}


def is_edited(tags: Mapping[str, str]) -> bool:
    """Return True if a user has written or changed a run's description."""
    text = tags.get(NOTE, "")
    return bool(text) and sha256_bytes(text.encode()) != tags.get(_OWN_NOTE)


def describe_in_words(differs: str, result: str = "", hints: Sequence[str] = ()) -> str:
    """Write a run's description (Markdown): result, what differs from the baseline, hints.

    `differs` is the tag `DIFFERS`.
    """
    parts = [result] if result else []
    parts.append(f"Parameters that differ from the committed ones: {differs}.")
    parts += ["\n".join(["Hints:", "", *(f"- {hint}" for hint in hints)])] if hints else []
    return "\n\n".join(parts)


def copied_name(name: str, key: str, params: Mapping[str, str], baseline: Params | None) -> str:
    """Name a copy of another checkout's run, whose `baseline` is not the one here.

    It is named by what differs from the parameters committed here, or else by its key.
    """
    if name != BASELINE or baseline is None:
        return name
    before = _texts(baseline)
    found = run_name({n: v for n, v in params.items() if n in before}, before)
    return short_key(key) if found == BASELINE else found


def _texts(params: Params) -> dict[str, str]:
    return {name: as_text(value) for name, value in params.flat().items()}


def _defaults(params: Params) -> Params:
    """Return the schema's defaults; the two without one are those of `params`."""
    return parse_params({"lr": params.lr, "seed": params.seed})


def run_name(values: Mapping[str, str], before: Mapping[str, str]) -> str:
    """Name a run by what differs from the baseline, such as `lr=5e-05 epochs=12`, or `baseline`.

    Parameter names are cut to their last part where that is unambiguous; at most four are listed.
    Both hold the texts of parameters by dotted names.
    """
    leaves = Counter(name.rpartition(".")[2] for name in values)
    items = []
    for name, value in values.items():
        if before.get(name) != value:
            leaf = name.rpartition(".")[2]
            items.append(f"{leaf if leaves[leaf] == 1 else name}={value}")
    named = " ".join(items[:_NAME_ITEMS]) or BASELINE
    named = named if len(named) <= _NAME_CHARACTERS else f"{named[: _NAME_CHARACTERS - 1]}…"
    return named if len(items) <= _NAME_ITEMS else f"{named} +{len(items) - _NAME_ITEMS}"


def committed_params(root: Path) -> Params | None:
    """Read params.yaml of git's HEAD, a DVC experiment's baseline; None if that is not possible."""
    try:
        show = ["git", "-C", str(root), "show", "HEAD:./params.yaml"]
        shown = subprocess.run(show, capture_output=True, check=True, encoding="utf-8", timeout=20)
        return parse_params(parse_yaml(shown.stdout))
    except (OSError, subprocess.SubprocessError, FormatError, ParamsError):
        return None


def read_dataset(root: Path, data_path: str, counts: Mapping[str, int]) -> dict[str, str] | None:
    """Return the data set as MLflow shows it; None if DVC does not track it.

    Its digest is the md5 in the .dvc file; source and profile are JSON.
    """
    md5 = tracked_md5(data_path.rstrip("/"), root)
    if md5 is None:
        return None
    source, profile = json.dumps({"uri": data_path}), json.dumps(dict(counts))
    digest = md5.removeprefix("md5:")
    return {"name": Path(data_path).name, "digest": digest, "source": source, "profile": profile}
