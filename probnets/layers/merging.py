r"""Networks with parallel branches merged."""

__all__ = ["merge"]

import copy
from typing import Protocol, TypeVar, runtime_checkable

from torch import nn

M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class _Mergeable(Protocol):
    def merged(self) -> nn.Module: ...


def merge(network: M) -> M:
    r"""Returns a copy of a network in which all layers that can be merged are.

    Parallel branches become one convolution, which takes over their batch norms. In evaluation
    mode the copy computes the same up to rounding, in less time. It is in evaluation mode.

    Arguments:
        network: The network, which stays as it is.

    Example:
        >>> from probnets.layers import DilatedReparamConv2d
        >>> merge(nn.Sequential(DilatedReparamConv2d(8, 13)))[0].conv.weight.shape
        torch.Size([8, 1, 13, 13])
    """
    network = copy.deepcopy(network).eval()
    if callable(getattr(network, "merged", None)) and isinstance(network, _Mergeable):
        return network.merged()  # type: ignore[return-value]
    for name, child in network.named_children():
        setattr(network, name, merge(child))
    return network
