r"""Attention made of convolutions, as a memory of keys and values."""

__all__ = ["FFNAttentionBlock", "ReparamConv2d"]

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .convolution import Conv2d, chain_fields
from .inverted import SqueezeExcite
from .layer import MapLayer
from .norms import BatchNorm, NormName
from .norms import norm as make_norm


class ReparamConv2d(MapLayer):
    r"""Creates a depthwise convolution with a smaller one beside it, which merge into one.

    .. math:: y = \mathrm{norm}(D_k * x) + \mathrm{norm}(D_j * x)

    Without norms it is linear.

    References:
        | MetaMixer Is All You Need (Yun et al., 2024)
        | https://arxiv.org/abs/2406.02021

        | Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs
        | (Ding et al., 2022)
        | https://arxiv.org/abs/2203.06717

    Used by: backbones of bottleneck, and the continuous control beside its hard look-up.

    Arguments:
        channels: The number of channels.
        kernel_size: The width :math:`k` of the kernel, odd.
        inner: The width :math:`j` of the smaller kernel, odd and at most :math:`k`.
        norm: The norm of both branches: ``batch`` or ``none``.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> layer = ReparamConv2d(8, 7).eval()
        >>> layer(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
        >>> layer.merged().conv.weight.shape
        torch.Size([8, 1, 7, 7])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        *,
        inner: int = 3,
        norm: Literal["batch", "none"] = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        if not (inner % 2 and kernel_size % 2 and 1 <= inner <= kernel_size):
            raise ValueError(
                f"expected odd kernels with inner <= kernel_size, got {inner} and {kernel_size}"
            )
        if norm not in ("batch", "none"):
            raise ValueError(f"expected norm batch or none, which merge, got {norm!r}")

        def conv(width: int) -> Conv2d:
            return Conv2d(
                channels, channels, width, groups=channels, bias=False, device=device, dtype=dtype
            )

        self.large, self.small = conv(kernel_size), conv(inner)
        self.norm1 = make_norm(norm, channels, device=device, dtype=dtype)
        self.norm2 = make_norm(norm, channels, device=device, dtype=dtype)

    @property
    def linear(self) -> bool:
        return self.norm1.linear

    @property
    def receptive_field(self) -> int | None:
        return chain_fields([self.large, self.norm1])

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        large = self.norm1(self.large(x, visible), visible)
        return large + self.norm2(self.small(x, visible), visible)

    @torch.no_grad()
    def merged(self) -> Conv2d:
        r"""Returns one convolution that computes what this layer does in evaluation mode."""
        large, small = self.large.conv.weight, self.small.conv.weight  # (C, 1, k, k)
        shift = None
        if isinstance(self.norm1, BatchNorm) and isinstance(self.norm2, BatchNorm):
            (scale1, shift1), (scale2, shift2) = self.norm1.fold(), self.norm2.fold()
            large, small = scale1.view(-1, 1, 1, 1) * large, scale2.view(-1, 1, 1, 1) * small
            shift = shift1 + shift2

        one = Conv2d(
            self.in_channels,
            self.in_channels,
            large.shape[-1],
            groups=self.in_channels,
            bias=shift is not None,
            device=large.device,
            dtype=large.dtype,
        )
        rim = (large.shape[-1] - small.shape[-1]) // 2
        one.conv.weight.copy_(large + pad(small, (rim, rim, rim, rim)))
        if one.conv.bias is not None and shift is not None:
            one.conv.bias.copy_(shift)
        return one.eval()


class FFNAttentionBlock(MapLayer):
    r"""Creates a block whose attention is a memory of local patterns, made of convolutions.

    .. math::

        x &\gets x + s \, V * \mathrm{GELU}(K * \mathrm{norm}(W_Q x)) \\
        x &\gets x + s \, W_2 \, \mathrm{GELU}(W_1 \, \mathrm{norm}(D * x))

    The keys :math:`K`, the values :math:`V` and :math:`D` are each a :class:`ReparamConv2d`,
    which merges into one depthwise convolution; :math:`W_Q`, :math:`W_1` and :math:`W_2` are
    :math:`1 \times 1`. A query answers with the values whose keys it matches, as in a discrete
    key-value memory, but all keys answer a bit. Kernels as wide as their inner one suit the
    first stages.

    References:
        | MetaMixer Is All You Need (Yun et al., 2024)
        | https://arxiv.org/abs/2406.02021

    Used by: backbones of bottleneck, and the continuous control beside its hard look-up.

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
        >>> FFNAttentionBlock(8, squeeze=2)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 8, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 7,
        expansion: float = 3.0,
        norm: NormName = "batch",
        squeeze: int | None = None,
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        hidden = round(expansion * channels)
        if hidden < 1:
            raise ValueError(
                f"expected a hidden layer of one or more, got round({expansion} * {channels}) "
                f"= {hidden}; raise expansion"
            )

        def wide() -> ReparamConv2d:
            inner = "batch" if norm == "batch" else "none"
            return ReparamConv2d(channels, kernel_size, norm=inner, device=device, dtype=dtype)

        self.res_scale = res_scale
        self.query = Conv2d(channels, channels, device=device, dtype=dtype)
        self.norm1 = make_norm(norm, channels, device=device, dtype=dtype)
        self.keys, self.values = wide(), wide()
        self.squeeze = None
        if squeeze is not None:
            self.squeeze = SqueezeExcite(channels, reduced=squeeze, device=device, dtype=dtype)
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
