r"""The code of a photograph's plane, defined in plain Python.

A photograph has three planes: the first channel, and the differences of two others from it. A
plane is coded line by line. Encoder and decoder know the planes before and the pixels above and
to the left, and compute the same distribution of the next pixel from them. Values are in levels,
anchors and errors in sixteenths of a level; :math:`\log v` of a whole number is tabled,
:math:`\lfloor 16 \log_2 (v + 1) \rceil`, and so are all other functions (:class:`Tables`).

**Margins.** Three pixels around the plane stand in for those that do not exist. Above and to the
left of the first pixel they have the middle value and an error of four levels. Then each margin
repeats what is known: above the first line its last pixel, on the left the pixel above, on the
right the last of the line, below the plane its last line.

**The anchor.** Least squares predict the pixel. Its target is :math:`t = 2 x - b` with the sum
:math:`b` of the pixels on the left and above, its regressors :math:`z_i` are twice a pixel less
two others. Every eight columns keep the moments

.. math:: V \gets \text{decay} \cdot V + \sum g^2 \, z (z, t)^\top \qquad g = 16 / (16 + m)

of their lines so far, where :math:`m` is a weighted mean of the errors' sizes around the pixel.
The weights :math:`w` solve the equations of the moments of the block, of its two neighbours and
of its own pixels in this line. The anchor is :math:`\lfloor 8 (b + w^\top z) + 1/2 \rfloor`, cut
off at the bounds of the pixel.

**The context.** The spread :math:`s = \log (m + 1)` is the scale of all else. The network sees
:math:`s`, errors nearby, and the distances of pixels nearby to the anchor, all squashed: a
distance :math:`d` becomes :math:`\pm 64 \operatorname{arsinh} 2^{(\log |d| - s) / 16}`, and of an
error it also sees :math:`\log |d| - s`.

**The network.** It has one hidden layer of units :math:`\lfloor c_1 (A_1^\top x + b_1) \rfloor`,
cut off at 0 and 1023, and outputs :math:`\lfloor c_2 (A_2^\top h + b_2) \rfloor`, cut off at
:math:`\pm 2047`. The :math:`c` are powers of two. Weights that are whole numbers and keep all
sums below :math:`2^{24}` leave nothing to round.

**The mixture.** The outputs are the logits, means and scales of logistic distributions around
the anchor. Value :math:`x` owns the quantiles from

.. math:: \left\lfloor (2^{24} - n) \sum_k \pi_k \,
    \sigma \! \left( \frac{x - 1/2 - \mu_k}{s_k} \right) \right\rfloor + x - \text{low}

to those of the next of the :math:`n` values; the first and the last value take the tails. A range
coder turns these intervals into bytes.

**Adaptation.** Each pixel moves the weights along the gradient of its log-probability.

What is computed in fractions is rounded operation by operation, in the order that is written
here: least squares in float64 and the layers of a network that adapts in float32. The compiled
loop has the same order, and hence the same bits.
"""

__all__ = [
    "Mixture",
    "adapt",
    "gradient",
    "layers",
    "predict",
    "run_plane",
    "solve",
    "whole_layers",
]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from probnets.coding.rangecoder import PRECISION, RangeDecoder, RangeEncoder

from .kernel import (
    BLOCK,
    CONTEXT,
    DECODE,
    ENCODE,
    MARGIN,
    RESTORE,
    START,
    Buffers,
    Fit,
    Record,
    Taps,
)
from .mixture import WEIGHT_BITS
from .network import CAP, LN2, MOST, OUTPUTS, Network
from .tables import CDF_BITS, FINE, LOGS, REACH, SCALES, Tables


