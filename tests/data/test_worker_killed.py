"""A loader process dies while a model trains: nothing is lost, and training goes on the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from runkey.errors import DataError
from runkey.model.criterion import build_criterion
from runkey.model.detr import build_model
from runkey.params import Augment, Data
from runkey.training.device import configure_torch
from tests.support.fitting import fit
from tests.support.toy import SavedInMemory, make_params
from tests.support.workspace import loader_processes

DATA = Data(short_sides=(32,), long_side=48, augment=Augment())
SMALL = {"hidden_dim": 16, "num_heads": 2, "feedforward_dim": 16, "num_queries": 6}


class Killing(SimpleNamespace):
    """A real loader, one of whose processes is killed before a step."""

    def epoch(self, epoch, start_step=0):
        windows = self.loader.epoch(epoch, start_step)
        for number, window in enumerate(windows, start=start_step + 1):
            if (epoch, number) == self.at:
                worker = next(iter(loader_processes() - self.before))
                worker.kill()
                worker.join()
            yield window


def train(loader, saved):
    params = make_params(model=SMALL, training={"epochs": 3})
    configure_torch(0, deterministic=True)
    model = build_model(params.model, 3)
    criterion = build_criterion(params.model, 3)
    fit(
        model,
        criterion,
        loader,
        lambda _: {"val/loss": 0.0},
        params,
        checkpoints=saved,
    )
    return model.state_dict()


def test_training_ends_with_a_checkpoint_and_goes_on(workspace, make_record, train_loader):
    workspace.write([make_record(i) for i in range(1, 13)])
    expected = train(train_loader(DATA, micro_batch=2), SavedInMemory(due=False))
    saved = SavedInMemory(due=False)
    loader = train_loader(DATA, micro_batch=2, workers=2, prefetch=1)
    killing = Killing(
        loader=loader,
        at=(1, 2),
        steps_per_epoch=loader.steps_per_epoch,
        before=loader_processes(),
    )
    with pytest.raises(DataError) as caught:
        train(killing, saved)
    line = str(caught.value)
    assert line.startswith("a loader process was killed")
    assert line.endswith(
        f"; stopped after step {saved.content.step} of 9; `dvc repro` goes on from there"
    )
    assert 4 <= saved.content.step <= 6
    loader.close()
    found = train(train_loader(DATA, micro_batch=2, workers=2), saved)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
