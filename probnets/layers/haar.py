r"""Haar transforms, orthonormal and of integers."""

__all__ = ["Haar", "Subbands", "integer_haar", "integer_haar_inverse"]

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layer import LinearLayer
from .linearconv import LinearConv2d

# The types of integers, and those that they are computed in.
_COMPUTED = {
    torch.uint8: torch.int32,
    torch.int8: torch.int32,
    torch.uint16: torch.int32,
    torch.int16: torch.int32,
    torch.int32: torch.int32,
    torch.uint32: torch.int64,
    torch.int64: torch.int64,
}


class Haar(LinearLayer):
    r"""Creates an orthonormal Haar transform, whose adjoint is its inverse.

    The four pixels of each square become four sub-bands,

    .. math:: \begin{pmatrix} LL & LH \\ HL & HH \end{pmatrix} = \frac{1}{2}
        \begin{pmatrix} 1 & 1 \\ 1 & -1 \end{pmatrix}
        \begin{pmatrix} x_{00} & x_{01} \\ x_{10} & x_{11} \end{pmatrix}
        \begin{pmatrix} 1 & 1 \\ 1 & -1 \end{pmatrix} .

    The first letter is for the vertical and the second for the horizontal direction. Channels
    are ordered LL of all inputs, then LH, HL and HH of all. Each further level transforms all
    channels again, sub-bands included (wavelet packets), so that a level always has four times
    the channels of the one before.

    As a coupling it is followed by a convolution that learns: on its own, its Gram is the
    identity. The norm of the two is that of the convolution.

    References:
        | WaveMix: A Resource-efficient Neural Network for Image Analysis (Jeevan et al., 2022)
        | https://arxiv.org/abs/2205.14375

    Used by: backbones of circuits and bottleneck, through wavelet mixing; for couplings of
    boltzmann it is there as a convolution.

    Arguments:
        channels: The number of input channels :math:`C`.
        levels: The number of levels :math:`L`.
        device: Ignored, as there are no weights.
        dtype: Ignored, as there are no weights.

    Example:
        >>> haar = Haar(3)
        >>> haar(torch.randn(2, 3, 8, 6)).shape
        torch.Size([2, 12, 4, 3])
    """

    def __init__(
        self,
        channels: int,
        *,
        levels: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if levels < 1:
            raise ValueError(f"expected levels >= 1, got {levels}")
        super().__init__(channels, channels * 4**levels, stride=2**levels)
        self.levels = levels

    def extra_repr(self) -> str:
        return f"{self.in_channels}, levels={self.levels}"

    @property
    def receptive_field(self) -> int:
        return self.stride

    def out_size(self, size: tuple[int, int]) -> tuple[int, int]:
        if min(size) < 1 or size[0] % self.stride or size[1] % self.stride:
            raise ValueError(
                f"expected maps with H and W divisible by {self.stride}, got {size[0]} x "
                f"{size[1]}; crop or pad them"
            )
        return size[0] // self.stride, size[1] // self.stride

    def transform(self, x: Tensor) -> Tensor:
        for _ in range(self.levels):
            x = 0.5 * _split(_split(x, -1), -2)
        return x

    def transpose(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        for _ in range(self.levels):
            y = 0.5 * _join(_join(y, -2), -1)
        return y

    def inverse(self, y: Tensor) -> Tensor:
        r"""Undoes the transform.

        Arguments:
            y: The sub-bands, with shape :math:`(B, 4^L C, H / 2^L, W / 2^L)`.

        Returns:
            The maps, with shape :math:`(B, C, H, W)`.
        """
        return self.adjoint(y, (y.shape[-2] * self.stride, y.shape[-1] * self.stride))

    def as_conv(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LinearConv2d:
        r"""Returns the same map as a strided convolution, whose weights are frozen.

        Arguments:
            device: The device.
            dtype: The type of the weights.
        """
        conv = LinearConv2d(
            self.in_channels,
            self.out_channels,
            self.stride,
            stride=self.stride,
            padding=0,
            device=device,
            dtype=dtype,
        )
        basis = torch.eye(self.out_channels, device=device, dtype=dtype)
        frozen = self.inverse(basis[:, :, None, None])
        conv.weight = nn.Parameter(frozen, requires_grad=False)
        return conv


class Subbands(NamedTuple):
    r"""Is an image in four sub-bands.

    Attributes:
        low: The means, with shape :math:`(*, \lceil H / 2 \rceil, \lceil W / 2 \rceil)`.
        horizontal: The differences of columns, with shape
            :math:`(*, \lceil H / 2 \rceil, \lfloor W / 2 \rfloor)`.
        vertical: The differences of rows, with shape
            :math:`(*, \lfloor H / 2 \rfloor, \lceil W / 2 \rceil)`.
        diagonal: The differences of differences, with shape
            :math:`(*, \lfloor H / 2 \rfloor, \lfloor W / 2 \rfloor)`.
    """

    low: Tensor
    horizontal: Tensor
    vertical: Tensor
    diagonal: Tensor


def integer_haar(x: Tensor) -> Subbands:
    r"""Transforms integers into as many integers, which restore them exactly.

    Columns, and then rows, are paired,

    .. math:: \delta = a - b \qquad
        \mu = b + \lfloor \delta / 2 \rfloor = \lfloor (a + b) / 2 \rfloor .

    A last column or row without a partner is its own :math:`\mu`.

    It is computed in int64 for integers in int64 or uint32, and in int32 otherwise. The round
    trip is exact for all of them. Differences are true for :math:`-2^{29} \le x < 2^{29}` in
    int32, which all integers of 16 bits are, and up to :math:`2^{61}` in int64. Beyond, they
    wrap around.

    References:
        | An image multiresolution representation for lossless and lossy compression
        | (Said and Pearlman, 1996)

    Arguments:
        x: The integers, with shape :math:`(*, H, W)`.

    Returns:
        The sub-bands, in int32 or int64.

    Raises:
        TypeError: If the type is not one of integers.

    Example:
        >>> bands = integer_haar(torch.tensor([[7, 4, 9], [1, 2, 3]]))
        >>> bands.low, bands.horizontal
        (tensor([[3, 6]]), tensor([[1]]))
        >>> integer_haar_inverse(bands)
        tensor([[7, 4, 9],
                [1, 2, 3]])
    """
    left, right = _lift(_integers(x), -1)
    (low, vertical), (horizontal, diagonal) = _lift(left, -2), _lift(right, -2)
    return Subbands(low, horizontal, vertical, diagonal)


def integer_haar_inverse(bands: Subbands) -> Tensor:
    r"""Undoes :func:`integer_haar`.

    Arguments:
        bands: The sub-bands.

    Returns:
        The integers, with shape :math:`(*, H, W)`, in int32 or int64.

    Raises:
        TypeError: If the type is not one of integers.
        ValueError: If the sizes are not those of the sub-bands of any image.
    """
    low, horizontal, vertical, diagonal = (_integers(band) for band in bands)
    H, W = low.shape[-2] + vertical.shape[-2], low.shape[-1] + horizontal.shape[-1]
    sizes = [(h, w) for h in (H - H // 2, H // 2) for w in (W - W // 2, W // 2)]
    found = [(*band.shape,) for band in (low, horizontal, vertical, diagonal)]
    if found != [(*low.shape[:-2], *size) for size in sizes]:
        raise ValueError(f"expected four sub-bands of sizes {sizes}, got shapes {found}")
    return _unlift(_unlift(low, vertical, -2), _unlift(horizontal, diagonal, -2), -1)


def _split(x: Tensor, axis: int) -> Tensor:
    r"""Turns the pairs along an axis into sums, and then differences, as channels."""
    a, b = x.unflatten(axis, (x.shape[axis] // 2, 2)).unbind(axis)
    return torch.cat([a + b, a - b], dim=1)


def _join(y: Tensor, axis: int) -> Tensor:
    total, difference = y.chunk(2, dim=1)
    pairs = torch.stack([total + difference, total - difference], dim=axis)
    return pairs.flatten(axis - 1, axis)


def _integers(x: Tensor) -> Tensor:
    if x.dtype not in _COMPUTED:
        raise TypeError(
            f"expected x of an integer dtype up to int64, got {x.dtype}; round it first"
        )
    if x.ndim < 2:
        raise ValueError(f"expected x with shape (*, H, W), got {tuple(x.shape)}")
    return x.to(_COMPUTED[x.dtype])


def _lift(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    r"""Pairs the numbers along an axis, and returns means and differences."""
    x = x.movedim(axis, -1)
    a, b = x[..., ::2], x[..., 1::2]
    paired = b.shape[-1]
    difference = a[..., :paired] - b
    mean = torch.cat([b + (difference >> 1), a[..., paired:]], dim=-1)
    return mean.movedim(-1, axis), difference.movedim(-1, axis)


def _unlift(mean: Tensor, difference: Tensor, axis: int) -> Tensor:
    mean, difference = mean.movedim(axis, -1), difference.movedim(axis, -1)
    paired = difference.shape[-1]
    b = mean[..., :paired] - (difference >> 1)
    pairs = torch.stack([b + difference, b], dim=-1).flatten(-2)
    return torch.cat([pairs, mean[..., paired:]], dim=-1).movedim(-1, axis)
