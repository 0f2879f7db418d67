r"""Exact answers by enumeration, for small models."""

__all__ = ["LARGEST", "Exact", "enumerate_states", "exact"]

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probnets.backend import Groups

from .couplings import Coupling
from .meanfield import free_energy
from .problems import prepare

# The largest number of configurations that are enumerated, and of numbers held at once.
LARGEST = 2**20
_HELD = 2**22


class Exact(NamedTuple):
    r"""Is the exact answer to a batch of queries.

    Attributes:
        log_partition: The log partition functions, with shape :math:`(B,)`.
        marginals: The marginals, with shape :math:`(B, N)`; the given values where variables
            are observed.
        covariance: The covariances of states, with shape :math:`(B, N, N)`, zero where one of
            both is observed.
    """

    log_partition: Tensor
    marginals: Tensor
    covariance: Tensor


def enumerate_states(
    groups: Groups | Sequence[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Lists all configurations of one-hot variables, of which the last varies fastest.

    Arguments:
        groups: The number of states of each variable.
        device: The device.
        dtype: The type of the configurations.

    Returns:
        The configurations, with shape :math:`(\prod_i K_i, N)`.

    Raises:
        ValueError: If there are more than :math:`2^{20}`.

    Example:
        >>> enumerate_states([2, 2])
        tensor([[1., 0., 1., 0.],
                [1., 0., 0., 1.],
                [0., 1., 1., 0.],
                [0., 1., 0., 1.]])
    """
    sizes = (groups.sizes if isinstance(groups, Groups) else Groups(groups).sizes).to(device)
    return _configurations(sizes, 0, _count(sizes), dtype or torch.get_default_dtype())


@torch.no_grad()
def exact(
    coupling: Coupling,
    bias: Tensor,
    *,
    observed: Tensor | None = None,
    values: Tensor | None = None,
) -> Exact:
    r"""Computes the distribution of hidden variables given observed ones, by enumeration.

    .. math:: \log Z = \log \sum_{x_h} \exp\left( \tfrac12 x^\top \Phi x + b^\top x \right)

    Without observed variables it is the log partition function of the model; the difference of
    both is the log-likelihood of what is observed. If an observed value is a distribution
    :math:`v` and not one-hot, it stands for :math:`x` in the formula, to which its entropy is
    added. So :math:`-F(q) \leq \log Z` holds with the free energy of mean field in any case.

    Memory is bounded: configurations come in chunks. Sums are in float64. No gradient is
    recorded.

    Arguments:
        coupling: The coupling :math:`\Phi`.
        bias: The biases :math:`b`, with shape :math:`(N,)` or :math:`(B, N)`.
        observed: Which variables are observed, boolean with shape :math:`(n,)` or
            :math:`(B, n)`. By default none are.
        values: The values of observed variables, with shape :math:`(N,)` or :math:`(B, N)`.
            Those of hidden ones are ignored.

    Returns:
        The exact answer.

    Raises:
        ValueError: If shapes do not fit, values are no distributions, or hidden variables have
            more than :math:`2^{20}` configurations.

    Example:
        >>> from probnets.boltzmann import GramCoupling
        >>> answer = exact(GramCoupling([2, 3, 3], 5), torch.zeros(4, 8))
        >>> answer.log_partition.shape, answer.marginals.shape, answer.covariance.shape
        (torch.Size([4]), torch.Size([4, 8]), torch.Size([4, 8, 8]))
    """
    problem, known = prepare(coupling, bias, observed=observed, values=values)
    field, groups = problem.field, coupling.groups
    B, N = field.shape
    log_z = field.new_zeros(B, dtype=torch.float64)
    mean = field.new_zeros(B, N, dtype=torch.float64)
    covariance = field.new_zeros(B, N, N, dtype=torch.float64)

    hidden = torch.ones_like(field) if problem.hidden is None else problem.hidden
    hidden = hidden[:, groups.starts] > 0  # (B, n)
    patterns = set(map(tuple, hidden.tolist()))
    for pattern in patterns:
        mask = torch.tensor(pattern, device=field.device)
        _count(groups.sizes[mask])  # refuses before any work
    for pattern in sorted(patterns):
        mask = torch.tensor(pattern, device=field.device)
        rows = (hidden == mask).all(dim=1).nonzero()[:, 0]
        states = mask[groups.index].nonzero()[:, 0]
        columns = field.new_zeros(len(states), N)
        columns[torch.arange(len(states), device=field.device), states] = 1.0
        Phi = coupling(columns)[:, states].double()
        found = _enumerate(groups.sizes[mask], Phi, field[rows[:, None], states].double())
        log_z[rows] = found.log_partition
        mean[rows[:, None], states] = found.marginals
        covariance[rows[:, None, None], states[:, None], states] = found.covariance

    log_z = log_z.to(field.dtype) - free_energy(coupling, bias, known)
    return Exact(log_z, mean.to(field.dtype) + known, covariance.to(field.dtype))


def _enumerate(sizes: Tensor, Phi: Tensor, field: Tensor) -> Exact:
    r"""Enumerates a model in which nothing is observed."""
    B, N = field.shape
    top = field.new_full((B,), -math.inf)
    total, first, second = top.exp(), torch.zeros_like(field), field.new_zeros(B, N, N)

    count = _count(sizes)
    chunk = max(1, _HELD // (N + B))
    for begin in range(0, count, chunk):
        x = _configurations(sizes, begin, min(begin + chunk, count), field.dtype)  # (C, N)
        score = field @ x.T + 0.5 * ((x @ Phi) * x).sum(dim=1)  # (B, C)

        higher = torch.maximum(top, score.amax(dim=1))
        old, weight = (top - higher).exp(), (score - higher[:, None]).exp()
        top = higher
        total = old * total + weight.sum(dim=1)
        first = old[:, None] * first + weight @ x
        for b in range(B):
            second[b] = old[b] * second[b] + (x * weight[b, :, None]).T @ x

    mean = first / total[:, None]
    covariance = second / total[:, None, None] - mean[:, :, None] * mean[:, None]
    return Exact(top + total.log(), mean, covariance)


def _count(sizes: Tensor) -> int:
    r"""Returns the number of configurations once it is found to be small enough."""
    count = math.prod(sizes.tolist())
    if count > LARGEST:
        raise ValueError(
            f"expected at most {LARGEST} configurations, got {count:.3g} of {len(sizes)} "
            "variables; observe more of them, or sample"
        )
    return count


def _configurations(sizes: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    r"""Returns some of the configurations, with shape (C, N)."""
    stride = sizes.flip(0).cumprod(0).flip(0) // sizes
    number = torch.arange(begin, end, device=sizes.device)[:, None]
    states = sizes.cumsum(0) - sizes + number // stride % sizes  # (C, n)
    x = torch.zeros(len(number), int(sizes.sum()), dtype=dtype, device=sizes.device)
    return x.scatter_(1, states, 1.0)
