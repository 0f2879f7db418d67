r"""Tiles of an image, where tiles at the border lack some of their pixels."""

__all__ = ["TileClass", "cut", "paste", "tile_classes"]

from typing import NamedTuple

import numpy as np


class TileClass(NamedTuple):
    r"""Describes the tiles of an image that have the same pixels.

    Arguments:
        mask: The pixels that the tiles have, a boolean array with shape :math:`(h, w)`. They
            fill a rectangle in the upper left.
        rows: The rows of the grid of tiles that belong to the class.
        columns: The columns of the grid of tiles that belong to the class.
    """

    mask: np.ndarray
    rows: range
    columns: range

    @property
    def total(self) -> int:
        r"""The number of tiles :math:`N`."""
        return len(self.rows) * len(self.columns)


def tile_classes(height: int, width: int, tile: tuple[int, int]) -> list[TileClass]:
    r"""Lists the classes of tiles that cover an image.

    The grid starts in the upper left. Tiles that fit are complete, and those that jut out at
    the right, at the bottom and in the corner make up to three more classes. They come in this
    order, and classes without tiles are left out.

    Arguments:
        height: The height :math:`H` of the image.
        width: The width :math:`W` of the image.
        tile: The height and the width :math:`(h, w)` of a tile.

    Returns:
        The classes. Every pixel lies in one tile of one class.

    Raises:
        ValueError: If a length is below one.

    Example:
        >>> [(cls.total, int(cls.mask.sum())) for cls in tile_classes(32, 40, tile=(16, 16))]
        [(4, 256), (2, 128)]
    """
    if min(height, width, *tile) < 1:
        raise ValueError(
            f"expected an image and tiles with at least one pixel, got {(height, width)} and "
            f"{tuple(tile)}"
        )

    classes = []
    for rows, present_rows in _spans(height, tile[0]):
        for columns, present_columns in _spans(width, tile[1]):
            mask = np.zeros(tile, dtype=bool)
            mask[:present_rows, :present_columns] = True
            classes.append(TileClass(mask, rows, columns))
    return classes


def cut(symbols: np.ndarray, cls: TileClass) -> np.ndarray:
    r"""Cuts the tiles of a class out of an image.

    Arguments:
        symbols: The image, with shape :math:`(H, W, C)`.
        cls: A class of tiles of this image.

    Returns:
        The tiles, row by row, with shape :math:`(N, h, w, C)` and zeros where pixels are
        missing.

    Raises:
        ValueError: If the image does not have these tiles.

    Example:
        >>> symbols = np.arange(12).reshape(3, 4, 1)
        >>> corner = tile_classes(3, 4, tile=(2, 2))[-1]
        >>> cut(symbols, corner)[..., 0].tolist()
        [[[8, 9], [0, 0]], [[10, 11], [0, 0]]]
    """
    blocks = _blocks(symbols, cls)
    R, C, p, q, channels = blocks.shape
    tiles = np.zeros((R, C, *cls.mask.shape, channels), dtype=symbols.dtype)
    tiles[:, :, :p, :q] = blocks
    return tiles.reshape(-1, *tiles.shape[2:])  # (R, C, h, w, C) -> (N, h, w, C)


def paste(out: np.ndarray, cls: TileClass, tiles: np.ndarray) -> None:
    r"""Writes the tiles of a class into an image, the inverse of :func:`cut`.

    Arguments:
        out: The image, with shape :math:`(H, W, C)`, which is changed in place.
        cls: A class of tiles of this image.
        tiles: The tiles, with shape :math:`(N, h, w, C)`. Missing pixels may hold anything.

    Raises:
        ValueError: If the image does not have these tiles, or if the tiles have another shape.
    """
    blocks = _blocks(out, cls)
    R, C, p, q, channels = blocks.shape
    if tiles.shape != (expected := (R * C, *cls.mask.shape, channels)):
        raise ValueError(f"expected tiles with shape {expected}, got {tiles.shape}")

    blocks[...] = tiles.reshape(R, C, *expected[1:])[:, :, :p, :q]


def _spans(length: int, step: int) -> list[tuple[range, int]]:
    r"""Splits a row of tiles into the complete ones and the rest, each with its length."""
    whole, rest = divmod(length, step)
    spans = [(range(whole), step), (range(whole, whole + 1), rest)]
    return [(span, present) for span, present in spans if span and present]


def _blocks(image: np.ndarray, cls: TileClass) -> np.ndarray:
    r"""Returns a view of the pixels of each tile, with shape :math:`(R, C, p, q, C)`."""
    (h, w), (R, C) = cls.mask.shape, (len(cls.rows), len(cls.columns))
    p, q = int(cls.mask[:, 0].sum()), int(cls.mask[0].sum())

    region = image[
        cls.rows.start * h : cls.rows.stop * h, cls.columns.start * w : cls.columns.stop * w
    ]
    if image.ndim != 3 or region.shape[:2] != (R * p, C * q):
        raise ValueError(
            f"expected an image (H, W, C) with {R} x {C} tiles of {p} x {q} pixels from row "
            f"{cls.rows.start} and column {cls.columns.start} of the grid, got {image.shape}"
        )

    # To split an axis needs no copy, whatever the strides, so that this stays a view.
    return region.reshape(R, p, C, q, -1).transpose(0, 2, 1, 3, 4)
