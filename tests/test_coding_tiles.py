r"""Tests for the probnets.coding.tiles module."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from probnets.coding.tiles import cut, paste, tile_classes


def test_classes_by_hand():
    interior, right, bottom, corner = tile_classes(33, 40, tile=(16, 16))

    assert (interior.rows, interior.columns) == (range(2), range(2))
    assert (right.rows, right.columns) == (range(2), range(2, 3))
    assert (bottom.rows, bottom.columns) == (range(2, 3), range(2))
    assert (corner.rows, corner.columns) == (range(2, 3), range(2, 3))
    assert [cls.total for cls in (interior, right, bottom, corner)] == [4, 2, 2, 1]

    assert interior.mask.all()
    assert right.mask[:, :8].all()
    assert not right.mask[:, 8:].any()
    assert bottom.mask[:1].all()
    assert not bottom.mask[1:].any()
    assert np.argwhere(corner.mask).tolist() == [[0, j] for j in range(8)]


def test_cut_by_hand():
    symbols = np.arange(1, 16).reshape(3, 5, 1)
    tiles = [cut(symbols, cls)[..., 0].tolist() for cls in tile_classes(3, 5, tile=(2, 2))]

    assert tiles == [
        [[[1, 2], [6, 7]], [[3, 4], [8, 9]]],
        [[[5, 0], [10, 0]]],
        [[[11, 12], [0, 0]], [[13, 14], [0, 0]]],
        [[[15, 0], [0, 0]]],
    ]


@pytest.mark.parametrize("tile", [(16, 16), (5, 12)])
def test_covers_each_pixel_once(tile):
    for height in range(1, 41):
        for width in range(1, 41):
            symbols = np.arange(1, height * width + 1).reshape(height, width, 1)
            found, missing = [], 0
            for cls in tile_classes(height, width, tile):
                tiles = cut(symbols, cls)
                assert tiles.shape == (cls.total, *tile, 1)
                found.append(tiles[:, cls.mask].ravel())
                missing += tiles[:, ~cls.mask].any()

            assert not missing
            assert np.array_equal(np.sort(np.concatenate(found)), symbols.ravel())


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.integers(1, 3),
    tile=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_round_trip(height, width, channels, tile):
    symbols = np.random.default_rng(0).integers(1, 512, (height, width, channels), dtype=np.int16)
    out = np.zeros_like(symbols)
    classes = tile_classes(height, width, tile)

    assert len(classes) <= 4
    for cls in classes:
        tiles = cut(symbols, cls)
        assert tiles.dtype == np.int16
        assert tiles.flags.c_contiguous
        tiles[:, ~cls.mask] = -1  # what is missing may hold anything
        paste(out, cls, tiles)

    np.testing.assert_array_equal(out, symbols, strict=True)


def test_paste_into_a_view():
    symbols = np.arange(1, 61).reshape(5, 6, 2)
    out = np.zeros((10, 2, 12), dtype=symbols.dtype).transpose(0, 2, 1)[::2, ::-2]
    for cls in tile_classes(5, 6, tile=(2, 4)):
        paste(out, cls, cut(symbols, cls))

    np.testing.assert_array_equal(out, symbols)


@pytest.mark.parametrize("size", [(0, 4, (2, 2)), (4, 0, (2, 2)), (4, 4, (0, 2)), (4, 4, (2, -1))])
def test_rejects_empty_sizes(size):
    with pytest.raises(ValueError, match=r"expected an image and tiles with at least one pixel"):
        tile_classes(*size)


def test_rejects_other_images():
    interior, right = tile_classes(4, 6, tile=(4, 4))

    for shape in [(4, 5, 1), (4, 7, 1), (3, 6, 1), (4, 6)]:
        with pytest.raises(ValueError, match=r"1 x 1 tiles of 4 x 2 pixels .* got \("):
            cut(np.zeros(shape), right)
    with pytest.raises(ValueError, match=r"expected tiles with shape \(1, 4, 4, 3\), got"):
        paste(np.zeros((4, 6, 3)), interior, np.zeros((1, 4, 4, 1)))
