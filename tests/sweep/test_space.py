"""What `-S`, a file and a seed allow, and what is refused; the search's proposals."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from runkey.errors import LockError, ParamsError
from runkey.params import parse_params
from runkey.plots.sweep import draw_sweep, importance
from runkey.sweep.driver import Entry
from runkey.sweep.executor import Trial
from runkey.sweep.record import SweepRecord
from runkey.sweep.search import TpeSearch
from runkey.sweep.space import Point, as_changes, draw_points, grid, parse_space, read_points
from tests.support.project import REPOSITORY

PARAMS = parse_params({"lr": 1e-3, "seed": 0})
needs_optuna = pytest.mark.skipif(
    not [*REPOSITORY.glob(".venv-search/lib/python3*/site-packages/optuna")],
    reason="`make env-search` installs Optuna",
)


def entry(point: Point, ap: float | None = None) -> Entry:
    state = "running" if ap is None else "finished"
    return Entry(point, PARAMS, Trial("key", "commit", as_changes(point)), state, ap)


def test_a_grid_has_every_combination_and_values_keep_their_types() -> None:
    space = parse_space(["lr=1e-4,3e-4", "data.short_sides=[48],[48, 64]", "model.backbone=a"])
    points = grid(space)
    assert len(points) == 4
    assert points[1] == {"lr": 1e-4, "data.short_sides": [48, 64], "model.backbone": "a"}
    assert as_changes(points[0]) == ("lr=0.0001", "data.short_sides=[48]", "model.backbone=a")
    assert grid(parse_space(["seed=0,0,1"])) == [{"seed": 0}, {"seed": 1}]


def test_random_points_follow_from_the_seed_and_stay_in_their_ranges() -> None:
    space = parse_space(["lr=log:1e-5:1e-3", "seed=int:0:3", "model.dropout=uniform:0:0.3"])
    points = draw_points(space, 50, 7)
    assert points == draw_points(space, 50, 7) != draw_points(space, 50, 8)
    assert all(1e-5 <= p["lr"] <= 1e-3 and 0 <= p["model.dropout"] <= 0.3 for p in points)
    assert {p["seed"] for p in points} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["lr"], "-S lr: not NAME=VALUES"),
        (["lr=log:0:1"], "not a range such as log:1e-5:1e-3"),
        (["n=int:1:2.5"], "not a range such as int:1:8"),
        (["lr=1", "lr=2"], "lr is given twice"),
        (["lr=[1"], "the values are not YAML"),
    ],
)
def test_a_wrong_space_is_one_line(changes: list[str], said: str) -> None:
    with pytest.raises(ParamsError) as caught:
        parse_space(changes)
    assert said in str(caught.value)


def test_a_range_is_no_grid() -> None:
    with pytest.raises(ParamsError, match="a range needs --random N or --tpe N"):
        grid(parse_space(["lr=log:1e-5:1e-3"]))


def test_a_list_is_yaml_or_csv(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- {lr: 1e-4, seed: 0}\n- {lr: 3e-4, seed: 1}\n")
    (tmp_path / "a.csv").write_text("lr,seed\n1e-4,0\n3e-4,1\n")
    points = [{"lr": 1e-4, "seed": 0}, {"lr": 3e-4, "seed": 1}]
    assert read_points(tmp_path / "a.yaml") == read_points(tmp_path / "a.csv") == points
    (tmp_path / "b.csv").write_text("lr,seed\n1e-4\n")
    with pytest.raises(ParamsError, match="more or fewer cells"):
        read_points(tmp_path / "b.csv")
    (tmp_path / "b.yaml").write_text("lr: 1\n")
    with pytest.raises(ParamsError, match="not a list of points"):
        read_points(tmp_path / "b.yaml")


def test_the_record_is_found_by_the_same_settings_alone(tmp_path: Path) -> None:
    first = SweepRecord.of(tmp_path, "a" * 40, {"tpe": 5, "seed": 0})
    first.write([entry({"lr": 1e-4}, 0.5)])
    again = SweepRecord.of(tmp_path, "a" * 40, {"seed": 0, "tpe": 5})
    assert (again.key, again.begun[0]["AP"]) == (first.key, 0.5)
    assert SweepRecord.of(tmp_path, "a" * 40, {"tpe": 5, "seed": 1}).begun == []


def test_the_comparison_names_what_matters(tmp_path: Path) -> None:
    points = [{"lr": lr, "seed": seed} for lr in (1e-5, 1e-4, 1e-3) for seed in (0, 1, 2)]
    scores = [0.1 if p["lr"] == 1e-5 else 0.5 if p["lr"] == 1e-4 else 0.3 for p in points]
    shares = importance(points, scores)
    assert next(iter(shares)) == "lr"
    assert shares["lr"] > 0.9
    assert importance(points[:3], scores[:3]) == {}
    draw_sweep(tmp_path / "a.png", points, scores)
    assert (tmp_path / "a.png").stat().st_size > 5000


@needs_optuna
def test_a_search_goes_on_from_its_record_and_nears_the_best() -> None:
    space = parse_space(["lr=log:1e-5:1e-1", "seed=0,1"])

    def search(begun: list[Point]) -> TpeSearch:
        return TpeSearch(space, 25, 3, begun, REPOSITORY)

    entries: list[Entry] = []
    points: list[Point] = []
    while point := search(points[:10]).propose(entries):  # as if started again each time
        points.append(point)
        entries.append(entry(point, -abs(math.log10(point["lr"]) + 3)))
    assert len(points) == 25
    again = [search(points[:10]).propose(entries[:number]) for number in range(25)]
    assert again == points
    late = sum(one.ap or 0 for one in entries[15:]) / 10
    early = sum(one.ap or 0 for one in entries[:5]) / 5
    assert late > early
    # One that runs holds its place, and a point below the others' median is given up.
    assert search(points).propose(entries[:12]) is not None
    for index, one in enumerate(entries):
        one.curve = {2: 0.1 * index}
    assert search(points).is_hopeless(entries[1], entries)
    assert not search(points).is_hopeless(entries[-1], entries)


def test_without_optuna_one_line_names_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(LockError, match="make env-search"):
        TpeSearch({}, 1, 0, [], tmp_path)
