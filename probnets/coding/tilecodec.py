r"""Coding an image of any size as tiles of residuals."""

__all__ = ["decode_tiles", "encode_tiles"]

import math

import numpy as np

from .codec import GROUP, decode_rows, encode_rows
from .errors import StreamError
from .images import group_widths, join_planes, split_planes
from .models import ImageModel
from .stream import Reader, index
from .tiles import TileClass, cut, paste, tile_classes
from .transforms import forward, inverse

_RAW, _CODED = 0, 1
_STEP = 16 * GROUP  # tiles that are decoded at a time

Coded = list[tuple[TileClass, list[bytes]]]


def encode_tiles(model: ImageModel, array: np.ndarray, *, workers: int | None = None) -> bytes:
    r"""Codes the groups of planes of an image one after the other.

    Each group is raw or coded, whichever is shorter, and a byte tells which. A coded group has,
    for each class of tiles, an index of its chained streams and the streams.

    Arguments:
        model: A model of tiles.
        array: The image.
        workers: The number of threads.
    """
    out = []
    for planes in split_planes(array):
        symbols = forward(planes)
        parts = []
        for cls in tile_classes(*array.shape[:2], tile=_side(model)):
            tiles = cut(symbols, cls)
            rows = np.zeros((len(tiles), *model.shape), dtype=np.uint16)
            rows[..., : tiles.shape[-1]] = tiles
            streams = encode_rows(
                model.tables,
                rows.reshape(len(rows), -1),
                present=_present(model, cls, tiles.shape[-1]),
                chained=True,
                workers=workers,
            )
            parts += [index(streams), *streams]
        coded = b"".join(parts)
        # Noise, say the low bytes of 16 bits, is not worth coding.
        if len(coded) < planes.size:
            out += [bytes([_CODED]), coded]
        else:
            out += [bytes([_RAW]), planes.tobytes()]
    return b"".join(out)


def decode_tiles(
    model: ImageModel,
    shape: tuple[int, ...],
    dtype: np.dtype,
    reader: Reader,
    *,
    workers: int | None = None,
) -> np.ndarray:
    r"""Restores the image that a payload holds and ends with.

    The payload is taken apart before anything is decoded or made room for, and must hold a
    byte of index for each 256 tiles that the shape claims.

    Arguments:
        model: The model of tiles.
        shape: The shape of the image.
        dtype: The dtype of the image.
        reader: The payload.
        workers: The number of threads.

    Raises:
        StreamError: If it is not the payload of an image.
    """
    try:
        widths = group_widths(shape, dtype)
    except (TypeError, ValueError) as error:
        raise StreamError(f"expected an image: {error}") from None
    parts = [_read_group(model, (*shape[:2], width), reader) for width in widths]
    reader.end()

    groups = [
        part
        if isinstance(part, np.ndarray)
        else _decode_group(model, (*shape[:2], width), part, workers)
        for part, width in zip(parts, widths, strict=True)
    ]
    try:
        return join_planes(groups, shape, dtype)
    except ValueError as error:
        raise StreamError(f"expected values of {dtype}: {error}") from None


def _read_group(model: ImageModel, shape: tuple[int, ...], reader: Reader) -> np.ndarray | Coded:
    r"""Reads the planes of a group, or the streams that code them."""
    how = reader.take(1)[0]
    if how == _RAW:
        return np.frombuffer(reader.take(math.prod(shape)), np.uint8).reshape(shape)
    if how != _CODED:
        raise StreamError(f"expected planes raw or coded, got {how}; it is damaged")
    return [
        (cls, [reader.take(n) for n in reader.index(-(-cls.total // GROUP))])
        for cls in tile_classes(*shape[:2], tile=_side(model))
    ]


def _decode_group(
    model: ImageModel, shape: tuple[int, ...], coded: Coded, workers: int | None
) -> np.ndarray:
    r"""Decodes the planes of a group."""
    channels = shape[2]
    symbols = np.zeros(shape, dtype=np.int16)
    for cls, streams in coded:
        present = _present(model, cls, channels)
        tiles = np.empty((cls.total, *cls.mask.shape, channels), dtype=np.int16)
        for start in range(0, cls.total, _STEP):
            part = tiles[start : start + _STEP]
            rows = decode_rows(
                model.tables,
                streams[start // GROUP : (start + _STEP) // GROUP],
                len(part),
                present=present,
                chained=True,
                workers=workers,
            )
            part[...] = rows.reshape(-1, *model.shape)[..., :channels]
        paste(symbols, cls, tiles)
    try:
        return inverse(symbols)
    except ValueError as error:
        raise StreamError(f"expected residuals of an image: {error}") from None


def _side(model: ImageModel) -> tuple[int, int]:
    height, width, _ = model.shape
    return height, width


def _present(model: ImageModel, cls: TileClass, channels: int) -> np.ndarray:
    r"""Tells which variables of a tile are coded, with shape :math:`(D,)`."""
    present = np.zeros(model.shape, dtype=np.bool_)
    present[..., :channels] = cls.mask[..., None]
    return present.ravel()
