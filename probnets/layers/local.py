r"""Attention within blocks of a map and around them."""

__all__ = ["LocalAttention", "LocalAttentionBlock"]

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from .attention import FeedForward, attend
from .convolution import Conv2d, chain_fields
from .layer import MapLayer
from .norms import NormName
from .norms import norm as make_norm
from .tokens import OnMaps
from .visible import expand, hide
from .widths import head_width


class LocalAttention(MapLayer):
    r"""Creates a self-attention in which each block of a map sees itself and a halo.

    .. math:: y_i = W_O \, [\mathrm{attend}(q_i^h, k_j^h, v_j^h; \, t^h_{j - i})]_h,
        \quad j \in \mathrm{block}(i) \pm a

    The map is cut into blocks of :math:`b \times b` queries, whose keys are the
    :math:`(b + 2a)^2` pixels around. Pixels outside of the map are no keys. With a halo this is
    HaloNet; with a shift, Swin, whose cyclic shift with its mask computes the same; with pooled
    queries, the mask units of Hiera.

    A shift :math:`s` moves the corners of blocks to multiples of :math:`b` plus :math:`s`; the
    blocks at the border are cut off by it and do not wrap around. A block that covers the map,
    unshifted, is attention between all pixels.

    Pooled queries are the largest of :math:`p \times p` pixels, channel by channel. Pixels that
    are hidden or outside of the map do not take part.

    The table ``positions`` of biases :math:`t`, zeros at first, has shape
    :math:`(H, 2b + 2a - p, 2b + 2a - p)`. Its entry at the middle, :math:`b + a - p`, is for the
    first pixel of the query itself, and those after it are for keys further down or right.

    References:
        | Scaling Local Self-Attention for Parameter Efficient Visual Backbones
        | (Vaswani et al., 2021)
        | https://arxiv.org/abs/2103.12731

        | Swin Transformer: Hierarchical Vision Transformer using Shifted Windows
        | (Liu et al., 2021)
        | https://arxiv.org/abs/2103.14030

        | Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles
        | (Ryali et al., 2023)
        | https://arxiv.org/abs/2306.00989

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels, by default as many.
        heads: The number of heads :math:`H`.
        block: The width :math:`b` of a block.
        halo: The width :math:`a` of the halo around it.
        shift: The shift :math:`s` of the blocks, less than their width.
        query_pool: The width :math:`p` of the pixels that one query pools, which divides block
            and shift. It is the stride.
        position: Whether scores have a bias for each offset, ``relative`` or ``none``.
        head_features: The number of features of a head, ``out_channels / heads`` by default.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> LocalAttention(8, heads=2, block=4, halo=1)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 8, 7, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        heads: int,
        block: int = 8,
        halo: int = 0,
        shift: int = 0,
        query_pool: int = 1,
        position: Literal["relative", "none"] = "relative",
        head_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        super().__init__(in_channels, out_channels, stride=query_pool)
        if block < 1 or halo < 0 or not 0 <= shift < block:
            raise ValueError(
                "expected block >= 1, halo >= 0 and shift in [0, block), "
                f"got {block}, {halo} and {shift}"
            )
        if block % query_pool or shift % query_pool:
            raise ValueError(
                f"expected block and shift divisible by query_pool {query_pool}, "
                f"got {block} and {shift}"
            )
        if position not in ("relative", "none"):
            raise ValueError(f"expected position relative or none, got {position!r}")

        self.heads, self.block, self.halo, self.shift = heads, block, halo, shift
        self.head_features = head_width(out_channels, heads, head_features)
        inner = heads * self.head_features
        self.qkv = Conv2d(in_channels, 3 * inner, device=device, dtype=dtype)
        self.output = Conv2d(inner, out_channels, device=device, dtype=dtype)
        self.positions = None
        if position == "relative":
            width = 2 * block + 2 * halo - query_pool
            table = torch.zeros(heads, width, width, device=device, dtype=dtype)
            self.positions = nn.Parameter(table)

    @property
    def receptive_field(self) -> int:
        return self.block + 2 * self.halo

    @property
    def grid(self) -> int:
        return self.block

    def own_fan_in(self, name: str) -> int | None:
        return 1 if name == "positions" else None

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        queries, keys = zip(*(self._cuts(size) for size in x.shape[2:]), strict=True)
        q, k, v = self.qkv(hide(x, visible)).chunk(3, dim=1)
        q = _max_pool(q, visible, self.stride)
        bias = self._bias(x, visible, queries, keys)
        y = attend(self._split(q, queries), self._split(k, keys), self._split(v, keys), bias=bias)
        return self.output(self._join(y, queries))

    def _cuts(self, size: int) -> tuple["_Cut", "_Cut"]:
        r"""Cuts an axis of the map into blocks of queries, and of keys."""
        block, halo, pool = self.block, self.halo, self.stride
        pooled = -(-size // pool)
        if size <= block and self.shift == 0:  # one block, no larger than need be
            block, halo = pooled * pool, 0
        shift = self.shift
        return _cut(pooled, block // pool, 0, shift // pool), _cut(size, block, halo, shift)

    def _bias(
        self,
        x: Tensor,
        visible: Tensor | None,
        queries: Sequence["_Cut"],
        keys: Sequence["_Cut"],
    ) -> Tensor | None:
        r"""Returns what is added to scores, with shape (B, blocks H, Q, K) or for B = 1."""
        bias = None
        if visible is not None or any(cut.padded for cut in keys):
            real = x.new_ones(1, 1, *x.shape[2:]) if visible is None else expand(visible, x)
            real = _windows(real, keys).flatten(4).flatten(1, 3)[:, :, None, None] > 0
            # Where no key is visible no query is, and any finite answer will do.
            out = ~real & real.any(dim=-1, keepdim=True)
            bias = torch.zeros_like(out, dtype=x.dtype).masked_fill(out, -math.inf)
        if self.positions is not None:
            positions = self._offsets(self.positions, queries, keys)
            bias = positions if bias is None else bias + positions
        if bias is None:
            return None
        blocks = keys[0].blocks * keys[1].blocks
        return bias.expand(-1, blocks, self.heads, -1, -1).flatten(1, 2)

    def _offsets(self, table: Tensor, queries: Sequence["_Cut"], keys: Sequence["_Cut"]) -> Tensor:
        r"""Looks up the biases of all pairs in a block, with shape (1, 1, H, Q, K)."""
        start = self.block + self.halo - self.stride
        rows, columns = (
            torch.arange(-key.halo, key.block + key.halo, device=table.device)
            - self.stride * torch.arange(query.block, device=table.device)[:, None]
            + start
            for query, key in zip(queries, keys, strict=True)
        )
        pairs = table[:, rows[:, None, :, None], columns[None, :, None, :]]
        return pairs.flatten(3).flatten(1, 2)[None, None]  # (H, Qh, Qw, Kh, Kw)

    def _split(self, x: Tensor, cuts: Sequence["_Cut"]) -> Tensor:
        r"""Cuts maps into tokens, with shape (B, blocks H, N, d)."""
        x = _windows(x, cuts).unflatten(1, (self.heads, self.head_features))
        x = x.permute(0, 3, 4, 1, 5, 6, 2)  # (B, H, d, m, n, h, w) -> (B, m, n, H, h, w, d)
        return x.flatten(4, 5).flatten(1, 3)

    def _join(self, y: Tensor, cuts: Sequence["_Cut"]) -> Tensor:
        r"""Undoes the cut, and drops what was padded."""
        rows, columns = cuts
        y = y.unflatten(2, (rows.block, columns.block))
        y = y.unflatten(1, (rows.blocks, columns.blocks, self.heads))
        y = y.permute(0, 3, 6, 1, 4, 2, 5)  # (B, m, n, H, h, w, d) -> (B, H, d, m, h, n, w)
        y = y.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return y[:, :, rows.inside, columns.inside]


class LocalAttentionBlock(MapLayer):
    r"""Creates a transformer block with local attention.

    .. math::

        x &\gets x + s \, \mathrm{LocalAttention}(\mathrm{norm}(x)) \\
        x &\gets x + s \, \mathrm{FeedForward}(\mathrm{norm}(x))

    If queries are pooled or channels change, the short cut of the first line is
    :math:`\mathrm{pool}(W \, \mathrm{norm}(x))`, with the largest of the same pixels.

    References:
        | Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles
        | (Ryali et al., 2023)
        | https://arxiv.org/abs/2306.00989

        | Swin Transformer: Hierarchical Vision Transformer using Shifted Windows
        | (Liu et al., 2021)
        | https://arxiv.org/abs/2103.14030

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels, by default as many.
        heads: The number of heads.
        block: The width of a block.
        halo: The width of the halo around it.
        shift: The shift of the blocks, less than their width.
        query_pool: The width of the pixels that one query pools, which is the stride.
        position: Whether scores have a bias for each offset, ``relative`` or ``none``.
        head_features: The number of features of a head.
        expansion: The width of the hidden layer, as a multiple of ``out_channels``.
        kind: The kind of the network on each pixel: ``mlp`` or ``geglu``.
        norm: The name of the norm.
        res_scale: The fixed factor :math:`s` of both branches.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> layer = LocalAttentionBlock(8, 16, heads=2, block=4, query_pool=2)
        >>> layer(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 16, 4, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        heads: int,
        block: int = 8,
        halo: int = 0,
        shift: int = 0,
        query_pool: int = 1,
        position: Literal["relative", "none"] = "relative",
        head_features: int | None = None,
        expansion: float = 4.0,
        kind: Literal["mlp", "geglu"] = "mlp",
        norm: NormName = "layer",
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out = in_channels if out_channels is None else out_channels
        super().__init__(in_channels, out, stride=query_pool)
        self.res_scale = res_scale
        self.norm1 = make_norm(norm, in_channels, device=device, dtype=dtype)
        self.attention = LocalAttention(
            in_channels,
            out,
            heads=heads,
            block=block,
            halo=halo,
            shift=shift,
            query_pool=query_pool,
            position=position,
            head_features=head_features,
            device=device,
            dtype=dtype,
        )
        self.shortcut = None
        if query_pool > 1 or out != in_channels:
            self.shortcut = Conv2d(in_channels, out, device=device, dtype=dtype)
        self.norm2 = make_norm(norm, out, device=device, dtype=dtype)
        self.feed_forward = OnMaps(
            FeedForward(out, expansion=expansion, kind=kind, device=device, dtype=dtype)
        )

    @property
    def receptive_field(self) -> int | None:
        return chain_fields([self.norm1, self.attention, self.norm2])

    @property
    def grid(self) -> int:
        return self.attention.grid

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        z = self.norm1(x, visible)
        if self.shortcut is not None:
            x = _max_pool(self.shortcut(z, visible), visible, self.stride)
        x = x + self.res_scale * self.attention(z, visible)
        # Acts on each pixel alone, so that it needs no mask.
        return x + self.res_scale * self.feed_forward(self.norm2(x, visible))


class _Cut(NamedTuple):
    r"""Is how an axis is cut into blocks, after it has been padded to a multiple of them.

    Attributes:
        size: The number of pixels of the axis.
        block: The width of a block.
        halo: The width of the halo around it.
        before: The number of pixels that are padded before the axis.
        after: The number of pixels that are padded after it.
    """

    size: int
    block: int
    halo: int
    before: int
    after: int

    @property
    def blocks(self) -> int:
        return (self.before + self.size + self.after) // self.block

    @property
    def padded(self) -> bool:
        return self.before + self.after + self.halo > 0

    @property
    def slices(self) -> int:
        r"""The number of widths of a block that cover it and its halo."""
        return 1 - (-2 * self.halo // self.block)

    @property
    def padding(self) -> tuple[int, int]:
        r"""The numbers of pixels that slices of whole blocks need around the axis."""
        return self.before + self.halo, self.after + (self.slices - 1) * self.block - self.halo

    @property
    def inside(self) -> slice:
        return slice(self.before, self.before + self.size)


def _cut(size: int, block: int, halo: int, shift: int) -> _Cut:
    before = -shift % block
    return _Cut(size, block, halo, before, -(before + size) % block)


def _windows(x: Tensor, cuts: Sequence[_Cut]) -> Tensor:
    r"""Cuts maps into blocks with their halos, with shape (B, C, m, n, h, w)."""
    rows, columns = cuts
    padding = (*columns.padding, *rows.padding)
    x = pad(x, padding) if any(padding) else x  # no copies where there is nothing to add
    return _slide(_slide(x, 2, rows), 4, columns).transpose(3, 4)


def _slide(x: Tensor, axis: int, cut: _Cut) -> Tensor:
    r"""Cuts an axis into blocks with their halos, side by side, by slices alone.

    The slices of an axis begin one block after the other. Unlike ``unfold``, which has no
    batched derivative, they work with ``vmap``.
    """
    if cut.slices == 1:
        return x.unflatten(axis, (cut.blocks, cut.block))
    slices = (x.narrow(axis, t * cut.block, cut.blocks * cut.block) for t in range(cut.slices))
    tiles = [part.unflatten(axis, (cut.blocks, cut.block)) for part in slices]
    return torch.cat(tiles, dim=axis + 1).narrow(axis + 1, 0, cut.block + 2 * cut.halo)


def _max_pool(x: Tensor, visible: Tensor | None, width: int) -> Tensor:
    r"""Takes the largest visible values of squares of pixels, or zero if there are none."""
    if width == 1:
        return x
    if visible is None:
        return max_pool2d(x, width, ceil_mode=True)
    x = x.masked_fill(expand(visible, x) == 0, -math.inf)
    x = max_pool2d(x, width, ceil_mode=True)
    return x.masked_fill(x.isneginf(), 0.0)
