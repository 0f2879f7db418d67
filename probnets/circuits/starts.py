r"""Where learning starts: random parameters, or clusters of the data."""

__all__ = ["kmeans_start", "random_start"]

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.cluster import vq
from torch import Tensor

from .circuit import TreeCircuit
from .inputs import Discrete
from .rows import SLICE, Rows
from .structure import Tree

_FEATURES = 16  # numbers that a region is clustered by, at most


@torch.no_grad()
def random_start(circuit: TreeCircuit, *, generator: torch.Generator | None = None) -> None:
    r"""Draws the root and the sum matrices at random, in place.

    The logits are standard normal. The inputs keep the draw of their constructor.

    Arguments:
        circuit: The circuit.
        generator: The source of randomness.
    """
    for logits in (circuit.root_logits, circuit.sum_logits):
        logits.copy_(torch.randn(logits.shape, generator=generator).to(logits))


@torch.no_grad()
def kmeans_start(
    circuit: TreeCircuit,
    data: np.ndarray | Tensor,
    *,
    rows: int = 10_000,
    pseudocount: float = 0.01,
    seed: int = 0,
) -> None:
    r"""Sets the parameters to what a clustering of the data suggests, in place.

    Each region clusters the rows into `K` states by the variables on it and next to it in the
    tree, or by averages over its subtree if it has none. Counting how the states go together
    gives the sum matrices, and with the values the inputs. This is hard EM from a good guess.

    References:
        | Scaling Up Probabilistic Circuits by Latent Variable Distillation (Liu et al., 2023)
        | https://arxiv.org/abs/2210.04398

    Arguments:
        circuit: The circuit.
        data: The data, with shape :math:`(N, D)` or the circuit's shape after :math:`N`.
        rows: The number of rows that are clustered.
        pseudocount: The count that is added for each parameter.
        seed: The seed of rows and clusters.
    """
    source = np.random.default_rng(seed)
    prepared = Rows.prepare(circuit, data, None, None)
    chosen = source.permutation(len(prepared.x))[:rows]
    part = prepared.take(np.sort(chosen))
    seen = part.x >= 0 if part.seen is None else part.seen
    x = np.where(seen.numpy(), part.x.numpy(), 0).astype(np.float32)

    labels = _labels(circuit.tree, x, circuit.units, seed)  # (n, R)
    tree, K = circuit.tree, circuit.units
    circuit.inputs.maximise(_input_statistics(circuit, x, seen, labels), pseudocount)

    root = np.bincount(labels[:, 0], minlength=K) + pseudocount
    circuit.root_logits.copy_(torch.from_numpy(np.log(root / root.sum())))
    sums = np.full((tree.sums, K, K), pseudocount)
    for r in range(1, tree.regions):
        pairs = labels[:, tree.parent[r]] * K + labels[:, r]
        sums[tree.sum_group[r]] += np.bincount(pairs, minlength=K * K).reshape(K, K)
    circuit.sum_logits.copy_(torch.from_numpy(np.log(sums / sums.sum(-1, keepdims=True))))


def _input_statistics(
    circuit: TreeCircuit, x: np.ndarray, seen: Tensor, labels: np.ndarray
) -> Tensor:
    r"""Counts the values of each state, some rows at a time."""
    dtype = circuit.root_logits.dtype
    kind = torch.int64 if isinstance(circuit.inputs, Discrete) else dtype
    total = 0
    for n in range(0, len(x), SLICE):
        rows = slice(n, n + SLICE)
        state = torch.from_numpy(labels[rows][:, circuit.tree.region]).long()
        weights = torch.nn.functional.one_hot(state, circuit.units).to(dtype)
        weights *= seen[rows, :, None]
        values = torch.from_numpy(x[rows]).to(kind)
        total = total + circuit.inputs.statistics(values, circuit.input_group, weights)
    assert isinstance(total, Tensor)
    return total


def _labels(tree: Tree, x: np.ndarray, units: int, seed: int) -> np.ndarray:
    r"""Clusters the rows once for each region."""

    def cluster(r: int) -> np.ndarray:
        features = _features(tree, x, r)
        noise = np.random.default_rng((seed, r))
        # Rows that are alike would leave clusters empty: a little noise tells them apart.
        features = features + noise.normal(0.0, 1e-3 * (features.std() + 1e-6), features.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # empty clusters only start unused
            count = min(units, len(features))
            # SciPy has renamed the seed, whose old name every version takes.
            start = {"minit": "points", "seed": noise}
            centres, labels = vq.kmeans2(features, count, iter=8, **start)
        # In the order of their means, for regions that share parameters to agree on.
        return centres.mean(axis=1).argsort().argsort()[labels]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return np.stack(list(pool.map(cluster, range(tree.regions))), axis=1)


def _features(tree: Tree, x: np.ndarray, r: int) -> np.ndarray:
    variables, start = tree.by_region
    own = variables[start[r] : start[r + 1]]
    if own.size == 0:
        below = variables[start[r] : start[tree.end[r]]]
        parts = np.array_split(below, min(_FEATURES, below.size))
        return np.stack([x[:, part].mean(axis=1) for part in parts], axis=1)
    near = np.flatnonzero(tree.parent == r).tolist() + [int(tree.parent[r])] * (r > 0)
    around = [variables[start[q] : start[q + 1]] for q in near]
    return x[:, np.concatenate([own, *around])[: 2 * _FEATURES]]
