r"""How fast does EM learn a circuit, and how well?

Times an epoch of 60,000 MNIST images beside cirkit (quad tree, Adam) and SPFlow (hidden Chow-Liu
tree with 16 grey levels, EM) at the same number of units, in one run. Then trains on Fashion-MNIST
and prints bits per dimension on its test set.

    python benchmarks/circuit_learning.py [--data FOLDER] [--units 16] [--smoke]

The peers are installed by `pip install 'probnets[bench]'`, and left out where they are not.
"""

import argparse
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from probnets import data
from probnets.circuits import (
    Categorical,
    EMSettings,
    TreeCircuit,
    fit,
    hidden_chow_liu_tree,
)
from probnets.coding import train_whole

FASHION = {"units": 64, "epochs": 20}
PUBLISHED = 3.34  # bits per dimension of a hidden Chow-Liu tree on Fashion-MNIST


def main(argv: list[str] | None = None) -> int:
    r"""Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with mnist.npz and fashion.npz")
    parser.add_argument("--units", type=int, default=16, help="units of the race")
    parser.add_argument("--skip-fashion", action="store_true", help="the race alone")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="keeps the model")
    parser.add_argument("--smoke", action="store_true", help="seconds, on synthetic images")
    options = parser.parse_args(argv)

    if options.smoke:
        images = np.random.default_rng(0).integers(0, 256, (1000, 6, 6), dtype=np.uint8)
    else:
        images = data.mnist(options.data).train
    print(f"threads: {torch.get_num_threads()}, K={options.units}, {len(images)} images an epoch")
    ours = our_epoch(images, options.units)
    print(f"{'probnets, mini-batch EM':30} {ours:8.2f} s/epoch")
    if not options.smoke:
        for name, package, peer in (
            ("cirkit, quad tree, Adam", "cirkit", cirkit_epoch),
            ("SPFlow, HCLT, 16 levels, EM", "spflow", spflow_epoch),
        ):
            if importlib.util.find_spec(package) is None:
                print(f"{name:30}  left out: {package} is not installed")
                continue
            seconds = peer(torch.from_numpy(images[:3000]), options.units)
            print(f"{name:30} {seconds:8.2f} s/epoch   ratio {seconds / ours:6.1f}", flush=True)
        if not options.skip_fashion:
            report_fashion(data.fashion(options.data), options.runs)
    return 0


def our_epoch(images: np.ndarray, units: int) -> float:
    r"""Times an epoch of mini-batch EM: what three epochs take longer than one."""
    rows = images.reshape(len(images), -1)
    torch.manual_seed(0)
    tree = hidden_chow_liu_tree(rows[:5000])

    def seconds(rows: np.ndarray, epochs: int) -> float:
        circuit = TreeCircuit(tree, Categorical(tree.inputs, units, 256))
        start = time.perf_counter()
        fit(circuit, rows, EMSettings(epochs=epochs, full_epochs=0), progress=False)
        return time.perf_counter() - start

    seconds(rows[:1000], 1)  # compiles
    return median((seconds(rows, 3) - seconds(rows, 1)) / 2 for _ in range(3))


def report_fashion(digits: data.Digits, folder: Path) -> None:
    r"""Trains on Fashion-MNIST, prints the test figure and keeps the model."""
    start = time.perf_counter()
    settings = EMSettings(epochs=FASHION["epochs"])
    model, circuit, result = train_whole(digits.train, units=FASHION["units"], settings=settings)
    minutes = (time.perf_counter() - start) / 60
    bits = circuit.bits_per_dimension(torch.from_numpy(digits.test))
    print(
        f"Fashion-MNIST, K={FASHION['units']}: {bits:.4f} bpd on the test set (published "
        f"{PUBLISHED}), validation {result.best:.4f}, {len(result.history)} epochs in "
        f"{minutes:.1f} minutes, structure included"
    )
    model.save(folder / "fashion.safetensors")


def cirkit_epoch(images: Tensor, units: int) -> float:
    r"""Times an epoch of Adam on cirkit's quad tree of CP layers."""
    templates = importlib.import_module("cirkit.templates.data_modalities")
    softmax = importlib.import_module("cirkit.templates.utils").Parameterization(
        activation="softmax", initialization="normal"
    )
    context = importlib.import_module("cirkit.pipeline").PipelineContext(
        backend="torch", semiring="lse-sum", fold=True, optimize=True
    )
    # From 0.3 on, no log-likelihood falls below -708, where all of MNIST begins: no gradient.
    vars(importlib.import_module("cirkit.backend.torch.semiring"))["LOG_CLAMP_MIN"] = -math.inf
    symbolic = templates.image_data(
        (1, *images.shape[1:]),
        region_graph="quad-tree-2",
        input_layer="categorical",
        num_input_units=units,
        sum_product_layer="cp",
        num_sum_units=units,
        input_params={"probs": softmax},
        sum_weight_param=softmax,
    )
    circuit = context.compile(symbolic)
    optimizer = torch.optim.Adam(circuit.parameters(), lr=0.01)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        (-circuit(x).mean()).backward()
        optimizer.step()

    return peer_epoch(step, images.flatten(1).long())


def spflow_epoch(images: Tensor, units: int) -> float:
    r"""Times an epoch of EM on SPFlow's hidden Chow-Liu tree with 16 grey levels."""
    x = images.flatten(1).long() * 16 // 256
    model = importlib.import_module("spflow.zoo.hclt").learn_hclt_categorical(
        x[:256], num_hidden_cats=units, num_cats=16, init="random"
    )
    em = importlib.import_module("spflow.learn").expectation_maximization
    return peer_epoch(lambda batch: em(model, batch, max_steps=1), x.float())


def peer_epoch(step: Callable[[Tensor], object], x: Tensor, *, batch: int = 256) -> float:
    r"""Times five batches after two to warm up, and scales their median to 60,000 images."""
    seconds = []
    for rows in islice(x.split(batch), 7):
        start = time.perf_counter()
        step(rows)
        seconds.append(time.perf_counter() - start)
    return median(seconds[2:]) * 60_000 / batch


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
