r"""What image files say beside their pixels: colour profiles, EXIF and the like.

====== ===============================================================================
number note
====== ===============================================================================
1      ICC profile, its bytes
2      EXIF, its bytes from ``II`` or ``MM`` on
3      XMP, its bytes
4      gamma, and
5      chromaticities, as PNG has them: multiples of 1/100000 in big-endian words
6      sRGB rendering intent, a byte
7      dots per inch, two little-endian doubles
8      texts: keyword, text, keyword and so on, each with its length before it; no keyword is
       empty, and there are at most 4,096 texts
====== ===============================================================================

A note is its number, its length as a variable-length integer and its bytes. They come in this
order, compressed with zlib. These bytes, unlike those of pixels, may differ between versions of
zlib, but not in what they decompress to.
"""

__all__ = ["Notes", "is_short", "pack_notes", "printable", "read_notes", "unpack_notes"]

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from PIL import ExifTags

from .errors import StreamError
from .stream import Reader, open_stream, varint

MOST = 1 << 24  # bytes of all notes of an image, a guard against zlib bombs
TEXTS = 1 << 12  # texts of an image

_UNIT = 100_000
_LARGEST = (2**32 - 2) / _UNIT
_SIZES = {4: 4, 5: 32, 6: 1, 7: 16}  # bytes of notes that have a size of their own


@dataclass(frozen=True)
class Notes:
    r"""Creates the notes of an image.

    Arguments:
        profile: The ICC profile of its colours.
        exif: EXIF from the byte order mark on, without the `Exif` before it that JPEG has.
        xmp: XMP, an XML document.
        gamma: The exponent of the PNG chunk ``gAMA``, which is rounded to five decimals.
        chromaticity: The eight numbers of the PNG chunk ``cHRM``: white, red, green, blue. They
            are rounded to five decimals.
        intent: The rendering intent of the PNG chunk ``sRGB``.
        dpi: The dots per inch, horizontal and vertical.
        text: Keywords and texts, at most 4,096. No keyword is empty.

    Raises:
        TypeError: If something is of another type.
        ValueError: If a number is out of range, if a keyword is empty, or if the notes hold more
            than 16 MiB.

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
        for name in ("profile", "exif", "xmp"):
            _check(getattr(self, name), bytes, f"{name} as bytes", "pass what its file holds")
        if self.gamma is not None:
            object.__setattr__(self, "gamma", *_rounded("gamma", (self.gamma,)))
        chromaticity = _rounded("chromaticity", self.chromaticity, (0, 8))
        object.__setattr__(self, "chromaticity", chromaticity)
        if self.intent is not None:
            _check(self.intent, int, "intent as an integer", "pass one from 0 to 255, or None")
            if not 0 <= self.intent < 256:
                raise ValueError("expected an intent from 0 to 255, got one beyond; pass None")
        if self.dpi is not None:
            dpi = _floats("dpi", self.dpi, (2,))
            if not all(math.isfinite(x) and x > 0 for x in dpi):
                raise ValueError(
                    f"expected positive dots per inch, got {dpi}; pass None if they are not known"
                )
            object.__setattr__(self, "dpi", dpi)
        _check_texts(self.text)
        try:
            size = sum(map(len, _pieces(self)))
        except UnicodeEncodeError:
            raise ValueError(
                "expected texts that UTF-8 can hold, got one with half of a surrogate pair; drop "
                "it with text.encode('utf-8', 'ignore').decode()"
            ) from None
        if size > MOST:
            raise ValueError(
                f"expected notes of at most {MOST:,} bytes, got {size:,}; keep fewer of them, or "
                "the pixels alone"
            )

    def __bool__(self) -> bool:
        return any((self.profile, self.exif, self.xmp, self.chromaticity, self.text)) or any(
            number is not None for number in (self.gamma, self.intent, self.dpi)
        )

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

    Raises:
        TypeError: If these are no notes.
    """
    _check(notes, Notes, "notes as probnets.coding.Notes", "pass Notes(...), or None")
    return zlib.compress(b"".join(_pieces(notes)), 9) if notes else b""


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
        if not plain:
            raise ValueError("there are none")
        return _parsed(plain)
    except (ValueError, zlib.error) as error:
        raise StreamError(f"expected sound notes: {error}; they are damaged") from None


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


def printable(text: str, most: int = 60) -> str:
    r"""Returns a text of unknown origin as one short line that a terminal shows as it is.

    Arguments:
        text: The text.
        most: The length from which on it is cut.

    Example:
        >>> printable("two\n\x1b[31mlines")
        'two [31mlines'
        >>> printable("a long line", 6)
        'a long...'
    """
    start = "".join(c if c.isprintable() else " " for c in text[: 4 * most])
    line = " ".join(start.split())
    return line if len(line) <= most else f"{line[:most].rstrip()}..."


def is_short(number: float) -> bool:
    r"""Tells whether PNG can hold a number as a multiple of 1/100000."""
    return 0 <= number <= _LARGEST


