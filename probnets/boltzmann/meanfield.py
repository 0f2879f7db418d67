r"""Mean field: marginals with a certificate, and their gradients."""

__all__ = ["SOLVERS", "MeanField", "free_energy", "mean_field"]

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from probnets.backend import Solution, implicit_fixed_point

from .acceleration import Anderson, Fista
from .ascent import CoordinateAscent
from .couplings import Coupling
from .newton import Newton, solve_linear
from .problems import Problem, prepare
from .solvers import LogitDamping, Parallel, Solver, State
from .splitting import ForwardBackward

SolverName = Literal[
    "auto", "anderson", "coordinate", "damping", "fista", "forward-backward", "newton", "parallel"
]

SOLVERS: dict[SolverName, Callable[[], Solver]] = {
    "anderson": Anderson,
    "coordinate": CoordinateAscent,
    "damping": LogitDamping,
    "fista": Fista,
    "forward-backward": ForwardBackward,
    "newton": Newton,
    "parallel": Parallel,
}


class MeanField(NamedTuple):
    r"""Is the mean field of a batch of queries.

    Attributes:
        marginals: The marginals :math:`q`, with shape :math:`(B, N)`; the given values where
            variables are observed. They have gradients.
        logits: The logits :math:`\Phi q + b` of hidden variables, likewise.
        error: What the distance :math:`\|q - q^*\|_2` to the one solution does not exceed, with
            shape :math:`(B,)`. What rounding may hide is included, which grows with the biases:
            centre them. It is infinite if the coupling has no cap.
        residual: The norm of the gradient of the free energy on the tangent space.
        free_energy: The free energy :math:`F(q) \geq -\log Z` without gradients; for one with
            gradients see :func:`free_energy`.
        steps: The number of steps of each sample.
        converged: Whether the error is within the tolerance; without a cap, the residual.
        start: The logits :math:`\log q` of hidden variables, but for a constant, without
            gradients. They differ from the others by the residual. An answer to a like query
            starts from them, and one to the same query takes no step.
        products: How often vectors of a batch were multiplied by the coupling.
    """

    marginals: Tensor
    logits: Tensor
    error: Tensor
    residual: Tensor
    free_energy: Tensor
    steps: Tensor
    converged: Tensor
    start: Tensor
    products: int


