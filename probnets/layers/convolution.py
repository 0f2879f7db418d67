r"""The convolution that all blocks are built of."""

__all__ = ["Conv2d", "chain_fields"]

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .layer import MapLayer
from .visible import hide


class Conv2d(MapLayer):
    r"""Creates a convolution that keeps the size of maps, up to its stride.

    Kernels of odd width are centred, with zeros around the map. Patches, whose kernel is as
    wide as their stride, get zeros to the right and below where the size is no multiple of it.

    Used by: all blocks, hence by circuits, boltzmann, priors and bottleneck.

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        kernel_size: The width :math:`k` of the kernel, odd or equal to the stride.
        stride: The stride :math:`s`.
        dilation: The distance of the taps, with odd kernels only.
        groups: The number of groups of channels that do not mix.
        bias: Whether to add a bias.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> Conv2d(3, 8, 3, stride=2)(torch.randn(2, 3, 7, 5)).shape
        torch.Size([2, 8, 4, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride)
        patches = kernel_size == stride and dilation == 1
        if kernel_size < 1 or dilation < 1 or not (kernel_size % 2 or patches):
            raise ValueError(
                "expected an odd kernel_size, or one equal to the stride without dilation, got "
                f"kernel_size {kernel_size}, stride {stride} and dilation {dilation}"
            )
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"expected groups that divide {in_channels} and {out_channels} channels, "
                f"got {groups}"
            )
        self.patches = patches and kernel_size > 1
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=0 if self.patches else dilation * (kernel_size // 2),
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    @property
    def receptive_field(self) -> int:
        return self.conv.dilation[0] * (self.conv.kernel_size[0] - 1) + 1

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        if self.receptive_field > 1:
            x = hide(x, visible)
        if self.patches:
            height, width = (-size % self.stride for size in x.shape[2:])
            if height or width:
                x = nn.functional.pad(x, (0, width, 0, height))
        return self.conv(x)


def chain_fields(layers: Iterable[MapLayer]) -> int | None:
    r"""Bounds the receptive field of layers one after the other.

    It is exact if all layers are convolutions. Those that cut maps into blocks or cells may be
    aligned such that an output sees less.

    Arguments:
        layers: The layers, the first one first.

    Returns:
        The width in pixels of the inputs that one output sees at most, or None if it sees all.

    Example:
        >>> chain_fields([Conv2d(1, 1, 3, stride=2), Conv2d(1, 1, 3)])
        7
    """
    field = 1
    for layer in reversed(list(layers)):
        own = layer.receptive_field
        if own is None:
            return None
        # From the first to the last output, inputs move by whole cells of the grid.
        field = own + layer.grid * -(-(field - 1) * layer.stride // layer.grid)
    return field
