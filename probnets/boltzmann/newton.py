r"""Newton's method for mean-field problems, and the linear systems at their solutions."""

__all__ = ["Newton", "covariance", "solve_linear", "tangent"]

from collections.abc import Callable

import torch
from torch import Tensor

from probnets.backend import Solution, conjugate_gradient, softmax_jvp

from .problems import Problem
from .solvers import Solver, State, arrive, choose, damped, safe_rate, slack

Operator = Callable[[Tensor], Tensor]

# How often a step is halved before it is given up.
_HALVINGS = 30


class Newton(Solver):
    r"""Creates Newton's method in the logits, with conjugate gradients and a line search.

    .. math:: \theta \gets \theta + t d \qquad P (I - \Phi S) d = -P (\theta - \Phi q - b)
        \qquad S = \mathrm{blkdiag}(\mathrm{diag}(q_i) - q_i q_i^\top)

    The operator is self-adjoint and positive definite in the inner product of :math:`S`. The
    system is solved as precisely as the residual of the problem deserves, and each direction
    descends. The step :math:`t` is halved until the free energy falls enough, or the residual
    where energies differ by rounding alone. It converges faster than linearly. A sample that
    rounding keeps from any progress stays where it is, and needs no products any more.

    References:
        | Inexact Newton Methods (Dembo et al., 1982)
        | https://doi.org/10.1137/0719025

    Arguments:
        steps: The largest number of steps of conjugate gradients in one of Newton's method.
    """

    def __init__(self, steps: int = 50) -> None:
        if steps < 1:
            raise ValueError(f"expected steps >= 1, got {steps}")
        self.steps = steps

    def remember(self, problem: Problem, state: State) -> dict[str, Tensor]:
        return {"stuck": torch.zeros_like(state.norm).bool()}

    def step(self, problem: Problem, state: State) -> State:
        new, stuck = state, state.memory["stuck"]
        seeking = ~stuck
        if not bool(seeking.any()):
            return state
        d, slope = self._direction(problem, state, seeking)
        length, room = torch.ones_like(slope), slack(state.energy)
        lost = torch.zeros_like(seeking)
        for trial in range(_HALVINGS):
            theta = state.theta + length[:, None] * d
            q = problem.marginals(theta)
            new, good = _accept(problem, state, new, theta, q, seeking, length * slope)
            seeking = seeking & ~good
            if trial:  # where energies cannot tell, two trials will do
                lost = lost | (seeking & (-length * slope <= room))
                seeking = seeking & ~lost
            if not bool(seeking.any()):
                break
            length = torch.where(seeking, length / 2, length)
        lost = lost | seeking
        if bool(lost.any()):
            rate = torch.full_like(slope[:, None], safe_rate(problem))
            theta, q = damped(problem, state, rate)
            new, good = _accept(problem, state, new, theta, q, lost, -room)
            new = new._replace(memory={"stuck": stuck | (lost & ~good)})
        return new

    def _direction(self, problem: Problem, state: State, active: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns what conjugate gradients find, and the slope of the free energy along it."""
        q, r = state.q, state.r
        metric = covariance(problem, q)
        d, left = torch.zeros_like(r), -r
        s = metric(left)
        p, Sp = left, s
        rho = first = (left * s).sum(dim=1)
        forcing = torch.linalg.vector_norm(r, dim=1).sqrt().clamp(max=0.1)
        active = active & (first > 0)
        for step in range(self.steps):
            if not bool(active.any()):
                break
            Ap = tangent(problem, p - problem.couple(Sp))
            curvature = (Ap * Sp).sum(dim=1)
            bent = active & ~(curvature > 0)  # only without a cap: go down the slope
            if step == 0:
                d = torch.where(bent[:, None], p, d)
            active = active & ~bent
            rate = torch.where(active, rho / curvature, 0.0)[:, None]
            d, left = d + rate * p, left - rate * Ap
            s = metric(left)
            last, rho = rho, (left * s).sum(dim=1)
            active = active & (rho > forcing**2 * first)
            beta = torch.where(active, rho / last, 0.0)[:, None]
            p, Sp = left + beta * p, s + beta * Sp
        # States without variance are invisible to the metric, and one free step solves theirs.
        d = d + torch.where(q * (1 - q) < 1e-3, problem.hide(left), 0.0)
        return d, (d * metric(r)).sum(dim=1).clamp(max=0.0)


def _accept(
    problem: Problem,
    old: State,
    new: State,
    theta: Tensor,
    q: Tensor,
    wanted: Tensor,
    fall: Tensor,
) -> tuple[State, Tensor]:
    r"""Takes a candidate where it is wanted and good, and tells where that is.

    It is good if the free energy falls by a little of what was foreseen or, where energies
    differ by rounding alone, if the residual falls.
    """
    found = arrive(problem, theta, q)
    energy, before = found.energy, old.energy
    level = (energy <= before + slack(before)) & (found.norm < old.norm)
    good = wanted & (((energy - before <= 1e-4 * fall) & (energy < before)) | level)
    return choose(good, found._replace(memory=new.memory), new), good


def covariance(problem: Problem, q: Tensor) -> Operator:
    r"""Returns the multiplication with the covariances :math:`S` of hidden variables.

    Arguments:
        problem: The problem.
        q: The marginals.
    """
    return lambda v: problem.hide(softmax_jvp(q, v, problem.groups))


def tangent(problem: Problem, v: Tensor) -> Tensor:
    r"""Projects onto the tangent space of the simplices of hidden variables.

    Arguments:
        problem: The problem.
        v: The vectors, with shape :math:`(B, N)`.
    """
    return problem.hide(problem.centre(v))


def solve_linear(
    problem: Problem,
    q: Tensor,
    g: Tensor,
    *,
    operator: Operator | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 500,
) -> Solution:
    r"""Solves :math:`P (I - \Phi S) x = P g` by conjugate gradients.

    The operator is self-adjoint and positive definite in the inner product of :math:`S`. The
    solution is the gradient of a loss in the biases, divided by :math:`S`, where :math:`g` is
    its gradient in the marginals.

    Arguments:
        problem: The problem.
        q: The marginals, of a solution.
        g: The right-hand sides, with shape :math:`(B, N)`.
        operator: The multiplication with :math:`I - \Phi S`, if there is one already.
        tolerance: The largest relative residual.
        max_steps: The largest number of steps.

    Returns:
        The solution.
    """
    metric = covariance(problem, q)
    apply = operator or (lambda v: v - problem.couple(metric(v)))
    return conjugate_gradient(
        lambda v: tangent(problem, apply(v)),
        tangent(problem, g),
        metric=metric,
        tolerance=tolerance,
        max_steps=max_steps,
    )
