from __future__ import annotations

import pytest
import torch
from torch import nn

from runkey.model.detr import ConditionalAttention, project_memory_conditional
from runkey.model.transformer import (
    Attention,
    GridPosition,
    dropout,
    grid_centres,
    project_memory,
)

D, H, B, T, S = 16, 4, 2, 5, 7


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def mask():
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
    mask[1, ..., 4:] = False
    return mask


def test_self_attention_is_torchs(random):
    ours = Attention(D, H, 0.0).double()
    theirs = nn.MultiheadAttention(D, H, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, position = random(B, T, D), random(1, T, D)
    expected = theirs(x + position, x + position, x)[0]
    torch.testing.assert_close(ours.attend_self(x, position, None), expected)


def test_memory_attention_of_several_layers_is_torchs(random, mask):
    layers = [Attention(D, H, 0.0).double() for _ in range(3)]
    x, position = random(B, T, D), random(1, T, D)
    memory, places = random(B, S, D), random(B, S, D)
    for ours, pair in zip(layers, project_memory(layers, memory, places), strict=True):
        theirs = nn.MultiheadAttention(D, H, batch_first=True).double()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        padding = ~mask[:, 0, 0]
        expected = theirs(x + position, memory + places, memory, key_padding_mask=padding)[0]
        torch.testing.assert_close(ours.attend_memory(x, position, pair, mask), expected)


def test_conditional_attention_is_its_formula(random, mask):
    """Softmax of (content . content + place . place) / sqrt(2 d), head by head."""
    layer = ConditionalAttention(D, H, 0.0).double()
    x, centre, memory, places = random(B, T, D), random(B, T, D), random(B, S, D), random(1, S, D)
    ((key, value),) = project_memory_conditional([layer], memory, places)
    found = layer.attend_memory(x, centre, (key, value), mask)

    q, k, v = (
        x @ w.T if i == 0 else memory @ w.T for i, w in enumerate(layer.in_proj_weight.chunk(3))
    )
    q_place = layer.query_position(centre * layer.scale(x))
    k_place = layer.key_position(places).expand(B, -1, -1)
    width = D // H
    heads = []
    for h in range(H):
        part = slice(h * width, (h + 1) * width)
        scores = q[..., part] @ k[..., part].mT + q_place[..., part] @ k_place[..., part].mT
        scores = (scores / (2 * width) ** 0.5).masked_fill(~mask[:, 0], -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    torch.testing.assert_close(found, layer.out_proj(torch.cat(heads, -1)))


def test_masked_tokens_change_nothing(random, mask):
    layer = Attention(D, H, 0.0).double()
    x, memory = random(B, T, D), random(B, S, D)
    other = memory.clone()
    other[1, 4:] += 100
    found = [
        layer.attend_memory(x, x, project_memory([layer], m, torch.zeros_like(m))[0], mask)
        for m in (memory, other)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("centred", [False, True])
def test_positions_without_padding_are_those_of_an_empty_mask(centred):
    position = GridPosition(D, temperature=20.0, centred=centred)
    device = torch.device("cpu")
    full = position(None, (3, 4), device)
    masked = position(torch.zeros(B, 3, 4, dtype=torch.bool), (3, 4), device)
    assert torch.equal(full.expand(B, -1, -1), masked)
    assert full.shape == (1, 12, D)
    assert position(None, (3, 4), device) is full


def test_positions_are_relative_to_the_valid_part():
    """An image's encoding does not depend on how far it is padded."""
    position = GridPosition(D, temperature=20.0, centred=True)
    device = torch.device("cpu")
    padding = torch.ones(1, 5, 6, dtype=torch.bool)
    padding[:, :3, :4] = False
    padded = position(padding, (5, 6), device).view(5, 6, D)[:3, :4]
    torch.testing.assert_close(padded, position(None, (3, 4), device).view(3, 4, D))
    centres = grid_centres(padding, (5, 6), device).view(5, 6, 2)[:3, :4]
    torch.testing.assert_close(centres, grid_centres(None, (3, 4), device).view(3, 4, 2))
    assert centres[0, 0].tolist() == pytest.approx([1 / 8, 1 / 6])


def test_positions_made_in_inference_mode_serve_in_training():
    position = GridPosition(D, temperature=20.0, centred=True)
    with torch.inference_mode():
        position(None, (3, 4), torch.device("cpu"))
    weight = torch.ones(D, D, requires_grad=True)
    (position(None, (3, 4), torch.device("cpu")) @ weight).sum().backward()
    assert weight.grad is not None


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(333, 1001, requires_grad=True)  # no multiple of the bits drawn at once
    out = dropout(x, 0.3)
    assert (out == 0).double().mean().item() == pytest.approx(0.3, abs=3e-3)
    assert out.detach().double().mean().item() == pytest.approx(1.0, abs=5e-3)
    out.sum().backward()
    assert torch.equal(x.grad, out)  # a kept element passes on what it was scaled by
    # Neighbours are drawn independently: no bits are used twice.
    kept = (out > 0).double()
    for rows, columns in ((0, 1), (0, 4), (1, 0)):
        both = kept[: 333 - rows, : 1001 - columns] * kept[rows:, columns:]
        assert both.mean().item() == pytest.approx(0.49, abs=5e-3)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.3), out)


def test_attention_with_dropout_is_attention_on_average(random, mask):
    layer = Attention(D, H, 0.2).double().train()
    x, position = random(B, S, D), random(1, S, D)
    torch.manual_seed(0)
    with torch.no_grad():
        found = torch.stack([layer.attend_self(x, position, mask) for _ in range(2000)])
        expected = layer.eval().attend_self(x, position, mask)
    deviation = found.std(0) / 2000**0.5
    assert (found.mean(0) - expected).abs().max() < 5 * deviation.max()
    assert found.std(0).min() > 0
