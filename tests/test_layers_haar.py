r"""Tests for the probnets.layers.haar module."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from probnets.layers.haar import Haar, Subbands, integer_haar, integer_haar_inverse

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT = torch.float64


def haar_matrix(size):
    r"""Returns the means and then the differences of neighbours, orthonormal."""
    rows = torch.zeros(size, size, dtype=FLOAT)
    for i in range(size // 2):
        rows[i, 2 * i : 2 * i + 2] = 0.5**0.5
        rows[size // 2 + i, 2 * i] = 0.5**0.5
        rows[size // 2 + i, 2 * i + 1] = -(0.5**0.5)
    return rows


def tile(y, channels):
    r"""Lays the four sub-bands of each channel out as quarters of one map."""
    low, right, down, both = y.split(channels, dim=1)
    return torch.cat([torch.cat([low, right], -1), torch.cat([down, both], -1)], -2)


def test_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 8.0]]]])
    assert_close(Haar(1)(x).flatten(), torch.tensor([7.0, -3.0, -4.0, 2.0]))


def test_matches_the_dense_matrix():
    x = torch.randn(2, 3, 6, 4, dtype=FLOAT)
    expected = haar_matrix(6) @ x @ haar_matrix(4).T
    assert_close(tile(Haar(3)(x), 3), expected)


def test_levels_transform_all_bands_again():
    x = torch.randn(2, 3, 8, 12, dtype=FLOAT)
    assert_close(Haar(3, levels=2)(x), Haar(12)(Haar(3)(x)))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_is_orthonormal(levels):
    haar = Haar(2, levels=levels)
    x = torch.randn(2, 2, 16, 8, dtype=FLOAT)
    y = haar(x)
    assert_close(haar.inverse(y), x)
    assert_close(haar(haar.inverse(y)), y)
    assert_close(y.square().sum(), x.square().sum())
    matrix = haar.dense((8, 8))
    assert_close(matrix.T @ matrix, torch.eye(128))


@pytest.mark.parametrize("levels", [1, 2])
def test_is_a_convolution(levels):
    haar = Haar(3, levels=levels)
    conv = haar.as_conv(dtype=FLOAT)
    x = torch.randn(2, 3, 8, 4, dtype=FLOAT)
    assert_close(conv(x), haar(x))
    assert not conv.weight.requires_grad
    # On its own it couples nothing: its Gram has no entries outside of the diagonal.
    assert conv.hollow_gram(x, 3).abs().max() < 1e-12


def test_wrong_sizes():
    haar = Haar(1, levels=2)
    with pytest.raises(ValueError, match="divisible by 4, got 8 x 6; crop or pad them"):
        haar(torch.zeros(1, 1, 8, 6))
    with pytest.raises(ValueError, match="expected levels >= 1, got 0"):
        Haar(1, levels=0)


# Integers


def test_integers_by_hand():
    bands = integer_haar(torch.tensor([[5, 2, 7], [1, 1, 1], [4, 9, 0]]))
    assert_close(bands.low, torch.tensor([[2, 4], [6, 0]]))
    assert_close(bands.horizontal, torch.tensor([[1], [-5]]))
    assert_close(bands.vertical, torch.tensor([[2, 6]]))
    assert_close(bands.diagonal, torch.tensor([[3]]))


def test_integers_are_near_the_orthonormal_transform():
    x = torch.randint(-1000, 1000, (2, 3, 8, 6))
    scale = torch.tensor([2.0, 1.0, 1.0, 0.5], dtype=FLOAT)
    bands = torch.stack(integer_haar(x)) * scale[:, None, None, None, None]
    exact = torch.stack(Haar(3)(x.to(FLOAT)).chunk(4, dim=1))
    assert (bands - exact).abs().max() <= 2


DTYPES = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32]


@given(st.sampled_from([*DTYPES, torch.int64]), st.integers(1, 9), st.integers(1, 9), st.data())
def test_round_trip_is_exact(dtype, height, width, data):
    range_ = torch.iinfo(dtype)
    edges = st.sampled_from([range_.min, range_.max, 0])
    numbers = st.one_of(edges, st.integers(range_.min, range_.max))
    count = height * width
    values = data.draw(st.lists(numbers, min_size=count, max_size=count))
    x = torch.tensor(values, dtype=torch.int64).to(dtype).view(height, width)

    y = integer_haar_inverse(integer_haar(x))
    assert y.dtype == (torch.int64 if dtype in (torch.uint32, torch.int64) else torch.int32)
    assert torch.equal(y.to(torch.int64), x.to(torch.int64))


def test_sizes_are_halves():
    for H, W in itertools.product(range(1, 5), repeat=2):
        bands = integer_haar(torch.zeros(2, H, W, dtype=torch.uint8))
        up, down = ((H + 1) // 2, (W + 1) // 2), (H // 2, W // 2)
        assert bands.low.shape == (2, *up)
        assert bands.horizontal.shape == (2, up[0], down[1])
        assert bands.vertical.shape == (2, down[0], up[1])
        assert bands.diagonal.shape == (2, *down)


def test_differences_of_many_bits_are_true():
    top = 2**29
    x = torch.tensor([[top - 1, -top], [-top, top - 1]], dtype=torch.int32)
    assert integer_haar(x).diagonal.item() == 4 * top - 2
    narrow = torch.tensor([[2**16 - 1, 0], [0, 2**16 - 1]]).to(torch.uint16)
    assert integer_haar(narrow).diagonal.item() == 2**17 - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_only_integers(dtype):
    x = torch.zeros(2, 2, dtype=dtype)
    with pytest.raises(TypeError, match=rf"expected x of an integer dtype .* got {dtype}"):
        integer_haar(x)
    with pytest.raises(TypeError, match="expected x of an integer dtype"):
        integer_haar_inverse(Subbands(x, x, x, x))


def test_wrong_bands():
    a = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected four sub-bands of sizes"):
        integer_haar_inverse(Subbands(a, a, a, a[:1]))
    with pytest.raises(ValueError, match="expected four sub-bands of sizes"):
        integer_haar_inverse(Subbands(a[:1], a[:1], torch.cat([a, a]), torch.cat([a, a])))
    with pytest.raises(ValueError, match=r"expected x with shape \(\*, H, W\), got \(2,\)"):
        integer_haar(a[0])
