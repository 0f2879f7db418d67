r"""The parameters that suit expected counts best, the M-step of EM."""

__all__ = ["blend", "maximise"]

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

from .circuit import TreeCircuit
from .estep import Counts, Tables
from .inputs import Categorical


def blend(old: Counts | None, new: Counts, keep: float, take: float) -> Counts:
    r"""Blends running statistics with new counts, in place.

    Arguments:
        old: The running statistics, or None at the start.
        new: The counts of a batch.
        keep: The factor of the running statistics.
        take: The factor of the counts.
    """
    if old is None:
        for part in new[:3]:
            part *= take
        return new
    for mine, theirs in zip(old[:3], new[:3], strict=True):
        _blend(mine.ravel(), theirs.ravel(), mine.dtype.type(keep), mine.dtype.type(take))
    return old


def maximise(
    circuit: TreeCircuit, statistics: Counts, tables: Tables | None, pseudocount: float
) -> Tables | None:
    r"""Computes the parameters that are most likely given expected counts.

    Arguments:
        circuit: The circuit. Inputs that are not categorical are changed in place, and so is
            the whole circuit without tables.
        statistics: The expected counts.
        tables: The probabilities until now, which units that nothing used retain.
        pseudocount: The count that is added to each distribution.

    Returns:
        The new probabilities, or None for a circuit without tables.
    """
    if tables is None:
        with torch.no_grad():
            _set_logits(circuit.root_logits, statistics.root, pseudocount)
            _set_logits(circuit.sum_logits, statistics.sums, pseudocount)
        circuit.inputs.maximise(torch.from_numpy(statistics.inputs), pseudocount)
        return None

    root = _normalise(statistics.root[:, None][None], tables.root[:, None][None], pseudocount)
    sums = _rows(statistics.sums, tables.sums, pseudocount)
    if isinstance(circuit.inputs, Categorical):
        inputs = _normalise(statistics.inputs, tables.inputs, pseudocount)
    else:
        circuit.inputs.maximise(torch.from_numpy(statistics.inputs), pseudocount)
        with torch.no_grad():  # type: ignore
            table = circuit.inputs.log_table().exp()  # type: ignore
        inputs = np.ascontiguousarray(table.float().numpy())
    return Tables(root[0, :, 0], sums, inputs)


def _set_logits(logits: torch.Tensor, counts: np.ndarray, pseudocount: float) -> None:
    smooth = torch.from_numpy(counts) + pseudocount / counts.shape[-1]
    total = smooth.sum(-1, keepdim=True)
    logits.copy_(torch.where(total > 0, (smooth / total).log(), logits.log_softmax(-1)))


def _rows(counts: np.ndarray, old: np.ndarray, pseudocount: float) -> np.ndarray:
    smooth = counts + np.float32(pseudocount / counts.shape[-1])
    total = smooth.sum(-1, keepdims=True)
    return np.where(total > 0, smooth / np.maximum(total, np.float32(1e-37)), old)


def _normalise(counts: np.ndarray, old: np.ndarray, pseudocount: float) -> np.ndarray:
    r"""Normalises counts with shape (H, X, K) along X, on all threads."""
    new = np.empty_like(old)
    workers = torch.get_num_threads()
    bounds = [len(counts) * w // workers for w in range(workers + 1)]

    def job(w: int) -> None:
        part = slice(bounds[w], bounds[w + 1])
        _normalise_groups(counts[part], old[part], new[part], np.float32(pseudocount))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(job, range(workers)))
    return new


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _blend(mine, theirs, keep, take):  # noqa: ANN001, ANN202
    for i in range(mine.size):
        mine[i] = keep * mine[i] + take * theirs[i]


@numba.njit(cache=True, nogil=True)
def _normalise_groups(counts, old, new, pseudocount):  # noqa: ANN001, ANN202
    H, X, K = counts.shape
    smooth = pseudocount / np.float32(X)
    total = np.empty(K, dtype=np.float64)
    factor = np.empty(K, dtype=np.float32)
    for h in range(H):
        total[:] = 0.0
        for x in range(X):
            for k in range(K):
                total[k] += counts[h, x, k] + smooth
        for k in range(K):
            factor[k] = 1.0 / max(total[k], 1e-37)
        for x in range(X):
            for k in range(K):
                used = total[k] > 0.0
                new[h, x, k] = (counts[h, x, k] + smooth) * factor[k] if used else old[h, x, k]
