r"""Images that were enlarged by repeating their pixels."""

__all__ = ["enlarge", "repetition"]

import numpy as np

_MOST = 255  # a factor fits a byte


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
    rows = np.repeat(array, factors[0], axis=0)[: size[0]]
    return np.repeat(rows, factors[1], axis=1)[:, : size[1]]


def _factor(array: np.ndarray) -> int:
    r"""Finds the largest number of equal lines in a row that the whole image is made of."""
    height = len(array)
    changes = [n for n in range(1, height) if not np.array_equal(array[n], array[n - 1])]
    if not changes:
        return min(height, _MOST)
    factor = int(np.gcd.reduce(changes))
    return max(k for k in range(1, min(factor, _MOST) + 1) if factor % k == 0)