def run_plane(
    action: int,
    plane: int,
    height: int,
    width: int,
    top: int,
    components: int,
    buffers: Buffers,
    taps: Taps,
    fit: Fit,
    net: Network,
    tables: Tables,
    coder: RangeEncoder | RangeDecoder | None,
    record: Record,
) -> int:
    r"""Goes through the pixels of a plane, as the compiled loop of the same name does.

    The arguments are those of :func:`probnets.coding.photographs.kernel.run_plane`, but that the
    coder is an encoder to encode, a decoder to decode, and may be missing otherwise.

    Returns:
        How many restored pixels would have left their bounds; they are cut off.
    """
    field = _Field(buffers, plane, height, width, tables)
    field.open((top + 1) >> 1 if plane == 0 else 0)
    squares = _LeastSquares(len(taps.regressors), width, fit)
    strays = 0

    for y in range(height):
        field.begin_line(y)
        for column in range(width):
            o, pixel = field.start + column, y * width + column
            low = -field.planes[o - field.here] if plane > 0 else 0
            high = top + low

            squares.reach(column)
            base, z = field.base(o), field.regressors(o, taps)
            anchor = _anchor(base, predict(squares.weights, z), low, high)
            nearby = field.nearby(o)
            spread = _log(nearby + 1, tables)
            x = field.inputs(o, anchor, spread, taps)

            if action == CONTEXT:
                value = field.planes[o]
                record.inputs[pixel] = x
                record.facts[pixel] = (value, anchor, spread, low, high)
            elif action == RESTORE:
                stray = field.planes[o] + _rounded(anchor)
                value = min(max(stray, low), high)
                strays += value != stray
            else:
                hidden, outputs = (layers if net.rates.size else whole_layers)(net, x)
                around = (anchor, spread, low, high)
                mixture = Mixture.from_outputs(outputs, components, *around, tables)
                value, freq = _code(action, mixture, field.planes[o], coder)
                if action not in (ENCODE, DECODE):
                    record.bits[pixel] = PRECISION - math.log2(freq)
                if net.rates.size:
                    adapt(net, x, hidden, gradient(mixture, value))

            field.learn(o, value, anchor, y)
            g = 16.0 / (16.0 + nearby)
            squares.learn(z, float(2 * value - base), g * g)
        squares.end_block()
        field.end_line()

    field.close()
    return strays


def _anchor(base: int, prediction: float, low: int, high: int) -> int:
    r"""Returns the anchor, from numbers in half levels."""
    place = 8.0 * (base + prediction) + 0.5
    return math.floor(min(max(place, 16.0 * low), 16.0 * high))


