"""Whole trainings of the toy task that tests/training/conftest.py has."""

import torch

from runkey.training.device import set_up
from runkey.training.loop import fit

CPU = torch.device("cpu")
PATIENT = {"enabled": False, "metric": "val/loss", "mode": "min"}


def run(toy, parameters=None, *, model=None, loader=None, evaluate=None, **options):
    parameters = parameters or toy.make_params()
    set_up(parameters.seed, deterministic=True)
    model = model or toy.ToyModel()
    return fit(
        model,
        toy.ToyCriterion(),
        loader or toy.ToyLoader(),
        evaluate or toy.val_loss,
        parameters,
        device=CPU,
        **options,
    )


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def seeded(toy):
    torch.manual_seed(5)
    return toy.ToyModel(norm=False)  # batch norm's statistics are a micro-batch's own
