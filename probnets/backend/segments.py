r"""Reductions over ragged segments."""

__all__ = ["segment_logsumexp", "segment_sum"]

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .dispatch import compiled
from .logspace import finite, log_shifted

Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def segment_sum(x: Tensor, index: Tensor, segments: int) -> Tensor:
    r"""Computes the sum of each segment.

    .. math:: y_s = \sum_{e : i_e = s} x_e

    An empty segment is zero. Integers and booleans are summed as 64-bit integers, as
    :func:`torch.sum` does.

    Arguments:
        x: The edge values :math:`x`, with shape :math:`(B, E)`.
        index: The segment :math:`i_e` of each edge, in any order, with shape :math:`(E,)`.
        segments: The number of segments :math:`S`.

    Returns:
        The segment values :math:`y`, with shape :math:`(B, S)`.

    Raises:
        ValueError: If the shapes do not match.
        TypeError: If the index does not hold integers.
        IndexError: If an index is not in :math:`[0, S)`.

    Example:
        >>> x = torch.tensor([[0.5, 0.25, 0.25]])
        >>> segment_sum(x, torch.tensor([0, 2, 2]), segments=3)
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    index = _checked(x, index, segments)
    x = x if x.is_floating_point() else x.long()

    if compiled(x, index):
        return _run(_sum_kernel(), x, index, segments)

    return _segment_sum_torch(x, index, segments)


def segment_logsumexp(x: Tensor, index: Tensor, segments: int) -> Tensor:
    r"""Computes the log-sum-exp of each segment.

    .. math:: y_s = \log \sum_{e : i_e = s} \exp x_e

    A segment that is empty, or whose edges are all :math:`-\infty`, is :math:`-\infty` and
    passes no gradient on.

    Arguments:
        x: The edge values :math:`x`, with shape :math:`(B, E)`.
        index: The segment :math:`i_e` of each edge, in any order, with shape :math:`(E,)`.
        segments: The number of segments :math:`S`.

    Returns:
        The segment values :math:`y`, with shape :math:`(B, S)`.

    Raises:
        ValueError: If the shapes do not match.
        TypeError: If the values are not floating point or the index does not hold integers.
        IndexError: If an index is not in :math:`[0, S)`.

    Example:
        >>> x = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> segment_logsumexp(x, torch.tensor([0, 1, 1]), segments=2).exp()
        tensor([[0.5000, 0.5000]])
    """
    index = _checked(x, index, segments)
    if not x.is_floating_point():
        raise TypeError(f"expected x of a floating point dtype, got {x.dtype}; call x.double()")

    if compiled(x, index):
        return _run(_logsumexp_kernel(), x, index, segments)

    return _segment_logsumexp_torch(x, index, segments)


def _checked(x: Tensor, index: Tensor, segments: int) -> Tensor:
    r"""Returns the index as 64-bit integers once the arguments are found to match."""
    if x.ndim != 2 or index.shape != x.shape[1:]:
        raise ValueError(
            f"expected x (B, E) and index (E,), got {tuple(x.shape)} and {tuple(index.shape)}"
        )
    if segments < 0:
        raise ValueError(f"expected segments >= 0, got {segments}")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"expected index of an integer dtype, got {index.dtype}")

    return index.long()


def _run(kernel: Kernel, x: Tensor, index: Tensor, segments: int) -> Tensor:
    if index.numel() and not 0 <= index.min() <= index.max() < segments:
        raise IndexError(
            f"expected index in [0, {segments}), got values from {index.min()} to {index.max()}"
        )

    y = x.new_empty(x.shape[0], segments)
    kernel(x.detach().contiguous().numpy(), index.contiguous().numpy(), y.numpy())
    return y


def _segment_sum_torch(x: Tensor, index: Tensor, segments: int) -> Tensor:
    return x.new_zeros(x.shape[0], segments).scatter_add(1, index.expand_as(x), x)


def _segment_logsumexp_torch(x: Tensor, index: Tensor, segments: int) -> Tensor:
    index = index.expand_as(x)

    top = x.new_full((x.shape[0], segments), -math.inf)
    top = finite(top.scatter_reduce(1, index, x.detach(), "amax"))

    total = x.new_zeros(top.shape).scatter_add(1, index, (x - top.gather(1, index)).exp())
    return log_shifted(total, top)


@cache
def _sum_kernel() -> Kernel:
    import numba

    @numba.njit(cache=True, nogil=True)
    def kernel(x: np.ndarray, index: np.ndarray, y: np.ndarray) -> None:
        y[:] = 0
        for b in range(y.shape[0]):
            for e in range(index.size):
                y[b, index[e]] += x[b, e]

    return kernel


@cache
def _logsumexp_kernel() -> Kernel:
    import numba

    @numba.njit(cache=True, nogil=True)  # no fastmath: -inf must stay -inf
    def kernel(x: np.ndarray, index: np.ndarray, y: np.ndarray) -> None:
        top = np.empty(y.shape[1], dtype=y.dtype)

        for b in range(y.shape[0]):
            top[:] = -np.inf
            for e in range(index.size):
                top[index[e]] = max(top[index[e]], x[b, e])

            for s in range(y.shape[1]):
                if np.isinf(top[s]):
                    top[s] = 0.0

            y[b] = 0.0
            for e in range(index.size):
                y[b, index[e]] += math.exp(x[b, e] - top[index[e]])

            for s in range(y.shape[1]):
                y[b, s] = -np.inf if y[b, s] == 0.0 else math.log(y[b, s]) + top[s]

    return kernel
