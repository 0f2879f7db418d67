r"""Integer tables of the functions that a photograph's code needs.

They are computed with :mod:`decimal`, whose exponentials and logarithms are rounded correctly, so
that they are the same on every machine.
"""

__all__ = [
    "CDF_BITS",
    "FINE",
    "LOGIT_STEPS",
    "LOGS",
    "OCTAVE",
    "REACH",
    "SCALES",
    "Int",
    "Tables",
    "tables",
]

import decimal
from decimal import Decimal
from functools import cache
from typing import NamedTuple

import numpy as np

FINE = 16  # anchors and errors are in units of 1/16 of a level
OCTAVE = 16  # logarithms are in units of 1/16 of an octave
LOGS = 4096  # numbers whose logarithm is tabled
REACH = 128  # the largest tabled logarithm of a ratio
LOGIT_STEPS = 64  # logits are in units of 1/64 of an octave
SCALES = 168  # scales 2^(i / 8 - 6) of a logistic distribution, in levels
CDF_BITS = 22  # of a tabled cumulative distribution

_STEP = 32  # tabled points of the logistic function per unit, and places between two points
_END = 16  # where the logistic function is one up to rounding


Int = int | np.integer


class Tables(NamedTuple):
    r"""Is the tables that the loops take.

    ``log[v]`` is the logarithm of :math:`v + 1` in sixteenths of an octave, ``power[i]`` is
    :math:`64 \cdot 2^{i/16}`, ``squash[t + 128]`` is :math:`64 \operatorname{arsinh} 2^{t/16}`,
    ``sigmoid[i]`` is :math:`2^{22} \sigma(i / 32)`, ``exp[i]`` is :math:`2^{16 - i/64}` and
    ``inverse[i]`` is :math:`2^{32 - i/8}`, the inverse of a scale.
    """

    log: np.ndarray
    power: np.ndarray
    squash: np.ndarray
    sigmoid: np.ndarray
    exp: np.ndarray
    inverse: np.ndarray


@cache
def tables() -> Tables:
    r"""Returns the tables, arrays of int64."""
    with decimal.localcontext(decimal.Context(prec=24)):
        two = Decimal(2)
        log = [_whole(OCTAVE * (Decimal(v + 1).ln() / two.ln())) for v in range(LOGS)]
        power = [_whole(64 * two ** (Decimal(i) / OCTAVE)) for i in range(22 * OCTAVE)]
        ratios = [two ** (Decimal(t) / OCTAVE) for t in range(-REACH, REACH + 1)]
        squash = [_whole(64 * (r + (r * r + 1).sqrt()).ln()) for r in ratios]
        points = [1 / (1 + (-Decimal(i) / _STEP).exp()) for i in range(_END * _STEP + 2)]
        sigmoid = [_whole((1 << CDF_BITS) * p) for p in points]
        exp = [_whole(two ** (16 - Decimal(i) / LOGIT_STEPS)) for i in range(17 * LOGIT_STEPS)]
        inverse = [_whole(two ** (32 - Decimal(i) / 8)) for i in range(SCALES)]
    parts = (log, power, squash, sigmoid, exp, inverse)
    return Tables(*(np.array(part, dtype=np.int64) for part in parts))


def _whole(x: Decimal) -> int:
    return int(x.to_integral_value(rounding=decimal.ROUND_HALF_EVEN))
