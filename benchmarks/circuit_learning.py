r"""How fast does EM learn a circuit, and how well?

Times an epoch of 60,000 MNIST images beside cirkit (quad tree, Adam) and SPFlow (hidden Chow-Liu
tree with 16 grey levels, EM) at the same number of units, in one run, and prints the bits per
dimension of 1,000 test images that each reaches in a minute. A peer's epoch is its median batch of
256, scaled. Then trains on Fashion-MNIST and prints bits per dimension on its test set.

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

Array = np.ndarray
Result = tuple[float, float]  # seconds per epoch, bits per dimension
Peer = tuple[Tensor, Callable[[Tensor], object], Callable[[Tensor], Tensor]]
Build = Callable[[Tensor, int], Peer]
FASHION = {"units": 64, "epochs": 20}
PUBLISHED = 3.34  # bits per dimension of a hidden Chow-Liu tree on Fashion-MNIST


def main(argv: list[str] | None = None) -> int:
    r"""Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with mnist.npz and fashion.npz")
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--skip-fashion", action="store_true", help="the race alone")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="keeps the model")
    parser.add_argument("--smoke", action="store_true", help="seconds, on synthetic images")
    options = parser.parse_args(argv)

    if options.smoke:
        images = np.random.default_rng(0).integers(0, 256, (1000, 6, 6), dtype=np.uint8)
        race(images, images[:100], options.units, seconds=0.5, peers=False)
        return 0
    train, _, test, _ = data.mnist(options.data)
    race(train, test[:1000], options.units, seconds=options.seconds, peers=True)
    if not options.skip_fashion:
        report_fashion(data.fashion(options.data), options.runs)
    return 0


def race(train: np.ndarray, test: np.ndarray, units: int, *, seconds: float, peers: bool) -> None:
    r"""Prints seconds per epoch, and bits per dimension after so many seconds."""
    print(f"threads: {torch.get_num_threads()}, K={units}, {len(train)} images an epoch")
    print(f"{'':36}s/epoch   ratio   bpd after {seconds:g} s")
    ours, bits = our_race(train, test, units, seconds)
    print(f"{'probnets, HCLT, EM':34} {ours:8.2f} {1:7.1f}   {bits:.4f}", flush=True)
    few, bits = our_race(train >> 4, test >> 4, units, seconds)
    print(f"{'probnets, HCLT, 16 levels, EM':34} {few:8.2f} {few / ours:7.1f}   {bits:.4f}")
    for name, package, build in (
        ("cirkit, quad tree, Adam", "cirkit", cirkit_peer),
        ("SPFlow, HCLT, 16 levels, EM", "spflow", spflow_peer),
    ):
        if not peers or importlib.util.find_spec(package) is None:
            print(f"{name:34} left out: {package} is not installed")
            continue
        epoch, bits = peer_race(build, train, test, units, seconds)
        print(f"{name:34} {epoch:8.2f} {epoch / ours:7.1f}   {bits:.4f}", flush=True)


def our_race(train: Array, test: Array, units: int, seconds: float) -> Result:
    r"""Times an epoch, what three take longer than one, then trains for so many seconds."""
    rows = train.reshape(len(train), -1)
    values = 256 if train.max() > 15 else 16
    torch.manual_seed(0)
    tree = hidden_chow_liu_tree(rows[:5000])

    def learn(rows: np.ndarray, epochs: int) -> tuple[float, TreeCircuit]:
        circuit = TreeCircuit(tree, Categorical(tree.inputs, units, values), shape=train.shape[1:])
        start = time.perf_counter()
        fit(circuit, rows, EMSettings(epochs=epochs, full_epochs=0), progress=False)
        return time.perf_counter() - start, circuit

    learn(rows[:1000], 1)  # compiles
    epoch = median((learn(rows, 3)[0] - learn(rows, 1)[0]) / 2 for _ in range(3))
    _, circuit = learn(rows, min(max(int(seconds / max(epoch, 1e-3)), 1), 100))
    return epoch, circuit.bits_per_dimension(torch.from_numpy(test))


def report_fashion(digits: data.Digits, folder: Path) -> None:
    r"""Trains on Fashion-MNIST, prints the test figure and keeps the model."""
    units, settings = FASHION["units"], EMSettings(epochs=FASHION["epochs"])
    start = time.perf_counter()
    model, circuit, result = train_whole(digits.train, units=units, settings=settings)
    minutes = (time.perf_counter() - start) / 60
    bits = circuit.bits_per_dimension(torch.from_numpy(digits.test))
    print(
        f"Fashion-MNIST, K={units}: {bits:.4f} bpd on the test set (published {PUBLISHED}), "
        f"validation {result.best:.4f}, {minutes:.1f} minutes with its structure"
    )
    model.save(folder / "fashion.safetensors")


def cirkit_peer(images: Tensor, units: int) -> Peer:
    r"""Builds cirkit's quad tree of canonical polyadic layers: data, training step, likelihood."""
    templates = importlib.import_module("cirkit.templates.data_modalities")
    utils = importlib.import_module("cirkit.templates.utils")
    softmax = utils.Parameterization(activation="softmax", initialization="normal")
    pipeline = importlib.import_module("cirkit.pipeline")
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
    options = {"backend": "torch", "semiring": "lse-sum", "fold": True, "optimize": True}
    circuit = pipeline.PipelineContext(**options).compile(symbolic)
    optimizer = torch.optim.Adam(circuit.parameters(), lr=0.01)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        (-circuit(x).mean()).backward()
        optimizer.step()

    return images.flatten(1).long(), step, circuit


def spflow_peer(images: Tensor, units: int) -> Peer:
    r"""Builds SPFlow's hidden Chow-Liu tree of 16 levels: data, training step, likelihood."""
    x = images.flatten(1).long() >> 4
    model = importlib.import_module("spflow.zoo.hclt").learn_hclt_categorical(
        x[:256], num_hidden_cats=units, num_cats=16, init="random"
    )
    em = importlib.import_module("spflow.learn").expectation_maximization
    return x.float(), lambda batch: em(model, batch, max_steps=1), model.log_likelihood


def peer_race(build: Build, train: Array, test: Array, units: int, seconds: float) -> Result:
    r"""Trains a peer on batches of 256 for so many seconds."""
    both, step, likelihood = build(torch.from_numpy(np.concatenate([test, train])), units)
    held, x = both[: len(test)], both[len(test) :]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    times: list[float] = []
    for rows in order.split(256):
        start = time.perf_counter()
        step(x[rows])
        times.append(time.perf_counter() - start)
        if len(times) >= 7 and sum(times) > seconds:
            break
    with torch.no_grad():
        log_prob = torch.cat([likelihood(part).flatten() for part in held.split(250)])
    bits = -log_prob.double().mean().item() / (held.shape[1] * math.log(2))
    return median(times[2:]) * 60_000 / 256, bits


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
