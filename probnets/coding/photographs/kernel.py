r"""The compiled loop over a plane of a photograph: to code, to measure, to learn, to restore.

One loop does it all, so that an encoder cannot use what its decoder does not know. It is bit for
bit the plain Python of :mod:`probnets.coding.photographs.reference`.
"""

__all__ = [
    "BLOCK",
    "CONTEXT",
    "DECODE",
    "ENCODE",
    "MARGIN",
    "MEASURE",
    "RESTORE",
    "Buffers",
    "Coder",
    "Fit",
    "Record",
    "Taps",
    "run_plane",
]

import math
from typing import Any, NamedTuple

import numba
import numpy as np

from probnets.coding.rangeloops import advance_one, encode_one, peek_one

from .anchor import accumulate, normal_equations, pass_on, predict, solve
from .mixture import find_value, lower_quantile, set_mixture
from .network import OUTPUTS, Network, adapt, gradient, run_network
from .tables import Int, Tables

ENCODE, DECODE, MEASURE, CONTEXT, RESTORE = 0, 1, 2, 3, 4  # what the loop does

MARGIN = 3  # pixels around a plane
BLOCK = 8  # columns whose moments are kept together
START = 64  # the error that is assumed outside of a plane, in sixteenths of a level

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "forceinline": True, "_nrt": False}
_inlined = numba.njit(nogil=True, cache=True, **_OPTIONS)
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


class Buffers(NamedTuple):
    r"""Is the planes of a group with their margins, one after the other, flat, of int32.

    The pixels, their errors in sixteenths of a level, and the logarithms of the errors' sizes.
    """

    planes: np.ndarray
    errors: np.ndarray
    logs: np.ndarray


class Taps(NamedTuple):
    r"""Is the places that are looked at, as distances in the buffers from a pixel.

    ``regressors`` has shape :math:`(n, 3)`: twice the pixel at the first place, less those at
    the other two, is a regressor. ``errors`` are places of errors, ``pixels`` of pixels.
    """

    regressors: np.ndarray
    errors: np.ndarray
    pixels: np.ndarray


class Fit(NamedTuple):
    r"""Is the settings of least squares: what is added to the diagonal, the weight of a line
    of pixels in that of the next, and the number of pixels between two solutions.
    """

    ridge: float
    decay: float
    period: int


class Coder(NamedTuple):
    r"""Is the state of a range coder, with the bytes it reads and those it writes."""

    state: np.ndarray
    data: np.ndarray
    out: np.ndarray


class Record(NamedTuple):
    r"""Is room for what the loop shows: the bits of each pixel (float32), or its inputs
    (int16) and its value, anchor, spread, least and last value (int32).
    """

    bits: np.ndarray
    inputs: np.ndarray
    facts: np.ndarray


@_inlined
def _log(v: Int, log: np.ndarray) -> Int:
    r"""Computes the logarithm of one more than a number, in sixteenths of an octave."""
    octaves = 0
    while v >= log.size:
        v >>= 4
        octaves += 64
    return octaves + log[v]


@_inlined
def _nearby(errors: np.ndarray, o: Int, stride: Int) -> Int:
    r"""Computes the weighted mean of the errors' sizes around a pixel."""
    total = 8 * (abs(errors[o - 1]) + abs(errors[o - stride]))
    total += 4 * (abs(errors[o - stride + 1]) + abs(errors[o - stride - 1]))
    total += 2 * (abs(errors[o - 2]) + abs(errors[o - 2 * stride]))
    total += 2 * (abs(errors[o - stride + 2]) + abs(errors[o - 2 * stride + 1]))
    return total >> 5


@_inlined
def _squash(v: Int, ratio: Int, squash: np.ndarray) -> Int:
    size = squash[min(max(ratio, -128), 128) + 128]
    return size if v >= 0 else -size