def mean_field(
    coupling: Coupling,
    bias: Tensor,
    *,
    observed: Tensor | None = None,
    values: Tensor | None = None,
    solver: SolverName | Solver = "auto",
    tolerance: float = 1e-3,
    max_steps: int = 1000,
    initial: "Tensor | MeanField | None" = None,
    adjoint_tolerance: float = 1e-6,
    strict: bool = False,
) -> MeanField:
    r"""Computes the marginals of hidden variables in the mean-field approximation.

    .. math:: q_i = \mathrm{softmax}\left( (\Phi q)_i + b_i \right)

    This is the factorised distribution nearest to the conditional of what is hidden given what
    is observed, in the sense of the reverse Kullback-Leibler divergence. With a capped coupling
    it is unique for every bias and every choice of observed variables, which may differ from
    sample to sample, and the distance of the answer from it is certified.

    Each sample stops by itself, unconverged if rounding keeps it from any progress. Gradients
    are those of the exact solution, by conjugate gradients: memory does not grow with the
    number of steps.

    References:
        | Monotone deep Boltzmann machines (Feng et al., 2023)
        | https://arxiv.org/abs/2307.04990

    Arguments:
        coupling: The coupling :math:`\Phi`.
        bias: The biases :math:`b`, with shape :math:`(N,)` or :math:`(B, N)`.
        observed: Which variables are observed, boolean with shape :math:`(n,)` or
            :math:`(B, n)`. By default none are.
        values: The values of observed variables, one-hot or distributions, with shape
            :math:`(N,)` or :math:`(B, N)`. Those of hidden ones are ignored.
        solver: The solver, by its name or with settings of its own. By default Anderson's
            acceleration, or Newton's method for small problems and tolerances. The first steps
            are in single precision where that pays; the certificate is not.
        tolerance: The largest distance from the solution.
        max_steps: The largest number of steps.
        initial: Logits to start from, with shape :math:`(B, N)`, or the mean field of a like
            query. By default the biases.
        adjoint_tolerance: The largest relative residual of the linear system for gradients.
        strict: Whether to raise if a sample does not converge.

    Returns:
        The mean field.

    Raises:
        ValueError: If shapes do not fit, or values are no distributions.
        RuntimeError: If the search is strict and a sample does not converge.

    Example:
        >>> from probnets.boltzmann import GramCoupling
        >>> coupling = GramCoupling([2, 3, 3], 5)
        >>> field = mean_field(coupling, torch.zeros(4, 8))
        >>> field.marginals.shape, bool(field.converged.all())
        (torch.Size([4, 8]), True)
    """
    chosen = _solver(solver, tolerance, coupling.states)
    if not tolerance > 0 or max_steps < 0:
        raise ValueError(
            f"expected tolerance > 0 and max_steps >= 0, got {tolerance} and {max_steps}"
        )
    problem, known = prepare(coupling, bias, observed=observed, values=values)
    with torch.no_grad():
        theta = problem.field.detach() if initial is None else _initial(initial, problem.field)
        limits = {"tolerance": tolerance, "max_steps": max_steps}
        large = coupling.states >= _LARGE and coupling.single_pays
        if solver == "auto" and large and theta.dtype == torch.float64:
            found = _solve_mixed(problem, chosen, theta, **limits)
        else:
            found = _solve(problem, chosen, theta, **limits)
    converged = found.error <= tolerance
    if strict and not bool(converged.all()):
        raise RuntimeError(
            f"expected mean field to converge within {max_steps} steps, but "
            f"{int((~converged).sum())} of {len(converged)} samples are still as far as "
            f"{found.error.max().item():.1e} from {tolerance:.1e}; allow more steps, a larger "
            "tolerance or float64"
        )

    marginals, logits = found.q, found.phi + problem.field.detach()
    weights = (problem.field, *coupling.parameters())
    if torch.is_grad_enabled() and any(x.requires_grad for x in weights):
        marginals = _with_gradients(problem, found, adjoint_tolerance, strict=strict)
        logits = problem.couple(marginals) + problem.field
    return MeanField(
        marginals + known,
        logits,
        found.error if problem.largest < 2 else torch.full_like(found.error, torch.inf),
        found.norm,
        found.energy if problem.constant is None else found.energy + problem.constant,
        found.steps,
        converged,
        problem.hide(found.theta),
        found.products,
    )


def free_energy(coupling: Coupling, bias: Tensor, q: Tensor) -> Tensor:
    r"""Computes the free energy of marginals.

    .. math:: F(q) = -\tfrac12 q^\top \Phi q - b^\top q + \sum_i q_i^\top \log q_i \geq -\log Z

    At a solution its slope in :math:`q` vanishes along the simplices. So for a loss that is a
    free energy, pass detached marginals: the gradient is exact without a linear system, though
    not the second derivatives.

    Arguments:
        coupling: The coupling :math:`\Phi`.
        bias: The biases :math:`b`, with shape :math:`(N,)` or :math:`(B, N)`.
        q: The marginals, with shape :math:`(B, N)`.

    Returns:
        The free energies, with shape :math:`(B,)`.
    """
    N = coupling.states
    if q.ndim != 2 or q.shape[1] != N or bias.shape not in ((N,), (1, N), q.shape):
        raise ValueError(
            f"expected marginals (B, {N}) and biases ({N},) or (B, {N}), got {tuple(q.shape)} and "
            f"{tuple(bias.shape)}"
        )
    return (q * (-0.5 * coupling(q) - bias) + torch.xlogy(q, q)).sum(dim=1)


class _Found(NamedTuple):
    r"""Is what the search found."""

    theta: Tensor
    q: Tensor
    phi: Tensor
    norm: Tensor
    energy: Tensor
    error: Tensor
    steps: Tensor
    products: int


