r"""What image files say beside their pixels: colour profiles, EXIF and the like.

====== ==========================================================
number note
====== ==========================================================
1      ICC profile, its bytes
2      EXIF, its bytes from ``II`` or ``MM`` on
3      XMP, its bytes
4      gamma, and
5      chromaticities, as PNG has them: multiples of 1/100000 in big-endian words
6      sRGB rendering intent, a byte
7      dots per inch, two little-endian doubles
8      texts: keyword, text, keyword and so on, each with its length before it
====== ==========================================================

A note is its number, its length as a variable-length integer and its bytes. They come in this
order, compressed with zlib. These bytes, unlike those of pixels, may differ between versions of
zlib, but not in what they decompress to.
"""

__all__ = ["Notes", "notes_of", "pack_notes", "read_notes", "unpack_notes"]

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image

from .errors import StreamError
from .stream import Reader, open_stream, varint

MOST = 1 << 24  # bytes of all notes of an image, a guard against zlib bombs

_UNIT = 100_000
_EXIF_HEAD = b"Exif\0\0"
_XMP_KEY = "XML:com.adobe.xmp"
_DESCRIPTIVE = (  # tags of a TIFF file that tell of the photograph, not of how it is stored
    *(ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model),
    *(ExifTags.Base.Orientation, ExifTags.Base.Software, ExifTags.Base.DateTime),
    *(ExifTags.Base.Artist, ExifTags.Base.HostComputer, ExifTags.Base.Copyright),
)


@dataclass(frozen=True)
class Notes:
    r"""Creates the notes of an image.

    Arguments:
        profile: The ICC profile of its colours.
        exif: EXIF from the byte order mark on, without the `Exif` before it that JPEG has.
        xmp: XMP, an XML document.
        gamma: The exponent of the PNG chunk ``gAMA``.
        chromaticity: The eight numbers of the PNG chunk ``cHRM``: white, red, green, blue.
        intent: The rendering intent of the PNG chunk ``sRGB``.
        dpi: The dots per inch, horizontal and vertical.
        text: Keywords and texts.

    Raises:
        ValueError: If a number is out of range, or if the notes hold more than 16 MiB.

    Example:
        >>> notes = Notes(gamma=0.45455, text=(("Author", "A. N. Other"),))
        >>> bool(notes), bool(Notes())
        (True, False)
        >>> notes.orientation
        1
    """

    profile: bytes = b""
    exif: bytes = b""
    xmp: bytes = b""
    gamma: float | None = None
    chromaticity: tuple[float, ...] = ()
    intent: int | None = None
    dpi: tuple[float, float] | None = None
    text: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        numbers = (*self.chromaticity, *([] if self.gamma is None else [self.gamma]))
        if len(self.chromaticity) not in (0, 8) or not all(_is_short(x) for x in numbers):
            raise ValueError(
                "expected gamma and eight chromaticities in [0, 42949], got "
                f"{self.gamma} and {self.chromaticity}"
            )
        if self.intent is not None and not 0 <= self.intent < 256:
            raise ValueError(f"expected an intent of one byte, got {self.intent}")
        if self.dpi is not None and not all(math.isfinite(x) and x > 0 for x in self.dpi):
            raise ValueError(f"expected positive dots per inch, got {self.dpi}")
        if (size := len(_plain(self))) > MOST:
            raise ValueError(f"expected notes of at most {MOST:,} bytes, got {size:,}")

    def __bool__(self) -> bool:
        return bool(_plain(self))

    @property
    def orientation(self) -> int:
        r"""How the pixels lie by EXIF, from 1 to 8, where 1 is upright."""
        return _orientation(self.exif)

    @property
    def profile_name(self) -> str:
        r"""The name that the ICC profile has for people, empty if it has none."""
        return _profile_name(self.profile)


def pack_notes(notes: Notes) -> bytes:
    r"""Returns notes as the bytes that a stream holds, none if there are no notes.

    Arguments:
        notes: The notes.
    """
    plain = _plain(notes)
    return zlib.compress(plain, 9) if plain else b""


def unpack_notes(data: bytes) -> Notes:
    r"""Restores notes, the inverse of :func:`pack_notes`, in no more memory than notes may take.

    Arguments:
        data: The bytes of a stream.

    Raises:
        StreamError: If these are not the bytes of notes.
    """
    if not data:
        return Notes()
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, MOST + 1)
        if len(plain) > MOST or not inflater.eof or inflater.unused_data:
            raise ValueError(f"they do not end where they should, within {MOST:,} bytes")
        notes = _parsed(plain)
        if not plain or _plain(notes) != plain:
            raise ValueError("they are not in the form that is written")
    except (ValueError, struct.error, zlib.error) as error:
        raise StreamError(f"expected sound notes: {error}; they are damaged") from None
    return notes


def read_notes(blob: bytes) -> Notes:
    r"""Reads the notes of a compressed image, whatever model compressed it.

    Arguments:
        blob: The stream.

    Returns:
        The notes, empty ones if the stream has none.

    Raises:
        TypeError: If the stream is not made of bytes.
        StreamError: If it is not a sound stream.

    Example:
        >>> import numpy as np
        >>> from probnets.coding import compress
        >>> img = np.zeros((4, 6), dtype=np.uint8)
        >>> read_notes(compress(img, notes=Notes(dpi=(300.0, 300.0)))).dpi
        (300.0, 300.0)
    """
    header, _ = open_stream(blob, limit=2**2048)  # nothing is decoded that could be too large
    return unpack_notes(header.notes)


