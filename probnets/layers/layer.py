r"""What every layer promises."""

__all__ = ["Layer", "LinearLayer", "MapLayer", "TokenLayer"]

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .fans import fan_in
from .promises import is_function, is_per_sample
from .visible import check_visible


class Layer(nn.Module, ABC):
    r"""Is a layer that says what can be relied on.

    Implementing a layer: inherit from :class:`MapLayer`, :class:`TokenLayer` or
    :class:`LinearLayer`, and implement its abstract methods. A layer that holds parameters of
    its own, outside of PyTorch's linear and convolution modules, gives their fan-in by
    ``own_fan_in``; one that begins at values of its own sets them by ``start``. Constructors
    take ``device`` and ``dtype`` and hand them on.
    """

    @property
    def linear(self) -> bool:
        r"""Whether the layer is a linear map, with an exact adjoint."""
        return False

    @property
    def per_sample(self) -> bool:
        r"""Whether in evaluation mode each output depends on its own sample alone."""
        return is_per_sample(self)

    @property
    def function(self) -> bool:
        r"""Whether in training mode too it is a function of its own sample and the weights."""
        return is_function(self)

    @property
    def receptive_field(self) -> int | None:
        r"""The width in pixels of the inputs that one output sees at most, or None for all."""
        return None

    def fan_in(self, name: str) -> int:
        r"""Counts the numbers that a parameter sums or scales, as :func:`~.fans.fan_in`."""
        return fan_in(self, name)

    def own_fan_in(self, name: str) -> int | None:
        r"""Gives the fan-in of a parameter that the layer itself holds, or None."""
        return None

    def start(self, generator: torch.Generator | None) -> None:
        r"""Sets what begins elsewhere than :func:`~.fans.initialise` draws it, in place.

        Arguments:
            generator: The source of randomness.
        """


class MapLayer(Layer):
    r"""Is a layer from maps to maps.

    A layer with stride :math:`s` takes maps of any size :math:`H \times W`, down to one pixel,
    to maps of :math:`\lceil H / s \rceil \times \lceil W / s \rceil`.

    If a mask of visible patches is given, the layer computes what it would if the hidden
    patches did not exist: they are zero wherever neighbours are summed, and are left out of
    averages and of attention. They may hold anything finite; what the layer returns there means
    nothing.

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        stride: The stride :math:`s`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        _check_counts(in_channels, out_channels, stride)
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride

    @property
    def grid(self) -> int:
        r"""The least number of pixels that inputs move by for outputs to move along."""
        return self.stride

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        r"""Computes the output maps.

        Arguments:
            x: The maps, with shape :math:`(B, C, H, W)`.
            visible: Which patches are visible, boolean with shape :math:`(B, 1, h, w)`, where
                :math:`h` divides :math:`H` and the height of the output, as :math:`w` does the
                widths. By default all are.

        Returns:
            The maps, with shape :math:`(B, C', \lceil H / s \rceil, \lceil W / s \rceil)`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(
                f"expected x with shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}"
            )
        if visible is not None:
            check_visible(visible, x, stride=self.stride)
        return self.transform(x, visible)

    @abstractmethod
    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        r"""Computes the output of maps whose shape has been checked."""


class TokenLayer(Layer):
    r"""Is a layer from sets of tokens to sets of as many tokens, of the same width.

    Permuting the tokens permutes the outputs.

    Arguments:
        features: The number of features :math:`D` of a token.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"expected features >= 1, got {features}")
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        r"""Computes the output tokens.

        Arguments:
            x: The tokens, with shape :math:`(B, N, D)`.

        Returns:
            The tokens, with shape :math:`(B, N, D)`.

        Raises:
            ValueError: If the shape does not fit.
        """
        if x.ndim != 3 or x.shape[-1] != self.features or x.shape[1] == 0:
            raise ValueError(
                f"expected x with shape (B, N, {self.features}), got {tuple(x.shape)}"
            )
        return self.transform(x)

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        r"""Computes the output of tokens whose shape has been checked."""


class LinearLayer(Layer):
    r"""Is a linear map :math:`A` between maps, with its adjoint.

    .. math:: \langle A x, y \rangle = \langle x, A^\top y \rangle

    Its weights may learn; in its input it is linear, without a bias.

    Arguments:
        in_channels: The number of input channels :math:`C`.
        out_channels: The number of output channels :math:`C'`.
        stride: The stride :math:`s`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        _check_counts(in_channels, out_channels, stride)
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride

    @property
    def linear(self) -> bool:
        return True

    @abstractmethod
    def out_size(self, size: tuple[int, int]) -> tuple[int, int]:
        r"""Computes the height and width that inputs of this size are mapped to.

        Arguments:
            size: The height and width :math:`(H, W)` of the input.

        Raises:
            ValueError: If there are no such inputs.
        """

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        r"""Computes :math:`A x` for maps whose shape has been checked."""

    @abstractmethod
    def transpose(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        r"""Computes :math:`A^\top y` for maps whose shape has been checked."""

    def forward(self, x: Tensor) -> Tensor:
        r"""Computes :math:`A x` for maps with shape :math:`(B, C, H, W)`."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(
                f"expected x with shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}"
            )
        self.out_size((x.shape[2], x.shape[3]))
        return self.transform(x)

    def adjoint(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        r"""Computes :math:`A^\top y` exactly.

        Arguments:
            y: Maps of the shape that ``forward`` gives for inputs of this size.
            size: The height and width :math:`(H, W)` of the input, which strides leave open.

        Returns:
            The maps, with shape :math:`(B, C, H, W)`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        shape = self.out_channels, *self.out_size(size)
        if y.ndim != 4 or y.shape[1:] != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(
                f"expected y with shape (B, {expected}), for inputs of size {size}, "
                f"got {tuple(y.shape)}"
            )
        return self.transpose(y, size)

    def dense(self, size: tuple[int, int]) -> Tensor:
        r"""Returns the matrix of the map, for small sizes.

        Arguments:
            size: The height and width :math:`(H, W)` of the input.

        Returns:
            The matrix :math:`A`, with shape :math:`(C' H' W', C H W)`.
        """
        like = next(self.parameters(), torch.empty(()))
        count = self.in_channels * math.prod(size)
        basis = torch.eye(count, device=like.device, dtype=like.dtype)
        return self(basis.view(count, self.in_channels, *size)).flatten(1).T

    def gram(self, x: Tensor) -> Tensor:
        r"""Computes :math:`A^\top A x` for maps with shape :math:`(B, C, H, W)`."""
        height, width = x.shape[-2:]
        return self.adjoint(self(x), (height, width))


def _check_counts(in_channels: int, out_channels: int, stride: int) -> None:
    counts = {"in_channels": in_channels, "out_channels": out_channels, "stride": stride}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")