@_inlined
def _look(
    x: np.ndarray,
    buffers: Buffers,
    taps: Taps,
    o: Int,
    anchor: Int,
    spread: Int,
    tables: Tables,
) -> None:
    r"""Fills the inputs of the network: the spread, then errors and pixels relative to it."""
    x[0] = min(spread, 192)
    i = 1
    for t in range(taps.errors.size):
        place = o + taps.errors[t]
        ratio = np.int64(buffers.logs[place]) - spread
        x[i] = _squash(np.int64(buffers.errors[place]), ratio, tables.squash)
        x[i + 1] = min(max(ratio, -64), 96)
        i += 2
    for t in range(taps.pixels.size):
        v = 16 * np.int64(buffers.planes[o + taps.pixels[t]]) - anchor
        x[i] = _squash(v, _log(abs(v), tables.log) - spread, tables.squash)
        i += 1


@_inlined
def _put(buffers: Buffers, o: Int, source: Int) -> None:
    r"""Repeats what is known of a pixel in another place."""
    buffers.planes[o] = buffers.planes[source]
    buffers.errors[o] = buffers.errors[source]
    buffers.logs[o] = buffers.logs[source]


@_compiled
def run_plane(
    action: Int,
    plane: Int,
    height: Int,
    width: Int,
    top: Int,
    components: Int,
    buffers: Buffers,
    taps: Taps,
    fit: Fit,
    net: Network,
    tables: Tables,
    coder: Coder,
    record: Record,
) -> int:
    r"""Goes through the pixels of a plane, line by line.

    Arguments:
        action: What to do: encode, decode, measure bits, show the context, or restore pixels
            from their differences to the rounded anchors, which stand in their places.
        plane: The plane. Those before it are known in full.
        height: Its height :math:`H`.
        width: Its width :math:`W`.
        top: The largest value of a channel.
        components: The number of components :math:`K` of the mixtures.
        buffers: The planes. Their margins are filled here.
        taps: The places to look at.
        fit: The settings of least squares.
        net: The network, which changes if it adapts.
        tables: The tables.
        coder: The coder, used to encode and decode.
        record: Room for :math:`HW` records.

    Returns:
        How many restored pixels would have left their bounds; they are cut off.
    """
    planes, errors, logs = buffers.planes, buffers.errors, buffers.logs
    stride = width + 2 * MARGIN
    here = plane * (height + 2 * MARGIN) * stride  # where the plane begins
    n = taps.regressors.shape[0]
    line = (n + 8) & -8
    size = n * line
    blocks = (width + BLOCK - 1) // BLOCK
    adaptive = net.rates.size > 0

    V = np.zeros((blocks + 2) * size)
    A, M, F = np.zeros(size), np.zeros(2 * size), np.zeros(line * line)
    w, z, lanes = np.zeros(line), np.zeros(line), np.zeros(8)
    x = np.zeros(1 + 2 * taps.errors.size + taps.pixels.size, np.float32)
    hidden, change = np.zeros_like(net.first_bias), np.zeros_like(net.first_bias)
    outputs, mixture = np.zeros(OUTPUTS, np.float32), np.zeros((4, components), np.int64)
    backward, forward = np.zeros(OUTPUTS, np.float32), np.zeros(OUTPUTS, np.float32)
    slopes = np.zeros(OUTPUTS)

    for y in range(MARGIN + 1):  # what lies above and left of the first pixel
        for i in range(stride):
            if y < MARGIN or i < MARGIN:
                o = here + y * stride + i
                planes[o] = (top + 1) >> 1 if plane == 0 else 0
                errors[o] = START
                logs[o] = tables.log[START]

    pixel, strays = 0, 0
    for y in range(height):
        start = here + (y + MARGIN) * stride + MARGIN
        if y > 0:  # the left margin repeats the pixel above
            for i in range(1, MARGIN + 1):
                _put(buffers, start - i, start - stride)
        for block in range(blocks):
            begin, end = block * BLOCK, min(block * BLOCK + BLOCK, width)
            for column in range(begin, end):
                o = start + column
                if (column - begin) % fit.period == 0:
                    normal_equations(M, V, block, A, n, line, column - begin)
                    solve(M, F, w, n, line, fit.ridge)

                base = np.int64(planes[o - 1]) + np.int64(planes[o - stride])  # in half levels
                for i in range(n):
                    difference = 2 * np.int64(planes[o + taps.regressors[i, 0]])
                    difference -= planes[o + taps.regressors[i, 1]]
                    z[i] = difference - planes[o + taps.regressors[i, 2]]
                z[n] = 0.0

                low, high = 0, top
                if plane > 0:  # a difference from the first plane
                    low = -np.int64(planes[o - here])
                    high = top + low
                place = 8.0 * (base + predict(w, z, line, lanes)) + 0.5
                place = place if place > 16.0 * low else 16.0 * low
                place = place if place < 16.0 * high else 16.0 * high
                anchor = np.int64(math.floor(place))
                nearby = _nearby(errors, o, stride)
                spread = _log(nearby + 1, tables.log)
                _look(x, buffers, taps, o, anchor, spread, tables)

                if action == CONTEXT:
                    value = np.int64(planes[o])
                    for i in range(x.size):
                        record.inputs[pixel, i] = np.int16(x[i])
                    record.facts[pixel, 0] = value
                    record.facts[pixel, 1] = anchor
                    record.facts[pixel, 2] = spread
                    record.facts[pixel, 3] = low
                    record.facts[pixel, 4] = high
                elif action == RESTORE:
                    value = np.int64(planes[o]) + ((anchor + 8) >> 4)
                    strays += value < low or value > high
                    value = min(max(value, low), high)
                else:
                    run_network(net, x, hidden, outputs)
                    set_mixture(
                        mixture,
                        outputs,
                        components,
                        anchor,
                        spread,
                        tables.power,
                        tables.exp,
                        tables.inverse,
                    )
                    if action == DECODE:
                        quantile = peek_one(coder.state, 0)
                        guess = min(max((anchor + 8) >> 4, low), high)
                        value = find_value(
                            mixture, components, quantile, guess, low, high, tables.sigmoid
                        )
                    else:
                        value = np.int64(planes[o])
                    first = lower_quantile(mixture, components, value, low, high, tables.sigmoid)
                    last = lower_quantile(
                        mixture, components, value + 1, low, high, tables.sigmoid
                    )
                    if action == ENCODE:
                        encode_one(coder.state, coder.out, 0, first, last - first)
                    elif action == DECODE:
                        advance_one(coder.state, coder.data, 0, first, last - first)
                    else:
                        record.bits[pixel] = 24.0 - math.log2(last - first)
                    if adaptive:
                        gradient(
                            slopes,
                            mixture,
                            components,
                            value,
                            low,
                            high,
                            spread,
                            tables.power,
                            tables.sigmoid,
                        )
                        used = 3 * components
                        adapt(net, x, hidden, slopes, used, change, backward, forward)

                planes[o] = value
                error = 16 * value - anchor
                errors[o] = error
                logs[o] = _log(abs(error), tables.log)
                if y == 0:  # what lies above the first line repeats it
                    for i in range(1, MARGIN + 1):
                        for j in range(1, MARGIN + 1):
                            _put(buffers, o + j - i * stride, o)

                z[n] = 2 * value - base
                weight = 16.0 / (16.0 + nearby)
                accumulate(A, z, n, line, weight * weight)
                pixel += 1

            pass_on(V, block, A, n, line, fit.decay)
        for i in range(MARGIN):  # the right margin repeats the last pixel
            _put(buffers, start + width + i, start + width - 1)

    for y in range(MARGIN):  # below the last line, for the planes that follow
        for i in range(stride):
            o = here + (height + MARGIN + y) * stride + i
            _put(buffers, o, o - (y + 1) * stride)
    return int(strays)
