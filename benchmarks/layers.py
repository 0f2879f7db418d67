r"""What does each block cost at equal FLOPs, beside timm and torchvision?

Gives each block the multiple of 16 channels that brings its forward pass nearest to the FLOPs of
a ConvNeXt block. Prints the time of a forward pass without gradients, and of a forward and a
backward pass to input and weights, in evaluation mode. Peers run in turn with ours, from maps to
maps, in the same configuration and with as many channels. Below 1, ours costs less than the peer.

    python benchmarks/layers.py [--size 16] [--batch 16] [--rounds 31] [--blocks A T] [--smoke]

FLOPs are those of convolutions and matrix products, two for each product; Haar has none. Times and
ratios are medians over rounds; glibc is told to keep freed memory, as fresh pages can cost as much
as a block. `kept` is what autograd keeps of a forward pass for the backward one, with the input
and without the weights. The peak is higher, by what lives within one operation. Peers come with
`pip install 'probnets[bench]'`, and are left out where they are not installed.
"""

import argparse
import contextlib
import ctypes
import importlib
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from probnets.layers import BLOCKS, Haar, LatentRead, LinearConv2d, LocalAttention, merge, norm
from probnets.layers import make_block as block


def main(argv: list[str] | None = None) -> int:
    r"""Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=16, choices=range(8, 257, 8), metavar="8N")
    for option, default in (("--batch", 16), ("--channels", 64), ("--rounds", 31)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--blocks", nargs="+", choices=BUILDS, default=list(BUILDS), metavar="A")
    parser.add_argument("--smoke", action="store_true", help="seconds, without peers")
    options = parser.parse_args(argv)
    if options.smoke:
        options.size, options.batch, options.channels, options.rounds = 8, 1, 16, 1
    else:
        with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems than glibc
            for option in (-3, -1):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
                ctypes.CDLL(None).mallopt(option, 1 << 30)
    maps = f"{options.batch} maps of {options.size} x {options.size}"
    print(f"torch {torch.__version__}, threads: {torch.get_num_threads()}, {maps}")
    print(f"{'':39}MFLOP      ms  fwd+bwd  GFLOP/s    MB  {'':33}ours / peer")
    print(f"{'block':35}   C  /map     fwd       ms      fwd  kept  {'peer':27}  fwd   f+b  kept")
    for name in options.blocks:
        report(name, options)
    return 0


def report(name: str, options: argparse.Namespace) -> None:
    r"""Prints the row of a block."""
    budget, equal = flops("N", options.channels, options), name.removesuffix(" merged")
    counts = {C: flops(equal, C, options) for C in range(16, 4 * options.channels, 16)}
    channels = min(counts, key=lambda C: (abs(counts[C] - budget), abs(C - options.channels)))
    count = flops(name, channels, options)
    torch.manual_seed(0)
    told, other, ratios = "", None, ""
    try:
        told, other = (told, other) if options.smoke else peer(name, channels)
    except (ImportError, RuntimeError) as error:
        told = f"left out: {str(error).splitlines()[0]}"
    models = [model.eval() for model in (BUILDS[name](channels), other) if model is not None]

    x = torch.randn(options.batch, channels, options.size, options.size, requires_grad=True)
    kept = [kept_bytes(model, x) for model in models]
    rounds = [[seconds(model, x) for model in models] for _ in range(2 + options.rounds)][2:]
    ours, both = (median(times[0][part] for times in rounds) for part in (0, 1))
    if len(models) > 1:
        parts = [median(a[part] / b[part] for a, b in rounds) for part in (0, 1)]
        ratios = "".join(f"{ratio:6.2f}" for ratio in (*parts, kept[0] / kept[1]))
    kind = getattr(models[0], "layer", getattr(models[0], "inner", models[0]))
    row = f"{name:9} {type(kind).__name__:24} {channels:4} {count / 1e6:6.1f} {1e3 * ours:7.2f}"
    row += f" {1e3 * both:8.2f} {options.batch * count / ours / 1e9:8.1f} {kept[0] / 1e6:5.1f}"
    print(f"{row}  {told:26}{ratios}".rstrip(), flush=True)


def flops(name: str, C: int, options: argparse.Namespace) -> float:
    r"""Counts the FLOPs of a forward pass, of one map."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        BUILDS[name](C).eval()(torch.empty(options.batch, C, options.size, options.size))
    return counter.get_total_flops() / options.batch


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    r"""Counts the bytes that a forward pass keeps for the backward one, without the weights."""
    kept: list[Tensor] = []  # alive, so that no two storages share an address
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for weight in (*model.parameters(), *model.buffers()):
        sizes.pop(weight.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def seconds(model: nn.Module, x: Tensor) -> tuple[float, float]:
    r"""Times a forward pass without gradients, and one with its backward pass."""
    start = time.perf_counter()
    with torch.no_grad():
        y = model(x)
    forward = time.perf_counter() - start
    slope, weights = torch.ones_like(y), list(model.parameters())
    start = time.perf_counter()
    torch.autograd.grad(model(x), [x, *weights], slope)
    return forward, time.perf_counter() - start


class Via(nn.Module):
    r"""Calls a module otherwise than on maps alone."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], inner: nn.Module) -> None:
        super().__init__()
        self.call, self.inner = call, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


tokens = partial(Via, lambda f, x: f(x.flatten(2).mT).mT.unflatten(2, x.shape[2:]))
last = partial(Via, lambda f, x: f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

BUILDS: dict[str, Callable[[int], nn.Module]] = {
    **{letter: partial(block, letter) for letter in sorted(BLOCKS)},
    "A alone": lambda C: LocalAttention(C, heads=C // 16, halo=3),
    **{f"{letter} batch": partial(block, letter, norm="batch") for letter in "CI"},
    **{f"{letter} merged": lambda C, letter=letter: merge(block(letter, C)) for letter in "FL"},
    "16 reads": lambda C: Via(lambda f, x: f(x.flatten(2).mT), LatentRead(C, 16, heads=C // 16)),
    "gram": lambda C: Via(lambda f, x: f.gram(x), LinearConv2d(C, C)),
    "Haar": Haar,
}


def peer(name: str, C: int) -> tuple[str, nn.Module | None]:
    r"""Creates the peer of a block, if there is one, and says what it is."""
    of, H = importlib.import_module, C // 16  # as many heads as ours have
    match name:
        case "A":
            swin = of("timm.models.swin_transformer").SwinTransformerBlock
            return "timm Swin block", last(swin(C, (16, 16), H, window_size=8))
        case "A alone":
            halo = of("timm.layers.halo_attn").HaloAttn(C, num_heads=H, qkv_bias=True)
            halo.pool = nn.Conv2d(C, C, 1)  # at its end, where ours projects
            return "timm HaloAttn", halo
        case "C batch":
            edge = of("timm.models._efficientnet_blocks").EdgeResidual
            return "timm EdgeResidual", edge(C, C, exp_ratio=4, act_layer=nn.GELU)
        case "I batch":
            mobile = of("torchvision.models.mobilenetv2").InvertedResidual
            return "torchvision MobileNetV2", mobile(C, C, 1, 6)
        case "N":
            return "timm ConvNeXt block", of("timm.models.convnext").ConvNeXtBlock(C)
        case "P":
            plain = of("torchvision.ops").Conv2dNormActivation
            return "torchvision ConvNormAct", plain(C, C, norm_layer=partial(norm, "group"))
        case "Q":
            return "timm ConViT block", tokens(of("timm.models.convit").Block(C, H))
        case "R":
            act = partial(of("timm.layers").GroupNormAct, num_groups=max(1, C // 8))
            conv = partial(nn.Conv2d, padding=1, bias=False)
            pre = of("timm.models.resnetv2").PreActBasic
            return "timm PreActBasic", pre(C, conv_layer=conv, norm_layer=act)
        case "T":
            vit = of("timm.models.vision_transformer").Block
            return "timm ViT block", tokens(vit(C, H, qkv_bias=True))
        case "F merged" | "L merged":
            return f"{name[0]} itself", block(name[0], C)
    return "", None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
