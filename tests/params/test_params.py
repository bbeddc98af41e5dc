"""params.yaml: each bad kind has its own line, and a number is a number however it is written."""

from __future__ import annotations

from typing import Any

import pytest

from runkey.errors import ParamsError
from runkey.params import load_params, parse_params

TOP = "lr, seed, data, model, optimizer, schedule, training, memory, evaluate, runtime"

BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        {"learning_rate": 1},
        f"unknown key learning_rate (known: {TOP})",
    ),
    "misspelt key": ({"sed": 1}, f"unknown key sed; did you mean seed? (known: {TOP})"),
    "unknown key in a section": (
        {"optimizer": {"clip": {"treshold": 1}}},
        "unknown key optimizer.clip.treshold; did you mean threshold? "
        "(known: mode, threshold, percentile, history)",
    ),
    "text for a number": ({"lr": "fast"}, "lr = 'fast': should be a number"),
    "number out of range": ({"lr": 2}, "lr = 2: should be <= 1"),
    "negative number": ({"lr": -1e-3}, "lr = -0.001: should be > 0"),
    "bool for a number": ({"lr": True}, "lr = true: should be a number, not true or false"),
    "bool for a fraction": (
        {"model": {"dropout": False}},
        "model.dropout = false: should be a number, not true or false",
    ),
    "bool for a count": (
        {"model": {"frozen_stages": True}},
        "model.frozen_stages = true: should be a number, not true or false",
    ),
    "not a number": ({"lr": float("nan")}, "lr = nan: should be a finite number"),
    "infinity": (
        {"optimizer": {"clip": {"threshold": float("inf")}}},
        "optimizer.clip.threshold = inf: should be a finite number",
    ),
    "broken whole number": ({"seed": 1.5}, "seed = 1.5: should be a whole number"),
    "null": ({"seed": None}, "seed = null: should be a whole number"),
    "seed too large": ({"seed": 2**32}, "seed = 4294967296: should be < 4294967296"),
    "number for text": ({"data": {"path": 7}}, "data.path = 7: should be text"),
    "bool for a part": (
        {"data": {"augment": {"min_visible": False}}},
        "data.augment.min_visible = false: should be a number, not true or false",
    ),
    "unknown level of checks": (
        {"data": {"checks": {"level": "stict"}}},
        "data.checks.level = 'stict': should be 'strict', 'repair' or 'drop'",
    ),
    "level that is a list": (
        {"data": {"checks": {"level": ["strict"]}}},
        "data.checks.level = ['strict']: should be 'strict', 'repair' or 'drop'",
    ),
    "policy that a check does not have": (
        {"data": {"checks": {"level": "strict", "empty_box": "fix"}}},
        "data.checks.empty_box = 'fix': should be 'drop' or 'fail'",
    ),
    "null for a check": (
        {"data": {"checks": {"empty_box": None}}},
        "data.checks.empty_box = null: should be 'drop' or 'fail'",
    ),
    "level for the checks": (
        {"data": {"checks": "strict"}},
        "data.checks = 'strict': should be a section with keys of its own",
    ),
    "text for a bool": (
        {"training": {"deterministic": "perhaps"}},
        "training.deterministic = 'perhaps': should be true or false",
    ),
    "value for a section": ({"model": 3}, "model = 3: should be a section with keys of its own"),
    "neither number nor word": (
        {"memory": {"budget_gib": "lots"}},
        "memory.budget_gib = 'lots': should be a number or 'device'",
    ),
    "union out of range": (
        {"training": {"micro_batch": 0}},
        "training.micro_batch = 0: should be >= 1 or 'auto'",
    ),
    "no epochs": ({"training": {"epochs": 0}}, "training.epochs = 0: should be >= 1"),
    "too many epochs": (
        {"training": {"epochs": 1_000_001}},
        "training.epochs = 1000001: should be <= 1000000",
    ),
    "bool for epochs": (
        {"training": {"epochs": True}},
        "training.epochs = true: should be a number, not true or false",
    ),
    "empty name of weights": (
        {"model": {"init_from": "", "backbone_weights": ""}},
        "model.backbone_weights = '': should not be empty; "
        "model.init_from = '': should not be empty",
    ),
    "feature level of no pixels": (
        {"model": {"feature_strides": [8, 0]}},
        "model.feature_strides.1 = 0: should be >= 1",
    ),
    "feature levels that do not rise": (
        {"model": {"feature_strides": [16, 8]}},
        "model: feature_strides [16, 8] must rise",
    ),
    "unknown choice": (
        {"model": {"norm": "batch"}},
        "model.norm = 'batch': should be 'live' or 'frozen'",
    ),
    "unknown choice of precision": (
        {"training": {"precision": "fp8"}},
        "training.precision = 'fp8': should be 'auto', 'off', 'tf32', 'bf16' or 'fp16'",
    ),
    "empty list": ({"data": {"short_sides": []}}, "data.short_sides = []: should not be empty"),
    "wrong entry of a list": (
        {"data": {"short_sides": [100, "x"]}},
        "data.short_sides.1 = 'x': should be a whole number",
    ),
    "list for a pair, too short": (
        {"memory": {"probe_batches": [2]}},
        "memory.probe_batches.1 is missing",
    ),
    "pair that does not rise": (
        {"memory": {"probe_batches": [4, 2]}},
        "memory: probe_batches [4, 2] must rise",
    ),
    "milestones missing": (
        {"schedule": {"name": "multistep"}},
        "schedule: multistep needs milestones, such as [200, 250]",
    ),
    "milestones unordered": (
        {"schedule": {"name": "multistep", "milestones": [20, 10]}},
        "schedule: milestones [20, 10] must rise",
    ),
    "heads do not divide the width": (
        {"model": {"hidden_dim": 100, "num_heads": 6}},
        "model: hidden_dim 100 is not a multiple of num_heads 6",
    ),
    "denoising without fast": (
        {"model": {"preset": "detr", "denoising": {"groups": 3}}},
        "model: denoising needs preset fast; set denoising.groups to 0",
    ),
    "short side over long side": (
        {"data": {"short_sides": [200], "long_side": 160}},
        "data: short_sides [200] exceed long_side 160",
    ),
    "crop range reversed": (
        {"data": {"augment": {"crop_min": 700}}},
        "data.augment: crop_min 700 is larger than crop_max 600",
    ),
    "no image for train": (
        {"data": {"val_fraction": 0.5, "test_fraction": 0.5}},
        "data: val_fraction 0.5 and test_fraction 0.5 leave no image for train; their sum should be"
        " < 1",
    ),
    "group that does not compile": (
        {"data": {"group_by": "(a"}},
        "data.group_by = '(a': not a regular expression (missing ), unterminated subpattern at"
        " position 0)",
    ),
    "pattern that warns": (
        {"data": {"group_by": "([[a])"}},
        "data.group_by = '([[a])': not a regular expression (Possible nested set at position 2)",
    ),
    "pattern without a group": (
        {"data": {"group_by": r"video\d+"}},
        r"data.group_by = 'video\\d+': has 0 groups; put what related images share into one pair of"
        r" parentheses, such as (video\d+)_",
    ),
    "pattern with two groups": (
        {"data": {"group_by": "(a)(b)"}},
        "data.group_by = '(a)(b)': has 2 groups; put what related images share into one pair of"
        r" parentheses, such as (video\d+)_",
    ),
    "two faults": (
        {"lr": 5, "seed": -1},
        "lr = 5: should be <= 1; seed = -1: should be >= 0",
    ),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
