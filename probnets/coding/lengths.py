r"""How many bits each number of an image costs."""

__all__ = ["code_lengths"]

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from probnets.backend.rows import width
from probnets.circuits import TreeCircuit

from .codec import _buffers, _model, _parallel, check_rows
from .compression import check_fit
from .images import ImageLike, as_array, split_planes
from .loops import BLOCK, _belief, _bound, _learn, _pass, _total
from .models import AnyModel, ImageModel, as_model
from .payloads import Mode, check_mode
from .photographs.codec import photograph_lengths
from .photographs.model import PhotographModel
from .rangecoder import PRECISION
from .schedule import CODE, Schedule
from .tables import TOTAL, CodeTables
from .tiles import cut, paste, tile_classes
from .transforms import forward
from .treecodec import tree_lengths
from .trees import TreeModel

# Numba derives the types of compiled loops.
# ruff: noqa: ANN001, ANN202
# pyright: reportMissingParameterType=false


def code_lengths(
    img: ImageLike,
    pc_model: AnyModel | TreeCircuit | str | Path | None = None,
    *,
    mode: Mode = "fast",
) -> np.ndarray:
    r"""Computes how many bits each number of an image takes in its stream.

    A number that the coder gives :math:`f` of its :math:`2^{24}` quantiles takes

    .. math:: \ell = 24 - \log_2 f

    bits, and the sum of all is the size of the stream but for its header, its index and less
    than a byte for each part. Nothing is estimated: the frequencies :math:`f` are those of the
    coder, from the integer tables.

    Models of photographs and of trees code green, and red and blue by their differences from
    it; those of tiles code luma and two chroma differences, which then stand in their places, and
    the two bytes of 16-bit numbers, which are added up.

    Arguments:
        img: The image, with shape :math:`(H, W)` or :math:`(H, W, C)`, as
            :func:`probnets.coding.compress` takes it.
        pc_model: The model. By default the one that ships with the package.
        mode: The mode, as in :func:`probnets.coding.compress`.

    Returns:
        The bits :math:`\ell`, an array of float64 with shape :math:`(H, W, C)`, where
        :math:`C = 1` for :math:`(H, W)`.

    Raises:
        TypeError: If it is not an image, or its dtype cannot be coded.
        ValueError: If its shape or values do not fit the model, or the mode is another.

    Example:
        >>> lengths = code_lengths(np.zeros((8, 8, 3), dtype=np.uint8))
        >>> lengths.shape, bool(lengths.sum() < 100)
        ((8, 8, 3), True)
    """
    model = as_model(pc_model)
    check_mode(mode, model)
    array = as_array(img)
    if isinstance(model, PhotographModel):
        return photograph_lengths(model, array, mode=mode)
    if isinstance(model, TreeModel):
        return tree_lengths(model, array)
    if model.kind == "tiles":
        return _tile_lengths(model, array)
    return _whole_lengths(model, array)


def _whole_lengths(model: ImageModel, array: np.ndarray) -> np.ndarray:
    r"""Computes the lengths of an image under a model of its very shape."""
    check_fit(model, array.shape, array.dtype)
    rows = array.reshape(1, -1)
    rows = rows.view(np.uint8) if rows.dtype == np.bool_ else rows
    return _row_lengths(model.tables, rows).reshape(*array.shape[:2], -1)


def _tile_lengths(model: ImageModel, array: np.ndarray) -> np.ndarray:
    r"""Computes the lengths of an image group by group, as tiles are coded."""
    height, width, _ = model.shape
    parts = []
    for planes in split_planes(array):
        symbols, bits = forward(planes), np.empty(planes.shape)
        for cls in tile_classes(*array.shape[:2], tile=(height, width)):
            tiles = cut(symbols, cls)
            rows = np.zeros((len(tiles), *model.shape), dtype=np.uint16)
            rows[..., : tiles.shape[-1]] = tiles
            present = np.zeros(model.shape, dtype=np.bool_)
            present[..., : tiles.shape[-1]] = cls.mask[..., None]
            lengths = _row_lengths(model.tables, rows.reshape(len(rows), -1), present.ravel())
            paste(bits, cls, lengths.reshape(rows.shape)[..., : tiles.shape[-1]])
        if bits.sum() >= 8 * planes.size:
            bits[...] = 8.0  # such a group is stored as it is
        parts.append(bits)
    bits = np.concatenate(parts, axis=2)
    if array.dtype == np.uint16:
        high, low = np.split(bits, 2, axis=2)
        return high + low
    return bits


def _row_lengths(
    tables: CodeTables, x: np.ndarray, present: np.ndarray | None = None
) -> np.ndarray:
    r"""Computes the lengths of rows of values, zero where they are not coded.

    Arguments:
        tables: The tables of the circuit.
        x: The values, with shape :math:`(N, D)`.
        present: Which variables are coded, with shape :math:`(D,)`.
    """
    x = check_rows(tables, x)
    schedule = Schedule.depth_first(tables.tree, present)
    lengths = np.zeros(x.shape)
    loop = _compiled(tables.units)

    def job(rows: slice) -> None:
        part = np.ascontiguousarray(x[rows])
        work = schedule.operations, *_model(tables), *_buffers(tables, schedule)
        loop(part, *work, lengths[rows])

    _parallel(job, len(x), None)
    return lengths


@cache
def _compiled(units: int) -> Callable[..., None]:
    r"""Compiles the loop for a number of units: that of the encoder, without its coder."""
    import numba

    K, W, B = units, width(units, itemsize=8), BLOCK

    @numba.njit(cache=True, nogil=True)
    def loop(
        x, operations, root, down, up, cumulative, X, bits,
        prior, below, belief, scratch, lengths,
    ):  # fmt: skip
        room = float(TOTAL - X)
        for n in range(0, len(x), B):
            used = min(B, len(x) - n)
            rows = (used + 3) // 4 * 4
            for t in range(len(operations)):
                operation = operations[t]
                if operation[0] != CODE:
                    _pass(
                        operation, prior, below, scratch, belief, root, down, up, rows, bits, K, W
                    )
                    continue
                v, here, ignorant = operation[3], operation[5] * B * K, operation[7]
                table = operation[4] * (X + 1) * K
                for b in range(used):
                    row, value = here + b * K, x[n + b, v]
                    entry = table + value * K
                    _belief(belief, prior, below, row, ignorant, 1, bits, K, W)
                    total = _total(belief, K, W)
                    low = _bound(belief, cumulative, entry, total, room, K, W) if value else 0
                    high = _bound(belief, cumulative, entry + K, total, room, K, W)
                    lengths[n + b, v] = PRECISION - math.log2(high - low + 1)
                    _learn(below, row, cumulative, entry, ignorant, bits, K, W)
                for row in range(here + used * K, here + rows * K):
                    below[row] = 1.0  # rows past the end

    return loop
