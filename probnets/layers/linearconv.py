r"""Linear maps between maps, with exact adjoints."""

__all__ = ["Composition", "LinearConv2d"]

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from .layer import LinearLayer


class LinearConv2d(LinearLayer):
    r"""Creates a convolution without bias, with its exact adjoint and the blocks of its Gram.

    .. math:: (A x)_o = \sum_\tau W_\tau \, x_{s o + d \tau - p}

    A Boltzmann machine whose variables are one-hot groups of channels at each pixel couples
    them by :math:`\mathrm{blkdiag}(A^\top A) - A^\top A`, which is symmetric and has no
    self-coupling.

    The zeros :math:`p` around the map are, with :math:`m = d (k - 1) + 1`,

    - ``same``: :math:`\lceil (m - 1) / 2 \rceil`. Maps shrink to :math:`\lceil H / s \rceil`, or
      to :math:`\lfloor H / s \rfloor + 1` if :math:`m` is even, as that of an even kernel is.
    - ``full``: :math:`\max(0, \lceil (s (m - 2) + m) / 2 \rceil)`. Every pixel meets every tap
      that its place modulo :math:`s` allows, at borders as inside, so that the blocks depend on
      that place alone. Maps whose size :math:`s` divides shrink to :math:`H / s + m - 1`.
      Without the maximum, pixels would be cut off where :math:`k = 1` and :math:`s \ge 3`.

    References:
        | Monotone deep Boltzmann machines (Feng et al., 2023)
        | https://arxiv.org/abs/2307.04990

    Used by: couplings of boltzmann.

    Arguments:
        in_channels: The number of input channels :math:`C`.
        out_channels: The number of output channels :math:`C'`.
        kernel_size: The width :math:`k` of the kernel, odd or even.
        stride: The stride :math:`s`.
        padding: The number of zeros :math:`p` on each side, or their rule.
        dilation: The distance :math:`d` of the taps.
        groups: The number of groups of channels that do not mix.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> A = LinearConv2d(6, 8, 3, stride=2, padding="full")
        >>> x = torch.randn(2, 6, 10, 10)
        >>> A(x).shape, A.block_gram(2).shape, A.hollow_gram(x, 2).shape
        (torch.Size([2, 8, 7, 7]), torch.Size([2, 2, 2, 3, 3]), torch.Size([2, 6, 10, 10]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | Literal["same", "full"] = "same",
        dilation: int = 1,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride)
        if kernel_size < 1 or dilation < 1:
            raise ValueError(
                f"expected kernel_size >= 1 and dilation >= 1, got {kernel_size} and {dilation}"
            )
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"expected groups that divide {in_channels} and {out_channels} channels, "
                f"got {groups}"
            )
        self.kernel_size, self.dilation, self.groups = kernel_size, dilation, groups
        self.full = padding == "full"
        self.padding = _padding(padding, self.receptive_field, stride)

        shape = out_channels, in_channels // groups, kernel_size, kernel_size
        draw = torch.randn(shape, device=device, dtype=dtype)
        self.weight = nn.Parameter(draw / math.sqrt(math.prod(shape[1:])))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, "
            f"stride={self.stride}, padding={'full' if self.full else self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}"
        )

    @property
    def receptive_field(self) -> int:
        return self.dilation * (self.kernel_size - 1) + 1

    def own_fan_in(self, name: str) -> int | None:
        return self.weight[0].numel() if name == "weight" else None

    def out_size(self, size: tuple[int, int]) -> tuple[int, int]:
        least = max(1, self.receptive_field - 2 * self.padding)
        if min(size) < least:
            raise ValueError(
                f"expected maps of {least} x {least} pixels or more, got {size[0]} x {size[1]}; "
                "take a smaller kernel or more padding"
            )
        more = 2 * self.padding - self.receptive_field
        height, width = ((n + more) // self.stride + 1 for n in size)
        return height, width

    def transform(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(
            x,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def transpose(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        # Rows and columns at the end that no window reaches, fewer than the stride.
        rest = [(n + 2 * self.padding - self.receptive_field) % self.stride for n in size]
        return nn.functional.conv_transpose2d(
            y,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            output_padding=rest,
            dilation=self.dilation,
            groups=self.groups,
        )

    def block_gram(self, groups: int, *, size: tuple[int, int] | None = None) -> Tensor:
        r"""Computes the diagonal blocks of :math:`A^\top A`, one a variable.

        The channels of a pixel are :math:`G` variables of :math:`n = C / G` states.

        Arguments:
            groups: The number of variables :math:`G` of a pixel.
            size: The height and width :math:`(H, W)` of the input. With full padding it may be
                left out.

        Returns:
            The blocks, with shape :math:`(H, W, G, n, n)`. Without a size, those of the pixels
            at :math:`(p, q)` modulo :math:`s`, with shape :math:`(s, s, G, n, n)`.

        Raises:
            ValueError: If the size is needed, or the groups do not divide the channels.
        """
        if groups < 1 or self.in_channels % groups:
            raise ValueError(
                f"expected groups that divide {self.in_channels} channels, got {groups}"
            )
        if size is not None:
            counts = zip(size, self.out_size(size), strict=True)
            rows, columns = (self._meets(n, out) for n, out in counts)
        elif self.full:
            rows = columns = self._meets(self.stride, None)
        else:
            raise ValueError(
                "expected size=(H, W), got None; without full padding blocks change at borders"
            )
        blocks = torch.einsum("jb,abgxy->ajgxy", columns, self._tap_grams(groups))
        return torch.einsum("ia,ajgxy->ijgxy", rows, blocks)

    def hollow_gram(self, x: Tensor, groups: int) -> Tensor:
        r"""Computes :math:`(A^\top A - \mathrm{blkdiag}(A^\top A)) \, x`.

        Its negative couples the variables of a Boltzmann machine.

        Arguments:
            x: The maps, with shape :math:`(B, C, H, W)`.
            groups: The number of variables :math:`G` of a pixel.

        Returns:
            The maps, with shape :math:`(B, C, H, W)`.
        """
        gram = self.gram(x)
        height, width = x.shape[2:]
        blocks = self.block_gram(groups, size=None if self.full else (height, width))
        P, Q, _, states, _ = blocks.shape
        tiles = nn.functional.pad(x, (0, -width % Q, 0, -height % P))
        rows, columns = tiles.shape[2] // P, tiles.shape[3] // Q
        squares = tiles.view(len(x), groups, states, rows, P, columns, Q)
        own = torch.einsum("pqgxy,bgyhpwq->bgxhpwq", blocks, squares).reshape(tiles.shape)
        return gram - own[:, :, :height, :width]

    def _meets(self, count: int, out: int | None) -> Tensor:
        r"""Tells which of the pixels meet which taps along one axis, with shape (count, k)."""
        pixels = torch.arange(count, device=self.weight.device)[:, None]
        taps = torch.arange(self.kernel_size, device=self.weight.device)
        moved = pixels + self.padding - self.dilation * taps
        meets = moved % self.stride == 0
        if out is not None:
            meets = meets & (moved >= 0) & (moved < self.stride * out)
        return meets.to(self.weight.dtype)

    def _tap_grams(self, groups: int) -> Tensor:
        r"""Computes :math:`W_\tau^\top W_\tau` within each variable, as (k, k, G, n, n)."""
        K, states = self.kernel_size, self.in_channels // groups
        # The weights of each input channel, towards the outputs of its own group.
        columns = self.weight.view(self.groups, -1, self.in_channels // self.groups, K, K)
        columns = columns.transpose(1, 2).reshape(groups, states, -1, K, K)  # (G, n, o, k, k)
        grams = torch.einsum("gxoab,gyoab->abgxy", columns, columns)

        channels = torch.arange(self.in_channels, device=self.weight.device)
        home = (channels // (self.in_channels // self.groups)).view(groups, states)
        return grams * (home[:, :, None] == home[:, None, :])


class Composition(LinearLayer):
    r"""Creates a chain of linear maps, the first one applied first.

    .. math:: A = A_L \cdots A_1 \qquad A^\top = A_1^\top \cdots A_L^\top

    Used by: nothing yet; made for couplings of boltzmann across scales.

    Arguments:
        layers: The linear maps, each with as many input channels as the one before returns.

    Example:
        >>> from probnets.layers import Haar
        >>> A = Composition(Haar(3), LinearConv2d(12, 5, 3))
        >>> A(torch.randn(2, 3, 8, 6)).shape
        torch.Size([2, 5, 4, 3])
    """

    def __init__(self, *layers: LinearLayer) -> None:
        if not layers:
            raise ValueError("expected one linear map or more, got none")
        for first, second in pairwise(layers):
            if first.out_channels != second.in_channels:
                raise ValueError(
                    f"expected a map of {first.out_channels} channels to follow one that returns "
                    f"as many, got {second.in_channels}"
                )
        stride = math.prod(layer.stride for layer in layers)
        super().__init__(layers[0].in_channels, layers[-1].out_channels, stride=stride)
        self.layers = nn.ModuleList(layers)

    @property
    def receptive_field(self) -> int | None:
        field, jump = 1, 1
        for layer in self._maps():
            own = layer.receptive_field
            if own is None:
                return None
            field += (own - 1) * jump
            jump *= layer.stride
        return field

    def out_size(self, size: tuple[int, int]) -> tuple[int, int]:
        for layer in self._maps():
            size = layer.out_size(size)
        return size

    def transform(self, x: Tensor) -> Tensor:
        for layer in self._maps():
            x = layer(x)
        return x

    def transpose(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        steps = []
        for layer in self._maps():
            steps.append((layer, size))
            size = layer.out_size(size)
        for layer, before in reversed(steps):
            y = layer.adjoint(y, before)
        return y

    def _maps(self) -> list[LinearLayer]:
        return list(self.layers)  # type: ignore[arg-type]


def _padding(rule: int | str, field: int, stride: int) -> int:
    if rule == "same":
        return field // 2
    if rule == "full":
        return max(0, -((2 * stride - (stride + 1) * field) // 2))
    if isinstance(rule, str) or rule < 0:
        raise ValueError(f"expected padding >= 0, 'same' or 'full', got {rule!r}")
    return rule