def test_bad_value_is_named_with_what_is_allowed(kind):
    changed, line = BAD_VALUES[kind]
    with pytest.raises(ParamsError) as caught:
        parse_params({"lr": 1e-3, "seed": 0} | changed)
    assert str(caught.value) == f"params.yaml: {line}"
    assert "\n" not in str(caught.value)


GIT = "; mend it, or get the last one back from git"
DEEP = "p.yaml: nested more than 100 levels deep"
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "p.yaml: holds no parameters; run `make preset NAME=sample`"),
    "a list": (b"- 1\n", "p.yaml: holds no parameters; run `make preset NAME=sample`"),
    "not YAML": (
        b"lr: [1\nseed: 2",
        f"p.yaml: not YAML (line 2: expected ',' or ']', but got ':'){GIT}",
    ),
    "a key twice": (
        b"lr: 1\nlr: 2\n",
        'p.yaml: not YAML (line 2: found duplicate key "lr" with value "2" (original value: "1"))'
        + GIT,
    ),
    "a Python object": (
        b"lr: !!python/object:os.system 1",
        "p.yaml: not YAML (line 1: could not determine a constructor for the tag "
        f"'tag:yaml.org,2002:python/object:os.system'){GIT}",
    ),
    "not UTF-8": (b"lr: 1 # \xff", f"p.yaml: byte 8 is not UTF-8{GIT}"),
    "a date that is none": (
        b"a: 2020-13-45",
        f"p.yaml: not YAML (month must be in 1..12){GIT}",
    ),
    "no number": (
        b"lr: !!int abc",
        f"p.yaml: not YAML (invalid literal for int() with base 10: 'abc'){GIT}",
    ),
    "5,000 digits": (
        b"lr: " + b"1" * 5000,
        "p.yaml: not YAML (Exceeds the limit (4300 digits) for integer string conversion: value has"
        f" 5000 digits; use sys.set_int_max_str_digits() to increase the limit){GIT}",
    ),
    "500 digits": (b"lr: " + b"1" * 500, f"p.yaml: holds a number of more than 40 digits{GIT}"),
    "brackets": (b"lr: " + b"[" * 60_000, DEEP + GIT),
    "indents": (b"lr:\n" + b"- " * 300 + b"1", DEEP + GIT),
    "aliases of aliases": (
        b"lr: [&a [x,x,x,x,x,x,x,x,x], "
        + b", ".join(b"&%c [%s]" % (n + 1, b",".join([b"*%c" % n] * 9)) for n in range(97, 104))
        + b"]",
        f"{DEEP}, or aliases of aliases{GIT}",
    ),
    "an alias of itself": (b"lr: &a [*a]", f"{DEEP}, or aliases of aliases{GIT}"),
    "keys missing": (b"data:\n  path: data\n", "p.yaml: lr is missing; seed is missing"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_named(tmp_path, kind):
    content, line = BAD_FILES[kind]
    path = tmp_path / "p.yaml"
    path.write_bytes(content)
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    assert str(caught.value) == line


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(ParamsError) as caught:
        load_params(tmp_path / "none.yaml")
    assert str(caught.value) == "none.yaml: not found; run `make preset NAME=sample`"
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ParamsError) as caught:
        load_params(tmp_path / "folder.yaml")
    assert str(caught.value) == f"folder.yaml: a folder or a device, not a file{GIT}"


