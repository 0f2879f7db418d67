r"""Images as arrays, and arrays as planes of eight bits."""

__all__ = ["ImageLike", "as_array", "group_widths", "join_planes", "split_planes"]

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

ImageLike = np.ndarray | Tensor | Image.Image | str | Path

_DTYPES = ("bool", "uint8", "uint16")
_MAX_CHANNELS = 4
_MODES = ("1", "L", "RGB", "RGBA", "I;16", "I;16B")
_REMEDIES = {
    "CMYK": "convert it with img.convert('RGB')",
    "F": "convert it with np.asarray(img).round().astype(np.uint16) if its values fit",
    "I": "convert it with np.asarray(img).astype(np.uint16) if its values fit",
    "LA": "convert it with np.asarray(img), with shape (H, W, 2)",
    "P": "convert it with img.convert('RGB')",
    "PA": "convert it with img.convert('RGBA')",
    "RGBa": "convert it with img.convert('RGBA')",
}


def as_array(img: ImageLike) -> np.ndarray:
    r"""Returns an image as a contiguous array in the byte order of this machine.

    Arrays and tensors hold truth values, bytes or 16-bit words. PIL images are taken as they
    are, in mode ``1``, ``L``, ``RGB``, ``RGBA`` or ``I;16``. Nothing is converted on the way:
    whatever would lose something (a palette, a second frame, an orientation that is only noted)
    is refused, and the error says how to convert. Colour profiles and other notes are not part
    of the image.

    The result shares its memory with an array or a tensor on the CPU that needs no change.

    Arguments:
        img: An array or a tensor with shape :math:`(H, W)` or :math:`(H, W, C)`, where
            :math:`1 \leq C \leq 4`, a PIL image, or the path of a file that PIL reads.

    Returns:
        The array, with dtype bool, uint8 or uint16 and shape :math:`(H, W)` or
        :math:`(H, W, C)`.

    Raises:
        TypeError: If the object or its dtype is none of the above.
        ValueError: If the shape is another, or if the PIL image holds more than its pixels.

    Example:
        >>> as_array(torch.zeros(4, 6, 3, dtype=torch.uint8)).shape
        (4, 6, 3)
    """
    if isinstance(img, str | Path):
        with Image.open(img) as file:
            _check_depth(file)
            array = _from_pil(file)
    elif isinstance(img, Image.Image):
        array = _from_pil(img)
    elif isinstance(img, Tensor):
        if img.dtype not in (torch.bool, torch.uint8, torch.uint16):
            raise _dtype_error(img.dtype, ".to(torch.uint8)", floating=img.is_floating_point())
        array = img.cpu().numpy()
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
        return bytes_ != 0  # as PIL's masks have 255 for true
    return array


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


def _check_depth(file: ImageFile.ImageFile) -> None:
    r"""Raises if PIL would cut the 16-bit colours of a file to eight bits.

    Only a file that is not loaded yet tells, by the arguments of its decoder.
    """
    for codec, _, _, args in file.tile if file.mode in ("RGB", "RGBA") else []:
        parts = args if isinstance(args, tuple) else (args,)
        words = any(isinstance(part, str) and ";16" in part for part in parts)
        top = max((part for part in parts if isinstance(part, int)), default=0)
        if words or (codec.startswith("ppm") and top > 255):
            raise ValueError(
                "expected a file that PIL reads in full, got one with more than eight bits per "
                "colour, of which PIL keeps eight; read it with another library, as uint16"
            )


def _from_pil(img: Image.Image) -> np.ndarray:
    r"""Returns the pixels of a PIL image that is nothing but its pixels."""
    if (frames := getattr(img, "n_frames", 1)) > 1:
        raise ValueError(
            f"expected a single image, got {frames} frames; pick one with img.seek and img.copy()"
        )

    if img.mode not in _MODES:
        remedy = _REMEDIES.get(img.mode, "convert it with img.convert('RGB')")
        if img.mode == "P" and "transparency" in img.info:
            remedy = _REMEDIES["PA"]
        raise ValueError(
            f"expected a PIL image in mode 1, L, RGB, RGBA or I;16, got {img.mode}; {remedy}"
        )

    if "transparency" in img.info:
        raise ValueError(
            "expected a PIL image without a transparent colour; convert it with "
            "img.convert('RGBA') or drop it with del img.info['transparency']"
        )

    img.load()  # PIL turns a TIFF here and no longer notes its orientation
    orientation = img.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in range(2, 9):  # 1 is upright, and others have no meaning
        raise ValueError(
            f"expected upright pixels, got EXIF orientation {orientation}; "
            "turn them with ImageOps.exif_transpose(img)"
        )

    return np.asarray(img)
