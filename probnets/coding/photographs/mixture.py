r"""Mixtures of discretised logistics in integers, in compiled loops."""

__all__ = ["WEIGHT_BITS", "find_value", "lower_quantile", "set_mixture"]

from typing import Any

import numba
import numpy as np

from .tables import CDF_BITS, SCALES, Int

WEIGHT_BITS = 16  # of the weights of a mixture, whose sum is 2^16

# The lines of a mixture: means, scales as indices, inverse scales, weights.
MEAN, SCALE, INVERSE, WEIGHT = 0, 1, 2, 3

_TOTAL = 1 << 24  # quantiles, of which every value owns one or more
_SHIFT = np.uint64(WEIGHT_BITS + CDF_BITS)
_EDGE = (1 << 20) - 1  # 16 units of the logistic function, in steps of 2^-16
_ONE = 1 << CDF_BITS

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "forceinline": True, "_nrt": False}
_compiled = numba.njit(nogil=True, cache=True, **_OPTIONS)


@_compiled
def set_mixture(
    mixture: np.ndarray,
    outputs: np.ndarray,
    K: Int,
    anchor: Int,
    spread: Int,
    power: np.ndarray,
    exp: np.ndarray,
    inverse: np.ndarray,
) -> None:
    r"""Turns the outputs of a network into the components of a mixture.

    Arguments:
        mixture: The components, with shape :math:`(4, K)`: means in sixteenths of a level,
            scales in eighths of an octave, inverse scales and weights that sum to
            :math:`2^{16}`.
        outputs: The outputs, in sixty-fourths: logits in octaves, means in spreads from the
            anchor, and scales in octaves from the spread.
        K: The number of components.
        anchor: The anchor, in sixteenths of a level.
        spread: The logarithm of the spread of errors nearby.
        power: A table of :class:`Tables`.
        exp: A table of :class:`Tables`.
        inverse: A table of :class:`Tables`.
    """
    top = outputs[0]
    for k in range(1, K):
        top = max(top, outputs[k])

    total = 0
    for k in range(K):
        below = np.int64(min(top - outputs[k], np.float32(exp.size - 1)))
        mixture[WEIGHT, k] = exp[below]
        total += exp[below]
        mean = np.int64(outputs[K + k]) * power[spread]
        mixture[MEAN, k] = anchor + ((mean + 2048) >> 12)
        scale = (4 * spread + np.int64(outputs[2 * K + k]) + 132) >> 3
        scale = min(max(scale, 0), SCALES - 1)
        mixture[SCALE, k] = scale
        mixture[INVERSE, k] = inverse[scale]

    rate = 65536.0 / total
    rest = 1 << WEIGHT_BITS
    for k in range(1, K):
        weight = np.int64(mixture[WEIGHT, k] * rate)
        mixture[WEIGHT, k] = weight
        rest -= weight
    mixture[WEIGHT, 0] = rest


@_compiled
def logistic(place: Int, sigmoid: np.ndarray) -> Int:
    r"""Computes :math:`2^{22} \sigma(u)` from a place :math:`2^{16} u`."""
    u = min(abs(place), _EDGE)
    i = u >> 11
    value = sigmoid[i] + (((sigmoid[i + 1] - sigmoid[i]) * (u & 2047)) >> 11)
    return value if place >= 0 else _ONE - value


@_compiled
def lower_quantile(
    mixture: np.ndarray, K: Int, x: Int, low: Int, high: Int, sigmoid: np.ndarray
) -> Int:
    r"""Computes the first of the :math:`2^{24}` quantiles that a value owns.

    Arguments:
        mixture: The components of :func:`set_mixture`.
        K: The number of components.
        x: The value, or one more than the last value for the end of its quantiles.
        low: The least value, which takes the lower tail.
        high: The last value, which takes the upper tail.
        sigmoid: A table of :class:`Tables`.
    """
    if x <= low:
        return 0
    if x > high:
        return _TOTAL
    mass = 0
    for k in range(K):
        place = ((16 * x - 8 - mixture[MEAN, k]) * mixture[INVERSE, k]) >> 14
        mass += mixture[WEIGHT, k] * logistic(place, sigmoid)
    spare = np.uint64(_TOTAL - (high - low + 1))  # every value owns one quantile at least
    return np.int64((np.uint64(mass) * spare) >> _SHIFT) + (x - low)


@_compiled
def find_value(
    mixture: np.ndarray,
    K: Int,
    quantile: Int,
    guess: Int,
    low: Int,
    high: Int,
    sigmoid: np.ndarray,
) -> Int:
    r"""Finds the value that owns a quantile, by doubling steps from a guess, then bisection."""
    step = 1
    if lower_quantile(mixture, K, guess, low, high, sigmoid) <= quantile:
        first = guess  # its quantiles begin here or earlier
        last = guess + 1
        while last <= high and lower_quantile(mixture, K, last, low, high, sigmoid) <= quantile:
            first = last
            step *= 2
            last += step
        last = min(last, high + 1)
    else:
        last = guess  # its quantiles end here or earlier
        first = guess - 1
        while first > low and lower_quantile(mixture, K, first, low, high, sigmoid) > quantile:
            last = first
            step *= 2
            first -= step
        first = max(first, low)
    while last - first > 1:
        middle = (first + last) >> 1
        if lower_quantile(mixture, K, middle, low, high, sigmoid) <= quantile:
            first = middle
        else:
            last = middle
    return first
