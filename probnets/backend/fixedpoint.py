r"""Fixed points of batched maps."""

__all__ = ["fixed_point"]

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .solution import Solution, check_converged, check_like, check_start


@torch.no_grad()
def fixed_point(
    step: Callable[[Tensor], Tensor],
    initial: Tensor,
    *,
    solver: Literal["damped", "anderson"] = "damped",
    damping: float = 0.0,
    memory: int = 5,
    tolerance: float = 1e-5,
    max_steps: int = 100,
    strict: bool = False,
) -> Solution:
    r"""Searches a fixed point :math:`z = f(z)` for each sample of a batch.

    The damped solver iterates

    .. math:: z \gets \eta z + (1 - \eta) f(z) .

    Anderson's solver combines the last :math:`m + 1` iterates such that their residuals
    :math:`f(z) - z` nearly cancel. It is safeguarded: if the combination is not finite, or has
    a larger residual than the iterate before it, the sample goes back to that iterate, forgets
    the older ones and takes a damped step.

    Each sample stops by itself. It converged if

    .. math:: \frac{\max_i |f(z)_i - z_i|}{\max(1, \max_i |z_i|)} \leq \text{tolerance}

    and does not change from then on. A sample whose next step is not finite stops at its last
    finite value. The map must not mix samples. No gradient is recorded; for that, see
    :func:`implicit_fixed_point`.

    References:
        | Anderson Acceleration for Fixed-Point Iterations (Walker and Ni, 2011)
        | https://doi.org/10.1137/10078356X

    Arguments:
        step: The map :math:`f`, from shape :math:`(B, *)` to the same shape.
        initial: The first iterates, with shape :math:`(B, *)`.
        solver: The solver.
        damping: The weight :math:`\eta` of the old iterate, in :math:`(-1, 1)`. Negative
            weights over-relax.
        memory: The number :math:`m` of earlier iterates that Anderson's solver combines.
        tolerance: The largest residual of a solution.
        max_steps: The largest number of steps. The map is evaluated once more than that.
        strict: Whether to raise if a sample does not converge.

    Returns:
        The solution. Its steps are the evaluations of the map after the first, of which
        Anderson's solver may have discarded some.

    Raises:
        RuntimeError: If the solver is strict and a sample does not converge.

    Example:
        >>> root = fixed_point(torch.cos, torch.zeros(2), solver="anderson")
        >>> root.value
        tensor([0.7391, 0.7391])
        >>> root.converged
        tensor([True, True])
    """
    check_start("initial", initial, tolerance=tolerance, max_steps=max_steps)
    if solver not in ("damped", "anderson"):
        raise ValueError(f"expected solver 'damped' or 'anderson', got {solver!r}")
    if not -1 < damping < 1:
        raise ValueError(f"expected damping in (-1, 1), got {damping}; 0 is the plain iteration")
    if memory < 1:
        raise ValueError(f"expected memory >= 1, got {memory}; for none, use solver='damped'")

    def residual(z: Tensor) -> Tensor:
        shaped = z.view(initial.shape)
        return check_like("step", step(shaped), shaped).reshape(z.shape) - z

    flat = initial.reshape(len(initial), math.prod(initial.shape[1:]))
    solution = _iterate(
        residual,
        flat,
        mixing=1 - damping,
        memory=memory if solver == "anderson" else 0,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    solution = solution._replace(value=solution.value.view(initial.shape))
    return check_converged("fixed_point", solution) if strict else solution


def _iterate(
    residual: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    mixing: float,
    memory: int,
    tolerance: float,
    max_steps: int,
) -> Solution:
    r"""Solves in the flat shape (B, D), with the damped solver if there is no memory."""
    past = z.new_zeros(2, len(z), memory, z.shape[1])  # differences of z and of r
    r = torch.zeros_like(z)
    error = z.new_full(z.shape[:1], math.inf)  # of z, as is its norm
    norm = error
    steps = torch.zeros_like(error, dtype=torch.long)
    active = torch.ones_like(error, dtype=torch.bool)
    leapt = torch.zeros_like(active)  # whether the candidate is a combination

    candidate = z
    while True:
        r_next = residual(candidate)
        norm_next = torch.linalg.vector_norm(r_next, dim=1)

        # A damped step counts if it is finite, a combination only if it is an improvement.
        good = active & norm_next.isfinite() & ~(leapt & (norm_next > norm))
        active = active & (good | leapt)
        if memory:
            past = _remember(past, candidate - z, r_next - r, good & (steps > 0), active & ~good)

        z, r = (torch.where(good[:, None], new, old) for new, old in ((candidate, z), (r_next, r)))
        norm = torch.where(good, norm_next, norm)
        error = torch.where(good, _error(z, r), error)

        active = active & (error > tolerance) & (steps < max_steps)
        if not active.any():
            return Solution(z, error, steps, error <= tolerance)

        candidate = z + mixing * r
        if memory:
            combined = _combine(z, r, past, mixing)
            leapt = active & good & (steps > 0) & combined.isfinite().all(1)
            candidate = torch.where(leapt[:, None], combined, candidate)
        candidate = torch.where(active[:, None], candidate, z)
        steps = steps + active


def _error(z: Tensor, r: Tensor) -> Tensor:
    if z.shape[1] == 0:
        return z.new_zeros(len(z))
    return r.abs().amax(1) / z.abs().amax(1).clamp(min=1)


def _remember(past: Tensor, dz: Tensor, dr: Tensor, append: Tensor, forget: Tensor) -> Tensor:
    r"""Appends the newest differences for some samples and clears those of others."""
    longer = torch.cat([past[:, :, 1:], torch.stack([dz, dr])[:, :, None]], dim=2)
    past = torch.where(append[:, None, None], longer, past)
    return past.masked_fill(forget[:, None, None], 0.0)


def _combine(z: Tensor, r: Tensor, past: Tensor, mixing: float) -> Tensor:
    r"""Extrapolates to where the residual vanishes, as far as the differences can tell.

    The coefficients solve min |r - Σ γ dr|². Unit differences and a ridge at the level of
    rounding keep the normal equations solvable; differences that are zero get no weight.
    """
    dz, dr = past  # (B, m, D)
    length = torch.linalg.vector_norm(dr, dim=2)
    length = length.masked_fill(length == 0, 1.0)
    unit = dr / length[:, :, None]

    ridge = (
        10 * torch.finfo(z.dtype).eps * torch.eye(unit.shape[1], dtype=z.dtype, device=z.device)
    )
    overlap = (unit @ r[:, :, None]).squeeze(2)
    weights = torch.linalg.solve_ex(unit @ unit.mT + ridge, overlap).result / length

    return z + mixing * r - (weights[:, None] @ (dz + mixing * dr)).squeeze(1)
