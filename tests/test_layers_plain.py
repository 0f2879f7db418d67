import math

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from probnets.layers.plain import ConvNormAct, PlainStack

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters_of(layer):
    return {name: tuple(p.shape) for name, p in layer.named_parameters()}


@torch.no_grad()
def fill(layer, **values):
    r"""Sets all parameters whose name ends like this to a value."""
    for end, value in values.items():
        found = [p for name, p in layer.named_parameters() if name.endswith(f"conv.{end}")]
        assert found
        for parameter in found:
            parameter.fill_(value)


def arc_cosine(same_x, same_y, cross):
    r"""Returns the mean of relu(a) relu(b) for centred normal a, b of these moments."""
    scale = (same_x * same_y).sqrt()
    angle = (cross / scale).clamp(-1, 1).acos()
    return scale * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)


# Values


def test_a_layer_by_hand():
    layer = ConvNormAct(1, 1, norm="none", dtype=torch.float64)
    fill(layer, weight=1, bias=-10)
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]], dtype=torch.float64)
    expected = torch.tensor([[[[0.0, 0.0], [11.0, 11.0], [8.0, 8.0]]]], dtype=torch.float64)
    assert torch.equal(layer(x), expected)


def test_maxima_by_hand():
    stack = PlainStack(1, [1], kernel_size=1, reduce=[0], norm="none", activation="none")
    fill(stack, weight=-1, bias=0)
    x = torch.tensor([[[[1.0, 2.0, 7.0], [3.0, 4.0, 8.0], [5.0, 6.0, 9.0]]]])
    assert torch.equal(stack(x), torch.tensor([[[[-1.0, -7.0], [-5.0, -9.0]]]]))


def test_maxima_of_negative_maps_with_a_mask():
    stack = PlainStack(1, [1], kernel_size=1, reduce=[0], norm="none", activation="none")
    fill(stack, weight=1, bias=0)
    x = -torch.arange(1.0, 9.0).view(1, 1, 2, 4)
    visible = torch.tensor([[[[True, False]]]])
    assert stack(x, visible)[0, 0, 0, 0] == -1


# Oracles


def test_stack_is_its_formula():
    stack = PlainStack(3, [4, 6, 5], reduce=[0, 2], activation="silu", dtype=torch.float64)
    for name, buffer in stack.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    stack.eval()
    x = torch.randn(2, 3, 9, 6, dtype=torch.float64)

    y, state = x, stack.state_dict()
    for index, pooled in ((0, True), (2, False), (3, True)):
        y = functional.conv2d(y, state[f"layers.{index}.conv.conv.weight"], padding=1)
        norm = {
            k: state[f"layers.{index}.norm.norm.{k}"]
            for k in ("running_mean", "running_var", "weight", "bias")
        }
        y = functional.silu(functional.batch_norm(y, **norm))
        if pooled:
            height, width = (size + size % 2 for size in y.shape[2:])
            padding = 0, width - y.shape[3], 0, height - y.shape[2]
            y = functional.pad(y, padding, value=-math.inf)
            y = y.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
    assert_close(stack(x), y)


def test_wide_patches_follow_their_kernel():
    width = 2048
    stack = PlainStack(3, [width, width], kernel_size=2, patches=True, norm="none")
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            std = 1 / math.sqrt(stack.fan_in(name)) if parameter.ndim > 1 else 0.0
            parameter.normal_().mul_(std)
        x = torch.randn(3, 3, 4, 4)
        y = stack(x).flatten(1)

    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).movedim(1, 3).flatten(3).flatten(1, 2)
    kernel = torch.einsum("apd, bpd -> abp", patches, patches) / 12
    for _ in range(2):
        own = kernel.diagonal().T  # (B, P)
        kernel = arc_cosine(own[:, None], own[None], kernel)
        kernel = kernel.mean(dim=2, keepdim=True)
    kernel = kernel[..., 0]
    # Means of relu(a) relu(b) over the width have a standard error below sqrt(5 / 4 / width).
    size = kernel.diagonal().sqrt()
    error = (y @ y.T / width - kernel) / (size[:, None] * size)
    assert error.abs().max() < 5 * math.sqrt(6 / width)
    assert kernel.abs().min() > 0.05


# Laws


def test_biases_stand_only_where_no_norm_shifts():
    assert parameters_of(ConvNormAct(2, 4)).keys() == {
        "conv.conv.weight",
        "norm.norm.weight",
        "norm.norm.bias",
    }
    for name in ("none", "layer_plain"):
        assert parameters_of(ConvNormAct(2, 4, norm=name)) == {
            "conv.conv.weight": (4, 2, 3, 3),
            "conv.conv.bias": (4,),
        }


def test_options_reach_the_convolution():
    layer = ConvNormAct(4, 6, 5, stride=2, dilation=3, groups=2)
    conv = layer.conv.conv
    assert conv.weight.shape == (6, 2, 5, 5)
    assert (conv.stride, conv.dilation, layer.stride) == ((2, 2), (3, 3), 2)
    assert layer.eval().receptive_field == 13


@pytest.mark.parametrize(
    ("options", "stride", "field"),
    [
        ({}, 1, 7),
        ({"kernel_size": 5}, 1, 13),
        ({"reduce": [0]}, 2, 12),
        ({"reduce": [2]}, 2, 8),
        ({"reduce": [0, 1, 2]}, 8, 22),
        ({"kernel_size": 2, "patches": True}, 8, 8),
        ({"kernel_size": 3, "patches": True}, 27, 27),
        ({"kernel_size": 1, "patches": True}, 1, 1),
    ],
)
def test_strides_and_fields(options, stride, field):
    stack = PlainStack(2, [3, 4, 5], norm="layer", **options)
    assert (stack.stride, stack.receptive_field) == (stride, field)


def test_zero_last_starts_at_zero_and_learns():
    stack = PlainStack(2, [4, 3], norm="layer", zero_last=True)
    x = torch.randn(2, 2, 5, 5)
    assert torch.equal(stack(x), torch.zeros(2, 3, 5, 5))

    last = stack.layers[1]
    assert parameters_of(last).keys() == {"conv.conv.weight", "conv.conv.bias"}
    (stack(x) * torch.randn(2, 3, 5, 5)).sum().backward()
    assert all(p.grad is not None and p.grad.all() for p in last.parameters())
    fill(last, bias=-2)
    assert (stack(x) == -2).all()


# Errors


def test_wrong_arguments():
    with pytest.raises(ValueError, match="expected the width of one layer or more, got none"):
        PlainStack(3, [])
    for reduce in ([2], [-1], [0, 0]):
        with pytest.raises(ValueError, match=r"expected reduce to name layers 0 to 1, each once"):
            PlainStack(3, [4, 4], reduce=reduce)
    with pytest.raises(ValueError, match=r"expected no reduce with patches, got \[0\]"):
        PlainStack(3, [4, 4], reduce=[0], patches=True)
    with pytest.raises(ValueError, match="expected an odd kernel_size"):
        PlainStack(3, [4, 4], kernel_size=2)
    with pytest.raises(ValueError, match="expected out_channels >= 1, got 0"):
        PlainStack(3, [0, 4])


def test_masks_have_to_fit_the_smallest_map():
    stack = PlainStack(3, [4, 4], reduce=[0, 1])
    with pytest.raises(ValueError, match="expected maps with H divisible by 16"):
        stack(torch.randn(1, 3, 8, 8), torch.ones(1, 1, 4, 4, dtype=torch.bool))
