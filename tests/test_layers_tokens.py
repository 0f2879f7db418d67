r"""Tests for the probnets.layers.tokens module."""

import pytest
import torch
from torch.testing import assert_close

from probnets.layers.layer import TokenLayer
from probnets.layers.tokens import OnMaps, sincos_positions

pytestmark = pytest.mark.usefixtures("one_thread")

LIKE = torch.zeros((), dtype=torch.float64)


class Sums(TokenLayer):
    r"""Adds to each token the sum of all, and keeps how many tokens there were."""

    def __init__(self, features):
        super().__init__(features)
        self.counts = []

    def transform(self, x):
        self.counts.append(x.shape[1])
        return x + x.sum(dim=1, keepdim=True)


# Values


def test_pixels_are_tokens():
    layer = Sums(2)
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    assert_close(OnMaps(layer)(x), x + x.sum(dim=(2, 3), keepdim=True))
    assert layer.counts == [20]


def test_hidden_pixels_are_no_tokens():
    layer = Sums(1)
    x = torch.arange(8.0).view(1, 1, 2, 4)
    y = OnMaps(layer)(x, torch.tensor([[[[False, True]]]]))
    assert layer.counts == [4]
    assert y[0, 0].tolist() == [[0, 0, 2 + 18, 3 + 18], [0, 0, 6 + 18, 7 + 18]]


def test_positions_by_hand():
    positions = sincos_positions(3, 4, LIKE, channels=8)[0]
    i, j = torch.tensor(2.0).double(), torch.tensor(3.0).double()
    expected = [f(n * wave) for n in (i, j) for f in (torch.sin, torch.cos) for wave in (1, 0.01)]
    assert_close(positions[:, 2, 3], torch.stack(expected))


# Laws


@pytest.mark.parametrize("channels", [4, 12, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_places_are_told_apart(channels, dtype):
    positions = sincos_positions(17, 23, LIKE.to(dtype), channels=channels)
    assert positions.shape == (1, channels, 17, 23)
    assert positions.dtype == dtype
    rows = positions.flatten(2)[0].T
    distances = torch.cdist(rows, rows) + torch.eye(len(rows), dtype=dtype)
    assert distances.min() > 1e-2


def test_sizes_agree_where_they_overlap():
    large = sincos_positions(9, 11, LIKE, channels=16)
    small = sincos_positions(5, 1, LIKE, channels=16)
    assert torch.equal(large[:, :, :5, :1], small)
    assert_close(
        sincos_positions(4, 4, LIKE, channels=8).square().sum(dim=1),
        4 * torch.ones(1, 4, 4).double(),
    )


def test_rows_and_columns_are_alike():
    positions = sincos_positions(6, 6, LIKE, channels=12)
    rows, columns = positions.chunk(2, dim=1)
    assert torch.equal(rows, columns.mT)


# Errors


@pytest.mark.parametrize("channels", [1, 6, 10])
def test_channels_that_have_no_quarters(channels):
    with pytest.raises(ValueError, match=f"channels divisible by 4 for positions, got {channels}"):
        sincos_positions(2, 2, LIKE, channels=channels)


def test_samples_that_show_different_numbers():
    mask = torch.tensor([[[[True, True]]], [[[True, False]]]])
    with pytest.raises(ValueError, match=r"as many visible patches in each sample, got \[2, 1\]"):
        OnMaps(Sums(3))(torch.randn(2, 3, 2, 4), mask)
