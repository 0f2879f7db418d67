r"""Coding an image of any size as quad trees of residuals."""

__all__ = ["decode_trees", "encode_trees", "tree_lengths", "tree_parts"]

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from .cells import Region, cell_count, cells, each, overlap, touches
from .errors import StreamError, unsound_stream
from .images import group_widths, join_planes, split_planes
from .rangeloops import (
    canonical_one,
    coder_states,
    finish_one,
    start_decoding_one,
    start_encoding_one,
    stream_capacity,
)
from .stream import Reader, index
from .treeloops import DECODE, ENCODE, MEASURE, compiled_tree
from .treeresiduals import image_residuals, restore_image
from .trees import SHIFT, VALUES, TreeModel, root_level

T = TypeVar("T")


class _Part(NamedTuple):
    r"""Is a group of planes in a cell of an image."""

    group: int
    width: int
    cell: Region

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, columns = self.cell
        return rows.stop - rows.start, columns.stop - columns.start, self.width


def encode_trees(model: TreeModel, array: np.ndarray, *, workers: int | None = None) -> bytes:
    r"""Encodes an image of any size.

    The image is cut into :func:`~probnets.coding.photographs.codec.cells` of about
    :math:`2^{18}` pixels, and the planes of a cell into groups by
    :func:`~probnets.coding.images.split_planes`. Each group of a cell has a tree and a stream of
    its own. It is stored as it is where the stream would not be shorter, which is how to tell
    the two apart. The streams follow their index.

    Arguments:
        model: The model.
        array: The image, as :func:`probnets.coding.images.as_array` returns it.
        workers: The number of threads, by default as many as PyTorch uses. The bytes do not
            depend on it.

    Returns:
        The payload.
    """
    groups, top = split_planes(array), _top(array.dtype)

    def encode(part: _Part) -> bytes:
        planes = np.ascontiguousarray(groups[part.group][part.cell])
        stream = _encode(model, _symbols(planes, top))
        return stream if len(stream) < planes.size else planes.tobytes()

    streams = each(encode, _parts(array.shape, array.dtype), workers)
    return index(streams) + b"".join(streams)


