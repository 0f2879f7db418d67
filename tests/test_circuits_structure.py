r"""Tests for the probnets.circuits.structure and probnets.circuits.levels modules."""

import copy

import hypothesis.strategies as st
import numpy as np
import pytest
from circuit_cases import TREES
from hypothesis import given

from probnets.circuits import Tree
from probnets.circuits.levels import by_level


@st.composite
def trees(draw):
    r"""Draws the parents of a tree whose regions are numbered at random, and its regions."""
    R = draw(st.integers(1, 12))
    parents = [-1] + [draw(st.integers(0, r - 1)) for r in range(1, R)]
    rename = draw(st.permutations(range(R)))
    renamed = [-1] * R
    for r, p in enumerate(parents):
        renamed[rename[r]] = -1 if p < 0 else rename[p]
    regions = draw(st.lists(st.integers(0, R - 1), min_size=1, max_size=12))
    return renamed, regions


def test_by_hand():
    # Region 4 is the root, with children 1 (two variables) and 3 (one region below).
    tree = Tree.from_parents(
        [3, 4, 0, 4, -1], regions=[1, 1, 2], sum_keys="abbaz", input_keys=[7, 8, 7]
    )
    assert tree.origin.tolist() == [4, 1, 3, 0, 2]
    assert tree.parent.tolist() == [-1, 0, 0, 2, 3]
    assert tree.region.tolist() == [1, 1, 4]
    groups = tree.sum_group.tolist()
    assert groups[0] == -1
    assert groups[1] == groups[4] != groups[2] == groups[3]
    assert tree.input_group.tolist() == [0, 1, 0]
    assert (tree.regions, tree.variables, tree.sums, tree.inputs) == (5, 3, 2, 2)
    assert tree.depth.tolist() == [0, 1, 1, 2, 3]
    assert tree.height.tolist() == [3, 0, 2, 1, 0]
    assert tree.end.tolist() == [5, 2, 5, 5, 5]
    assert [part.tolist() for part in tree.by_region] == [[0, 1, 2], [0, 0, 2, 2, 2, 3]]
    assert repr(tree) == "Tree(regions=5, variables=3, sums=2, inputs=2, depth=3)"


@given(trees())
def test_order(drawn):
    parents, regions = drawn
    tree = Tree.from_parents(parents, regions)
    R = tree.regions

    # It is the same tree.
    assert sorted(tree.origin) == list(range(R))
    for r in range(R):
        above = tree.parent[r]
        assert parents[tree.origin[r]] == (-1 if r == 0 else tree.origin[above])
    assert [tree.origin[r] for r in tree.region] == regions

    # Subtrees are ranges, and the smallest of siblings comes first.
    def ancestors(r):
        return {r} | (ancestors(tree.parent[r]) if r else set())

    for r in range(R):
        below = {q for q in range(R) if r in ancestors(q)}
        assert below == set(range(r, tree.end[r]))
        assert tree.depth[r] == len(ancestors(r)) - 1
        assert tree.height[r] == max(tree.depth[q] - tree.depth[r] for q in below)

        size = {c: sum(1 + regions.count(tree.origin[q]) for q in range(c, tree.end[c]))
                for c in range(R) if tree.parent[c] == r}  # fmt: skip
        assert list(size.values()) == sorted(size.values())

    variables, start = tree.by_region
    for r in range(R):
        own = [v for v, place in enumerate(tree.region) if place == r]
        assert variables[start[r] : start[r + 1]].tolist() == own

    again = Tree(tree.parent, tree.region, tree.sum_group, tree.input_group, tree.origin)
    assert again.parent.tolist() == tree.parent.tolist()


@given(trees(), st.booleans())
def test_levels(drawn, rising):
    tree = Tree.from_parents(*drawn)
    key = tree.height if rising else tree.depth
    levels = by_level(tree, key)

    assert key[levels.order].tolist() == sorted(key)
    order = levels.order[:-1] if rising else levels.order[1:]  # the root is alone at its end
    assert 0 not in order

    members = [levels.order[key[levels.order] == k].tolist() for k in range(key.max() + 1)]
    runs = iter([target for run in levels.runs for target, count in run for _ in range(count)])
    place = dict(zip(levels.order.tolist(), levels.place.tolist(), strict=True))
    for r in order:
        assert members[next(runs)][place[r]] == tree.parent[r]
    assert next(runs, None) is None


