r"""Tests for the probnets.coding.transforms module."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from probnets.coding.transforms import (
    _med_restore_python,
    forward,
    from_ycocg,
    inverse,
    med_residual,
    med_restore,
    to_ycocg,
)

LEVELS = {1: (256,), 3: (256, 512, 512)}
SHAPES = st.tuples(st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 3]))


def med_restore_python(symbols, levels):
    planes = np.empty(symbols.shape, dtype=np.int16)
    _med_restore_python(symbols, np.array(levels), planes)
    return planes


RESTORES = {"python": med_restore_python, "public": med_restore}


def random_symbols(shape, rng):
    return rng.integers(0, LEVELS[shape[2]], shape).astype(np.int16)


@pytest.mark.parametrize(
    ("rgb", "ycocg"),
    [
        ((0, 0, 0), (0, 0, 0)),
        ((255, 255, 255), (255, 0, 0)),
        ((255, 0, 0), (63, 255, -127)),
        ((0, 255, 0), (127, 0, 255)),
        ((0, 0, 255), (63, -255, -127)),
        ((10, 20, 31), (20, -21, 0)),  # t = 31 + floor(-10.5) = 20
    ],
)
def test_ycocg_by_hand(rgb, ycocg):
    assert to_ycocg(np.array(rgb, dtype=np.uint8)).tolist() == list(ycocg)
    assert from_ycocg(np.array(ycocg)).tolist() == list(rgb)


def test_ycocg_on_the_whole_cube_in_steps():
    steps = np.r_[0:256:7, 254, 255].astype(np.uint8)
    rgb = np.stack(np.meshgrid(steps, steps, steps), axis=-1)
    ycocg = to_ycocg(rgb)

    np.testing.assert_array_equal(from_ycocg(ycocg), rgb)
    assert ycocg.min(axis=(0, 1, 2)).tolist() == [0, -255, -255]
    assert ycocg.max(axis=(0, 1, 2)).tolist() == [255, 255, 255]


MED_PIXELS = [[100, 102, 101], [90, 95, 250], [0, 255, 200]]
# Row 1: no edge: 90 + 102 - 100 = 92, so 95 - 92 = 3; c >= max(95, 101): min = 95.
# Row 2: median(0, 95, 5) = 5, then median(255, 250, 410) = 255.
MED_ERRORS = [[100 - 128, 2, -1], [-10, 3, 250 - 95], [-90, 250, 200 - 255]]


@pytest.mark.parametrize("restore", RESTORES.values(), ids=list(RESTORES))
def test_med_by_hand(restore):
    x = np.array(MED_PIXELS)[..., None]
    s = (np.array(MED_ERRORS)[..., None] + 128) % 256

    np.testing.assert_array_equal(med_residual(x, [256]), s)
    np.testing.assert_array_equal(restore(s, [256]), x)


@pytest.mark.parametrize("c", [1, 3])
def test_flat_image_is_all_middle(c):
    symbols = forward(np.full((4, 5, c), 77, dtype=np.uint8))
    middle = np.array(LEVELS[c]) // 2

    assert (symbols.reshape(-1, c)[1:] == middle).all()
    assert symbols[0, 0].tolist() == [77, 256, 256][:c]


def test_errors_centre_on_the_middle():
    rows, columns = np.mgrid[:32, :32]
    plane = forward((64 + 3 * rows - 2 * columns).astype(np.uint8)[..., None])
    edge = forward((3 * rows + 2 * columns).astype(np.uint8)[..., None])

    assert (plane[1:, 1:] == 128).all()  # c lies between a and b
    assert (edge[1:, 1:] == 128 + 2).all()  # c lies below both, so that the larger predicts


@given(group=SHAPES.flatmap(lambda shape: hnp.arrays(np.uint8, shape)))
def test_round_trip(group):
    symbols = forward(group)

    assert symbols.dtype == np.int16
    assert symbols.min() >= 0
    assert (symbols < LEVELS[group.shape[2]]).all()
    np.testing.assert_array_equal(inverse(symbols), group, strict=True)


@given(
    group=hnp.arrays(np.int16, (6, 5, 2), elements=st.integers(0, 1)),
    levels=st.tuples(*[st.sampled_from([2, 8, 8192])] * 2),
)
def test_med_wraps_at_any_level(group, levels):
    x = group * (np.array(levels) - 1)  # extremes only
    s = med_residual(x, levels)
    np.testing.assert_array_equal(med_restore(s, levels), x)


@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
def test_restore_of_anything(shape, seed):
    symbols = random_symbols(shape, np.random.default_rng(seed))
    levels = LEVELS[shape[2]]
    expected = med_restore_python(symbols, levels)

    np.testing.assert_array_equal(med_restore(symbols, levels), expected, strict=True)
    np.testing.assert_array_equal(med_residual(expected, levels), symbols, strict=True)


@given(shape=SHAPES, few=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_inverse_of_forged_symbols(shape, few, seed):
    rng = np.random.default_rng(seed)
    symbols = random_symbols(shape, rng)
    if few:
        kept = rng.random(shape) < 0.9
        symbols[kept] = forward(rng.integers(100, 110, shape).astype(np.uint8))[kept]

    planes = med_restore_python(symbols, LEVELS[shape[2]])
    rgb = planes if shape[2] == 1 else from_ycocg(planes - np.array([0, 256, 256]))

    if ((rgb >= 0) & (rgb <= 255)).all():
        np.testing.assert_array_equal(inverse(symbols), rgb)
        np.testing.assert_array_equal(forward(inverse(symbols)), symbols)
    else:
        with pytest.raises(ValueError, match=r"expected the symbols of an image, got colours"):
            inverse(symbols)


def test_inverse_refuses_colours_outside_the_cube():
    symbols = np.array([[[255, 511, 256]]], dtype=np.int16)  # Y = 255, Co = 255, Cg = 0
    with pytest.raises(ValueError, match=r"symbols of an image, got colours from 128 to 383"):
        inverse(symbols)


def test_read_only_and_strided_input():
    group = np.random.default_rng(0).integers(0, 256, (6, 7, 4)).astype(np.uint8)
    group.flags.writeable = False
    symbols = forward(group[::2, ::-1, :3])
    symbols.flags.writeable = False

    np.testing.assert_array_equal(inverse(symbols), group[::2, ::-1, :3])
    np.testing.assert_array_equal(inverse(symbols[:, :3]), group[::2, ::-1, :3][:, :3])


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 2), (4, 4, 4), (1, 4, 4, 3)])
@pytest.mark.parametrize("transform", [forward, inverse])
def test_rejects_shapes(transform, shape):
    with pytest.raises(ValueError, match=r"shape \(H, W, 1\) or \(H, W, 3\), got \("):
        transform(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize("transform", [forward, inverse])
def test_rejects_empty_planes(transform):
    with pytest.raises(ValueError, match=r"expected shape \(H, W, 1\), got \(0, 4, 1\)"):
        transform(np.zeros((0, 4, 1), dtype=np.uint8))


def test_rejects_dtypes():
    with pytest.raises(ValueError, match=r"expected planes of uint8, got uint16"):
        forward(np.zeros((2, 2, 3), dtype=np.uint16))
    with pytest.raises(ValueError, match=r"expected integers, got float64"):
        inverse(np.zeros((2, 2, 3)))


@pytest.mark.parametrize("bad", [-1, 256])
def test_rejects_values_out_of_range(bad):
    with pytest.raises(ValueError, match=r"in \[0, 256\) in plane 0, got"):
        inverse(np.full((2, 2, 1), bad, dtype=np.int16))
    with pytest.raises(ValueError, match=r"in \[0, 256\) in plane 0, got"):
        med_residual(np.full((2, 2, 1), bad), [256])


@pytest.mark.parametrize("levels", [0, 1, 100, 16384])
def test_rejects_levels(levels):
    with pytest.raises(ValueError, match=rf"powers of two from 2 to 8192, got {levels}"):
        med_residual(np.zeros((2, 2, 1), dtype=np.int16), [levels])
