r"""Linear attention, and norms that fold into the linear map after them."""

__all__ = ["LinearAttention", "LinearAttentionBlock"]

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .convolution import Conv2d
from .layer import MapLayer
from .norms import BatchNorm, LayerNorm, NoNorm, NormName, ProgressiveNorm, RepBatchNorm
from .norms import norm as make_norm
from .visible import expand, gather, hide, scatter
from .widths import hidden_width


class LinearAttention(MapLayer):
    r"""Creates a self-attention whose cost is linear in the number of pixels.

    .. math::

        a_i &= \frac{\sum_j (q_i^\top k_j) \, v_j}{q_i^\top \sum_j k_j + 10^{-6}}, \quad
            q = \mathrm{relu}(W_Q x), \quad k = \mathrm{relu}(W_K x), \quad v = W_V x \\
        y &= W_O (a + D * v)

    All linear maps have biases. :math:`a` is computed in each head, and :math:`D` is one
    depthwise convolution, which makes up for the little focus of such attention. The product
    :math:`q k^\top v` is associated in the cheaper way. Types of 16 bits are computed with 32.

    References:
        | SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
        | Re-parameterized Batch Normalization (Guo et al., 2024)
        | https://arxiv.org/abs/2405.11582

    Used by: backbones of circuits and bottleneck.

    Arguments:
        channels: The number of channels, a multiple of the heads.
        heads: The number of heads.
        kernel_size: The width of the depthwise kernel, odd.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> LinearAttention(8, heads=2)(torch.randn(2, 8, 3, 5)).shape
        torch.Size([2, 8, 3, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        kernel_size: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        if heads < 1 or channels % heads:
            raise ValueError(f"expected heads that divide {channels} channels, got {heads}")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, device=device, dtype=dtype)
        self.depthwise = Conv2d(
            channels, channels, kernel_size, groups=channels, device=device, dtype=dtype
        )
        self.output = nn.Linear(channels, channels, device=device, dtype=dtype)

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        qkv = self.qkv(gather(hide(x, visible), None))  # (B, N, 3 C), of hidden pixels too
        heads = qkv.unflatten(-1, (3, self.heads, self.in_channels // self.heads))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()  # each (B, H, N, d)
        q, k = q.relu(), k.relu()
        if visible is not None:
            k = k * expand(visible, x).flatten(2)[..., None]  # (B, 1, N, 1)

        a = _attend_linearly(q, k, v).transpose(1, 2).flatten(2)  # (B, H, N, d) -> (B, N, C)
        values = scatter(qkv.chunk(3, dim=-1)[2], None, (height, width))
        local = gather(self.depthwise(values, visible), None)
        return scatter(self.output(a + local), None, (height, width))


def _attend_linearly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, (q, k, v) = q.dtype, (x.to(dtype) for x in (q, k, v))
    pixels, width = q.shape[-2:]
    device = q.device.type
    known = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if known else nullcontext():
        total = q @ k.sum(dim=-2, keepdim=True).mT  # (*, N, 1)
        product = _queries_first(q, k, v) if pixels < width else _keys_first(q, k, v)
    return (product / (total + 1e-6)).to(out)


def _queries_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT) @ v


def _keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v)


class LinearAttentionBlock(MapLayer):
    r"""Creates a transformer block on maps with linear attention.

    .. math::

        x &\gets x + s \, \mathrm{LinearAttention}(\mathrm{norm}(x)) \\
        x &\gets x + s \, W_2 \, \mathrm{GELU}(W_1 \, \mathrm{norm}(x))

    References:
        | SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
        | Re-parameterized Batch Normalization (Guo et al., 2024)
        | https://arxiv.org/abs/2405.11582

    Used by: backbones of circuits and bottleneck.

    Arguments:
        channels: The number of channels, a multiple of the heads.
        heads: The number of heads.
        kernel_size: The width of the depthwise kernel of the attention, odd.
        expansion: The width of the hidden layer, as a multiple of the channels.
        norm: The name of the norms, or what creates them, such as
            ``partial(ProgressiveNorm, steps=1000)``.
        res_scale: The fixed factor :math:`s` of both branches.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> LinearAttentionBlock(8, heads=2)(torch.randn(2, 8, 3, 5)).shape
        torch.Size([2, 8, 3, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        kernel_size: int = 5,
        expansion: float = 4.0,
        norm: NormName | Callable[..., MapLayer] = "layer",
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        hidden = hidden_width(channels, expansion)

        def create() -> MapLayer:
            if callable(norm):
                return norm(channels, device=device, dtype=dtype)
            return make_norm(norm, channels, device=device, dtype=dtype)

        self.res_scale = res_scale
        self.norm1 = create()
        self.attention = LinearAttention(
            channels, heads=heads, kernel_size=kernel_size, device=device, dtype=dtype
        )
        self.norm2 = create()
        self.expand = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.activation = nn.GELU()
        self.project = nn.Linear(hidden, channels, device=device, dtype=dtype)

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        x = x + self.res_scale * self.attention(self.norm1(x, visible), visible)
        tokens = self.expand(gather(self.norm2(x, visible), None))
        y = self.project(self.activation(tokens))
        return x + self.res_scale * scatter(y, None, (height, width))

    def merged(self) -> "LinearAttentionBlock":
        r"""Returns a copy whose linear maps have taken over what norms scale and shift by.

        In evaluation mode it computes the same up to rounding. Batch norms vanish, as do
        progressive norms that have become one; layer norms lose their weights; other norms stay.
        """
        one = copy.deepcopy(self).eval()
        one.norm1, one.attention.qkv = _fold(one.norm1, one.attention.qkv)
        one.norm2, one.expand = _fold(one.norm2, one.expand)
        return one


@torch.no_grad()
def _fold(norm: MapLayer, linear: nn.Linear) -> tuple[MapLayer, nn.Linear]:
    r"""Moves what a norm scales and shifts by into the linear map after it."""
    if isinstance(norm, LayerNorm) and norm.norm.elementwise_affine:
        rest = LayerNorm(norm.in_channels, affine=False, eps=norm.norm.eps)
        scale, shift = norm.norm.weight, norm.norm.bias
    elif isinstance(norm, BatchNorm | RepBatchNorm) or (
        isinstance(norm, ProgressiveNorm) and not norm.share > 0
    ):
        rest = NoNorm(norm.in_channels)
        scale, shift = norm.fold()
    else:
        return norm, linear

    linear.bias.add_(linear.weight @ shift)
    linear.weight.mul_(scale)
    return rest.eval(), linear
