"""The prediction of a small training, and what is chosen by it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from runkey.data.index import ClassName, write_classes, write_index
from runkey.errors import TrainingError
from runkey.hashing import sha256_file
from runkey.memory.batch_shapes import prepared_shapes, sample_steps, single_shape
from runkey.memory.choose import card_of, cards, plan_memory, shown_images
from runkey.memory.measure import (
    Correction,
    Peak,
    Platform,
    Trial,
    add_trials,
    correction,
    cpu_line,
    read_trials,
    this_platform,
    write_cpu,
)
from runkey.memory.predict import WORKSPACE_SHARE, predict, read_model, write_model
from runkey.params import override
from runkey.pipeline.step_factory import step_factory
from runkey.units import GIB, MIB

CPU = torch.device("cpu")
GPU = Platform("NVIDIA H100 80GB HBM3", "570.86.15", "2.11.0")


def test_prediction(prediction):
    model = prediction.model
    check = model.confirmation
    assert check.predicted_bytes == pytest.approx(check.traced_bytes, rel=1e-3)
    assert model.precision == "bf16"
    gpu = model.gpu
    assert list(gpu.allocated_bytes) == sorted(gpu.allocated_bytes)
    assert len(gpu.allocated_bytes) == len(gpu.upper_bytes) == model.batch_size == 5
    pairs = zip(gpu.upper_bytes, gpu.allocated_bytes, strict=True)
    assert all(upper > allocated for upper, allocated in pairs)
    assert gpu.upper(7) > gpu.upper(6) > gpu.upper(5) == gpu.upper_bytes[-1]
    less = {one.name: one.estimate.allocated_bytes[-1] for one in model.alternatives}
    assert less["checkpointing"] < gpu.allocated_bytes[-1] < less["fp32"]
    assert less["smaller images"] < gpu.allocated_bytes[-1] == less["no grouping"]
    assert model.limit_pixels(3) == 3 * 90 * 120
    assert model.replays[-1].batches >= 200
    assert all(one.reserved_bytes >= one.allocated_bytes for one in model.replays)


def test_layer_drop_needs_the_memory_of_a_whole_step(small_params, prepared):
    """The largest step is one that drops nothing; a dropped layer has its state from the first."""
    found = []
    for layer_drop in (0.0, 0.5):
        params = override(small_params, {"model.decoder_layers": 2, "model.layer_drop": layer_drop})
        shapes = prepared_shapes(params, prepared)
        factory = lambda other: step_factory(other, 8)  # noqa: E731
        found.append(predict(params, shapes, factory, alternatives=False).model)
    assert found[0] == found[1]


def test_every_seed_has_one_prediction(small_params, make_record, tmp_path):
    """Its bound holds for the steps of any seed, also where each image has its own shape."""
    records = [make_record(i, 160 - i % 5 * 9, 90 + i % 7 * 11, boxes=i % 7) for i in range(40)]
    write_index(tmp_path / "train.safetensors", records)
    write_classes(tmp_path / "classes.json", [ClassName(i, i + 1, str(i)) for i in range(8)])
    varied = override(small_params, {"data.short_sides": (60, 70, 80, 90)})
    found = []
    for seed in (0, 7):
        shapes = prepared_shapes(override(varied, {"seed": seed}), tmp_path)
        factory = lambda other: step_factory(other, 8)  # noqa: E731
        found.append(predict(varied, shapes, factory, alternatives=False))
    assert found[0].model == found[1].model
    template, upper = found[0].template, found[0].model.gpu.upper
    for seed in range(3, 11):
        steps = sample_steps(varied, records, 5, 40, seed)
        held = template.replay(steps, WORKSPACE_SHARE).reserved
        assert held <= upper(5), seed


@pytest.mark.parametrize(
    ("queries", "shape"), [(100, (90, 120)), (170, (90, 120)), (300, (90, 120)), (20, (3, 5))]
)
def test_queries_may_outnumber_tokens(small_params, queries, shape):
    """Of 15 x 12 tokens, of the smaller shape that is traced, or of a tiny image."""
    params = override(small_params, {"model.num_queries": queries})
    shapes = single_shape(params, shape, objects=6, num_classes=8)
    found = predict(params, shapes, lambda other: step_factory(other, 8), alternatives=False)
    check = found.model.confirmation
    assert check.predicted_bytes == check.traced_bytes
    assert found.model.loose_blocks == 0


def test_the_model_is_read_as_it_was_written(prediction, tmp_path):
    write_model(tmp_path, prediction.model)
    assert read_model(tmp_path / "memory.json", 5) == prediction.model


def test_bad_models_are_named(prediction, tmp_path):
    path = tmp_path / "memory.json"
    again = "run `dvc repro profile_memory`"
    with pytest.raises(TrainingError) as caught:
        read_model(path)
    assert str(caught.value) == f"{path}: not found; {again} first"
    write_model(tmp_path, prediction.model)
    with pytest.raises(TrainingError) as caught:
        read_model(path, batch_size=16)
    assert str(caught.value) == f"{path}: made for training.batch_size 5, not 16; {again}"
    later = path.read_text().replace('"format": 1', '"format": 2')
    for text in ("{", '{"micro_batch": 3}', "[]", "3", later):
        path.write_text(text)
        with pytest.raises(TrainingError) as caught:
            read_model(path)
        assert str(caught.value) == f"{path}: no memory model of this version; {again}"


def test_larger_cards_take_more(prediction):
    gpu = prediction.model.gpu
    images = [card.images for card in cards(gpu)]
    assert images == sorted(images)
    card = card_of(gpu, 1.4)
    assert gpu.upper(card.images) <= card.room_bytes < gpu.upper(card.images + 1)
    assert card_of(gpu, 1).images == 0
    assert shown_images(prediction.model, None) == 5
    assert shown_images(prediction.model, 1) == 1


def test_training_on_a_cpu_goes_by_the_measured_line(prediction, small_params, tmp_path):
    """As long as it was measured for this memory.json."""
    write_model(tmp_path, prediction.model)
    trials = tmp_path / "none.json"
    params = override(small_params, {"memory.budget_gib": 3})
    plan = plan_memory(params, tmp_path, CPU, trials=trials)
    assert (plan.micro_batch, plan.accumulation) == (5, 1)
    assert plan.limit_pixels == 5 * 90 * 120
    assert plan.needed_bytes == cpu_line(prediction.model.cpu).at(5)
    assert plan.budget_bytes == 3 * GIB - 256 * MIB
    assert plan.line().startswith("micro-batch 5 (up to 5 fit), 1 forward pass a step: ")

    digest = sha256_file(tmp_path / "memory.json")
    peaks = [Peak(2, 2 * GIB, 2 * GIB), Peak(4, 3 * GIB, 3 * GIB)]
    write_cpu(tmp_path, digest, this_platform(CPU), peaks)
    plan = plan_memory(params, tmp_path, CPU, trials=trials)
    assert (plan.micro_batch, plan.accumulation, plan.needed_bytes) == (3, 2, round(2.5 * GIB))
    assert plan_memory(params, tmp_path, CPU, trials=trials, saved=2).micro_batch == 2
    assert plan_memory(params, tmp_path, CPU, trials=trials, saved=4).micro_batch == 3
    assert plan_memory(params, tmp_path, CPU, trials=trials, processes=3).micro_batch == 2
    asked = override(params, {"training.micro_batch": 4})
    assert plan_memory(asked, tmp_path, CPU, trials=trials).chosen_by == "training.micro_batch"

    tight = override(params, {"memory.budget_gib": 1.5})
    with pytest.raises(TrainingError, match=r"up to 1\.50 GiB, there are 1\.25 GiB") as caught:
        plan_memory(tight, tmp_path, CPU, trials=trials)
    # What a CPU cannot use is not offered.
    assert "model.checkpointing: true" in str(caught.value)
    assert "precision" not in str(caught.value)

    write_cpu(tmp_path, "of another memory.json", this_platform(CPU), peaks)
    assert plan_memory(params, tmp_path, CPU, trials=trials).micro_batch == 5


def trial(model: str, ratio: float, *, retries: int = 0, platform: Platform = GPU) -> Trial:
    return Trial(platform, model, 4, 1000, round(1000 * ratio), 900, 500 * MIB, retries)


def test_own_trials_correct_both_ways_and_others_upwards_only():
    assert correction([], GPU, "this") == Correction()
    own = [trial("this", 0.8), trial("this", 0.9), trial("other", 1.2)]
    assert correction(own, GPU, "this") == Correction(0.9 * 1.01, 500 * MIB)
    assert correction([trial("this", 0.1)], GPU, "this").factor == 0.5
    assert correction([trial("other", 0.8)], GPU, "this").factor == 1.0
    assert correction([trial("other", 1.1)], GPU, "this").factor == pytest.approx(1.1 * 1.01)
    elsewhere = replace(GPU, driver="580.1")
    assert correction([trial("this", 1.1, platform=elsewhere)], GPU, "this") == Correction()
    # A trial that only went on by giving its cache back says nothing of what it would have held.
    assert correction([trial("this", 0.7, retries=2)], GPU, "this") == Correction()


def test_trials_are_kept_the_latest_of_each(tmp_path):
    path = tmp_path / ".runkey/memory.json"
    assert read_trials(path) == ()
    add_trials(path, [trial("a", 0.8), trial("b", 0.9)])
    add_trials(path, [trial("a", 0.85)])
    assert read_trials(path) == (trial("b", 0.9), trial("a", 0.85))
    path.write_text(json.dumps({"format": 1, "trials": [{}]}))
    with pytest.raises(TrainingError, match="no trials of this version"):
        read_trials(path)
