r"""Tests for the probnets.layers.largekernel module."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.testing import assert_close

from probnets.layers.convolution import Conv2d
from probnets.layers.largekernel import DilatedReparamConv2d, LargeKernelBlock
from probnets.layers.linearconv import LinearConv2d
from probnets.layers.merging import merge
from probnets.layers.norms import BatchNorm

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT = torch.float64


def live(layer):
    r"""Moves norms and scales far from their start."""
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(cast(Tensor, module.running_mean))
            nn.init.uniform_(cast(Tensor, module.running_var), 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return layer.eval()


def convs(layer):
    return [cast(Conv2d, conv).conv for conv in layer.convs]


def kernels(layer):
    return [(conv.kernel_size[0], conv.dilation[0]) for conv in convs(layer)]


def test_by_hand():
    layer = DilatedReparamConv2d(1, 5, norm="none")
    for conv in convs(layer):
        conv.weight.data.fill_(1)

    row = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0])
    middle = torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0])
    centre = torch.tensor([2.0, 2.0, 3.0, 2.0, 2.0])
    assert_close(layer.kernel()[0, 0], torch.stack([row, middle, centre, middle, row]))


@pytest.mark.parametrize("width", [5, 7, 9, 11, 13, 15, 17, 19, 25, 31])
def test_small_kernels_fit_in_the_large_one(width):
    (large, plain), *small = kernels(DilatedReparamConv2d(1, width))
    assert (large, plain) == (width, 1)
    assert len(set(small)) == len(small) == min(5, (width - 1) // 2)
    assert all(k % 2 and k >= 3 and d * (k - 1) + 1 <= width for k, d in small)


def test_kernels_of_the_paper():
    found = kernels(DilatedReparamConv2d(1, 13))
    assert found == [(13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5)]


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_merged_equals_the_sum(norm):
    layer = live(DilatedReparamConv2d(3, 7, norm=norm, dtype=FLOAT))
    x = torch.randn(2, 3, 5, 8, dtype=FLOAT)

    total = torch.zeros_like(x)
    for conv, outer in zip(convs(layer), layer.norms, strict=True):
        k, d = conv.kernel_size[0], conv.dilation[0]
        y = conv2d(x, conv.weight, padding=d * (k // 2), dilation=d, groups=3)
        if isinstance(outer, BatchNorm):
            one = outer.norm
            mean, variance = cast(Tensor, one.running_mean), cast(Tensor, one.running_var)
            y = (y - mean[:, None, None]) / (variance + one.eps).sqrt()[:, None, None]
            y = y * one.weight[:, None, None] + one.bias[:, None, None]
        total += y
    assert_close(layer(x), total)

    merged = layer.merged()
    assert isinstance(merged, Conv2d)
    assert merged.conv.weight.shape == (3, 1, 7, 7)
    assert (merged.conv.bias is None) == (norm == "none")
    assert_close(merged(x), total)


@pytest.mark.parametrize("width", [5, 13])
def test_kernel_is_the_sum_of_dense_matrices(width):
    layer, size = DilatedReparamConv2d(2, width, norm="none", dtype=FLOAT), (4, 5)
    total = torch.zeros(40, 40, dtype=FLOAT)
    for conv in convs(layer):
        k, d = conv.kernel_size[0], conv.dilation[0]
        branch = LinearConv2d(2, 2, k, dilation=d, groups=2, dtype=FLOAT)
        branch.weight.data = conv.weight.data
        total += branch.dense(size)

    one = layer.as_linear()
    assert one.fan_in("weight") == width**2
    assert_close(one.dense(size), total)
    x = torch.randn(1, 2, *size, dtype=FLOAT)
    assert_close(layer(x), one(x))
    assert layer.as_linear(padding="full").block_gram(1).shape == (1, 1, 1, 2, 2)


def test_kernel_has_gradients():
    layer = DilatedReparamConv2d(2, 9, norm="none", dtype=FLOAT)
    target = torch.randn(2, 1, 9, 9, dtype=FLOAT)
    (layer.kernel() * target).sum().backward()
    for conv in convs(layer):
        reach = conv.dilation[0] * (conv.kernel_size[0] // 2)
        taps = slice(4 - reach, 5 + reach, conv.dilation[0])
        assert_close(conv.weight.grad, target[:, :, taps, taps])


def test_merged_weights_are_their_own():
    layer = DilatedReparamConv2d(2, 5, norm="none")
    before = layer.kernel().detach().clone()
    layer.merged().conv.weight.data.zero_()
    layer.as_linear().weight.data.zero_()
    assert torch.equal(layer.kernel(), before)


@pytest.mark.parametrize("width", [3, 7])
def test_block_matches_the_definition(width):
    block = live(LargeKernelBlock(8, width, squeeze=0.5, res_scale=0.5, dtype=FLOAT))
    gamma = nn.init.normal_(cast(Tensor, block.layer_scale))
    nn.init.normal_(block.response.weight)
    x = torch.randn(2, 8, 5, 6, dtype=FLOAT)

    y = block.norm(block.depthwise(x))
    mean = y.mean(dim=(2, 3), keepdim=True)
    y = y * block.squeeze.up(block.squeeze.down(mean).relu()).sigmoid()
    y = nn.functional.gelu(block.expand(y))
    size = torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True)
    gain = block.response.weight[:, None, None] * size / (size.mean(dim=1, keepdim=True) + 1e-6)
    y = y + gain * y + block.response.bias[:, None, None]
    y = block.last_norm(block.project(y)) * gamma[:, None, None]
    assert_close(block(x), x + 0.5 * y)


def test_norms_of_a_block():
    first, second = (LargeKernelBlock(4, 5, norm=name).depthwise for name in ("batch", "layer"))
    assert isinstance(first, DilatedReparamConv2d)
    assert isinstance(second, DilatedReparamConv2d)
    with pytest.raises(ValueError, match="expected norm 'none', got 'batch'"):
        first.as_linear()
    assert second.as_linear().linear
    assert isinstance(LargeKernelBlock(4, 3).depthwise, Conv2d)
    assert LargeKernelBlock(8, 5).squeeze.down.out_channels == 2
    assert LargeKernelBlock(4, 5, norm="none").project.conv.bias is not None
    assert LargeKernelBlock(4, 5).project.conv.bias is None
    assert LargeKernelBlock(4, 5, layer_scale=None).layer_scale is None


def test_blocks_merge_inside():
    block = live(LargeKernelBlock(4, 7, layer_scale=0.5, dtype=FLOAT))
    x = torch.randn(2, 4, 5, 6, dtype=FLOAT)
    one = merge(block)
    assert isinstance(one.depthwise, Conv2d)
    assert_close(one(x), block(x))


def test_wrong_options():
    for width in (3, 8):
        with pytest.raises(ValueError, match=rf"an odd kernel_size >= 5, got {width}; Conv2d"):
            DilatedReparamConv2d(2, width)
    with pytest.raises(ValueError, match="expected a norm of batch and none, got 'layer'"):
        DilatedReparamConv2d(2, 5, norm="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected norm 'none', got 'batch'; use merged"):
        DilatedReparamConv2d(2, 5).kernel()
    with pytest.raises(ValueError, match="expected norm 'none', got 'batch'"):
        DilatedReparamConv2d(2, 5).as_linear()
    with pytest.raises(ValueError, match=r"expected squeeze in \(0, 1\], got 0"):
        LargeKernelBlock(4, 5, squeeze=0)
