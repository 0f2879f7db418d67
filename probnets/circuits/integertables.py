r"""Probabilities from integer parameters, the same on every machine."""

__all__ = [
    "OCTAVE",
    "integer_exp2",
    "integer_log2",
    "integer_logistic",
    "integer_softmax",
    "log2_binomials",
    "octaves",
]

import math
from functools import cache

import numpy as np

OCTAVE = 20  # fraction bits of logarithms to base two

_ONE = 30  # fraction bits of an exponential
_STEPS = 10  # the table of exponentials has 2 ** 10 steps an octave
_LOG2_E = 1_549_082_005  # log2(e) in units of 2^-30
_LOG2_LOG2_E = 554_452  # log2(log2(e)) in units of 2^-20
_CHANCE = 32  # fraction bits of a cumulative probability


def octaves(logits: np.ndarray, fraction_bits: int) -> np.ndarray:
    r"""Turns natural logarithms into logarithms to base two.

    Arguments:
        logits: The logarithms in units of :math:`2^{-F}`, clipped to :math:`2^{31}` units.
        fraction_bits: Their fraction bits :math:`F`, from 1 to 20.

    Returns:
        The logarithms in units of :math:`2^{-20}`, rounded down, as int64 of the same shape.
    """
    bounded = np.clip(logits, -(2**31), 2**31).astype(np.int64)
    return bounded * _LOG2_E >> fraction_bits + 30 - OCTAVE


def integer_exp2(depth: np.ndarray) -> np.ndarray:
    r"""Computes :math:`2^{-t}` in integers, never rising in :math:`t`.

    It interpolates a table of exact roots, :math:`\lfloor 2^{30 + i / 1024} \rfloor`, with a
    relative error of :math:`10^{-7}`.

    Arguments:
        depth: The exponents :math:`t \ge 0` in units of :math:`2^{-20}`.

    Returns:
        The powers in units of :math:`2^{-30}`, rounded down, as int64 of the same shape.

    Example:
        >>> integer_exp2(np.array([0, 1 << 20, 40 << 20])).tolist()
        [1073741824, 536870912, 0]
    """
    depth = np.asarray(depth, dtype=np.int64)
    whole, mantissa = _split_exp2(-depth)
    return mantissa >> np.minimum(-whole, 62)


def integer_softmax(logits: np.ndarray, *, floor: int = 0, total: int = 1 << 24) -> np.ndarray:
    r"""Computes cumulative probabilities from integer logarithms along the last axis.

    Arguments:
        logits: The logarithms to base two in units of :math:`2^{-20}`, of :math:`X \le 2^{16}`
            values, with shape :math:`(*, X)`. :func:`octaves` makes them.
        floor: The least probability of a value.
        total: What the probabilities sum to, at most :math:`2^{24}`.

    Returns:
        The sums of all probabilities before each value, from 0 to `total`, as int64 with shape
        :math:`(*, X + 1)`.

    Example:
        >>> integer_softmax(np.array([0, 1, 0]) << 20, total=400).tolist()
        [0, 100, 300, 400]
    """
    count = logits.shape[-1]
    weights = integer_exp2(logits.max(-1, keepdims=True) - logits)
    weights >>= max((count - 1).bit_length() - 8, 0)  # whose sum times 2^24 is below 2^63
    below = np.cumsum(weights, axis=-1)
    bounds = np.zeros((*logits.shape[:-1], count + 1), dtype=np.int64)
    bounds[..., 1:] = below * (total - floor * count) // below[..., -1:]
    return bounds + floor * np.arange(count + 1)


def integer_logistic(
    mean: np.ndarray,
    log_scale: np.ndarray,
    values: int,
    *,
    fraction_bits: int,
    total: int = 1 << 24,
) -> np.ndarray:
    r"""Computes the cumulative probabilities of discretised logistic distributions.

    Scales below :math:`2^{-7}` and above :math:`2^{36}` are taken for these bounds, and means
    :math:`2^{17}` away from zero likewise.

    Arguments:
        mean: The means in units of :math:`2^{-F}`, of any shape `*`.
        log_scale: The natural logarithms of the scales in the same units.
        values: The number of values :math:`X \le 2^{16}`, each of probability one or more.
        fraction_bits: The fraction bits :math:`F`, from 1 to 16.
        total: What the probabilities sum to.

    Returns:
        The sums of all probabilities before each value, from 0 to `total`, as int64 with shape
        :math:`(*, X + 1)`.
    """
    F = fraction_bits
    edges = (np.arange(1, values, dtype=np.int64) << F) - (1 << F - 1)
    mean = np.clip(mean, -(1 << 17 + F), 1 << 17 + F).astype(np.int64)
    log_scale = np.clip(octaves(log_scale, F), -7 << OCTAVE, 36 << OCTAVE)

    # In octaves the distance of an edge is t = |e - μ| log2(e) / s.
    whole, mantissa = _split_exp2(_LOG2_LOG2_E - log_scale)
    distance = edges - mean[..., None]
    shift = F + 27 - OCTAVE - whole[..., None]
    depth = np.abs(distance) * (mantissa >> 3)[..., None] >> shift
    small = integer_exp2(depth)
    tail = (small << _CHANCE) // (small + (1 << _ONE))
    below = np.where(distance < 0, tail, (1 << _CHANCE) - tail)

    bounds = np.zeros((*mean.shape, values + 1), dtype=np.int64)
    bounds[..., 1:-1] = below * (total - values) >> _CHANCE
    bounds[..., -1] = total - values
    return bounds + np.arange(values + 1)


@cache
def log2_binomials(n: int) -> np.ndarray:
    r"""Computes :math:`\log_2 \binom{n}{x}` for all :math:`x` in units of :math:`2^{-20}`.

    Arguments:
        n: The number of trials.

    Example:
        >>> (log2_binomials(4) >> 20).tolist()
        [0, 2, 2, 2, 0]
    """
    table = np.array([integer_log2(math.comb(n, x)) for x in range(n + 1)], dtype=np.int64)
    table.setflags(write=False)
    return table


def _split_exp2(exponent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Splits a power of two, of an exponent in octaves, into whole octaves and the rest."""
    table, fine = _roots(), OCTAVE - _STEPS
    whole = exponent >> OCTAVE
    rest = exponent & (1 << OCTAVE) - 1
    step, part = rest >> fine, rest & (1 << fine) - 1
    rise = table[step + 1] - table[step]
    return whole, table[step] + (rise * part >> fine)


@cache
def _roots() -> np.ndarray:
    r"""Computes the floors of :math:`2^{30 + i / 1024}` by exact square roots of integers."""
    table = []
    for step in range((1 << _STEPS) + 1):
        root = 1 << step + (_ONE << _STEPS)
        for _ in range(_STEPS):
            root = math.isqrt(root)
        table.append(root)
    return np.array(table, dtype=np.int64)


def integer_log2(number: int) -> int:
    r"""Computes :math:`2^{OCTAVE} \log_2 n`, rounded down, of a positive integer.

    It goes digit by digit: a square has twice the logarithm.

    Arguments:
        number: The integer :math:`n`.
    """
    result = number.bit_length() - 1
    mantissa = (number << 96) >> result  # in [1, 2)
    for _ in range(OCTAVE):
        mantissa = mantissa * mantissa >> 96
        carry = mantissa >> 97
        mantissa >>= carry
        result = 2 * result + carry
    return result
