r"""Images as arrays, and arrays as planes of eight bits."""

__all__ = [
    "ImageLike",
    "array_and_notes",
    "as_array",
    "group_widths",
    "join_planes",
    "split_planes",
]

import re
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile
from torch import Tensor

from .errors import ImageWarning
from .filenotes import notes_of, unkept
from .notes import Notes

ImageLike = np.ndarray | Tensor | Image.Image | str | Path

_DTYPES = ("bool", "uint8", "uint16")
_MAX_CHANNELS = 4
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16B")
_REMEDIES = {
    "F": "convert it with np.asarray(img).round().astype(np.uint16) if its values fit",
    "I": "convert it with np.asarray(img).astype(np.uint16) if its values fit",
    "La": "convert it with img.convert('LA')",
    "RGBa": "convert it with img.convert('RGBA')",
}
_SHOWN = 10  # things that are not kept, which a warning names
_GREYS = {"L;2": 85, "L;4": 17}  # what PIL multiplies greys of two and four bits by


def as_array(img: ImageLike) -> np.ndarray:
    r"""Returns an image as a contiguous array in the byte order of this machine.

    Arrays and tensors hold truth values, bytes or 16-bit words. Pixels are taken as PIL decodes
    them, in mode ``1``, ``L``, ``LA``, ``RGB``, ``RGBA`` or ``I;16``. A palette, or a colour that
    stands for transparency, becomes RGB or RGBA with the very same pixels, and an
    :class:`ImageWarning` says so. Whatever would change pixels is refused, and the error says
    how to convert: CMYK and other colour spaces, floats, several frames, masks of NumPy, and
    files with more bits than PIL keeps.

    The array shares its memory with an array or a tensor on the CPU that needs no change.

    Arguments:
        img: An array or a tensor with shape :math:`(H, W)` or :math:`(H, W, C)`, where
            :math:`1 \leq C \leq 4`, a PIL image, or the path of a file that PIL reads.

    Returns:
        The array, with dtype bool, uint8 or uint16 and shape :math:`(H, W)` or
        :math:`(H, W, C)`.

    Raises:
        FileNotFoundError: If there is no file at the path.
        TypeError: If the object or its dtype is none of the above.
        ValueError: If the shape is another, or if pixels of the PIL image would be changed.

    Example:
        >>> as_array(torch.zeros(4, 6, 3, dtype=torch.uint8)).shape
        (4, 6, 3)
    """
    if isinstance(img, str | Path):
        with _opened(img) as file:
            return as_array(file)
    if isinstance(img, Image.Image):
        array = _from_pil(img)
    elif isinstance(img, Tensor):
        if img.dtype not in (torch.bool, torch.uint8, torch.uint16):
            raise _dtype_error(img.dtype, ".to(torch.uint8)", floating=img.is_floating_point())
        array = img.cpu().numpy()
    elif isinstance(img, np.ma.MaskedArray):
        raise TypeError(
            "expected an array without a mask, got a masked one; fill it with img.filled(0), or "
            "drop the mask with img.data"
        )
    elif isinstance(img, np.ndarray):
        array = img
    else:
        raise TypeError(
            "expected a NumPy array, a torch tensor, a PIL image or a path, got "
            f"{type(img).__name__}"
        )

    _check(array.shape, array.dtype)
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if array.dtype == np.bool_ and (bytes_ := array.view(np.uint8)).max() > 1:
        array = bytes_ != 0  # as PIL's masks have 255 for true
    return array


