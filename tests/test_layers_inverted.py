import math
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from probnets.layers.inverted import FusedInvertedResidual, InvertedResidual, SqueezeExcite

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = [InvertedResidual, FusedInvertedResidual]


def shake(module) -> Any:
    r"""Moves all weights and running statistics away from their start, in evaluation mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module.eval()


def norm_of(layer, x):
    norm = layer.norm.norm
    return functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def copy_in_order(source, target):
    r"""Copies a state dict entry by entry, where both sides list the same shapes in order."""
    pairs = zip(target.state_dict().values(), source.state_dict().values(), strict=True)
    for to, value in pairs:
        assert to.shape == value.shape
        to.copy_(value)
    return target.eval()


# Values


def test_gate_by_hand():
    layer = SqueezeExcite(2, reduced=1)
    with torch.no_grad():
        layer.down.conv.weight.copy_(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1))
        layer.get_parameter("down.conv.bias").fill_(-4)
        layer.up.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        layer.get_parameter("up.conv.bias").copy_(torch.tensor([0.0, 1.0]))
    x = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]])  # means 2 and 1: both sums are zero
    gates = torch.tensor([0.5, 1 / (1 + math.exp(-1))]).view(1, 2, 1, 1)
    assert_close(layer(x), x * gates)

    visible = torch.tensor([[[[False, True]]]])  # means 3 and 0: still nothing after the relu
    with torch.no_grad():
        layer.get_parameter("down.conv.bias").fill_(-1)  # now 2, hence gates of 2 and -1
    gates = torch.tensor([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]).view(1, 2, 1, 1)
    assert_close(layer(x, visible), x * gates)


def test_hard_gate_by_hand():
    layer = SqueezeExcite(1, reduced=1, gate="hardsigmoid")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1)
    # The mean 0 gives 1 after the first convolution, and 2 after the second.
    assert_close(layer(torch.tensor([[[[-1.0, 1.0]]]])), torch.tensor([[[[-5 / 6, 5 / 6]]]]))


# Oracles


@pytest.mark.parametrize("stride", [1, 2])
def test_block_is_its_formula(stride):
    block = shake(
        InvertedResidual(
            3, 3, kernel_size=5, stride=stride, expansion=2, res_scale=0.7, dtype=torch.float64
        )
    )
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)

    y = functional.conv2d(x, block.expand.conv.conv.weight)
    y = norm_of(block.expand, y).clamp(0, 6)
    weight = block.depthwise.conv.conv.weight
    y = functional.conv2d(y, weight, padding=2, stride=stride, groups=6)
    y = norm_of(block.depthwise, y).clamp(0, 6)
    y = norm_of(block.project, functional.conv2d(y, block.project.conv.conv.weight))
    assert_close(block(x), x + 0.7 * y if stride == 1 else y)


@pytest.mark.parametrize("stride", [1, 2])
def test_fused_block_is_its_formula(stride):
    block = shake(
        FusedInvertedResidual(
            3, 3, stride=stride, expansion=2, squeeze=0.5, res_scale=0.7, dtype=torch.float64
        )
    )
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)

    y = functional.conv2d(x, block.expand.conv.conv.weight, padding=1, stride=stride)
    y = functional.gelu(norm_of(block.expand, y))
    down, up = block.squeeze.down.conv, block.squeeze.up.conv
    means = functional.gelu(y.mean(dim=(2, 3)) @ down.weight[:, :, 0, 0].T + down.bias)
    y = y * torch.sigmoid(means @ up.weight[:, :, 0, 0].T + up.bias)[:, :, None, None]
    y = norm_of(block.project, functional.conv2d(y, block.project.conv.conv.weight))
    assert_close(block(x), x + 0.7 * y if stride == 1 else y)


# Laws


@pytest.mark.parametrize("build", BLOCKS)
def test_short_cuts_need_equal_shapes(build):
    x = torch.randn(1, 4, 6, 6)
    for out, stride, short in ((4, 1, True), (None, 1, True), (6, 1, False), (4, 2, False)):
        block = build(4, out, stride=stride, res_scale=0.0).eval()
        assert block.residual == short
        assert torch.equal(block(x), x) == short


def test_no_expansion_has_no_expanding_convolution():
    shapes = [p.shape for p in InvertedResidual(4, expansion=1).parameters() if p.ndim == 4]
    assert shapes == [(4, 1, 3, 3), (4, 4, 1, 1)]
    fused = FusedInvertedResidual(4, expansion=1)
    shapes = [p.shape for p in fused.parameters() if p.ndim == 4]
    assert shapes == [(4, 4, 3, 3), (4, 4, 1, 1)]


@pytest.mark.parametrize("build", BLOCKS)
@pytest.mark.parametrize(("share", "reduced"), [(0.25, 4), (0.01, 1), (1.0, 16), (0.1, 2)])
def test_squeeze_is_a_share_of_inner_channels(build, share, reduced):
    block = build(4, expansion=4, squeeze=share, activation="silu")
    assert block.squeeze.down.out_channels == reduced
    assert isinstance(block.squeeze.activation, torch.nn.SiLU)
    assert build(4).squeeze is None


@pytest.mark.parametrize("build", BLOCKS)
def test_biases_stand_only_where_no_norm_shifts(build):
    biases = {name for name, _ in build(4).named_parameters() if name.endswith("conv.bias")}
    assert biases == set()
    block = build(4, norm="none")
    weights = [name for name, _ in block.named_parameters() if name.endswith("conv.weight")]
    assert len(weights) * 2 == sum(1 for _ in block.parameters())


def test_projection_is_not_activated():
    block = InvertedResidual(4, 6)
    assert (block(torch.randn(2, 4, 5, 5)) < 0).any()
    assert isinstance(block.project.activation, torch.nn.Identity)


# Errors


def test_wrong_arguments():
    with pytest.raises(ValueError, match="expected reduced >= 1, got 0"):
        SqueezeExcite(4, reduced=0)
    with pytest.raises(ValueError, match="expected a gate of sigmoid and hardsigmoid, got 'tanh'"):
        SqueezeExcite(4, reduced=2, gate="tanh")  # type: ignore[arg-type]
    for build in BLOCKS:
        with pytest.raises(ValueError, match="expected a hidden layer of one or more"):
            build(4, expansion=0)
        for share in (-0.1, 1.5):
            with pytest.raises(ValueError, match=r"expected squeeze in \[0, 1\], got"):
                build(4, squeeze=share)


# Parity


@pytest.mark.slow
def test_gate_equals_torchvision():
    torchvision = pytest.importorskip("torchvision")
    other = shake(torchvision.ops.SqueezeExcitation(8, 3))
    layer = copy_in_order(other, SqueezeExcite(8, reduced=3))
    x = torch.randn(2, 8, 5, 6)
    assert_close(layer(x), other(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("out", "stride", "expansion"), [(8, 1, 6), (8, 2, 6), (12, 1, 1)])
def test_block_equals_mobilenet(out, stride, expansion):
    mobilenet = pytest.importorskip("torchvision.models.mobilenetv2")
    other = shake(mobilenet.InvertedResidual(8, out, stride, expansion))
    block = InvertedResidual(8, out, stride=stride, expansion=expansion)
    copy_in_order(other, block)
    x = torch.randn(2, 8, 9, 6)
    assert_close(block(x), other(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
def test_block_with_gate_equals_efficientnet(stride):
    efficientnet = pytest.importorskip("torchvision.models.efficientnet")
    config = efficientnet.MBConvConfig(6, 5, stride, 8, 8, 1)
    norm = torch.nn.BatchNorm2d
    other = shake(efficientnet.MBConv(config, 0.0, norm))
    # There two of 8 input channels, here as many of 48 inner ones.
    block = InvertedResidual(8, kernel_size=5, stride=stride, squeeze=2 / 48, activation="silu")
    copy_in_order(other, block)
    x = torch.randn(2, 8, 9, 6)
    assert_close(block(x), other(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("out", "stride"), [(8, 1), (8, 2), (12, 1)])
def test_fused_block_equals_efficientnet(out, stride):
    efficientnet = pytest.importorskip("torchvision.models.efficientnet")
    config = efficientnet.FusedMBConvConfig(4, 3, stride, 8, out, 1)
    other = shake(efficientnet.FusedMBConv(config, 0.0, torch.nn.BatchNorm2d))
    block = FusedInvertedResidual(8, out, stride=stride, activation="silu")
    copy_in_order(other, block)
    x = torch.randn(2, 8, 9, 6)
    assert_close(block(x), other(x), rtol=1e-5, atol=1e-5)
