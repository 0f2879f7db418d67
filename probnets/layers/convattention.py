r"""Attention whose queries, keys and values come from convolutions."""

__all__ = ["ConvAttentionBlock", "ConvEmbedding"]

import math
from typing import Literal

import torch
from torch import Tensor

from .attention import FeedForward, attend
from .convolution import Conv2d, chain_fields
from .layer import MapLayer
from .norms import NormName
from .norms import norm as make_norm
from .tokens import OnMaps
from .visible import expand
from .widths import head_width


class ConvEmbedding(MapLayer):
    r"""Creates an embedding of overlapping patches as pixels of a smaller map.

    .. math:: y = \mathrm{norm}(W *_s x + b)

    Patches do not overlap if their width is the stride.

    References:
        | CvT: Introducing Convolutions to Vision Transformers (Wu et al., 2021)
        | https://arxiv.org/abs/2103.15808

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        kernel_size: The width :math:`k` of a patch, odd or equal to the stride.
        stride: The distance :math:`s` of patches.
        norm: The name of the norm.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> ConvEmbedding(3, 8)(torch.randn(2, 3, 32, 30)).shape
        torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 7,
        stride: int = 4,
        norm: NormName = "layer",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride)
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, device=device, dtype=dtype
        )
        self.norm = make_norm(norm, out_channels, device=device, dtype=dtype)

    @property
    def receptive_field(self) -> int | None:
        return chain_fields([self.conv, self.norm])

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        return self.norm(self.conv(x, visible), visible)


class ConvAttentionBlock(MapLayer):
    r"""Creates a transformer block whose queries, keys and values come from convolutions.

    .. math::

        q, k, v &= \text{three times } W \, \mathrm{norm}(K * \mathrm{norm}(x)) \\
        x &\gets x + s \, W_O \, \mathrm{attend}(q, k, v) \\
        x &\gets x + s \, \mathrm{FeedForward}(\mathrm{norm}(x))

    The kernels :math:`K` act on each channel alone. Those of keys and values have a stride, so
    that there are fewer keys than queries. All pixels see all keys. Positions enter by the
    zeros around the map alone, so that a block suits maps of any size. Keys have no bias, for
    it would shift all scores of a query by as much.

    If a mask of visible patches is given, hidden patches hold no keys. Then each sample needs
    a visible patch, and patches a multiple of ``key_stride`` pixels.

    References:
        | CvT: Introducing Convolutions to Vision Transformers (Wu et al., 2021)
        | https://arxiv.org/abs/2103.15808

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        channels: The number of channels.
        heads: The number of heads, which divides it.
        kernel_size: The width of the kernels :math:`K`, odd.
        key_stride: The stride of keys and values.
        expansion: The width of the hidden layer, as a multiple of ``channels``.
        kind: The kind of the network on each pixel: ``mlp`` or ``geglu``.
        norm: The name of the norm of the block.
        projection_norm: The name of the norm after the kernels. The paper has ``batch``, with
            which the block is no function of one sample in training.
        res_scale: The fixed factor :math:`s` of both branches.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> ConvAttentionBlock(8, heads=2)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 8, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        kernel_size: int = 3,
        key_stride: int = 2,
        expansion: float = 4.0,
        kind: Literal["mlp", "geglu"] = "mlp",
        norm: NormName = "layer",
        projection_norm: NormName = "none",
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        self.heads, self.key_stride, self.res_scale = heads, key_stride, res_scale
        self.head_features = head_width(channels, heads, None)

        def projection(stride: int, *, bias: bool) -> _ConvProjection:
            return _ConvProjection(
                channels,
                kernel_size,
                stride=stride,
                norm=projection_norm,
                bias=bias,
                device=device,
                dtype=dtype,
            )

        self.norm1 = make_norm(norm, channels, device=device, dtype=dtype)
        self.queries = projection(1, bias=True)
        self.keys = projection(key_stride, bias=False)
        self.values = projection(key_stride, bias=True)
        self.output = Conv2d(channels, channels, device=device, dtype=dtype)
        self.norm2 = make_norm(norm, channels, device=device, dtype=dtype)
        self.feed_forward = OnMaps(
            FeedForward(channels, expansion=expansion, kind=kind, device=device, dtype=dtype)
        )

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        if visible is not None:
            self._check_patches(x, visible)
        z = self.norm1(x, visible)
        x = x + self.res_scale * self._attend(z, visible)
        # Acts on each pixel alone, so that it needs no mask.
        return x + self.res_scale * self.feed_forward(self.norm2(x, visible))

    def _check_patches(self, x: Tensor, visible: Tensor) -> None:
        patch = tuple(n // p for n, p in zip(x.shape[2:], visible.shape[2:], strict=True))
        if any(width % self.key_stride for width in patch):
            raise ValueError(
                f"expected patches of a multiple of key_stride {self.key_stride} pixels, "
                f"got {patch}; take larger patches or a smaller key_stride"
            )
        if not bool(visible.flatten(1).any(dim=1).all()):
            raise ValueError("expected a visible patch in each sample, got none in some")

    def _attend(self, z: Tensor, visible: Tensor | None) -> Tensor:
        keys = self.keys(z, visible)
        q, k, v = map(self._split, (self.queries(z, visible), keys, self.values(z, visible)))
        bias = None
        if visible is not None:
            hidden = expand(visible, keys).flatten(2)[:, None] == 0  # (B, 1, 1, M)
            bias = torch.zeros_like(hidden, dtype=z.dtype).masked_fill(hidden, -math.inf)
        y = attend(q, k, v, bias=bias).mT.flatten(1, 2)  # (B, H, N, d) -> (B, H d, N)
        return self.output(y.unflatten(2, z.shape[2:]))

    def _split(self, x: Tensor) -> Tensor:
        r"""Makes tokens of maps, with shape (B, H, N, d)."""
        return x.flatten(2).unflatten(1, (self.heads, self.head_features)).mT


class _ConvProjection(MapLayer):
    r"""Creates a depthwise convolution, a norm and a linear map of the channels."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        stride: int,
        norm: NormName,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels, stride=stride)
        self.conv = Conv2d(
            channels,
            channels,
            kernel_size,
            stride=stride,
            groups=channels,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.norm = make_norm(norm, channels, device=device, dtype=dtype)
        self.mix = Conv2d(channels, channels, bias=bias, device=device, dtype=dtype)

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        return self.mix(self.norm(self.conv(x, visible), visible), visible)