def _solve(
    problem: Problem,
    solver: Solver,
    theta: Tensor,
    *,
    tolerance: float,
    max_steps: int,
    rounding: float = 1.0,
) -> _Found:
    r"""Runs a solver until all samples are done. Those that are leave the batch.

    Errors hold what rounding may hide of residuals, times a factor.
    """
    rows = torch.arange(len(theta), device=theta.device)
    one = theta.new_zeros(len(theta))
    results = *(torch.zeros_like(theta) for _ in range(3)), one, one.clone(), one.clone()
    steps, products, taken = torch.zeros_like(rows), 0, 0
    state = solver.start(problem, theta) if len(rows) else None
    best, since = one if state is None else state.norm, steps
    while state is not None:
        error, unseen = state.norm, _unseen(problem, state)
        if problem.largest < 2:
            error = problem.distance(state.norm + rounding * unseen)
        better = state.norm < 0.999 * best
        best, since = torch.where(better, state.norm, best), torch.where(better, 0, since + 1)
        done = (error <= tolerance) | (taken == max_steps)
        late = since > _PATIENCE
        if bool(late.any()):
            done = done | (late & (state.norm <= _ROUNDING * unseen))
        if bool(done.any()):
            out = rows[done]
            for target, x in zip(results, (*state[:5], error), strict=True):
                target[out] = x[done]
            steps[out] = taken
            if bool(done.all()):
                break
            products, problem = products + problem.products, problem.take(~done)
            rows, best, since = rows[~done], best[~done], since[~done]
            state = state.take(~done)
        state = solver.step(problem, state)
        taken += 1
    theta, q, phi, norm, energy, error = results
    return _Found(theta, q, phi, norm, energy, error, steps, products + problem.products)


def _solve_mixed(
    problem: Problem, solver: Solver, theta: Tensor, *, tolerance: float, max_steps: int
) -> _Found:
    r"""Runs a solver in single precision as far as that goes, and then in double precision."""
    single, rows = problem.single(), theta.new_ones(1)
    reach = 8 * torch.finfo(torch.float32).eps * math.sqrt(theta.shape[1])
    reach = reach if single.largest >= 2 else single.distance(reach * rows).item()
    first = _solve(
        single,
        solver,
        theta.float(),
        tolerance=max(tolerance / 2, reach),
        max_steps=max_steps,
        rounding=0.0,
    )
    left = max_steps - max(first.steps.tolist(), default=0)
    found = _solve(problem, solver, first.theta.double(), tolerance=tolerance, max_steps=left)
    return found._replace(
        steps=first.steps + found.steps, products=first.products + found.products
    )


# From how many states on products cost more than all else.
_LARGE = 4096

# Steps without progress after which rounding ends the search, and its effect on residuals.
_PATIENCE, _ROUNDING = 20, 1e3


def _unseen(problem: Problem, state: State) -> Tensor:
    r"""Estimates how much of residuals rounding may hide."""
    terms = torch.stack([problem.hide(x) for x in (state.theta, state.phi, problem.field)])
    size = torch.linalg.vector_norm(terms, dim=2).sum(dim=0)
    return torch.finfo(size.dtype).eps * size


def _with_gradients(problem: Problem, found: _Found, tolerance: float, *, strict: bool) -> Tensor:
    r"""Gives the solution the gradient of dq = S (Φ dq + dΦ q + db)."""

    def step(q: Tensor) -> Tensor:
        return problem.marginals(problem.couple(q) + problem.field)

    def adjoint(operator: Callable[[Tensor], Tensor], g: Tensor) -> Solution:
        return solve_linear(problem, found.q, g, operator=operator, tolerance=tolerance)

    known = Solution(found.q, found.error, found.steps, torch.ones_like(found.steps).bool())
    return implicit_fixed_point(
        step, found.q, solve=lambda step, start: known, solve_adjoint=adjoint, strict=strict
    ).value


def _solver(solver: str | Solver, tolerance: float, states: int) -> Solver:
    if isinstance(solver, Solver):
        return solver
    if solver == "auto":  # as measured: Newton's method has more products and fewer steps
        return Anderson() if tolerance >= 1e-3 or states >= _LARGE else Newton()
    if solver not in SOLVERS:
        raise ValueError(f"expected a solver of {['auto', *sorted(SOLVERS)]}, got {solver!r}")
    return SOLVERS[solver]()


def _initial(initial: Tensor | MeanField, field: Tensor) -> Tensor:
    theta = initial.start if isinstance(initial, MeanField) else initial
    if theta.shape != field.shape:
        raise ValueError(
            f"expected initial logits with shape {tuple(field.shape)}, got {tuple(theta.shape)}"
        )
    if not bool(theta.isfinite().all()):
        raise ValueError("expected finite initial logits, got NaN or infinity")
    return theta.detach().to(field.dtype)
