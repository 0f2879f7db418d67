r"""The payload of a photograph: its cells, each with a stream of its own."""

__all__ = [
    "decode_photograph",
    "encode_photograph",
    "photograph_lengths",
    "photograph_parts",
]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from probnets.coding.cells import Region, cell_count, cells, each, overlap, touches
from probnets.coding.errors import StreamError
from probnets.coding.stream import Reader, index, varint

from .levels import Levels, unpack_levels, used_levels
from .model import Mode, PhotographModel
from .planes import (
    colour_planes,
    decode_planes,
    encode_planes,
    measure_planes,
    plane_colours,
)
from .repeats import enlarge, repetition

_SLOW, _LEVELS, _REPEATED = 1, 2, 4  # flags of the first byte


@dataclass(frozen=True)
class _Group:
    r"""Is channels that are coded together: three colours, or a channel of its own."""

    first: int
    width: int
    top: int  # the largest value


def encode_photograph(
    model: PhotographModel, array: np.ndarray, *, mode: Mode = "fast", workers: int | None = None
) -> bytes:
    r"""Encodes an image of any size.

    Arguments:
        model: The model.
        array: The image, as :func:`probnets.coding.images.as_array` returns it.
        mode: The mode.
        workers: The number of threads, by default as many as PyTorch uses.

    Returns:
        The payload.
    """
    channels, factors = _single(array)
    channels, levels = _number(channels, array.dtype)
    parts = _parts(_groups(array.dtype, levels), channels.shape)

    def encode(part: tuple[_Group, Region]) -> bytes:
        group, (rows, columns) = part
        own = channels[rows, columns, group.first : group.first + group.width]
        stream = encode_planes(model, _planes(own), top=group.top, mode=mode)
        return stream if len(stream) < own.nbytes else own.astype(_raw(array.dtype)).tobytes()

    streams = each(encode, parts, workers)
    return _head(mode, factors, levels) + index(streams) + b"".join(streams)


