r"""Backbones, composed from a short string."""

__all__ = ["Backbone", "load_backbone", "save_backbone"]

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probnets.backend import checkpoints

from .blocks import BLOCKS, make_block
from .convattention import ConvEmbedding
from .convolution import chain_fields
from .fans import initialise
from .layer import Layer, MapLayer
from .merging import merge
from .norms import NormName
from .norms import norm as make_norm
from .tokens import sincos_positions
from .visible import check_visible, hide, masked_mean

Options = Mapping[str, Any]
Output = Literal["features", "tokens", "maps", "logits"]

_FORMAT = 1


class Backbone(Layer):
    r"""Creates a network of images from a layout such as ``"CC-CC-CCT-TT"``.

    Each letter is a block, as :func:`~probnets.layers.make_block` lists them, and each dash
    halves the map. A stem comes first; a norm of the channels comes last. Layouts that are
    convolutional early, mixed in the middle and attention late make good use of time.

    By default the network is a function of one image and the weights in training too: no norm
    couples the samples of a batch. Images of any size go in.

    References:
        | AsCAN: Asymmetric Convolution-Attention Networks for Efficient Recognition and
        | Generation (Kag et al., 2024)
        | https://arxiv.org/abs/2411.04967

    Used by: circuits, as networks of contexts; made for external fields of boltzmann, Bayesian
    networks of priors and encoders of bottleneck too.

    Arguments:
        layout: The layout.
        in_channels: The number of channels of an image.
        width: The number of channels of the first stage, which each dash doubles; or one for
            each stage.
        stem: The stride of the stem.
        patches: Whether the stem cuts the image into patches, or convolves with overlap.
        norm: The norm of all blocks, as for :func:`~probnets.layers.make_block`. By default each
            has its own.
        res_scale: The factor of residual branches, or ``"depth"`` for :math:`1 / \sqrt{2 L}`
            with :math:`L` blocks.
        options: Further arguments of blocks by letter, such as ``{"T": {"heads": 2}}``, or
            several in turn, such as ``{"A": [{"shift": 0}, {"shift": 4}]}``.
        classes: The number of classes that logits have, if there shall be any.
        output: What a call returns. By default logits if there are classes, else features.
        generator: The source of randomness of the weights, on their device.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> backbone = Backbone("CC-CT", in_channels=1, width=16, stem=2)
        >>> x = torch.randn(2, 1, 28, 28)
        >>> backbone(x).shape, backbone.tokens(x).shape
        (torch.Size([2, 32]), torch.Size([2, 49, 32]))
    """

    input_mean: Tensor  # (C,)
    input_std: Tensor  # (C,)

    def __init__(
        self,
        layout: str,
        *,
        in_channels: int = 3,
        width: int | Sequence[int] = 32,
        stem: int = 4,
        patches: bool = False,
        norm: NormName | None = None,
        res_scale: float | Literal["depth"] = 1.0,
        options: Mapping[str, Options | Sequence[Options]] | None = None,
        classes: int | None = None,
        output: Output | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        stages = layout.split("-")
        widths = _widths(layout, stages, width)
        given = {letter: _turns(own) for letter, own in (options or {}).items()}
        if stray := given.keys() - set(layout.replace("-", "")):
            raise ValueError(f"expected options of blocks in {layout!r}, got {sorted(stray)}")
        output = output or ("features" if classes is None else "logits")
        if output not in ("features", "tokens", "maps", "logits"):
            raise ValueError(
                f"expected output 'features', 'tokens', 'maps' or 'logits', got {output!r}"
            )
        if output == "logits" and (classes is None or classes < 1):
            raise ValueError(f"expected classes >= 1 for logits, got {classes}")

        self.config: dict[str, Any] = {
            "layout": layout,
            "in_channels": in_channels,
            "width": widths,
            "stem": stem,
            "patches": patches,
            "norm": norm,
            "res_scale": res_scale,
            "options": given,
            "classes": classes,
            "output": output,
        }
        if self._needs_places() and widths[0] % 4:
            raise ValueError(
                f"expected a width divisible by 4, for positions before {layout[0]!r}, "
                f"got {widths[0]}"
            )
        _check_config(self.config)
        turns = {letter: itertools.cycle(own) for letter, own in given.items()}
        depth = sum(map(len, stages))
        scale = 1 / math.sqrt(2 * depth) if res_scale == "depth" else float(res_scale)
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.output: Output = output
        self.reducers = nn.ModuleList()
        self.stages = nn.ModuleList()
        for number, (letters, channels) in enumerate(zip(stages, widths, strict=True)):
            before = in_channels if number == 0 else widths[number - 1]
            stride = 2 if number else stem
            overlap = stride if patches and not number else max(3, 2 * stride - 1)
            reducer = ConvEmbedding(
                *(before, channels),
                kernel_size=overlap,
                stride=stride,
                norm=norm or "layer",
                **kwargs,
            )
            self.reducers.append(reducer)
            blocks = [
                make_block(
                    letter,
                    channels,
                    norm=norm,
                    res_scale=scale,
                    options=next(turns[letter]) if letter in turns else None,
                    **kwargs,
                )
                for letter in letters
            ]
            self.stages.append(nn.ModuleList(blocks))
        self.norm = make_norm(norm or "layer", widths[-1], **kwargs)
        self.head = None if classes is None else nn.Linear(widths[-1], classes, **kwargs)
        self.register_buffer("input_mean", torch.zeros(in_channels, **kwargs))
        self.register_buffer("input_std", torch.ones(in_channels, **kwargs))
        initialise(self, generator=generator)

    @property
    def in_channels(self) -> int:
        r"""The number of channels of an image."""
        return self.config["in_channels"]

    @property
    def widths(self) -> list[int]:
        r"""The number of channels of each stage."""
        return list(self.config["width"])

    @property
    def out_channels(self) -> int:
        r"""The number of features :math:`D`."""
        return self.widths[-1]

    @property
    def stride(self) -> int:
        r"""The stride of the last stage, in pixels."""
        return self.config["stem"] * 2 ** (len(self.stages) - 1)

    @property
    def receptive_field(self) -> int | None:
        return chain_fields(self._layers())

    def extra_repr(self) -> str:
        return f"layout={self.config['layout']!r}, output={self.output!r}"

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor | list[Tensor]:
        r"""Computes what ``output`` names.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            visible: Which patches are visible, boolean with shape :math:`(B, 1, h, w)`, each
                patch being a multiple of the stride wide. By default all are.

        Returns:
            Features, tokens, maps or logits, as the methods of these names do.
        """
        return getattr(self, self.output)(x, visible)

    def maps(self, x: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        r"""Computes the maps at the end of each stage.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            visible: Which patches are visible.

        Returns:
            The maps, with shapes :math:`(B, C_i, \lceil H / s_i \rceil, \lceil W / s_i \rceil)`.
            A norm has been applied to the last.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(
                f"expected images with shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}"
            )
        if visible is not None:
            check_visible(visible, x, stride=self.stride)
            if not bool(visible.flatten(1).any(dim=1).all()):
                raise ValueError("expected one visible patch or more in each sample, got none")
            x = hide(x, visible)
        mean, std = (part[:, None, None] for part in (self.input_mean, self.input_std))
        x = (x.to(mean.dtype) - mean) / std

        placed, maps = not self._needs_places(), []
        for reducer, stage in zip(self.reducers, self.stages, strict=True):
            x = reducer(x, visible)
            if not placed:
                height, width = x.shape[2:]
                x = x + sincos_positions(height, width, x, channels=x.shape[1])
                placed = True
            for block in stage.children():
                x = block(x, visible)
            maps.append(x)
        maps[-1] = self.norm(x, visible)
        return maps

    def tokens(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        r"""Computes one token for each pixel of the last map, with shape :math:`(B, N, D)`."""
        return self.maps(x, visible)[-1].flatten(2).transpose(1, 2)

    def features(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        r"""Computes the mean of the visible tokens, with shape :math:`(B, D)`."""
        return masked_mean(self.maps(x, visible)[-1], visible).flatten(1)

    def logits(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        r"""Computes the logits of the classes, with shape :math:`(B, V)`."""
        if self.head is None:
            raise ValueError("expected a backbone with classes, got one without; give classes=")
        return self.head(self.features(x, visible))

    @torch.no_grad()
    def standardise(self, images: Tensor) -> None:
        r"""Sets the mean and the scale of inputs to those of images.

        Arguments:
            images: The images, with shape :math:`(N, C, H, W)`.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels or not images.numel():
            raise ValueError(
                f"expected images with shape (N, {self.in_channels}, H, W), "
                f"got {tuple(images.shape)}"
            )
        mean, std = _moments(images)
        self.input_mean.copy_(mean)
        self.input_std.copy_(std)

    def _needs_places(self) -> bool:
        r"""Tells whether the first block cannot tell places, so that positions are added."""
        first = self.config["layout"][0]
        return BLOCKS[first].tokens

    def _layers(self) -> list[MapLayer]:
        stages = zip(self.reducers, self.stages, strict=True)
        layers = [layer for reducer, stage in stages for layer in (reducer, *stage.children())]
        return [layer for layer in (*layers, self.norm) if isinstance(layer, MapLayer)]


def save_backbone(path: str | Path, backbone: Backbone) -> None:
    r"""Writes a backbone to a safetensors file.

    Arguments:
        path: The file.
        backbone: The backbone, as it was composed or merged by :func:`~probnets.layers.merge`.

    Raises:
        ValueError: If it has been changed in another way.
        TypeError: If its weights are of bfloat16.
    """
    fresh, names = Backbone(**backbone.config, device="meta"), backbone.state_dict().keys()
    merged = names != fresh.state_dict().keys()
    if merged and names != merge(fresh).state_dict().keys():
        raise ValueError(
            "expected a backbone as it was composed, or merged, got one with other weights; "
            "keep its state_dict() instead"
        )
    facts = {"what": "backbone", "format": _FORMAT, "config": backbone.config, "merged": merged}
    checkpoints.write(path, checkpoints.state_arrays(backbone), facts)


def load_backbone(path: str | Path, *, device: torch.device | str | None = None) -> Backbone:
    r"""Reads a backbone that :func:`save_backbone` wrote, in evaluation mode.

    Arguments:
        path: The file.
        device: The device.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not the file of a backbone.
    """
    arrays, facts = checkpoints.read_model(path, "backbone", _FORMAT)
    try:
        dtype = torch.from_numpy(arrays["input_mean"]).dtype
        backbone = Backbone(**facts["config"], dtype=dtype)
        backbone = merge(backbone) if facts.get("merged") else backbone
        checkpoints.load_state(backbone, arrays)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected a backbone in {path}: {error}") from error
    return backbone.to(device).eval()


def _turns(options: Options | Sequence[Options]) -> list[dict[str, Any]]:
    r"""Returns the options of a letter, each in its turn."""
    turns = [options] if isinstance(options, Mapping) else list(options)
    if not turns or not all(isinstance(own, Mapping) for own in turns):
        raise ValueError(f"expected options of a letter, or several in turn, got {options!r}")
    return [dict(own) for own in turns]


def _check_config(config: dict[str, Any]) -> None:
    r"""Raises an error unless a file can hold the configuration."""
    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected options that a file can hold, names, numbers and lists of them: {error}"
        ) from None


def _widths(layout: str, stages: Sequence[str], width: int | Sequence[int]) -> list[int]:
    stray = sorted(set(layout) - BLOCKS.keys() - {"-"})
    if stray or not all(stages):
        raise ValueError(
            f"expected a layout of blocks {''.join(sorted(BLOCKS))}, with single dashes between "
            f"stages, got {layout!r}"
        )
    widths = [width * 2**i for i in range(len(stages))] if isinstance(width, int) else list(width)
    if len(widths) != len(stages) or min(widths) < 1:
        raise ValueError(
            f"expected one positive width, or one for each of {len(stages)} stages, got {width}"
        )
    return widths


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    r"""Computes the mean and the standard deviation of each channel, in parts of float64."""
    count = images.numel() // images.shape[1]
    total = sum(part.double().sum(dim=(0, 2, 3)) for part in images.split(1024))
    mean = torch.as_tensor(total) / count
    squares = sum(
        (part.double() - mean[:, None, None]).square().sum(dim=(0, 2, 3))
        for part in images.split(1024)
    )
    std = (torch.as_tensor(squares) / count).sqrt()
    # The mean is rounded, so that a constant channel may seem to vary a little.
    return mean, torch.where(std > 1e-12 * mean.abs(), std, 1.0)
