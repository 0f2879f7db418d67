r"""Tokens on maps."""

__all__ = ["OnMaps", "sincos_positions"]

import torch
from torch import Tensor

from .layer import MapLayer, TokenLayer
from .visible import gather, scatter


class OnMaps(MapLayer):
    r"""Creates a layer of maps from one of tokens: each pixel is a token.

    If a mask of visible patches is given, hidden pixels are no tokens at all, and cost nothing.

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        layer: The layer of tokens.

    Example:
        >>> from probnets.layers import AttentionBlock
        >>> OnMaps(AttentionBlock(8, heads=2))(torch.randn(2, 8, 3, 5)).shape
        torch.Size([2, 8, 3, 5])
    """

    def __init__(self, layer: TokenLayer) -> None:
        super().__init__(layer.features, layer.features)
        self.layer = layer

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        return scatter(self.layer(gather(x, visible)), visible, (height, width))


def sincos_positions(height: int, width: int, like: Tensor, *, channels: int) -> Tensor:
    r"""Returns the positions of pixels as sines and cosines of many wavelengths.

    They have no weights, and exist for maps of any size.

    References:
        | Masked Autoencoders Are Scalable Vision Learners (He et al., 2021)
        | https://arxiv.org/abs/2111.06377

    Arguments:
        height: The height :math:`H`.
        width: The width :math:`W`.
        like: A tensor of the type and on the device that the positions shall have.
        channels: The number of channels :math:`C`, a multiple of four.

    Returns:
        The positions, with shape :math:`(1, C, H, W)`.

    Example:
        >>> sincos_positions(2, 3, torch.zeros(()), channels=8).shape
        torch.Size([1, 8, 2, 3])
    """
    if channels % 4:
        raise ValueError(f"expected channels divisible by 4 for positions, got {channels}")
    quarter = channels // 4
    steps = torch.arange(quarter, dtype=torch.float64)  # on the CPU: some devices lack the type
    waves = torch.pow(10_000.0, -steps / quarter)[:, None]

    def axis(size: int) -> Tensor:
        angles = waves * torch.arange(size, dtype=torch.float64)
        return torch.cat([angles.sin(), angles.cos()])  # (C / 2, size)

    rows = axis(height)[:, :, None].expand(-1, -1, width)
    columns = axis(width)[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns])[None].to(like)
