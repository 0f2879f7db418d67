r"""Images that use few of their levels: numbering those that are used without gaps."""

__all__ = ["pack_levels", "unpack_levels", "used_levels"]

import math

import numpy as np

from probnets.coding.errors import StreamError
from probnets.coding.rangecoder import PRECISION, RangeDecoder, RangeEncoder
from probnets.coding.stream import Reader, varint


def used_levels(channel: np.ndarray, values: int) -> np.ndarray | None:
    r"""Finds the levels that a channel uses, if it pays to number them.

    It pays if a quarter of the levels between the least and the last are never used, and if
    half of what that should save is more than naming them takes.

    Arguments:
        channel: The channel, unsigned integers with shape :math:`(*)`.
        values: The number of levels there are.

    Returns:
        The levels in rising order, or None.

    Example:
        >>> used_levels(np.tile([3, 9, 250], 500), 256)
        array([  3,   9, 250])
        >>> used_levels(np.arange(256), 256) is None
        True
    """
    levels = np.flatnonzero(np.bincount(channel.reshape(-1), minlength=values))
    span = int(levels[-1]) - int(levels[0]) + 1
    if len(levels) > 1 and 4 * len(levels) > 3 * span:
        return None
    saving = channel.size * math.log2(max(span, 4) / len(levels)) / 2
    return levels if saving > 8 * len(pack_levels(levels)) else None


def pack_levels(levels: np.ndarray) -> bytes:
    r"""Returns the levels as bytes.

    They are the first level, the common divisor of the distances between them, and then a bit
    for each multiple up to the last, which an adaptive model codes given the three before it.

    Arguments:
        levels: The levels in rising order, one or more.
    """
    first, step = int(levels[0]), int(np.gcd.reduce(np.diff(levels), initial=0)) or 1
    numbers = (levels - first) // step
    bits = np.zeros(int(numbers[-1]) + 1, np.int64)
    bits[numbers] = 1
    encoder, model = RangeEncoder(), _Bits()
    for bit in bits[1:-1].tolist():  # the first and the last are used
        encoder.encode(*model.interval(bit))
        model.see(bit)
    return b"".join([varint(first), varint(step), varint(len(bits)), encoder.finish()])


def unpack_levels(data: bytes, values: int) -> np.ndarray:
    r"""Undoes :func:`pack_levels`.

    Arguments:
        data: The bytes.
        values: The number of levels there are.

    Raises:
        StreamError: If these are not packed levels.
    """
    reader = Reader(data)
    first, step, count = (reader.varint() for _ in range(3))
    if step < 1 or count < 1 or first + step * (count - 1) >= values:
        raise StreamError(
            f"expected levels below {values}, got {count} from {first} by {step}; it is damaged"
        )
    decoder, model = RangeDecoder(reader.take(reader.left)), _Bits()
    bits = [1]
    for _ in range(count - 2):
        bit = int(decoder.peek() >= model.interval(1)[0])
        decoder.advance(*model.interval(bit))
        model.see(bit)
        bits.append(bit)
    levels = first + step * np.flatnonzero([*bits, 1][:count])
    if not decoder.canonical() or pack_levels(levels) != data:
        raise StreamError("expected the levels of an image, got others; it is damaged")
    return levels


class _Bits:
    r"""Is an adaptive model of bits given the three before."""

    def __init__(self) -> None:
        self._counts = [[1, 1] for _ in range(8)]
        self._before = 7

    def interval(self, bit: int) -> tuple[int, int]:
        r"""Returns the first quantile of a bit, and their number."""
        zeros, ones = self._counts[self._before]
        split = (zeros << PRECISION) // (zeros + ones)
        return (split, (1 << PRECISION) - split) if bit else (0, split)

    def see(self, bit: int) -> None:
        r"""Counts a bit."""
        self._counts[self._before][bit] += 1
        self._before = (self._before << 1 | bit) & 7
