r"""Does pre-training without labels beat random weights, and by how much?

Composes a hybrid of convolution and attention, and fits linear probes with a thousand labels to
its features: with random weights, and after masked image modelling on the training images of
Fashion-MNIST, padded to 32x32, in patches of 8x8. Prints the accuracy on the 10,000 test images,
the mean over five choices of the labels, beside a probe of the pixels, and the time it took.

    python benchmarks/pretraining.py [--layout NN-TT] [--epochs 6] [--runs runs] [--smoke]

The backbone is kept in the folder of runs, and so is a checkpoint, from which an interrupted
training continues.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn

from probnets import data
from probnets.layers import (
    Backbone,
    MaskedImageModel,
    PretrainingSettings,
    fit_probe,
    load_backbone,
    pretrain,
    save_backbone,
)

Split = tuple[Tensor, Tensor]


def main(argv: list[str] | None = None) -> int:
    r"""Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with fashion.npz")
    parser.add_argument("--layout", default="NN-TT")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="keeps the backbone")
    parser.add_argument("--smoke", action="store_true", help="seconds, on synthetic images")
    options = parser.parse_args(argv)

    if options.smoke:
        x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (96, 1, 16, 16), np.uint8))
        y = (x.double().mean(dim=(1, 2, 3)) > 127).long()
        options.layout, options.width, options.epochs, options.labels = "C-T", 8, 1, 40
        run(options, (x, y), (x[:40], y[:40]), None)
        return 0
    digits = data.fashion(options.data)
    train, test = (
        (nn.functional.pad(torch.from_numpy(x)[:, None], (2, 2, 2, 2)), torch.from_numpy(y).long())
        for x, y in ((digits.train, digits.train_labels), (digits.test, digits.test_labels))
    )
    options.runs.mkdir(parents=True, exist_ok=True)
    run(options, train, test, options.runs)
    return 0


def run(options: argparse.Namespace, train: Split, test: Split, runs: Path | None) -> None:
    r"""Prints the accuracy of probes before and after."""
    backbone = Backbone(
        options.layout,
        in_channels=1,
        width=options.width,
        stem=2,
        options={"N": {"layer_scale": None}} if "N" in options.layout else None,
        generator=torch.Generator().manual_seed(0),
    )
    backbone.standardise(train[0])
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    print(f"threads: {torch.get_num_threads()}, {options.layout}, {weights:,} weights")
    print(f"{'':24}accuracy of {options.labels} labels", flush=True)
    report("pixels", train[0].flatten(1).float(), test[0].flatten(1).float(), train, test, options)
    before = probe("random weights", backbone, train, test, options)

    model = MaskedImageModel(
        backbone, patch=8, width=64, generator=torch.Generator().manual_seed(1)
    )
    settings = PretrainingSettings(epochs=options.epochs)
    name = f"fashion-{options.layout}-{options.width}-{options.epochs}"
    kept = None if runs is None else runs / name
    start = time.perf_counter()
    history = pretrain(
        model,
        train[0],
        settings,
        checkpoint=None if kept is None else kept.with_suffix(".checkpoint"),
        progress=sys.stderr.isatty(),
    ).history
    minutes = (time.perf_counter() - start) / 60
    after = probe("pre-trained", backbone, train, test, options)
    print(f"gain {100 * (after - before):+.2f} points, {minutes:.1f} minutes of pre-training")
    print("loss " + " ".join(f"{loss:.4f}" for loss in history))
    if kept is not None:
        save_backbone(kept.with_suffix(".safetensors"), backbone)
        again = load_backbone(kept.with_suffix(".safetensors"))
        assert torch.equal(features(again, test[0][:8]), features(backbone, test[0][:8]))
        print(f"kept as {kept.with_suffix('.safetensors')}")


def probe(
    name: str, backbone: Backbone, train: Split, test: Split, options: argparse.Namespace
) -> float:
    r"""Prints and returns the mean accuracy of probes of a backbone's features."""
    backbone.eval()
    few = choices(train, options)
    rows = torch.cat(few).unique()
    inside = torch.zeros(len(train[0]), dtype=torch.long)
    inside[rows] = torch.arange(len(rows))
    known = features(backbone, train[0][rows])
    return report(name, known, features(backbone, test[0]), train, test, options, inside)


def report(
    name: str,
    known: Tensor,
    new: Tensor,
    train: Split,
    test: Split,
    options: argparse.Namespace,
    inside: Tensor | None = None,
) -> float:
    r"""Prints and returns the mean accuracy of probes."""
    scores = []
    for rows in choices(train, options):
        own = rows if inside is None else inside[rows]
        fitted = fit_probe(known[own], train[1][rows], generator=torch.Generator().manual_seed(0))
        scores.append(fitted.accuracy(new, test[1]))
    spread = stdev(scores)
    print(f"{name:24}{100 * mean(scores):.2f} ± {100 * spread:.2f} %", flush=True)
    return mean(scores)


def choices(train: Split, options: argparse.Namespace) -> list[Tensor]:
    r"""Draws which images have labels, five times."""
    return [
        torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[
            : options.labels
        ]
        for seed in range(5)
    ]


@torch.inference_mode()
def features(backbone: Backbone, images: Tensor) -> Tensor:
    r"""Computes the features of images."""
    return torch.cat([backbone.features(part) for part in images.split(500)])


if __name__ == "__main__":
    sys.exit(main())
