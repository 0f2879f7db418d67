r"""Images that use few of their levels: numbering those that are used without gaps."""

__all__ = ["pack_levels", "unpack_levels", "used_levels"]

import math
import zlib

import numpy as np

from probnets.coding.errors import StreamError


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
    return levels if saving > 8 * len(pack_levels(levels, values)) else None


def pack_levels(levels: np.ndarray, values: int) -> bytes:
    r"""Returns the levels as bytes: a bit for each, deflated.

    Arguments:
        levels: The levels.
        values: The number of levels there are.
    """
    used = np.zeros(values, np.bool_)
    used[levels] = True
    return zlib.compress(np.packbits(used).tobytes(), 9)


def unpack_levels(data: bytes, values: int) -> np.ndarray:
    r"""Undoes :func:`pack_levels`.

    Arguments:
        data: The bytes.
        values: The number of levels there are.

    Raises:
        StreamError: If these are not packed levels.
    """
    size, inflater = -(-values // 8), zlib.decompressobj()
    try:
        bits = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise StreamError(f"expected the levels of an image, got: {error}") from None
    levels = np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8)))
    whole = inflater.eof and not inflater.unused_data and len(bits) == size
    if not whole or not len(levels) or levels[-1] >= values:
        raise StreamError("expected the levels of an image, got others; it is damaged")
    return levels
