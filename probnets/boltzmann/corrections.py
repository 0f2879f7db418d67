r"""Corrections of mean field: linear response, and Plefka's second order."""

__all__ = ["SecondOrder", "linear_response", "second_order", "tap_marginals"]

from typing import NamedTuple

import torch
from torch import Tensor

from probnets.backend import Groups, Solution, fixed_point, softmax_jvp

from .couplings import Coupling
from .meanfield import MeanField, free_energy, mean_field
from .problems import prepare

# The largest number of states of dense algebra, and of numbers held at once.
_LARGEST = 4096
_HELD = 2**23


class SecondOrder(NamedTuple):
    r"""Is a second-order estimate of log partition functions.

    Attributes:
        log_partition: The estimates, with shape :math:`(B,)`. They are no bounds.
        standard_error: The standard error that comes from probes, zero without.
    """

    log_partition: Tensor
    standard_error: Tensor


def linear_response(
    coupling: Coupling, marginals: Tensor, observed: Tensor | None = None
) -> Tensor:
    r"""Computes covariances of states from how mean field answers to a change of biases.

    .. math:: C = \frac{\partial q}{\partial b} = (S^+ - \Phi)^{-1} = (I - S \Phi)^{-1} S
        \qquad S = \mathrm{blkdiag}(\mathrm{diag}(q_i) - q_i q_i^\top)

    The inverse is that on the tangent space of hidden variables. It is positive semi-definite
    at the mean field of a capped coupling. Unlike mean field itself it knows that variables are
    dependent, and its error is of second order in the coupling.

    References:
        | Boltzmann Machine Learning Using Mean Field Theory and Linear Response Correction
        | (Kappen and Rodríguez, 1997)
        | Advances in Neural Information Processing Systems 10

    Arguments:
        coupling: The coupling :math:`\Phi`.
        marginals: The marginals :math:`q` of mean field, with shape :math:`(B, N)`.
        observed: Which variables are observed, boolean with shape :math:`(n,)` or
            :math:`(B, n)`. By default those whose marginals are one-hot.

    Returns:
        The covariances :math:`C`, with shape :math:`(B, N, N)`, zero where one of both
        variables is observed.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> from probnets.boltzmann import GramCoupling
        >>> coupling = GramCoupling([2, 3, 3], 5)
        >>> field = mean_field(coupling, torch.zeros(4, 8))
        >>> linear_response(coupling, field.marginals).shape
        torch.Size([4, 8, 8])
    """
    q = _hidden(coupling, marginals, observed)
    own = coupling.groups.index[:, None] == coupling.groups.index
    S = torch.diag_embed(q) - (q[:, :, None] * q[:, None]).masked_fill(~own, 0.0)
    identity = torch.eye(coupling.states, dtype=q.dtype, device=q.device)
    C = torch.linalg.solve(identity - S @ _dense(coupling, q), S)
    return (C + C.mT) / 2


