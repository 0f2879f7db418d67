r"""The context network in compiled loops, and its adaptation.

A network has one hidden layer. Its weights, inputs and outputs are whole numbers, and every sum
stays below :math:`2^{24}`, so that float32 holds it exactly and any order gives the same bits.
Adaptation makes the weights fractions. Then it is the order that decides, and
:mod:`probnets.coding.photographs.reference` states it plainly.
"""

__all__ = ["CAP", "MOST", "OUTPUTS", "UNITS", "Network", "adapt", "gradient", "run_network"]

from typing import Any, NamedTuple

import numba
import numpy as np

from probnets.backend.rows import fill, floor, larger, load, peek, smaller, store

from .mixture import INVERSE, MEAN, WEIGHT, logistic
from .tables import Int

UNITS = 32  # hidden units are a multiple of it
OUTPUTS = 16  # outputs, of which 3K are used
CAP = 1023  # the largest value of a hidden unit
MOST = 2047  # the largest size of an output
LN2 = 0.6931471805599453

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "forceinline": True, "_nrt": False}
_compiled = numba.njit(nogil=True, cache=True, **_OPTIONS)


class Network(NamedTuple):
    r"""Is the arrays of a network with `I` inputs and `U` hidden units, flat and of float32.

    ``first`` has shape :math:`(I, U)`, ``second`` :math:`(U, 16)`. Sums, biases included, are
    multiplied by the powers of two in ``first_scale`` and ``second_scale`` and rounded down.

    A network that adapts also has ``turned``, the transpose of ``second``; ``rates``, by which
    the weights of each input and, last, the biases of the first layer move; ``lift``, the
    integer weights per unit of real weight of each hidden unit; ``back``, the real weights per
    integer of each output; ``ahead``, by which the weights of each output move; and
    ``second_rates``, by which the biases of the outputs do. In others ``rates`` is empty.
    """

    first: np.ndarray  # (I * U,)
    first_bias: np.ndarray  # (U,)
    first_scale: np.ndarray  # (U,)
    second: np.ndarray  # (U * 16,)
    second_bias: np.ndarray  # (16,)
    second_scale: np.ndarray  # (16,)
    turned: np.ndarray  # (16 * U,)
    rates: np.ndarray  # (I + 1,)
    lift: np.ndarray  # (U,)
    back: np.ndarray  # (16,)
    ahead: np.ndarray  # (16,)
    second_rates: np.ndarray  # (16,)


@_compiled
def run_network(net: Network, x: np.ndarray, hidden: np.ndarray, outputs: np.ndarray) -> None:
    r"""Computes the outputs, whole numbers of a size up to 2047.

    Arguments:
        net: The network.
        x: The inputs, with shape :math:`(I,)`.
        hidden: Room for the hidden units, with shape :math:`(U,)`.
        outputs: Room for the outputs, with shape :math:`(16,)`.
    """
    units, inputs = hidden.size, x.size
    zero, cap = fill(np.float32(0), 32), fill(np.float32(CAP), 32)
    for k in range(0, units, 32):
        even, odd = load(net.first_bias, k, 32), zero
        for i in range(0, inputs - 1, 2):
            o = i * units + k
            even = even + fill(peek(x, i), 32) * load(net.first, o, 32)
            odd = odd + fill(peek(x, i + 1), 32) * load(net.first, o + units, 32)
        if inputs & 1:
            i = inputs - 1
            even = even + fill(peek(x, i), 32) * load(net.first, i * units + k, 32)
        total = floor((even + odd) * load(net.first_scale, k, 32))
        store(hidden, k, smaller(larger(total, zero), cap))

    a, b = load(net.second_bias, 0, 16), fill(np.float32(0), 16)
    c, d = fill(np.float32(0), 16), fill(np.float32(0), 16)
    for k in range(0, units, 4):
        o = k * OUTPUTS
        a = a + fill(peek(hidden, k), 16) * load(net.second, o, 16)
        b = b + fill(peek(hidden, k + 1), 16) * load(net.second, o + 16, 16)
        c = c + fill(peek(hidden, k + 2), 16) * load(net.second, o + 32, 16)
        d = d + fill(peek(hidden, k + 3), 16) * load(net.second, o + 48, 16)
    total = floor(((a + b) + (c + d)) * load(net.second_scale, 0, 16))
    most, least = fill(np.float32(MOST), 16), fill(np.float32(-MOST), 16)
    store(outputs, 0, smaller(larger(total, least), most))


