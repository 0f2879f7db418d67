r"""Tests of attention made of convolutions."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from probnets.layers.convolution import Conv2d
from probnets.layers.ffnattention import FFNAttentionBlock
from probnets.layers.largekernel import DilatedReparamConv2d
from probnets.layers.merging import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def randomised(layer):
    layer = layer.double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        for name, buffer in layer.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return layer


def test_by_hand():
    layer = DilatedReparamConv2d(1, 5, small=[(3, 1)], norm="none").double()
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), (1.0, 10.0), strict=True):
            parameter.fill_(value)
    x = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    x[..., 2] = 1.0
    expected = torch.tensor([[[[1.0, 11.0, 11.0, 11.0, 1.0, 0.0]]]], dtype=torch.float64)
    assert_close(layer(x), expected)
    assert_close(layer.merged()(x), expected)


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("inner", [1, 3, 7])
def test_merged_kernel_computes_the_same(norm, inner):
    layer = randomised(DilatedReparamConv2d(4, 7, small=[(inner, 1)], norm=norm))
    one = layer.merged()

    assert isinstance(one, Conv2d)
    assert one.conv.weight.shape == (4, 1, 7, 7)
    assert (one.conv.bias is None) == (norm == "none")
    for size in ((9, 8), (1, 1)):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        assert_close(one(x), layer(x))


@pytest.mark.parametrize("squeeze", [0.0, 0.5])
def test_block_is_two_scaled_branches(squeeze):
    block = randomised(FFNAttentionBlock(4, kernel_size=5, squeeze=squeeze, res_scale=0.5))
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)

    y = block.keys(block.norm1(block.query(x)))
    y = block.values(functional.gelu(y))
    assert (block.squeeze is None) == (squeeze == 0)
    if block.squeeze is not None:
        y = block.squeeze(y)
    middle = x + 0.5 * y
    y = block.expand(block.norm2(block.depthwise(middle)))
    assert y.shape[1] == 12
    assert_close(block(x), middle + 0.5 * block.project(functional.gelu(y)))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_merged_block_computes_the_same(norm):
    block = randomised(FFNAttentionBlock(4, norm=norm, squeeze=0.5))
    one = merge(block)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)

    assert_close(one(x), block(x))
    assert not any(isinstance(m, DilatedReparamConv2d) for m in one.modules())
    visible = torch.tensor([[[[1, 0], [1, 1], [0, 0]]]]).bool().expand(2, -1, -1, -1)
    shown = visible.repeat_interleave(2, dim=2).repeat_interleave(3, dim=3)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_close(one(x, visible) * shown, block(x, visible) * shown)


def test_receptive_fields():
    assert FFNAttentionBlock(2, norm="layer").receptive_field == 19
    assert FFNAttentionBlock(2, norm="layer", squeeze=1.0).receptive_field is None


@pytest.mark.parametrize(("small", "width"), [((5, 1), 3), ((3, 2), 3), ((3, 4), 7)])
def test_wrong_kernels(small, width):
    with pytest.raises(ValueError, match=f"small kernels no wider than {width} pixels, got"):
        DilatedReparamConv2d(4, width, small=[small])


def test_wrong_expansion():
    with pytest.raises(ValueError, match="expected a hidden layer of one or more"):
        FFNAttentionBlock(4, expansion=0.0)
