r"""Least squares in compiled loops whose bits are the same everywhere.

All operations are additions, multiplications and divisions in float64, each rounded on its own
and in a fixed order; :mod:`probnets.coding.photographs.reference` states that order plainly.
"""

__all__ = ["accumulate", "normal_equations", "pass_on", "predict", "solve"]

from typing import Any

import numba
import numpy as np

from probnets.backend.rows import fill, load, peek, store

from .tables import Int

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "forceinline": True, "_nrt": False}
_compiled = numba.njit(nogil=True, cache=True, **_OPTIONS)


@_compiled
def accumulate(A: np.ndarray, z: np.ndarray, n: Int, width: Int, weight: float) -> None:
    r"""Adds :math:`g z z^\top` to the upper triangle of a matrix.

    Arguments:
        A: The matrix, flat, with :math:`n` lines of `width` numbers.
        z: The regressors, and at :math:`z_n` what they should predict.
        n: The number of regressors.
        width: The length of a line, a multiple of 8 beyond :math:`n`.
        weight: The weight :math:`g`.
    """
    for i in range(n):
        first = fill(weight * peek(z, i), 8)
        for k in range(i & -8, width, 8):
            o = i * width + k
            store(A, o, load(A, o, 8) + first * load(z, k, 8))


@_compiled
def normal_equations(
    M: np.ndarray, V: np.ndarray, block: Int, A: np.ndarray, n: Int, width: Int, column: Int
) -> None:
    r"""Sums the upper triangles of the moments around a block of columns, and since its begin.

    Arguments:
        M: The sum, flat. Its second half keeps the part that is the same all along the block.
        V: The moments of the blocks, flat, one block after the other, with one to spare at each
            end.
        block: The block.
        A: The moments since the block began.
        n: The number of regressors.
        width: The length of a line.
        column: The column within the block. In the first, the part that stays is computed.
    """
    size = n * width
    for i in range(n):
        for k in range(i * width + (i & -8), (i + 1) * width, 8):
            if column == 0:
                o = block * size + k
                left = load(V, o, 8) + load(V, o + size, 8)
                around = left + load(V, o + 2 * size, 8)
                store(M, size + k, around)
                store(M, k, around)
            else:
                store(M, k, load(M, size + k, 8) + load(A, k, 8))


@_compiled
def pass_on(V: np.ndarray, block: Int, A: np.ndarray, n: Int, width: Int, decay: float) -> None:
    r"""Adds the upper triangle of a block's moments to those of the lines above, and clears it.

    Arguments:
        V: The moments of the blocks, flat.
        block: The block.
        A: The moments since the block began.
        n: The number of regressors.
        width: The length of a line.
        decay: What remains of the moments of the lines above.
    """
    start, weight, zero = (block + 1) * n * width, fill(decay, 8), fill(0.0, 8)
    for i in range(n):
        for k in range(i * width + (i & -8), (i + 1) * width, 8):
            store(V, start + k, load(V, start + k, 8) * weight + load(A, k, 8))
            store(A, k, zero)


@_compiled
def solve(M: np.ndarray, F: np.ndarray, w: np.ndarray, n: Int, width: Int, ridge: float) -> None:
    r"""Solves normal equations by elimination without pivots.

    Arguments:
        M: The equations, whose upper triangle is used and lost, and the right-hand side in
            column :math:`n`.
        F: Room for the factors, flat, with `width` lines of `width` numbers, zero from the
            diagonal on.
        w: The weights, with `width` numbers, which stay zero from :math:`n` on.
        n: The number of regressors.
        width: The length of a line.
        ridge: What is added to the diagonal.
    """
    for i in range(n):
        M[i * width + i] += ridge

    for k in range(n):
        line = k * width
        inverse = 1.0 / max(M[line + k], ridge)
        for i in range(k + 1, n):
            factor = M[line + i] * inverse
            F[i * width + k] = factor
            row = fill(factor, 8)
            for j in range(i & -8, width, 8):
                o = i * width + j
                store(M, o, load(M, o, 8) - row * load(M, line + j, 8))
        w[k] = M[line + n] * inverse

    for j in range(n - 1, 0, -1):
        row = fill(w[j], 8)
        for t in range(0, j, 8):
            store(w, t, load(w, t, 8) - row * load(F, j * width + t, 8))


@_compiled
def predict(w: np.ndarray, z: np.ndarray, width: Int, lanes: np.ndarray) -> float:
    r"""Computes :math:`w^\top z` in eight sums.

    Arguments:
        w: The weights, with `width` numbers.
        z: The regressors, with `width` numbers, finite beyond the regressors too.
        width: The length, a multiple of 8.
        lanes: Room for eight numbers.
    """
    total = fill(0.0, 8)
    for k in range(0, width, 8):
        total = total + load(w, k, 8) * load(z, k, 8)
    store(lanes, 0, total)
    left = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
    return left + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))
