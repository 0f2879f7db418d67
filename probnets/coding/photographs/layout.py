r"""Where the shipped model of photographs looks."""

__all__ = ["PLACES"]

import numpy as np

from .stages import Places

_SIDES = [(0, -1), (-1, 0), (0, 1), (1, 0)]
_AROUND = [*_SIDES, (-1, -1), (-1, 1), (1, -1), (1, 1)]

# Before a pixel in its own plane, the nearest first, by row and column.
_NEAR = [(0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-2, -1), (-2, 1)]
_BEFORE = [*_NEAR, (-1, 2), (-1, -2), (0, -3), (-3, 0)]


def _places(plane: int) -> Places:
    own = [(plane, *place) for place in _BEFORE]
    regressors = list(own)
    errors = [(plane, *place) for place in [*_NEAR[:6], (-1, 2), (-2, 1)]]
    for other in range(plane):
        # The pixel itself is what all others of green are relative to.
        here = [(0, 0), *_AROUND] if other > 0 else _AROUND
        regressors += [(other, *place) for place in here]
        errors += [(other, *place) for place in [(0, 0), *_AROUND]]
    return Places(plane, *(_lines(lines) for lines in (regressors, errors, own)))


def _lines(lines: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(lines, np.int8)


PLACES = tuple(_places(plane) for plane in range(3))
