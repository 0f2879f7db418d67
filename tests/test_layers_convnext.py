from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from probnets.layers.convnext import ConvNeXtBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def shake(module) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def load(block, other, names):
    r"""Copies the weights of another block, given the names of its modules and ours."""
    state = {}
    for name, value in other.state_dict().items():
        ours = next(names[n] + name.removeprefix(n) for n in names if name.startswith(n))
        state[ours] = value.view_as(block.state_dict()[ours])
    block.load_state_dict(state)
    return block.eval()


# Values


def test_a_block_by_hand():
    block = ConvNeXtBlock(1, kernel_size=3, expansion=1, norm="none", layer_scale=0.5, res_scale=2)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name != "layer_scale":
                parameter.fill_(1)
    x = torch.tensor([[[[1.0, 2.0], [3.0, -6.0]]]])
    # The window sums to 0 everywhere, plus 1, plus 1: GELU(2), plus 1, times 0.5, times 2.
    gelu = 2 * 0.977249868
    assert_close(block(x), x + gelu + 1)


# Oracles


@pytest.mark.parametrize("response", [False, True])
def test_block_is_its_formula(response):
    block = shake(
        ConvNeXtBlock(
            4, kernel_size=5, expansion=3, response=response, res_scale=0.7, dtype=torch.float64
        )
    )
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)

    conv = block.depthwise.conv
    y = functional.conv2d(x, conv.weight, conv.bias, padding=2, groups=4)
    y = y.movedim(1, -1)  # (B, H, W, C)
    y = functional.layer_norm(y, (4,), block.norm.norm.weight, block.norm.norm.bias, eps=1e-6)
    y = y @ block.expand.conv.weight[:, :, 0, 0].T + block.expand.conv.bias
    y = functional.gelu(y)
    if response:
        size = y.norm(dim=(1, 2), keepdim=True)
        ratio = size / (size.mean(dim=-1, keepdim=True) + 1e-6)
        y = y + block.response.weight * (y * ratio) + block.response.bias
    y = y @ block.project.conv.weight[:, :, 0, 0].T + block.project.conv.bias
    assert_close(block(x), x + 0.7 * (block.layer_scale * y).movedim(-1, 1))


# Laws


def test_layer_scale_starts_as_given():
    assert torch.equal(ConvNeXtBlock(3).get_parameter("layer_scale"), torch.full((3,), 1e-6))
    one = ConvNeXtBlock(3, layer_scale=1)
    assert torch.equal(one.get_parameter("layer_scale"), torch.ones(3))
    block = ConvNeXtBlock(3, layer_scale=None)
    assert block.layer_scale is None
    assert "layer_scale" not in block.state_dict()

    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(ConvNeXtBlock(3, layer_scale=0.0)(x), x)
    assert torch.equal(ConvNeXtBlock(3, layer_scale=None, res_scale=0.0)(x), x)


def test_fields_and_fans():
    block = ConvNeXtBlock(4, kernel_size=5)
    assert block.receptive_field == 5
    assert ConvNeXtBlock(4, response=True).receptive_field is None
    assert ConvNeXtBlock(4, norm="group").receptive_field is None
    names = ("depthwise.conv.weight", "expand.conv.weight", "project.conv.weight", "layer_scale")
    assert [block.fan_in(name) for name in names] == [25, 4, 16, 1]


# Errors


def test_wrong_arguments():
    with pytest.raises(ValueError, match="expected a hidden layer of one or more"):
        ConvNeXtBlock(4, expansion=0)
    with pytest.raises(ValueError, match="expected an odd kernel_size"):
        ConvNeXtBlock(4, kernel_size=4)


# Parity


@pytest.mark.slow
@pytest.mark.parametrize("response", [False, True])
def test_block_equals_timm(response):
    convnext = pytest.importorskip("timm.models.convnext")
    other = shake(
        convnext.ConvNeXtBlock(8, use_grn=response, ls_init_value=None if response else 0.5)
    )
    names = {
        "conv_dw": "depthwise.conv",
        "norm": "norm.norm",
        "mlp.fc1": "expand.conv",
        "mlp.fc2": "project.conv",
        "mlp.grn": "response",
        "gamma": "layer_scale",
    }
    block = ConvNeXtBlock(8, response=response, layer_scale=None if response else 0.5)
    load(block, other, names)
    x = torch.randn(2, 8, 9, 6)
    assert_close(block(x), other(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_block_equals_torchvision():
    convnext = pytest.importorskip("torchvision.models.convnext")
    other = shake(convnext.CNBlock(8, layer_scale=0.5, stochastic_depth_prob=0.0))
    names = {
        "block.0": "depthwise.conv",
        "block.2": "norm.norm",
        "block.3": "expand.conv",
        "block.5": "project.conv",
        "layer_scale": "layer_scale",
    }
    block = load(ConvNeXtBlock(8), other, names)
    x = torch.randn(2, 8, 9, 6)
    assert_close(block(x), other(x), rtol=1e-5, atol=1e-5)
