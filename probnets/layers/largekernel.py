r"""Large kernels, which small dilated ones help to train."""

__all__ = ["DilatedReparamConv2d", "LargeKernelBlock"]

from collections.abc import Sequence
from functools import reduce
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .convolution import Conv2d, chain_fields
from .inverted import SqueezeExcite
from .layer import MapLayer
from .linearconv import LinearConv2d
from .norms import BatchNorm, NormName, ResponseNorm
from .norms import norm as make_norm
from .visible import hide
from .widths import hidden_width

# The width and dilation of the kernels beside a large one, as the paper has them.
_SMALL = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class DilatedReparamConv2d(MapLayer):
    r"""Creates a large depthwise kernel with small dilated ones beside it, which merge into it.

    .. math:: y = \mathrm{norm}_0(W_0 * x) + \sum_j \mathrm{norm}_j(W_j *_{d_j} x)

    Up to :math:`K = 17` the small kernels are those of the paper: for :math:`K = 13` they have
    the widths 5, 7, 3, 3 and 3 and the dilations 1, 2, 3, 4 and 5. Above, they have the widths 5,
    the largest odd one up to :math:`(K + 1) / 2`, 3, 3 and 3, and the dilations 1, 2, and a
    third, two thirds and all of :math:`(K - 1) / 2`, rounded up. None is wider than :math:`K`.

    Other small kernels may be given, as by MetaMixer, which has one of width 3.

    In evaluation mode the sum is a single convolution, which :meth:`merged` returns. Without
    norms it is linear in any mode, and a coupling over long distances with few weights.

    References:
        | UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud,
        | Time-Series and Image Recognition (Ding et al., 2023)
        | https://arxiv.org/abs/2311.15599

        | MetaMixer Is All You Need (Yun et al., 2024)
        | https://arxiv.org/abs/2406.02021

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        channels: The number of channels :math:`C`.
        kernel_size: The width :math:`K` of the large kernel, odd, and five or more unless the
            small kernels are given.
        small: The width and the dilation of each small kernel.
        norm: The name of the norm of each kernel, ``batch`` or ``none``.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> conv = DilatedReparamConv2d(8, 13)
        >>> conv(torch.randn(2, 8, 7, 5)).shape, conv.merged().conv.weight.shape
        (torch.Size([2, 8, 7, 5]), torch.Size([8, 1, 13, 13]))
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 13,
        *,
        small: Sequence[tuple[int, int]] | None = None,
        norm: Literal["batch", "none"] = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        if norm not in ("batch", "none"):
            raise ValueError(f"expected a norm of batch and none, got {norm!r}")
        kernels = (kernel_size, 1), *(_small(kernel_size) if small is None else small)
        if any(d * (k - 1) >= kernel_size for k, d in kernels):
            raise ValueError(
                f"expected small kernels no wider than {kernel_size} pixels, got {small}"
            )
        self.kernel_size = kernel_size
        self.convs = nn.ModuleList(
            Conv2d(
                channels,
                channels,
                width,
                dilation=dilation,
                groups=channels,
                bias=False,
                device=device,
                dtype=dtype,
            )
            for width, dilation in kernels
        )
        self.norms = nn.ModuleList(
            make_norm(norm, channels, device=device, dtype=dtype) for _ in kernels
        )

    @property
    def _normed(self) -> bool:
        return isinstance(self.norms[0], BatchNorm)

    @property
    def receptive_field(self) -> int | None:
        return chain_fields(self._pairs()[0])

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        x = hide(x, visible)  # once, instead of in each convolution
        return reduce(torch.add, (norm(conv(x), visible) for conv, norm in self._pairs()))

    def kernel(self) -> Tensor:
        r"""Returns the sum of all kernels, with shape :math:`(C, 1, K, K)`.

        Gradients flow to each of them.

        Raises:
            ValueError: If there are norms.
        """
        if self._normed:
            raise ValueError("expected norm 'none', got 'batch'; use merged()")
        return self._sum([None] * len(self.convs))

    def merged(self) -> Conv2d:
        r"""Returns the one convolution that does the same in evaluation mode.

        It has a bias if there are norms, and weights of its own.
        """
        weight = self._pairs()[0][0].conv.weight
        one = Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            groups=self.in_channels,
            bias=self._normed,
            device=weight.device,
            dtype=weight.dtype,
        )
        folds = [norm.fold() for norm in self.norms if isinstance(norm, BatchNorm)]
        with torch.no_grad():
            scales = [scale for scale, _ in folds] or [None] * len(self.convs)
            one.conv.weight.copy_(self._sum(scales))
            if one.conv.bias is not None:
                one.conv.bias.copy_(torch.stack([shift for _, shift in folds]).sum(dim=0))
        return one.eval()

    def as_linear(self, *, padding: int | Literal["same", "full"] = "same") -> LinearConv2d:
        r"""Returns the sum of all kernels as a linear map, with weights of its own.

        Arguments:
            padding: The zeros around the map, as in :class:`LinearConv2d`. With ``same`` it
                computes what this layer does.

        Raises:
            ValueError: If there are norms.
        """
        kernel = self.kernel().detach()
        one = LinearConv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            padding=padding,
            groups=self.in_channels,
            device=kernel.device,
            dtype=kernel.dtype,
        )
        with torch.no_grad():
            one.weight.copy_(kernel)
        return one

    def _pairs(self) -> list[tuple[Conv2d, MapLayer]]:
        pairs = zip(self.convs, self.norms, strict=True)
        return [(cast(Conv2d, conv), cast(MapLayer, norm)) for conv, norm in pairs]

    def _sum(self, scales: Sequence[Tensor | None]) -> Tensor:
        kernels = []
        for (conv, _), scale in zip(self._pairs(), scales, strict=True):
            kernel = _dilated(conv.conv.weight, conv.conv.dilation[0])
            kernel = nn.functional.pad(kernel, [(self.kernel_size - kernel.shape[-1]) // 2] * 4)
            kernels.append(kernel if scale is None else scale[:, None, None, None] * kernel)
        return reduce(torch.add, kernels)


class LargeKernelBlock(MapLayer):
    r"""Creates a UniRepLKNet block: a large depthwise kernel, a gate and an inverted bottleneck.

    .. math:: y = x + \rho \, \gamma \odot \mathrm{norm}(W_2 \, \mathrm{GRN}(\mathrm{GELU}(
        W_1 \, \mathrm{SE}(\mathrm{norm}(D * x)))))

    :math:`D` is a :class:`DilatedReparamConv2d`, or a plain depthwise convolution if it is
    narrower than five. :math:`W_1` and :math:`W_2` are :math:`1 \times 1`, and GRN is a global
    response norm. Only with batch norms do the kernels of :math:`D` have norms of their own.

    As a random function the block needs :math:`\gamma` left out, and a fixed :math:`\rho`.

    References:
        | UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud,
        | Time-Series and Image Recognition (Ding et al., 2023)
        | https://arxiv.org/abs/2311.15599

        | Scaling Up Your Kernels: Large Kernel Design in ConvNets towards Universal
        | Representations (Zhang et al., 2024)
        | https://arxiv.org/abs/2410.08049

    Used by: backbones of circuits, priors and bottleneck; external fields of boltzmann.

    Arguments:
        channels: The number of channels :math:`C`.
        kernel_size: The width :math:`K` of the depthwise kernel, odd.
        expansion: How many times wider the block is between :math:`W_1` and :math:`W_2`.
        norm: The name of the norms.
        squeeze: The share of the channels that the gate reduces them to, one or more.
        layer_scale: The initial value of the weights :math:`\gamma`, one a channel, or None
            for none.
        res_scale: The fixed factor :math:`\rho` of the branch beside the short cut.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> LargeKernelBlock(8, 13)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 8, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 13,
        *,
        expansion: float = 4.0,
        norm: NormName = "batch",
        squeeze: float = 0.25,
        layer_scale: float | None = 1e-6,
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        if not 0 < squeeze <= 1:
            raise ValueError(f"expected squeeze in (0, 1], got {squeeze}")
        hidden = hidden_width(channels, expansion)
        plain = norm in ("none", "layer_plain")
        self.res_scale = res_scale
        self.depthwise = _depthwise(channels, kernel_size, norm, device=device, dtype=dtype)
        self.norm = make_norm(norm, channels, device=device, dtype=dtype)
        self.squeeze = SqueezeExcite(
            channels, reduced=max(1, round(squeeze * channels)), device=device, dtype=dtype
        )
        self.expand = Conv2d(channels, hidden, device=device, dtype=dtype)
        self.activation = nn.GELU()
        self.response = ResponseNorm(hidden, device=device, dtype=dtype)
        self.project = Conv2d(hidden, channels, bias=plain, device=device, dtype=dtype)
        self.last_norm = make_norm(norm, channels, device=device, dtype=dtype)
        self.layer_scale = None
        if layer_scale is not None:
            start = torch.full((channels,), float(layer_scale), device=device, dtype=dtype)
            self.layer_scale = nn.Parameter(start)

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        y = self.norm(self.depthwise(x, visible), visible)
        y = self.activation(self.expand(self.squeeze(y, visible), visible))
        y = self.project(self.response(y, visible), visible)
        y = self.last_norm(y, visible)
        if self.layer_scale is not None:
            y = self.layer_scale[:, None, None] * y
        return x + self.res_scale * y


