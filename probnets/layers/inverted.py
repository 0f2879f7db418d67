r"""Inverted residual blocks, wide inside and narrow outside."""

__all__ = ["FusedInvertedResidual", "InvertedResidual", "SqueezeExcite"]

from typing import Literal

import torch
from torch import Tensor, nn

from .activations import Activation
from .activations import activation as make_activation
from .convolution import Conv2d, chain_fields
from .layer import MapLayer
from .norms import NormName
from .plain import ConvNormAct
from .visible import masked_mean
from .widths import hidden_width


class SqueezeExcite(MapLayer):
    r"""Creates a gate of channels by what the whole map holds.

    .. math:: y = x \odot g(W_2 \, \sigma(W_1 \bar{x} + b_1) + b_2)

    :math:`\bar{x}` is the mean over all visible pixels.

    References:
        | Squeeze-and-Excitation Networks (Hu et al., 2017)
        | https://arxiv.org/abs/1709.01507

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        channels: The number of channels :math:`C`.
        reduced: The number of channels between :math:`W_1` and :math:`W_2`.
        activation: The name of the activation :math:`\sigma`.
        gate: The name of the gate :math:`g`.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> SqueezeExcite(16, reduced=4)(torch.randn(2, 16, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        reduced: int,
        activation: Activation = "relu",
        gate: Literal["sigmoid", "hardsigmoid"] = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        if reduced < 1:
            raise ValueError(f"expected reduced >= 1, got {reduced}")
        if gate not in ("sigmoid", "hardsigmoid"):
            raise ValueError(f"expected a gate of sigmoid and hardsigmoid, got {gate!r}")
        self.down = Conv2d(channels, reduced, device=device, dtype=dtype)
        self.activation = make_activation(activation)
        self.up = Conv2d(reduced, channels, device=device, dtype=dtype)
        self.gate = nn.Sigmoid() if gate == "sigmoid" else nn.Hardsigmoid()

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        mean = masked_mean(x, visible)  # (B, C, 1, 1)
        return x * self.gate(self.up(self.activation(self.down(mean))))


class InvertedResidual(MapLayer):
    r"""Creates an inverted residual block: expand, filter each channel, project.

    .. math:: y = x + \rho \, P \, \mathrm{SE}(\sigma(D * \sigma(E x)))

    :math:`E` and :math:`P` are :math:`1 \times 1`, and :math:`D` is depthwise. Each is followed
    by a norm. The projection is linear, without an activation. The short cut exists only with
    stride one and as many output as input channels.

    References:
        | MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al., 2018)
        | https://arxiv.org/abs/1801.04381

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels. By default as many.
        kernel_size: The width :math:`k` of the depthwise kernel.
        stride: The stride :math:`s`.
        expansion: How many times wider the block is inside. If 1, there is no :math:`E`.
        squeeze: The share of the inner channels that :class:`SqueezeExcite` reduces them to,
            rounded, to one or more. If 0, there is none.
        norm: The name of the norms. Convolutions have biases if these have no weights.
        activation: The name of the activations :math:`\sigma`.
        res_scale: The fixed factor :math:`\rho` of the branch beside a short cut.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> InvertedResidual(8, 16, stride=2)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 16, 4, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        expansion: float = 6.0,
        squeeze: float = 0.0,
        norm: NormName = "batch",
        activation: Activation = "relu6",
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        super().__init__(in_channels, out_channels, stride=stride)
        _check(squeeze)
        self.res_scale = res_scale
        self.residual = stride == 1 and in_channels == out_channels
        hidden = hidden_width(in_channels, expansion)

        self.expand = None
        if hidden != in_channels:
            self.expand = ConvNormAct(
                in_channels,
                hidden,
                1,
                norm=norm,
                activation=activation,
                device=device,
                dtype=dtype,
            )
        self.depthwise = ConvNormAct(
            hidden,
            hidden,
            kernel_size,
            stride=stride,
            groups=hidden,
            norm=norm,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.squeeze = _squeeze(hidden, squeeze, activation, device=device, dtype=dtype)
        self.project = ConvNormAct(
            hidden, out_channels, 1, norm=norm, activation="none", device=device, dtype=dtype
        )

    @property
    def receptive_field(self) -> int | None:
        return chain_fields(self._branch())

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        y = x
        for layer in self._branch():
            y = layer(y, visible)
        return x + self.res_scale * y if self.residual else y

    def _branch(self) -> list[MapLayer]:
        layers = self.expand, self.depthwise, self.squeeze, self.project
        return [layer for layer in layers if layer is not None]


class FusedInvertedResidual(MapLayer):
    r"""Creates an inverted residual block that expands and filters in one convolution.

    .. math:: y = x + \rho \, P \, \mathrm{SE}(\sigma(E * x))

    :math:`E` is :math:`k \times k` over all channels, and :math:`P` is :math:`1 \times 1`. Each
    is followed by a norm. The projection is linear, without an activation. The short cut exists
    only with stride one and as many output as input channels.

    References:
        | EfficientNetV2: Smaller Models and Faster Training (Tan and Le, 2021)
        | https://arxiv.org/abs/2104.00298

        | AsCAN: Asymmetric Convolution-Attention Networks for Efficient Recognition and
        | Generation (Kag et al., 2024)
        | https://arxiv.org/abs/2411.04967

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels. By default as many.
        kernel_size: The width :math:`k` of the expanding kernel.
        stride: The stride :math:`s`.
        expansion: How many times wider the block is inside.
        squeeze: The share of the inner channels that :class:`SqueezeExcite` reduces them to,
            rounded, to one or more. If 0, there is none.
        norm: The name of the norms. Convolutions have biases if these have no weights.
        activation: The name of the activations :math:`\sigma`.
        res_scale: The fixed factor :math:`\rho` of the branch beside a short cut.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> FusedInvertedResidual(8, squeeze=0.25)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 8, 7, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        expansion: float = 4.0,
        squeeze: float = 0.0,
        norm: NormName = "batch",
        activation: Activation = "gelu",
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        super().__init__(in_channels, out_channels, stride=stride)
        _check(squeeze)
        self.res_scale = res_scale
        self.residual = stride == 1 and in_channels == out_channels
        hidden = hidden_width(in_channels, expansion)

        self.expand = ConvNormAct(
            in_channels,
            hidden,
            kernel_size,
            stride=stride,
            norm=norm,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.squeeze = _squeeze(hidden, squeeze, activation, device=device, dtype=dtype)
        self.project = ConvNormAct(
            hidden, out_channels, 1, norm=norm, activation="none", device=device, dtype=dtype
        )

    @property
    def receptive_field(self) -> int | None:
        return chain_fields(self._branch())

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        y = x
        for layer in self._branch():
            y = layer(y, visible)
        return x + self.res_scale * y if self.residual else y

    def _branch(self) -> list[MapLayer]:
        layers = self.expand, self.squeeze, self.project
        return [layer for layer in layers if layer is not None]


def _check(squeeze: float) -> None:
    if not 0 <= squeeze <= 1:
        raise ValueError(f"expected squeeze in [0, 1], got {squeeze}")


def _squeeze(
    channels: int,
    share: float,
    activation: Activation,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> SqueezeExcite | None:
    if share == 0:
        return None
    reduced = max(1, round(share * channels))
    return SqueezeExcite(
        channels, reduced=reduced, activation=activation, device=device, dtype=dtype
    )
