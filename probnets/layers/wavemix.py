r"""Blocks that mix pixels by wavelets."""

__all__ = ["WaveMixBlock"]

from typing import cast

import torch
from torch import Tensor, nn

from .activations import Activation
from .activations import activation as make_activation
from .convolution import Conv2d
from .haar import Haar
from .layer import MapLayer
from .norms import NormName
from .norms import norm as make_norm
from .visible import hide
from .widths import hidden_width


class WaveMixBlock(MapLayer):
    r"""Creates a WaveMix block: mix the Haar sub-bands of each level, and enlarge them again.

    .. math:: y = x + \rho \, f_1 \qquad
        f_l = \mathrm{norm}(U_l * V_l \, \sigma(W_l \, [h_l, f_{l + 1}])) \qquad
        h_l = \mathrm{Haar}(\mathrm{LL}(h_{l - 1})) \qquad \mathrm{LL}(h_0) = R x

    :math:`R` reduces the :math:`C` channels to :math:`C / 4`, so that the sub-bands of each
    level have :math:`C` again. :math:`W_l` and :math:`V_l` are :math:`1 \times 1`, and
    :math:`U_l` is a transposed convolution, :math:`4 \times 4` with stride two. Levels below
    the first return :math:`C / 2` channels, and below the last there is none.

    Maps whose size :math:`2^L` does not divide get zeros to the right and below. With a mask,
    patches must have sizes that it divides.

    References:
        | WaveMix: A Resource-efficient Neural Network for Image Analysis (Jeevan et al., 2022)
        | https://arxiv.org/abs/2205.14375

    Used by: backbones of circuits, priors and bottleneck; external fields of boltzmann.

    Arguments:
        channels: The number of channels :math:`C`, divisible by four.
        levels: The number of levels :math:`L`.
        expansion: How many times wider the block is between :math:`W_l` and :math:`V_l`.
        norm: The name of the norms.
        activation: The name of the activations :math:`\sigma`.
        res_scale: The fixed factor :math:`\rho` of the branch beside the short cut.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> WaveMixBlock(8, levels=2)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 8, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        levels: int = 1,
        expansion: float = 2.0,
        norm: NormName = "batch",
        activation: Activation = "gelu",
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        if channels % 4:
            raise ValueError(f"expected channels divisible by 4, got {channels}")
        if levels < 1:
            raise ValueError(f"expected levels >= 1, got {levels}")
        self.res_scale = res_scale
        self.reduce = Conv2d(channels, channels // 4, device=device, dtype=dtype)
        self.haar = Haar(channels // 4)
        self.levels = nn.ModuleList(
            _Level(
                channels if level == levels - 1 else channels + channels // 2,
                channels,
                channels if level == 0 else channels // 2,
                expansion=expansion,
                norm=norm,
                activation=activation,
                device=device,
                dtype=dtype,
            )
            for level in range(levels)
        )

    @property
    def receptive_field(self) -> int | None:
        levels = len(self.levels)
        if any(cast(_Level, level).norm.receptive_field is None for level in self.levels):
            return None
        # An output sees two neighbours one level down, and these see three at each level below.
        return 4 if levels == 1 else 3 * 2**levels

    @property
    def grid(self) -> int:
        return 2 ** len(self.levels)

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        self._check(x, visible)

        low, bands = self.reduce(x, visible), []
        step = 2 ** len(self.levels)
        low = nn.functional.pad(low, (0, -width % step, 0, -height % step))
        for _ in self.levels:  # no square of pixels reaches across patches
            bands.append(self.haar(low))
            low = bands[-1][:, : low.shape[1]]

        y = self.levels[-1](bands[-1], visible)
        for level, band in zip(self.levels[-2::-1], bands[-2::-1], strict=True):
            y = level(torch.cat([band, y], dim=1), visible)
        return x + self.res_scale * y[:, :, :height, :width]

    def _check(self, x: Tensor, visible: Tensor | None) -> None:
        if visible is None:
            return
        step = 2 ** len(self.levels)
        height, width = (n // h for n, h in zip(x.shape[2:], visible.shape[2:], strict=True))
        if height % step or width % step:
            raise ValueError(
                f"expected patches of sizes divisible by {step}, for {len(self.levels)} levels, "
                f"got {height} x {width} pixels; take larger patches or fewer levels"
            )


class _Level(nn.Module):
    r"""Mixes the channels of each pixel, and doubles the size of the map."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        *,
        expansion: float,
        norm: NormName,
        activation: Activation,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        hidden = hidden_width(channels, expansion)
        self.expand = Conv2d(in_channels, hidden, device=device, dtype=dtype)
        self.activation = make_activation(activation)
        self.project = Conv2d(hidden, channels, device=device, dtype=dtype)
        self.enlarge = nn.ConvTranspose2d(
            channels,
            out_channels,
            4,
            stride=2,
            padding=1,
            bias=norm in ("none", "layer_plain"),
            device=device,
            dtype=dtype,
        )
        self.norm = make_norm(norm, out_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        y = self.project(self.activation(self.expand(x, visible)), visible)
        return self.norm(self.enlarge(hide(y, visible)), visible)
