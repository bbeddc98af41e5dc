"""Choices of device, precision and processes, with their reasons; seeds."""

import os
import subprocess
import sys

import pytest
import torch

from runkey.errors import TrainingError
from runkey.training.device import (
    Precision,
    build_precision,
    choose_device,
    configure_torch,
    derive_seed,
    seed_step,
)
from runkey.training.distributed import World, count_ranks, join_world, read_world
from runkey.training.ranks import is_follower

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype", "reason"),
    [
        ("auto", None, "auto: mixed precision does not pay on a CPU"),
        ("off", None, "asked for"),
        ("tf32", None, "asked for, though the CPU has no TF32: fp32"),
        ("bf16", torch.bfloat16, "asked for, though it is slower than fp32 on a CPU without AMX"),
        ("fp16", torch.float16, "asked for; losses are scaled"),
    ],
)
def test_precision_on_a_cpu(precision, dtype, reason):
    assert build_precision(precision, CPU) == Precision(CPU, dtype, reason)


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), torch.bfloat16, "auto: the GPU has bf16"),
        ((8, 0), torch.bfloat16, "auto: the GPU has bf16"),
        ((7, 5), None, "auto: the GPU has no bf16, and fp16 is only used when asked for"),
    ],
)
def test_automatic_precision_on_a_gpu(monkeypatch, capability, dtype, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda", 0)
    assert build_precision("auto", device) == Precision(device, dtype, reason)


@pytest.mark.parametrize(
    ("capability", "precision", "name"),
    [
        ((8, 0), "tf32", "tf32"),
        ((7, 5), "tf32", "off"),
        ((8, 0), "off", "off"),
        ((8, 0), "bf16", "bf16"),
    ],
)
def test_tf32_only_where_it_is_asked_for(monkeypatch, capability, precision, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = build_precision(precision, torch.device("cuda", 0))
    assert found.name == name
    assert found.tf32 == (name == "tf32")


def test_only_fp16_scales_losses():
    assert Precision(CPU).scaler is None
    assert Precision(CPU, torch.bfloat16).scaler is None
    assert Precision(CPU, torch.float16).scaler is not None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_autocast(dtype):
    with Precision(CPU, dtype).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


def test_device(monkeypatch):
    assert choose_device("cpu") == (CPU, "asked for")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == (CPU, "torch sees no GPU")
    with pytest.raises(TrainingError, match=r"runtime.device = cuda, but torch sees no GPU"):
        choose_device("cuda")


@pytest.mark.gpu
def test_device_on_a_gpu():
    device, reason = choose_device("auto")
    assert device == torch.device("cuda", 0)
    assert reason == torch.cuda.get_device_name(0)


TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
TORCHRUN |= {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def test_world():
    world = read_world(TORCHRUN)
    assert (world.rank, world.local_rank, world.size, world.is_main) == (3, 1, 4, False)


@pytest.mark.parametrize(
    "left_over",
    [
        {},
        dict.fromkeys(TORCHRUN, ""),
        dict.fromkeys(TORCHRUN, " "),
        {"LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"},
        {"RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3", "SLURM_JOB_ID": "7"},
    ],
)
def test_left_over_variables_that_start_nothing(left_over, monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert (read_world().rank, read_world().size) == (0, 1)
    assert not is_follower()
    assert count_ranks(3, CPU, 8) == (1 if left_over.get("WORLD_SIZE") == "1" else 3)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({"WORLD_SIZE": ""}, "RANK=3 is not below WORLD_SIZE=1"),
        ({"RANK": ""}, "WORLD_SIZE=4 without RANK"),
        ({"RANK": "", "MASTER_PORT": ""}, "WORLD_SIZE=4 without RANK, MASTER_PORT"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE=4 without MASTER_ADDR"),
        ({"RANK": "first"}, "RANK=first is no number"),
        ({"RANK": "-1"}, "RANK=-1 is no number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http is no number"),
    ],
)
def test_variables_that_clash_are_one_line_with_the_way_out(changed, says):
    with pytest.raises(TrainingError) as error:
        read_world(TORCHRUN | changed)
    way_out = "start training with torchrun, or `unset RANK WORLD_SIZE`"
    assert str(error.value) == f"environment: {says}; {way_out}"


def test_one_process_joins_nobody():
    with join_world(CPU) as world:
        assert world == World()
        assert not torch.distributed.is_initialized()


_TWO = """
import torch, torch.distributed as dist
from runkey.training.distributed import join_world
with join_world(torch.device("cpu")) as world:
    total = torch.tensor([world.rank + 1.0])
    dist.all_reduce(total)
    assert total.item() == 3 and world.size == 2
assert not dist.is_initialized()
"""


@pytest.mark.slow
def test_two_processes_meet(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            script,
        ],
        check=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.getcwd()},  # noqa: PTH109
    )


def test_seeds_depend_on_every_part():
    seeds = {derive_seed(*parts) for parts in [(0,), (1,), (0, 1), (1, 0), (0, "1", 2), (0, 12)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Written out: another machine or version must draw the same.
    assert derive_seed(0, "step", 7, 0) == SEED_OF_STEP_7


SEED_OF_STEP_7 = 206210036111531418


def test_noise_of_a_step():
    def draw(*arguments):
        seed_step(*arguments)
        return torch.rand(4)

    first = draw(0, 5)
    torch.rand(3)
    assert torch.equal(first, draw(0, 5, 0))
    for other in ((0, 6), (1, 5), (0, 5, 1)):
        assert not torch.equal(first, draw(*other))


def test_set_up_settles_the_kernels(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    configure_torch(3, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    first = torch.rand(3)
    configure_torch(3, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(first, torch.rand(3))
