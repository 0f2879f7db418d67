r"""How many numbers each weight sums."""

__all__ = ["fan_in", "fan_ins", "initialise"]

import math
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class _Knows(Protocol):
    def own_fan_in(self, name: str) -> int | None: ...


@runtime_checkable
class _Starts(Protocol):
    def start(self, generator: torch.Generator | None) -> None: ...


def fan_in(module: nn.Module, name: str) -> int:
    r"""Counts the inputs that an output sums through a parameter.

    A matrix has its number of columns, a convolution the weights of one output channel (that
    is :math:`k^2` if it is depthwise), and a transposed one those that meet in one output. A
    parameter that only shifts or scales, such as a bias, has one.

    Weights drawn from :math:`\mathcal{N}(0, \sigma^2 / \text{fan-in})` keep the scale of what
    flows through them.

    Arguments:
        module: A layer or any network of them.
        name: The name of a parameter, as ``named_parameters()`` gives it.

    Raises:
        AttributeError: If there is no such parameter.
        TypeError: If the parameter belongs to a module that does not tell its fan-in.

    Example:
        >>> fan_in(nn.Sequential(nn.Conv2d(8, 8, 7, groups=8)), "0.weight")
        49
    """
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    weight = dict(owner.named_parameters(recurse=False)).get(own)
    if weight is None:
        raise AttributeError(f"expected the name of a parameter, got {name!r}")

    known = owner.own_fan_in(own) if isinstance(owner, _Knows) else None
    if known is not None:
        return known
    if isinstance(owner, nn.Linear | nn.modules.conv._ConvNd):
        if own == "bias":
            return 1
        if isinstance(owner, nn.modules.conv._ConvTransposeNd):
            sides = zip(owner.kernel_size, owner.stride, owner.dilation, strict=True)
            taps = (-(-k * math.gcd(s, d) // s) for k, s, d in sides)
            return owner.in_channels // owner.groups * math.prod(taps)
        return weight[0].numel()
    if weight.ndim == 1:  # norms
        return 1
    raise TypeError(
        f"expected the fan-in of {name!r}, which {type(owner).__name__} does not tell; "
        "give it a method own_fan_in(name)"
    )


def fan_ins(module: nn.Module) -> dict[str, int]:
    r"""Counts the fan-in of every parameter by name, as :func:`fan_in`.

    Example:
        >>> fan_ins(nn.Linear(3, 5))
        {'weight': 3, 'bias': 1}
    """
    return {name: fan_in(module, name) for name, _ in module.named_parameters()}


@torch.no_grad()
def initialise(
    module: nn.Module, *, gain: float = 1.0, generator: torch.Generator | None = None
) -> None:
    r"""Draws all matrices and kernels anew, in place, from a cut normal distribution.

    .. math:: w \sim \mathcal{N}(0, g^2 / \text{fan-in})

    Draws are cut at two standard deviations. Biases of linear maps and convolutions become
    zero. Weights of other layers that only scale, or have a fan-in of one, stay. Layers that
    begin somewhere else, such as with zeros, do so again by their method ``start``.

    Arguments:
        module: The network.
        gain: The gain :math:`g`.
        generator: The source of randomness.
    """
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        inner = isinstance(owner, nn.Linear | nn.modules.conv._ConvNd)
        if inner and name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim > 1 and ((fan := fan_in(module, name)) > 1 or inner):
            std = gain / math.sqrt(fan)
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
    for layer in module.modules():
        if isinstance(layer, _Starts):
            layer.start(generator)
