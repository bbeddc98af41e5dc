"""The first bad module is found by name, forward and backward, from a folder and from a bundle."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runkey.errors import TrainingError
from runkey.model.criterion import build_criterion
from runkey.paths import TRAIN_LOG
from runkey.training.debug import (
    Bundle,
    bad_steps,
    diagnose,
    diagnose_bundle,
    find_start,
    logged_losses,
    replay,
)
from runkey.training.device import Precision, seed_step
from runkey.training.optimizer import Clipper, build_optimizer
from runkey.training.step import TrainStep, accumulate_gradients
from runkey.training.tensors import host_weights
from tests.support.guarded import context_of
from tests.support.killed_training import LAYER, planted_model
from tests.support.killed_training import parameters as parameters_of_killed
from tests.support.planted import plant
from tests.support.squares import (
    CLASSES,
    CPU,
    SquaresLoader,
    detector_params,
    make_detector,
    make_window,
)

REPOSITORY = Path(__file__).parents[2]

LAYERS = [
    "backbone.0.body.layer1.0.conv2",
    "input_proj",
    "transformer.encoder.layers.0.self_attn.out_proj",
    "transformer.decoder.layers.1.norm2",
    "bbox_embed.layers.0",
]
IDS = [1, 2, 3, 5, 6, 7, 8]


def machinery_of(parameters, model, dtype=None):
    return TrainStep(
        model=model.train(),
        criterion=build_criterion(parameters.model, CLASSES),
        optimizer=build_optimizer(model, parameters.optimizer, parameters.lr),
        precision=Precision(CPU, dtype),
        channels_last=True,
        clipper=Clipper(device=CPU, **parameters.optimizer.clip.model_dump()),
    )


def window():
    return make_window(IDS, 4, size=32)


@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize("layer", LAYERS)
def test_names_the_planted_module(layer, how):
    """In the second micro-batch: images 6, 7 and 8."""
    parameters = detector_params(model={"denoising": {"groups": 2}})
    model = make_detector(parameters)
    passes = {"bbox_embed.layers.0": {3, 4}}.get(layer, {2})  # once in each decoder layer
    plant(model, layer, how, passes)
    finding = diagnose(machinery_of(parameters, model), window(), seed=0, step=3).finding
    assert (finding.where, finding.module, finding.kind) == (how, layer, "Planted")
    assert finding.micro_batch == 2
    assert finding.image_ids == (6, 7, 8)
    inputs = [numbers for name, numbers in finding.tensors.items() if name.startswith("input")]
    assert all(numbers.is_finite for numbers in inputs)
    bad = {name for name, numbers in finding.tensors.items() if not numbers.is_finite}
    assert bad == ({"output"} if how == "forward" else {"grad of input"})


@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize("preset", ["fast", "detr"])
def test_under_activation_checkpointing_and_either_preset(preset, how):
    classification = 1.0 if preset == "detr" else 2.0
    parameters = detector_params(
        model={"preset": preset, "checkpointing": True, "loss": {"classification": classification}}
    )
    model = make_detector(parameters)
    plant(model, LAYERS[3], how, set(range(1, 9)))  # what is recomputed counts, too
    finding = diagnose(machinery_of(parameters, model), window(), seed=0, step=3).finding
    assert (finding.where, finding.module) == (how, LAYERS[3])


def test_a_layer_that_overflows_and_its_numbers():
    """Attention has no `forward`; it is entered by methods.  One weight is 1e38."""
    parameters = detector_params()
    model = make_detector(parameters)
    attention = model.transformer.encoder.layers[0].self_attn
    with torch.no_grad():
        attention.in_proj_weight[3] = 1e38
    finding = diagnose(machinery_of(parameters, model), window(), seed=0, step=0).finding
    assert (finding.where, finding.module) == ("forward", "transformer.encoder.layers.0.self_attn")
    weight = finding.tensors["in_proj_weight"]
    assert weight.is_finite
    assert weight.greatest_absolute == pytest.approx(1e38)
    assert weight.shape == (96, 32)
    assert not finding.tensors["output"].is_finite
    text = "\n".join(finding.lines())
    assert "self_attn (Attention) takes finite numbers and gives others" in text
    assert "in_proj_weight  float32 [96 x 32]  finite" in text


def test_a_probed_step_is_the_step_and_changes_nothing(monkeypatch):
    parameters = detector_params(model={"denoising": {"groups": 2}})
    plain = machinery_of(parameters, make_detector(parameters))
    seed_step(0, 5)
    expected = accumulate_gradients(plain, window()).values
    probed = machinery_of(parameters, make_detector(parameters))
    before = {name: t.clone() for name, t in probed.model.state_dict().items()}
    hooks = []
    for name in ("register_forward_hook", "register_forward_pre_hook"):
        register = getattr(torch.nn.Module, name)

        def kept(module, *arguments, register=register, **options):
            hooks.append(register(module, *arguments, **options))
            return hooks[-1]

        monkeypatch.setattr(torch.nn.Module, name, kept)
    diagnosis = diagnose(probed, window(), seed=0, step=5)
    assert diagnosis.finding.where == "nowhere"
    assert diagnosis.losses == {name: float(value) for name, value in expected.items()}
    assert all(torch.equal(before[n], t) for n, t in probed.model.state_dict().items())
    assert hooks
    assert not any(hook.id in hook.hooks_dict_ref() for hook in hooks)
    assert not [name for m in probed.model.modules() for name in vars(m) if name == "attend_self"]


def test_weights_images_and_boxes_are_named_as_causes():
    parameters = detector_params()
    model = make_detector(parameters)
    with torch.no_grad():
        model.input_proj.bias[3] = torch.nan
    finding = diagnose(machinery_of(parameters, model), window(), seed=0, step=0).finding
    assert (finding.where, finding.module) == ("weights", "input_proj.bias")

    good = window()
    machinery = machinery_of(parameters, make_detector(parameters))
    boxes = good[1].boxes_cxcywh.clone()
    boxes[-1] = 1e38  # of image 8, the window's last
    targets = (good[0], dataclasses.replace(good[1], boxes_cxcywh=boxes))
    finding = diagnose(machinery, targets, seed=0, step=0).finding
    assert (finding.where, finding.micro_batch, finding.image_ids) == ("targets", 2, (8,))

    colour = torch.ones(3, 2)
    colour[1] = torch.inf
    images = (good[0], dataclasses.replace(good[1], colour=colour))
    finding = diagnose(machinery, images, seed=0, step=0).finding
    assert (finding.where, finding.micro_batch, finding.image_ids) == ("image", 2, (7,))


def test_a_loss_that_overflows_is_told_from_the_model():
    parameters = detector_params(model={"loss": {"l1": 3e38}})
    machinery = machinery_of(parameters, make_detector(parameters))
    finding = diagnose(machinery, window(), seed=0, step=0).finding
    assert (finding.where, finding.module) == ("loss", "l1")


def test_fp16_names_what_overflows():
    parameters = detector_params()
    model = make_detector(parameters)
    with torch.no_grad():
        weight = model.transformer.encoder.layers[0].linear1.weight
        weight[:, ::2], weight[:, 1::2] = 3e4, -3e4
    machinery = machinery_of(parameters, model, torch.float16)
    finding = diagnose(machinery, window(), seed=0, step=0).finding
    assert (finding.where, finding.module) == ("forward", "transformer.encoder.layers.0.linear1")
    assert finding.tensors["output"].dtype == "float16"


@pytest.fixture(scope="module", params=["forward", "backward"])
def killed(request, tmp_path_factory):
    """A run whose encoder layer goes wrong in step 6, killed before step 9; with its model."""
    folder, how = tmp_path_factory.mktemp("killed"), request.param
    # Of each epoch's three steps the last has one micro-batch, the others two.
    command = [sys.executable, "-m", "tests.support.killed_training", str(folder), how, "10", "9"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return parameters_of_killed(), folder, lambda: planted_model(how, 10), how


def test_from_a_killed_runs_folder_and_from_a_bundle_elsewhere(killed, tmp_path):
    parameters, folder, model, how = killed
    assert bad_steps(folder) == [6]
    start = find_start(folder, 6)
    assert start.path.name == "bad-step-00000006.ckpt"
    assert start.step in (4, 5)  # that of step 5 may just be being written
    context = context_of(parameters, model(), SquaresLoader())
    bad = replay(context, start, 6, folder)
    bundle = Bundle(
        key="rk2-test",
        step=5,
        rank=0,
        params=parameters.model_dump(mode="json"),
        num_classes=CLASSES,
        model=host_weights(context.step.model),
        scaler={},
        batch=bad,
        device="cpu",
        torch_version=str(torch.__version__),
    )
    bundle.write(folder / "bad-step-6.pt")
    found = diagnose(context.step, bad, seed=0, step=5)
    assert (found.finding.where, found.finding.module) == (how, LAYER)
    assert found.finding.image_ids == bad[0].image_ids
    logged = logged_losses(folder / TRAIN_LOG.name, 6)
    assert len(logged) == 4
    assert {name: str(value) for name, value in logged.items()} == {
        name: str(value) for name, value in found.losses.items()
    }  # as text: nan is nan

    elsewhere = tmp_path / "copy.pt"
    shutil.copy(folder / "bad-step-6.pt", elsewhere)
    again = diagnose_bundle(Bundle.read(elsewhere), model())
    assert repr(again) == repr(found)  # in which nan is nan; the same numbers, to the last bit
    assert elsewhere.stat().st_size < 3e6


def test_replay_from_an_earlier_checkpoint_or_from_the_start_is_the_same(killed):
    parameters, folder, model, _ = killed
    states = []
    for start in (find_start(folder, 6), find_start(folder, 1)):
        context = context_of(parameters, model(), SquaresLoader())
        bad = replay(context, start, 6, folder)
        states.append({n: p.state_dict() for n, p in context.parts.items()} | {"ids": bad})
    assert find_start(folder, 1).step == 0
    left, right = states
    assert all(torch.equal(left["model"][n], right["model"][n]) for n in left["model"])
    assert [b.image_ids for b in left["ids"]] == [b.image_ids for b in right["ids"]]


def test_what_cannot_be_replayed_is_said(killed, tmp_path):
    parameters, folder, model, _ = killed
    context = context_of(parameters, model(), SquaresLoader())
    with pytest.raises(TrainingError, match=r"^--step 99: training has the steps 1 to 24$"):
        replay(context, find_start(folder, 99), 99, folder)
    with pytest.raises(TrainingError, match="holds no checkpoint"):
        find_start(tmp_path, 3)
    (tmp_path / "x.pt").write_bytes(b"no bundle")
    for name, text in (("x.pt", "no bundle of"), ("y.pt", "not found")):
        with pytest.raises(TrainingError, match=text):
            Bundle.read(tmp_path / name)
    torch.save({"format": "something else"}, tmp_path / "z.pt")
    with pytest.raises(TrainingError, match="of this version"):
        Bundle.read(tmp_path / "z.pt")


def test_losses_of_a_step_are_found_in_the_log(tmp_path):
    log = tmp_path / "train.jsonl"
    lines = [
        {
            "step": 3,
            "time": 1.0,
            "values": {"train/loss": 2.5, "train/loss_l1": 1.0, "train/lr": 1},
        },
        {"step": 3, "time": 1.0, "values": {"train/epoch_loss": 9.0, "val/loss": 8.0}},
        {
            "time": 1.0,
            "event": "skipped_step",
            "fields": {"step": 4, "values": {"train/loss": "nan"}},
        },
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "valu')
    assert logged_losses(log, 3) == {"loss": 2.5, "loss_l1": 1.0}
    assert math.isnan(logged_losses(log, 4)["loss"])
    assert logged_losses(log, 5) == {}
