r"""Expected counts of a circuit, the E-step of EM, as a compiled loop.

The loop takes blocks of rows through the tree, up with likelihoods and down with posteriors. A
block meets each sum matrix as three small matrix products, whose operands stay in cache.
"""

__all__ = ["Counts", "Tables", "Workspace", "expected_counts"]

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload

from probnets.backend.rows import (
    add_products,
    clear,
    fill,
    load,
    row_max,
    row_sum,
    store,
    width,
)

from .structure import Tree

# pyright: reportMissingParameterType=false

BLOCK = 32  # rows that go through the tree together
EVERY = 4  # factors that rows may have before they are rescaled, lest they underflow


class Tables(NamedTuple):
    r"""The probabilities of a discrete circuit, as float32 arrays.

    Arguments:
        root: The distribution of the root's unit, with shape :math:`(K,)`.
        sums: The sum matrices, rows summing to one, with shape :math:`(G, K, K)`.
        inputs: The input distributions, with shape :math:`(H, X, K)`.
        log_scale: The logarithm of what each value's probabilities were divided by, lest they
            underflow, with shape :math:`(H, X)`. None means one.
    """

    root: np.ndarray
    sums: np.ndarray
    inputs: np.ndarray
    log_scale: np.ndarray | None = None


class Counts(NamedTuple):
    r"""How often each parameter is expected to have been used, in the layout of the tables.

    Arguments:
        root: The counts of the root's units, with shape :math:`(K,)`.
        sums: The counts of the edges, with shape :math:`(G, K, K)`.
        inputs: The counts of the inputs, with shape :math:`(H, X, K)`.
        log_prob: The log-likelihood of each row, with shape :math:`(N,)`.
    """

    root: np.ndarray
    sums: np.ndarray
    inputs: np.ndarray
    log_prob: np.ndarray


