r"""Exact integer transforms that leave little of an image to code."""

__all__ = ["forward", "from_ycocg", "inverse", "med_residual", "med_restore", "to_ycocg"]

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

_LEVELS = {1: (256,), 3: (256, 512, 512)}  # of a grey plane, and of Y, Co and Cg


def forward(group: np.ndarray) -> np.ndarray:
    r"""Maps planes of an image to symbols that are small around the middle of their range.

    Three planes are red, green and blue: they become luma and two chroma differences by
    :func:`to_ycocg`, and 256 is added to the differences. One plane is taken as it is. What
    :func:`med_residual` leaves of each plane are the symbols.

    Arguments:
        group: The planes, an array of uint8 with shape :math:`(H, W, 1)` or :math:`(H, W, 3)`.

    Returns:
        The symbols, an array of int16 with the same shape. Those of a single plane or of luma
        lie in :math:`[0, 256)`, those of chroma in :math:`[0, 512)`.

    Raises:
        ValueError: If the shape or the dtype is another.

    Example:
        >>> forward(np.full((2, 2, 1), 7, dtype=np.uint8))[..., 0]
        array([[  7, 128],
               [128, 128]], dtype=int16)
    """
    levels = _levels(group)
    if group.dtype != np.uint8:
        raise ValueError(f"expected planes of uint8, got {group.dtype}")
    if len(levels) == 1:
        return med_residual(group, levels)

    planes = to_ycocg(group)
    planes[..., 1:] += 256
    return med_residual(planes, levels)


def inverse(symbols: np.ndarray) -> np.ndarray:
    r"""Maps symbols back to the planes of an image, the inverse of :func:`forward`.

    Any symbols may come, as from a forged stream. Three planes of them need not be the symbols
    of any image, because their colours may leave the cube of eight bits. This raises, and all
    symbols that do not raise are those that :func:`forward` gives for the result.

    Arguments:
        symbols: The symbols, with shape :math:`(H, W, 1)` or :math:`(H, W, 3)`.

    Returns:
        The planes, an array of uint8 with the same shape.

    Raises:
        ValueError: If the shape is another, or if the symbols are not those of an image.

    Example:
        >>> group = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        >>> np.array_equal(inverse(forward(group)), group)
        True
    """
    levels = _levels(symbols)
    planes = med_restore(symbols, levels)
    if len(levels) == 1:
        return planes.astype(np.uint8)

    planes[..., 1:] -= 256
    rgb = from_ycocg(planes)
    if (rgb & ~255).any():
        raise ValueError(
            f"expected the symbols of an image, got colours from {rgb.min()} to {rgb.max()}"
        )
    return rgb.astype(np.uint8)


def to_ycocg(rgb: np.ndarray) -> np.ndarray:
    r"""Lifts red, green and blue to luma, orange and green chroma without loss (YCoCg-R).

    .. math:: C_o = R - B \qquad t = B + \lfloor C_o / 2 \rfloor \qquad
        C_g = G - t \qquad Y = t + \lfloor C_g / 2 \rfloor

    Bytes give :math:`Y \in [0, 255]` and :math:`C_o, C_g \in [-255, 255]`.

    References:
        | YCoCg-R: A Color Space with RGB Reversibility and Low Dynamic Range
        | (Malvar and Sullivan, 2003), JVT-I014r3

    Arguments:
        rgb: The colours, integers with shape :math:`(*, 3)` that fit int16 with a bit to spare.

    Returns:
        The colours as :math:`(Y, C_o, C_g)`, an array of int16 with shape :math:`(*, 3)`.

    Example:
        >>> to_ycocg(np.array([255, 0, 0], dtype=np.uint8))
        array([  63,  255, -127], dtype=int16)
    """
    R, G, B = np.moveaxis(rgb, -1, 0).astype(np.int16)
    Co = R - B
    t = B + (Co >> 1)
    Cg = G - t
    Y = t + (Cg >> 1)
    return np.stack([Y, Co, Cg], axis=-1)


def from_ycocg(ycocg: np.ndarray) -> np.ndarray:
    r"""Lowers luma and chroma to red, green and blue, the inverse of :func:`to_ycocg`.

    Arguments:
        ycocg: The colours as :math:`(Y, C_o, C_g)`, integers with shape :math:`(*, 3)`.

    Returns:
        The colours, an array of int16 with shape :math:`(*, 3)`. They may leave
        :math:`[0, 255]` if the given ones come from elsewhere.

    Example:
        >>> from_ycocg(np.array([63, 255, -127]))
        array([255,   0,   0], dtype=int16)
    """
    Y, Co, Cg = np.moveaxis(ycocg, -1, 0).astype(np.int16)
    t = Y - (Cg >> 1)
    G = Cg + t
    B = t - (Co >> 1)
    R = B + Co
    return np.stack([R, G, B], axis=-1)