def _depthwise(
    channels: int,
    kernel_size: int,
    norm: NormName,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> MapLayer:
    if kernel_size < 5:
        return Conv2d(
            channels,
            channels,
            kernel_size,
            groups=channels,
            bias=norm in ("none", "layer_plain"),
            device=device,
            dtype=dtype,
        )
    inner = "batch" if norm == "batch" else "none"
    return DilatedReparamConv2d(channels, kernel_size, norm=inner, device=device, dtype=dtype)


def _small(kernel_size: int) -> tuple[tuple[int, int], ...]:
    if kernel_size < 5 or kernel_size % 2 == 0:
        raise ValueError(
            f"expected an odd kernel_size >= 5, got {kernel_size}; Conv2d has smaller ones"
        )
    if kernel_size in _SMALL:
        return _SMALL[kernel_size]
    radius = kernel_size // 2
    widest = radius + 1 - radius % 2
    dilations = (-(-radius * part // 3) for part in (1, 2, 3))
    return (5, 1), (widest, 2), *((3, dilation) for dilation in dilations)


def _dilated(kernel: Tensor, dilation: int) -> Tensor:
    r"""Spreads the taps of kernels, with zeros between them."""
    width = kernel.shape[-1]
    gaps = nn.functional.pad(kernel[..., None, :, None], (0, dilation - 1, 0, 0, 0, dilation - 1))
    spread = gaps.flatten(-2).flatten(-3, -2)  # (C, 1, k d, k d)
    field = dilation * (width - 1) + 1
    return spread[..., :field, :field]
