"""What a state dict may name, and that a state dict names nothing else."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest

from runkey.errors import RegistryError
from runkey.registry.team.safe_pickle import check_pickles, forbidden
from tests.support.run_package import weights


class Calls:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_call_is_found_in_every_protocol(protocol: int) -> None:
    assert forbidden(pickle.dumps({"model": Calls()}, protocol=protocol))


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02cbuiltins\ngetattr\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02cut off",
        b"",
    ],
)
def test_written_by_hand(content: bytes) -> None:
    assert forbidden(content)


def test_a_plain_state_dict() -> None:
    assert forbidden(pickle.dumps(OrderedDict(a=[1, 2.5, "x", None, True]), protocol=2)) == []


@pytest.mark.slow
def test_real_weights(tmp_path: Path) -> None:
    import torch

    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = {"model": layers.half().state_dict(), "step": torch.tensor(3), "note": "x"}
    torch.save(state, tmp_path / "weights.pt")
    check_pickles(tmp_path / "weights.pt", "weights.pt")
    torch.save(layers, tmp_path / "module.pt")
    with pytest.raises(RegistryError, match=r"loading it would use torch\.nn\.modules"):
        check_pickles(tmp_path / "module.pt", "module.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(RegistryError, match="not weights in torch's zip format"):
        check_pickles(tmp_path / "old.pt", "old.pt")


def test_a_pickle_beside_the_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(weights())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("weights/constants.pkl", b".")
    with pytest.raises(RegistryError, match=r"holds the pickle .weights/constants\.pkl"):
        check_pickles(path, "weights.pt")


@pytest.mark.parametrize("name", ["a.npz", "a.jpg", "pictures.zip", "a"])
def test_a_zip_by_any_name_is_looked_into(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(weights(os.system))
    with pytest.raises(RegistryError, match="loading it would use"):
        check_pickles(tmp_path / name, name)


def test_a_damaged_zip(tmp_path: Path) -> None:
    content = bytearray(weights())
    content[40] ^= 0xFF
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(RegistryError, match="refused"):
        check_pickles(tmp_path / "weights.pt", "weights.pt")