def notes_of(img: Image.Image) -> Notes:
    r"""Collects the notes of a PIL image that is loaded.

    Arguments:
        img: The image.

    Raises:
        ValueError: If the notes hold more than 16 MiB.
    """
    info = img.info
    texts = [(k, str(v)) for k, v in getattr(img, "text", {}).items() if k != _XMP_KEY]
    if isinstance(comment := info.get("comment"), bytes | str):
        texts.append(("Comment", comment if isinstance(comment, str) else _decoded(comment)))
    gamma, chromaticity, intent = (info.get(k) for k in ("gamma", "chromaticity", "srgb"))
    if not isinstance(chromaticity, tuple) or len(chromaticity) != 8:
        chromaticity = ()
    return Notes(
        profile=_bytes(info.get("icc_profile")),
        exif=_exif(img),
        xmp=_bytes(info.get("xmp")),
        gamma=gamma if isinstance(gamma, float) and _is_short(gamma) else None,
        chromaticity=chromaticity if all(map(_is_short, chromaticity)) else (),
        intent=intent if isinstance(intent, int) else None,
        dpi=_dpi(info.get("dpi")),
        text=tuple(texts),
    )


def _plain(notes: Notes) -> bytes:
    r"""Returns notes as bytes that are not compressed."""
    fields = (
        notes.profile,
        notes.exif,
        notes.xmp,
        b"" if notes.gamma is None else _words([notes.gamma]),
        _words(notes.chromaticity),
        b"" if notes.intent is None else bytes([notes.intent]),
        b"" if notes.dpi is None else struct.pack("<2d", *notes.dpi),
        b"".join(_sized(part.encode("utf-8")) for pair in notes.text for part in pair),
    )
    return b"".join(bytes([n]) + _sized(part) for n, part in enumerate(fields, 1) if part)


def _parsed(plain: bytes) -> Notes:
    reader, fields = Reader(plain), {}
    while reader.left:
        number = reader.take(1)[0]
        fields[number] = reader.take(reader.varint())
    gamma, chromaticity = (
        [word / _UNIT for word in struct.unpack(f">{len(data) // 4}I", data)]
        for data in (fields.get(4, b""), fields.get(5, b""))
    )
    texts, parts = Reader(fields.get(8, b"")), []
    while texts.left:
        parts.append(texts.take(texts.varint()).decode("utf-8"))
    return Notes(
        profile=fields.get(1, b""),
        exif=fields.get(2, b""),
        xmp=fields.get(3, b""),
        gamma=gamma[0] if gamma else None,
        chromaticity=tuple(chromaticity),
        intent=fields[6][0] if fields.get(6) else None,
        dpi=struct.unpack("<2d", fields[7]) if fields.get(7) else None,
        text=tuple(zip(parts[::2], parts[1::2], strict=True)),
    )


def _words(numbers: Sequence[float]) -> bytes:
    return struct.pack(f">{len(numbers)}I", *(round(x * _UNIT) for x in numbers))


def _is_short(number: float) -> bool:
    return 0 <= number * _UNIT < 2**32 - 1


def _sized(part: bytes) -> bytes:
    return varint(len(part)) + part


def _bytes(value: object) -> bytes:
    r"""Takes bytes for what they are, text for its UTF-8, and all else for nothing."""
    if isinstance(value, str):
        return value.encode("utf-8")
    return bytes(value) if isinstance(value, bytes | bytearray) else b""


def _decoded(comment: bytes) -> str:
    try:
        return comment.decode("utf-8")
    except UnicodeDecodeError:
        return comment.decode("latin-1")


def _dpi(value: Any) -> tuple[float, float] | None:  # noqa: ANN401
    r"""Returns dots per inch, unless they are none or 1, PIL's word for a TIFF without."""
    try:
        x, y = map(float, value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    sound = all(math.isfinite(side) and side > 0 for side in (x, y))
    return (x, y) if sound and (x, y) != (1.0, 1.0) else None


def _exif(img: Image.Image) -> bytes:
    r"""Returns the EXIF of a file as it is, or what a TIFF file has in its place."""
    if "exif" in img.info:
        return _bytes(img.info["exif"]).removeprefix(_EXIF_HEAD)
    if not hasattr(img, "tag_v2"):
        return b""
    found, kept = img.getexif(), Image.Exif()
    for tag in _DESCRIPTIVE:
        if tag in found:
            kept[tag] = found[tag]
    for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if tags := found.get_ifd(ifd):
            kept[ifd] = dict(tags)
    return kept.tobytes().removeprefix(_EXIF_HEAD) if len(kept) else b""


def _orientation(exif: bytes) -> int:
    r"""Finds the tag 0x0112 in the first directory, whatever else is damaged."""
    order = "big" if exif[:2] == b"MM" else "little"
    start = int.from_bytes(exif[4:8], order)
    for n in range(int.from_bytes(exif[start : start + 2], order)):
        entry = exif[start + 2 + 12 * n : start + 14 + 12 * n]
        if len(entry) < 12:
            break
        if int.from_bytes(entry[:2], order) == ExifTags.Base.Orientation:
            value = int.from_bytes(entry[8:10], order)
            return value if 1 <= value <= 8 else 1
    return 1


def _profile_name(profile: bytes) -> str:
    r"""Finds the tag `desc`, which is ASCII in version 2 and UTF-16 in version 4."""

    def number(place: int) -> int:
        return int.from_bytes(profile[place : place + 4], "big")

    for n in range(min(number(128), 100)):
        entry = 132 + 12 * n
        if profile[entry : entry + 4] != b"desc":
            continue
        start = number(entry + 4)
        if profile[start : start + 4] == b"mluc":
            length, offset = number(start + 20), number(start + 24)
            name = profile[start + offset :][:length].decode("utf-16-be", "replace")
        else:
            name = profile[start + 12 :][: number(start + 8)].decode("latin-1")
        return " ".join(name.replace("\0", " ").split())
    return ""