class Workspace:
    r"""Creates room for the arrays of an E-step, which the next one takes over.

    Large arrays cost more to get from the system, and to go through, than a batch of rows: the
    workers remember which values they met, and clear and add only the counts of those.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, str], np.ndarray] = {}

    def array(self, worker: int, name: str, shape: tuple[int, ...], kind: type) -> np.ndarray:
        r"""Returns an array that is zero at first and then holds what was left in it."""
        array = self._arrays.get((worker, name))
        if array is None or array.shape != shape:
            array = self._arrays[worker, name] = np.zeros(shape, kind)
        return array

    def counts(
        self, worker: int, shapes: list[tuple[int, ...]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        r"""Returns counts that are zero, and which values were met, none."""
        root = self.array(worker, "root", shapes[0], np.float32)
        sums = self.array(worker, "sums", shapes[1], np.float32)
        inputs = self.array(worker, "inputs", shapes[2], np.float32)
        met = self.array(worker, "met", (math.prod(shapes[2][:2]),), np.uint8)
        _clear_met(inputs.reshape(met.size, shapes[2][2]), met)
        root.fill(0.0)
        sums.fill(0.0)
        return root, sums, inputs, met


def expected_counts(
    tree: Tree,
    tables: Tables,
    x: np.ndarray,
    weights: np.ndarray,
    *,
    workers: int,
    counting: bool = True,
    workspace: Workspace | None = None,
) -> Counts:
    r"""Computes the expected counts of the parameters given data.

    The counts are the gradient of the weighted log-likelihood with respect to the log of the
    parameters. Rows are divided among the workers in a fixed way, so that a result depends on
    the number of workers but not on their timing. Rows of probability zero count nothing.

    Arguments:
        tree: The tree with :math:`D` variables.
        tables: The probabilities of the circuit.
        x: The data, with shape :math:`(N, D)`, as int16 below :math:`X`. A negative number is
            a missing value.
        weights: The weight of each row, with shape :math:`(N,)`.
        workers: The number of threads.
        counting: Whether to go down the tree too. Without, there is a likelihood and no count.
        workspace: Room for the arrays. The counts are then good until it is used again.
    """
    N = len(x)
    units = tables.root.size
    room = workspace or Workspace()
    size = tree.regions * BLOCK * units
    variables, start = tree.by_region
    kernel = _compiled(units)
    transposed = np.ascontiguousarray(tables.sums.transpose(0, 2, 1))
    log_prob = np.empty(N)
    bounds = [BLOCK * (-(-N // BLOCK) * w // workers) for w in range(workers)] + [N]

    def job(w: int) -> tuple[Counts, np.ndarray]:
        shapes = [t.shape if counting else (t.shape[0],) + (0,) * (t.ndim - 1) for t in tables[:3]]
        root, sums, inputs, met = room.counts(w, shapes)
        counts = Counts(root, sums, inputs, log_prob)
        kernel(
            x[bounds[w] : bounds[w + 1]],
            weights[bounds[w] : bounds[w + 1]],
            *(tree.parent, tree.sum_group, variables, start, tree.input_group),
            *(tables.root, tables.sums.ravel(), transposed.ravel()),
            *(tables.inputs.ravel(), tables.inputs.shape[1]),
            *(counts.root, counts.sums.ravel(), counts.inputs.ravel()),
            log_prob[bounds[w] : bounds[w + 1]],
            counting,
            *(room.array(w, name, (size,), np.float32) for name in ("beta", "message")),
            met,
        )
        return counts, met

    with ThreadPoolExecutor(workers) as pool:
        (first, met), *others = pool.map(job, range(workers))
    for other, also in others:
        first.root[:] += other.root
        first.sums[:] += other.sums
        flat = met.size, first.inputs.shape[2]
        _add_met(first.inputs.reshape(flat), other.inputs.reshape(flat), met, also)
    if tables.log_scale is not None:
        scales = np.where(x >= 0, tables.log_scale[tree.input_group, np.maximum(x, 0)], 0.0)
        log_prob += scales.sum(1)
    if counting:
        first.sums[:] *= tables.sums  # the loop counts edges before their own weight
    return first


def _rescale(beta, o, scale, log_prob, n, rows, B, K, W):
    r"""Makes the largest number of each row one, in a compiled loop.

    The product of the factors waits in `scale` for a logarithm until it might underflow.
    """
    raise NotImplementedError


@overload(_rescale, prefer_literal=True)
def _rescale_rows(beta, o, scale, log_prob, n, rows, B, K, W):
    K, W = K.literal_value, W.literal_value

    def loop(beta, o, scale, log_prob, n, rows, B, K, W):
        for b in range(B):
            row = o + b * K
            top = np.float32(0.0)
            for k in range(0, K, W):
                top = max(top, row_max(load(beta, row + k, W)))
            if top != np.float32(1.0):
                if top < np.float32(1e-37):
                    top = np.float32(0.0)  # what is left has lost its digits
                scale[b] *= top
                factor = fill(np.float32(1.0) / max(top, np.float32(1e-37)), W)
                for k in range(0, K, W):
                    store(beta, row + k, load(beta, row + k, W) * factor)
                if scale[b] < 1e-250 and b < rows:
                    log_prob[n + b] += math.log(scale[b]) if scale[b] > 0.0 else -np.inf
                    scale[b] = 1.0

    return loop


@cache
def _compiled(units: int) -> Callable[..., None]:
    import numba

    K, W, B = units, width(units, itemsize=4), BLOCK

    @numba.njit(cache=True, nogil=True)
    def kernel(
        x, weights, parent, group, variables, start, input_group, root, sums, transposed,
        inputs, X, root_counts, sum_counts, input_counts, log_prob, counting,
        beta, message, met,
    ):  # fmt: skip
        N, D = x.shape
        R = parent.size
        below = np.empty(B * K, dtype=np.float32)
        values = np.empty((D, B), dtype=np.int64)
        scale = np.empty(B, dtype=np.float64)
        factors = np.empty(R, dtype=np.int64)
        tiny = np.float32(2e-38)

        for n in range(0, N, B):
            rows = min(B, N - n)
            for b in range(B):  # rows past the end have no values and no weight
                scale[b] = 1.0
                for v in range(D):
                    values[v, b] = x[n + b, v] if b < rows else -1
                if b < rows:
                    log_prob[n + b] = 0.0

            beta[:] = 1.0
            factors[:] = 0
            for r in range(R - 1, -1, -1):
                for m in range(start[r], start[r + 1]):
                    v = variables[m]
                    if factors[r] >= EVERY:
                        _rescale(beta, r * B * K, scale, log_prob, n, rows, B, K, W)
                        factors[r] = 0
                    for b in range(B):
                        if values[v, b] >= 0:
                            e = (input_group[v] * X + values[v, b]) * K
                            o = (r * B + b) * K
                            for k in range(0, K, W):
                                store(beta, o + k, load(beta, o + k, W) * load(inputs, e + k, W))
                    factors[r] += 1

                if factors[r] >= EVERY:
                    _rescale(beta, r * B * K, scale, log_prob, n, rows, B, K, W)
                    factors[r] = 0
                if r > 0:
                    o, p = r * B * K, parent[r] * B * K
                    clear(message, o, B * K, W)
                    g = group[r] * K * K
                    add_products(message, o, beta, o, K, 1, transposed, g, B, K, K, W)
                    if factors[parent[r]] + factors[r] >= EVERY:
                        _rescale(beta, p, scale, log_prob, n, rows, B, K, W)
                        factors[parent[r]] = 0
                    for k in range(0, B * K, W):
                        store(beta, p + k, load(beta, p + k, W) * load(message, o + k, W))
                    factors[parent[r]] += factors[r] + 1

            for b in range(B):
                o = b * K
                total = np.float32(0.0)
                for k in range(0, K, W):
                    row = load(beta, o + k, W) * load(root, k, W)
                    store(beta, o + k, row)
                    total += row_sum(row)
                weight = np.float32(0.0)
                if b < rows:
                    last = scale[b] * total
                    log_prob[n + b] += math.log(last) if last > 0.0 else -np.inf
                    if log_prob[n + b] > -np.inf:
                        weight = np.float32(weights[n + b])
                for k in range(0, K, W):
                    row = load(beta, o + k, W) * fill(weight / max(total, tiny), W)
                    store(beta, o + k, row)
                    store(root_counts, k, load(root_counts, k, W) + row)

            if not counting:
                continue
            for r in range(1, R):
                o, p, g = r * B * K, parent[r] * B * K, group[r] * K * K
                for k in range(0, B * K, W):
                    ratio = load(beta, p + k, W) / (load(message, o + k, W) + fill(tiny, W))
                    store(message, o + k, ratio)
                clear(below, 0, B * K, W)
                add_products(below, 0, message, o, K, 1, sums, g, B, K, K, W)
                add_products(sum_counts, g, message, o, 1, K, beta, o, K, B, K, W)
                for k in range(0, B * K, W):
                    store(beta, o + k, load(beta, o + k, W) * load(below, k, W))

            for r in range(R):
                for m in range(start[r], start[r + 1]):
                    v = variables[m]
                    for b in range(rows):
                        if values[v, b] >= 0:
                            e = input_group[v] * X + values[v, b]
                            met[e] = 1
                            e *= K
                            o = (r * B + b) * K
                            for k in range(0, K, W):
                                row = load(input_counts, e + k, W) + load(beta, o + k, W)
                                store(input_counts, e + k, row)

    return kernel


@njit(cache=True, nogil=True)
def _clear_met(counts, met):
    for e in range(met.size):
        if met[e]:
            counts[e] = 0.0
            met[e] = 0


@njit(cache=True, nogil=True)
def _add_met(total, counts, met, also):
    for e in range(met.size):
        if also[e]:
            total[e] += counts[e]
            met[e] = 1
