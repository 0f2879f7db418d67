r"""Tests for the probnets.layers.convattention module."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm
from torch.testing import assert_close

from probnets.layers import is_function
from probnets.layers.convattention import ConvAttentionBlock, ConvEmbedding

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(layer):
    layer = layer.double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in layer.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return layer


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# Embedding


def test_patches_by_hand():
    layer = ConvEmbedding(1, 2, kernel_size=2, stride=2, norm="layer_plain")
    weight = torch.tensor([1.0, -1.0])[:, None, None, None].expand(2, 1, 2, 2)
    layer.load_state_dict({"conv.conv.weight": weight, "conv.conv.bias": torch.zeros(2)})
    x = torch.tensor([[[[1.0, 2.0, -3.0], [3.0, 4.0, -5.0]]]])

    # The sums are 10 and -8, and a norm over two opposite numbers leaves their signs.
    expected = torch.tensor([[[[1.0, -1.0]], [[-1.0, 1.0]]]])
    assert_close(layer(x), expected)


def test_overlapping_patches_are_a_convolution():
    layer, x = drawn(ConvEmbedding(3, 8)), draw(2, 3, 18, 11)
    y = conv2d(x, layer.conv.conv.weight, layer.conv.conv.bias, stride=4, padding=3)
    weight, bias = layer.get_parameter("norm.norm.weight"), layer.get_parameter("norm.norm.bias")
    expected = layer_norm(y.movedim(1, -1), (8,), weight, bias, 1e-6).movedim(-1, 1)
    assert_close(layer(x), expected)


# Block


def test_without_kernels_it_is_a_transformer():
    block = drawn(ConvAttentionBlock(8, heads=2, kernel_size=1, key_stride=1, expansion=3.0))
    other = nn.TransformerEncoderLayer(
        8, 2, 24, 0.0, gelu, 1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    )
    weights = block.state_dict()
    parts = "queries", "keys", "values"
    for part in parts:
        weights[f"{part}.conv.conv.weight"].fill_(1.0)
    # Whatever bias keys had, it would change nothing.
    weights["keys.mix.conv.bias"] = draw(8)
    mixes = {
        kind: torch.cat([weights[f"{part}.mix.conv.{kind}"] for part in parts])
        for kind in ("weight", "bias")
    }
    names = {"norm1.norm": "norm1", "norm2.norm": "norm2", "output.conv": "self_attn.out_proj"}
    names |= {"feed_forward.layer.expand": "linear1", "feed_forward.layer.project": "linear2"}
    state = {
        f"{new}.{kind}": weights[f"{old}.{kind}"]
        for old, new in names.items()
        for kind in ("weight", "bias")
    }
    state["self_attn.out_proj.weight"] = state["self_attn.out_proj.weight"].flatten(1)
    state["self_attn.in_proj_weight"] = mixes["weight"].flatten(1)
    state["self_attn.in_proj_bias"] = mixes["bias"]
    other.load_state_dict(state)

    x = draw(2, 8, 3, 4)
    expected = other(x.flatten(2).mT).mT.unflatten(2, (3, 4))
    assert_close(block(x), expected)


def definition(block, x, visible):
    r"""Computes the first half of a block for one sample, key by key."""

    def project(part, stride):
        z = block.norm1(x)
        z = z if mask is None else z * mask
        y = conv2d(z, part.conv.conv.weight, stride=stride, padding=1, groups=8)
        return part.mix(part.norm(y)).squeeze(0)

    mask = None if visible is None else interpolate(visible.double(), x.shape[2:])
    q = project(block.queries, 1)
    k, v = project(block.keys, block.key_stride), project(block.values, block.key_stride)
    shown = torch.ones_like(k[0], dtype=torch.bool)
    if visible is not None:
        shown = interpolate(visible.double(), k.shape[1:])[0, 0] > 0

    y = torch.zeros_like(q)
    for h in range(block.heads):
        c = slice(4 * h, 4 * h + 4)
        for i in range(q.shape[1]):
            for j in range(q.shape[2]):
                scores = (q[c, i, j, None, None] * k[c]).sum(0)[shown] / 2.0
                y[c, i, j] = v[c][:, shown] @ scores.softmax(0)
    return x + block.res_scale * block.output(y[None])


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_matches_definition(norm, stride):
    block = drawn(
        ConvAttentionBlock(8, heads=2, key_stride=stride, projection_norm=norm, res_scale=0.5)
    )
    x = draw(1, 8, 5, 4)
    middle = definition(block, x, None)
    expected = middle + 0.5 * block.feed_forward(block.norm2(middle))
    assert_close(block(x), expected)


def test_hidden_patches_hold_no_keys():
    block, x = drawn(ConvAttentionBlock(8, heads=2)), draw(1, 8, 4, 8)
    visible = torch.tensor([[[[True, False, True, False], [False, False, True, True]]]])
    middle = definition(block, x, visible)
    expected = middle + block.feed_forward(block.norm2(middle))

    shown = visible.repeat_interleave(2, 2).repeat_interleave(2, 3).expand_as(x)
    assert_close(block(x, visible)[shown], expected[shown])
    assert not torch.allclose(block(x)[shown], expected[shown])


def test_keys_of_one_pixel():
    # One key takes all attention, whatever the query is.
    block, x = drawn(ConvAttentionBlock(8, heads=2, key_stride=4, norm="none")), draw(1, 8, 3, 2)
    middle = x + block.output(block.values(x)).expand(-1, -1, 3, 2)
    assert_close(block(x), middle + block.feed_forward(middle))


def test_positions_enter_by_the_border_alone():
    # A constant map stays constant where kernels of one pixel see no border.
    x = draw(1, 8, 1, 1).expand(-1, -1, 5, 5)
    for width, same in ((1, True), (3, False)):
        y = drawn(ConvAttentionBlock(8, heads=2, kernel_size=width, norm="none"))(x)
        assert torch.allclose(y, y[:, :, 2:3, 2:3].expand_as(y)) == same


def test_the_norm_of_the_paper_is_no_function():
    assert is_function(ConvAttentionBlock(8, heads=2))
    assert not is_function(ConvAttentionBlock(8, heads=2, projection_norm="batch"))


# Errors


def test_patches_finer_than_keys():
    block = ConvAttentionBlock(8, heads=2, key_stride=2)
    with pytest.raises(ValueError, match=r"multiple of key_stride 2 pixels, got \(2, 3\); take"):
        block(torch.zeros(1, 8, 4, 6), torch.ones(1, 1, 2, 2, dtype=torch.bool))


def test_samples_without_visible_patches():
    visible = torch.tensor([[True, False], [False, False]])[:, None, None]
    with pytest.raises(ValueError, match="expected a visible patch in each sample"):
        ConvAttentionBlock(8, heads=2)(torch.zeros(2, 8, 2, 4), visible)


def test_bad_options():
    with pytest.raises(ValueError, match="expected features divisible by heads, got 8 and 3"):
        ConvAttentionBlock(8, heads=3)
    with pytest.raises(ValueError, match="expected an odd kernel_size"):
        ConvAttentionBlock(8, heads=2, kernel_size=2)
    with pytest.raises(ValueError, match="expected an odd kernel_size"):
        ConvEmbedding(3, 8, kernel_size=4, stride=2)