def med_residual(planes: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    r"""Predicts each pixel by the median edge detector (MED) and returns what is left.

    .. math:: s = (x - \hat{x} + L / 2) \bmod L \qquad
        \hat{x} = \operatorname{median}(a, b, a + b - c)

    where :math:`a` is the pixel to the left of :math:`x`, :math:`b` the one above and
    :math:`c` the one above on the left. The first row is predicted by :math:`a`, the first
    column by :math:`b`, and the first pixel by :math:`L / 2`, so that it is its own symbol. A
    perfect prediction gives the symbol in the middle, :math:`L / 2`, and errors wrap around:
    there are as many symbols as values.

    References:
        | The LOCO-I Lossless Image Compression Algorithm (Weinberger et al., 2000)
        | https://doi.org/10.1109/83.855427

    Arguments:
        planes: The values :math:`x`, integers in :math:`[0, L)` with shape :math:`(H, W, C)`.
        levels: The number of levels :math:`L` of each plane, powers of two from 2 to 8192.

    Returns:
        The symbols :math:`s` in :math:`[0, L)`, an array of int16 with shape
        :math:`(H, W, C)`.

    Raises:
        ValueError: If the shapes differ or if a value is out of range.

    Example:
        >>> med_residual(np.array([[[1], [3]], [[2], [4]]]), levels=[8])[..., 0]
        array([[1, 6],
               [5, 5]], dtype=int16)
    """
    _check(planes, levels)
    symbols = np.empty(planes.shape, dtype=np.int16)

    for k, L in enumerate(levels):
        x = planes[..., k].astype(np.int16)
        a, b, c = x[1:, :-1], x[:-1, 1:], x[:-1, :-1]

        prediction = np.empty_like(x)
        prediction[0, 0] = L // 2
        prediction[0, 1:] = x[0, :-1]
        prediction[1:, 0] = x[:-1, 0]
        prediction[1:, 1:] = np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), a + b - c))

        symbols[..., k] = (x - prediction + L // 2) & (L - 1)

    return symbols


def med_restore(symbols: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    r"""Returns the values that have these residuals, the inverse of :func:`med_residual`.

    All symbols in range have such values.

    Arguments:
        symbols: The symbols :math:`s`, integers in :math:`[0, L)` with shape
            :math:`(H, W, C)`.
        levels: The number of levels :math:`L` of each plane, powers of two from 2 to 8192.

    Returns:
        The values :math:`x` in :math:`[0, L)`, an array of int16 with shape :math:`(H, W, C)`.

    Raises:
        ValueError: If the shapes differ or if a symbol is out of range.

    Example:
        >>> med_restore(np.array([[[1], [6]], [[5], [5]]]), levels=[8])[..., 0]
        array([[1, 3],
               [2, 4]], dtype=int16)
    """
    _check(symbols, levels)
    symbols = np.ascontiguousarray(symbols, dtype=np.int16)
    planes = np.empty_like(symbols)
    _compiled()(symbols, np.array(levels), planes)
    return planes


def _levels(group: np.ndarray) -> tuple[int, ...]:
    r"""Returns the number of levels of each plane of a group."""
    if group.ndim != 3 or group.shape[2] not in _LEVELS:
        raise ValueError(f"expected planes with shape (H, W, 1) or (H, W, 3), got {group.shape}")
    return _LEVELS[group.shape[2]]


def _check(planes: np.ndarray, levels: Sequence[int]) -> None:
    r"""Raises unless each plane has integers in the range of its levels."""
    if planes.ndim != 3 or planes.size == 0 or planes.shape[2] != len(levels):
        raise ValueError(f"expected shape (H, W, {len(levels)}), got {planes.shape}")
    if planes.dtype.kind not in "iu":
        raise ValueError(f"expected integers, got {planes.dtype}")

    for k, L in enumerate(levels):
        if not 2 <= L <= 8192 or L & (L - 1):
            raise ValueError(f"expected levels that are powers of two from 2 to 8192, got {L}")
        low, high = planes[..., k].min(), planes[..., k].max()
        if low < 0 or high >= L:
            raise ValueError(f"expected values in [0, {L}) in plane {k}, got {low} to {high}")


def _med_restore_python(symbols: np.ndarray, levels: np.ndarray, planes: np.ndarray) -> None:
    r"""Defines :func:`med_restore`, pixel by pixel, into an array for the values."""
    height, width, channels = symbols.shape

    for i in range(height):
        for j in range(width):
            for k in range(channels):
                half = levels[k] // 2
                prediction = half
                if i > 0 and j > 0:
                    a, b, c = planes[i, j - 1, k], planes[i - 1, j, k], planes[i - 1, j - 1, k]
                    prediction = max(min(a, b), min(max(a, b), a + b - c))
                elif j > 0:
                    prediction = planes[i, j - 1, k]
                elif i > 0:
                    prediction = planes[i - 1, j, k]
                planes[i, j, k] = (symbols[i, j, k] + prediction - half) & (levels[k] - 1)


@cache
def _compiled() -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    import numba

    return numba.njit(cache=True, nogil=True)(_med_restore_python)
