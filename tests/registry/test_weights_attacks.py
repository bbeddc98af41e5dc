"""Weights from elsewhere: safetensors, or what torch loads with `weights_only=True`."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from runkey.errors import RegistryError
from runkey.registry.archive import check_weights
from tests.support.run_package import torch_weights, weights

REPOSITORY = Path(__file__).parents[2]


class Calls:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch called",)


def refused(path: Path, name: str | None = None) -> str:
    with pytest.raises(RegistryError, match="refused") as caught:
        check_weights(path, name or path.name)
    assert not Path("called").exists()
    return str(caught.value)


def test_every_load_of_torch_is_of_weights_only() -> None:
    """What `check_weights` takes is never loaded in another way."""
    loads = 0
    for folder in ("runkey", "stages", "benchmarks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                called, where = ast.unparse(node.func), f"{path}:{node.lineno}"
                assert not re.match(
                    r"(pickle|dill|joblib|cloudpickle)\.(load|Unpickler)", called
                ), where
                if called.endswith("torch.load"):
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert given.get("weights_only") == "True", where
                    loads += 1
    assert loads


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(weights())
    check_weights(path, path.name)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(0)}, path, {"format": "pt"})
    check_weights(path, path.name)
    save_file({}, path)
    check_weights(path, path.name)


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        weights()[:-1],
        weights() + b"x",
        pickle.dumps({"model": Calls()}),
        (1 << 63).to_bytes(8, "little") + b"{}",
        safetensors(b"[" * 100_000),
        safetensors([]),
        safetensors({"a": 1}),
        safetensors({"a": {"data_offsets": []}}),
        safetensors({"a": {"data_offsets": [0, "1"]}}, b"x"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.safetensors").write_bytes(content)
    assert "not a whole safetensors file" in refused(tmp_path / "weights.safetensors")


def test_weights_of_older_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = {"model": layers.half().state_dict(), "step": torch.tensor(3), "note": "x"}
    torch.save(state, tmp_path / "weights.pt")
    check_weights(tmp_path / "weights.pt", "weights.pt")
    torch.save(layers, tmp_path / "module.pt")
    assert "torch.nn.modules" in refused(tmp_path / "module.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt")
    torch.save({"model": Calls()}, tmp_path / "calls.pt")
    assert "system" in refused(tmp_path / "calls.pt")


@pytest.mark.parametrize("name", ["a.pkl", "a.PICKLE", "a.joblib", "a.dill"])
def test_a_pickle_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({}))
    assert "can run any code" in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["a.ckpt", "a.npz", "a"])
def test_a_pickle_in_a_zip_by_any_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(torch_weights(Calls()))
    assert "weights_only=True" in refused(tmp_path / name)


def test_a_pickle_beside_the_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(torch_weights())
    check_weights(path, path.name)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", b".")
    refused(path)


def test_a_damaged_zip(tmp_path: Path) -> None:
    content = bytearray(torch_weights())
    content[content.index(b"_rebuild_tensor")] ^= 1
    (tmp_path / "weights.pt").write_bytes(content)
    refused(tmp_path / "weights.pt")
