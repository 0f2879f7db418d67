r"""Attention made of convolutions, as a memory of keys and values."""

__all__ = ["FFNAttentionBlock"]

import torch
from torch import Tensor, nn

from .convolution import Conv2d, chain_fields
from .inverted import SqueezeExcite
from .largekernel import DilatedReparamConv2d
from .layer import MapLayer
from .norms import NormName
from .norms import norm as make_norm
from .widths import hidden_width


class FFNAttentionBlock(MapLayer):
    r"""Creates a block whose attention is a memory of local patterns, made of convolutions.

    .. math::

        x &\gets x + s \, V * \mathrm{GELU}(K * \mathrm{norm}(W_Q x)) \\
        x &\gets x + s \, W_2 \, \mathrm{GELU}(W_1 \, \mathrm{norm}(D * x))

    The keys :math:`K`, the values :math:`V` and :math:`D` are depthwise kernels, each with a small
    one beside it, which merge; :math:`W_Q`, :math:`W_1` and :math:`W_2` are
    :math:`1 \times 1`. A query answers with the values whose keys it matches, as in a discrete
    key-value memory, but all keys answer a bit. Kernels as wide as their inner one suit the
    first stages.

    References:
        | MetaMixer Is All You Need (Yun et al., 2024)
        | https://arxiv.org/abs/2406.02021

    Used by: backbones of circuits and bottleneck, whose hard look-up it is the soft control of.

    Arguments:
        channels: The number of channels.
        kernel_size: The width of the kernels, odd and three or more.
        expansion: The width of the hidden layer, as a multiple of the channels.
        norm: The name of the norms after :math:`W_Q` and :math:`D`. With ``batch`` the branches
            of the kernels have batch norms too, and otherwise none.
        squeeze: The number of channels in a :class:`SqueezeExcite` after the values, or None
            for no such gate.
        res_scale: The fixed factor :math:`s` of both branches.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> FFNAttentionBlock(8, squeeze=0.25)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 8, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 7,
        expansion: float = 3.0,
        norm: NormName = "batch",
        squeeze: float = 0.0,
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        hidden = hidden_width(channels, expansion)
        if not 0 <= squeeze <= 1:
            raise ValueError(f"expected squeeze in [0, 1], got {squeeze}")

        def wide() -> DilatedReparamConv2d:
            return DilatedReparamConv2d(
                channels,
                kernel_size,
                small=[(3, 1)],
                norm="batch" if norm == "batch" else "none",
                device=device,
                dtype=dtype,
            )

        self.res_scale = res_scale
        self.query = Conv2d(channels, channels, device=device, dtype=dtype)
        self.norm1 = make_norm(norm, channels, device=device, dtype=dtype)
        self.keys, self.values = wide(), wide()
        self.squeeze = None
        if squeeze:
            reduced = max(1, round(squeeze * channels))
            self.squeeze = SqueezeExcite(channels, reduced=reduced, device=device, dtype=dtype)
        self.activation = nn.GELU()
        self.depthwise = wide()
        self.norm2 = make_norm(norm, channels, device=device, dtype=dtype)
        self.expand = Conv2d(channels, hidden, device=device, dtype=dtype)
        self.project = Conv2d(hidden, channels, device=device, dtype=dtype)

    @property
    def receptive_field(self) -> int | None:
        if self.squeeze is not None:
            return None
        return chain_fields([self.norm1, self.keys, self.values, self.depthwise, self.norm2])

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        x = x + self.res_scale * self._mix_pixels(x, visible)
        return x + self.res_scale * self._mix_channels(x, visible)

    def _mix_pixels(self, x: Tensor, visible: Tensor | None) -> Tensor:
        query = self.norm1(self.query(x, visible), visible)
        y = self.values(self.activation(self.keys(query, visible)), visible)
        return y if self.squeeze is None else self.squeeze(y, visible)

    def _mix_channels(self, x: Tensor, visible: Tensor | None) -> Tensor:
        y = self.norm2(self.depthwise(x, visible), visible)
        return self.project(self.activation(self.expand(y, visible)), visible)
