r"""Images that use few of their levels: numbering those that are used without gaps."""

__all__ = ["Levels", "pack_levels", "unpack_levels", "used_levels"]

from typing import NamedTuple

import numba
import numpy as np

from probnets.circuits.integertables import integer_log2
from probnets.coding.errors import StreamError
from probnets.coding.rangecoder import PRECISION
from probnets.coding.rangeloops import (
    advance_one,
    coder_states,
    encode_one,
    finish_one,
    peek_one,
    start_decoding_one,
    start_encoding_one,
    stream_capacity,
)
from probnets.coding.stream import Reader, varint

_ROWS = 1 << 20  # numbers that are counted at once

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


class Levels(NamedTuple):
    r"""Is the levels that a channel uses, in rising order, and the bytes that name them."""

    values: np.ndarray
    packed: bytes


def used_levels(channel: np.ndarray, count: int) -> Levels | None:
    r"""Finds the levels that a channel uses, if it pays to number them.

    It pays if a quarter of the levels between the least and the last are never used, and if
    half of what that should save is more than naming them takes.

    Arguments:
        channel: The channel, unsigned integers with shape :math:`(*)`.
        count: The number of levels there are.

    Returns:
        The levels, or None.

    Example:
        >>> used_levels(np.tile([3, 9, 250], 500), 256).values
        array([  3,   9, 250])
        >>> used_levels(np.arange(256), 256) is None
        True
    """
    flat, used = channel.reshape(-1), np.zeros(count, np.bool_)
    for start in range(0, flat.size, _ROWS):
        used[flat[start : start + _ROWS]] = True
    levels = np.flatnonzero(used)
    span = int(levels[-1]) - int(levels[0]) + 1
    if len(levels) > 1 and 4 * len(levels) > 3 * span:
        return None
    packed = pack_levels(levels)
    unit = integer_log2(2)
    saving = channel.size * (integer_log2(max(span, 4)) - integer_log2(len(levels)))
    return Levels(levels, packed) if saving > 16 * len(packed) * unit else None


def pack_levels(levels: np.ndarray) -> bytes:
    r"""Returns the levels as bytes.

    They are the first level, the common divisor of the distances between them, and then a bit
    for each multiple up to the last, which an adaptive model codes given the three before it.

    Arguments:
        levels: The levels in rising order, one or more.
    """
    first, step = int(levels[0]), int(np.gcd.reduce(np.diff(levels), initial=0)) or 1
    numbers = (levels - first) // step
    bits = np.zeros(int(numbers[-1]) + 1, np.uint8)
    bits[numbers] = 1
    state, out = coder_states(1), np.empty((1, stream_capacity(bits.size)), np.uint8)
    start_encoding_one(state, 0)
    _bits(bits, state, out[0], out, decoding=False)
    code = out[0, : finish_one(state, out, 0)].tobytes()
    return b"".join([varint(first), varint(step), varint(len(bits)), code])


def unpack_levels(data: bytes, count: int) -> np.ndarray:
    r"""Undoes :func:`pack_levels`.

    Arguments:
        data: The bytes.
        count: The number of levels there are.

    Raises:
        StreamError: If these are not packed levels.
    """
    reader = Reader(data)
    first, step, size = (reader.varint() for _ in range(3))
    if step < 1 or size < 1 or first + step * (size - 1) >= count:
        raise StreamError(
            f"expected levels below {count}, got {size} from {first} by {step}; it is damaged"
        )
    code = np.frombuffer(bytearray(reader.take(reader.left)) or bytearray(1), np.uint8)
    bits, state = np.ones(size, np.uint8), coder_states(1)
    start_decoding_one(state, code, 0, 0, code.size)
    _bits(bits, state, code, code[None], decoding=True)
    levels = first + step * np.flatnonzero(bits)
    if pack_levels(levels) != data:
        raise StreamError("expected the levels of an image, got others; it is damaged")
    return levels


@_compiled
def _bits(
    bits: np.ndarray, state: np.ndarray, data: np.ndarray, out: np.ndarray, *, decoding: bool
) -> None:
    r"""Codes bits given the three before. The first and the last are known to be ones."""
    counts, before = np.ones((8, 2), np.int64), 7
    for n in range(1, bits.size - 1):
        zeros, ones = counts[before]
        split = (zeros << PRECISION) // (zeros + ones)
        if decoding:
            bits[n] = peek_one(state, 0) >= split
        low = split if bits[n] else 0
        freq = (1 << PRECISION) - split if bits[n] else split
        if decoding:
            advance_one(state, data, 0, low, freq)
        else:
            encode_one(state, out, 0, low, freq)
        counts[before, bits[n]] += 1
        before = (before << 1 | bits[n]) & 7
