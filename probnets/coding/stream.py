r"""The container of compressed images: what stands around the payload.

====== ==========================================================
bytes  meaning
====== ==========================================================
3      magic, ``9D 50 4E``
1      version: 2 if there are notes, else 1
4      digest of the model
1      kind: dtype, dimensions, whether it is a batch
n      shape, variable-length integers
n      in version 2: the length of the notes, and the notes
n      payload
4      CRC-32 of all that stands before, little-endian
====== ==========================================================

A variable-length integer has seven bits a byte, the lowest first, and the high bit says that
more follow. What the notes hold is told in :mod:`probnets.coding.notes`.
"""

__all__ = ["Header", "Reader", "index", "open_stream", "seal", "varint"]

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import StreamError

MAGIC = b"\x9dPN"
PLAIN, NOTED = 1, 2  # the versions
DTYPES = ("bool", "uint8", "uint16")


@dataclass(frozen=True)
class Header:
    r"""Creates the header of a stream.

    Arguments:
        digest: The digest of the model, four bytes.
        dtype: The dtype of the image: bool, uint8 or uint16.
        shape: The shape of the image, or of all images together for a batch.
        batch: Whether the stream holds a batch of images.
        notes: The packed notes of an image, empty if it has none. A batch has none.
    """

    digest: bytes
    dtype: np.dtype
    shape: tuple[int, ...]
    batch: bool = False
    notes: bytes = b""

    def pack(self) -> bytes:
        r"""Returns the bytes of the header."""
        if len(self.shape) > 31:
            raise ValueError(f"expected at most 31 axes, got {len(self.shape)}")
        kind = DTYPES.index(self.dtype.name) | len(self.shape) << 2 | self.batch << 7
        sizes = b"".join(varint(n) for n in self.shape)
        version = bytes([NOTED if self.notes else PLAIN])
        notes = varint(len(self.notes)) + self.notes if self.notes else b""
        return MAGIC + version + self.digest + bytes([kind]) + sizes + notes

    @property
    def size(self) -> int:
        r"""The number of numbers in the image."""
        return math.prod(self.shape)


def seal(header: Header, payload: bytes) -> bytes:
    r"""Joins header, payload and checksum.

    Arguments:
        header: The header.
        payload: The payload.
    """
    body = header.pack() + payload
    return body + struct.pack("<I", zlib.crc32(body))


def open_stream(blob: bytes, *, limit: int | None = None) -> tuple[Header, "Reader"]:
    r"""Checks a stream and reads its header.

    Arguments:
        blob: The stream.
        limit: The largest size of an image that is accepted. By default it is 2^16 numbers for
            each byte of the stream, or 2^28 numbers if that is more, as large images may be blank.

    Returns:
        The header, and a reader of the payload.

    Raises:
        TypeError: If it is not made of bytes.
        StreamError: If it is not a sound stream.
    """
    if not isinstance(blob, (bytes, bytearray, memoryview)):
        raise TypeError(f"expected bytes, got {type(blob).__name__}; read the file first")
    blob = bytes(blob)
    if blob[:3] != MAGIC[: len(blob[:3])] or not blob:
        raise StreamError("expected a probnets stream, got foreign bytes")
    if len(blob) < 14:
        raise StreamError(f"expected a stream of 14 bytes or more, got {len(blob)}; it is cut off")
    if blob[3] not in (PLAIN, NOTED):
        raise StreamError(
            f"expected a stream of version {PLAIN} or {NOTED}, got version {blob[3]}; it is "
            "damaged, or a newer probnets wrote it"
        )
    if struct.unpack("<I", blob[-4:])[0] != zlib.crc32(blob[:-4]):
        raise StreamError("expected a stream with a matching checksum; it is damaged or cut off")

    reader = Reader(blob[4:-4])
    digest, kind = reader.take(4), reader.take(1)[0]
    if kind & 3 >= len(DTYPES):
        raise StreamError(f"expected a known dtype, got number {kind & 3}")
    dimensions = kind >> 2 & 31
    shape = tuple(reader.varint() for _ in range(dimensions))
    notes = reader.take(reader.varint()) if blob[3] == NOTED else b""
    header = Header(digest, np.dtype(DTYPES[kind & 3]), shape, bool(kind >> 7), notes)
    if blob[3] == NOTED and (header.batch or not notes):
        raise StreamError("expected notes of one image in a stream of version 2, got none")
    if dimensions == 0 or header.size == 0:
        raise StreamError(f"expected an image with pixels, got shape {shape}")
    limit = max(2**28, len(blob) << 16) if limit is None else limit
    if header.size > limit:
        raise StreamError(
            f"expected an image of at most {limit} numbers, got shape {shape}; raise the limit if "
            "you trust the source"
        )
    return header, reader


class Reader:
    r"""Creates a reader of bytes that never reads past their end.

    Arguments:
        data: The bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        r"""The number of bytes that are left."""
        return len(self._data) - self._position

    def take(self, count: int) -> bytes:
        r"""Reads so many bytes."""
        if count > self.left:
            raise StreamError(f"expected {count} more bytes, got {self.left}; it is damaged")
        self._position += count
        return self._data[self._position - count : self._position]

    def varint(self) -> int:
        r"""Reads a variable-length integer, in its shortest form and below :math:`2^{63}`."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                if byte == 0 and shift:
                    raise StreamError("expected integers in their shortest form; it is damaged")
                return value
        raise StreamError("expected integers below 2^63; it is damaged")

    def check(self, count: int) -> None:
        r"""Raises ``StreamError`` unless an index of so many streams could follow."""
        if count > self.left:
            raise StreamError(f"expected an index of {count} streams, got {self.left} bytes")

    def index(self, count: int) -> list[int]:
        r"""Reads the lengths of so many streams, which the bytes that are left must hold."""
        self.check(count)
        lengths = [self.varint() for _ in range(count)]
        if sum(lengths) > self.left:
            raise StreamError(f"expected {sum(lengths)} more bytes, got {self.left}")
        return lengths

    def end(self) -> None:
        r"""Raises ``StreamError`` if bytes are left."""
        if self.left:
            raise StreamError(f"expected the end of the stream, got {self.left} more bytes")


def varint(value: int) -> bytes:
    r"""Returns the bytes of a variable-length integer.

    Arguments:
        value: The integer, not negative.

    Example:
        >>> varint(300).hex()
        'ac02'
    """
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def index(streams: Sequence[bytes]) -> bytes:
    r"""Returns the lengths of streams as variable-length integers.

    Arguments:
        streams: The streams.
    """
    return b"".join(varint(len(stream)) for stream in streams)