@pytest.mark.parametrize("name", TREES)
def test_groups_have_no_gaps(name):
    tree = TREES[name]()
    assert set(tree.sum_group.tolist()) == {-1, *range(tree.sums)}
    assert set(tree.input_group.tolist()) == set(range(tree.inputs))


def test_nothing_in_it_changes():
    parent = np.array([-1, 0])
    tree = Tree(parent, np.array([0, 1]), np.array([-1, 0]), np.array([0, 1]), np.array([0, 1]))
    parent[1] = 7  # of the caller, who may
    assert tree.parent.tolist() == [-1, 0]
    with pytest.raises(ValueError, match="read-only"):
        tree.parent[1] = 7
    assert copy.deepcopy(tree) is tree


def test_deep_tree():
    tree = Tree.from_parents(np.arange(-1, 19_999), [19_999])
    assert tree.depth.max() == tree.height.max() == 19_999


@pytest.mark.parametrize(
    ("parents", "regions", "sentence"),
    [
        ([-1, 2, 1], [0], r"expected every region to lead to the root 0; regions \[1, 2\]"),
        ([-1, 1], [0], r"regions \[1\] lie on a cycle"),
        ([-1, -1], [0], "expected one root, a region with parent -1, got 2"),
        ([0, 1], [0], "expected one root, a region with parent -1, got 0"),
        ([], [0], "expected one root, a region with parent -1, got 0"),
        ([-1, 2], [0], r"expected parents from -1 to 1, got \[-1, 2\]"),
        ([-1, -2], [0], r"expected parents from -1 to 1, got \[-1, -2\]"),
        ([-1, 0], [2], r"expected a region from 0 to 1 for one variable or more, got \[2\]"),
        ([-1, 0], [-1], "expected a region from 0 to 1"),
        ([-1, 0], [], r"one variable or more, got \[\]"),
        ([-1, 0.5], [0], "expected parents to be a list of integers"),
        ([[-1, 0]], [0], "expected parents to be a list of integers"),
        ([-1, 0], [0.0], "expected regions to be a list of integers"),
    ],
)
def test_rejects_what_is_no_tree(parents, regions, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tree.from_parents(parents, regions)


def test_rejects_keys():
    with pytest.raises(ValueError, match="expected 2 sum_keys, got 1"):
        Tree.from_parents([-1, 0], [0], sum_keys=["a"])
    with pytest.raises(ValueError, match="expected 1 input_keys, got 2"):
        Tree.from_parents([-1, 0], [0], input_keys=["a", "b"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"parent": [-1, 0, 1, 0, 1]}, "depth-first order, got parent 1 of region 4"),
        ({"parent": [0, 0, 1, 1, 0]}, "depth-first order, got parent 0 of region 0"),
        ({"parent": [-1, 0, 1, -1, 0]}, "depth-first order, got parent -1 of region 3"),
        ({"parent": [-1, 2, 1, 1, 0]}, "depth-first order, got parent 2 of region 1"),
        ({"region": [5, 0]}, "expected a region from 0 to 4"),
        ({"sum_group": [-1, 0]}, "expected 5 sum groups and origins and 2 input groups"),
        ({"sum_group": [-1, 0, 0, 0, -1]}, "expected groups from 0"),
        ({"input_group": [0, 2]}, "those of the inputs without gaps"),
        ({"input_group": [0.0, 1.0]}, "expected input_group to be a list of integers"),
        ({"origin": [0]}, "expected 5 sum groups and origins"),
    ],
)
def test_rejects_arrays_out_of_order(change, sentence):
    arrays = {
        "parent": [-1, 0, 1, 1, 0],
        "region": [0, 4],
        "sum_group": [-1, 0, 0, 0, 0],
        "input_group": [0, 1],
        "origin": [0, 1, 2, 3, 4],
    }
    Tree(**{name: np.array(value) for name, value in arrays.items()})
    with pytest.raises(ValueError, match=sentence):
        Tree(**{name: np.array(value) for name, value in (arrays | change).items()})
