r"""The parameters that suit expected counts best, the M-step of EM."""

__all__ = ["maximise"]

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

from .circuit import TreeCircuit
from .estep import Counts, Tables
from .inputs import Categorical

# pyright: reportMissingParameterType=false


def maximise(
    circuit: TreeCircuit,
    counts: Counts,
    tables: Tables | None,
    pseudocount: float,
    step: float = 1.0,
    *,
    in_place: bool = False,
) -> Tables | None:
    r"""Moves the parameters towards those that are most likely given expected counts.

    Sums and categorical inputs move in probability, other inputs in their own parameters. A
    unit that nothing used does not move.

    Arguments:
        circuit: The circuit. Inputs that are not categorical are changed in place, and so is
            the whole circuit without tables.
        counts: The expected counts.
        tables: The probabilities until now, of a circuit with discrete inputs.
        pseudocount: The count that is added for each parameter.
        step: How far to move, from 0 to 1.
        in_place: Whether the new input probabilities may take the room of the old ones.

    Returns:
        The new probabilities, or None for a circuit without tables.
    """
    if tables is None:
        with torch.no_grad():
            for logits, part in (
                (circuit.root_logits, counts.root),
                (circuit.sum_logits, counts.sums),
            ):
                old = logits.softmax(-1).numpy()
                logits.copy_(torch.from_numpy(_move(part, old, pseudocount, step)).log())
        _move_inputs(circuit, counts, pseudocount, step)
        return None

    root = _move(counts.root, tables.root, pseudocount, step)
    sums = _move(counts.sums, tables.sums, pseudocount, step)
    if isinstance(circuit.inputs, Categorical):
        inputs = tables.inputs if in_place else np.empty_like(tables.inputs)
        _move_categorical(counts.inputs, tables.inputs, inputs, pseudocount, step)
        return Tables(root, sums, inputs)
    _move_inputs(circuit, counts, pseudocount, step)
    return circuit.tables()._replace(root=root, sums=sums)


def _move(counts: np.ndarray, old: np.ndarray, pseudocount: float, step: float) -> np.ndarray:
    r"""Moves distributions along the last axis."""
    new = np.empty_like(old)
    size = old.shape[-1]
    numbers = old.dtype.type(pseudocount), old.dtype.type(step)
    _move_rows(counts.reshape(-1, size), old.reshape(-1, size), new.reshape(-1, size), *numbers)
    return new


def _move_inputs(circuit: TreeCircuit, counts: Counts, pseudocount: float, step: float) -> None:
    before = [p.detach().clone() for p in circuit.inputs.parameters()]
    circuit.inputs.maximise(torch.from_numpy(counts.inputs), pseudocount)
    with torch.no_grad():
        for parameter, old in zip(circuit.inputs.parameters(), before, strict=True):
            parameter.lerp_(old, 1.0 - step)


def _move_categorical(
    counts: np.ndarray, old: np.ndarray, new: np.ndarray, pseudocount: float, step: float
) -> None:
    r"""Moves distributions along the middle axis, on all threads."""
    workers = torch.get_num_threads()
    bounds = [len(counts) * w // workers for w in range(workers + 1)]
    numbers = np.float32(pseudocount), np.float32(step)

    def job(w: int) -> None:
        part = slice(bounds[w], bounds[w + 1])
        _move_groups(counts[part], old[part], new[part], *numbers)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(job, range(workers)))


@numba.njit(cache=True, nogil=True)
def _move_groups(counts, old, new, pseudocount, step):
    H, X, K = counts.shape
    total = np.empty(K, dtype=np.float32)
    add = np.empty(K, dtype=np.float32)
    keep = np.empty(K, dtype=np.float32)
    factor = np.empty(K, dtype=np.float32)
    for h in range(H):
        total[:] = pseudocount * X
        for x in range(X):
            for k in range(K):
                total[k] += counts[h, x, k]
        for k in range(K):
            used = total[k] > np.float32(0.0)
            keep[k] = np.float32(1.0) - step if used else np.float32(1.0)
            factor[k] = step / total[k] if used else np.float32(0.0)
            add[k] = pseudocount * factor[k]
        for x in range(X):
            for k in range(K):
                new[h, x, k] = keep[k] * old[h, x, k] + factor[k] * counts[h, x, k] + add[k]


@numba.njit(cache=True, nogil=True)
def _move_rows(counts, old, new, pseudocount, step):
    rows, K = counts.shape
    one = old.dtype.type(1)
    for r in range(rows):
        total = pseudocount * K
        for k in range(K):
            total += counts[r, k]
        used = total > 0
        for k in range(K):
            best = (counts[r, k] + pseudocount) / total if used else old[r, k]
            new[r, k] = (one - step) * old[r, k] + step * best
