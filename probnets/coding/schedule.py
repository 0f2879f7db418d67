r"""The order of work in coding a tree: depth first, each edge down once and up once."""

__all__ = ["CODE", "ENTER", "LEAVE", "Schedule"]

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from probnets.circuits import Tree

ENTER, CODE, LEAVE = 0, 1, 2


# Plans that were made, by tree and present variables: making one takes longer than using it.
_plans: WeakKeyDictionary[Tree, dict[bytes, "Schedule"]] = WeakKeyDictionary()
_MOST_PLANS = 64  # of one tree


@dataclass(frozen=True, eq=False)
class Schedule:
    r"""Is a list of operations that code the present variables of a tree.

    Each operation is a row of eight numbers: what to do (:data:`ENTER` a region from its
    parent, :data:`CODE` a variable, :data:`LEAVE` a region for its parent), the region, its
    parent, the variable, the sum matrix or input group, the slot that holds the region's
    messages, the parent's slot, and whether the parent (or the region, in coding) knows nothing
    yet from below.

    A region lives in its slot only while something still needs it, so that a chain takes one
    slot however long it is.

    Arguments:
        operations: The operations, with shape :math:`(T, 8)`.
        slots: The number of slots.
    """

    operations: np.ndarray
    slots: int

    @property
    def products(self) -> int:
        r"""The number of matrix-vector products, of which each edge needs at most two."""
        kinds = self.operations[:, 0]
        enters = (kinds == ENTER) & (self.operations[:, 2] >= 0)
        return int(enters.sum() + (kinds == LEAVE).sum())

    @classmethod
    def depth_first(cls, tree: Tree, present: np.ndarray | None = None) -> "Schedule":
        r"""Plans the coding of a tree.

        Arguments:
            tree: The tree.
            present: Which variables are coded, with shape :math:`(D,)`; the others are summed
                out, and subtrees without any are not entered. By default all.

        Raises:
            ValueError: If it does not tell for each variable whether it is coded.
        """
        present = np.ones(tree.variables, np.bool_) if present is None else np.asarray(present)
        if present.shape != (tree.variables,) or present.dtype != np.bool_:
            raise ValueError(
                f"expected present as bool with shape ({tree.variables},), "
                f"got {present.dtype} with shape {present.shape}"
            )
        plans = _plans.setdefault(tree, {})
        key = present.tobytes()
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= _MOST_PLANS:
                plans.clear()
            plan = plans[key] = _plan(tree, present)
        return plan


def _plan(tree: Tree, present: np.ndarray) -> Schedule:
    steps = _walk(tree, present)
    while steps and steps[-1][0] != CODE:
        steps.pop()  # nobody asks any more
    if not steps:
        return Schedule(np.zeros((0, 8), dtype=np.int64), 0)
    return _assign_slots(tree, steps)


def _walk(tree: Tree, present: np.ndarray) -> list[tuple[int, int, int]]:
    r"""Lists what to do with which region and variable."""
    variables, start = tree.by_region
    coded = np.zeros(tree.regions + 1, dtype=np.int64)
    np.add.at(coded, tree.region[present] + 1, 1)
    before = np.cumsum(coded)  # the number of present variables of lower regions

    steps: list[tuple[int, int, int]] = []
    open_regions: list[int] = []
    for r in range(tree.regions):
        while open_regions and tree.end[open_regions[-1]] <= r:
            steps.append((LEAVE, open_regions.pop(), -1))
        if before[tree.end[r]] == before[r]:
            continue
        steps.append((ENTER, r, -1))
        open_regions.append(r)
        steps.extend((CODE, r, int(v)) for v in variables[start[r] : start[r + 1]] if present[v])
    return steps


def _assign_slots(tree: Tree, steps: list[tuple[int, int, int]]) -> Schedule:
    r"""Gives each region a slot from when it is entered until nothing needs it any more."""
    last: dict[int, int] = {}
    for t, (kind, r, _) in enumerate(steps):
        last[r] = t
        if kind != CODE and r > 0:
            last[int(tree.parent[r])] = t

    slot: dict[int, int] = {}
    free: list[int] = []
    informed: set[int] = set()
    slots = 0
    rows = np.empty((len(steps), 8), dtype=np.int64)
    for t, (kind, r, v) in enumerate(steps):
        parent = int(tree.parent[r])
        above = slot.get(parent, 0)
        if kind == ENTER:
            if parent in slot and last[parent] == t:
                free.append(slot.pop(parent))  # entering reads the parent before it writes
            if not free:
                free.append(slots)
                slots += 1
            slot[r] = free.pop()
        subject = r if kind == CODE else parent
        group = tree.input_group[v] if kind == CODE else tree.sum_group[r]
        rows[t] = (kind, r, parent, v, group, slot[r], above, subject not in informed)
        if kind != ENTER:
            informed.add(subject)
        free.extend(slot.pop(s) for s in (r, parent) if s in slot and last[s] == t)
    return Schedule(rows, slots)
