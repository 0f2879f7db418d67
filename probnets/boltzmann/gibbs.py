r"""Block Gibbs sampling, of all variables at once."""

__all__ = ["GibbsResult", "GibbsSampler", "draw"]

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from probnets.backend import Groups, compiled, grouped_softmax

from .couplings import Coupling
from .problems import Problem, prepare

# The largest number of states whose matrix is decomposed.
_LARGEST = 4096

Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


class GibbsResult(NamedTuple):
    r"""Is what chains of Gibbs sampling found.

    Attributes:
        marginals: The estimated marginals, with shape :math:`(B, N)`; the given values where
            variables are observed.
        standard_error: Their standard errors, from the spread over chains. They do not know of
            what all chains missed alike.
        r_hat: The split potential scale reduction of each state, near 1 if chains have mixed.
        samples: The last states of all chains, with shape :math:`(B, C, N)`.
    """

    marginals: Tensor
    standard_error: Tensor
    r_hat: Tensor
    samples: Tensor


class GibbsSampler:
    r"""Creates a sampler that updates all variables at once, whatever is coupled with what.

    The coupling is written as :math:`P (\Phi + c I) P = W^\top W`, where :math:`P` centres
    variables and :math:`c` is the least number for which there is such a :math:`W`. What this
    adds to the energy is linear or constant for one-hot :math:`x`. With auxiliary variables
    :math:`y` it becomes a machine of two layers,

    .. math:: p(x, y) \propto \exp\left( (b + s)^\top x + y^\top W x - \tfrac12 \| y \|^2 \right)
        \qquad s = P \Phi u ,

    where :math:`u` is uniform for each hidden variable. A sweep draws each layer given the
    other:

    .. math:: y \mid x \sim \mathcal N(W x, I) \qquad
        x_i \mid y \sim \mathrm{softmax}\left( (b + s + W^\top y)_i \right)

    Chains mix fast if the eigenvalues of :math:`P \Phi P` lie close together. The coupling is
    decomposed when the sampler is made, and again when its weights have changed.

    References:
        | Continuous Relaxations for Discrete Hamiltonian Monte Carlo (Zhang et al., 2012)
        | Advances in Neural Information Processing Systems 25

    Arguments:
        coupling: The coupling :math:`\Phi`, of at most 4096 states.

    Raises:
        ValueError: If the coupling has more states.

    Example:
        >>> from probnets.boltzmann import GramCoupling
        >>> sampler = GibbsSampler(GramCoupling([2, 3, 3], 5))
        >>> result = sampler.sample(torch.zeros(4, 8), chains=10, sweeps=20, progress=False)
        >>> result.marginals.shape, result.samples.shape
        (torch.Size([4, 8]), torch.Size([4, 10, 8]))
    """

    @torch.no_grad()
    def __init__(self, coupling: Coupling) -> None:
        if coupling.states > _LARGEST:
            raise ValueError(
                f"expected at most {_LARGEST} states, whose matrix is decomposed, got "
                f"{coupling.states}"
            )
        self.coupling, self.groups = coupling, coupling.groups
        self._decompose(coupling.dense().double())

    def _decompose(self, Phi: Tensor) -> None:
        r"""Decomposes the coupling."""
        self._matrix, n = Phi, self.coupling.variables
        own = self.groups.index[:, None] == self.groups.index
        Q = own / self.groups.sizes[self.groups.index].double()  # I - P
        Phi = Phi - Q @ Phi
        Phi = Phi - Phi @ Q
        # The null space of P is moved below all else, where it is left out.
        scale = 1 + 2 * Phi.norm()
        values, vectors = torch.linalg.eigh((Phi + Phi.T) / 2 - scale * Q)
        values, vectors = values[n:], vectors[:, n:]
        self.shift = max(0.0, -values[0].item()) if len(values) else 0.0
        values = values + self.shift
        kept = values > 1e-13 * scale  # the rest is rounding
        self.weight = (vectors[:, kept] * values[kept].sqrt()).T.contiguous()  # W, (R, N)

    def linearise(self, problem: Problem) -> tuple[Tensor, Tensor]:
        r"""Returns what :math:`W` leaves of the energy of hidden variables.

        .. math:: \tfrac12 x^\top \Phi x = \tfrac12 \| W x \|^2 + s^\top x + a

        Arguments:
            problem: The problem.

        Returns:
            The slopes :math:`s`, with shape :math:`(B, N)`, and the constants :math:`a`, with
            shape :math:`(B,)`.
        """
        sizes = self.groups.sizes.to(problem.field.dtype)
        hidden = torch.ones_like(problem.field) if problem.hidden is None else problem.hidden
        uniform = hidden / sizes[self.groups.index]
        slope = problem.couple(uniform)
        count = hidden[:, self.groups.starts] * (1 - 1 / sizes)  # xᵀ P x
        constant = 0.5 * (uniform * slope).sum(dim=1) - 0.5 * self.shift * count.sum(dim=1)
        return problem.hide(problem.centre(slope)), constant

    def sweep(
        self,
        product: Tensor,
        logits: Tensor,
        hidden: Tensor | None = None,
        *,
        strength: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Draws the auxiliary variables and then all hidden ones, for :math:`\beta \Phi`.

        Arguments:
            product: The products :math:`W x`, with shape :math:`(B, C, R)`.
            logits: The biases of states, with :math:`\beta s` added, with shape
                :math:`(B, 1, N)`.
            hidden: Which states are hidden, with shape :math:`(B, 1, N)`, or None if all are.
            strength: The strength :math:`\beta` of the coupling.
            generator: The source of randomness.

        Returns:
            The next states, and their probabilities given the auxiliary variables, each with
            shape :math:`(B, C, N)` and zero where variables are observed.
        """
        root = math.sqrt(strength)
        noise = torch.empty_like(product).normal_(generator=generator)
        y = root * product + noise
        p = grouped_softmax(logits + root * (y @ self.weight.to(y)), self.groups)
        x = draw(p, self.groups, generator=generator)
        return (x, p) if hidden is None else (x * hidden, p * hidden)

    @torch.no_grad()
    def sample(
        self,
        bias: Tensor,
        *,
        chains: int = 100,
        sweeps: int = 1000,
        burn_in: int = 100,
        observed: Tensor | None = None,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> GibbsResult:
        r"""Estimates the marginals of hidden variables given observed ones.

        Chains start from uniform states. Marginals are averages over chains and sweeps of
        probabilities given the auxiliary variables, which spread less than states do.

        Arguments:
            bias: The biases :math:`b`, with shape :math:`(N,)` or :math:`(B, N)`.
            chains: The number of chains :math:`C` of each sample.
            sweeps: The number of sweeps that are averaged.
            burn_in: The number of sweeps before those.
            observed: Which variables are observed, boolean with shape :math:`(n,)` or
                :math:`(B, n)`. By default none are.
            values: The values of observed variables, with shape :math:`(N,)` or
                :math:`(B, N)`.
            generator: The source of randomness.
            progress: Whether to show a progress bar.

        Returns:
            The estimates, and the last states.

        Raises:
            ValueError: If shapes do not fit, or there are too few chains or sweeps.
        """
        if chains < 2 or sweeps < 4 or burn_in < 0:
            raise ValueError(
                "expected chains >= 2, sweeps >= 4 and burn_in >= 0, from which errors can be "
                f"told, got {chains}, {sweeps} and {burn_in}"
            )
        now = self.coupling.dense().double()
        if not torch.equal(now, self._matrix):
            self._decompose(now)
        problem, known = prepare(self.coupling, bias, observed=observed, values=values)
        logits = (problem.field + self.linearise(problem)[0])[:, None]
        hidden = None if problem.hidden is None else problem.hidden[:, None]

        shape = (len(logits), chains, logits.shape[2])
        x = draw(
            grouped_softmax(logits.new_zeros(shape), self.groups), self.groups, generator=generator
        )
        x = x if hidden is None else x * hidden
        total = x.new_zeros(shape, dtype=torch.float64)
        visits = total.new_zeros(2, *shape)  # in each half of the sweeps
        weight = self.weight.to(x)
        for t in tqdm(range(-burn_in, sweeps), desc="Gibbs", disable=not progress):
            x, p = self.sweep(x @ weight.T, logits, hidden, generator=generator)
            if t >= 0:
                total += p
                visits[int(2 * t >= sweeps)] += x

        each = total / sweeps  # (B, C, N)
        mean = each.mean(dim=1)
        variance = (each - mean[:, None]).square().sum(dim=1) / (chains - 1)
        return GibbsResult(
            mean.to(known.dtype) + known,
            (variance / chains).sqrt().to(known.dtype),
            _r_hat(visits, sweeps).to(known.dtype),
            x + known[:, None],
        )


def draw(p: Tensor, groups: Groups, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Draws one-hot states of categorical variables.

    Arguments:
        p: The probabilities, with shape :math:`(*, N)`.
        groups: The number of states of each variable.
        generator: The source of randomness.

    Returns:
        The states, with shape :math:`(*, N)`.

    Example:
        >>> draw(torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0]), Groups([2, 3]))
        tensor([0., 1., 1., 0., 0.])
    """
    flat = p.reshape(-1, len(groups.index)) if p.numel() else p.new_empty(0, len(groups.index))
    uniform = flat.new_empty(len(flat), len(groups)).uniform_(generator=generator)
    if compiled(flat, uniform, groups.sizes):
        x = torch.zeros_like(flat)
        arrays = (flat.contiguous(), uniform, groups.sizes, x)
        _draw_kernel()(*(array.detach().numpy() for array in arrays))
    else:
        x = _draw_torch(flat, uniform, groups)
    return x.view(p.shape)


def _draw_torch(p: Tensor, uniform: Tensor, groups: Groups) -> Tensor:
    widest = groups.size or int(groups.sizes.max())
    place = torch.arange(p.shape[1], device=p.device) - groups.starts[groups.index]
    blocks = p.new_zeros(len(p), len(groups), widest)
    blocks[:, groups.index, place] = p
    mass = blocks.cumsum(dim=2)
    state = (mass <= uniform[:, :, None] * mass[:, :, -1:]).sum(dim=2)  # (M, n)
    return torch.zeros_like(p).scatter_(1, groups.starts + state, 1.0)


@cache
def _draw_kernel() -> Kernel:
    import numba

    @numba.njit(cache=True, nogil=True)
    def kernel(p: np.ndarray, uniform: np.ndarray, sizes: np.ndarray, x: np.ndarray) -> None:
        for m in range(p.shape[0]):
            start = 0
            for g in range(sizes.size):
                stop = start + sizes[g]

                total = 0.0
                for i in range(start, stop):
                    total += p[m, i]

                target = uniform[m, g] * total
                mass = 0.0
                for i in range(start, stop):
                    mass += p[m, i]
                    if mass > target:
                        x[m, i] = 1
                        break
                start = stop

    return kernel


def _r_hat(visits: Tensor, sweeps: int) -> Tensor:
    r"""Computes the split potential scale reduction from visits (2, B, C, N)."""
    lengths = visits.new_tensor([(sweeps + 1) // 2, sweeps // 2])[:, None, None, None]
    half = visits / lengths
    within = (half * (1 - half) * lengths / (lengths - 1)).mean(dim=(0, 2))  # (B, N)
    spread = half - half.mean(dim=(0, 2), keepdim=True)
    between = spread.square().sum(dim=(0, 2)) / (2 * visits.shape[2] - 1)
    ratio = (1 - 2 / sweeps) + between / within
    return torch.where(between > 0, ratio, 1.0).sqrt()
