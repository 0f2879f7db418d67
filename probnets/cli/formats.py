r"""Other formats of images, to read from, to restore to and to compare with."""

__all__ = ["jpegxl_bytes", "npy_bytes", "png_bytes", "read_image", "read_noted", "webp_bytes"]

import importlib
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngInfo

from probnets.coding import Notes
from probnets.coding.images import array_and_notes


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
    return read_noted(path)[0]


def read_noted(path: str | Path) -> tuple[np.ndarray, Notes]:
    r"""Reads an image and its notes from a file, as :func:`read_image` does.

    Arguments:
        path: The path of the file.

    Returns:
        The image and its notes, which are empty for a ``.npy`` file.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If the dtype of an array cannot be coded.
        ValueError: If the file is damaged, or holds no image or one whose pixels would change.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an image at {path}, got no file")
    try:
        if path.suffix.lower() != ".npy":
            return array_and_notes(path)
        with path.open("rb") as file:
            return array_and_notes(np.load(file, allow_pickle=False))
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
        notes: What the file shall say beside the pixels.
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
    return _saved(array, format="PNG", optimize=optimize, **_png_options(notes or Notes()))


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
