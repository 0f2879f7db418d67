r"""Cells: the parts of an image that are coded apart, for threads and for random access."""

__all__ = ["Region", "cell_count", "cells", "each", "overlap", "touches"]

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

_PIXELS = 1 << 18  # of a cell, more or less
_ROWS, _COLUMNS = 64, 1 << 13  # the least height of a cell, and the largest width

Region = tuple[slice, slice]

T = TypeVar("T")


def cells(height: int, width: int) -> list[Region]:
    r"""Cuts an image into cells that are coded apart, for threads and for random access.

    A cell has about :math:`2^{18}` pixels and at most :math:`2^{20}`, so that what coding needs
    beside the image is bounded.

    Arguments:
        height: The height of the image.
        width: Its width.

    Returns:
        The rows and columns of each cell, line by line.

    Example:
        >>> cells(540, 860)
        [(slice(0, 270, None), slice(0, 860, None)), (slice(270, 540, None), slice(0, 860, None))]
    """
    down, across = _grid(height, width)
    rows, columns = (
        [slice(a, b) for a, b in pairwise(size * i // parts for i in range(parts + 1))]
        for size, parts in ((height, down), (width, across))
    )
    return [(row, column) for row in rows for column in columns]


def cell_count(height: int, width: int) -> int:
    r"""Returns the number of cells without listing them.

    Arguments:
        height: The height of the image.
        width: Its width.
    """
    down, across = _grid(height, width)
    return down * across


def _grid(height: int, width: int) -> tuple[int, int]:
    r"""Returns the number of cells down and across an image."""
    across = -(-width // _COLUMNS)
    down = (2 * height * -(-width // across) + _PIXELS) // (2 * _PIXELS)  # rounded
    return min(max(down, 1), max(height // _ROWS, 1)), across


def touches(cell: Region, region: Region) -> bool:
    r"""Tells whether a cell and a region share a pixel."""
    pairs = zip(cell, region, strict=True)
    return all(own.start < wanted.stop and wanted.start < own.stop for own, wanted in pairs)


def overlap(cell: Region, region: Region) -> tuple[Region, Region]:
    r"""Returns what a cell and a region share, as seen from the cell and from the region."""
    here, there = [], []
    for own, wanted in zip(cell, region, strict=True):
        start, stop = max(own.start, wanted.start), min(own.stop, wanted.stop)
        here.append(slice(start - own.start, stop - own.start))
        there.append(slice(start - wanted.start, stop - wanted.start))
    return (here[0], here[1]), (there[0], there[1])


def each(job: Callable[..., T], parts: Sequence[object], workers: int | None) -> list[T]:
    r"""Works on all parts, in threads if there are several.

    Arguments:
        job: What is done with a part.
        parts: The parts.
        workers: The number of threads, by default as many as PyTorch uses.

    Raises:
        ValueError: If there are fewer workers than one.
    """
    workers = torch.get_num_threads() if workers is None else workers
    if workers < 1:
        raise ValueError(f"expected one worker or more, got {workers}")
    workers = min(workers, len(parts))
    if workers <= 1:
        return [job(part) for part in parts]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(job, parts))
