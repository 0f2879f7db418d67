r"""Proximal operators of the entropy on simplices."""

__all__ = ["prox", "wright_omega"]

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from probnets.backend import Groups, compiled, grouped_softmax, segment_sum

# Newton's method needs seven steps or less; more are for what rounding may do.
_STEPS = 50


def prox(y: Tensor, groups: Groups, alpha: float | Tensor) -> Tensor:
    r"""Computes the proximal operator of the entropy minus half the squared norm.

    .. math:: \arg\min_z \; \tfrac12 \| z - y \|^2
        + \alpha \Big( \sum_i z_i \log z_i - \tfrac12 \| z \|^2 \Big)
        \quad \text{with each group of } z \text{ on a simplex}

    With :math:`\alpha = 1` it is the softmax. Otherwise it solves

    .. math:: (1 - \alpha) z_i + \alpha \log z_i = y_i + \nu - \alpha \qquad \sum_i z_i = 1

    in each group, where :math:`z_i(\nu)` is a Wright omega function, and the sum is increasing
    and convex in :math:`\nu`: Newton's method descends to its root from the right end
    :math:`1 - \max_i y_i` of the bracket and never leaves it. The gradient has a closed form.

    References:
        | Monotone deep Boltzmann machines (Feng et al., 2023)
        | https://arxiv.org/abs/2307.04990

    Arguments:
        y: The vectors :math:`y`, with shape :math:`(*, N)`.
        groups: The groups.
        alpha: The step :math:`\alpha`, one for all vectors, or one for each with shape
            :math:`(*, 1)`. It is taken as a constant.

    Returns:
        The distributions :math:`z`, with shape :math:`(*, N)`.

    Raises:
        ValueError: If a step is not in :math:`(0, 1]`, or shapes do not fit.

    Example:
        >>> prox(torch.tensor([1.0, 1.0, 0.0]), Groups([2, 1]), 0.5)
        tensor([0.5000, 0.5000, 1.0000])
    """
    if not y.is_floating_point() or not y.ndim or y.shape[-1] != len(groups.index):
        raise ValueError(
            f"expected floats with shape (*, {len(groups.index)}), got {tuple(y.shape)} of "
            f"{y.dtype}"
        )
    step = torch.as_tensor(alpha, dtype=y.dtype, device=y.device).detach()
    if step.ndim and step.shape != (*y.shape[:-1], 1):
        raise ValueError(
            f"expected one alpha, or alphas with shape {(*y.shape[:-1], 1)}, got "
            f"{tuple(step.shape)}"
        )
    if not bool(((step > 0) & (step <= 1)).all()):
        raise ValueError(f"expected alpha in (0, 1], got {alpha}")

    rows = y.reshape(math.prod(y.shape[:-1]), y.shape[-1])  # (*, N) -> (B, N)
    z = _Prox.apply(rows, step.expand(*y.shape[:-1], 1).reshape(len(rows), 1), groups)
    return z.view(y.shape)


def wright_omega(s: Tensor) -> Tensor:
    r"""Computes the Wright omega function of real numbers.

    .. math:: \omega + \log \omega = s

    Two steps of fourth order from a start that is close enough give all digits, and none of
    them overflows.

    References:
        | Algorithm 443: Solution of the transcendental equation w exp(w) = x
        | (Fritsch et al., 1973)
        | https://doi.org/10.1145/361952.361970

    Arguments:
        s: The numbers :math:`s`, of any shape.

    Example:
        >>> wright_omega(torch.tensor([1.0, 5.0]))
        tensor([1.0000, 3.6934])
    """
    small = s.clamp(max=1.0).exp()
    start = torch.where(s < -2, small * (1 - small), small / (1 + small))
    w = torch.where(s > 1, s - s.clamp(min=1.0).log(), start)
    for _ in range(2):
        r = s - w - w.log()
        t = (1 + w) * (1 + w + 2 / 3 * r)
        w = w * (1 + r / (1 + w) * (t - r / 2) / (t - r))
    return torch.where(s < -40, small, w)  # there ω is the exponential to all digits


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor]
    groups: Groups


