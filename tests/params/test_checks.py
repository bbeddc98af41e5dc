"""data.checks: a level sets every check, single checks override it, the key sees single checks."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from runkey.errors import ParamsError
from runkey.identity.key import make_recipe
from runkey.params import Checks, Params, load_params, override, parse_params
from runkey.params.render import render
from runkey.params.schema import LEVELS

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in Checks.model_fields if name != "level"]


def params(**checks) -> Params:
    return parse_params({"lr": 1e-3, "seed": 0, "data": {"checks": checks}})


def one_by_one(level, **other):
    return {name: getattr(Checks(level=level), name) for name in NAMES} | other


def test_strict_fails_on_everything():
    assert set(one_by_one("strict").values()) == {"fail"}


def test_drop_fails_on_nothing():
    assert set(one_by_one("drop").values()) == {"fix", "drop"}


def test_repair_is_the_default():
    assert params(level="repair") == params() == parse_params({"lr": 1e-3, "seed": 0})


def test_drop_goes_further_than_repair_only_where_repair_fails():
    repair, drop = one_by_one("repair"), one_by_one("drop")
    assert {name for name in NAMES if drop[name] != repair[name]} == {
        name for name in NAMES if repair[name] == "fail"
    }


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_a_single_check_overrides_the_level(level, name):
    for policy in get_args(Checks.model_fields[name].annotation):
        given = params(level=level, **{name: policy})
        assert given.flat() == params(**one_by_one(level, **{name: policy})).flat()
        assert getattr(given.data.checks, name) == policy


@pytest.mark.parametrize("level", LEVELS)
def test_level_is_not_among_the_resolved_values(level):
    assert not [name for name in params(level=level).flat(runtime=True) if "level" in name]


@pytest.mark.parametrize("level", LEVELS)
def test_rendered_file_has_the_level_and_its_exceptions(level, tmp_path):
    given = params(level=level, size_mismatch="fix", negative_box="fix")
    path = tmp_path / "params.yaml"
    path.write_text(render(given, "# test"))
    assert load_params(path) == given
    lines = [line.strip() for line in path.read_text().splitlines()]
    checks = [line for line in lines if line.split(":")[0] in ("level", *NAMES)]
    assert checks == [f"level: {level}", "size_mismatch: fix", "negative_box: fix"]


def test_override_changes_level_and_checks():
    given = params(level="drop", empty_box="fail")
    strict = override(given, {"data.checks.level": "strict", "data.checks.bad_area": "drop"})
    assert strict == params(level="strict", bad_area="drop")
    # A check that was set by itself stays set when the level changes.
    assert override(given, {"data.checks.level": "repair"}) == params(empty_box="fail")


def test_misspelt_check_is_refused_by_name():
    with pytest.raises(ParamsError, match=r"data\.checks\.empty_bx; did you mean empty_box\?"):
        params(level="strict", empty_bx="drop")


def test_key_is_the_same_by_level_and_one_by_one():
    def recipe(given: Params):
        return make_recipe("prepare", ROOT, given)

    for level in LEVELS:
        by_level = recipe(params(level=level, empty_box="fail"))
        assert by_level == recipe(params(**one_by_one(level, empty_box="fail")))
    assert len({recipe(params(level=level)).key for level in LEVELS}) == len(LEVELS)