def second_order(
    coupling: Coupling,
    bias: Tensor,
    marginals: MeanField | Tensor,
    *,
    observed: Tensor | None = None,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> SecondOrder:
    r"""Estimates log partition functions by Plefka's expansion to second order.

    .. math:: \log Z \approx -F(q) + \tfrac14 \mathrm{tr}(S \Phi S \Phi)
        \qquad S = \mathrm{blkdiag}(\mathrm{diag}(q_i) - q_i q_i^\top)

    The second term is half the variance of the interactions around the mean. At mean field the
    error is of third order in the coupling, where that of :math:`-F(q)` is of second order. But
    it is no bound, and where couplings are strong it may be further off, above.

    With probes, the trace is estimated from the mean of :math:`w^\top S w` over
    :math:`w = \Phi L z`, where :math:`S = L L^\top` and :math:`z` are random signs, at the cost
    of one product each. Without, it is exact and takes the matrix :math:`\Phi`.

    References:
        | Convergence condition of the TAP equation for the infinite-ranged Ising spin glass model
        | (Plefka, 1982)
        | Journal of Physics A 15, 1971

    Arguments:
        coupling: The coupling :math:`\Phi`.
        bias: The biases :math:`b`, with shape :math:`(N,)` or :math:`(B, N)`.
        marginals: The mean field, or marginals :math:`q` with shape :math:`(B, N)`.
        observed: Which variables are observed, boolean with shape :math:`(n,)` or
            :math:`(B, n)`. By default those whose marginals are one-hot.
        probes: The number of probes, 2 or more, or None for the exact trace.
        generator: The source of randomness of probes.

    Returns:
        The estimates.

    Raises:
        ValueError: If shapes do not fit, or there are too many states for the exact trace.

    Example:
        >>> from probnets.boltzmann import GramCoupling
        >>> coupling, bias = GramCoupling([2, 3, 3], 5), torch.zeros(4, 8)
        >>> second_order(coupling, bias, mean_field(coupling, bias)).log_partition.shape
        torch.Size([4])
    """
    whole = marginals.marginals if isinstance(marginals, MeanField) else marginals
    q = _hidden(coupling, whole, observed)
    if probes is None:
        spread, pull = _reaction(_dense(coupling, q), q, coupling.groups)
        trace = (q * (spread - pull)).sum(dim=1)
        error = torch.zeros_like(trace)
    else:
        if probes < 2:
            raise ValueError(f"expected probes >= 2, got {probes}; None for the exact trace")
        samples = torch.stack([_probe(coupling, q, generator) for _ in range(probes)])
        trace, error = samples.mean(dim=0), samples.std(dim=0) / probes**0.5
    return SecondOrder(trace / 4 - free_energy(coupling, bias, whole), error.detach() / 4)


@torch.no_grad()
def tap_marginals(
    coupling: Coupling,
    bias: Tensor,
    *,
    observed: Tensor | None = None,
    values: Tensor | None = None,
    damping: float | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
    strict: bool = False,
) -> Solution:
    r"""Computes marginals where the second-order free energy is stationary.

    .. math:: q_i = \mathrm{softmax}\left( (\Phi q)_i + b_i
        + \tfrac12 \mathrm{diag}(A_{ii}) - A_{ii} q_i \right) \qquad A = \Phi S \Phi

    These are the equations of Thouless, Anderson and Palmer, for variables of any number of
    states. The last two terms take off what a variable hears of itself through the others.
    Logits are iterated from mean field with damping. There may be several solutions or none:
    nothing is certified, and samples that do not converge are flagged. Marginals are better than
    those of mean field where couplings are weak or moderate, which is not so of strong ones.

    References:
        | Solution of 'Solvable model of a spin glass' (Thouless et al., 1977)
        | https://doi.org/10.1080/14786437708235992

    Arguments:
        coupling: The coupling :math:`\Phi`.
        bias: The biases :math:`b`, with shape :math:`(N,)` or :math:`(B, N)`.
        observed: Which variables are observed, boolean with shape :math:`(n,)` or
            :math:`(B, n)`. By default none are.
        values: The values of observed variables, with shape :math:`(N,)` or :math:`(B, N)`.
        damping: The weight of old logits, in :math:`(-1, 1)`. By default that with which mean
            field converges, as for :class:`~probnets.boltzmann.LogitDamping`.
        tolerance: The largest residual of logits, as for :func:`~probnets.backend.fixed_point`.
        max_steps: The largest number of steps.
        strict: Whether to raise if a sample does not converge.

    Returns:
        The solution, whose values are marginals with shape :math:`(B, N)`.

    Raises:
        ValueError: If shapes do not fit, or there are too many states.
        RuntimeError: If the search is strict and a sample does not converge.

    Example:
        >>> from probnets.boltzmann import GramCoupling
        >>> solution = tap_marginals(GramCoupling([2, 3, 3], 5), torch.zeros(4, 8))
        >>> solution.value.shape, bool(solution.converged.all())
        (torch.Size([4, 8]), True)
    """
    problem, known = prepare(coupling, bias, observed=observed, values=values)
    Phi = _dense(coupling, problem.field)
    start = mean_field(coupling, bias, observed=observed, values=values)
    if damping is None:
        damping = 1 - 1 / (1 - min(problem.smallest, 0.0) / 2)

    def step(theta: Tensor) -> Tensor:
        q = problem.marginals(theta)
        spread, pull = _reaction(Phi, q, problem.groups)
        return problem.couple(q) + problem.field + problem.hide(spread / 2 - pull)

    found = fixed_point(
        step,
        start.logits,
        damping=damping,
        tolerance=tolerance,
        max_steps=max_steps,
        strict=strict,
    )
    return found._replace(value=problem.marginals(found.value) + known)


def _hidden(coupling: Coupling, q: Tensor, observed: Tensor | None) -> Tensor:
    r"""Returns marginals that are zero where observed, of which S is zero there as well."""
    N, n = coupling.states, coupling.variables
    if q.ndim != 2 or q.shape[1] != N:
        raise ValueError(f"expected marginals with shape (B, {N}), got {tuple(q.shape)}")
    if observed is None:
        return q
    if observed.dtype != torch.bool or observed.shape not in ((n,), (len(q), n)):
        raise ValueError(
            f"expected a boolean mask of observed variables with shape ({n},) or ({len(q)}, {n}),"
            f" got {observed.dtype} with shape {tuple(observed.shape)}"
        )
    return q.masked_fill(observed[..., coupling.groups.index], 0.0)


def _dense(coupling: Coupling, like: Tensor) -> Tensor:
    if coupling.states > _LARGEST:
        raise ValueError(
            f"expected at most {_LARGEST} states for dense algebra, got {coupling.states}; "
            "the second order takes probes instead"
        )
    return coupling.dense().to(like)


def _reaction(Phi: Tensor, q: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    r"""Computes diag(A) and A_ii q_i of A = Φ S Φ, each with shape (B, N), in chunks."""
    chunk = max(1, _HELD // max(1, Phi.numel()))
    parts = [_reaction_of(Phi, part, groups) for part in q.split(chunk)]
    spread, pull = zip(*parts, strict=True)
    return torch.cat(spread), torch.cat(pull)


def _reaction_of(Phi: Tensor, q: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    half = softmax_jvp(q[:, None], Phi, groups)  # Φ S, (B, N, N)
    mean = q.new_zeros(len(q), len(groups), len(Phi))
    mean = mean.index_add(1, groups.index, q[:, :, None] * Phi)  # Σ_{c ∈ i} q_c Φ_c
    return (half * Phi).sum(dim=2), (half * mean[:, groups.index]).sum(dim=2)


def _probe(coupling: Coupling, q: Tensor, generator: torch.Generator | None) -> Tensor:
    r"""Draws an unbiased estimate of tr(S Φ S Φ), by S = L Lᵀ with L = √q (I - √q √qᵀ)."""
    sign = torch.empty_like(q).bernoulli_(0.5, generator=generator) * 2 - 1
    root = q.sqrt()
    total = q.new_zeros(len(q), coupling.variables)
    total = total.index_add(1, coupling.groups.index, root * sign)
    w = coupling(root * (sign - root * total[:, coupling.groups.index]))
    return (w * softmax_jvp(q, w, coupling.groups)).sum(dim=1)
