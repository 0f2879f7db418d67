r"""Models that predict the hidden patches of images."""

__all__ = ["MaskedImageModel"]

from typing import Literal

import torch
from torch import Tensor, nn

from .attention import AttentionBlock
from .backbone import Backbone
from .blocks import heads_for
from .crate import CrateDecoderBlock
from .decoders import Decoder, MapDecoder, TokenDecoder
from .fans import initialise
from .visible import expand


class MaskedImageModel(nn.Module):
    r"""Creates a model that learns a backbone by predicting what it does not see.

    Random patches of each image are hidden. The backbone computes what it would if they did
    not exist: convolutions have zeros there and nowhere else, attention has no such tokens. A
    light decoder predicts their pixels, which are compared by mean squares. Each patch of the
    target has been standardised.

    Layouts of one stage of ``T`` blocks have the decoder of masked auto-encoders, those of one
    stage of ``K`` the decoder of CRATE; all others have one that reads the maps of all stages.

    References:
        | Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling
        | (Tian et al., 2023)
        | https://arxiv.org/abs/2301.03580
        | Masked Autoencoders Are Scalable Vision Learners (He et al., 2021)
        | https://arxiv.org/abs/2111.06377

    Arguments:
        backbone: The backbone, which is learned in place.
        patch: The width of a patch in pixels, a multiple of the stride of the backbone, which
            it is by default.
        mask_ratio: The share of patches that are hidden, rounded to leave one at least.
        target: Whether each patch of the target is standardised, or the image as a whole.
        decoder: The decoder. By default it follows from the layout.
        width: The width of that decoder.
        generator: The source of randomness of its weights.

    Example:
        >>> model = MaskedImageModel(Backbone("C-T", in_channels=1, width=16, stem=2))
        >>> x = torch.rand(3, 1, 28, 28)
        >>> visible = model.draw_masks(x)
        >>> visible.shape, model.loss(x, visible).shape
        (torch.Size([3, 1, 7, 7]), torch.Size([]))
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        patch: int | None = None,
        mask_ratio: float = 0.6,
        target: Literal["patch", "image"] = "patch",
        decoder: Decoder | None = None,
        width: int = 128,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        patch = backbone.stride if patch is None else patch
        if patch < 2 or patch % backbone.stride:
            raise ValueError(
                f"expected patches of two pixels or more, a multiple of the stride "
                f"{backbone.stride} of the backbone, got {patch}; give patch="
            )
        if not 0 < mask_ratio < 1:
            raise ValueError(f"expected mask_ratio in (0, 1), got {mask_ratio}")
        if target not in ("patch", "image"):
            raise ValueError(f"expected target 'patch' or 'image', got {target!r}")
        self.backbone, self.patch, self.mask_ratio, self.target = (
            backbone,
            patch,
            mask_ratio,
            target,
        )
        if decoder is None:
            decoder = _decoder(backbone, width)
            initialise(decoder, generator=generator)
        self.decoder = decoder

    def draw_masks(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        r"""Draws which patches of images are visible, as many in each.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            generator: The source of randomness, on the CPU.

        Returns:
            The masks, boolean with shape :math:`(B, 1, H / p, W / p)`, on the images' device.

        Raises:
            ValueError: If images are no multiple of patches, or have but one.
        """
        (height, width), p = x.shape[2:], self.patch
        if height % p or width % p or height * width <= p * p:
            raise ValueError(
                f"expected images whose sides are multiples of {p}, with two patches or more, "
                f"got {height}x{width}; pad or crop them, or choose another stride or patch"
            )
        h, w = height // p, width // p
        count = min(max(1, round(h * w * (1 - self.mask_ratio))), h * w - 1)
        ranks = torch.rand(len(x), h * w, generator=generator).argsort(dim=1).argsort(dim=1)
        return (ranks < count).view(len(x), 1, h, w).to(x.device)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        r"""Predicts the targets from the visible patches.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            visible: Which patches are visible.

        Returns:
            The predictions, with the shape of the images.
        """
        return self.decoder(self.backbone.maps(x, visible), visible)

    def targets(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Computes the targets, and the mean and scale that were taken from each pixel."""
        x = x.to(self.backbone.input_mean.dtype)
        if self.target == "image":
            parts = (self.backbone.input_mean, self.backbone.input_std)
            mean, std = (part[:, None, None] for part in parts)
            return (x - mean) / std, mean.expand_as(x), std.expand_as(x)
        B, C, p = len(x), x.shape[1], self.patch
        blocks = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
        variance, mean = torch.var_mean(blocks, dim=(1, 3, 5), keepdim=True)
        flat = 1e-6 * self.backbone.input_std.square().mean()  # what a flat patch is divided by
        std = (variance + flat).sqrt()
        mean, std = (
            part.expand(B, C, -1, p, -1, p).flatten(4, 5).flatten(2, 3) for part in (mean, std)
        )
        return (x - mean) / std, mean, std

    def loss(self, x: Tensor, visible: Tensor) -> Tensor:
        r"""Computes the mean squared error of the hidden pixels.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            visible: Which patches are visible.
        """
        hidden = 1 - expand(visible, x.to(self.backbone.input_mean.dtype))
        error = (self(x, visible) - self.targets(x)[0]).square()
        return (error * hidden).sum() / (hidden.sum() * x.shape[1])

    @torch.no_grad()
    def reconstruct(self, x: Tensor, visible: Tensor) -> Tensor:
        r"""Fills the hidden patches with what is predicted.

        If patches are standardised, the mean and the scale of the hidden patch are those of
        the image: such pictures show what the model knows of shapes, and are no completions.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            visible: Which patches are visible.

        Returns:
            The images, with shape :math:`(B, C, H, W)`.
        """
        _, mean, std = self.targets(x)
        shown = expand(visible, mean).bool()
        return torch.where(shown, x.to(mean.dtype), self(x, visible) * std + mean)


def _decoder(backbone: Backbone, width: int) -> Decoder:
    like = backbone.input_mean
    device, dtype = like.device, like.dtype
    letters, channels = set(backbone.config["layout"]), backbone.in_channels
    if letters in ({"T"}, {"K"}):
        heads = heads_for(width)
        return TokenDecoder(
            backbone.out_channels,
            backbone.stride,
            channels,
            layer=lambda D: (
                AttentionBlock(D, heads=heads)
                if letters == {"T"}
                else CrateDecoderBlock(D, heads=heads)
            ),
            width=width,
            device=device,
            dtype=dtype,
        )
    return MapDecoder(
        backbone.widths,
        backbone.config["stem"],
        channels,
        width=width,
        device=device,
        dtype=dtype,
    )
