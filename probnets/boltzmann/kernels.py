r"""Inner loops of the solvers, each fused into one pass over the variables."""

__all__ = ["damp", "measure"]

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from probnets.backend import (
    Groups,
    compiled,
    grouped_softmax,
    project_tangent,
    segment_logsumexp,
)


def damp(
    theta: Tensor,
    phi: Tensor,
    field: Tensor,
    rate: Tensor,
    *,
    hidden: Tensor | None,
    groups: Groups,
) -> tuple[Tensor, Tensor]:
    r"""Takes a damped step of the logits, and computes its marginals.

    .. math:: \theta \gets \theta + \eta (\Phi q + b - \theta) \qquad
        q_i \gets \mathrm{softmax}(\theta_i)

    Arguments:
        theta: The logits :math:`\theta`, with shape :math:`(B, N)`.
        phi: The products :math:`\Phi q`, likewise.
        field: The biases :math:`b`, likewise.
        rate: The rates :math:`\eta`, with shape :math:`(B, 1)`.
        hidden: Which states are hidden, 1 or 0 with shape :math:`(B, N)`, or None if all are.
        groups: The variables.

    Returns:
        The logits, and their marginals, zero where observed.

    Example:
        >>> x = torch.zeros(1, 2)
        >>> damp(x, x, x, torch.ones(1, 1), hidden=None, groups=Groups([2]))[1]
        tensor([[0.5000, 0.5000]])
    """
    masks = () if hidden is None else (hidden,)
    if not compiled(theta, phi, field, rate, groups.sizes, *masks):
        return _damp_torch(theta, phi, field, rate, hidden=hidden, groups=groups)

    new, q = theta.new_empty(2, *theta.shape).unbind()
    arrays = [_array(x) for x in (theta, phi, field, rate)]
    _damp_kernel()(*arrays, _mask(hidden, theta), _array(groups.sizes), new.numpy(), q.numpy())
    return new, q


def measure(
    theta: Tensor,
    q: Tensor,
    phi: Tensor,
    field: Tensor,
    *,
    hidden: Tensor | None,
    groups: Groups,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Measures how far a point is from a solution.

    .. math:: r = P (\theta - \Phi q - b) \qquad \| r \|_2 \qquad
        F(q) = -\tfrac12 q^\top \Phi q - b^\top q + \sum_i q_i^\top \log q_i

    Arguments:
        theta: The logits :math:`\theta`, with shape :math:`(B, N)`.
        q: Their marginals, likewise.
        phi: The products :math:`\Phi q`, likewise.
        field: The biases :math:`b`, likewise.
        hidden: Which states are hidden, 1 or 0 with shape :math:`(B, N)`, or None if all are.
        groups: The variables.

    Returns:
        The norms of the residuals and the free energies, each with shape :math:`(B,)`; and the
        residuals :math:`r`, with shape :math:`(B, N)` and zero where observed.

    Example:
        >>> x = torch.zeros(1, 2)
        >>> measure(x, x + 0.5, x, x, hidden=None, groups=Groups([2]))
        (tensor([0.]), tensor([-0.6931]), tensor([[0., 0.]]))
    """
    masks = () if hidden is None else (hidden,)
    if not compiled(theta, q, phi, field, groups.sizes, *masks):
        return _measure_torch(theta, q, phi, field, hidden=hidden, groups=groups)

    norm, energy = theta.new_empty(2, len(theta)).unbind()
    r = torch.empty_like(theta, memory_format=torch.contiguous_format)
    arrays = [_array(x) for x in (theta, q, phi, field)]
    results = norm.numpy(), energy.numpy(), r.numpy()
    _measure_kernel()(*arrays, _mask(hidden, theta), _array(groups.sizes), *results)
    return norm, energy, r


def _damp_torch(
    theta: Tensor,
    phi: Tensor,
    field: Tensor,
    rate: Tensor,
    *,
    hidden: Tensor | None,
    groups: Groups,
) -> tuple[Tensor, Tensor]:
    theta = theta + rate * (phi + field - theta)
    q = grouped_softmax(theta, groups)
    return theta, q if hidden is None else q * hidden


def _measure_torch(
    theta: Tensor,
    q: Tensor,
    phi: Tensor,
    field: Tensor,
    *,
    hidden: Tensor | None,
    groups: Groups,
) -> tuple[Tensor, Tensor, Tensor]:
    r = project_tangent(theta - phi - field, groups)
    r = r if hidden is None else r * hidden
    log_q = theta - segment_logsumexp(theta, groups.index, len(groups))[:, groups.index]
    log_q = torch.where(q > 0, log_q, 0.0)  # 0 log 0 = 0
    energy = (q * (log_q - 0.5 * phi - field)).sum(dim=1)
    return torch.linalg.vector_norm(r, dim=1), energy, r


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


def _mask(hidden: Tensor | None, like: Tensor) -> np.ndarray:
    r"""Returns the mask, or one without rows if there is none."""
    return _array(like.new_empty(0, 0) if hidden is None else hidden)


@cache
def _damp_kernel() -> Callable[..., None]:
    import numba

    @numba.njit(cache=True, nogil=True)
    def kernel(
        theta: np.ndarray,
        phi: np.ndarray,
        field: np.ndarray,
        rate: np.ndarray,
        hidden: np.ndarray,
        sizes: np.ndarray,
        new: np.ndarray,
        q: np.ndarray,
    ) -> None:
        for b in range(theta.shape[0]):
            eta = rate[b, 0]
            start = 0
            for g in range(sizes.size):
                stop = start + sizes[g]

                top = -np.inf
                for i in range(start, stop):
                    new[b, i] = theta[b, i] + eta * (phi[b, i] + field[b, i] - theta[b, i])
                    top = max(top, new[b, i])

                if hidden.shape[0] and hidden[b, start] == 0:
                    for i in range(start, stop):
                        q[b, i] = 0.0
                else:
                    total = 0.0
                    for i in range(start, stop):
                        q[b, i] = math.exp(new[b, i] - top)
                        total += q[b, i]
                    for i in range(start, stop):
                        q[b, i] /= total
                start = stop

    return kernel


@cache
def _measure_kernel() -> Callable[..., None]:
    import numba

    @numba.njit(cache=True, nogil=True)
    def kernel(
        theta: np.ndarray,
        q: np.ndarray,
        phi: np.ndarray,
        field: np.ndarray,
        hidden: np.ndarray,
        sizes: np.ndarray,
        norm: np.ndarray,
        energy: np.ndarray,
        r: np.ndarray,
    ) -> None:
        for b in range(theta.shape[0]):
            square = 0.0
            total = 0.0
            start = 0
            for g in range(sizes.size):
                stop = start + sizes[g]
                if hidden.shape[0] and hidden[b, start] == 0:
                    r[b, start:stop] = 0.0
                    start = stop
                    continue

                likely = start
                mean = 0.0
                for i in range(start, stop):
                    likely = i if q[b, i] > q[b, likely] else likely
                    r[b, i] = theta[b, i] - phi[b, i] - field[b, i]
                    mean += r[b, i]
                mean /= stop - start

                # The likeliest state tells the logarithm of the sum without exponentials.
                log_mass = theta[b, likely] - math.log(q[b, likely])
                for i in range(start, stop):
                    r[b, i] -= mean
                    square += r[b, i] ** 2
                    if q[b, i] > 0:
                        slope = theta[b, i] - log_mass - 0.5 * phi[b, i] - field[b, i]
                        total += q[b, i] * slope
                start = stop
            norm[b] = math.sqrt(square)
            energy[b] = total

    return kernel