class _Prox(Function):
    @staticmethod
    def forward(ctx: _Context, y: Tensor, alpha: Tensor, groups: Groups) -> Tensor:
        if compiled(y, alpha, groups.sizes):
            z = torch.empty_like(y, memory_format=torch.contiguous_format)
            sizes = groups.sizes.contiguous().numpy()
            tolerance = 8 * torch.finfo(torch.float64).eps
            arrays = y.detach().contiguous().numpy(), alpha.contiguous().numpy()
            _prox_kernel()(*arrays, sizes, tolerance, z.numpy())
        else:
            z = _prox_torch(y, groups, alpha)
        ctx.save_for_backward(z, alpha)
        ctx.groups = groups
        return z

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None, None]:
        r"""Multiplies by diag(g) - g gᵀ / Σ g, where g are the slopes z / (α + (1 - α) z)."""
        z, alpha = ctx.saved_tensors
        (v,), index = gradients, ctx.groups.index
        g = z / (alpha + (1 - alpha) * z)
        mean = segment_sum(g * v, index, len(ctx.groups)) / segment_sum(g, index, len(ctx.groups))
        return g * (v - mean[:, index]), None, None


def _prox_torch(y: Tensor, groups: Groups, alpha: Tensor) -> Tensor:
    index = groups.index
    plain = alpha == 1
    a = torch.where(plain, 0.5, alpha)
    c = (1 - a) / a
    top = y.new_full((len(y), len(groups)), -math.inf)
    top = top.scatter_reduce(1, index.expand_as(y), y, "amax")
    s = (y - top[:, index]) / a - 1 + c.log()
    nu = torch.ones_like(top)  # relative to -top, where the bracket ends
    z = s
    for _ in range(_STEPS):
        z = wright_omega(s + nu[:, index] / a) / c
        excess = segment_sum(z, index, len(groups)) - 1
        slope = segment_sum(z / (a + (1 - a) * z), index, len(groups))
        lower = nu - excess / slope
        active = (excess > 8 * torch.finfo(y.dtype).eps) & (lower < nu)
        if not bool(active.any()):
            break
        nu = torch.where(active, lower, nu)
    return torch.where(plain, grouped_softmax(y, groups), z)


@cache
def _prox_kernel() -> Callable[..., None]:
    import numba

    @numba.njit(cache=True, nogil=True)
    def kernel(
        y: np.ndarray, alpha: np.ndarray, sizes: np.ndarray, tolerance: float, z: np.ndarray
    ) -> None:
        for b in range(y.shape[0]):
            a = np.float64(alpha[b, 0])
            c = (1 - a) / a
            shift = math.log(c) - 1 if a < 1 else 0.0
            start = 0
            for g in range(sizes.size):
                stop = start + sizes[g]
                top = np.float64(y[b, start])
                for i in range(start + 1, stop):
                    top = max(top, np.float64(y[b, i]))

                nu = 1.0
                for _ in range(_STEPS):
                    total, slope = 0.0, 0.0
                    for i in range(start, stop):
                        if a == 1:  # the softmax, up to its sum
                            w = math.exp(y[b, i] - top)
                            z[b, i] = w
                            total += w
                            continue
                        s = (y[b, i] - top + nu) / a + shift
                        if s < -40:
                            w = math.exp(s)
                        else:
                            if s > 1:
                                w = s - math.log(s)
                            else:
                                w = math.exp(s)
                                w = w * (1 - w) if s < -2 else w / (1 + w)
                            for _ in range(2):
                                r = s - w - math.log(w)
                                t = (1 + w) * (1 + w + 2 / 3 * r)
                                w *= 1 + r / (1 + w) * (t - r / 2) / (t - r)
                        w /= c
                        z[b, i] = w
                        total += w
                        slope += w / (a + (1 - a) * w)

                    if a == 1:
                        for i in range(start, stop):
                            z[b, i] /= total
                        break
                    lower = nu - (total - 1) / slope
                    if not (total - 1 > tolerance and lower < nu):
                        break
                    nu = lower
                start = stop

    return kernel
