r"""Tests for the probnets.layers.wavemix module."""

import pytest
import torch
from torch.nn.functional import conv_transpose2d
from torch.testing import assert_close

from probnets.layers.wavemix import WaveMixBlock

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT = torch.float64


def bands(x):
    a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    return [(a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2]


def pointwise(conv, x):
    y = torch.einsum("oi,bihw->bohw", conv.conv.weight[:, :, 0, 0], x)
    return y + conv.conv.bias[:, None, None]


def level(one, x):
    y = pointwise(one.project, torch.nn.functional.gelu(pointwise(one.expand, x)))
    return one.norm(conv_transpose2d(y, one.enlarge.weight, one.enlarge.bias, 2, 1))


def test_by_hand():
    r"""All weights are one: the sum of the square is four halves, spread over a window."""
    block = WaveMixBlock(4, expansion=1, norm="none", activation="none")
    for parameter in block.parameters():
        parameter.data.fill_(0 if parameter.ndim == 1 else 1)
    x = torch.zeros(1, 4, 2, 2)
    x[0, 0] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])

    # Bands are 1/2 each, their sum 2; four channels of 2, and then four of 8.
    assert_close(block(x), x + 32)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_matches_the_definition(norm):
    block = WaveMixBlock(8, levels=2, norm=norm, res_scale=0.5, dtype=FLOAT).eval()
    x = torch.randn(2, 8, 8, 4, dtype=FLOAT)

    first = bands(block.reduce(x))
    second = bands(first[0])
    deep = level(block.levels[1], torch.cat(second, dim=1))
    assert deep.shape[1] == 4
    assert_close(block(x), x + level(block.levels[0], torch.cat([*first, deep], dim=1)) / 2)


def test_odd_sizes_are_padded_after_the_reduction():
    block = WaveMixBlock(4, levels=2, dtype=FLOAT).eval()
    block.reduce.conv.register_parameter("bias", None)  # so that zeros stay zero
    x = torch.randn(2, 4, 5, 6, dtype=FLOAT)
    whole = torch.nn.functional.pad(x, (0, 2, 0, 3))
    assert_close(block(x), block(whole)[:, :, :5, :6])
    assert not torch.allclose(block(x)[:, :, 4:], x[:, :, 4:])


@pytest.mark.parametrize(("levels", "field"), [(1, 4), (2, 12), (3, 24)])
def test_receptive_field(levels, field):
    block = WaveMixBlock(4, levels=levels, dtype=FLOAT).eval()
    assert block.receptive_field == field
    assert block.train().receptive_field is None

    block.eval()
    x = torch.randn(1, 4, 8, 64, dtype=FLOAT, requires_grad=True)
    y, widths = block(x), []
    for column in range(y.shape[3]):
        (slope,) = torch.autograd.grad(y[..., column].sum(), x, retain_graph=True)
        seen = slope.abs().amax(dim=(0, 1, 2)).nonzero()
        widths.append(int(seen.max() - seen.min()) + 1)
    assert max(widths) == field


def test_patches_of_one_level_are_too_small_for_two():
    block = WaveMixBlock(4, levels=2)
    with pytest.raises(ValueError, match="sizes divisible by 4, for 2 levels, got 4 x 2 pixels"):
        block(torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 2, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"channels": 6}, "expected channels divisible by 4, got 6"),
        ({"levels": 0}, "expected levels >= 1, got 0"),
        ({"expansion": 0}, "expected a hidden layer of one or more"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        WaveMixBlock(**{"channels": 4, **options})
