r"""Tests for the probnets.layers.visible module."""

import pytest
import torch
from torch.testing import assert_close

from probnets import layers
from probnets.layers.visible import check_visible, expand, gather, hide, masked_mean, scatter

pytestmark = pytest.mark.usefixtures("one_thread")

# Two samples of 2 x 4 pixels in 1 x 2 patches of 2 x 2; the first shows its right patch.
X = torch.arange(16.0).view(2, 1, 2, 4)
MASK = torch.tensor([[[[False, True]]], [[[True, False]]]])


def masks(batch, h, w, count):
    order = torch.rand(batch, h * w).argsort(dim=1)
    return (order < count).view(batch, 1, h, w)


# Values


def test_values_by_hand():
    assert expand(MASK, X)[0, 0].tolist() == [[0, 0, 1, 1]] * 2
    assert hide(X, MASK)[0, 0].tolist() == [[0, 0, 2, 3], [0, 0, 6, 7]]
    assert gather(X, MASK)[..., 0].tolist() == [[2, 3, 6, 7], [8, 9, 12, 13]]
    assert masked_mean(X, MASK).flatten().tolist() == [4.5, 10.5]
    tokens = torch.tensor([[[1.0], [2.0], [3.0], [4.0]], [[5.0], [6.0], [7.0], [8.0]]])
    maps = scatter(tokens, MASK, (2, 4))
    assert maps[0, 0].tolist() == [[0, 0, 1, 2], [0, 0, 3, 4]]
    assert maps[1, 0].tolist() == [[5, 6, 0, 0], [7, 8, 0, 0]]


def test_patches_of_unequal_sides():
    mask = torch.tensor([[[[True], [False], [True]]]])
    large = expand(mask, torch.zeros(1, 5, 6, 2, dtype=torch.float64))
    assert large.dtype == torch.float64
    assert large[0, 0].tolist() == [[1, 1]] * 2 + [[0, 0]] * 2 + [[1, 1]] * 2


def test_without_a_mask():
    x = torch.randn(2, 3, 4, 5)
    assert hide(x, None) is x
    assert_close(masked_mean(x, None)[:, :, 0, 0], x.mean(dim=(2, 3)))
    tokens = gather(x, None)
    assert tokens.shape == (2, 20, 3)
    assert torch.equal(tokens[:, 7], x[:, :, 1, 2])
    assert torch.equal(scatter(tokens, None, (4, 5)), x)


# Laws


@pytest.mark.parametrize("count", [1, 3, 6])
def test_scatter_undoes_gather(count):
    x, mask = torch.randn(4, 3, 6, 4), masks(4, 3, 2, count)
    tokens = gather(x, mask)
    assert tokens.shape == (4, 4 * count, 3)
    maps = scatter(tokens, mask, (6, 4))
    assert torch.equal(maps, hide(x, mask))
    assert torch.equal(gather(maps, mask), tokens)
    assert_close(masked_mean(x, mask)[:, :, 0, 0], tokens.mean(dim=1))


def test_gradients_go_to_visible_pixels_alone():
    x, mask = torch.randn(2, 3, 6, 4, requires_grad=True), masks(2, 3, 2, 2)
    (slope,) = torch.autograd.grad(scatter(2 * gather(x, mask), mask, (6, 4)).sum(), x)
    assert torch.equal(slope, 2 * expand(mask, x).expand_as(x))


# Edges


def test_nothing_is_visible():
    x, mask = torch.randn(2, 3, 6, 4), torch.zeros(2, 1, 3, 2, dtype=torch.bool)
    tokens = gather(x, mask)
    assert tokens.shape == (2, 0, 3)
    assert torch.equal(scatter(tokens, mask, (6, 4)), torch.zeros_like(x))


def test_no_samples():
    x, mask = torch.randn(0, 3, 6, 4), torch.zeros(0, 1, 3, 2, dtype=torch.bool)
    assert gather(x, mask).shape[::2] == (0, 3)
    assert scatter(gather(x, mask), mask, (6, 4)).shape == x.shape


# Errors


def test_samples_that_show_different_numbers():
    mask = torch.tensor([[[[True, True]]], [[[True, False]]]])
    with pytest.raises(ValueError, match=r"as many visible patches in each sample, got \[2, 1\]"):
        gather(X, mask)


def test_masks_that_do_not_fit():
    x = torch.zeros(2, 3, 8, 12)
    good = torch.ones(2, 1, 4, 3, dtype=torch.bool)
    check_visible(good, x)
    check_visible(good, x, stride=2)
    with pytest.raises(ValueError, match="H divisible by 16, for 4 patches and stride 4, got 8"):
        check_visible(good, x, stride=4)
    with pytest.raises(ValueError, match="W divisible by 5, for 5 patches and stride 1, got 12"):
        check_visible(torch.ones(2, 1, 4, 5, dtype=torch.bool), x)
    with pytest.raises(ValueError, match="H divisible by 0, for 0 patches"):
        check_visible(good[:, :, :0], x)
    with pytest.raises(ValueError, match=r"boolean mask with shape \(2, 1, h, w\), got torch.uin"):
        check_visible(good.to(torch.uint8), x)


@pytest.mark.parametrize("name", ["group", "response"])
def test_large_maps_of_short_floats(name):
    x = torch.full((1, 8, 300, 300), 5.0, dtype=torch.float16)
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    layer = layers.norm(name, 8, dtype=torch.float16)
    assert layer(x, visible).isfinite().all()
    assert torch.equal(masked_mean(x, visible), x[:, :, :1, :1])
