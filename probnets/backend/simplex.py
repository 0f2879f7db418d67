r"""Products of simplices: one-hot groups that lie side by side in the last dimension.

A vector of :math:`D` features holds consecutive groups of :math:`K_1, K_2, \dots` features,
each of which is the distribution of one categorical variable. The functions below take these
groups as a common size :math:`K`, as the sizes of all groups, or as :class:`Groups`.
"""

__all__ = ["Groups", "grouped_softmax", "project_tangent", "softmax_jvp"]

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from .dispatch import compiled
from .segments import segment_sum

Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


class Groups(nn.Module):
    r"""Creates a partition of features into consecutive groups.

    The sizes are checked once, here. It is a module without parameters and without state, so
    that groups follow the model that owns them to its device.

    Arguments:
        sizes: The group sizes :math:`K_g`, with shape :math:`(G,)`, where :math:`G` is the
            number of groups.

    Example:
        >>> groups = Groups([2, 3])
        >>> groups.starts, groups.index
        (tensor([0, 2]), tensor([0, 0, 1, 1, 1]))
    """

    sizes: Tensor  # (G,)
    starts: Tensor  # (G,), the first feature of each group
    index: Tensor  # (D,), the group of each feature

    def __init__(self, sizes: Sequence[int] | Tensor) -> None:
        super().__init__()

        sizes = torch.as_tensor(sizes if len(sizes) else torch.empty(0, dtype=torch.long))
        if sizes.is_floating_point() or sizes.is_complex() or sizes.dtype == torch.bool:
            raise TypeError(f"expected group sizes of an integer dtype, got {sizes.dtype}")
        if sizes.ndim != 1:
            raise ValueError(f"expected group sizes (G,), got {tuple(sizes.shape)}")
        if sizes.numel() and sizes.min() < 1:
            raise ValueError(
                f"expected group sizes >= 1, got {sizes.min()}; leave out empty groups"
            )

        sizes = sizes.long()
        group = torch.arange(len(sizes), device=sizes.device)
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("starts", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("index", group.repeat_interleave(sizes), persistent=False)
        self.size = int(sizes[0]) if len(sizes) and bool((sizes == sizes[0]).all()) else None

    def __len__(self) -> int:
        return len(self.sizes)

    def extra_repr(self) -> str:
        if self.size is not None:
            return f"groups={len(self)}, size={self.size}"
        return f"sizes={self.sizes.tolist()}" if len(self) <= 8 else f"groups={len(self)}"


def grouped_softmax(logits: Tensor, groups: int | Sequence[int] | Tensor | Groups) -> Tensor:
    r"""Computes the softmax of each group.

    .. math:: z_i = \frac{\exp \theta_i}{\sum_{j \in g(i)} \exp \theta_j}

    A group whose logits are all :math:`-\infty` has no distribution and gives nan, as with
    :func:`torch.softmax`.

    Arguments:
        logits: The logits :math:`\theta`, with shape :math:`(*, D)`.
        groups: The size of each group, the sizes of the groups, or the groups.

    Returns:
        The probabilities :math:`z`, with shape :math:`(*, D)`.

    Raises:
        ValueError: If the groups do not add up to :math:`D` features.

    Example:
        >>> grouped_softmax(torch.zeros(6), torch.tensor([4, 2]))
        tensor([0.2500, 0.2500, 0.2500, 0.2500, 0.5000, 0.5000])
    """
    if not logits.is_floating_point():
        raise TypeError(f"expected logits of a floating point dtype, got {logits.dtype}")

    groups = _checked(groups, logits)
    if isinstance(groups, int):
        return _rows(logits, groups).softmax(-1).flatten(-2)

    if compiled(logits, groups.sizes):
        x = _flat(logits.detach()).contiguous()
        z = torch.empty_like(x)
        _softmax_kernel()(x.numpy(), groups.sizes.numpy(), z.numpy())
        return z.view(logits.shape)

    return _grouped_softmax_torch(logits, groups)


def softmax_jvp(z: Tensor, v: Tensor, groups: int | Sequence[int] | Tensor | Groups) -> Tensor:
    r"""Multiplies by the Jacobian of the grouped softmax.

    .. math:: (S v)_i = z_i \Big( v_i - \sum_{j \in g(i)} z_j v_j \Big)
        \qquad S = \mathrm{blkdiag}(\mathrm{diag}(z_g) - z_g z_g^\top)

    The Jacobian is symmetric, so this is its vector-Jacobian product as well.

    Arguments:
        z: The probabilities :math:`z`, with shape :math:`(*, D)`.
        v: The vectors :math:`v`, with shape :math:`(*, D)`.
        groups: The size of each group, the sizes of the groups, or the groups.

    Returns:
        The products :math:`S v`, with shape :math:`(*, D)`.

    Raises:
        ValueError: If the groups do not add up to :math:`D` features.

    Example:
        >>> softmax_jvp(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), groups=2)
        tensor([ 0.2500, -0.2500])
    """
    groups = _checked(groups, z)
    return z * (v - _total(z * v, _checked(groups, v)))


def project_tangent(v: Tensor, groups: int | Sequence[int] | Tensor | Groups) -> Tensor:
    r"""Projects onto the tangent space of the simplices, by centring each group.

    .. math:: (P v)_i = v_i - \frac{1}{K_{g(i)}} \sum_{j \in g(i)} v_j

    Arguments:
        v: The vectors :math:`v`, with shape :math:`(*, D)`.
        groups: The size of each group, the sizes of the groups, or the groups.

    Returns:
        The projections :math:`P v`, with shape :math:`(*, D)`.

    Raises:
        ValueError: If the groups do not add up to :math:`D` features.

    Example:
        >>> project_tangent(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 1]))
        tensor([-1.,  1.,  0.])
    """
    groups = _checked(groups, v)
    if isinstance(groups, int):
        return v - _total(v, groups) / groups
    return v - _total(v, groups) / groups.sizes.index_select(0, groups.index)


def _checked(groups: int | Sequence[int] | Tensor | Groups, x: Tensor) -> int | Groups:
    r"""Returns the common size if there is one, else the groups, once they fit the features."""
    if x.ndim == 0:
        raise ValueError("expected a last dimension that holds the groups, got a scalar")

    features = x.shape[-1]
    if isinstance(groups, int):
        if groups < 1 or features % groups:
            raise ValueError(f"expected groups to divide {features} features, got size {groups}")
        return groups

    if not isinstance(groups, Groups):
        groups = Groups(groups).to(x.device)
    if groups.index.shape[0] != features:
        raise ValueError(
            f"expected group sizes that add up to {features} features, got {groups.index.shape[0]}"
        )
    return groups.size or groups


def _flat(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # (*, D) -> (B, D)


def _rows(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (x.shape[-1] // size, size))  # (*, D) -> (*, D / K, K)


def _total(x: Tensor, groups: int | Groups) -> Tensor:
    r"""Returns the sum over the group of each feature, repeated for each feature."""
    if isinstance(groups, int):
        rows = _rows(x, groups)
        return rows.sum(-1, keepdim=True).expand_as(rows).flatten(-2)

    total = segment_sum(_flat(x), groups.index, len(groups))
    return total.index_select(1, groups.index).view_as(x)


def _grouped_softmax_torch(logits: Tensor, groups: Groups) -> Tensor:
    index = groups.index.expand_as(logits)
    shape = (*logits.shape[:-1], len(groups))

    top = logits.new_full(shape, -math.inf).scatter_reduce(-1, index, logits.detach(), "amax")
    mass = (logits - top.gather(-1, index)).exp()
    total = logits.new_zeros(shape).scatter_add(-1, index, mass)
    return mass / total.gather(-1, index)


@cache
def _softmax_kernel() -> Kernel:
    import numba

    @numba.njit(cache=True, nogil=True)
    def kernel(x: np.ndarray, sizes: np.ndarray, z: np.ndarray) -> None:
        for b in range(x.shape[0]):
            start = 0
            for g in range(sizes.size):
                stop = start + sizes[g]

                top = x[b, start]
                for i in range(start + 1, stop):
                    top = max(top, x[b, i])

                total = 0.0
                for i in range(start, stop):
                    z[b, i] = math.exp(x[b, i] - top)
                    total += z[b, i]

                for i in range(start, stop):
                    z[b, i] /= total
                start = stop

    return kernel
