"""A workspace's memory.json counts for trainings with the parameters that made it."""

from __future__ import annotations

from pathlib import Path

import yaml

from runkey.memory.predict import MODEL
from runkey.params import load_params, override
from runkey.paths import MEMORY
from runkey.sweep.placement import is_of

REPOSITORY = Path(__file__).parents[2]
STAGES = {
    "prepare": ("data.path", "data.val_fraction", "data.group_by", "data.checks"),
    "profile_memory": ("data.short_sides", "model", "optimizer", "training.batch_size", "memory"),
}


def test_a_lock_of_dvc_is_compared_by_value(tmp_path: Path) -> None:
    params = load_params(REPOSITORY / "params.yaml")
    written = params.written()
    assert not is_of(tmp_path, params), "nothing is there"
    (tmp_path / MEMORY).mkdir()
    (tmp_path / MEMORY / MODEL).write_text("{}")
    assert not is_of(tmp_path, params), "no stage has run"
    stages = {}
    for stage, names in STAGES.items():
        values = {}
        for name in names:
            section, _, field = name.partition(".")
            values[name] = written[section][field] if field else written[section]
        stages[stage] = {"params": {"params.yaml": values}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    assert is_of(tmp_path, params)
    assert is_of(tmp_path, override(params, {"lr": 0.5, "seed": 3})), "no memory depends on it"
    for name, value in (("model.num_queries", 7), ("training.batch_size", 3)):
        assert not is_of(tmp_path, override(params, {name: value}))