def array_and_notes(img: ImageLike) -> tuple[np.ndarray, Notes]:
    r"""Returns the array of :func:`as_array`, and what its file says beside the pixels.

    Notes are kept of the ICC profile, EXIF, XMP, gamma, chromaticities, the rendering intent of
    sRGB, dots per inch, and texts. Pixels lie as they are stored, and EXIF keeps the tag that
    tells how to turn them, except that PIL itself turns a TIFF file upright.

    All else is not kept. An :class:`ImageWarning` names what PIL tells of it, such as IPTC and
    Photoshop blocks, private chunks and tags, and the language of texts, unless it says no more
    than how the file was stored. A thumbnail outside of EXIF goes without a word.

    Arguments:
        img: The image, as :func:`as_array` takes it.

    Returns:
        The array, with shape :math:`(H, W)` or :math:`(H, W, C)`, and the notes, empty for
        arrays and tensors.

    Raises:
        FileNotFoundError: If there is no file at the path.
        TypeError: If the object or its dtype cannot be taken.
        ValueError: If the shape is another, if pixels of the PIL image would be changed, or if
            there are too many notes.

    Example:
        >>> img = Image.new("LA", (6, 4))
        >>> img.info["dpi"] = (300, 300)
        >>> array, notes = array_and_notes(img)
        >>> array.shape, notes.dpi
        ((4, 6, 2), (300.0, 300.0))
    """
    if isinstance(img, str | Path):
        with _opened(img) as file:
            return array_and_notes(file)
    array = as_array(img)
    if not isinstance(img, Image.Image):
        return array, Notes()
    if lost := unkept(img):  # which only a loaded image tells
        shown = ", ".join(lost[:_SHOWN]) + (", ..." if len(lost) > _SHOWN else "")
        _warn(f"expected pixels and notes, got more, which is not kept: {shown}")
    return array, notes_of(img)


def group_widths(shape: Sequence[int], dtype: npt.DTypeLike) -> list[int]:
    r"""Returns how many planes each group of an image has.

    Red, green and blue make one group of three, every other channel is a group of its own. The
    high bytes of 16-bit words are grouped as bytes are, and their low bytes follow plane by
    plane, because the low bytes of different channels tell little about each other.

    Arguments:
        shape: The shape of the image, :math:`(H, W)` or :math:`(H, W, C)`.
        dtype: Its dtype: bool, uint8 or uint16.

    Returns:
        The width of each group, 3 for a colour and 1 for a single plane.

    Raises:
        TypeError: If there are no images with this dtype.
        ValueError: If there are no images with this shape.

    Example:
        >>> group_widths((8, 8, 4), np.uint8)
        [3, 1]
        >>> group_widths((8, 8, 3), np.uint16)
        [3, 1, 1, 1]
    """
    dtype = np.dtype(dtype)
    _check(shape, dtype)

    channels = 1 if len(shape) == 2 else shape[2]
    colour = channels >= 3 and dtype.name != "bool"
    widths = [3] + [1] * (channels - 3) if colour else [1] * channels
    return widths + [1] * channels if dtype.name == "uint16" else widths


def split_planes(array: np.ndarray) -> list[np.ndarray]:
    r"""Splits an image into groups of planes of eight bits.

    Arguments:
        array: The image, as :func:`as_array` returns it.

    Returns:
        One array of uint8 with shape :math:`(H, W, c)` for each width :math:`c` that
        :func:`group_widths` lists. They are views of the image unless it has 16 bits.

    Example:
        >>> [group.shape for group in split_planes(np.zeros((8, 8, 4), np.uint8))]
        [(8, 8, 3), (8, 8, 1)]
    """
    widths = group_widths(array.shape, array.dtype)
    planes = array.reshape(*array.shape[:2], -1)

    if array.dtype.name == "uint16":
        planes = np.concatenate([planes >> 8, planes & 255], axis=2, dtype=np.uint8)
    elif array.dtype.name == "bool":
        planes = planes.view(np.uint8)

    return np.split(planes, list(accumulate(widths))[:-1], axis=2)


