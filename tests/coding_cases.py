r"""Integer tables on trees of every kind, of few numbers of units since each is compiled."""

from functools import cache

import numpy as np
import torch

from probnets.circuits import (
    Categorical,
    Tree,
    TreeCircuit,
    binary_tree,
    chain,
    hidden_chow_liu_tree,
    quad_tree,
    sample,
)
from probnets.coding import CodeTables, ImageModel

RANDOM = np.random.default_rng(0).integers(0, 3, (40, 14))

HUB = Tree.from_parents(
    [-1, *[0] * 6, 1],
    regions=[*[0] * 30, 1, 2, 3, 4, 5, 6, 7, *[2] * 5],
    input_keys=[*[0] * 30, *range(1, 8), *[1] * 5],
)
DEEP = Tree.from_parents(  # a random tree with regions that have no variable
    [-1, *(int(p) for p in np.random.default_rng(1).integers(0, np.arange(1, 20)))],
    regions=np.random.default_rng(2).integers(0, 20, 15),
)

CASES = {  # the tree, the number of units K and the number of values X
    "chain": (chain(9), 3, 2),
    "chain, tied, one unit": (chain(7, tied=True), 1, 256),
    "binary": (binary_tree(11), 16, 256),
    "binary, one value": (binary_tree(5), 3, 1),
    "quad, tied, channels": (quad_tree(3, 4, channels=3, tied=True), 3, 512),
    "Chow-Liu": (hidden_chow_liu_tree(RANDOM, levels=3), 40, 5),
    "hub": (HUB, 16, 7),
    "deep": (DEEP, 3, 4),
    "one region": (Tree.from_parents([-1], regions=[0] * 5), 3, 9),
}


@torch.no_grad()
def circuit_on(tree, units, values, *, scale=2.0, shape=None):
    r"""Draws a circuit whose inputs peak here and there, as those of a trained one do."""
    source = torch.Generator().manual_seed(units)
    inputs = Categorical(tree.inputs, units, values, dtype=torch.float64)
    circuit = TreeCircuit(tree, inputs, shape=shape)
    for logits in (circuit.root_logits, circuit.sum_logits):
        logits.copy_(scale * torch.randn(logits.shape, generator=source, dtype=torch.float64))
    middle = values * torch.rand(tree.inputs, 1, units, generator=source, dtype=torch.float64)
    x = torch.arange(values, dtype=torch.float64)[:, None]
    noise = torch.randn(inputs.logits.shape, generator=source, dtype=torch.float64)
    inputs.logits.copy_(noise - (x - middle).abs() * 20 / values)
    return circuit


@cache
def case(name):
    r"""Returns circuit and tables of that name."""
    circuit = circuit_on(*CASES[name])
    return circuit, CodeTables.from_circuit(circuit)


@cache
def rows(name, count):
    r"""Draws rows: from the model by turns with any values."""
    circuit, tables = case(name)
    drawn = sample(circuit, (count,), generator=torch.Generator().manual_seed(0)).numpy()
    other = np.random.default_rng(0).integers(0, tables.values, drawn.shape)
    drawn = drawn.reshape(count, -1).astype(np.int64)
    return np.where(np.arange(count)[:, None] % 3 == 2, other.reshape(count, -1), drawn)


@cache
def tile_model():
    r"""Returns a small model of tiles, which expects residuals around their middle."""
    tree = quad_tree(8, 8, channels=3, tied=True)
    circuit = circuit_on(tree, 3, 512, scale=1.0, shape=(8, 8, 3))
    x = torch.arange(512.0, dtype=torch.float64)[:, None]
    middle = torch.tensor([128.0, 256.0, 256.0])[:, None, None]
    spread = torch.tensor([1.5, 6.0, 40.0])
    circuit.get_parameter("inputs.logits").data = -(x - middle).abs() / spread
    return ImageModel.from_circuit(circuit, kind="tiles")


@cache
def whole_model(shape=(4, 5), values=16):
    r"""Returns a small model of whole images."""
    tree = quad_tree(*shape[:2]) if len(shape) > 1 else chain(shape[0])
    return ImageModel.from_circuit(circuit_on(tree, 3, values, shape=shape))


def picture(shape, dtype, seed=0):
    r"""Draws a smooth image with some noise."""
    source = np.random.default_rng(seed)
    y, x, c = np.ogrid[: shape[0], : shape[1], : shape[2] if len(shape) > 2 else 1]
    smooth = np.sin(0.2 * x + 0.3 * y + c) + 0.02 * source.standard_normal((*shape[:2], c.size))
    smooth = smooth.reshape(shape)
    if dtype == np.bool_:
        return smooth > 0
    top = np.iinfo(dtype).max
    return (top * (smooth + 1.2) / 2.4).clip(0, top).astype(dtype)
