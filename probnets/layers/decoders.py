r"""Light decoders that pre-training puts on backbones, and then throws away."""

__all__ = ["Decoder", "FillHidden", "MapDecoder", "TokenDecoder"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .convolution import Conv2d
from .layer import MapLayer, TokenLayer
from .norms import norm
from .plain import ConvNormAct
from .tokens import OnMaps, sincos_positions
from .visible import expand


class Decoder(nn.Module):
    r"""Is a decoder from the maps of a backbone to images."""

    def forward(self, maps: Sequence[Tensor], visible: Tensor) -> Tensor:
        r"""Predicts the images.

        Arguments:
            maps: The maps of all stages, with shapes :math:`(B, C_i, H_i, W_i)`.
            visible: Which patches are visible, with shape :math:`(B, 1, h, w)`.

        Returns:
            The images, with shape :math:`(B, C, H, W)`.
        """
        raise NotImplementedError


class FillHidden(MapLayer):
    r"""Creates a layer that puts a learned vector, at first zero, in all hidden places.

    Used by: the pre-training of encoders for bottleneck and circuits.

    Arguments:
        channels: The number of channels.
        device: The device.
        dtype: The type of the weights.
    """

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        self.value = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    @property
    def receptive_field(self) -> int:
        return 1

    def own_fan_in(self, name: str) -> int:
        return 1

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        if visible is None:
            return x
        return torch.where(expand(visible, x).bool(), x, self.value[:, None, None])


class MapDecoder(Decoder):
    r"""Creates a decoder that reads all stages, from the coarsest to the finest.

    At each stage the hidden places are filled with a learned vector, the map is projected and
    added to what comes from the coarser ones, which is enlarged and convolved.

    References:
        | Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling
        | (Tian et al., 2023)
        | https://arxiv.org/abs/2301.03580

    Used by: the pre-training of encoders for bottleneck and circuits.

    Arguments:
        widths: The number of channels :math:`C_i` of each stage.
        stem: The stride of the first stage.
        channels: The number of channels :math:`C` of an image.
        width: The number of channels at the coarsest stage, halved at each finer one down to 16.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> decoder = MapDecoder([8, 16], 2, 1, width=32)
        >>> maps = [torch.randn(3, 8, 8, 8), torch.randn(3, 16, 4, 4)]
        >>> decoder(maps, torch.rand(3, 1, 4, 4) > 0.5).shape
        torch.Size([3, 1, 16, 16])
    """

    def __init__(
        self,
        widths: Sequence[int],
        stem: int,
        channels: int,
        *,
        width: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        own = [max(16, width // 2**i) for i in range(len(widths))]  # from the coarsest
        self.norms, self.holes = nn.ModuleList(), nn.ModuleList()
        self.projections, self.enlargers = nn.ModuleList(), nn.ModuleList()
        for stage, (given, out) in enumerate(zip(reversed(widths), own, strict=True)):
            self.norms.append(norm("layer", given, **kwargs))
            self.holes.append(FillHidden(given, **kwargs))
            self.projections.append(Conv2d(given, out, 3, **kwargs))
            if stage:
                self.enlargers.append(
                    nn.Sequential(
                        nn.Upsample(scale_factor=2),
                        ConvNormAct(own[stage - 1], out, norm="group", **kwargs),
                        Conv2d(out, out, 3, **kwargs),
                    )
                )
        self.norm = norm("layer", own[-1], **kwargs)
        self.pixels = Conv2d(own[-1], channels * stem**2, **kwargs)
        self.shuffle = nn.PixelShuffle(stem)

    def forward(self, maps: Sequence[Tensor], visible: Tensor) -> Tensor:
        y = None
        parts = zip(reversed(maps), self.norms, self.holes, self.projections, strict=True)
        for stage, (x, norm_, fill, project) in enumerate(parts):
            filled = project(fill(norm_(x), visible))
            y = filled if y is None else filled + self.enlargers[stage - 1](y)
        assert y is not None
        return self.shuffle(self.pixels(self.norm(y)))


class TokenDecoder(Decoder):
    r"""Creates a decoder that reads the last stage as tokens.

    Hidden places get a learned token, all tokens their positions. After a few layers each
    token gives the pixels of its place.

    References:
        | Masked Autoencoders Are Scalable Vision Learners (He et al., 2021)
        | https://arxiv.org/abs/2111.06377
        | Masked Completion via Structured Diffusion with White-Box Transformers
        | (Pai et al., 2024)
        | https://arxiv.org/abs/2404.02446

    Used by: the pre-training of encoders for bottleneck and circuits.

    Arguments:
        in_channels: The number of channels of the last stage.
        stride: Its stride.
        channels: The number of channels :math:`C` of an image.
        layer: Creates a layer of tokens from their width.
        depth: The number of layers.
        width: The width of the tokens, a multiple of four.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> from probnets.layers import CrateDecoderBlock
        >>> decoder = TokenDecoder(8, 4, 1, layer=lambda D: CrateDecoderBlock(D, heads=2))
        >>> decoder([torch.randn(3, 8, 5, 5)], torch.rand(3, 1, 5, 5) > 0.5).shape
        torch.Size([3, 1, 20, 20])
    """

    def __init__(
        self,
        in_channels: int,
        stride: int,
        channels: int,
        *,
        layer: Callable[[int], TokenLayer],
        depth: int = 2,
        width: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width = width
        self.project = Conv2d(in_channels, width, **kwargs)
        self.fill = FillHidden(width, **kwargs)
        self.layers = nn.Sequential(
            *(OnMaps(layer(width)).to(device=device, dtype=dtype) for _ in range(depth))
        )
        self.norm = norm("layer", width, **kwargs)
        self.pixels = Conv2d(width, channels * stride**2, **kwargs)
        self.shuffle = nn.PixelShuffle(stride)

    def forward(self, maps: Sequence[Tensor], visible: Tensor) -> Tensor:
        x = self.fill(self.project(maps[-1]), visible)
        height, width = x.shape[2:]
        x = self.layers(x + sincos_positions(height, width, x, channels=self.width))
        return self.shuffle(self.pixels(self.norm(x)))