@_compiled
def _cut(g: float) -> float:
    return min(max(g, -4.0), 4.0) if abs(g) > 1e-6 else 0.0


@_compiled
def gradient(
    slopes: np.ndarray,
    mixture: np.ndarray,
    K: Int,
    x: Int,
    low: Int,
    high: Int,
    spread: Int,
    power: np.ndarray,
    sigmoid: np.ndarray,
) -> None:
    r"""Computes the gradient of a value's log-probability by the outputs.

    It is computed from the tables alone, in nats by octaves of the weights, by spreads for the
    means, and by octaves of the scales. Sizes are cut off at 4, and below :math:`10^{-6}` they
    are zero, so that no number is ever too small for float32.

    Arguments:
        slopes: Room for the gradient, with shape :math:`(16,)`, and at least :math:`3K`.
        mixture: The components.
        K: The number of components.
        x: The value.
        low: The least value.
        high: The last value.
        spread: The logarithm of the spread of errors nearby.
        power: A table of :class:`Tables`.
        sigmoid: A table of :class:`Tables`.
    """
    total = 1e-9
    for k in range(K):
        mean, inverse = mixture[MEAN, k], mixture[INVERSE, k]
        begin = ((16 * x - 8 - mean) * inverse) >> 14
        end = ((16 * x + 8 - mean) * inverse) >> 14
        a = 0.0 if x <= low else logistic(begin, sigmoid) * 2.0**-22
        b = 1.0 if x >= high else logistic(end, sigmoid) * 2.0**-22
        slope_a, slope_b = a * (1.0 - a), b * (1.0 - b)
        weight = mixture[WEIGHT, k] * 2.0**-16
        slopes[k] = weight * (b - a)
        slopes[K + k] = weight * (slope_a - slope_b)
        slopes[2 * K + k] = weight * (begin * slope_a - end * slope_b) * 2.0**-16
        total += slopes[k]
    for k in range(K):
        ratio = mixture[INVERSE, k] * power[spread] * 2.0**-36  # the spread by the scale
        logit = slopes[k] / total - mixture[WEIGHT, k] * 2.0**-16
        slopes[k] = _cut(logit * LN2)
        slopes[K + k] = _cut(slopes[K + k] / total * ratio)
        slopes[2 * K + k] = _cut(slopes[2 * K + k] / total * LN2)


@_compiled
def adapt(
    net: Network,
    x: np.ndarray,
    hidden: np.ndarray,
    slopes: np.ndarray,
    used: Int,
    change: np.ndarray,
    backward: np.ndarray,
    forward: np.ndarray,
) -> None:
    r"""Moves the weights along the gradient of :func:`gradient`.

    Arguments:
        net: The network, whose weights change.
        x: The inputs.
        hidden: The hidden units that :func:`run_network` left.
        slopes: The gradient by the outputs.
        used: The number of outputs that are used.
        change: Room for the gradient by the hidden units, with shape :math:`(U,)`.
        backward: Room for 16 numbers.
        forward: Room for 16 numbers, zero beyond those that are used.
    """
    units, inputs = hidden.size, x.size
    for j in range(used):
        slope = np.float32(slopes[j])
        backward[j] = slope * net.back[j]
        forward[j] = slope * net.ahead[j]

    for k in range(0, units, 32):
        total = fill(np.float32(0), 32)
        for j in range(used):
            total = total + fill(peek(backward, j), 32) * load(net.turned, j * units + k, 32)
        store(change, k, total * load(net.lift, k, 32))
    for k in range(units):
        if hidden[k] <= np.float32(0) or hidden[k] >= np.float32(CAP):
            change[k] = np.float32(0)

    for k in range(0, units, 32):
        row = load(change, k, 32)
        bias = load(net.first_bias, k, 32) + fill(peek(net.rates, inputs), 32) * row
        store(net.first_bias, k, bias)
        for i in range(inputs):
            o = i * units + k
            rate = fill(peek(net.rates, i) * peek(x, i), 32)
            store(net.first, o, load(net.first, o, 32) + rate * row)
        for j in range(used):
            o = j * units + k
            rate = fill(peek(forward, j), 32)
            store(net.turned, o, load(net.turned, o, 32) + rate * load(hidden, k, 32))

    row = load(forward, 0, 16)
    for k in range(units):
        o = k * OUTPUTS
        store(net.second, o, load(net.second, o, 16) + fill(peek(hidden, k), 16) * row)
    bias = load(net.second_bias, 0, 16) + load(net.second_rates, 0, 16) * row
    store(net.second_bias, 0, bias)
