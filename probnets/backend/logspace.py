r"""Sums of products in log space."""

__all__ = ["log_matmul"]

import math

import torch
from torch import Tensor


def log_matmul(log_x: Tensor, weights: Tensor) -> Tensor:
    r"""Multiplies by a matrix of weights in log space.

    .. math:: y_{n, j} = \log \sum_{k = 1}^K W_{j, k} \exp(\log x_{n, k})

    Each row is shifted by its largest entry, so that no sum overflows and only terms smaller
    than the largest :math:`x_{n, k}` by the range of the floating point type are lost. A sum
    without mass is :math:`-\infty` and passes no gradient on, where the slope would be
    infinite or undefined.

    Arguments:
        log_x: The logarithms :math:`\log x`, finite or :math:`-\infty`, with shape
            :math:`(*, N, K)`.
        weights: The non-negative weights :math:`W`, with shape :math:`(*, J, K)`, where
            :math:`J` is the number of sums.

    Returns:
        The logarithms :math:`y`, with shape :math:`(*, N, J)`.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> log_x = torch.tensor([[0.25, 0.75]]).log()
        >>> log_matmul(log_x, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])).exp()
        tensor([[0.2500, 0.5000, 0.0000]])
    """
    if log_x.ndim < 2 or weights.ndim < 2 or log_x.shape[-1] != weights.shape[-1]:
        raise ValueError(
            "expected log_x (*, N, K) and weights (*, J, K), "
            f"got {tuple(log_x.shape)} and {tuple(weights.shape)}"
        )

    if log_x.shape[-1] == 0:
        shift = torch.zeros_like(log_x.sum(-1, keepdim=True))
    else:
        shift = finite(log_x.detach().amax(-1, keepdim=True))

    return log_shifted((log_x - shift).exp() @ weights.mT, shift)


def finite(top: Tensor) -> Tensor:
    r"""Replaces infinite maxima by zero, so that shifting by them does not give nan.

    Arguments:
        top: The maxima, of any shape.

    Returns:
        The maxima that can be subtracted, with the same shape.
    """
    return top.masked_fill(top.isinf(), 0.0)


def log_shifted(total: Tensor, shift: Tensor) -> Tensor:
    r"""Takes the logarithm of a shifted sum and undoes the shift.

    Filling before the logarithm keeps the infinite slope at zero out of the backward pass,
    where its product with zero would be nan.

    Arguments:
        total: The sum of the shifted terms, of any shape.
        shift: The finite shift, which broadcasts to that shape.

    Returns:
        The logarithm of the sum, :math:`-\infty` where the sum is zero.
    """
    dead = total == 0
    return (total.masked_fill(dead, 1.0).log() + shift).masked_fill(dead, -math.inf)
