r"""Residual blocks whose short cuts stay clean."""

__all__ = ["PreActivationBlock"]

import torch
from torch import Tensor

from .activations import Activation
from .activations import activation as make_activation
from .convolution import Conv2d, chain_fields
from .layer import MapLayer
from .norms import NormName
from .norms import norm as make_norm


class PreActivationBlock(MapLayer):
    r"""Creates a residual block that norms and activates before it convolves.

    .. math:: y = x + \rho \, W_2 * \sigma(\mathrm{norm}(W_1 * a))
        \qquad a = \sigma(\mathrm{norm}(x))

    Where the stride or the number of channels changes the shape, the short cut is a linear
    :math:`1 \times 1` convolution :math:`S * a` in place of :math:`x`.

    For a network of :math:`L` blocks without norms, :math:`\rho = 1 / \sqrt{2 L}` keeps the
    scale of what flows through it.

    References:
        | Identity Mappings in Deep Residual Networks (He et al., 2016)
        | https://arxiv.org/abs/1603.05027

    Used by: backbones of circuits, priors and bottleneck; external fields of boltzmann.

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels. By default as many.
        stride: The stride :math:`s`, of :math:`W_1` and :math:`S`.
        norm: The name of the norms. :math:`W_1` and :math:`W_2` have biases if these have no
            weights.
        activation: The name of the activations :math:`\sigma`.
        res_scale: The fixed factor :math:`\rho` of the branch beside the short cut.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> PreActivationBlock(8, 16, stride=2)(torch.randn(2, 8, 7, 5)).shape
        torch.Size([2, 16, 4, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        stride: int = 1,
        norm: NormName = "group",
        activation: Activation = "relu",
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        super().__init__(in_channels, out_channels, stride=stride)
        self.res_scale = res_scale
        bias = norm in ("none", "layer_plain")

        self.first_norm = make_norm(norm, in_channels, device=device, dtype=dtype)
        self.first = Conv2d(
            in_channels, out_channels, 3, stride=stride, bias=bias, device=device, dtype=dtype
        )
        self.second_norm = make_norm(norm, out_channels, device=device, dtype=dtype)
        self.second = Conv2d(out_channels, out_channels, 3, bias=bias, device=device, dtype=dtype)
        self.activation = make_activation(activation)
        self.shortcut = None
        if stride > 1 or in_channels != out_channels:
            self.shortcut = Conv2d(
                in_channels, out_channels, stride=stride, bias=False, device=device, dtype=dtype
            )

    @property
    def receptive_field(self) -> int | None:
        return chain_fields([self.first_norm, self.first, self.second_norm, self.second])

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        a = self.activation(self.first_norm(x, visible))
        y = self.activation(self.second_norm(self.first(a, visible), visible))
        y = self.res_scale * self.second(y, visible)
        return y + (x if self.shortcut is None else self.shortcut(a, visible))