def decode_photograph(
    model: PhotographModel,
    shape: tuple[int, ...],
    dtype: np.dtype,
    reader: Reader,
    *,
    region: Region | None = None,
    workers: int | None = None,
) -> np.ndarray:
    r"""Restores the image that a payload holds and ends with.

    Arguments:
        model: The model.
        shape: The shape of the image.
        dtype: The dtype of the image.
        reader: The payload.
        region: The rows and columns that are wanted, slices of step 1 within the image. Only
            the cells they touch are decoded. By default all.
        workers: The number of threads, by default as many as PyTorch uses.

    Raises:
        StreamError: If it is not the payload of an image.
    """
    head, parts, streams = _read(reader, shape, dtype)
    levels = head.levels
    rows, columns = region or (slice(0, shape[0]), slice(0, shape[1]))
    height, width = rows.stop - rows.start, columns.stop - columns.start
    offset = rows.start % head.factors[0], columns.start % head.factors[1]
    rows = slice(rows.start // head.factors[0], -(-rows.stop // head.factors[0]))
    columns = slice(columns.start // head.factors[1], -(-columns.stop // head.factors[1]))
    region = rows, columns
    wanted = [
        (group, cell, stream)
        for (group, cell), stream in zip(parts, streams, strict=True)
        if touches(cell, region)
    ]
    result = np.empty((rows.stop - rows.start, columns.stop - columns.start, len(levels)), dtype)

    def decode(part: tuple[_Group, Region, bytes]) -> None:
        group, cell, stream = part
        size = group.width, cell[0].stop - cell[0].start, cell[1].stop - cell[1].start
        if len(stream) == np.prod(size) * dtype.itemsize:  # stored as it is
            own = np.frombuffer(stream, _raw(dtype)).reshape(*size[1:], size[0])
        else:
            planes = decode_planes(model, stream, size, top=group.top, mode=head.mode)
            own = _channels_of(planes)
        values = _levelled(own, group, levels)
        here, there = overlap(cell, region)
        result[(*there, slice(group.first, group.first + group.width))] = values[here]

    each(decode, wanted, workers)
    if head.factors != (1, 1):
        size = offset[0] + height, offset[1] + width
        result = enlarge(result, head.factors, size)[offset[0] :, offset[1] :]
    return result.reshape(height, width, *shape[2:])


def photograph_parts(
    shape: tuple[int, ...], dtype: np.dtype, reader: Reader
) -> tuple[Mode, list[int]]:
    r"""Reads the mode of a payload, and the sizes of its streams.

    Arguments:
        shape: The shape of the image.
        dtype: The dtype of the image.
        reader: The payload.

    Raises:
        StreamError: If it is not the payload of an image.
    """
    head, _, streams = _read(reader, shape, dtype)
    return head.mode, [len(stream) for stream in streams]


def photograph_lengths(
    model: PhotographModel, array: np.ndarray, *, mode: Mode = "fast", workers: int | None = None
) -> np.ndarray:
    r"""Computes how many bits each number of an image takes.

    The second and third colour take those of their differences from green. Repeated pixels take
    none.

    Arguments:
        model: The model.
        array: The image, as :func:`probnets.coding.images.as_array` returns it.
        mode: The mode.
        workers: The number of threads, by default as many as PyTorch uses.

    Returns:
        The bits, float64 with shape :math:`(H, W, C)`.
    """
    channels, factors = _single(array)
    result = np.zeros((*array.shape[:2], channels.shape[2]), np.float64)
    own = result[:: factors[0], :: factors[1]]
    channels, levels = _number(channels, array.dtype)

    def measure(part: tuple[_Group, Region]) -> None:
        group, (rows, columns) = part
        numbers = channels[rows, columns, group.first : group.first + group.width]
        bits = measure_planes(model, _planes(numbers), top=group.top, mode=mode)
        if bits.sum(dtype=np.float64) >= 8 * numbers.nbytes:  # stored as it is
            bits[...] = 8 * numbers.itemsize
        order = (1, 0, 2) if group.width == 3 else (0,)
        for plane, channel in enumerate(order):
            own[rows, columns, group.first + channel] = bits[plane]

    each(measure, _parts(_groups(array.dtype, levels), channels.shape), workers)
    return result


# ----------------------------------------------------------------------------------------------
# Channels and planes


def _channel_count(shape: Sequence[int], dtype: np.dtype) -> int:
    if len(shape) not in (2, 3) or not 1 <= math.prod(shape[2:]) <= 4:
        raise StreamError(f"expected an image, got {dtype} with shape {tuple(shape)}")
    return math.prod(shape[2:])


def _values(dtype: np.dtype) -> int:
    r"""Returns the number of levels of a dtype."""
    return 2 if dtype == np.bool_ else 1 << 8 * dtype.itemsize


def _raw(dtype: np.dtype) -> np.dtype:
    r"""Returns the dtype of numbers that are stored as they are."""
    return np.dtype(np.uint8) if dtype == np.bool_ else dtype.newbyteorder("<")


def _single(array: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    r"""Returns the channels without repeated pixels, with shape (H, W, C), and the factors."""
    channels = array.reshape(*array.shape[:2], -1)
    channels = channels.view(np.uint8) if array.dtype == np.bool_ else channels
    factors = repetition(channels)
    return channels[:: factors[0], :: factors[1]], factors


def _number(channels: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, list[Levels | None]]:
    r"""Numbers the used levels of each channel, where it pays."""
    count = _values(dtype)
    levels = [used_levels(channels[..., c], count) for c in range(channels.shape[2])]
    if all(level is None for level in levels):
        return channels, levels
    channels = channels.copy()
    for c, level in enumerate(levels):
        if level is not None:
            numbers = np.zeros(count, channels.dtype)
            numbers[level.values] = np.arange(len(level.values))
            channels[..., c] = numbers[channels[..., c]]
    return channels, levels


def _groups(dtype: np.dtype, levels: Sequence[Levels | None]) -> list[_Group]:
    count = len(levels)
    most = [_values(dtype) - 1 if level is None else len(level.values) - 1 for level in levels]
    widths = [3] + [1] * (count - 3) if count >= 3 else [1] * count
    starts = [0, *range(3, count)] if count >= 3 else list(range(count))
    return [
        _Group(start, width, max(most[start : start + width]))
        for start, width in zip(starts, widths, strict=True)
    ]


def _parts(groups: Sequence[_Group], shape: Sequence[int]) -> list[tuple[_Group, Region]]:
    return [(group, cell) for cell in cells(shape[0], shape[1]) for group in groups]


def _planes(channels: np.ndarray) -> np.ndarray:
    r"""Returns the planes of the channels of a group, with shape (P, H, W)."""
    if channels.shape[2] == 3:
        return colour_planes(channels)
    return channels[None, ..., 0].astype(np.int32)


def _channels_of(planes: np.ndarray) -> np.ndarray:
    r"""Returns the channels of the planes of a group, with shape (H, W, P)."""
    return plane_colours(planes) if len(planes) == 3 else planes[0][..., None]


def _levelled(channels: np.ndarray, group: _Group, levels: Sequence[Levels | None]) -> np.ndarray:
    r"""Returns the levels of the image that the channels of a group number."""
    if channels.max() > group.top:
        raise StreamError(f"expected values up to {group.top}, got {channels.max()}")
    result = []
    for channel, level in zip(np.moveaxis(channels, 2, 0), levels[group.first :], strict=False):
        if level is not None and channel.max() >= len(level.values):
            raise StreamError("expected levels of the image, got others; it is damaged")
        result.append(channel if level is None else level.values[channel])
    return np.stack(result, axis=2)


# ----------------------------------------------------------------------------------------------
# The head of a payload


class _Head(NamedTuple):
    r"""Is what stands before the index: mode, enlargement, and levels of the channels."""

    mode: Mode
    factors: tuple[int, int]
    levels: list[Levels | None]


def _head(mode: Mode, factors: tuple[int, int], levels: Sequence[Levels | None]) -> bytes:
    named, repeated = any(level is not None for level in levels), factors != (1, 1)
    flags = _SLOW * (mode == "slow") | _LEVELS * named | _REPEATED * repeated
    parts = [bytes([flags]), bytes(factors) if repeated else b""]
    for level in levels if named else ():
        data = b"" if level is None else level.packed
        parts += varint(len(data)), data
    return b"".join(parts)


def _read(
    reader: Reader, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[_Head, list[tuple[_Group, Region]], list[bytes]]:
    r"""Takes a payload apart: its head, the parts of the image and their streams."""
    flags = reader.take(1)[0]
    if flags > (_SLOW | _LEVELS | _REPEATED):
        raise StreamError(f"expected a known kind of payload, got {flags}; it is damaged")
    count = _channel_count(shape, dtype)
    down, across = reader.take(2) if flags & _REPEATED else (1, 1)
    sound = 1 <= down <= shape[0] and 1 <= across <= shape[1]
    if not sound or (flags & _REPEATED and max(down, across) == 1):
        raise StreamError(
            f"expected factors of an enlargement to {tuple(shape)}, got {down} and {across}"
        )
    size = -(-shape[0] // down), -(-shape[1] // across)
    levels: list[Levels | None] = [None] * count
    for channel in range(count) if flags & _LEVELS else ():
        if length := reader.varint():
            packed = reader.take(length)
            levels[channel] = Levels(unpack_levels(packed, _values(dtype)), packed)
    head = _Head("slow" if flags & _SLOW else "fast", (down, across), levels)

    groups = _groups(dtype, levels)
    reader.check(cell_count(*size) * len(groups))
    parts = _parts(groups, size)
    streams = [reader.take(n) for n in reader.index(len(parts))]
    reader.end()
    return head, parts, streams
