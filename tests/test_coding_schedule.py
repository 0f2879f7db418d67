r"""Tests for the probnets.coding.schedule module."""

import hypothesis.strategies as st
import numpy as np
import pytest
from coding_cases import CASES
from hypothesis import given

from probnets.circuits import Tree, binary_tree, chain, quad_tree
from probnets.coding.schedule import CODE, ENTER, LEAVE, Schedule


@st.composite
def trees(draw):
    parents = [-1, *(draw(st.integers(0, r)) for r in range(draw(st.integers(0, 12))))]
    regions = draw(st.lists(st.integers(0, len(parents) - 1), min_size=1, max_size=16))
    return Tree.from_parents(parents, regions)


def masks(tree):
    return st.lists(st.booleans(), min_size=tree.variables, max_size=tree.variables).map(
        lambda mask: np.array(mask, np.bool_)
    )


def simulate(tree, schedule, present):
    r"""Goes through the operations with slots that remember whose messages they hold.

    A region knows the variables that its messages tell of: from above and from below. The
    belief that codes a variable has to know all that were coded before.
    """
    above, below, coded = {}, {}, set()

    def known(slot, region, ignorant):
        owner, from_above = above[slot]
        assert owner == region
        has_below = slot in below and below[slot][0] == region
        assert bool(ignorant) != has_below
        return from_above | (below[slot][1] if has_below else set())

    for kind, r, parent, v, group, slot, parent_slot, ignorant in schedule.operations.tolist():
        assert 0 <= slot < schedule.slots
        if kind == ENTER:
            assert (parent, group) == (tree.parent[r], tree.sum_group[r])
            told = known(parent_slot, parent, ignorant) if r else set()
            above[slot] = (r, told)
            below.pop(slot, None)
        elif kind == CODE:
            assert group == tree.input_group[v]
            assert tree.region[v] == r
            assert known(slot, r, ignorant) == coded
            before = below[slot][1] if not ignorant else set()
            below[slot] = (r, before | {v})
            coded.add(v)
        else:
            assert kind == LEAVE
            assert (parent, group) == (tree.parent[r], tree.sum_group[r])
            assert below[slot][0] == r
            assert above[parent_slot][0] == parent
            assert slot != parent_slot
            has_below = parent_slot in below and below[parent_slot][0] == parent
            assert bool(ignorant) != has_below
            before = below[parent_slot][1] if has_below else set()
            below[parent_slot] = (parent, before | below[slot][1])
    assert coded == set(np.flatnonzero(present).tolist())


def check(tree, present=None):
    schedule = Schedule.depth_first(tree, present)
    present = np.ones(tree.variables, np.bool_) if present is None else present
    kinds, regions = schedule.operations[:, 0], schedule.operations[:, 1]
    variables = schedule.operations[kinds == CODE, 3]

    simulate(tree, schedule, present)
    assert sorted(variables.tolist()) == np.flatnonzero(present).tolist()
    for kind in (ENTER, LEAVE):
        assert np.bincount(regions[kinds == kind], minlength=1).max() <= 1
    assert schedule.products <= 2 * (tree.regions - 1)
    assert len(kinds) == 0 or kinds[-1] == CODE

    for r in regions[kinds == ENTER]:
        below = (tree.region >= r) & (tree.region < tree.end[r])
        assert present[below].any(), "a subtree without variables is skipped"
    return schedule


def test_by_hand():
    tree = Tree.from_parents([-1, 0, 0], regions=[1, 2, 0])
    operations = Schedule.depth_first(tree).operations
    assert operations.tolist() == [
        # kind, region, parent, variable, group, slot, the parent's slot, ignorant
        [ENTER, 0, -1, -1, -1, 0, 0, 1],
        [CODE, 0, -1, 2, 2, 0, 0, 1],
        [ENTER, 1, 0, -1, 0, 1, 0, 0],
        [CODE, 1, 0, 0, 0, 1, 0, 1],
        [LEAVE, 1, 0, -1, 0, 1, 0, 0],
        [ENTER, 2, 0, -1, 1, 0, 0, 0],
        [CODE, 2, 0, 1, 1, 0, 0, 1],
    ]
    assert Schedule.depth_first(tree).slots == 2


@pytest.mark.parametrize("name", CASES)
def test_trees_of_every_kind(name):
    tree = CASES[name][0]
    check(tree)
    for present in np.random.default_rng(0).random((10, tree.variables)) < 0.3:
        check(tree, present)


@given(st.data())
def test_any_tree(data):
    tree = data.draw(trees())
    check(tree)
    check(tree, data.draw(masks(tree)))


def test_chain_takes_one_slot_and_no_way_back():
    schedule = check(chain(300))
    assert schedule.slots == 1
    assert schedule.products == 299


def test_balanced_trees_take_few_slots():
    assert check(binary_tree(256)).slots <= 9
    assert check(quad_tree(16, 16, channels=3)).slots <= 5
    assert check(binary_tree(256)).products <= 2 * 510


def test_star_takes_two_slots():
    tree = Tree.from_parents([-1, *[0] * 50], regions=np.arange(51))
    assert check(tree).slots == 2


def test_mask_of_a_corner():
    tree = quad_tree(16, 16)
    present = np.zeros((16, 16), np.bool_)
    present[:4, :4] = True
    schedule = check(tree, present.ravel())
    assert (schedule.operations[:, 0] == ENTER).sum() == 2 + 1 + 4 + 16


def test_nothing_to_code():
    schedule = check(binary_tree(4), np.zeros(4, np.bool_))
    assert schedule.operations.shape == (0, 8)
    assert schedule.slots == 0
    assert schedule.products == 0


@pytest.mark.parametrize(
    "present", [np.ones(5, np.bool_), np.ones(4, np.int64), np.ones((2, 2), np.bool_)]
)
def test_rejects_masks(present):
    with pytest.raises(ValueError, match=r"expected present as bool with shape \(4,\)"):
        Schedule.depth_first(binary_tree(4), present)
