r"""Tests of recursive gated convolutions."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from probnets.layers.recursive import RecursiveGatedBlock, RecursiveGatedConv

pytestmark = pytest.mark.usefixtures("one_thread")


def randomised(layer):
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return layer


def point(conv, x):
    r"""Mixes the channels of each pixel by a matrix."""
    y = torch.einsum("oc,bchw->bohw", conv.conv.weight[:, :, 0, 0], x)
    return y + conv.conv.bias[:, None, None]


def neighbours(conv, x):
    r"""Filters each channel by itself, one tap after the other."""
    kernel = conv.conv.weight
    rim = kernel.shape[-1] // 2
    padded = functional.pad(x, (rim, rim, rim, rim))
    y = torch.zeros_like(x) + conv.conv.bias[:, None, None]
    for i in range(kernel.shape[-1]):
        for j in range(kernel.shape[-1]):
            moved = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            y = y + kernel[:, 0, i, j, None, None] * moved
    return y


def test_order_one_by_hand():
    layer = RecursiveGatedConv(1, order=1, kernel_size=3, scale=0.5).double()
    values = {
        "expand.conv.weight": torch.tensor([2.0, 3.0]).view(2, 1, 1, 1),
        "expand.conv.bias": torch.tensor([1.0, 0.0]),
        "depthwise.conv.weight": torch.ones(1, 1, 3, 3),
        "depthwise.conv.bias": torch.tensor([4.0]),
        "project.conv.weight": torch.full((1, 1, 1, 1), 10.0),
        "project.conv.bias": torch.tensor([-1.0]),
    }
    layer.load_state_dict(values)
    # p = 2 x + 1 = 3, 5; q = 3 x = 3, 6; sums of neighbours with the bias: 13, 13.
    y = layer(torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64))
    expected = [10 * 3 * 6.5 - 1, 10 * 5 * 6.5 - 1]
    assert_close(y, torch.tensor([[[expected]]], dtype=torch.float64))


def test_order_two_against_the_formula():
    layer = randomised(RecursiveGatedConv(4, order=2, kernel_size=3, scale=0.7))
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)

    wide = point(layer.expand, x)
    p, q = wide[:, :2], 0.7 * neighbours(layer.depthwise, wide[:, 2:])
    p = p * q[:, :2]
    p = point(layer.mixers[0], p) * q[:, 2:]
    assert_close(layer(x), point(layer.project, p))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_is_a_polynomial_of_its_degree(order):
    layer = randomised(RecursiveGatedConv(8, order=order, kernel_size=3))
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64)

    # Differences of one order more than the degree are zero, and of the degree they are not.
    y = torch.cat([layer(t * x) for t in range(order + 3)]).detach()
    size = y.abs().max()
    for _ in range(order + 1):
        y = y.diff(dim=0)
    assert y.abs().max() > 1e-3
    assert y.diff(dim=0).abs().max() < 1e-12 * size


def test_widths_double():
    layer = RecursiveGatedConv(16, order=4)
    assert layer.widths == [2, 4, 8, 16]
    assert [(m.in_channels, m.out_channels) for m in layer.mixers] == [(2, 4), (4, 8), (8, 16)]
    assert layer.depthwise.conv.groups == 30


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_block_is_two_scaled_branches(layer_scale):
    block = RecursiveGatedBlock(4, order=2, layer_scale=layer_scale, res_scale=0.5)
    scales = [s for s in (block.scale1, block.scale2) if s is not None]
    assert all(torch.equal(s, torch.full((4,), 0.3)) for s in scales)
    assert len(scales) == (0 if layer_scale is None else 2)
    block = randomised(block)
    factors = [0.5 * s[:, None, None] for s in scales] or [0.5, 0.5]

    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    middle = x + factors[0] * block.gated(block.norm1(x))
    tokens = block.norm2(middle).flatten(2).mT
    y = block.feed_forward(tokens).mT.unflatten(2, (3, 2))
    assert_close(block(x), middle + factors[1] * y)


def test_order_of_zero():
    with pytest.raises(ValueError, match="expected order >= 1, got 0"):
        RecursiveGatedConv(4, order=0)


def test_channels_that_do_not_halve():
    with pytest.raises(ValueError, match="expected channels divisible by 4 for order 3, got 6"):
        RecursiveGatedConv(6, order=3)
