r"""Hidden Chow-Liu trees: the structure that data suggests."""

__all__ = ["chow_liu_parents", "hidden_chow_liu_tree", "mutual_information"]

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from scipy.sparse import csgraph
from torch import Tensor

from .structure import Tree

# pyright: reportMissingParameterType=false


def hidden_chow_liu_tree(
    data: np.ndarray | Tensor,
    *,
    levels: int = 16,
    own_latents: bool = False,
    pseudocount: float = 0.1,
) -> Tree:
    r"""Learns the tree of a hidden Chow-Liu model.

    The maximum spanning tree of the pairwise mutual information becomes a tree of regions,
    rooted at its centre: each variable gets a region, and each edge a sum matrix. A variable
    that is a leaf of the tree hangs on its parent's region instead, unless ``own_latents``.

    References:
        | Tractable Regularization of Probabilistic Circuits (Liu & Van den Broeck, 2021)
        | https://arxiv.org/abs/2106.02264

    Arguments:
        data: The data :math:`x`, with shape :math:`(N, D)` or :math:`(N, H, W, \dots)`,
            as non-negative integers.
        levels: The number of levels that values are quantised to before they are counted, at
            most 256.
        own_latents: Whether leaves of the tree get regions of their own.
        pseudocount: The count that is added to each pair of variables, spread over its cells.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).integers(0, 256, (100, 3, 3), dtype=np.uint8)
        >>> hidden_chow_liu_tree(x, own_latents=True).regions
        9
    """
    data = np.asarray(data)
    if data.ndim < 2 or data.size == 0:
        raise ValueError(f"expected data with shape (N, D) or (N, H, W, …), got {data.shape}")
    flat = data.reshape(len(data), -1)
    parent = chow_liu_parents(mutual_information(flat, levels=levels, pseudocount=pseudocount))
    D = parent.size
    if own_latents or D <= 2:
        return Tree.from_parents(parent, np.arange(D))

    inner = np.unique(parent[parent >= 0])  # every other variable is a leaf
    number = np.full(D, -1)
    number[inner] = np.arange(inner.size)
    regions = np.where(number >= 0, number, number[parent])
    parents = np.where(parent[inner] >= 0, number[parent[inner]], -1)
    return Tree.from_parents(parents, regions)


def chow_liu_parents(information: np.ndarray) -> np.ndarray:
    r"""Finds the maximum spanning tree of the mutual information, rooted at its centre.

    Arguments:
        information: The mutual information of each pair, with shape :math:`(D, D)`.

    Returns:
        The parent of each variable, with shape :math:`(D,)`, and -1 for the root.
    """
    information = np.asarray(information, dtype=np.float64)
    D = len(information)
    if information.shape != (D, D) or D == 0 or not np.isfinite(information).all():
        raise ValueError(f"expected finite information with shape (D, D), got {information.shape}")
    if D == 1:
        return np.array([-1])

    # scipy reads zeros as missing edges: all weights are moved below zero by one.
    weights = information.max() - information + 1.0
    tree = csgraph.minimum_spanning_tree(weights)
    tree = ((tree + tree.T) > 0).astype(np.float64).tocsr()

    # The centre is the middle of a longest path, whose ends two searches find.
    far = csgraph.breadth_first_order(tree, 0, return_predecessors=False)[-1]
    order, towards = csgraph.breadth_first_order(tree, far)
    path = [order[-1]]
    while path[-1] != far:
        path.append(towards[path[-1]])

    _, parent = csgraph.breadth_first_order(tree, path[len(path) // 2])
    return np.where(parent < 0, -1, parent).astype(np.int64)


def mutual_information(
    data: np.ndarray | Tensor, *, levels: int = 16, pseudocount: float = 0.1
) -> np.ndarray:
    r"""Computes the mutual information of each pair of variables, in nats.

    .. math:: I_{ij} = \sum_{ab} p_{ij}(a, b) \log \frac{p_{ij}(a, b)}{p_i(a) p_j(b)}

    Values are quantised to `levels` bins of equal width. The most frequent bin of a variable is
    not counted but inferred from the sums, which makes sparse images cheap.

    Arguments:
        data: The data :math:`x`, with shape :math:`(N, D)`, as non-negative integers.
        levels: The number of bins, at most 256.
        pseudocount: The count that is added to each pair, spread over its cells.

    Returns:
        The mutual information, with shape :math:`(D, D)`. Its diagonal is zero.

    Example:
        >>> import numpy as np
        >>> x = np.array([[0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]])
        >>> mutual_information(x, levels=2, pseudocount=0.0).round(3)
        array([[0.   , 0.693, 0.   ],
               [0.693, 0.   , 0.   ],
               [0.   , 0.   , 0.   ]])
    """
    if not 2 <= levels <= 256 or not pseudocount >= 0:
        raise ValueError(
            "expected from 2 to 256 levels and a pseudocount of 0 or more, "
            f"got {levels} and {pseudocount}"
        )
    data = np.asarray(data)
    if data.ndim != 2 or data.size == 0 or data.dtype.kind not in "iub":
        raise ValueError(
            f"expected data with shape (N, D) of integers, got {data.shape} of {data.dtype}; "
            "quantise real values first"
        )
    if data.min() < 0:
        raise ValueError(
            f"expected no negative data, got {data.min()}; learn a tree from complete rows"
        )
    D = data.shape[1]
    values = int(data.max()) + 1
    step = -(-values // levels) if values > levels else 1
    bins = np.ascontiguousarray((data // step).astype(np.uint8).T)

    # The most frequent bin of each variable becomes bin 0, by a swap, so that it can be skipped.
    for row in bins:
        top = np.bincount(row).argmax()
        if top:
            swap = np.arange(256, dtype=np.uint8)
            swap[[0, top]] = top, 0
            row[:] = swap[row]

    order = np.argsort(np.count_nonzero(bins, axis=1), kind="stable")
    bins = bins[order]
    out = np.zeros((D, D))
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        list(
            pool.map(lambda w: _count(bins, levels, pseudocount, out, w, workers), range(workers))
        )

    result = np.zeros((D, D))
    result[np.ix_(order, order)] = out + out.T
    return result


@numba.njit(cache=True, nogil=True)
def _count(bins, levels, pseudocount, out, first, stride):
    r"""Fills every `stride`-th row of the upper triangle."""
    D, N = bins.shape
    alone = np.zeros((D, levels), dtype=np.int64)
    for i in range(D):
        for n in range(N):
            alone[i, bins[i, n]] += 1

    some = np.empty(N, dtype=np.int64)
    joint = np.zeros((levels, levels), dtype=np.int64)
    smooth = pseudocount / (levels * levels)
    total = N + pseudocount

    for i in range(first, D, stride):
        count = 0
        for n in range(N):
            if bins[i, n] != 0:
                some[count] = n
                count += 1

        for j in range(i + 1, D):
            joint[:] = 0
            for m in range(count):
                n = some[m]
                joint[bins[i, n], bins[j, n]] += 1
            for b in range(levels):
                joint[0, b] = alone[j, b]
                for a in range(1, levels):
                    joint[0, b] -= joint[a, b]

            information = 0.0
            for a in range(levels):
                p = (alone[i, a] + smooth * levels) / total
                for b in range(levels):
                    both = (joint[a, b] + smooth) / total
                    if both > 0.0:
                        q = (alone[j, b] + smooth * levels) / total
                        information += both * np.log(both / (p * q))
            out[i, j] = max(information, 0.0)