def decode_trees(
    model: TreeModel,
    shape: tuple[int, ...],
    dtype: np.dtype,
    reader: Reader,
    *,
    region: Region | None = None,
    workers: int | None = None,
) -> np.ndarray:
    r"""Restores the image that a payload holds and ends with, or a part of it.

    The payload is taken apart before anything is decoded or made room for, and must hold a byte
    of index for each cell that the shape claims.

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
    parts, streams = _read(shape, dtype, reader)
    region = region or (slice(0, shape[0]), slice(0, shape[1]))
    size = tuple(own.stop - own.start for own in region)
    groups = [np.empty((*size, width), np.uint8) for width in group_widths(shape, dtype)]
    wanted = [work for work in zip(parts, streams, strict=True) if touches(work[0].cell, region)]

    def decode(work: tuple[_Part, bytes]) -> None:
        part, stream = work
        here, there = overlap(part.cell, region)
        planes = _decode_planes(model, stream, part.shape, _top(dtype))
        groups[part.group][there] = planes[here]

    each(decode, wanted, workers)
    try:
        return join_planes(groups, (*size, *shape[2:]), dtype)
    except ValueError as error:
        raise StreamError(f"expected values of {dtype}: {error}") from None


def tree_parts(shape: tuple[int, ...], dtype: np.dtype, reader: Reader) -> list[int]:
    r"""Reads the sizes of the streams of a payload.

    Arguments:
        shape: The shape of the image.
        dtype: The dtype of the image.
        reader: The payload.

    Raises:
        StreamError: If it is not the payload of an image.
    """
    return [len(stream) for stream in _read(shape, dtype, reader)[1]]


def tree_lengths(model: TreeModel, array: np.ndarray, *, workers: int | None = None) -> np.ndarray:
    r"""Computes how many bits each number of an image takes in its stream.

    Red and blue take those of their differences from green. The two bytes of a 16-bit number
    are added up.

    Arguments:
        model: The model.
        array: The image, as :func:`probnets.coding.images.as_array` returns it.
        workers: The number of threads, by default as many as PyTorch uses.

    Returns:
        The bits, float64 with shape :math:`(H, W, C)`, where :math:`C = 1` for :math:`(H, W)`.
    """
    groups, top = split_planes(array), _top(array.dtype)
    result = [np.empty(planes.shape) for planes in groups]

    def measure(part: _Part) -> None:
        planes = np.ascontiguousarray(groups[part.group][part.cell])
        bits = _measure(model, _symbols(planes, top))
        if bits.sum() >= 8 * planes.size:
            bits[...] = 8.0  # it is stored as it is
        result[part.group][part.cell] = bits[..., [1, 0, 2]] if part.width == 3 else bits

    each(measure, _parts(array.shape, array.dtype), workers)
    bits = np.concatenate(result, axis=2)
    if array.dtype == np.uint16:
        high, low = np.split(bits, 2, axis=2)
        return high + low
    return bits


# ----------------------------------------------------------------------------------------------
# Parts of an image


def _parts(shape: Sequence[int], dtype: np.dtype) -> list[_Part]:
    widths = group_widths(shape, dtype)
    return [
        _Part(group, width, cell)
        for cell in cells(shape[0], shape[1])
        for group, width in enumerate(widths)
    ]


def _read(
    shape: tuple[int, ...], dtype: np.dtype, reader: Reader
) -> tuple[list[_Part], list[bytes]]:
    r"""Takes a payload apart."""
    try:
        groups = group_widths(shape, dtype)
    except (TypeError, ValueError) as error:
        raise StreamError(f"expected an image: {error}") from None
    reader.check(cell_count(shape[0], shape[1]) * len(groups))
    parts = _parts(shape, dtype)
    streams = [reader.take(n) for n in reader.index(len(parts))]
    reader.end()
    return parts, streams


def _top(dtype: np.dtype) -> int:
    return 1 if dtype == np.bool_ else 255


def _symbols(planes: np.ndarray, top: int) -> np.ndarray:
    return (image_residuals(planes, top=top) + SHIFT).astype(np.uint16)


def _decode_planes(
    model: TreeModel, stream: bytes, shape: tuple[int, int, int], top: int
) -> np.ndarray:
    size = shape[0] * shape[1] * shape[2]
    if len(stream) > size:
        raise StreamError(f"expected at most {size} bytes of a cell, got {len(stream)}")
    if len(stream) == size:
        return np.frombuffer(stream, np.uint8).reshape(shape)
    return restore_image(_decode(model, stream, shape).astype(np.int16) - SHIFT, top=top)


# ----------------------------------------------------------------------------------------------
# Codes of a tree


def _encode(model: TreeModel, symbols: np.ndarray) -> bytes:
    states, out = coder_states(1), np.empty((1, stream_capacity(symbols.size)), dtype=np.uint8)
    start_encoding_one(states, 0)
    _run(ENCODE, model, symbols, states, out=out)
    return out[0, : finish_one(states, out, 0)].tobytes()


def _decode(model: TreeModel, stream: bytes, shape: tuple[int, ...]) -> np.ndarray:
    states, data = coder_states(1), np.frombuffer(bytearray(stream), np.uint8)
    symbols = np.zeros(shape, dtype=np.uint16)
    start_decoding_one(states, data, 0, 0, data.size)
    _run(DECODE, model, symbols, states, data=data)
    if not canonical_one(states, 0):
        raise unsound_stream()
    return symbols


def _measure(model: TreeModel, symbols: np.ndarray) -> np.ndarray:
    lengths = np.empty(symbols.shape)
    _run(MEASURE, model, symbols, coder_states(1), lengths=lengths)
    return lengths


def _run(
    action: int,
    model: TreeModel,
    symbols: np.ndarray,
    states: np.ndarray,
    *,
    out: np.ndarray | None = None,
    data: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
) -> None:
    r"""Runs the loop over a tree, whose residuals with 255 added have shape (H, W, C)."""
    top, K = root_level(*symbols.shape[:2]), model.units
    messages = [np.empty(n * K) for n in (top + 1, top + 1, 1, 1)]
    compiled_tree(K)(
        action,
        symbols,
        top,
        model.root(top).astype(np.float64),
        *model.matrices,
        model.cumulative.ravel(),
        VALUES,
        29 - (K - 1).bit_length(),
        model.modes,
        *messages,
        np.zeros(top + 1, dtype=np.bool_),
        states,
        np.empty((1, 0), dtype=np.uint8) if out is None else out,
        np.empty(0, dtype=np.uint8) if data is None else data,
        np.empty((0, 0, 0)) if lengths is None else lengths,
    )
