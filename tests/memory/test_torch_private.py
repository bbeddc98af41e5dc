"""The private parts of torch are there, do what they are used for, and are used in one file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from runkey.memory.trace import torch_private
from runkey.memory.trace.torch_private import PARTS, missing_parts

ROOM = Path(torch_private.__file__).parents[1]


@pytest.mark.parametrize("name", PARTS)
def test_torch_has(name):
    assert missing_parts({name: PARTS[name]}) == []


def test_a_part_that_is_gone_is_named_with_its_purpose():
    parts = {"torch._C._gone": "showing this", "node._gone": "b", "torch._gone.x": "c"}
    assert missing_parts(parts) == [
        "torch._C._gone (showing this)",
        "node._gone (b)",
        "torch._gone.x (c)",
    ]


def test_fake_tensors_have_no_memory_and_a_device():
    with torch_private.fake_tensors():
        made = torch.zeros(2**40, device=torch_private.CUDA)
        assert made.device.type == "cuda"
        assert made.untyped_storage().nbytes() == 4 * 2**40


def test_sequence_numbers_grow_and_metadata_has_shapes():
    before = torch_private.next_sequence_number()
    x = torch.ones(2, 3, requires_grad=True)
    node = x.exp().grad_fn
    assert node._sequence_nr() == before
    assert torch_private.next_sequence_number() > before
    (expected,) = node._input_metadata
    assert torch.Size(expected.shape) == (2, 3)
    assert expected.dtype == torch.float32


def test_reference_counts_tell_a_shared_tensor_and_a_shared_storage():
    alone = torch_private.reference_counts(torch.empty(1))
    x = torch.empty(4)
    assert torch_private.reference_counts(x) == alone
    view = x[:2]
    assert torch_private.reference_counts(x)[1] > alone[1]
    assert torch_private.storage_key(view) == torch_private.storage_key(x)
    assert torch_private.storage_key(torch.empty(4)) != torch_private.storage_key(x)


def private_names(source: str) -> list[str]:
    """Names of torch with a leading underscore, imported or looked up."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if re.search(r"\._[a-zA-Z]", name)]
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-zA-Z]", node.attr):
            text = ast.unparse(node)
            if not text.startswith("self."):
                found.append(text)
    return found


def test_no_other_file_uses_a_private_name():
    files = [path for path in sorted(ROOM.rglob("*.py")) if path.name != "torch_private.py"]
    assert len(files) >= 8
    found = {path.name: private_names(path.read_text()) for path in files}
    # NamedTuple's public method has an underscore.
    used = {
        name: [x for x in names if not x.endswith("._replace")] for name, names in found.items()
    }
    assert {name: names for name, names in used.items() if names} == {}


def test_the_check_sees_private_names():
    source = (
        "import torch\nfrom torch._subclasses import a\ntorch._C.b()\nx.untyped_storage()._cdata\n"
    )
    names = ["torch._C", "torch._subclasses.a", "x.untyped_storage()._cdata"]
    assert sorted(private_names(source)) == names
