r"""Residuals of images: what least squares leave, exactly and on every machine."""

__all__ = ["image_residuals", "restore_image"]

import numpy as np

from .photographs.kernel import Fit
from .photographs.planes import colour_planes, plane_colours, residuals, restore
from .photographs.stages import Places

# Streams depend on all that follows. Pixels are given by row and column relative to one.
_BEFORE = [
    (0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0),
    (-2, -1), (-2, 1), (-1, 2), (-1, -2), (0, -3), (-3, 0),
]  # fmt: skip
_AROUND = [(0, -1), (-1, 0), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]
_FIT = Fit(ridge=64.0, decay=218 / 256, period=2)


def _places(plane: int) -> Places:
    lines = [(plane, *place) for place in _BEFORE]
    for other in range(plane):
        # The pixel itself is what all others of green are relative to.
        lines += [(other, *place) for place in ([(0, 0)] if other > 0 else []) + _AROUND]
    none = np.zeros((0, 3), np.int8)
    return Places(plane, np.array(lines, np.int8), none, none)


_PLACES = tuple(_places(plane) for plane in range(3))


def image_residuals(planes: np.ndarray, *, top: int = 255) -> np.ndarray:
    r"""Predicts each pixel by least squares and returns what is left.

    Three planes are red, green and blue, and go as :math:`G`, :math:`R - G` and :math:`B - G`.
    A pixel is predicted from neighbours that a decoder knows: those above and to the left in
    its plane, and all around in the planes before. The weights are those that suited the pixels
    nearby best.

    References:
        | Edge-Directed Prediction for Lossless Compression of Natural Images
        | (Li and Orchard, 2001), https://doi.org/10.1109/83.923277

    Arguments:
        planes: The planes, an array of uint8 with shape :math:`(H, W, 1)` or :math:`(H, W, 3)`.
        top: The largest value.

    Returns:
        The residuals, an array of int16 with the same shape, from `-top` to `top`.

    Raises:
        ValueError: If the shape or the dtype is another.

    Example:
        >>> image_residuals(np.full((2, 2, 1), 7, dtype=np.uint8))[..., 0]
        array([[-121,    0],
               [   0,    0]], dtype=int16)
    """
    _check(planes)
    if planes.dtype != np.uint8:
        raise ValueError(f"expected planes of uint8, got {planes.dtype}")
    moved = colour_planes(planes) if planes.shape[2] == 3 else np.moveaxis(planes, 2, 0)
    rest = residuals(_PLACES, moved.astype(np.int32), top=top, fit=_FIT)
    return np.ascontiguousarray(np.moveaxis(rest, 0, 2), dtype=np.int16)


def restore_image(rest: np.ndarray, *, top: int = 255) -> np.ndarray:
    r"""Returns the planes that have these residuals, the inverse of :func:`image_residuals`.

    Any residuals may come, as from a forged stream. All that do not raise are those that
    :func:`image_residuals` gives for the result.

    Arguments:
        rest: The residuals, integers with shape :math:`(H, W, 1)` or :math:`(H, W, 3)`.
        top: The largest value.

    Returns:
        The planes, an array of uint8 with the same shape.

    Raises:
        StreamError: If no image has these residuals.
        ValueError: If the shape is another.

    Example:
        >>> planes = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        >>> np.array_equal(restore_image(image_residuals(planes)), planes)
        True
    """
    _check(rest)
    planes = restore(_PLACES, np.moveaxis(rest, 2, 0).astype(np.int32), top=top, fit=_FIT)
    colours = plane_colours(planes) if len(planes) == 3 else planes[0][..., None]
    return colours.astype(np.uint8)


def _check(planes: np.ndarray) -> None:
    if planes.ndim != 3 or planes.shape[2] not in (1, 3) or planes.size == 0:
        raise ValueError(f"expected planes with shape (H, W, 1) or (H, W, 3), got {planes.shape}")
