r"""ConvNeXt blocks."""

__all__ = ["ConvNeXtBlock"]

import torch
from torch import Tensor, nn

from .convolution import Conv2d, chain_fields
from .layer import MapLayer
from .norms import NormName, ResponseNorm
from .norms import norm as make_norm
from .widths import hidden_width


class ConvNeXtBlock(MapLayer):
    r"""Creates a ConvNeXt block: filter each channel widely, then mix the channels.

    .. math:: y = x + \rho \, \gamma \odot W_2 \, \mathrm{GELU}(W_1 \, \mathrm{norm}(D * x))

    :math:`D` is depthwise and :math:`k \times k`. :math:`W_1` and :math:`W_2` are
    :math:`1 \times 1`. With ``response=True`` a global response norm comes before
    :math:`W_2`. The second version of the block has it, and no :math:`\gamma`.

    As a random function the block needs :math:`\gamma` left out, and a fixed :math:`\rho`.

    References:
        | A ConvNet for the 2020s (Liu et al., 2022)
        | https://arxiv.org/abs/2201.03545

        | ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders
        | (Woo et al., 2023)
        | https://arxiv.org/abs/2301.00808

    Used by: backbones of circuits, priors and bottleneck; external fields of boltzmann.

    Arguments:
        channels: The number of channels.
        kernel_size: The width :math:`k` of the depthwise kernel, odd.
        expansion: How many times wider the block is between :math:`W_1` and :math:`W_2`.
        norm: The name of the norm.
        response: Whether there is a global response norm.
        layer_scale: The initial value of the weights :math:`\gamma`, one a channel, or None
            for none.
        res_scale: The fixed factor :math:`\rho` of the branch beside the short cut.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> ConvNeXtBlock(8, response=True)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 8, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 7,
        expansion: float = 4.0,
        norm: NormName = "layer",
        response: bool = False,
        layer_scale: float | None = 1e-6,
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        hidden = hidden_width(channels, expansion)
        self.res_scale = res_scale
        self.depthwise = Conv2d(
            channels, channels, kernel_size, groups=channels, device=device, dtype=dtype
        )
        self.norm = make_norm(norm, channels, device=device, dtype=dtype)
        self.expand = Conv2d(channels, hidden, device=device, dtype=dtype)
        self.activation = nn.GELU()
        self.response = ResponseNorm(hidden, device=device, dtype=dtype) if response else None
        self.project = Conv2d(hidden, channels, device=device, dtype=dtype)
        self.layer_scale = None
        if layer_scale is not None:
            start = torch.full((channels,), float(layer_scale), device=device, dtype=dtype)
            self.layer_scale = nn.Parameter(start)

    @property
    def receptive_field(self) -> int | None:
        if self.response is not None:
            return None
        return chain_fields([self.depthwise, self.norm])

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        y = self.norm(self.depthwise(x, visible), visible)
        y = self.activation(self.expand(y, visible))
        if self.response is not None:
            y = self.response(y, visible)
        y = self.project(y, visible)
        if self.layer_scale is not None:
            y = self.layer_scale[:, None, None] * y
        return x + self.res_scale * y
