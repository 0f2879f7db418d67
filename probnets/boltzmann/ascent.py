r"""Coordinate ascent of mean-field problems."""

__all__ = ["CoordinateAscent"]

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from probnets.backend import Groups, compiled

from .problems import Problem
from .solvers import Solver, State, assess

# Sweeps between products that remove what rounding added up.
_REFRESH = 20


class CoordinateAscent(Solver):
    r"""Creates coordinate ascent, which updates one variable after the other.

    .. math:: q_i \gets \mathrm{softmax}\left( (\Phi q)_i + b_i \right)
        \qquad i = 1, \dots, n

    Each update is the best one given the other variables, hence the free energy never rises,
    whatever the coupling. A step is a sweep. Variables of one colour, see
    :meth:`Coupling.colours`, do not meet and are updated at once, with one product for each
    colour. If all colours differ, the sweep runs through the dense matrix, which costs as much
    as one product.

    References:
        | Variational Inference: A Review for Statisticians (Blei et al., 2016)
        | https://arxiv.org/abs/1601.00670
    """

    def remember(self, problem: Problem, state: State) -> dict[str, Tensor]:
        return {"sweeps": torch.zeros_like(state.norm, dtype=torch.long)}

    def step(self, problem: Problem, state: State) -> State:
        colours = problem.coupling.colours()
        names = colours.unique()
        if len(names) < problem.coupling.variables:
            return self._by_colours(problem, state, colours, names)

        sweeps = state.memory["sweeps"] + 1
        problem.products += 1
        fixed = {"hidden": problem.hidden, "groups": problem.groups}
        theta, q, phi = sweep(problem.dense(), problem.field, *state[:3], **fixed)
        due = sweeps % _REFRESH == 0
        if bool(due.any()):
            phi = torch.where(due[:, None], problem.couple(q), phi)
        return State(theta, q, phi, *assess(problem, theta, q, phi), {"sweeps": sweeps})

    def _by_colours(self, problem: Problem, state: State, colours: Tensor, names: Tensor) -> State:
        theta, q, phi = state[:3]
        for name in names:
            now = (colours == name)[problem.groups.index]
            theta = torch.where(now, phi + problem.field, theta)
            q = torch.where(now, problem.marginals(theta), q)
            phi = problem.couple(q)
        return State(theta, q, phi, *assess(problem, theta, q, phi), state.memory)


def sweep(
    Phi: Tensor,
    field: Tensor,
    theta: Tensor,
    q: Tensor,
    phi: Tensor,
    *,
    hidden: Tensor | None,
    groups: Groups,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Updates one variable after the other, and the products with each.

    Arguments:
        Phi: The matrix :math:`\Phi`, with shape :math:`(N, N)`.
        field: The biases of hidden states, with shape :math:`(B, N)`.
        theta: The logits, likewise.
        q: Their marginals, likewise.
        phi: The products :math:`\Phi q`, likewise.
        hidden: Which states are hidden, 1 or 0 with shape :math:`(B, N)`, or None if all are.
        groups: The variables.

    Returns:
        The logits, the marginals and the products.
    """
    masks = () if hidden is None else (hidden,)
    if not compiled(Phi, field, theta, q, phi, groups.sizes, *masks):
        return _sweep_torch(Phi, field, theta, q, phi, hidden=hidden, groups=groups)

    # Sums of many small changes are kept in double precision.
    new = [x.double().clone(memory_format=torch.contiguous_format) for x in (theta, q, phi)]
    mask = field.new_empty(0, 0) if hidden is None else hidden
    arrays = [x.detach().contiguous().numpy() for x in (Phi, field, mask, groups.sizes)]
    _sweep_kernel()(*arrays, *(x.numpy() for x in new))
    theta, q, phi = (x.to(field.dtype) for x in new)
    return theta, q, phi if hidden is None else phi * hidden


def _sweep_torch(
    Phi: Tensor,
    field: Tensor,
    theta: Tensor,
    q: Tensor,
    phi: Tensor,
    *,
    hidden: Tensor | None,
    groups: Groups,
) -> tuple[Tensor, Tensor, Tensor]:
    theta, q = theta.clone(), q.clone()
    for start, size in zip(groups.starts.tolist(), groups.sizes.tolist(), strict=True):
        now = slice(start, start + size)
        own = None if hidden is None else hidden[:, now]
        new = phi[:, now] + field[:, now]
        theta[:, now] = new if own is None else torch.where(own > 0, new, theta[:, now])
        new = new.softmax(dim=1)
        new = new if own is None else new * own
        phi = phi + (new - q[:, now]) @ Phi[now]
        q[:, now] = new
    return theta, q, phi if hidden is None else phi * hidden


@cache
def _sweep_kernel() -> Callable[..., None]:
    import numba

    @numba.njit(cache=True, nogil=True)
    def kernel(
        Phi: np.ndarray,
        field: np.ndarray,
        hidden: np.ndarray,
        sizes: np.ndarray,
        theta: np.ndarray,
        q: np.ndarray,
        phi: np.ndarray,
    ) -> None:
        start = 0
        for g in range(sizes.size):
            stop = start + sizes[g]
            for b in range(q.shape[0]):  # rows of Φ stay in the cache
                if hidden.shape[0] and hidden[b, start] == 0:
                    continue
                top = -np.inf
                for i in range(start, stop):
                    theta[b, i] = phi[b, i] + field[b, i]
                    top = max(top, theta[b, i])
                total = 0.0
                for i in range(start, stop):
                    total += math.exp(theta[b, i] - top)
                for i in range(start, stop):
                    new = math.exp(theta[b, i] - top) / total
                    change = new - q[b, i]
                    q[b, i] = new
                    for j in range(phi.shape[1]):
                        phi[b, j] += change * Phi[i, j]
            start = stop

    return kernel
