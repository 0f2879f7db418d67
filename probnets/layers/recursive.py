r"""Recursive gated convolutions."""

__all__ = ["RecursiveGatedBlock", "RecursiveGatedConv"]

import torch
from torch import Tensor, nn

from .attention import FeedForward
from .convolution import Conv2d, chain_fields
from .layer import MapLayer
from .norms import NormName
from .norms import norm as make_norm
from .visible import gather, scatter


class RecursiveGatedConv(MapLayer):
    r"""Creates a recursive gated convolution: neighbours that gate a pixel again and again.

    .. math::

        (p_0, q_0, \dots, q_{n-1}) &= W_{\mathrm{in}} x + b_{\mathrm{in}} \\
        p_1 &= p_0 \odot s \, (D * q)_0 \\
        p_{i+1} &= (W_i \, p_i + b_i) \odot s \, (D * q)_i \\
        y &= W_{\mathrm{out}} \, p_n + b_{\mathrm{out}}

    :math:`q_i` has :math:`C / 2^{n-1-i}` channels, and :math:`p_0` has as many as :math:`q_0`.
    :math:`D` is one depthwise convolution of all :math:`q_i`, with a bias; the other maps are
    :math:`1 \times 1`. The output is a polynomial of the input, of degree :math:`n + 1`.

    References:
        | HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions
        | (Rao et al., 2022)
        | https://arxiv.org/abs/2207.14284

    Used by: backbones of circuits and bottleneck.

    Arguments:
        channels: The number of channels :math:`C`, divisible by :math:`2^{n-1}`.
        order: The order :math:`n`.
        kernel_size: The width of the depthwise kernel, odd.
        scale: The fixed factor :math:`s`.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> RecursiveGatedConv(8, order=3)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 8, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        order: int = 3,
        kernel_size: int = 7,
        scale: float = 1 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        if order < 1:
            raise ValueError(f"expected order >= 1, got {order}")
        if channels % 2 ** (order - 1):
            raise ValueError(
                f"expected channels divisible by {2 ** (order - 1)} for order {order}, "
                f"got {channels}; lower the order"
            )
        self.scale = scale
        self.widths = [channels // 2**i for i in reversed(range(order))]
        wide = sum(self.widths)
        self.expand = Conv2d(channels, 2 * channels, device=device, dtype=dtype)
        self.depthwise = Conv2d(wide, wide, kernel_size, groups=wide, device=device, dtype=dtype)
        self.mixers = nn.ModuleList(
            Conv2d(width, 2 * width, device=device, dtype=dtype) for width in self.widths[:-1]
        )
        self.project = Conv2d(channels, channels, device=device, dtype=dtype)

    @property
    def receptive_field(self) -> int:
        return self.depthwise.receptive_field

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        p, q = self.expand(x, visible).split([self.widths[0], sum(self.widths)], dim=1)
        first, *others = (self.scale * self.depthwise(q, visible)).split(self.widths, dim=1)
        p = p * first
        for mixer, gate in zip(self.mixers, others, strict=True):
            p = mixer(p, visible) * gate
        return self.project(p, visible)


class RecursiveGatedBlock(MapLayer):
    r"""Creates a block of a recursive gated convolution, then a network on each pixel.

    .. math::

        x &\gets x + s \, \gamma_1 \odot \mathrm{RecursiveGatedConv}(\mathrm{norm}(x)) \\
        x &\gets x + s \, \gamma_2 \odot \mathrm{FeedForward}(\mathrm{norm}(x))

    References:
        | HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions
        | (Rao et al., 2022)
        | https://arxiv.org/abs/2207.14284

    Used by: backbones of circuits and bottleneck.

    Arguments:
        channels: The number of channels, divisible by two to the power of ``order - 1``.
        order: The order of the convolution. The reference takes 2, 3, 4 and 5 in four stages.
        kernel_size: The width of its depthwise kernel, odd.
        expansion: The width of the hidden layer, as a multiple of the channels.
        norm: The name of the norms.
        layer_scale: What the learned scales :math:`\gamma` start from, or None for no scales.
        res_scale: The fixed factor :math:`s` of both branches.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> RecursiveGatedBlock(8, order=2)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 8, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        order: int = 3,
        kernel_size: int = 7,
        expansion: float = 4.0,
        norm: NormName = "layer",
        layer_scale: float | None = 1e-6,
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        self.res_scale = res_scale
        self.norm1 = make_norm(norm, channels, device=device, dtype=dtype)
        self.gated = RecursiveGatedConv(
            channels, order=order, kernel_size=kernel_size, device=device, dtype=dtype
        )
        self.norm2 = make_norm(norm, channels, device=device, dtype=dtype)
        self.feed_forward = FeedForward(channels, expansion=expansion, device=device, dtype=dtype)
        self.scale1 = self.scale2 = None
        if layer_scale is not None:
            start = torch.full((channels,), float(layer_scale), device=device, dtype=dtype)
            self.scale1, self.scale2 = nn.Parameter(start), nn.Parameter(start.clone())

    @property
    def receptive_field(self) -> int | None:
        return chain_fields([self.norm1, self.gated, self.norm2])

    def own_fan_in(self, name: str) -> int | None:
        return 1 if name in ("scale1", "scale2") else None

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        x = x + self._scaled(self.gated(self.norm1(x, visible), visible), self.scale1)
        tokens = self.feed_forward(gather(self.norm2(x, visible), None))
        return x + self._scaled(scatter(tokens, None, (height, width)), self.scale2)

    def _scaled(self, y: Tensor, scale: Tensor | None) -> Tensor:
        return self.res_scale * (y if scale is None else scale[:, None, None] * y)
