r"""Levels of a tree, whose regions are computed together."""

__all__ = ["Levels", "by_level"]

from typing import NamedTuple

import numpy as np

from .structure import Tree


class Levels(NamedTuple):
    r"""The regions of a tree by level.

    Arguments:
        order: The regions, level after level, with shape :math:`(R,)`.
        place: Where the parent of each of these regions stands within its own level, with shape
            :math:`(R,)`, and zero for the root.
        runs: For each level, how many neighbouring regions have their parents on which level,
            as pairs of a level and a count. The root is in no run.
    """

    order: np.ndarray
    place: np.ndarray
    runs: list[list[tuple[int, int]]]


def by_level(tree: Tree, key: np.ndarray) -> Levels:
    r"""Orders the regions of a tree by a level for each.

    Arguments:
        tree: The tree.
        key: The level of each region, from 0 without gaps, such as the tree's depth or height.
            No region shares a level with its parent.

    Example:
        >>> tree = Tree.from_parents([-1, 0, 1, 0], regions=[0])
        >>> levels = by_level(tree, tree.height)
        >>> levels.order.tolist(), levels.runs
        ([3, 1, 2, 0], [[(1, 1), (2, 1)], [(2, 1)], []])
    """
    above = np.where(tree.parent < 0, -1, key[tree.parent])
    order = np.lexsort((above, key))
    start = np.searchsorted(key[order], np.arange(key.max() + 1))

    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    place = np.where(above < 0, 0, rank[tree.parent] - start[above])[order]

    runs: list[list[tuple[int, int]]] = [[] for _ in start]
    pairs, counts = np.unique(np.stack([key, above])[:, 1:], axis=1, return_counts=True)
    for (level, target), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
        runs[level].append((target, count))
    return Levels(order, place, runs)
