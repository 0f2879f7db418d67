r"""Matrix-free linear solvers for batches."""

__all__ = ["conjugate_gradient", "gmres"]

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .solution import Solution, check_converged, check_like, check_start

Operator = Callable[[Tensor], Tensor]
# (value, residual, active samples, steps) -> (value, steps, samples that cannot go on)
Cycle = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def conjugate_gradient(
    operator: Operator,
    rhs: Tensor,
    *,
    metric: Operator | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 100,
    strict: bool = False,
) -> Solution:
    r"""Solves :math:`A x = b` for each sample, where :math:`A` is positive definite.

    The operator has to be self-adjoint and positive definite in the inner product
    :math:`\langle u, v \rangle = u^\top M v` of the metric, which by default is the usual one.
    The residual of a sample is :math:`\| M (b - A x) \| / \| M b \|`.

    A metric may have a null space, within which the solution is then arbitrary. To lose no
    digits, keep the operator and the right-hand sides out of it.

    Each sample starts at zero, stops by itself and does not change from then on. It also stops
    if it meets a direction of non-positive curvature, where the method does not apply. The
    residual is measured at the end, not carried along.

    References:
        | Methods of Conjugate Gradients for Solving Linear Systems (Hestenes and Stiefel, 1952)
        | https://doi.org/10.6028/jres.049.044

    Arguments:
        operator: The operator :math:`A`, from shape :math:`(B, *)` to the same shape, without
            mixing samples.
        rhs: The right-hand sides :math:`b`, with shape :math:`(B, *)`.
        metric: The positive semi-definite operator :math:`M`, likewise.
        tolerance: The largest residual of a solution.
        max_steps: The largest number of steps, each of which applies the operator once.
        strict: Whether to raise if a sample does not converge.

    Returns:
        The solution.

    Raises:
        RuntimeError: If the solver is strict and a sample does not converge.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> conjugate_gradient(lambda x: x @ A, torch.tensor([[3.0, 3.0]])).value
        tensor([[1., 1.]])
    """
    check_start("rhs", rhs, tolerance=tolerance, max_steps=max_steps)
    apply = _flatten("operator", operator, rhs)
    measure = _flatten("metric", metric, rhs) if metric else _identity
    b = _flat(rhs)
    target = tolerance * _norm(measure(b))

    def cycle(
        x: Tensor, r: Tensor, active: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        s = measure(r)
        p, rho = r, _dot(r, s)
        stuck = torch.zeros_like(active)

        while active.any():
            q = apply(p)
            t = measure(q)
            steps = steps + active

            curvature = _dot(p, t)
            stuck = stuck | (active & ~(curvature > 0))
            active = active & ~stuck

            rate = (rho / curvature)[:, None]
            x = torch.where(active[:, None], x + rate * p, x)
            r = torch.where(active[:, None], r - rate * q, r)
            s = torch.where(active[:, None], s - rate * t, s)

            previous, rho = rho, _dot(r, s)
            active = active & (_norm(s) > target) & (steps < max_steps)
            p = torch.where(active[:, None], r + (rho / previous)[:, None] * p, r)

        return x, steps, stuck

    solution = _refine(cycle, apply, b, measure, tolerance=tolerance, max_steps=max_steps)
    solution = solution._replace(value=solution.value.view(rhs.shape))
    return check_converged("conjugate_gradient", solution) if strict else solution


@torch.no_grad()
def gmres(
    operator: Operator,
    rhs: Tensor,
    *,
    memory: int = 20,
    tolerance: float = 1e-5,
    max_steps: int = 100,
    strict: bool = False,
) -> Solution:
    r"""Solves :math:`A x = b` for each sample, for any regular :math:`A`.

    After :math:`m` steps at most, the solver restarts from the best value that it found. The
    residual of a sample is :math:`\| b - A x \| / \| b \|`.

    Each sample starts at zero, stops by itself and does not change from then on. The residual
    is measured at the end, not carried along.

    References:
        | A Simpler GMRES (Walker and Zhou, 1994)
        | https://doi.org/10.1002/nla.1680010605

    Arguments:
        operator: The operator :math:`A`, from shape :math:`(B, *)` to the same shape, without
            mixing samples.
        rhs: The right-hand sides :math:`b`, with shape :math:`(B, *)`.
        memory: The number :math:`m` of steps between restarts, each of which keeps two vectors.
        tolerance: The largest residual of a solution.
        max_steps: The largest number of steps, each of which applies the operator once.
        strict: Whether to raise if a sample does not converge.

    Returns:
        The solution.

    Raises:
        RuntimeError: If the solver is strict and a sample does not converge.

    Example:
        >>> A = torch.tensor([[0.0, 1.0], [-2.0, 0.0]])
        >>> gmres(lambda x: x @ A.T, torch.tensor([[1.0, 2.0]])).value
        tensor([[-1.0000,  1.0000]])
    """
    check_start("rhs", rhs, tolerance=tolerance, max_steps=max_steps)
    if memory < 1:
        raise ValueError(f"expected memory >= 1, got {memory}")

    apply = _flatten("operator", operator, rhs)
    b = _flat(rhs)
    target = tolerance * _norm(b)

    def cycle(
        x: Tensor, r: Tensor, active: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, D = x.shape
        m = min(memory, D)
        basis, images = x.new_zeros(B, m, D), x.new_zeros(B, m, D)  # A V = Q R
        R = torch.eye(m, dtype=x.dtype, device=x.device).repeat(B, 1, 1)
        weights = x.new_zeros(B, m)
        stuck = torch.zeros_like(active)

        v = _unit(r)
        for k in range(m):
            if not active.any():
                break

            image = apply(v)
            steps = steps + active
            q, column = _orthogonalise(image, images)
            length = _norm(q)

            # An image inside the span of the others says that A is singular.
            fresh = length > 10 * torch.finfo(x.dtype).eps * _norm(image)
            stuck = stuck | (active & ~fresh) if k == 0 else stuck
            active = active & fresh
            q = torch.where(active[:, None], _unit(q), 0.0)

            basis[:, k], images[:, k] = v, q
            R[:, :k, k] = torch.where(active[:, None], column[:, :k], 0.0)
            R[:, k, k] = torch.where(active, length, 1.0)
            weights[:, k] = _dot(q, r)
            r = r - weights[:, k, None] * q

            active = active & (_norm(r) > target) & (steps < max_steps)
            v = q

        y = torch.linalg.solve_triangular(R, weights[:, :, None], upper=True)
        return x + (y.mT @ basis).squeeze(1), steps, stuck

    solution = _refine(cycle, apply, b, _identity, tolerance=tolerance, max_steps=max_steps)
    solution = solution._replace(value=solution.value.view(rhs.shape))
    return check_converged("gmres", solution) if strict else solution


def _refine(
    cycle: Cycle,
    apply: Operator,
    b: Tensor,
    measure: Operator,
    *,
    tolerance: float,
    max_steps: int,
) -> Solution:
    r"""Repeats a cycle on the measured residual until no sample needs or can have another."""
    x, r = torch.zeros_like(b), b
    scale = _norm(measure(b))
    steps = torch.zeros_like(scale, dtype=torch.long)
    stuck = torch.zeros_like(scale, dtype=torch.bool)

    while True:
        residual = torch.where(scale == 0, 0.0, _norm(measure(r)) / scale)
        active = (residual > tolerance) & ~stuck & (steps < max_steps)
        if not active.any():
            return Solution(x, residual, steps, residual <= tolerance)

        x, steps, broken = cycle(x, r, active, steps)
        stuck = stuck | broken
        r = b - apply(x)


def _orthogonalise(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns the part of x outside the span, and its coefficients within.

    Twice is enough: the second pass removes what rounding left in the first.
    """
    inside = x.new_zeros(basis.shape[:2])
    for _ in range(2):
        overlap = (basis @ x[:, :, None]).squeeze(2)
        x = x - (overlap[:, None] @ basis).squeeze(1)
        inside = inside + overlap
    return x, inside


def _flatten(name: str, function: Operator, like: Tensor) -> Operator:
    r"""Turns a function of (B, *) into one of (B, D) that checks what it returns."""

    def flat(x: Tensor) -> Tensor:
        shaped = x.view(like.shape)
        return check_like(name, function(shaped), shaped).reshape(x.shape)

    return flat


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _identity(x: Tensor) -> Tensor:
    return x


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)


def _unit(x: Tensor) -> Tensor:
    length = _norm(x)[:, None]
    return x / length.masked_fill(length == 0, 1.0)
