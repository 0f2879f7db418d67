r"""The choice between a compiled loop and PyTorch."""

__all__ = ["compiled"]

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_DTYPES = frozenset(
    {
        *(torch.float32, torch.float64, torch.bool),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    }
)


def compiled(*tensors: Tensor) -> bool:
    r"""Tells whether a compiled loop can stand in for PyTorch.

    A loop sees memory and nothing else. It can replace an operation if each tensor is a plain
    array on the CPU, of a type that the loop knows, and if nobody watches the operation:
    neither autograd, in reverse or forward mode, nor :func:`torch.compile`, nor a
    transformation of :mod:`torch.func`.

    The answer depends on the tensors and the gradient mode alone.

    Arguments:
        tensors: The arguments of the operation, of any shapes.

    Returns:
        Whether all of them can be handed to a compiled loop.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> compiled(x), compiled(x.detach()), compiled(x.detach().half())
        (False, True, False)
        >>> with torch.no_grad():
        ...     compiled(x)
        True
    """
    return not torch.compiler.is_compiling() and all(map(_plain, tensors))


def _plain(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)  # a subclass may not own memory
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.dtype in _DTYPES
        and not x.is_neg()  # a lazy minus sign, which the memory does not show
        and not (x.requires_grad and torch.is_grad_enabled())
        and not _transformed(x)
        and forward_ad.unpack_dual(x).tangent is None
    )


def _transformed(x: Tensor) -> bool:
    r"""Tells whether a tensor is the stand-in of vmap, grad or jvp."""
    functorch = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return wrapped is None or wrapped(x)  # PyTorch is right in any case
