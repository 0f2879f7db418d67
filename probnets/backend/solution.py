r"""What iterative solvers return."""

__all__ = ["Solution"]

from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    r"""The result of an iterative solver, with one verdict for each sample of a batch.

    Each solver says how it measures its residual. The residual always belongs to the value
    that is returned, and a sample has converged if its residual is within the tolerance.

    Attributes:
        value: The last values, with shape :math:`(B, *)`.
        residual: The residual of each sample, with shape :math:`(B,)`.
        steps: The steps that each sample took, with shape :math:`(B,)`.
        converged: Whether each sample converged, with shape :math:`(B,)`.
    """

    value: Tensor
    residual: Tensor
    steps: Tensor
    converged: Tensor


def check_start(name: str, x: Tensor, *, tolerance: float, max_steps: int) -> None:
    r"""Raises unless a solver can start.

    Arguments:
        name: The name of the start in the solver's signature.
        x: The start, which has to be a batch, with shape :math:`(B, *)`.
        tolerance: The tolerance, which has to be positive.
        max_steps: The number of steps, which has to be non-negative.
    """
    if x.ndim == 0:
        raise ValueError(f"expected {name} with shape (B, *), got a scalar; add a batch dimension")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"expected {name} of dtype float32 or float64, got {x.dtype}")
    if not tolerance > 0:
        raise ValueError(f"expected tolerance > 0, got {tolerance}")
    if max_steps < 0:
        raise ValueError(f"expected max_steps >= 0, got {max_steps}")


def check_like(name: str, y: Tensor, x: Tensor) -> Tensor:
    r"""Returns what a caller's function returned, if it has the shape and type of its argument.

    Arguments:
        name: The name of the function in the solver's signature.
        y: What it returned.
        x: What it was given.
    """
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(
            f"expected {name} to return shape {tuple(x.shape)} and {x.dtype}, "
            f"got {tuple(y.shape)} and {y.dtype}"
        )
    return y


def check_converged(name: str, solution: Solution) -> Solution:
    r"""Returns the solution, or raises if a sample did not converge.

    Arguments:
        name: The name of the solver.
        solution: What it found.
    """
    if not solution.converged.all():
        raise RuntimeError(describe(name, solution))
    return solution


def describe(name: str, solution: Solution) -> str:
    r"""Says in one sentence which samples did not converge, and what may help.

    Arguments:
        name: The name of the solver.
        solution: What it found.
    """
    failed = ~solution.converged
    return (
        f"{name} did not converge for {int(failed.sum())} of {len(failed)} samples, "
        f"whose residuals reach {solution.residual[failed].max().item():.1e} after "
        f"{int(solution.steps[failed].max())} steps; raise max_steps or the tolerance, "
        "or make the problem better conditioned"
    )
