r"""Deep couplings: tiers of maps, linked by convolutions."""

__all__ = ["DenseLink", "Tier", "TierCoupling", "paper_architecture"]

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from probnets.layers import LinearConv2d, LinearLayer

from .couplings import Cap, Coupling, capped


class Tier(NamedTuple):
    r"""Describes a map of one-hot variables.

    Channels are variables times states: channel :math:`v k + s` is state :math:`s` of variable
    :math:`v`.

    Attributes:
        states: The number of states :math:`k` of each variable.
        variables: The number of variables :math:`G` of each pixel.
        height: The height :math:`H`.
        width: The width :math:`W`.

    Example:
        >>> Tier(4, 10, 14, 14).channels
        40
    """

    states: int
    variables: int = 1
    height: int = 1
    width: int = 1

    @property
    def channels(self) -> int:
        r"""The number of channels :math:`C = G k`."""
        return self.variables * self.states

    @property
    def size(self) -> tuple[int, int]:
        r"""The height and the width."""
        return self.height, self.width

    @property
    def total(self) -> int:
        r"""The number of states of all variables of all pixels."""
        return self.channels * self.height * self.width


class TierCoupling(Coupling):
    r"""Creates a coupling of tiers, from features that convolutions compute.

    .. math:: \Phi = \mathrm{blkdiag}(\hat A^\top \hat A) - \hat A^\top \hat A
        \qquad \hat A_v = A_v \min\left( \frac{\sqrt{c}}{\|A_v\|_2}, 1 \right)

    :math:`A` is a lower triangle of links :math:`A_{ij}`, each a convolution of tier :math:`j`
    with stride :math:`H_j / H_i`; the features of row :math:`i` are
    :math:`\sum_j A_{ij} x_j`. Hence all tiers that share a row are coupled, each with itself
    too. Links towards a tier of one pixel are dense.

    Convolutions have full padding, so that the blocks of :math:`A^\top A` depend only on the
    place of a pixel modulo the strides. They are taken off exactly, at borders as inside, and
    their norms are those of the columns :math:`A_v` of each variable. Scaling acts on both
    sides, hence :math:`\Phi` is symmetric. With the extended cap each variable is centred.

    Vectors hold the tiers side by side, and within each tier pixels, variables and states, the
    last ones fastest. A product costs about what the convolutions and their adjoints do:
    factors and blocks are kept while weights do not change and get no gradient.

    References:
        | Monotone deep Boltzmann machines (Feng et al., 2023)
        | https://arxiv.org/abs/2307.04990

    Arguments:
        tiers: The tiers, from the finest to the coarsest.
        links: The width of the kernel of each link :math:`(i, j)`, from tier :math:`j` to the
            rows of tier :math:`i \geq j`, 0 for none. It is 1 where tier :math:`i` has one
            pixel.
        features: The number of features of a pixel in the rows of each tier. By default, the
            channels of the tier.
        cap: The cap, as for :func:`capped`.
        margin: The margin.
        generator: The source of randomness of the weights.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> tiers = [Tier(3, 1, 8, 8), Tier(2, 4, 4, 4), Tier(10)]
        >>> coupling = TierCoupling(tiers, {(0, 0): 3, (1, 0): 3, (2, 1): 1})
        >>> coupling.variables, coupling.states
        (129, 330)
        >>> coupling(torch.rand(5, 330)).shape
        torch.Size([5, 330])
    """

    single_pays = True

    def __init__(
        self,
        tiers: Sequence[Tier],
        links: Mapping[tuple[int, int], int],
        *,
        features: Sequence[int] | None = None,
        cap: Cap = "extended",
        margin: float = 0.1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        tiers = _checked_tiers(tiers)
        kernels = _checked_links(tiers, links)
        features = [tier.channels for tier in tiers] if features is None else list(features)
        if len(features) != len(tiers) or min(features) < 1:
            raise ValueError(
                f"expected features >= 1 for each of {len(tiers)} tiers, got {features}"
            )
        sizes = [tier.states for tier in tiers for _ in range(tier.total // tier.states)]
        super().__init__(sizes, limit=capped(cap, margin))
        self.cap, self.margin = cap, margin
        self.tiers, self.kernels = tiers, kernels
        self.widest = {i: max(k for (r, _), k in kernels.items() if r == i) for i, _ in kernels}

        # How many features a pixel of each tier meets, for columns of about length 1.
        meets = [0.0] * len(tiers)
        for (i, j), k in kernels.items():
            meets[j] += features[i] * max(1.0, (k * tiers[i].height / tiers[j].height) ** 2)
        self.links = nn.ModuleDict()
        for (i, j), k in kernels.items():
            link = _link(tiers[j], tiers[i], k, features[i])
            weight = torch.empty(link.weight.shape, device=device, dtype=dtype)
            weight.normal_(std=1 / math.sqrt(meets[j]), generator=generator)
            link.weight = nn.Parameter(weight)
            self.links[f"{i}_{j}"] = link
        self._kept: tuple[Tensor, _Scales] | None = None
        self.to(device)

    def extra_repr(self) -> str:
        return f"tiers={len(self.tiers)}, cap={self.cap!r}, margin={self.margin}"

    def link(self, row: int, column: int) -> "LinearConv2d | DenseLink":
        r"""Returns the link :math:`A_{ij}`, a linear map without factors and centring.

        Arguments:
            row: The tier :math:`i` whose rows it computes.
            column: The tier :math:`j` that it reads.
        """
        return self.links[f"{row}_{column}"]  # type: ignore[return-value]

    def states_of(self, tier: int) -> slice:
        r"""Returns where the states of a tier lie in a vector.

        Arguments:
            tier: The index of the tier.
        """
        start = sum(t.total for t in self.tiers[:tier])
        return slice(start, start + self.tiers[tier].total)

    def variables_of(self, tier: int) -> slice:
        r"""Returns where the variables of a tier lie in a mask, as pixels and their variables.

        Arguments:
            tier: The index of the tier.
        """
        counts = [t.total // t.states for t in self.tiers]
        start = sum(counts[:tier])
        return slice(start, start + counts[tier])

    def to_maps(self, q: Tensor) -> list[Tensor]:
        r"""Cuts vectors into the maps of the tiers.

        Arguments:
            q: The vectors, with shape :math:`(B, N)`.

        Returns:
            The maps, with shapes :math:`(B, C, H, W)`.

        Raises:
            ValueError: If the shape does not fit.
        """
        if q.ndim != 2 or q.shape[1] != self.states:
            raise ValueError(
                f"expected vectors with shape (B, {self.states}), got {tuple(q.shape)}"
            )
        parts = q.split([tier.total for tier in self.tiers], dim=1)
        return [
            part.reshape(len(q), *tier.size, tier.channels).permute(0, 3, 1, 2)
            for tier, part in zip(self.tiers, parts, strict=True)
        ]

    def from_maps(self, maps: Sequence[Tensor]) -> Tensor:
        r"""Joins the maps of the tiers into vectors, as :meth:`to_maps` cuts them.

        Arguments:
            maps: The maps, with shapes :math:`(B, C, H, W)`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        shapes = [(tier.channels, *tier.size) for tier in self.tiers]
        if [tuple(m.shape[1:]) for m in maps] != shapes:
            raise ValueError(
                f"expected maps with shapes (B, C, H, W) for (C, H, W) in {shapes}, "
                f"got {[tuple(m.shape) for m in maps]}"
            )
        return torch.cat([m.permute(0, 2, 3, 1).flatten(1) for m in maps], dim=1)

    def features(self, row: int, maps: Sequence[Tensor]) -> Tensor:
        r"""Computes the features of a tier's rows, without factors and centring.

        .. math:: \sum_j A_{ij} x_j

        Arguments:
            row: The tier :math:`i`.
            maps: The maps :math:`x_j` of all tiers. Maps may be larger or smaller than the
                tiers, all alike.
        """
        return self._features(self._all_links(), row, maps)

    def _all_links(self) -> "_Links":
        return {(i, j): self.link(i, j) for i, j in self.kernels}

    def _features(self, links: "_Links", row: int, maps: Sequence[Tensor]) -> Tensor:
        terms = []
        for (i, j), k in self.kernels.items():
            if i == row:
                before = (self.widest[i] - k) // 2
                after = self.widest[i] - k - before
                y = links[i, j](maps[j])
                terms.append(nn.functional.pad(y, (before, after) * 2) if before + after else y)
        return sum(terms[1:], start=terms[0])

    def factors(self) -> list[Tensor]:
        r"""Returns the factor of each variable, of shape :math:`(H, W, G)` for each tier."""
        return [
            factor.view(*tier.size, tier.variables)
            for tier, factor in zip(self.tiers, self._scales().factors, strict=True)
        ]

    def operator(self, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
        links, scales = self._all_links(), self._scales()
        if dtype is not None:
            links = {key: _cast(link, dtype) for key, link in links.items()}
            scales = _Scales(*([x.to(dtype) for x in each] for each in scales))
        return partial(self._multiply, links, scales)

    def colours(self) -> Tensor:
        r"""Returns a colour for each variable, such that those of one colour do not couple.

        Pixels of a tier whose distance is a multiple of the widest kernel share no feature. So
        the colours of a tier are as many as its kernel has taps, times the variables of a
        pixel; but dense links couple all pixels that they read. Tiers that share rows have
        colours of their own.
        """
        reach = [(1, 1)] * len(self.tiers)
        for (i, j), k in self.kernels.items():
            dense = isinstance(self.link(i, j), DenseLink)
            size = self.tiers[j].size
            wide = size if dense else (min(k, size[0]), min(k, size[1]))
            reach[j] = max(reach[j][0], wide[0]), max(reach[j][1], wide[1])
        first: list[int] = []  # the first colour of each tier
        counts = [t.variables * P * Q for t, (P, Q) in zip(self.tiers, reach, strict=True)]
        for j in range(len(self.tiers)):
            met = [h for h in range(j) if self._share_rows(h, j)]
            first.append(max((first[h] + counts[h] for h in met), default=0))

        parts = []
        for tier, (P, Q), start in zip(self.tiers, reach, first, strict=True):
            y, x, g = (torch.arange(n) for n in (*tier.size, tier.variables))
            place = (y[:, None, None] % P * Q + x[:, None] % Q) * tier.variables + g
            parts.append(start + place.flatten())
        return torch.cat(parts).to(self.groups.sizes.device)

    def _share_rows(self, h: int, j: int) -> bool:
        r"""Tells whether two tiers meet in the features of some rows."""
        return any((i, h) in self.kernels and (i, j) in self.kernels for i in self.widest)

    def forward(self, q: Tensor) -> Tensor:
        return self._multiply(self._all_links(), self._scales(), q)

    def _multiply(self, links: "_Links", scales: "_Scales", q: Tensor) -> Tensor:
        factors, blocks = scales
        maps = self.to_maps(q)
        maps = [self._shrink(*each) for each in zip(self.tiers, maps, factors, strict=True)]
        found = [_own(*each) for each in zip(self.tiers, maps, blocks, strict=True)]
        for row, widest in self.widest.items():
            y = self._features(links, row, maps)
            for (i, j), k in self.kernels.items():
                if i == row:
                    before = (widest - k) // 2
                    height, width = (n - (widest - k) for n in y.shape[2:])
                    inner = y[:, :, before : before + height, before : before + width]
                    found[j] = found[j] - links[i, j].adjoint(inner, self.tiers[j].size)
        found = [self._shrink(*each) for each in zip(self.tiers, found, factors, strict=True)]
        return self.from_maps(found)

    def _shrink(self, tier: Tier, x: Tensor, factor: Tensor) -> Tensor:
        r"""Multiplies maps by the factors, and centres variables if need be."""
        B, pixels = len(x), tier.height * tier.width
        x = x.permute(0, 2, 3, 1).reshape(B, pixels * tier.variables, tier.states)
        if self.cap == "extended":
            x = x - x.mean(dim=2, keepdim=True)
        x = (x * factor).view(B, *tier.size, tier.channels)
        return x.permute(0, 3, 1, 2)

    def _scales(self) -> "_Scales":
        r"""Returns the factors and blocks, kept as long as nobody watches the weights.

        The weights are compared by value, since nothing else tells of every change.
        """
        weights = list(self.parameters())
        if torch.compiler.is_compiling() or any(map(_watched, weights)):
            return self._computed()
        with torch.inference_mode(mode=False), torch.no_grad():
            now = torch.cat([weight.flatten() for weight in weights])
            if self._kept is None or not _same(self._kept[0], now):
                self._kept = now, self._computed()
            return self._kept[1]

    def _computed(self) -> "_Scales":
        factors, blocks = [], []
        like = next(self.parameters())
        for j, tier in enumerate(self.tiers):
            grams = [
                self.link(*ij).block_gram(tier.variables) for ij in self.kernels if ij[1] == j
            ]
            if not grams:
                grams = [like.new_zeros(1, 1, tier.variables, tier.states, tier.states)]
            periods = [math.lcm(*(gram.shape[axis] for gram in grams)) for axis in (0, 1)]
            block = sum(_tile(gram, periods) for gram in grams[1:]) + _tile(grams[0], periods)
            if self.cap == "extended":
                block = block - block.mean(dim=-1, keepdim=True)
                block = block - block.mean(dim=-2, keepdim=True)
            largest = torch.linalg.eigvalsh(block)[..., -1]  # (P, Q, G)
            factor = (self.limit / largest.clamp(min=self.limit)).sqrt()
            factors.append(_tile(factor, tier.size).reshape(-1, 1))  # (H W G, 1)
            blocks.append(block)
        return _Scales(factors, blocks)


class _Scales(NamedTuple):
    r"""Is what a product needs of the weights, for each tier."""

    factors: list[Tensor]  # (H W G, 1)
    blocks: list[Tensor]  # (P, Q, G, k, k), of pixels modulo P and Q


class DenseLink(LinearLayer):
    r"""Creates a dense map from whole maps of one size to one pixel.

    Arguments:
        in_channels: The number of input channels :math:`C`.
        out_channels: The number of output channels :math:`R`.
        size: The height and width :math:`(H, W)` of the input.
        device: The device.
        dtype: The type of the weights, of shape :math:`(R, H W C)`.

    Example:
        >>> DenseLink(6, 8, size=(5, 4))(torch.randn(2, 6, 5, 4)).shape
        torch.Size([2, 8, 1, 1])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        size: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.size = size
        count = in_channels * math.prod(size)
        draw = torch.randn(out_channels, count, device=device, dtype=dtype)
        self.weight = nn.Parameter(draw / math.sqrt(count))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, size={self.size}"

    def own_fan_in(self, name: str) -> int | None:
        return self.weight.shape[1] if name == "weight" else None

    def out_size(self, size: tuple[int, int]) -> tuple[int, int]:
        if size != self.size:
            raise ValueError(f"expected maps of size {self.size}, got {size}")
        return 1, 1

    def transform(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x.permute(0, 2, 3, 1).flatten(1), self.weight)
        return y[:, :, None, None]

    def transpose(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        x = (y[:, :, 0, 0] @ self.weight).view(len(y), *size, self.in_channels)
        return x.permute(0, 3, 1, 2)

    def block_gram(self, groups: int) -> Tensor:
        r"""Computes the diagonal blocks of :math:`A^\top A`, as :class:`LinearConv2d` does.

        Arguments:
            groups: The number of variables :math:`G` of a pixel.

        Returns:
            The blocks, with shape :math:`(H, W, G, n, n)`.
        """
        states = self.in_channels // groups
        columns = self.weight.view(len(self.weight), *self.size, groups, states)
        return torch.einsum("rhwgx,rhwgy->hwgxy", columns, columns)


_Links = Mapping[tuple[int, int], LinearConv2d | DenseLink]


def paper_architecture(
    *,
    cap: Cap = "extended",
    margin: float = 0.1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TierCoupling:
    r"""Creates the coupling of the deep model for digits of 28 by 28 pixels.

    Its tiers are 784 pixels of 20 states, 1,960 and 980 hidden variables of 4 states, and a
    label of 10 states: 3,725 variables, 27,450 states and 165,300 weights. Biases are apart.

    References:
        | Monotone deep Boltzmann machines (Feng et al., 2023)
        | https://arxiv.org/abs/2307.04990

    Arguments:
        cap: The cap, as for :func:`capped`.
        margin: The margin.
        generator: The source of randomness of the weights.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> coupling = paper_architecture()
        >>> coupling.variables, coupling.states, sum(p.numel() for p in coupling.parameters())
        (3725, 27450, 165300)
    """
    tiers = [Tier(20, 1, 28, 28), Tier(4, 10, 14, 14), Tier(4, 20, 7, 7), Tier(10)]
    links = {(i, j): 3 for i in range(3) for j in range(i + 1)} | {(3, 2): 1, (3, 3): 1}
    return TierCoupling(
        tiers, links, cap=cap, margin=margin, generator=generator, device=device, dtype=dtype
    )


def _checked_tiers(tiers: Sequence[Tier]) -> tuple[Tier, ...]:
    if not len(tiers):
        raise ValueError("expected one tier or more, got none")
    for i, tier in enumerate(tiers):
        if min(tier) < 1:
            raise ValueError(f"expected tier {i} with positive numbers, got {tier}")
    return tuple(Tier(*tier) for tier in tiers)


def _checked_links(
    tiers: tuple[Tier, ...], links: Mapping[tuple[int, int], int]
) -> dict[tuple[int, int], int]:
    for (i, j), k in links.items():
        if not 0 <= j <= i < len(tiers):
            raise ValueError(
                f"expected links (i, j) with 0 <= j <= i < {len(tiers)}, got {(i, j)}"
            )
        if k < 0:
            raise ValueError(f"expected a kernel >= 0 for the link {(i, j)}, got {k}")
        if k == 0:
            continue
        if tiers[i].size == (1, 1):
            if k != 1:
                raise ValueError(
                    f"expected kernel 1 for the link {(i, j)}, got {k}; links to a tier of one "
                    "pixel are dense"
                )
            continue
        fine, coarse = tiers[j].size, tiers[i].size
        stride = fine[0] // coarse[0]
        if fine != (stride * coarse[0], stride * coarse[1]):
            raise ValueError(
                f"expected tier {j} to be a whole number of times as high and wide as tier {i}, "
                f"got {fine} and {coarse}"
            )
    kernels = {key: links[key] for key in sorted(links) if links[key]}
    if not kernels:
        raise ValueError("expected one link or more, got none")
    return kernels


def _link(tier: Tier, row: Tier, kernel: int, features: int) -> LinearConv2d | DenseLink:
    r"""Creates a link without memory, for its weights to be put in."""
    if row.size == (1, 1):
        return DenseLink(tier.channels, features, size=tier.size, device="meta")
    stride = tier.height // row.height
    return LinearConv2d(
        tier.channels, features, kernel, stride=stride, padding="full", device="meta"
    )


def _cast(link: LinearConv2d | DenseLink, dtype: torch.dtype) -> LinearConv2d | DenseLink:
    r"""Returns a link of another type, with weights that nobody trains."""
    weight = nn.Parameter(link.weight.detach().to(dtype), requires_grad=False)
    cast = copy.copy(link)
    cast._parameters = {"weight": weight}  # the link itself keeps its own
    return cast


def _tile(x: Tensor, size: Sequence[int]) -> Tensor:
    r"""Repeats along the first two dimensions, up to a size."""
    times = size[0] // x.shape[0], size[1] // x.shape[1]
    return x if times == (1, 1) else x.repeat(*times, *[1] * (x.ndim - 2))


def _own(tier: Tier, x: Tensor, blocks: Tensor) -> Tensor:
    r"""Multiplies maps by the blocks of their variables."""
    P, Q, G, k, _ = blocks.shape
    rows, columns = tier.height // P, tier.width // Q
    x = x.permute(0, 2, 3, 1).reshape(len(x), rows, P, columns, Q, G, k)
    x = torch.einsum("bhpwqgy,pqgxy->bhpwqgx", x, blocks)
    return x.reshape(len(x), *tier.size, tier.channels).permute(0, 3, 1, 2)


def _watched(weight: Tensor) -> bool:
    r"""Tells whether somebody differentiates or transforms what is computed of a weight."""
    wrapped = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    return (
        (weight.requires_grad and torch.is_grad_enabled())
        or wrapped is None
        or wrapped(weight)
        or forward_ad.unpack_dual(weight).tangent is not None
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
