r"""How many bits, and how much time, does coding with a circuit take?

Trains hidden Chow-Liu trees on MNIST, codes the 10,000 test images, and prints bits per dimension
beside the ideal code length and the published likelihood, and times. Then compares the cost
per variable of depth-first coding with that of the path scheme, as images grow.

    python benchmarks/circuit_coding.py [--data FOLDER] [--units 16 32] [--smoke]

Trained circuits are kept in runs/ and trained anew when that is empty.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from probnets import data
from probnets.circuits import (
    Categorical,
    EMSettings,
    PathEvaluator,
    TreeCircuit,
    binary_tree,
    load_circuit,
    save_circuit,
)
from probnets.coding import CodeTables, decode_rows, encode_rows, train_whole
from probnets.coding.schedule import Schedule

EPOCHS = {16: 20, 32: 60}
PUBLISHED = {32: 1.20}  # bits per dimension, https://arxiv.org/abs/2211.12551, table 1
SIDES = (8, 16, 32, 64)


def main(argv: list[str] | None = None) -> int:
    r"""Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with mnist.npz")
    parser.add_argument("--units", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--smoke", action="store_true", help="seconds, on synthetic images")
    options = parser.parse_args(argv)

    if options.smoke:
        options.units = [4]
        source = np.random.default_rng(0)
        train, test = (source.integers(0, 256, (n, 6, 6), dtype=np.uint8) for n in (400, 100))
    else:
        digits = data.mnist(options.data)
        train, test = digits.train, digits.test
    test = test.reshape(len(test), -1)

    print(f"threads: {torch.get_num_threads()}; test images: {len(test)}")
    for units in options.units:
        folder = None if options.smoke else options.runs
        report_coding(units, trained(units, train, folder), test)
    report_scaling(SIDES[:2] if options.smoke else SIDES)
    return 0


def trained(units: int, train: np.ndarray, folder: Path | None) -> TreeCircuit:
    r"""Trains a circuit and keeps it, or loads it from the folder."""
    path = None if folder is None else folder / f"mnist-{units}-circuit.safetensors"
    if path is not None and path.exists():
        return load_circuit(path)
    start = time.perf_counter()
    settings = EMSettings(epochs=EPOCHS.get(units, 2), last_step=0.03)
    model, circuit, result = train_whole(train, units=units, settings=settings)
    print(
        f"K={units}: trained {len(result.history)} epochs in {time.perf_counter() - start:.0f} s, "
        f"validation {result.best:.4f} bpd, pseudocount {result.pseudocount}"
    )
    if path is not None:
        save_circuit(circuit, path)
        model.save(path.with_name(f"mnist-{units}.safetensors"))
    return circuit


def report_coding(units: int, circuit: TreeCircuit, test: np.ndarray) -> None:
    r"""Prints code lengths and times for the test images."""
    tables = CodeTables.from_circuit(circuit)
    dimensions = test.size
    with torch.no_grad():
        ideal = sum(
            circuit.double().log_prob(rows).sum().item()
            for rows in torch.from_numpy(test).split(1000)
        )
    circuit.float()
    bits = -ideal / math.log(2) / dimensions
    known = (
        f" (published for such a tree, theoretical: {PUBLISHED[units]:.2f})"
        if units in PUBLISHED
        else ""
    )
    print(f"\nK={units}, ideal {bits:.4f} bpd{known}")
    print("streams      bpd     over ideal   encode s   decode s   exact")
    for chained in (False, True):
        streams = encode_rows(tables, test[:64], chained=chained)  # compiles
        decode_rows(tables, streams, len(test[:64]), chained=chained)
        encode, streams = timed(lambda c=chained: encode_rows(tables, test, chained=c))
        decode, again = timed(
            lambda c=chained, s=streams: decode_rows(tables, s, len(test), chained=c)
        )
        coded = 8 * sum(map(len, streams)) / dimensions
        print(
            f"{'chained' if chained else 'per image':10} {coded:.5f}   {coded - bits:+.5f}   "
            f"{encode:8.3f}   {decode:8.3f}     {'yes' if np.array_equal(again, test) else 'NO'}"
        )


def report_scaling(sides: tuple[int, ...], units: int = 16) -> None:
    r"""Prints the cost per variable of both schemes in balanced trees over growing images."""
    print(f"\nbalanced binary trees, K={units}: cost per variable")
    print("(depth-first encodes to bytes, the path scheme computes conditionals alone)")
    print("image    depth-first: products   µs (1 row)   µs (64 rows)   path: products      µs")
    for side in sides:
        D = side * side
        torch.manual_seed(0)
        tree = binary_tree(D)
        circuit = TreeCircuit(tree, Categorical(tree.inputs, units, 16)).double()
        tables = CodeTables.from_circuit(circuit)
        rows = np.random.default_rng(0).integers(0, 16, (64, D), dtype=np.uint8)
        encode_rows(tables, rows[:1])
        one, _ = timed(lambda t=tables, x=rows[:1]: encode_rows(t, x, workers=1))
        many, _ = timed(lambda t=tables, x=rows: encode_rows(t, x, workers=1))
        x = torch.from_numpy(rows[0].astype(np.int64))
        evaluator = PathEvaluator(circuit)
        evaluator.sequence(x)
        asked = evaluator.products
        path, _ = timed(lambda e=evaluator, x=x: e.sequence(x))
        products = Schedule.depth_first(tree).products
        print(
            f"{side:3}x{side:<3} {products / D:20.2f} {one / D * 1e6:12.2f} "
            f"{many / D / 64 * 1e6:14.3f} {asked / D:16.2f} {path / D * 1e6:9.2f}"
        )


def timed(job: Callable[[], Any], *, repeats: int = 5) -> tuple[float, Any]:
    r"""Returns the median time of a job in seconds, and its result."""
    seconds, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = job()
        seconds.append(time.perf_counter() - start)
    return median(seconds), result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