def _rounded(anchor: int) -> int:
    return (anchor + FINE // 2) // FINE


def _code(
    action: int, mixture: "Mixture", value: int, coder: RangeEncoder | RangeDecoder | None
) -> tuple[int, int]:
    r"""Encodes a value or decodes another, and returns it with the quantiles that it owns."""
    if action == DECODE:
        assert isinstance(coder, RangeDecoder)
        value = mixture.find_value(coder.peek())

    first = mixture.lower_quantile(value)
    freq = mixture.lower_quantile(value + 1) - first
    if isinstance(coder, RangeDecoder) and action == DECODE:
        coder.advance(first, freq)
    elif isinstance(coder, RangeEncoder) and action == ENCODE:
        coder.encode(first, freq)
    return value, freq


# Pixels, their margins and what is seen of them


def _log(v: int, tables: Tables) -> int:
    r"""Returns :math:`16 \log_2 (v + 1)`, roughly so from 4096 on."""
    return int(tables.log[v]) if v < LOGS else 4 * 16 + _log(v // 16, tables)


def _squash(v: int, ratio: int, tables: Tables) -> int:
    r"""Returns a squashed distance `v`, whose size is :math:`2^{\text{ratio} / 16}` spreads."""
    size = int(tables.squash[min(max(ratio, -REACH), REACH) + REACH])
    return size if v >= 0 else -size


class _Field:
    r"""Keeps the planes as lists of Python's integers, and fills the margins of one."""

    def __init__(
        self, buffers: Buffers, plane: int, height: int, width: int, tables: Tables
    ) -> None:
        self.buffers, self.tables = buffers, tables
        self.planes, self.errors, self.logs = (part.tolist() for part in buffers)
        self.height, self.width = height, width
        self.stride = width + 2 * MARGIN
        self.here = plane * (height + 2 * MARGIN) * self.stride  # where the plane begins
        self.start = self.here  # where a line begins

    def _put(self, o: int, value: int, error: int) -> None:
        self.planes[o], self.errors[o] = value, error
        self.logs[o] = _log(abs(error), self.tables)

    def _repeat(self, o: int, source: int) -> None:
        self._put(o, self.planes[source], self.errors[source])

    def open(self, middle: int) -> None:
        for y in range(MARGIN + 1):
            for i in range(self.stride if y < MARGIN else MARGIN):
                self._put(self.here + y * self.stride + i, middle, START)

    def begin_line(self, y: int) -> None:
        self.start = self.here + (y + MARGIN) * self.stride + MARGIN
        for i in range(1, MARGIN + 1 if y > 0 else 1):
            self._repeat(self.start - i, self.start - self.stride)

    def end_line(self) -> None:
        last = self.start + self.width - 1
        for i in range(1, MARGIN + 1):
            self._repeat(last + i, last)

    def close(self) -> None:
        below = self.start - MARGIN + self.stride
        for i in range(MARGIN * self.stride):
            self._repeat(below + i, below - self.stride + i % self.stride)
        for part, values in zip(self.buffers, (self.planes, self.errors, self.logs), strict=True):
            part[:] = values

    def learn(self, o: int, value: int, anchor: int, y: int) -> None:
        self._put(o, value, FINE * value - anchor)
        if y == 0:
            for i in range(1, MARGIN + 1):
                for j in range(1, MARGIN + 1):
                    self._repeat(o - i * self.stride + j, o)

    def base(self, o: int) -> int:
        return self.planes[o - 1] + self.planes[o - self.stride]

    def regressors(self, o: int, taps: Taps) -> list[float]:
        p = self.planes
        return [float(2 * p[o + a] - p[o + b] - p[o + c]) for a, b, c in taps.regressors.tolist()]

    def nearby(self, o: int) -> int:
        r"""Returns the weighted mean :math:`m` of the errors' sizes around a pixel."""
        weights = {(0, -1): 8, (-1, 0): 8, (-1, 1): 4, (-1, -1): 4}
        weights |= {(0, -2): 2, (-2, 0): 2, (-1, 2): 2, (-2, 1): 2}
        sizes = (g * abs(self.errors[o + y * self.stride + x]) for (y, x), g in weights.items())
        return sum(sizes) // 32

    def inputs(self, o: int, anchor: int, spread: int, taps: Taps) -> list[int]:
        x = [min(spread, 192)]
        for place in taps.errors.tolist():
            ratio = self.logs[o + place] - spread
            x += [_squash(self.errors[o + place], ratio, self.tables)]
            x += [min(max(ratio, -64), 96)]
        for place in taps.pixels.tolist():
            distance = FINE * self.planes[o + place] - anchor
            ratio = _log(abs(distance), self.tables) - spread
            x += [_squash(distance, ratio, self.tables)]
        return x


# Least squares


class _LeastSquares:
    r"""Keeps the moments :math:`z (z, t)^\top` of blocks, of which it uses the upper triangle."""

    def __init__(self, n: int, width: int, fit: Fit) -> None:
        self.n, self.fit = n, fit
        count = (width + BLOCK - 1) // BLOCK
        self.blocks = [self._zeros() for _ in range(count + 2)]  # one to spare at each end
        self.block = 0

    def _zeros(self) -> list[list[float]]:
        return [[0.0] * (self.n + 1) for _ in range(self.n)]

    def reach(self, column: int) -> None:
        r"""Goes on to a column, and solves the equations if it is time."""
        if column % BLOCK == 0:
            if column > 0:
                self.end_block()
            self.block = column // BLOCK + 1
            left, own, right = self.blocks[self.block - 1 : self.block + 2]
            self.around = _combine(lambda a, b, c: (a + b) + c, left, own, right)
            self.since = self._zeros()
        if column % BLOCK % self.fit.period == 0:
            M = _combine(lambda a, b: a + b, self.around, self.since)
            self.weights = solve(M, self.fit.ridge)

    def end_block(self) -> None:
        decay, own = self.fit.decay, self.blocks[self.block]
        self.blocks[self.block] = _combine(lambda a, b: a * decay + b, own, self.since)

    def learn(self, z: list[float], target: float, g: float) -> None:
        right = [*z, target]
        for i, row in enumerate(self.since):
            first = g * z[i]
            for k in range(i, self.n + 1):
                row[k] += first * right[k]


def predict(w: Sequence[float], z: Sequence[float]) -> float:
    r"""Computes :math:`w^\top z` in eight sums, of which each takes every eighth product.

    Arguments:
        w: The weights, with shape :math:`(n,)`.
        z: The regressors, with shape :math:`(n,)`.
    """
    lanes = [0.0] * 8
    for i, (weight, regressor) in enumerate(zip(w, z, strict=True)):
        lanes[i % 8] += weight * regressor
    a, b, c, d, e, f, g, h = lanes
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


def _combine(function: Callable[..., float], *matrices: list[list[float]]) -> list[list[float]]:
    r"""Applies a function number by number."""
    return [list(map(function, *rows)) for rows in zip(*matrices, strict=True)]


def solve(M: list[list[float]], ridge: float) -> list[float]:
    r"""Solves :math:`(A + \text{ridge}) w = b` for the upper triangle of :math:`M = (A, b)`.

    Elimination makes the matrix :math:`L D L^\top`. It has no pivots, since the matrix is
    positive definite; a diagonal that rounding made smaller than the ridge counts as the ridge.

    Arguments:
        M: The equations, with shape :math:`(n, n + 1)`, which are lost.
        ridge: What is added to the diagonal.

    Returns:
        The weights :math:`w`, with shape :math:`(n,)`.
    """
    n = len(M)
    for i in range(n):
        M[i][i] += ridge

    L = [[0.0] * n for _ in range(n)]
    w = [0.0] * n
    for k in range(n):
        inverse = 1.0 / max(M[k][k], ridge)
        for i in range(k + 1, n):
            L[i][k] = M[k][i] * inverse
            for j in range(i, n + 1):
                M[i][j] -= L[i][k] * M[k][j]
        w[k] = M[k][n] * inverse

    for j in range(n - 1, 0, -1):
        for i in range(j):
            w[i] -= w[j] * L[j][i]
    return w


# The network


def whole_layers(net: Network, x: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    r"""Computes a network of whole numbers in whole numbers, without any rounding.

    Arguments:
        net: The network.
        x: The inputs, with shape :math:`(I,)`.

    Returns:
        The hidden units, with shape :math:`(U,)`, and the outputs, with shape :math:`(16,)`.
    """

    def layer(
        x: np.ndarray, A: np.ndarray, b: np.ndarray, scale: np.ndarray, least: int, most: int
    ) -> np.ndarray:
        total = x @ A.reshape(-1, b.size).astype(np.int64) + b.astype(np.int64)
        # A power of two times a whole number below 2^53 is exact in float64.
        return np.clip(np.floor(total * scale.astype(np.float64)), least, most).astype(np.int64)

    hidden = layer(np.array(x, np.int64), net.first, net.first_bias, net.first_scale, 0, CAP)
    outputs = layer(hidden, net.second, net.second_bias, net.second_scale, -MOST, MOST)
    return hidden, outputs


def layers(net: Network, x: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    r"""Computes a network in float32: even and odd inputs in two sums, then units in four.

    Arguments:
        net: The network.
        x: The inputs, with shape :math:`(I,)`.

    Returns:
        The hidden units, with shape :math:`(U,)`, and the outputs, with shape :math:`(16,)`.
    """
    sums = [net.first_bias, np.zeros_like(net.first_bias)]
    for i, row in enumerate(net.first.reshape(-1, net.first_bias.size)):
        sums[i % 2] = sums[i % 2] + np.float32(x[i]) * row
    h = np.clip(np.floor((sums[0] + sums[1]) * net.first_scale), np.float32(0), np.float32(CAP))

    sums = [net.second_bias, *np.zeros((3, OUTPUTS), np.float32)]
    for k, row in enumerate(net.second.reshape(-1, OUTPUTS)):
        sums[k % 4] = sums[k % 4] + h[k] * row
    total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * net.second_scale
    return h, np.clip(np.floor(total), np.float32(-MOST), np.float32(MOST))


def adapt(net: Network, x: Sequence[int], hidden: np.ndarray, slopes: Sequence[float]) -> None:
    r"""Moves the weights of a network along a gradient, in float32.

    Backward through the second layer, the gradient reaches the hidden units that are not cut
    off. Each weight moves by its rate times the gradient on one side and the value on the other.

    Arguments:
        net: The network, whose weights change.
        x: The inputs, with shape :math:`(I,)`.
        hidden: The hidden units, with shape :math:`(U,)`.
        slopes: The gradient by the outputs, as :func:`gradient` gives it.
    """
    used = len(slopes)
    slope = np.zeros(OUTPUTS, np.float32)
    slope[:used] = slopes
    backward, forward = slope * net.back, slope * net.ahead
    first = net.first.reshape(-1, hidden.size)  # views, so that the network changes
    second = net.second.reshape(-1, OUTPUTS)

    total = np.zeros_like(hidden)
    for j in range(used):
        total = total + backward[j] * second[:, j]
    flat = (hidden <= 0) | (hidden >= CAP)
    change = np.where(flat, np.float32(0), total * net.lift)

    for i, row in enumerate(first):
        row[:] = row + (net.rates[i] * np.float32(x[i])) * change
    net.first_bias[:] = net.first_bias + net.rates[len(first)] * change
    second[:] = second + hidden[:, None] * forward
    net.second_bias[:] = net.second_bias + net.second_rates * forward
    net.turned[:] = second.T.ravel()


# The mixture


@dataclass(frozen=True)
class Mixture:
    r"""Creates a mixture of discretised logistics over the values from `low` to `high`.

    Arguments:
        means: The means :math:`16 \mu_k`, with shape :math:`(K,)`.
        inverses: The inverse scales :math:`2^{26} / s_k`, with shape :math:`(K,)`.
        weights: The weights :math:`2^{16} \pi_k`, with shape :math:`(K,)`.
        breadth: The spread of errors nearby, in units of 1/1024 of a level.
        low: The least value.
        high: The last value.
        tables: The tables.
    """

    means: list[int]
    inverses: list[int]
    weights: list[int]
    breadth: int
    low: int
    high: int
    tables: Tables

    @classmethod
    def from_outputs(
        cls,
        outputs: np.ndarray,
        components: int,
        anchor: int,
        spread: int,
        low: int,
        high: int,
        tables: Tables,
    ) -> "Mixture":
        r"""Returns the mixture that a network states.

        Arguments:
            outputs: The outputs, in sixty-fourths: logits in octaves, means in spreads from the
                anchor, and scales in octaves from the spread.
            components: The number of components :math:`K`.
            anchor: The anchor, in sixteenths of a level.
            spread: The logarithm of the spread of errors nearby.
            low: The least value.
            high: The last value.
            tables: The tables.
        """
        logits, shifts, widths = (
            [int(v) for v in outputs[i * components : (i + 1) * components]] for i in range(3)
        )
        breadth = int(tables.power[spread])
        means = [anchor + (shift * breadth + 2**11) // 2**12 for shift in shifts]
        scales = [
            (4 * spread + v + 8 * 16 + 4) // 8 for v in widths
        ]  # 16: from 1/16 to 2^-6 levels
        inverses = [int(tables.inverse[min(max(i, 0), SCALES - 1)]) for i in scales]

        end = len(tables.exp) - 1
        parts = [int(tables.exp[min(max(logits) - logit, end)]) for logit in logits]
        rate = float(1 << WEIGHT_BITS) / sum(parts)
        rest = [int(part * rate) for part in parts[1:]]  # in float64, rounded down
        weights = [(1 << WEIGHT_BITS) - sum(rest), *rest]
        return cls(means, inverses, weights, breadth, low, high, tables)

    def place(self, x: int, k: int) -> int:
        r"""Returns where a value begins, in 2^-16 of the scale of component `k`."""
        return (FINE * x - FINE // 2 - self.means[k]) * self.inverses[k] // 2**14

    def below(self, x: int, k: int) -> int:
        r"""Returns :math:`2^{22}` times the probability of less than a value in component `k`.

        The logistic function is tabled in steps of 1/32, with straight lines between, and ends
        just below 16.
        """
        sigmoid, place = self.tables.sigmoid, self.place(x, k)
        i, part = divmod(min(abs(place), 2**20 - 1), 2**11)
        begin, end = int(sigmoid[i]), int(sigmoid[i + 1])
        value = begin + (end - begin) * part // 2**11
        return value if place >= 0 else (1 << CDF_BITS) - value

    def lower_quantile(self, x: int) -> int:
        r"""Returns the first quantile that a value owns, or :math:`2^{24}` past the last one."""
        total = 1 << PRECISION
        if x <= self.low:
            return 0
        if x > self.high:
            return total
        mass = sum(weight * self.below(x, k) for k, weight in enumerate(self.weights))
        spare = total - (self.high - self.low + 1)
        return (mass * spare >> WEIGHT_BITS + CDF_BITS) + x - self.low

    def find_value(self, quantile: int) -> int:
        r"""Returns the last value whose quantiles begin at one or before it."""
        first, last = self.low, self.high
        while first < last:
            middle = (first + last + 1) // 2
            if self.lower_quantile(middle) <= quantile:
                first = middle
            else:
                last = middle - 1
        return first


def gradient(mixture: Mixture, x: int) -> list[float]:
    r"""Computes the gradient of a value's log-probability, in float64.

    With the ends :math:`u, v` of the value in component `k`, it is

    .. math:: \frac{\pi_k (\sigma(v) - \sigma(u))}{P} - \pi_k \qquad
        \frac{\pi_k (\sigma'(u) - \sigma'(v))}{P} \cdot \frac{\text{spread}}{s_k} \qquad
        \frac{\pi_k (u \, \sigma'(u) - v \, \sigma'(v))}{P}

    by the logarithms of the weights, by the means in spreads, and by the logarithms of the
    scales. Those by logarithms are turned into those by octaves. Sizes are cut off at 4, and
    those up to :math:`10^{-6}` are zero.

    Arguments:
        mixture: The mixture.
        x: The value.

    Returns:
        The gradient, with shape :math:`(3K,)`.
    """
    masses, by_mean, by_scale = [], [], []
    total = 1e-9
    for k, weight in enumerate(mixture.weights):
        u, v = mixture.place(x, k), mixture.place(x + 1, k)  # 2^16 times as large
        a = 0.0 if x <= mixture.low else mixture.below(x, k) * 2.0**-22
        b = 1.0 if x >= mixture.high else mixture.below(x + 1, k) * 2.0**-22
        slope_a, slope_b = a * (1.0 - a), b * (1.0 - b)
        share = weight * 2.0**-16
        masses.append(share * (b - a))
        by_mean.append(share * (slope_a - slope_b))
        by_scale.append(share * (u * slope_a - v * slope_b) * 2.0**-16)
        total += masses[k]

    ratios = [inverse * mixture.breadth * 2.0**-36 for inverse in mixture.inverses]
    slopes = [
        *((m / total - w * 2.0**-16) * LN2 for m, w in zip(masses, mixture.weights, strict=True)),
        *(m / total * ratio for m, ratio in zip(by_mean, ratios, strict=True)),
        *(m / total * LN2 for m in by_scale),
    ]
    return [min(max(g, -4.0), 4.0) if abs(g) > 1e-6 else 0.0 for g in slopes]
