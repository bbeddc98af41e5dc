"""Every schedule as a table: the factor at each optimizer step."""

import math

import pytest
import torch

from runkey import params
from runkey.training.schedule import build_schedule, count_drops

H = 0.5**0.5  # cos(45 degrees)

# Five epochs of two steps; factors of steps 0..9.
TABLE = {
    "constant": (
        {"name": "constant"},
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ),
    "constant, warm-up over two steps from 0.2": (
        {"name": "constant", "warmup_fraction": 0.2, "warmup_start": 0.2},
        [0.2, 0.6, 1, 1, 1, 1, 1, 1, 1, 1],
    ),
    "step, a drop every two epochs": (
        {"name": "step", "step_epochs": 2, "gamma": 0.1},
        [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01],
    ),
    "step, warm-up multiplies": (
        {"name": "step", "step_epochs": 1, "gamma": 0.5, "warmup_fraction": 0.4, "warmup_start": 0},
        [0, 0.25, 0.25, 0.375, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625],
    ),
    "multistep, drops at epochs 1 and 4": (
        {"name": "multistep", "milestones": [1, 4], "gamma": 0.5},
        [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25],
    ),
    "multistep, warm-up multiplies": (
        {"name": "multistep", "milestones": [1], "gamma": 0.5, "warmup_fraction": 0.4}
        | {"warmup_start": 0.2},
        [0.2, 0.4, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
    ),
    "exponential, a quarter per epoch is a half per step": (
        {"name": "exponential", "gamma": 0.25},
        [1, 0.5, 0.25, 0.125, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, 1 / 512],
    ),
    "exponential, warm-up multiplies": (
        {"name": "exponential", "gamma": 0.25, "warmup_fraction": 0.2, "warmup_start": 0},
        [0, 0.25, 0.25, 0.125, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, 1 / 512],
    ),
    "cosine, eight steps of it after two of warm-up": (
        {"name": "cosine", "warmup_fraction": 0.2, "warmup_start": 0},
        [0, 0.5, 1]
        + [(1 + math.cos(math.pi * k / 8)) / 2 for k in (1,)]
        + [(1 + H) / 2]
        + [(1 + math.cos(math.pi * 3 / 8)) / 2, 0.5, (1 + math.cos(math.pi * 5 / 8)) / 2]
        + [(1 - H) / 2, (1 + math.cos(math.pi * 7 / 8)) / 2],
    ),
    "cosine, down to 0.2": (
        {"name": "cosine", "min_factor": 0.2},
        [0.2 + 0.4 * (1 + math.cos(math.pi * s / 10)) for s in range(10)],
    ),
    "onecycle, peak at step 4 (half of ten, less one)": (
        {"name": "onecycle", "peak_fraction": 0.5, "warmup_start": 0.2, "min_factor": 0.1}
        | {"warmup_fraction": 0.3},  # its own rise takes the place of warm-up
        [0.2, 0.6 - 0.4 * H, 0.6, 0.6 + 0.4 * H, 1]
        + [0.1 + 0.45 * (1 + math.cos(math.pi * k / 5)) for k in (1, 2, 3, 4)]
        + [0.1],
    ),
    "cyclical, a triangle of two epochs": (
        {"name": "cyclical", "cycle_epochs": 2, "min_factor": 0.2},
        [0.2, 0.6, 1, 0.6, 0.2, 0.6, 1, 0.6, 0.2, 0.6],
    ),
    "cyclical, warm-up multiplies": (
        {"name": "cyclical", "cycle_epochs": 2, "min_factor": 0.2, "warmup_fraction": 0.2}
        | {"warmup_start": 0.5},
        [0.1, 0.45, 1, 0.6, 0.2, 0.6, 1, 0.6, 0.2, 0.6],
    ),
    "plateau, nothing recorded yet": (
        {"name": "plateau", "gamma": 0.5, "warmup_fraction": 0.2, "warmup_start": 0},
        [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1],
    ),
}


def make(fields, epochs=5, steps_per_epoch=2, mode="max"):
    section = params.Schedule(**({"warmup_fraction": 0.0} | fields))
    return build_schedule(section, epochs=epochs, steps_per_epoch=steps_per_epoch, mode=mode)


@pytest.mark.parametrize(("fields", "expected"), TABLE.values(), ids=TABLE.keys())
def test_table(fields, expected):
    schedule = make(fields)
    assert [schedule.factor(step) for step in range(10)] == pytest.approx(expected, abs=1e-12)


def test_every_name_stands_in_the_table():
    named = {fields["name"] for fields, _ in TABLE.values()}
    assert named == set(params.Schedule.model_fields["name"].annotation.__args__)


def torch_factors(build, steps):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = build(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


S = torch.optim.lr_scheduler
TORCH = {
    "step": (
        {"name": "step", "step_epochs": 3, "gamma": 0.3},
        lambda o: S.StepLR(o, 3 * 7, gamma=0.3),
    ),
    "multistep": (
        {"name": "multistep", "milestones": [2, 5], "gamma": 0.3},
        lambda o: S.MultiStepLR(o, [2 * 7, 5 * 7], gamma=0.3),
    ),
    "exponential": (
        {"name": "exponential", "gamma": 0.8},
        lambda o: S.ExponentialLR(o, 0.8 ** (1 / 7)),
    ),
    "cosine with linear warm-up": (
        {"name": "cosine", "min_factor": 0.1, "warmup_fraction": 0.2, "warmup_start": 0.3},
        lambda o: S.SequentialLR(
            o,
            [S.LinearLR(o, 0.3, total_iters=14), S.CosineAnnealingLR(o, 70 - 14, eta_min=0.1)],
            [14],
        ),
    ),
    "onecycle": (
        {"name": "onecycle", "peak_fraction": 0.3, "warmup_start": 0.04, "min_factor": 0.001},
        lambda o: S.OneCycleLR(
            o, 1.0, 70, pct_start=0.3, div_factor=25, final_div_factor=40, cycle_momentum=False
        ),
    ),
    "cyclical": (
        {"name": "cyclical", "cycle_epochs": 4, "min_factor": 0.25},
        lambda o: S.CyclicLR(o, 0.25, 1.0, step_size_up=14, cycle_momentum=False),
    ),
}


@pytest.mark.parametrize(("fields", "build"), TORCH.values(), ids=TORCH.keys())
# SequentialLR itself steps its parts in an order that torch warns about.
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter.*:UserWarning")
def test_same_as_torch(fields, build):
    schedule = make(fields, epochs=10, steps_per_epoch=7)
    ours = [schedule.factor(step) for step in range(70)]
    assert ours == pytest.approx(torch_factors(build, 70), abs=1e-9)


PLATEAU = [0.1, 0.3, 0.3, 0.2, 0.3, 0.31, 0.35, float("nan"), 0.1, 0.34, 0.2, 0.2]
#            drops after each evaluation, with patience 2 and min_delta 0.02:
DROPS = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]


def test_plateau_drops():
    assert [count_drops(PLATEAU[: n + 1], "max", 0.02, 2) for n in range(12)] == DROPS
    # The same history upside down, where less is better.
    upside_down = [-value for value in PLATEAU]
    assert [count_drops(upside_down[: n + 1], "min", 0.02, 2) for n in range(12)] == DROPS


def test_plateau_is_as_torchs():
    """torch drops when more than `patience` evaluations were bad; we when `patience` were."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = S.ReduceLROnPlateau(
        optimizer, "max", 0.5, patience=1, threshold=0.02, threshold_mode="abs"
    )
    theirs = []
    for value in PLATEAU:
        scheduler.step(value)
        theirs.append(optimizer.param_groups[0]["lr"])
    assert [0.5**drops for drops in DROPS] == theirs


def test_plateau_factor_stops_at_its_least():
    schedule = make({"name": "plateau", "gamma": 0.1, "min_factor": 0.05, "patience": 1})
    assert schedule.factor(5, [0.5]) == 1
    assert schedule.factor(5, [0.5, 0.5]) == pytest.approx(0.1)
    assert schedule.factor(5, [0.5, 0.5, 0.5, 0.5]) == 0.05


@pytest.mark.parametrize("name", params.Schedule.model_fields["name"].annotation.__args__)
@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(1, 1), (1, 2), (3, 1), (300, 1)])
def test_factors_stay_within_zero_and_one(name, epochs, steps_per_epoch):
    schedule = make(
        {"name": name, "milestones": [1], "warmup_fraction": 0.5, "step_epochs": 1},
        epochs,
        steps_per_epoch,
    )
    factors = [schedule.factor(step) for step in range(epochs * steps_per_epoch)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert len(factors) == 1 or max(factors) > 0
