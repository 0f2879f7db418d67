r"""Plain stacks of convolutions, without short cuts."""

__all__ = ["ConvNormAct", "PlainStack"]

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .activations import Activation
from .activations import activation as make_activation
from .convolution import Conv2d, chain_fields
from .layer import MapLayer
from .norms import NormName
from .norms import norm as make_norm


class ConvNormAct(MapLayer):
    r"""Creates a convolution, followed by a norm and an activation.

    .. math:: y = \sigma(\mathrm{norm}(W * x))

    The convolution has a bias only where no norm with weights follows.

    References:
        | Lets keep it simple, Using simple architectures to outperform deeper and more complex
        | architectures (Hasanpour et al., 2016)
        | https://arxiv.org/abs/1608.06037

    Used by: backbones of circuits, priors and bottleneck; external fields of boltzmann.

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        kernel_size: The width :math:`k` of the kernel, odd or equal to the stride.
        stride: The stride :math:`s`.
        dilation: The distance of the taps, with odd kernels only.
        groups: The number of groups of channels that do not mix.
        norm: The name of the norm.
        activation: The name of the activation :math:`\sigma`.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> ConvNormAct(3, 8, stride=2)(torch.randn(2, 3, 7, 5)).shape
        torch.Size([2, 8, 4, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm: NormName = "batch",
        activation: Activation = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride)
        self.conv = Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            dilation=dilation,
            groups=groups,
            bias=norm in ("none", "layer_plain"),
            device=device,
            dtype=dtype,
        )
        self.norm = make_norm(norm, out_channels, device=device, dtype=dtype)
        self.activation = make_activation(activation)

    @property
    def receptive_field(self) -> int | None:
        return chain_fields([self.conv, self.norm])

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        return self.activation(self.norm(self.conv(x, visible), visible))


class PlainStack(MapLayer):
    r"""Creates a stack of convolutions with norms and activations, without short cuts.

    .. math:: y = (f_L \circ \dots \circ f_1)(x) \qquad f_l(x) = \sigma(\mathrm{norm}(W_l * x))

    With ``patches=True``, ``norm="none"`` and ``activation="relu"`` no two outputs of a layer
    share an input. If weights are drawn from :math:`\mathcal{N}(0, \sigma^2 / \text{fan-in})`
    and the widths grow, the stack becomes a Gaussian process, whose kernel is cheap and exact:
    layer by layer a mean over patches and an arc-cosine.

    With ``zero_last=True`` the stack starts as the function that is zero everywhere.

    References:
        | Lets keep it simple, Using simple architectures to outperform deeper and more complex
        | architectures (Hasanpour et al., 2016)
        | https://arxiv.org/abs/1608.06037

        | What Can Be Learnt With Wide Convolutional Neural Networks? (Cagnetta et al., 2022)
        | https://arxiv.org/abs/2208.01003

    Used by: backbones of circuits, priors and bottleneck; external fields of boltzmann. In
    patches, the exact limit that samples of priors are compared with.

    Arguments:
        in_channels: The number of input channels.
        widths: The number of output channels of each layer.
        kernel_size: The width :math:`k` of all kernels, odd unless they are patches.
        reduce: After which layers, counted from zero, a maximum over :math:`2 \times 2` pixels
            halves the map, rounding up.
        patches: Whether each layer has stride :math:`k`, so that its patches do not overlap.
        norm: The name of the norms.
        activation: The name of the activations :math:`\sigma`.
        zero_last: Whether the last convolution starts at zero, and has no norm and activation.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> PlainStack(3, [8, 8, 16], reduce=[1])(torch.randn(2, 3, 7, 5)).shape
        torch.Size([2, 16, 4, 3])
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        *,
        kernel_size: int = 3,
        reduce: Sequence[int] = (),
        patches: bool = False,
        norm: NormName = "batch",
        activation: Activation = "relu",
        zero_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not widths:
            raise ValueError("expected the width of one layer or more, got none")
        if len(set(reduce)) < len(reduce) or not set(reduce) <= set(range(len(widths))):
            raise ValueError(
                f"expected reduce to name layers 0 to {len(widths) - 1}, each once at most, "
                f"got {list(reduce)}"
            )
        if patches and reduce:
            raise ValueError(
                f"expected no reduce with patches, got {list(reduce)}; "
                "patches reduce the map already"
            )
        stride = kernel_size if patches else 1
        total = stride ** len(widths) * 2 ** len(reduce)
        super().__init__(in_channels, widths[-1], stride=total)

        layers: list[MapLayer] = []
        inputs = [in_channels, *widths]
        for index, width in enumerate(widths):
            last = zero_last and index == len(widths) - 1
            layer = ConvNormAct(
                inputs[index],
                width,
                kernel_size,
                stride=stride,
                norm="none" if last else norm,
                activation="none" if last else activation,
                device=device,
                dtype=dtype,
            )
            layers.append(layer)
            if index in reduce:
                layers.append(_MaxPool(width, width, stride=2))
        self.layers = nn.ModuleList(layers)
        self.zero_last = zero_last
        self.start(None)

    def start(self, generator: torch.Generator | None) -> None:
        r"""Sets the last convolution to zero, if that is where it starts."""
        if self.zero_last:
            for parameter in self.layers[-1].parameters():
                nn.init.zeros_(parameter)

    @property
    def receptive_field(self) -> int | None:
        return chain_fields(cast("list[MapLayer]", self.layers))

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, visible)
        return x


class _MaxPool(MapLayer):
    # A mask that fits the pooled map hides whole windows, so no maximum sees beyond its patch.

    @property
    def receptive_field(self) -> int:
        return self.stride

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        return nn.functional.max_pool2d(x, self.stride, ceil_mode=True)
