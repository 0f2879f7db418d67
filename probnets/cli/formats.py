r"""Other formats of images, to read from, to restore to and to compare with."""

__all__ = [
    "jpegxl_bytes",
    "npy_bytes",
    "png_bytes",
    "png_notes",
    "read_image",
    "read_noted",
    "webp_bytes",
]

import importlib
import io
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngInfo

from probnets.coding import Notes
from probnets.coding.images import array_and_notes, as_array
from probnets.coding.notes import printable

T = TypeVar("T")


def read_image(path: str | Path) -> np.ndarray:
    r"""Reads an image from a file that PIL reads, or an array from a ``.npy`` file.

    Arguments:
        path: The path of the file.

    Returns:
        The image, as :func:`probnets.coding.compress` takes it.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If the dtype of an array cannot be coded.
        ValueError: If the file is damaged, or holds no image or one whose pixels would change.
    """
    return _read(path, as_array)


def read_noted(path: str | Path) -> tuple[np.ndarray, Notes]:
    r"""Reads an image and its notes from a file, as :func:`read_image` reads the image.

    Arguments:
        path: The path of the file.

    Returns:
        The image and its notes, which are empty for a ``.npy`` file.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If the dtype of an array cannot be coded.
        ValueError: If the file is damaged, or holds no image or one whose pixels would change.
    """
    return _read(path, array_and_notes)


def _read(path: str | Path, take: Callable[[Path | np.ndarray], T]) -> T:
    r"""Returns what a function takes from the image in a file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an image at {path}, got no file")
    try:
        if path.suffix.lower() != ".npy":
            return take(path)
        with path.open("rb") as file:
            return take(np.load(file, allow_pickle=False))
    except UnidentifiedImageError:
        raise ValueError(f"expected an image in {path}, got a file of no known format") from None
    except Warning:  # where they are errors, they are no damage
        raise
    except Exception as error:  # a damaged file can lead a reader anywhere
        if str(error).startswith("expected"):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"expected an image in {path}, got: {reason}") from error


def npy_bytes(array: np.ndarray) -> bytes:
    r"""Returns the bytes of a ``.npy`` file, which keeps any array as it is.

    Arguments:
        array: The array.
    """
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def png_bytes(
    array: np.ndarray, notes: Notes | None = None, *, optimize: bool = True
) -> bytes | None:
    r"""Returns the bytes of a PNG file.

    Arguments:
        array: The image.
        notes: What the file shall say beside the pixels, as far as :func:`png_notes` fits.
        optimize: Whether it is as small as PIL makes it, or what PIL makes by default.

    Returns:
        The bytes, or None if PIL would not give the same shape and dtype back: for a single
        channel with an axis of its own, and truth values or 16-bit words with channels.

    Example:
        >>> png_bytes(np.zeros((4, 4), dtype=bool))[1:4]
        b'PNG'
        >>> png_bytes(np.zeros((4, 4, 1), dtype=np.uint8)) is None
        True
    """
    channels = array.shape[2] if array.ndim == 3 else 0
    if channels not in ((0, 2, 3, 4) if array.dtype == np.uint8 else (0,)):
        return None
    options = _png_options(png_notes(notes or Notes())[0])
    return _saved(array, format="PNG", optimize=optimize, **options)


def png_notes(notes: Notes) -> tuple[Notes, list[str]]:
    r"""Splits notes into those that a PNG file can hold, and names of the others.

    A keyword has 1 to 79 letters of Latin-1 there, and no spaces around it. Dots per inch become
    whole dots per metre.

    Arguments:
        notes: The notes.

    Returns:
        The notes for the file, and what they leave out, each in one short line.

    Example:
        >>> fitting, others = png_notes(Notes(text=(("Title", "a"), ("ключ", "b"))))
        >>> fitting.text, others
        ((('Title', 'a'),), ['text ключ'])
    """
    texts = tuple(text for text in notes.text if _is_keyword(text[0]))
    others = [f"text {printable(key)}" for key, _ in notes.text if not _is_keyword(key)]
    dpi = notes.dpi
    if dpi is not None and not all(1 <= x / 0.0254 < 2**31 - 1 for x in dpi):
        dpi, others = None, ["dots per inch", *others]
    return replace(notes, text=texts, dpi=dpi), others


def _is_keyword(key: str) -> bool:
    kept = key.encode("latin-1", "ignore").decode("latin-1")
    letters = all(" " <= c <= "~" or c > "\xa0" for c in key)
    return key == kept.strip(" ") and len(key) <= 79 and letters


def _png_options(notes: Notes) -> dict[str, Any]:
    r"""Returns notes as what PIL takes to write a PNG file."""
    chunks = PngInfo()
    if notes.gamma is not None:
        chunks.add(b"gAMA", _png_words(notes.gamma))
    if notes.chromaticity:
        chunks.add(b"cHRM", _png_words(*notes.chromaticity))
    if notes.intent is not None:
        chunks.add(b"sRGB", bytes([notes.intent]))
    if notes.xmp:
        chunks.add(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + notes.xmp)
    for key, text in notes.text:
        chunks.add_text(key, text)
    given = {"icc_profile": notes.profile, "exif": notes.exif, "dpi": notes.dpi}
    return {"pnginfo": chunks, **{name: value for name, value in given.items() if value}}


def _png_words(*numbers: float) -> bytes:
    return struct.pack(f">{len(numbers)}I", *(round(100_000 * x) for x in numbers))


def webp_bytes(array: np.ndarray, *, effort: int = 100) -> bytes | None:
    r"""Returns the bytes of a lossless WebP file.

    WebP knows colours alone: grey and truth values are stored as such.

    Arguments:
        array: The image.
        effort: What PIL calls the quality. Below 100 it takes a fraction of the time and some
            tenths of a percent more bytes.

    Returns:
        The bytes, or None if WebP cannot store the values or PIL lacks it.
    """
    if not features.check("webp"):
        return None
    array = array * np.uint8(255) if array.dtype == np.bool_ else array
    channels = array.shape[2] if array.ndim == 3 else 0
    if array.dtype != np.uint8 or channels not in (0, 3, 4) or max(array.shape) > 16383:
        return None
    return _saved(array, format="WEBP", lossless=True, quality=effort, method=6, exact=True)


def jpegxl_bytes(array: np.ndarray, *, effort: int = 7) -> bytes | None:
    r"""Returns the bytes of a lossless JPEG XL file.

    Arguments:
        array: The image.
        effort: The effort, from 1 to 9.

    Returns:
        The bytes, or None if the package imagecodecs is missing or lacks it.
    """
    array = array * np.uint8(255) if array.dtype == np.bool_ else array
    try:
        codecs: Any = importlib.import_module("imagecodecs")
        return bytes(codecs.jpegxl_encode(array, lossless=True, effort=effort))
    except ImportError:
        return None


def _saved(array: np.ndarray, **options: Any) -> bytes:  # noqa: ANN401
    file = io.BytesIO()
    Image.fromarray(array).save(file, **options)
    return file.getvalue()