def _pieces(notes: Notes) -> list[bytes]:
    r"""Returns notes as bytes that are not compressed, in pieces that are not joined yet."""
    texts = [part.encode("utf-8") for pair in notes.text for part in pair]
    fields = (
        [notes.profile],
        [notes.exif],
        [notes.xmp],
        [] if notes.gamma is None else [_words([notes.gamma])],
        [_words(notes.chromaticity)],
        [] if notes.intent is None else [bytes([notes.intent])],
        [] if notes.dpi is None else [struct.pack("<2d", *notes.dpi)],
        [piece for text in texts for piece in (varint(len(text)), text)],
    )
    pieces = []
    for number, field in enumerate(fields, 1):
        if size := sum(map(len, field)):
            pieces += [bytes([number]), varint(size), *field]
    return pieces


def _parsed(plain: bytes) -> Notes:
    r"""Restores notes, whose pieces are these bytes, or raises ``ValueError``."""
    reader, fields, last = Reader(plain), {}, 0
    texts: tuple[tuple[str, str], ...] = ()
    while reader.left:
        number, size = reader.take(1)[0], reader.varint()
        if not last < number <= 8 or not size or size != _SIZES.get(number, size):
            raise ValueError(f"note {number} of {size} bytes is not in the form that is written")
        last = number
        if number == 8:
            texts = _read_texts(reader, size)
        else:
            fields[number] = reader.take(size)
    gamma, chromaticity = (
        tuple(word / _UNIT for word in struct.unpack(f">{len(data) // 4}I", data))
        for data in (fields.get(4, b""), fields.get(5, b""))
    )
    return Notes(
        profile=fields.get(1, b""),
        exif=fields.get(2, b""),
        xmp=fields.get(3, b""),
        gamma=gamma[0] if gamma else None,
        chromaticity=chromaticity,
        intent=fields[6][0] if 6 in fields else None,
        dpi=struct.unpack("<2d", fields[7]) if 7 in fields else None,
        text=texts,
    )


def _read_texts(reader: Reader, size: int) -> tuple[tuple[str, str], ...]:
    r"""Reads keywords and texts that take so many bytes."""
    end, texts = reader.left - size, []
    while reader.left > max(end, 0) and len(texts) <= TEXTS:
        key = reader.take(reader.varint()).decode("utf-8")
        texts.append((key, reader.take(reader.varint()).decode("utf-8")))
    _check_texts(tuple(texts))
    if reader.left != end:
        raise ValueError("its texts do not end where they should")
    return tuple(texts)


def _check(value: object, kind: type, expected: str, remedy: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"expected {expected}, got {type(value).__name__}; {remedy}")


def _check_texts(texts: object) -> None:
    _check(texts, tuple, "text as a tuple of pairs", "pass ((keyword, text), ...)")
    assert isinstance(texts, tuple)
    if len(texts) > TEXTS:
        raise ValueError(f"expected at most {TEXTS:,} texts, got {len(texts):,}; keep fewer")
    for pair in texts:
        if not (isinstance(pair, tuple) and [isinstance(x, str) for x in pair] == [True, True]):
            kinds = type(pair).__name__
            if isinstance(pair, tuple):
                kinds = f"{len(pair)} of {', '.join(sorted({type(x).__name__ for x in pair}))}"
            raise TypeError(
                f"expected a keyword and a text, two strings, got {kinds}; pass ((keyword, text), "
                "...)"
            )
        if not pair[0]:
            raise ValueError("expected a keyword for each text, got an empty one; name the text")


def _floats(name: str, numbers: object, counts: Sequence[int]) -> tuple[float, ...]:
    r"""Returns real numbers as floats, not a number where they are none or too large."""
    remedy = f"pass a tuple of {counts[-1]} numbers"
    _check(numbers, tuple, f"{name} as a tuple of numbers", remedy)
    assert isinstance(numbers, tuple)
    if len(numbers) not in counts:
        raise ValueError(f"expected {counts[-1]} numbers for {name}, got {len(numbers):,}")
    floats = []
    for number in numbers:
        _check(number, Real, f"{name} in real numbers", remedy)
        try:
            floats.append(float(number))
        except (ArithmeticError, ValueError):
            floats.append(math.nan)
    return tuple(floats)


def _rounded(name: str, numbers: object, counts: Sequence[int] = (1,)) -> tuple[float, ...]:
    r"""Returns real numbers as the multiples of 1/100000 that a stream keeps of them."""
    floats = _floats(name, numbers, counts)
    if not all(map(is_short, floats)):
        wrong = next(x for x in floats if not is_short(x))
        raise ValueError(f"expected {name} in [0, {_LARGEST}], got {wrong:g}; leave it out")
    return tuple(round(x * _UNIT) / _UNIT for x in floats)


def _words(numbers: Sequence[float]) -> bytes:
    return struct.pack(f">{len(numbers)}I", *(round(x * _UNIT) for x in numbers))


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
