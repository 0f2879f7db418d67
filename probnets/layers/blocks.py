r"""Blocks by letter, as the layouts of backbones name them."""

__all__ = ["BLOCKS", "Block", "heads_for", "make_block"]

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .attention import AttentionBlock
from .convattention import ConvAttentionBlock
from .convnext import ConvNeXtBlock
from .crate import CrateBlock
from .ffnattention import FFNAttentionBlock
from .inverted import FusedInvertedResidual, InvertedResidual
from .largekernel import LargeKernelBlock
from .layer import MapLayer
from .linearattention import LinearAttentionBlock
from .local import LocalAttentionBlock
from .norms import NormName
from .plain import ConvNormAct
from .positional import PositionalAttentionBlock
from .recursive import RecursiveGatedBlock
from .residual import PreActivationBlock
from .tokens import OnMaps
from .wavemix import WaveMixBlock


class Block(NamedTuple):
    r"""Is a block that layouts name by a letter.

    Attributes:
        build: Creates it, from the number of channels and options.
        norm: The norm that it gets by default. With it the block is a function of one sample.
        heads: Whether it has attention heads.
        tokens: Whether it is a layer of tokens, which knows norms of tokens alone and cannot
            tell where in the map they are.
        residual: Whether it takes a factor of its residual branches.
    """

    build: Callable[..., MapLayer]
    norm: NormName
    heads: bool = False
    tokens: bool = False
    residual: bool = True


BLOCKS: dict[str, Block] = {
    "A": Block(LocalAttentionBlock, "layer", heads=True),
    "C": Block(FusedInvertedResidual, "group"),
    "F": Block(FFNAttentionBlock, "group"),
    "G": Block(RecursiveGatedBlock, "layer"),
    "I": Block(InvertedResidual, "group"),
    "K": Block(
        lambda C, **k: OnMaps(CrateBlock(C, **k)),
        "layer",
        heads=True,
        tokens=True,
    ),
    "L": Block(LargeKernelBlock, "group"),
    "N": Block(ConvNeXtBlock, "layer"),
    "P": Block(lambda C, **k: ConvNormAct(C, C, **k), "group", residual=False),
    "Q": Block(PositionalAttentionBlock, "layer", heads=True),
    "R": Block(PreActivationBlock, "group"),
    "S": Block(LinearAttentionBlock, "layer", heads=True),
    "T": Block(
        lambda C, **k: OnMaps(AttentionBlock(C, **k)),
        "layer",
        heads=True,
        tokens=True,
    ),
    "V": Block(ConvAttentionBlock, "layer", heads=True),
    "W": Block(WaveMixBlock, "group"),
}


def heads_for(channels: int) -> int:
    r"""Returns the largest number of heads of 16 features or more that divides the channels.

    Example:
        >>> heads_for(96), heads_for(8)
        (6, 1)
    """
    return next(h for h in range(max(1, channels // 16), 0, -1) if channels % h == 0)


def make_block(
    letter: str,
    channels: int,
    *,
    norm: NormName | None = None,
    res_scale: float = 1.0,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MapLayer:
    r"""Creates the block of a letter.

    ==  ============================================  ==  ==================================
    A   local attention in blocks                     P   plain convolution, norm, activation
    C   fused inverted residual                       Q   gated positional attention
    F   attention by convolutions                     R   pre-activation residual
    G   recursive gated convolution                   S   simplified linear attention
    I   inverted residual                             T   attention and an MLP
    K   white-box attention and sparse step (CRATE)   V   attention of convolved projections
    L   large re-parameterised kernel                 W   wavelet mixing
    N   ConvNeXt
    ==  ============================================  ==  ==================================

    Arguments:
        letter: The letter.
        channels: The number of channels, in and out.
        norm: The norm. By default one that makes the block a function of one sample. The blocks
            of tokens, K and T, know layer norms alone, and keep theirs if told another.
        res_scale: The factor of residual branches.
        options: Further arguments of the block.
        device: The device.
        dtype: The type of the weights.

    Raises:
        ValueError: If there is no such letter, or the block takes no such arguments.

    Example:
        >>> type(make_block("N", 8)).__name__
        'ConvNeXtBlock'
    """
    if letter not in BLOCKS:
        raise ValueError(f"expected a block of {''.join(sorted(BLOCKS))}, got {letter!r}")
    block = BLOCKS[letter]
    known = not block.tokens or norm in ("layer", "layer_plain", "none")
    arguments: dict[str, Any] = {"norm": norm if norm and known else block.norm}
    if block.residual:
        arguments["res_scale"] = res_scale
    if block.heads:
        arguments["heads"] = heads_for(channels)
    arguments.update(options or {})
    try:
        layer = block.build(channels, **arguments, device=device, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"block {letter!r} of {channels} channels: {error}") from error
    if (layer.out_channels, layer.stride) != (channels, 1):
        raise ValueError(
            f"block {letter!r} of {channels} channels: expected options that keep the shape of "
            f"maps, got {layer.out_channels} channels and stride {layer.stride}"
        )
    return layer
