r"""Images that were enlarged by repeating their pixels."""

__all__ = ["enlarge", "repetition"]

import math

import numpy as np

_MOST = 255  # a factor fits a byte
_NUMBERS = 1 << 20  # that are compared at once, more or less


def repetition(array: np.ndarray) -> tuple[int, int]:
    r"""Finds by how much an image was enlarged.

    Arguments:
        array: The image, with shape :math:`(H, W, C)`.

    Returns:
        The factors for rows and columns, 1 where pixels are not repeated. The last of them may be
        cut off.

    Example:
        >>> small = np.random.default_rng(0).integers(256, size=(3, 5, 1), dtype=np.uint8)
        >>> repetition(enlarge(small, (2, 3), (6, 14)))
        (2, 3)
    """
    return _factor(array), _factor(array.swapaxes(0, 1))


def enlarge(array: np.ndarray, factors: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    r"""Repeats the pixels of an image.

    Arguments:
        array: The image, with shape :math:`(h, w, C)`.
        factors: The factors for rows and columns.
        size: The height and the width of the result, which cut off its last pixels.
    """
    rows, columns = (np.arange(n) // k for n, k in zip(size, factors, strict=True))
    return array[rows[:, None], columns]


def _factor(array: np.ndarray) -> int:
    r"""Finds the largest number of equal lines in a row that the whole image is made of."""
    height, divisor = len(array), 0
    step = max(_NUMBERS // array[0].size, 1)
    for start in range(1, height, step):
        stop = min(start + step, height)
        changed = (array[start:stop] != array[start - 1 : stop - 1]).any(axis=(1, 2))
        divisor = math.gcd(divisor, *(start + np.flatnonzero(changed)).tolist())
        if divisor == 1:
            return 1
    if divisor == 0:
        return min(height, _MOST)
    return max(k for k in range(1, min(divisor, _MOST) + 1) if divisor % k == 0)