def join_planes(
    groups: Sequence[np.ndarray], shape: Sequence[int], dtype: npt.DTypeLike
) -> np.ndarray:
    r"""Joins the groups of planes of an image, the inverse of :func:`split_planes`.

    Arguments:
        groups: The groups of planes, as arrays of uint8 with shape :math:`(H, W, c)`.
        shape: The shape of the image, :math:`(H, W)` or :math:`(H, W, C)`.
        dtype: The dtype of the image: bool, uint8 or uint16.

    Returns:
        The image, an array with the given shape and dtype.

    Raises:
        TypeError: If a group is not uint8, or if there are no images with this dtype.
        ValueError: If the groups are not those of such an image.

    Example:
        >>> array = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
        >>> np.array_equal(join_planes(split_planes(array), array.shape, array.dtype), array)
        True
    """
    dtype = np.dtype(dtype)
    expected = [(shape[0], shape[1], width) for width in group_widths(shape, dtype)]
    if (found := [group.shape for group in groups]) != expected:
        raise ValueError(f"expected groups with shapes {expected}, got {found}")
    if any(group.dtype != np.uint8 for group in groups):
        raise TypeError(f"expected groups of uint8, got {[str(g.dtype) for g in groups]}")

    planes = np.concatenate(groups, axis=2)

    if dtype.name == "uint16":
        high, low = np.split(planes, 2, axis=2)
        planes = high.astype(np.uint16) << 8 | low
    elif dtype.name == "bool":
        if (top := planes.max()) > 1:
            raise ValueError(f"expected a boolean image of 0 and 1, got {top}")
        planes = planes.view(np.bool_)

    return planes.reshape(shape)


def _check(shape: Sequence[int], dtype: np.dtype) -> None:
    r"""Raises unless there are images with this shape and dtype."""
    if dtype.name not in _DTYPES:
        raise _dtype_error(dtype.name, ".astype(np.uint8)", floating=dtype.kind == "f")
    if len(shape) not in (2, 3):
        raise ValueError(f"expected an image with shape (H, W) or (H, W, C), got {tuple(shape)}")
    if min(shape) < 1:
        raise ValueError(f"expected an image with at least one pixel, got shape {tuple(shape)}")
    if len(shape) == 3 and shape[2] > _MAX_CHANNELS:
        raise ValueError(
            f"expected an image with shape (H, W) or (H, W, C), where C is at most "
            f"{_MAX_CHANNELS}, got {tuple(shape)}; if channels come first, move them to the end"
        )


def _dtype_error(dtype: object, cast: str, *, floating: bool) -> TypeError:
    r"""Returns the error for a dtype that images do not have."""
    remedy = (
        f"(255 * img).round(){cast} if its values lie in [0, 1]"
        if floating
        else f"img{cast} if its values fit"
    )
    return TypeError(f"expected dtype bool, uint8 or uint16, got {dtype}; convert with {remedy}")


def _opened(path: str | Path) -> Image.Image:
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected an image at {path}, got no file")
    return Image.open(path)


def _from_pil(img: Image.Image) -> np.ndarray:
    r"""Returns the pixels of a PIL image, exactly, and loads it."""
    if (frames := getattr(img, "n_frames", 1)) > 1:
        raise ValueError(
            f"expected a single image, got {frames} frames; pick one with img.seek and img.copy()"
        )
    _check_mode(img)
    _check_depth(img)
    scale = next((_GREYS[raw] for raw in _raw_modes(img) if raw in _GREYS), 1)

    img.load()  # PIL turns a TIFF here, meets late chunks of a PNG, and may settle on a mode
    _check_mode(img)
    key = img.info.get("transparency")
    if img.mode in ("P", "PA"):
        return np.asarray(_without_palette(img))
    array = np.asarray(img)
    if key is not None and img.mode in ("1", "L", "I;16", "I;16B", "RGB"):
        array = _without_key(array, key, scale)
    return array


def _check_mode(img: Image.Image) -> None:
    if img.mode not in _MODES:
        remedy = _REMEDIES.get(img.mode, "convert it with img.convert('RGB')")
        raise ValueError(
            "expected a PIL image in mode 1, L, LA, P, PA, RGB, RGBA or I;16, "
            f"got {img.mode}; {remedy}"
        )