@pytest.mark.parametrize(
    "spelling",
    ["5e-5", "5E-5", "5e-05", "5.0e-5", "5.e-5", "0.00005", ".00005", "+5e-5", "50e-6", "'5e-5'"],
)
def test_a_number_is_a_number_however_it_is_written(tmp_path, spelling):
    path = tmp_path / "p.yaml"
    path.write_text(f"lr: {spelling}\nseed: 0\n")
    lr = load_params(path).lr
    assert isinstance(lr, float)
    assert lr == 5e-5


def test_yaml_1_2_words_stay_words(tmp_path):
    """`off` is a choice of training.precision; YAML 1.1 would read false."""
    path = tmp_path / "p.yaml"
    path.write_text("lr: 1e-3\nseed: 010\ntraining:\n  precision: off\n")
    params = load_params(path)
    assert params.training.precision == "off"
    assert params.seed == 10


def test_flat_names_leave_runtime_out():
    params = parse_params({"lr": 1e-3, "seed": 0})
    assert params.flat()["model.loss.l1"] == 5.0
    assert not any(name.startswith("runtime.") for name in params.flat())
    assert params.flat(runtime=True)["runtime.log_every"] == 10


def test_params_cannot_be_changed():
    params = parse_params({"lr": 1e-3, "seed": 0})
    with pytest.raises(ValueError, match="frozen"):
        params.model.num_queries = 3  # type: ignore[misc]
