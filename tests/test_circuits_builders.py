r"""Tests for the probnets.circuits.builders module."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from probnets.circuits import binary_tree, chain, quad_tree


def leaves(tree, r):
    r"""Returns the variables below a region."""
    variables, start = tree.by_region
    return set(variables[start[r] : start[tree.end[r]]].tolist())


def parts(tree, r):
    r"""Returns the variables below each child of a region."""
    return {frozenset(leaves(tree, c)) for c in np.flatnonzero(tree.parent == r)}


def test_chain_by_hand():
    tree = chain(3)
    assert tree.parent.tolist() == [-1, 0, 1]
    assert tree.region.tolist() == [0, 1, 2]
    assert (tree.sums, tree.inputs) == (2, 3)
    assert (chain(3, tied=True).sums, chain(3, tied=True).inputs) == (1, 1)


def test_binary_tree_by_hand():
    tree = binary_tree(5)
    assert tree.regions == 9
    assert parts(tree, 0) == {frozenset({0, 1, 2}), frozenset({3, 4})}
    left = next(c for c in range(9) if leaves(tree, c) == {0, 1, 2})
    assert parts(tree, left) == {frozenset({0, 1}), frozenset({2})}


def test_quad_tree_by_hand():
    # Pixels, two numbers each:  0 1 | 2
    #                            3 4 | 5
    #                            ----+--
    #                            6 7 | 8
    tree = quad_tree(3, 3, channels=2)
    pixels = {frozenset(p) for p in ({0, 1, 3, 4}, {2, 5}, {6, 7}, {8})}
    assert parts(tree, 0) == {
        frozenset(v for p in part for v in (2 * p, 2 * p + 1)) for part in pixels
    }
    assert tree.regions == 1 + 4 + 4 + 2 + 2


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.booleans())
def test_quad_tree(height, width, channels, tied):
    tree = quad_tree(height, width, channels=channels, tied=tied)
    assert tree.variables == height * width * channels
    assert tree.depth.max() == int(np.ceil(np.log2(max(height, width))))

    # Each pixel has a region without children, with all of its channels.
    pixels = tree.region.reshape(-1, channels)
    assert (pixels == pixels[:, :1]).all()
    assert len(set(pixels[:, 0])) == height * width
    assert not set(pixels[:, 0]) & set(tree.parent[1:])
    assert tree.inputs == (channels if tied else tree.variables)

    # Regions that share a matrix have subtrees of one form.
    for group in range(tree.sums):
        size = {int(tree.end[r] - r) for r in np.flatnonzero(tree.sum_group == group)}
        assert len(size) == 1


@given(st.integers(1, 40), st.booleans())
def test_binary_tree(variables, tied):
    tree = binary_tree(variables, tied=tied)
    assert tree.regions == 2 * variables - 1
    assert tree.depth.max() == int(np.ceil(np.log2(variables)))
    assert np.bincount(tree.parent[1:], minlength=1).max() in (0, 2)


def test_tied_quad_tree_of_a_power_of_two():
    tree = quad_tree(16, 16, tied=True)
    assert (tree.sums, tree.inputs) == (4 * 4, 1)  # four quarters on four levels


def test_one_variable():
    for tree in (chain(1), binary_tree(1), quad_tree(1, 1)):
        assert (tree.regions, tree.variables, tree.sums, tree.inputs) == (1, 1, 0, 1)


@pytest.mark.parametrize("bad", [0, -1])
def test_rejects_sizes(bad):
    with pytest.raises(ValueError, match=f"expected variables to be at least 1, got {bad}"):
        chain(bad)
    with pytest.raises(ValueError, match=f"expected variables to be at least 1, got {bad}"):
        binary_tree(bad)
    with pytest.raises(ValueError, match=f"expected width to be at least 1, got {bad}"):
        quad_tree(3, bad)
    with pytest.raises(ValueError, match=f"expected channels to be at least 1, got {bad}"):
        quad_tree(3, 3, channels=bad)
