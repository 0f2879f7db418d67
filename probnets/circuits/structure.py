r"""Rooted trees of regions, the skeleton of every circuit."""

__all__ = ["Tree"]

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False, repr=False)
class Tree:
    r"""Creates a rooted tree of regions from arrays that are already in order.

    Use :meth:`from_parents` for a tree in any order. Here regions are numbered in depth-first
    order, so that region 0 is the root, a parent precedes its children, and the subtree of a
    region is a range of numbers. Among siblings the smallest subtree comes first: depth-first
    coding then holds the fewest regions open.

    Arguments:
        parent: The parent of each region, with shape :math:`(R,)`, and -1 for the root.
        region: The region that each variable hangs on, with shape :math:`(D,)`.
        sum_group: The sum matrix of each region, with shape :math:`(R,)`, and -1 for the root.
            Regions with equal numbers share one matrix.
        input_group: The input distribution of each variable, with shape :math:`(D,)`.
        origin: The number that each region had before the tree was put in order.

    Raises:
        ValueError: If the arrays do not fit together, or are not in order.

    Example:
        >>> tree = Tree.from_parents([-1, 0, 0], regions=[0, 1, 1, 2])
        >>> tree.regions, tree.variables, tree.depth.max()
        (3, 4, np.int64(1))
    """

    parent: np.ndarray
    region: np.ndarray
    sum_group: np.ndarray
    input_group: np.ndarray
    origin: np.ndarray

    @classmethod
    def from_parents(
        cls,
        parents: Sequence[int] | np.ndarray,
        regions: Sequence[int] | np.ndarray,
        *,
        sum_keys: Sequence[Hashable] | None = None,
        input_keys: Sequence[Hashable] | None = None,
    ) -> "Tree":
        r"""Puts any rooted tree in order.

        Arguments:
            parents: The parent of each region; one region, the root, has parent -1.
            regions: The region that each variable hangs on.
            sum_keys: A key for each region. Regions with equal keys share their sum matrix.
                The key of the root is ignored. By default no two regions share.
            input_keys: A key for each variable. Variables with equal keys share their input
                distribution. By default no two variables share.

        Raises:
            ValueError: If the parents are not one tree, or a region does not exist.
        """
        parent = _integers("parents", parents)
        region = _integers("regions", regions)
        R, D = parent.size, region.size

        roots = np.flatnonzero(parent == -1)
        if roots.size != 1:
            raise ValueError(f"expected one root, a region with parent -1, got {roots.size}")
        if parent.min() < -1 or parent.max() >= R:
            raise ValueError(f"expected parents from -1 to {R - 1}, got {parent.tolist()}")
        if D == 0 or region.min() < 0 or region.max() >= R:
            raise ValueError(
                f"expected a region from 0 to {R - 1} for one variable or more, "
                f"got {region.tolist()}"
            )

        origin = _depth_first(parent, region, int(roots[0]))
        if origin.size != R:
            stray = sorted(set(range(R)) - set(origin.tolist()))
            raise ValueError(
                f"expected every region to lead to the root {roots[0]}; regions {stray[:8]} lie "
                "on a cycle or are not connected to it"
            )

        rank = np.empty(R, dtype=np.int64)
        rank[origin] = np.arange(R)
        return cls(
            parent=np.where(parent[origin] < 0, -1, rank[parent[origin]]),
            region=rank[region],
            sum_group=_groups("sum_keys", sum_keys, R)[origin],
            input_group=_groups("input_keys", input_keys, D),
            origin=origin,
        )

    def __post_init__(self) -> None:
        for name in ("parent", "region", "sum_group", "input_group", "origin"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        _check(self)

        # Group numbers without gaps: the root, which needs no matrix, may have had its own.
        group = np.unique(self.sum_group[1:], return_inverse=True)[1].astype(np.int64)
        object.__setattr__(self, "sum_group", np.append(np.int64(-1), group))
        for array in (self.parent, self.region, self.sum_group, self.input_group, self.origin):
            array.setflags(write=False)

    def __deepcopy__(self, memo: dict[int, object]) -> "Tree":
        return self  # nothing in it changes

    def __repr__(self) -> str:
        return (
            f"Tree(regions={self.regions}, variables={self.variables}, "
            f"sums={self.sums}, inputs={self.inputs}, depth={self.depth.max()})"
        )

    @property
    def regions(self) -> int:
        r"""The number of regions :math:`R`."""
        return self.parent.size

    @property
    def variables(self) -> int:
        r"""The number of variables :math:`D`."""
        return self.region.size

    @property
    def sums(self) -> int:
        r"""The number of different sum matrices :math:`G`."""
        return int(self.sum_group.max()) + 1

    @property
    def inputs(self) -> int:
        r"""The number of different input distributions :math:`H`."""
        return int(self.input_group.max()) + 1

    @cached_property
    def depth(self) -> np.ndarray:
        r"""The number of edges from the root to each region, with shape :math:`(R,)`."""
        depth = np.zeros(self.regions, dtype=np.int64)
        for r in range(1, self.regions):
            depth[r] = depth[self.parent[r]] + 1
        return depth

    @cached_property
    def height(self) -> np.ndarray:
        r"""The number of edges from each region to its deepest leaf, with shape :math:`(R,)`."""
        height = np.zeros(self.regions, dtype=np.int64)
        for r in range(self.regions - 1, 0, -1):
            height[self.parent[r]] = max(height[self.parent[r]], height[r] + 1)
        return height

    @cached_property
    def end(self) -> np.ndarray:
        r"""One past the last region of each region's subtree, with shape :math:`(R,)`."""
        end = np.arange(1, self.regions + 1)
        for r in range(self.regions - 1, 0, -1):
            end[self.parent[r]] = max(end[self.parent[r]], end[r])
        return end

    @cached_property
    def by_region(self) -> tuple[np.ndarray, np.ndarray]:
        r"""The variables of all regions in a row, and where each region's begin.

        Region `r` holds ``variables[start[r]:start[r + 1]]``.
        """
        start = np.searchsorted(np.sort(self.region), np.arange(self.regions + 1))
        return np.argsort(self.region, kind="stable"), start


def _integers(name: str, values: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"expected {name} to be a list of integers, got {values!r}")
    return array.astype(np.int64)


def _check(tree: Tree) -> None:
    R, D = tree.parent.size, tree.region.size
    if not tree.sum_group.size == tree.origin.size == R or tree.input_group.size != D:
        raise ValueError(
            f"expected {R} sum groups and origins and {D} input groups, got "
            f"{tree.sum_group.size}, {tree.origin.size} and {tree.input_group.size}"
        )
    if R == 0 or D == 0 or tree.region.min() < 0 or tree.region.max() >= R:
        raise ValueError(
            f"expected a region from 0 to {R - 1} for one variable or more, "
            f"got {tree.region.tolist()}"
        )
    groups = np.unique(tree.input_group)
    if not np.array_equal(groups, np.arange(groups.size)) or tree.sum_group[1:].min(initial=0) < 0:
        raise ValueError("expected groups from 0, those of the inputs without gaps")

    # Depth first, each parent is the region before or one that the region before lies below.
    path: list[int] = []
    for r, p in enumerate(tree.parent.tolist()):
        while path and path[-1] != p:
            path.pop()
        if bool(path) != (r > 0) or (r == 0 and p != -1):
            raise ValueError(
                f"expected regions in depth-first order, got parent {p} of region {r}; "
                "use Tree.from_parents for any order"
            )
        path.append(r)


def _groups(name: str, keys: Sequence[Hashable] | None, count: int) -> np.ndarray:
    if keys is None:
        return np.arange(count)
    if len(keys) != count:
        raise ValueError(f"expected {count} {name}, got {len(keys)}")
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int64)


def _depth_first(parent: np.ndarray, region: np.ndarray, root: int) -> np.ndarray:
    r"""Lists the regions below the root depth first, siblings by the size of their subtrees."""
    children: list[list[int]] = [[] for _ in range(parent.size)]
    for r, p in enumerate(parent.tolist()):
        if p >= 0:
            children[p].append(r)

    reached = [root]
    for r in reached:
        reached.extend(children[r])

    size = 1 + np.bincount(region, minlength=parent.size)
    for r in reversed(reached[1:]):
        size[parent[r]] += size[r]

    order, stack = [], [root]
    while stack:
        order.append(r := stack.pop())
        stack.extend(sorted(children[r], key=lambda c: (-size[c], -c)))
    return np.array(order, dtype=np.int64)
