r"""Attention that starts as a convolution."""

__all__ = ["PositionalAttention", "PositionalAttentionBlock"]

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .attention import FeedForward, attend
from .layer import MapLayer
from .norms import NormName
from .norms import norm as make_norm
from .visible import expand, gather, hide, scatter


class PositionalAttention(MapLayer):
    r"""Creates a self-attention whose heads are gated between content and position.

    .. math::

        y &= W_O \, [A_h W_V^h x]_{h = 1, \dots, H} + b_O \\
        A_h &= (1 - \sigma(\lambda_h)) \, \mathrm{softmax}\left(q_h k_h^\top / \sqrt{d}\right)
            + \sigma(\lambda_h) \, \mathrm{softmax}(v_h^\top r)

    From pixel :math:`i` to pixel :math:`j`, :math:`r_{ij} = (\delta_x, \delta_y, |\delta|^2)`
    with :math:`\delta = j - i`. It is computed for the map at hand, which may have any size.
    Both softmaxes sum to one, and so does their mixture.

    It starts as a soft convolution. :math:`W_V` is the identity and :math:`\lambda_h = 1`. Head
    :math:`h` looks at offset :math:`\Delta_h` with strength :math:`\alpha`, since
    :math:`v_h^\top r = -\alpha |\delta - \Delta_h|^2` up to a constant. The offsets are a
    centred grid with steps of one pixel, as square as the number of heads allows.

    References:
        | ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases
        | (d'Ascoli et al., 2021)
        | https://arxiv.org/abs/2103.10697

    Used by: backbones of circuits and bottleneck.

    Arguments:
        channels: The number of channels, a multiple of the heads.
        heads: The number of heads :math:`H`. Square numbers give square grids.
        locality: The strength :math:`\alpha` at the start.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> PositionalAttention(8, heads=4)(torch.randn(2, 8, 3, 5)).shape
        torch.Size([2, 8, 3, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        locality: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        if heads < 1 or channels % heads:
            raise ValueError(f"expected heads that divide {channels} channels, got {heads}")
        self.heads = heads
        self.qk = nn.Linear(channels, 2 * channels, bias=False, device=device, dtype=dtype)
        self.values = nn.Linear(channels, channels, bias=False, device=device, dtype=dtype)
        self.output = nn.Linear(channels, channels, device=device, dtype=dtype)

        self.locality = locality
        self.position = nn.Parameter(torch.empty(heads, 3, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.ones(heads, device=device, dtype=dtype))
        self.start(None)

    def own_fan_in(self, name: str) -> int | None:
        return {"position": 3, "gate": 1}.get(name)

    @torch.no_grad()
    def start(self, generator: torch.Generator | None) -> None:
        r"""Puts the centres of heads on a grid, with values that are the inputs."""
        locality, grid = self.locality, _grid(self.heads)
        start = [[2 * x * locality, 2 * y * locality, -locality] for x, y in grid]
        nn.init.eye_(self.values.weight)
        self.position.copy_(torch.tensor(start))
        self.gate.fill_(1.0)

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        tokens = gather(hide(x, visible), None)  # (B, N, C), the hidden ones too
        q, k = self._split(self.qk(tokens), 2)  # each (B, H, N, d)
        (v,) = self._split(self.values(tokens), 1)

        places = self._places(height, width)  # (H, N, N)
        bias = None
        if visible is not None:
            # Finite, so that a sample without any visible pixel gives no NaN.
            bias = (1 - expand(visible, x).flatten(2)[:, :, None]) * torch.finfo(x.dtype).min
            places = places + bias  # (B, H, N, N)

        gate = self.gate.sigmoid()[:, None, None]
        y = (1 - gate) * attend(q, k, v, bias=bias) + gate * (places.softmax(dim=-1) @ v)
        return scatter(self.output(y.transpose(1, 2).flatten(2)), None, (height, width))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        x = x.unflatten(-1, (parts, self.heads, self.in_channels // self.heads))
        return x.permute(2, 0, 3, 1, 4).unbind()  # (B, N, P H d) -> P times (B, H, N, d)

    def _places(self, height: int, width: int) -> Tensor:
        r"""Computes the scores by position, with shape :math:`(H, N, N)`."""
        position = self.position
        rows = torch.arange(height, device=position.device, dtype=position.dtype)
        columns = torch.arange(width, device=position.device, dtype=position.dtype)
        pixels = torch.cartesian_prod(rows, columns).view(-1, 2)  # (N, 2)
        dy, dx = (pixels - pixels[:, None]).unbind(-1)  # each (N, N)
        r = torch.stack([dx, dy, dx.square() + dy.square()])  # (3, N, N)
        return (position @ r.flatten(1)).unflatten(1, dx.shape)


def _grid(heads: int) -> list[tuple[float, float]]:
    r"""Lays heads out on a centred grid, row by row, and returns the offsets :math:`(x, y)`."""
    columns = math.isqrt(heads - 1) + 1
    rows = -(-heads // columns)
    return [(h % columns - (columns - 1) / 2, h // columns - (rows - 1) / 2) for h in range(heads)]


class PositionalAttentionBlock(MapLayer):
    r"""Creates a transformer block on maps, with attention that starts as a convolution.

    .. math::

        x &\gets x + s \, \mathrm{PositionalAttention}(\mathrm{norm}(x)) \\
        x &\gets x + s \, \mathrm{FeedForward}(\mathrm{norm}(x))

    References:
        | ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases
        | (d'Ascoli et al., 2021)
        | https://arxiv.org/abs/2103.10697

    Used by: backbones of circuits and bottleneck.

    Arguments:
        channels: The number of channels, a multiple of the heads.
        heads: The number of heads.
        locality: How strongly heads look at their offset at the start.
        expansion: The width of the hidden layer, as a multiple of the channels.
        kind: The kind of the network on each pixel: ``mlp`` or ``geglu``.
        norm: The name of the norms.
        res_scale: The fixed factor :math:`s` of both branches.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> PositionalAttentionBlock(8, heads=4)(torch.randn(2, 8, 3, 5)).shape
        torch.Size([2, 8, 3, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        locality: float = 1.0,
        expansion: float = 4.0,
        kind: Literal["mlp", "geglu"] = "mlp",
        norm: NormName = "layer",
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        self.res_scale = res_scale
        self.norm1 = make_norm(norm, channels, device=device, dtype=dtype)
        self.attention = PositionalAttention(
            channels, heads=heads, locality=locality, device=device, dtype=dtype
        )
        self.norm2 = make_norm(norm, channels, device=device, dtype=dtype)
        self.feed_forward = FeedForward(
            channels, expansion=expansion, kind=kind, device=device, dtype=dtype
        )

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        x = x + self.res_scale * self.attention(self.norm1(x, visible), visible)
        tokens = gather(self.norm2(x, visible), None)
        return x + self.res_scale * scatter(self.feed_forward(tokens), None, (height, width))