def _check_depth(img: Image.Image) -> None:
    r"""Raises if PIL would cut the 16-bit colours of a file to eight bits.

    Only a file that is not loaded yet tells, by the arguments of its decoder or by its head.
    """
    tiles = img.tile if isinstance(img, ImageFile.ImageFile) else []
    if not tiles or img.mode.startswith("I"):
        return
    deep = any(re.search(";16[BLN]", raw) for raw in _raw_modes(img))
    for codec, _, _, args in tiles:
        numbers = [n for n in (args if isinstance(args, tuple) else ()) if isinstance(n, int)]
        deep |= codec.startswith("ppm") and max(numbers, default=0) > 255
    if deep or _deep_head(img):
        raise ValueError(
            "expected a file that PIL reads in full, got one with more than eight bits per "
            "colour, of which PIL keeps eight; read it with another library, as uint16"
        )


def _raw_modes(img: Image.Image) -> list[str]:
    r"""Lists the words that tell the decoders of a file how its pixels are stored."""
    tiles = img.tile if isinstance(img, ImageFile.ImageFile) else []
    args = [args if isinstance(args, tuple) else (args,) for _, _, _, args in tiles]
    return [arg for part in args for arg in part if isinstance(arg, str)]


def _deep_head(img: Image.Image) -> bool:
    r"""Tells whether the head of a JPEG 2000 or AVIF file promises more than eight bits."""
    file = getattr(img, "fp", None)
    if img.format not in ("JPEG2000", "AVIF") or file is None:
        return False
    place = file.tell()
    file.seek(0)
    head = file.read(1 << 16)
    file.seek(place)
    if img.format == "AVIF":
        found = head.find(b"av1C")
        return found >= 0 and bool(head[found + 6 : found + 7] > b"\x3f" and head[found + 6] & 64)
    found = head.find(b"\xff\x4f\xff\x51")
    depth = head[found + 42 : found + 43]
    return found >= 0 and bool(depth) and depth[0] & 127 > 7


def _without_palette(img: Image.Image) -> Image.Image:
    r"""Turns a palette to the colours that it has, with alpha if any of them has."""
    palette = img.palette
    if palette is None or palette.mode not in ("RGB", "RGBA"):
        what = "none" if palette is None else palette.mode
        raise ValueError(
            f"expected a palette of RGB or RGBA, got {what}; convert it with img.convert('RGB')"
        )
    alpha = img.mode == "PA" or "transparency" in img.info or palette.mode == "RGBA"
    mode = "RGBA" if alpha else "RGB"
    _warn(f"expected pixels, got a palette; its colours are kept as {mode}, exactly, but not it")
    return img.convert(mode)


def _without_key(array: np.ndarray, key: object, scale: int) -> np.ndarray:
    r"""Turns a transparent colour to alpha, with shape :math:`(H, W, 4)`.

    Arguments:
        array: The pixels.
        key: The transparent colour, as the file has it.
        scale: What PIL multiplied the greys of the file by.
    """
    wanted = np.array(key if isinstance(key, tuple | int) else (), dtype=np.int64).ravel() * scale
    channels = 1 if array.ndim == 2 else 3
    if array.dtype == np.uint16 or wanted.size != channels or not (wanted < 256).all():
        raise ValueError(
            f"expected a transparent colour of eight bits, got {key!r} for {array.dtype}; drop it "
            "with del img.info['transparency']"
        )
    if array.dtype == np.bool_:
        array, wanted = array * np.uint8(255), (wanted > 0) * 255
    colours = np.broadcast_to(array.reshape(*array.shape[:2], channels), (*array.shape[:2], 3))
    opaque = (colours != wanted).any(axis=2, keepdims=True) * np.uint8(255)
    _warn("expected pixels, got a transparent colour; it is kept as alpha of RGBA, exactly")
    return np.concatenate([colours, opaque], axis=2)


def _warn(sentence: str) -> None:
    warnings.warn(sentence, ImageWarning, stacklevel=2)
