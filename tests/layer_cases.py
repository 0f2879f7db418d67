r"""One small instance of every layer, and what it promises."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from probnets import layers


class Case(NamedTuple):
    r"""Is a layer and its promises.

    Attributes:
        build: Creates it, from ``device`` and ``dtype``.
        shape: The shape of one sample.
        field: Its receptive field.
        masks: The smallest size of a patch of pixels that a mask may have, or None if the layer
            takes no masks.
        function: Whether it is a function in training mode too.
    """

    build: Callable[..., layers.Layer]
    shape: tuple[int, ...]
    field: int | None = None
    masks: int | None = None
    function: bool = True


def maps(
    build: Callable[..., layers.Layer],
    channels: int,
    field: int | None,
    *,
    size: int = 8,
    masks: int = 1,
    function: bool = True,
) -> Case:
    return Case(build, (channels, size, size), field, masks, function)


def tokens(build: Callable[..., layers.Layer], features: int = 8) -> Case:
    return Case(build, (5, features))


def progressing(**k) -> layers.Layer:
    r"""Creates a norm that is between its two kinds."""
    layer = layers.ProgressiveNorm(4, steps=1000, **k)
    layer.count.fill_(1)
    return layer


MAPS: dict[str, Case] = {
    # Convolutions and norms
    "Conv2d": maps(lambda **k: layers.Conv2d(3, 4, 3, **k), 3, 3),
    "Conv2d stride": maps(
        lambda **k: layers.Conv2d(3, 4, 3, stride=2, dilation=2, **k), 3, 5, masks=2
    ),
    "Conv2d patches": maps(lambda **k: layers.Conv2d(3, 4, 2, stride=2, **k), 3, 2, masks=2),
    "Conv2d linear": maps(lambda **k: layers.Conv2d(4, 6, 3, groups=2, bias=False, **k), 4, 3),
    "LayerNorm": maps(lambda **k: layers.norm("layer", 4, **k), 4, 1),
    "LayerNorm plain": maps(lambda **k: layers.norm("layer_plain", 4, **k), 4, 1),
    "NoNorm": maps(lambda **k: layers.norm("none", 4, **k), 4, 1),
    "GroupNorm": maps(lambda **k: layers.norm("group", 4, **k), 4, None),
    "BatchNorm": maps(lambda **k: layers.norm("batch", 4, **k), 4, 1, function=False),
    "InstanceBatchNorm": maps(
        lambda **k: layers.norm("instance_batch", 5, **k), 5, None, function=False
    ),
    "RepBatchNorm": maps(lambda **k: layers.norm("rep_batch", 4, **k), 4, 1, function=False),
    "ProgressiveNorm": maps(progressing, 4, 1, function=False),
    "ResponseNorm": maps(lambda **k: layers.norm("response", 4, **k), 4, None),
    # Convolutional blocks
    "ConvNormAct": maps(lambda **k: layers.ConvNormAct(3, 4, **k), 3, 3, function=False),
    "PlainStack": maps(
        lambda **k: layers.PlainStack(
            3, (4, 6), reduce=(0,), norm="layer", activation="tanh", **k
        ),
        *(3, 8),
        size=16,
        masks=2,
    ),
    "PlainStack patches": maps(
        lambda **k: layers.PlainStack(
            3, (4, 6), kernel_size=2, patches=True, norm="none", activation="tanh", **k
        ),
        *(3, 4),
        masks=4,
    ),
    "PreActivationBlock": maps(lambda **k: layers.PreActivationBlock(4, norm="layer", **k), 4, 5),
    "PreActivationBlock stride": maps(
        lambda **k: layers.PreActivationBlock(4, 6, stride=2, res_scale=0.5, **k),
        *(4, None),
        masks=2,
    ),
    "ConvNeXtBlock": maps(
        lambda **k: layers.ConvNeXtBlock(4, layer_scale=0.5, **k), 4, 7, size=16
    ),
    "ConvNeXtBlock response": maps(
        lambda **k: layers.ConvNeXtBlock(4, kernel_size=5, response=True, layer_scale=None, **k),
        *(4, None),
    ),
    "SqueezeExcite": maps(lambda **k: layers.SqueezeExcite(4, reduced=2, **k), 4, None),
    "InvertedResidual": maps(
        lambda **k: layers.InvertedResidual(4, activation="silu", **k), 4, 3, function=False
    ),
    "InvertedResidual stride": maps(
        lambda **k: layers.InvertedResidual(
            4, 6, stride=2, squeeze=0.25, norm="group", activation="silu", **k
        ),
        *(4, None),
        masks=2,
    ),
    "FusedInvertedResidual": maps(
        lambda **k: layers.FusedInvertedResidual(4, norm="layer", **k), 4, 3
    ),
    "DilatedReparamConv2d": maps(
        lambda **k: layers.DilatedReparamConv2d(2, 7, **k), 2, 7, size=18, function=False
    ),
    "DilatedReparamConv2d linear": maps(
        lambda **k: layers.DilatedReparamConv2d(2, 13, norm="none", **k), 2, 13, size=28
    ),
    "LargeKernelBlock": maps(
        lambda **k: layers.LargeKernelBlock(4, 5, squeeze=1, layer_scale=0.5, **k),
        4,
        None,
        function=False,
    ),
    "WaveMixBlock": maps(
        lambda **k: layers.WaveMixBlock(4, levels=1, norm="layer", **k), 4, 4, masks=2
    ),
    "WaveMixBlock levels": maps(
        lambda **k: layers.WaveMixBlock(8, levels=2, **k), 8, 12, size=24, masks=4, function=False
    ),
    # Attention
    "OnMaps": maps(
        lambda **k: layers.OnMaps(layers.AttentionBlock(8, heads=2, **k)), 8, None, size=4
    ),
    "OnMaps crate": maps(
        lambda **k: layers.OnMaps(layers.CrateBlock(8, heads=2, **k)), 8, None, size=4
    ),
    "ConvEmbedding": maps(
        lambda **k: layers.ConvEmbedding(3, 8, kernel_size=5, stride=2, **k),
        3,
        5,
        size=12,
        masks=2,
    ),
    "ConvAttentionBlock": maps(
        lambda **k: layers.ConvAttentionBlock(8, heads=2, **k), 8, None, masks=2
    ),
    "LocalAttention": maps(
        lambda **k: layers.LocalAttention(8, heads=2, block=2, halo=1, **k), 8, 4
    ),
    "LocalAttentionBlock window": maps(
        lambda **k: layers.LocalAttentionBlock(8, heads=2, block=4, shift=2, **k), 8, 4
    ),
    "LocalAttentionBlock pool": maps(
        lambda **k: layers.LocalAttentionBlock(8, 12, heads=2, block=4, query_pool=2, **k),
        *(8, 4),
        masks=2,
    ),
    "PositionalAttentionBlock": maps(
        lambda **k: layers.PositionalAttentionBlock(8, heads=4, **k), 8, None, size=4
    ),
    "LinearAttentionBlock": maps(
        lambda **k: layers.LinearAttentionBlock(8, heads=2, **k), 8, None, size=4
    ),
    "LinearAttentionBlock foldable": maps(
        lambda **k: layers.LinearAttentionBlock(8, heads=2, norm="rep_batch", **k),
        *(8, None),
        size=4,
        function=False,
    ),
    "RecursiveGatedBlock": maps(
        lambda **k: layers.RecursiveGatedBlock(8, order=3, kernel_size=5, layer_scale=0.5, **k),
        *(8, 5),
        size=12,
    ),
    "FFNAttentionBlock": maps(
        lambda **k: layers.FFNAttentionBlock(4, kernel_size=5, **k), 4, 13, size=28, function=False
    ),
}

TOKENS: dict[str, Case] = {
    "MultiHeadAttention": tokens(
        lambda **k: layers.MultiHeadAttention(8, heads=2, head_features=3, **k)
    ),
    "FeedForward": tokens(lambda **k: layers.FeedForward(8, kind="geglu", **k)),
    "AttentionBlock": tokens(lambda **k: layers.AttentionBlock(8, heads=2, **k)),
    "AttentionBlock wide": tokens(
        lambda **k: layers.AttentionBlock(
            8, heads=6, head_features=4, kind="geglu", norm="none", **k
        )
    ),
    "SubspaceAttention": tokens(lambda **k: layers.SubspaceAttention(8, heads=2, **k)),
    "SparseStep": tokens(lambda **k: layers.SparseStep(8, **k)),
    "CrateBlock": tokens(lambda **k: layers.CrateBlock(8, heads=2, **k)),
    "CrateDecoderBlock": tokens(lambda **k: layers.CrateDecoderBlock(8, heads=2, **k)),
}

LINEAR: dict[str, Case] = {
    "LinearConv2d": Case(lambda **k: layers.LinearConv2d(3, 4, 3, **k), (3, 8, 8), 3),
    "LinearConv2d stride": Case(
        lambda **k: layers.LinearConv2d(4, 6, 5, stride=3, groups=2, **k), (4, 8, 8), 5
    ),
    "LinearConv2d full": Case(
        lambda **k: layers.LinearConv2d(3, 4, 3, stride=2, padding="full", **k), (3, 8, 8), 3
    ),
    "LinearConv2d bare": Case(
        lambda **k: layers.LinearConv2d(2, 2, 2, stride=3, padding=0, **k), (2, 8, 8), 2
    ),
    "Haar": Case(lambda **k: layers.Haar(3, **k), (3, 8, 8), 2),
    "Haar levels": Case(lambda **k: layers.Haar(2, levels=2, **k), (2, 8, 8), 4),
    "Composition": Case(
        lambda **k: layers.Composition(layers.Haar(2, **k), layers.LinearConv2d(8, 3, 3, **k)),
        (2, 8, 8),
        6,
    ),
}

OTHERS: dict[str, Case] = {
    "LatentRead": Case(lambda **k: layers.LatentRead(8, 3, heads=2, out_features=4, **k), (5, 8)),
}

CASES = MAPS | TOKENS | LINEAR | OTHERS


def draw(case: Case, *, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    r"""Draws samples in float64, of maps of another size if it is given."""
    shape = case.shape if size is None else (case.shape[0], *size)
    return torch.randn(batch, *shape, dtype=torch.float64)


def build(case: Case) -> layers.Layer:
    r"""Creates the layer in float64, with weights, buffers and norms far from their start."""
    layer = case.build(dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in layer.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return layer.eval()


def every(cases: dict[str, Case]) -> dict:
    r"""Returns the arguments that make a test run on every case."""
    return {"argvalues": list(cases.values()), "ids": list(cases), "argnames": "case"}
