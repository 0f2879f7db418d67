r"""Tests for the probnets.backend.rows module."""

import math

import numba
import numpy as np
import pytest

from probnets.backend.rows import (
    fill,
    floor,
    larger,
    load,
    multiply_add,
    peek,
    smaller,
    store,
    width,
)

TYPES = (np.float32, np.float64)
EXTREMES = (0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 1e30, -1e30, np.inf, -np.inf)

# Their square is 1 + 2^-11 + 2^-24 or 1 + 2^-26 + 2^-54. Rounding takes the last term, unless
# the product is added to something first.
NEAR_ONE = {np.float32: 1 + 2.0**-12, np.float64: 1 + 2.0**-27}


@numba.njit
def unary(a, out):
    store(out, 0, floor(load(a, 0, 8)))


@numba.njit
def binary(a, b, out):
    x, y = load(a, 0, 8), load(b, 0, 8)
    store(out, 0, larger(x, y))
    store(out, 8, smaller(x, y))
    store(out, 16, x + y)
    store(out, 24, x - y)
    store(out, 32, x * y)
    store(out, 40, x / y)


@numba.njit
def sums(a, b, c, d, out):
    x, y, z, v = load(a, 0, 8), load(b, 0, 8), load(c, 0, 8), load(d, 0, 8)
    store(out, 0, x * y + z)
    store(out, 8, z + x * y)
    store(out, 16, x * y - z)
    store(out, 24, z - x * y)
    store(out, 32, x * y + z * v)
    store(out, 40, multiply_add(x, y, z))


@numba.njit
def chain(a, b, out):
    r"""Adds products in a loop, where a compiler likes to fuse them."""
    total = fill(peek(out, 0), 8)
    for k in range(0, a.size, 8):
        total = total + fill(peek(a, k), 8) * load(b, k, 8)
    store(out, 0, total)


def pairs(dtype):
    r"""Returns numbers that differ in size, all extremes with each other, and random ones."""
    random = np.random.default_rng(0)
    x = np.concatenate([np.repeat(EXTREMES, len(EXTREMES)), random.normal(size=4), [3, 2**30 - 1]])
    y = np.concatenate([np.tile(EXTREMES, len(EXTREMES)), random.normal(size=4), [7, 1 / 3]])
    x, y = (np.resize(part, 112).astype(dtype) for part in (x, y))
    return zip(x.reshape(-1, 8), y.reshape(-1, 8), strict=True)


@pytest.mark.parametrize("dtype", TYPES)
def test_operations_round_each_result(dtype):
    out = np.empty((6, 8), dtype)
    for x, y in pairs(dtype):
        binary(x, y, out.ravel())
        with np.errstate(all="ignore"):
            expected = np.maximum(x, y), np.minimum(x, y), x + y, x - y, x * y, x / y
        for found, row in zip(out, expected, strict=True):
            np.testing.assert_array_equal(found, row)  # zeros are equal, whatever their signs


@pytest.mark.parametrize("dtype", TYPES)
def test_floor(dtype):
    below = np.nextafter(dtype(3), dtype(0))
    large = dtype(2) ** (np.finfo(dtype).nmant - 1) + dtype(0.5)
    x = np.array([0.0, -0.0, 0.5, -0.5, -1e-30, 3.0, below, -large], dtype)
    out = np.empty(8, dtype)

    unary(x, out)
    assert out.tolist() == [0.0, 0.0, 0.0, -1.0, -1.0, 3.0, 2.0, float(-large) - 0.5]
    assert math.copysign(1, out[1]) == -1


@pytest.mark.parametrize("dtype", TYPES)
def test_operators_never_fuse(dtype):
    near = dtype(NEAR_ONE[dtype])
    square = near * near
    assert float(square) == 2 * float(near) - 1  # the last term is gone

    out = np.empty((6, 8), dtype)
    x = np.full(8, near)
    sums(x, x, -np.full(8, square), np.ones(8, dtype), out.ravel())
    assert (out[:2] == 0).all()
    assert (out[2] == 2 * square).all()
    assert (out[3] == -2 * square).all()
    assert (out[4] == 0).all()

    lost = (float(near) - 1) ** 2  # what one rounding would have kept
    assert np.isin(out[5], [0, lost]).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_loops_never_fuse(dtype):
    a, b = np.random.default_rng(1).normal(size=(2, 800)).astype(dtype)
    out = np.ones(8, dtype)
    total = out.copy()
    for k in range(0, 800, 8):
        total = total + a[k] * b[k : k + 8]  # two loops of numpy, each rounded

    chain(a, b, out)
    np.testing.assert_array_equal(out, total)


@pytest.mark.parametrize("dtype", TYPES)
def test_multiply_add(dtype):
    x, y, z = np.array([[2, 3, -4, 0.5, 7, 0, 1, -1]] * 3, dtype) * np.array([[1], [3], [5]])
    out = np.empty((6, 8), dtype)
    sums(x.astype(dtype), y.astype(dtype), z.astype(dtype), z.astype(dtype), out.ravel())

    np.testing.assert_array_equal(out[5], x * y + z)  # exact either way


@pytest.mark.parametrize(("units", "itemsize", "expected"), [(64, 4, 64), (64, 8, 32), (1, 8, 1)])
def test_width(units, itemsize, expected):
    assert width(units, itemsize=itemsize) == expected
