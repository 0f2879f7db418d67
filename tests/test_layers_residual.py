from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from probnets.layers.residual import PreActivationBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def shake(module) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module.eval()


# Values


def test_a_block_by_hand():
    block = PreActivationBlock(1, norm="none", res_scale=0.5)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.first.conv.weight[0, 0, 1] = torch.tensor([0.0, 2.0, 1.0])  # 2 own + 1 right
        block.second.conv.weight[0, 0, 1, 1] = 3
        block.get_parameter("first.conv.bias").fill_(-5)
    x = torch.tensor([[[[-1.0, 2.0, 4.0]]]])
    # relu: 0 2 4; first: 2 8 8, less 5: -3 3 3; relu: 0 3 3; second: 0 9 9; halved.
    assert torch.equal(block(x), torch.tensor([[[[-1.0, 6.5, 8.5]]]]))


# Oracles


@pytest.mark.parametrize(("out", "stride"), [(8, 1), (8, 2), (16, 1), (16, 2)])
def test_block_is_its_formula(out, stride):
    block = shake(PreActivationBlock(8, out, stride=stride, res_scale=0.7, dtype=torch.float64))
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)

    def norm_act(layer, x):
        groups = x.shape[1] // 8
        return functional.group_norm(x, groups, layer.norm.weight, layer.norm.bias).relu()

    a = norm_act(block.first_norm, x)
    y = functional.conv2d(a, block.first.conv.weight, padding=1, stride=stride)
    y = functional.conv2d(norm_act(block.second_norm, y), block.second.conv.weight, padding=1)
    short = x
    if (out, stride) != (8, 1):
        short = torch.einsum(
            "oc, bchw -> bohw", block.shortcut.conv.weight[:, :, 0, 0], a[..., ::stride, ::stride]
        )
    assert_close(block(x), short + 0.7 * y)


# Laws


def test_the_short_cut_is_clean():
    x = torch.randn(2, 4, 5, 5)
    block = PreActivationBlock(4, res_scale=0.0)
    assert block.shortcut is None
    assert torch.equal(block(x), x)

    changed = PreActivationBlock(4, 6, res_scale=0.0, norm="none")
    assert_close(changed(2 * x.abs()), 2 * changed(x.abs()))
    assert torch.equal(changed(-x.abs()), torch.zeros(2, 6, 5, 5))


@pytest.mark.parametrize("norm", ["group", "batch", "layer", "none", "layer_plain"])
def test_biases_stand_only_where_no_norm_shifts(norm):
    block = PreActivationBlock(4, 8, norm=norm)
    biases = {name for name, _ in block.named_parameters() if name.endswith("conv.bias")}
    plain = norm in ("none", "layer_plain")
    assert biases == ({"first.conv.bias", "second.conv.bias"} if plain else set())


def test_fields():
    assert PreActivationBlock(4, norm="none").receptive_field == 5
    assert PreActivationBlock(4, norm="none", stride=2).receptive_field == 7
    assert PreActivationBlock(4).receptive_field is None


def test_a_deep_scaled_chain_keeps_its_scale():
    depth = 50
    x = y = torch.randn(4, 16, 8, 8, dtype=torch.float64)
    for _ in range(depth):
        block = PreActivationBlock(
            16, norm="none", res_scale=(2 * depth) ** -0.5, dtype=torch.float64
        )
        for name, parameter in block.named_parameters():
            std = (2 / block.fan_in(name)) ** 0.5 if parameter.ndim > 1 else 0.0
            torch.nn.init.normal_(parameter, std=std)
        y = block(y)
    # Each block adds at most 1 / (2 depth) of the variance, hence at most a factor exp(1 / 2).
    ratio = (y.square().mean() / x.square().mean()).item()
    assert 1 < ratio < 2


# Parity


@pytest.mark.slow
@pytest.mark.parametrize(("out", "stride"), [(8, 1), (16, 2)])
def test_block_equals_timm(out, stride):
    resnetv2 = pytest.importorskip("timm.models.resnetv2")
    shortcut = {} if stride == 1 else {"proj_layer": resnetv2.DownsampleConv}
    other = resnetv2.PreActBasic(
        *(8, out),
        bottle_ratio=1.0,
        stride=stride,
        conv_layer=lambda *a, **k: torch.nn.Conv2d(*a, padding=a[2] // 2, bias=False, **k),
        norm_layer=resnetv2.BatchNormAct2d,
        **shortcut,
    )
    shake(other)
    block = PreActivationBlock(8, out, stride=stride, norm="batch").eval()
    names = {
        "norm1": "first_norm.norm",
        "conv1": "first.conv",
        "norm2": "second_norm.norm",
        "conv2": "second.conv",
        "downsample.conv": "shortcut.conv",
    }
    state = {}
    for name, value in other.state_dict().items():
        path, _, own = name.rpartition(".")
        state[f"{names[path]}.{own}"] = value
    block.load_state_dict(state)
    x = torch.randn(2, 8, 6, 6)
    assert_close(block(x), other(x), rtol=1e-5, atol=1e-5)
