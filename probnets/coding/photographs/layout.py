r"""Where models of photographs look, if they are trained here."""

__all__ = ["PLACES"]

import numpy as np

from .kernel import MARGIN
from .stages import Places

_AROUND = [(0, -1), (-1, 0), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]

# Before a pixel in its own plane, by row and column, the nearest first.
_BEFORE = sorted(
    [
        (row, column)
        for row in range(-MARGIN, 1)
        for column in range(-MARGIN, MARGIN + 1)
        if (row, column) < (0, 0)
    ],
    key=lambda place: (place[0] ** 2 + place[1] ** 2, place[1] > 0, place),
)


def _places(plane: int) -> Places:
    regressors = [(plane, *place) for place in _BEFORE[: 12 if plane else 18]]
    errors = [(plane, *place) for place in _BEFORE]
    pixels = [(plane, *place) for place in _BEFORE[: 8 if plane else 12]]
    for other in range(plane):
        # The pixel itself is what all others of green are relative to.
        here = [(0, 0), *_AROUND] if other > 0 else _AROUND
        regressors += [(other, *place) for place in here]
        errors += [(other, *place) for place in [(0, 0), *_AROUND]]
    return Places(plane, *(np.array(lines, np.int8) for lines in (regressors, errors, pixels)))


PLACES = tuple(_places(plane) for plane in range(3))
