r"""The compiled loop over a quad tree, which needs no plan: pixels lie along a Morton curve.

It does what :func:`probnets.coding.encode_rows` does with the same tree, bit for bit. But it
needs room for the messages along one path alone, so that a tree may have millions of regions.
"""

__all__ = ["DECODE", "ENCODE", "MEASURE", "compiled_tree"]

import math
from collections.abc import Callable
from functools import cache

import numba
import numpy as np

from probnets.backend.rows import add_products, clear, load, store, width

from .loops import _belief, _bound, _learn, _normalise, _normalise_product, _total
from .rangecoder import PRECISION
from .rangeloops import advance_one, encode_one, peek_one
from .tables import TOTAL

# Numba derives the types of compiled loops.
# ruff: noqa: ANN001, ANN202
# pyright: reportMissingParameterType=false

ENCODE, DECODE, MEASURE = 0, 1, 2  # what the loop does


@numba.njit(cache=True, nogil=True)
def _split(place):
    r"""Returns the row and the column of a place on the Morton curve."""
    row, column, bit = 0, 0, 1
    while place:
        column |= bit * (place & 1)
        row |= bit * (place >> 1 & 1)
        place >>= 2
        bit <<= 1
    return row, column


@cache
def compiled_tree(units: int) -> Callable[..., None]:
    r"""Compiles the loop for a number of units `K`.

    The loop takes what to do; the values, uint16 with shape :math:`(H, W, C)`; the level of the
    root, whose side is two to its power; the distribution of the root; the matrices down and
    up, flat, of which the last serves all levels above; the cumulative input distributions of
    the channels, flat; the number of values `X`; the bits of a message; the modes of the
    inputs; room for two messages a level and two more, and for a flag a level; a coder, the
    bytes it writes and those it reads; and room for the bits of the values, float64.
    """
    K, W = units, width(units, itemsize=8)

    @numba.njit(cache=True, nogil=True)
    def loop(
        action, x, top, root, down, up, cumulative, X, bits, modes,
        prior, below, belief, scratch, informed, state, out, data, lengths,
    ):  # fmt: skip
        height, width, channels = x.shape
        room, highest = float(TOTAL - X), len(down) // (K * K) - 1
        for k in range(0, K, W):
            store(scratch, k, load(root, k, W))
        _normalise(prior, top * K, scratch, 0, 1, bits, K, W)
        informed[top] = False

        place, last, level = 0, 0, top
        while place >> 2 * top == 0:
            row, column = _split(place)
            if row >= height or column >= width:  # and so is the block that begins here
                size = 1
                while place & (4 * size - 1) == 0:
                    size *= 4
                place += size
                continue

            # Out of the regions that end before this pixel, then into those that begin.
            while last >> 2 * level != place >> 2 * level:
                here, matrix = level * K, min(level, highest) * K * K
                level += 1
                clear(scratch, 0, K, W)
                add_products(scratch, 0, below, here, K, 1, up, matrix, 1, K, K, W)
                if informed[level]:
                    _normalise_product(below, here + K, scratch, 0, below, here + K, 1, bits, K, W)
                else:
                    _normalise(below, here + K, scratch, 0, 1, bits, K, W)
                    informed[level] = True
            while level > 0:
                _belief(belief, prior, below, level * K, not informed[level], 1, bits, K, W)
                level -= 1
                clear(scratch, 0, K, W)
                matrix = min(level, highest) * K * K
                add_products(scratch, 0, belief, 0, K, 1, down, matrix, 1, K, K, W)
                _normalise(prior, level * K, scratch, 0, 1, bits, K, W)
                informed[level] = False

            for channel in range(channels):
                table = channel * (X + 1) * K
                _belief(belief, prior, below, 0, not informed[0], 1, bits, K, W)
                total = _total(belief, K, W)
                if action == DECODE:
                    # Bisection, which asks for the most frequent value first.
                    quantile = peek_one(state, 0)
                    value, beyond = 0, X
                    middle = max(modes[channel], 1)
                    while beyond - value > 1:
                        bound = _bound(belief, cumulative, table + middle * K, total, room, K, W)
                        probed = False
                        if bound + middle <= quantile:
                            value, probed = middle, middle == modes[channel]
                        else:
                            beyond = middle
                        middle = value + 1 if probed else (value + beyond) // 2
                    x[row, column, channel] = value
                value = np.int64(x[row, column, channel])
                entry = table + value * K
                low = _bound(belief, cumulative, entry, total, room, K, W)
                high = _bound(belief, cumulative, entry + K, total, room, K, W)
                if action == ENCODE:
                    encode_one(state, out, 0, low + value, high - low + 1)
                elif action == DECODE:
                    advance_one(state, data, 0, low + value, high - low + 1)
                else:
                    lengths[row, column, channel] = PRECISION - math.log2(high - low + 1)
                _learn(below, 0, cumulative, entry, not informed[0], bits, K, W)
                informed[0] = True
            last = place
            place += 1

    return loop
