r"""Tests of attention that starts as a convolution."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from probnets.layers.attention import attend
from probnets.layers.positional import PositionalAttention, PositionalAttentionBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def randomised(layer):
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return layer


def direct(layer, x, shown):
    r"""Sums over pairs of pixels, one head and one pixel after the other."""
    B, C, H, W = x.shape
    d = C // layer.heads
    y = torch.zeros_like(x)
    for b in range(B):
        pixels = [(i, j) for i in range(H) for j in range(W)]
        keys = [p for p in pixels if shown[b, 0, p[0], p[1]]]
        for i, j in pixels:
            parts = []
            for h in range(layer.heads):
                own = slice(h * d, (h + 1) * d)
                q = layer.qk.weight[:C][own] @ x[b, :, i, j]
                scores, places, values = [], [], []
                for m, n in keys:
                    k = layer.qk.weight[C:][own] @ x[b, :, m, n]
                    dx, dy = n - j, m - i
                    r = torch.tensor([dx, dy, dx**2 + dy**2], dtype=x.dtype)
                    scores.append(q @ k / math.sqrt(d))
                    places.append(layer.position[h] @ r)
                    values.append(layer.values.weight[own] @ x[b, :, m, n])
                gate = torch.sigmoid(layer.gate[h])
                weights = (1 - gate) * torch.stack(scores).softmax(0)
                weights = weights + gate * torch.stack(places).softmax(0)
                weights = weights / weights.sum()
                parts.append(weights @ torch.stack(values))
            y[b, :, i, j] = layer.output(torch.cat(parts))
    return y


def test_by_hand():
    layer = PositionalAttention(1, heads=1).double()
    with torch.no_grad():
        layer.qk.weight.zero_()
        layer.values.weight.fill_(2.0)
        layer.output.weight.fill_(1.0)
        layer.output.bias.fill_(0.5)
        layer.position.copy_(torch.tensor([[math.log(3.0), 7.0, 0.0]]))
        layer.gate.zero_()
    # The right pixel has three times the weight of the left one by position, seen from both.
    # By content both have one half. The gate mixes: 0.5 * 0.75 + 0.5 * 0.5 = 0.625.
    y = layer(torch.tensor([[[[1.0, 5.0]]]], dtype=torch.float64))
    value = 0.5 + 2 * (0.375 * 1 + 0.625 * 5)
    assert_close(y, torch.full((1, 1, 1, 2), value, dtype=torch.float64))


def test_start():
    layer = PositionalAttention(4, heads=2, locality=2.0)
    assert torch.equal(layer.position, torch.tensor([[-2.0, 0.0, -2.0], [2.0, 0.0, -2.0]]))
    assert torch.equal(layer.values.weight, torch.eye(4))
    assert torch.equal(layer.gate, torch.ones(2))


@pytest.mark.parametrize("masked", [False, True])
def test_against_a_sum_over_pairs(masked):
    layer = randomised(PositionalAttention(6, heads=3))
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    shown = torch.ones(2, 1, 2, 3, dtype=torch.bool)
    if masked:
        shown = torch.tensor([[[[1, 0, 1], [1, 0, 0]]], [[[0, 0, 1], [1, 1, 1]]]]).bool()
    y = layer(x, shown) if masked else layer(x)
    assert_close(y * shown, direct(layer, x, shown) * shown)


def test_starts_as_a_convolution():
    layer = PositionalAttention(9, heads=9, locality=100.0).double()
    with torch.no_grad():
        nn.init.eye_(layer.output.weight)
        layer.output.bias.zero_()
        layer.gate.fill_(100.0)

    x = torch.randn(1, 9, 5, 6, dtype=torch.float64)
    y = layer(x)
    for h in range(9):
        dy, dx = h // 3 - 1, h % 3 - 1
        assert_close(y[:, h, 1:-1, 1:-1], x[:, h, 1 + dy : 4 + dy, 1 + dx : 5 + dx])


def test_a_closed_gate_leaves_plain_attention():
    layer = randomised(PositionalAttention(4, heads=1))
    with torch.no_grad():
        layer.gate.fill_(-100.0)
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    tokens = x.flatten(2).mT
    q, k = layer.qk(tokens).chunk(2, dim=-1)
    y = layer.output(attend(q, k, layer.values(tokens)))
    assert_close(layer(x), y.mT.unflatten(2, (3, 2)))


def test_moved_maps_give_moved_outputs_by_position():
    layer = randomised(PositionalAttention(4, heads=2))
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    shown = torch.zeros(1, 1, 6, 7, dtype=torch.bool)
    large = torch.randn(1, 4, 6, 7, dtype=torch.float64)
    large[:, :, 2:5, 3:6], shown[:, :, 2:5, 3:6] = x, True
    assert_close(layer(large, shown)[:, :, 2:5, 3:6], layer(x))


def test_nothing_visible_gives_no_nan():
    layer = randomised(PositionalAttention(4, heads=2))
    hidden = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    assert layer(torch.randn(1, 4, 2, 2, dtype=torch.float64), hidden).isfinite().all()


def test_block_is_two_scaled_branches():
    block = PositionalAttentionBlock(4, heads=2, kind="geglu", norm="group", res_scale=0.5)
    block = randomised(block)
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    middle = x + 0.5 * block.attention(block.norm1(x))
    tokens = block.norm2(middle).flatten(2).mT
    assert_close(block(x), middle + 0.5 * block.feed_forward(tokens).mT.unflatten(2, (3, 2)))


def test_masks_may_show_different_numbers_of_pixels():
    block = randomised(PositionalAttentionBlock(4, heads=2))
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    shown = torch.tensor([[[[1, 0], [0, 0]]], [[[1, 1], [0, 1]]]]).bool()
    y = block(x, shown)
    assert_close(y[:1, :, :1, :1], block(x[:1, :, :1, :1]))


@pytest.mark.parametrize("heads", [0, 3])
def test_wrong_heads(heads):
    with pytest.raises(ValueError, match=f"expected heads that divide 4 channels, got {heads}"):
        PositionalAttention(4, heads=heads)


@pytest.mark.slow
def test_against_timm():
    convit = pytest.importorskip("timm.models.convit")
    layer = randomised(PositionalAttention(8, heads=4))
    other = convit.GPSA(8, num_heads=4).double()
    state = {
        "qk.weight": layer.qk.weight,
        "v.weight": layer.values.weight,
        "proj.weight": layer.output.weight,
        "proj.bias": layer.output.bias,
        "pos_proj.weight": layer.position,
        "pos_proj.bias": torch.randn(4),  # moves all scores of a head alike
        "gating_param": layer.gate,
    }
    other.load_state_dict(state)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert_close(layer(x), other(x.flatten(2).mT).mT.unflatten(2, (5, 5)))
