r"""Tests for the probnets.layers.convolution module."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from probnets.layers.convolution import Conv2d, chain_fields
from probnets.layers.norms import norm

pytestmark = pytest.mark.usefixtures("one_thread")

# Values


def test_patches_by_hand():
    layer = Conv2d(1, 1, 2, stride=2)
    with torch.no_grad():
        layer.conv.weight.copy_(torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]]))
        layer.get_parameter("conv.bias").fill_(0.5)
    x = torch.arange(1.0, 10).view(1, 1, 3, 3)
    assert layer(x)[0, 0].tolist() == [[5421.5, 603.5], [87.5, 9.5]]


def test_hidden_patches_count_as_zeros():
    layer = Conv2d(1, 1, 3, bias=False)
    with torch.no_grad():
        layer.conv.weight.fill_(1)
    x = torch.tensor([[[[1.0, 2.0, 4.0, 8.0]]]])
    y = layer(x, torch.tensor([[[[True, False, True, True]]]]))
    assert y[0, 0, 0, [0, 2, 3]].tolist() == [1, 12, 12]


# Oracles


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [(1, 1, 1), (3, 1, 1), (3, 2, 1), (5, 3, 2), (3, 3, 2), (7, 1, 3), (1, 2, 1), (3, 4, 1)],
)
def test_odd_kernels_are_centred(kernel, stride, dilation, bias, groups):
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    layer = Conv2d(4, 6, kernel, bias=bias, dtype=torch.float64, **options)
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    padding = dilation * (kernel - 1) // 2
    weight, shift = layer.conv.weight, layer.conv.bias
    assert (shift is not None) == bias
    expected = functional.conv2d(x, weight, shift, padding=padding, **options)
    assert_close(layer(x), expected)


@pytest.mark.parametrize("size", [(8, 12), (9, 7), (1, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_patches_get_zeros_right_and_below(kernel, size):
    layer = Conv2d(3, 5, kernel, stride=kernel, dtype=torch.float64)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    padded = torch.zeros(2, 3, *(-(-n // kernel) * kernel for n in size), dtype=torch.float64)
    padded[:, :, : size[0], : size[1]] = x
    expected = functional.conv2d(padded, layer.conv.weight, layer.conv.bias, stride=kernel)
    assert_close(layer(x), expected)


# Laws


def test_fields_by_hand():
    assert Conv2d(1, 1, 5, dilation=3).receptive_field == 13
    assert Conv2d(1, 1, stride=2).receptive_field == 1
    assert chain_fields([]) == 1
    three = Conv2d(1, 1, 3, stride=2)
    assert chain_fields([three, three, three]) == 15
    assert chain_fields([Conv2d(1, 1, 4, stride=4), Conv2d(1, 1, 7)]) == 28
    assert chain_fields([three, norm("layer", 1), three]) == 7
    assert chain_fields([three, norm("group", 1)]) is None


# Errors


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [(2, 1, 1), (4, 2, 1), (2, 2, 2), (0, 1, 1), (-1, 1, 1), (3, 1, 0)],
)
def test_wrong_kernels(kernel, stride, dilation):
    found = f"kernel_size {kernel}, stride {stride} and dilation {dilation}"
    with pytest.raises(ValueError, match=f"expected an odd kernel_size, or one .* got {found}"):
        Conv2d(3, 4, kernel, stride=stride, dilation=dilation)


def test_wrong_arguments():
    for groups in (2, 3, 0):
        found = f"expected groups that divide 3 and 4 channels, got {groups}"
        with pytest.raises(ValueError, match=found):
            Conv2d(3, 4, 3, groups=groups)
    with pytest.raises(ValueError, match="expected stride >= 1, got 0"):
        Conv2d(3, 4, 3, stride=0)
    with pytest.raises(ValueError, match="expected out_channels >= 1, got 0"):
        Conv2d(3, 0, 3)
