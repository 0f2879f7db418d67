r"""Activations by name."""

__all__ = ["ACTIVATIONS", "Activation", "activation"]

from typing import Literal

from torch import nn

Activation = Literal["gelu", "hardswish", "none", "relu", "relu6", "silu", "tanh"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def activation(name: Activation) -> nn.Module:
    r"""Creates an activation.

    Arguments:
        name: Its name.

    Example:
        >>> activation("relu")
        ReLU()
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"expected an activation of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()
