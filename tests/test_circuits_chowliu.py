r"""Tests for the probnets.circuits.chowliu module."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.testing import assert_allclose

from probnets.circuits import chow_liu_parents, hidden_chow_liu_tree, mutual_information


def definition(x, levels, pseudocount):
    r"""Counts each pair of quantised variables in a table."""
    values = int(x.max()) + 1
    x = x // max(1, math.ceil(values / levels))
    D = x.shape[1]
    result = np.zeros((D, D))
    for i, j in itertools.permutations(range(D), 2):
        table = np.full((levels, levels), pseudocount / levels**2)
        np.add.at(table, (x[:, i], x[:, j]), 1.0)
        p = table / table.sum()
        q = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
        result[i, j] = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
    return result


def drawn_from_a_tree(parents, rows=3000, seed=0):
    r"""Draws bits that mostly copy their parent's."""
    source = np.random.default_rng(seed)
    x = np.zeros((rows, len(parents)), dtype=np.int64)
    done = set()
    while len(done) < len(parents):
        for v, p in enumerate(parents):
            if v not in done and (p < 0 or p in done):
                flip = source.random(rows) < 0.15
                x[:, v] = source.random(rows) < 0.5 if p < 0 else x[:, p] ^ flip
                done.add(v)
    return x


def edges(parents):
    return {frozenset((v, int(p))) for v, p in enumerate(parents) if p >= 0}


# Mutual information


def test_by_hand():
    x = np.array([[0, 0], [0, 1], [1, 1], [1, 1]])
    p = {(0, 0): 0.25, (0, 1): 0.25, (1, 1): 0.5}
    q, r = {0: 0.5, 1: 0.5}, {0: 0.25, 1: 0.75}
    expected = sum(v * math.log(v / (q[a] * r[b])) for (a, b), v in p.items())
    information = mutual_information(x, levels=2, pseudocount=0.0)
    assert_allclose(information, [[0.0, expected], [expected, 0.0]], rtol=1e-12)


@settings(max_examples=30)
@given(
    rows=st.integers(1, 40),
    variables=st.integers(1, 5),
    most=st.sampled_from([0, 1, 2, 9, 255, 70_000]),
    levels=st.sampled_from([2, 3, 16, 256]),
    pseudocount=st.sampled_from([0.0, 0.1, 3.0]),
    skew=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matches_definition(rows, variables, most, levels, pseudocount, skew, seed):
    x = np.random.default_rng(seed).integers(0, most + 1, (rows, variables))
    if skew:  # the most frequent bin is then the last one
        x = np.maximum(x, x[:, ::-1])
    found = mutual_information(x, levels=levels, pseudocount=pseudocount)
    assert_allclose(found, definition(x, levels, pseudocount), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64, bool])
def test_types(dtype):
    x = np.random.default_rng(0).integers(0, 2 if dtype is bool else 100, (50, 4))
    expected = definition(x, 16, 0.1)
    assert_allclose(mutual_information(x.astype(dtype)), expected, rtol=1e-8, atol=1e-12)
    assert_allclose(mutual_information(np.asfortranarray(x)), expected, rtol=1e-8, atol=1e-12)
    assert_allclose(mutual_information(torch.tensor(x)), expected, rtol=1e-8, atol=1e-12)


def test_most_frequent_bin_is_not_the_first():
    x = np.full((30, 3), 7)
    x[:5, 0], x[3:9, 1], x[::4, 2] = 0, 2, 5
    assert_allclose(mutual_information(x, levels=8), definition(x, 8, 0.1), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 0, -3, 257])
def test_rejects_levels(levels):
    with pytest.raises(ValueError, match=f"expected from 2 to 256 levels .* got {levels}"):
        mutual_information(np.zeros((3, 2), dtype=int), levels=levels)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (np.zeros((3, 2)), r"expected data with shape \(N, D\) of integers, got \(3, 2\) of flo"),
        (np.zeros(3, dtype=int), r"got \(3,\) of int64"),
        (np.zeros((0, 2), dtype=int), r"got \(0, 2\)"),
        (np.zeros((2, 0), dtype=int), r"got \(2, 0\)"),
        (
            np.array([[0, -1]]),
            "no negative data, got -1; learn a tree from complete rows",
        ),
    ],
)
def test_rejects_data(data, sentence):
    with pytest.raises(ValueError, match=sentence):
        mutual_information(data)


def test_rejects_pseudocounts():
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="a pseudocount of 0 or more"):
            mutual_information(np.zeros((3, 2), dtype=int), pseudocount=bad)


# Trees


@pytest.mark.parametrize("seed", range(5))
def test_spanning_tree_is_the_largest(seed):
    D = 5
    weights = np.random.default_rng(seed).random((D, D))
    weights += weights.T

    def spans(chosen):
        reached = {0}
        for _ in range(D):
            reached |= {v for edge in chosen if set(edge) & reached for v in edge}
        return len(reached) == D

    pairs = itertools.combinations(itertools.combinations(range(D), 2), D - 1)
    best = max((c for c in pairs if spans(c)), key=lambda c: sum(weights[e] for e in c))
    assert edges(chow_liu_parents(weights)) == {frozenset(edge) for edge in best}


@pytest.mark.parametrize("length", [2, 3, 4, 7, 8])
def test_root_is_the_centre(length):
    order = np.random.default_rng(length).permutation(length)
    weights = np.zeros((length, length))
    weights[order[1:], order[:-1]] = weights[order[:-1], order[1:]] = 1.0
    parents = chow_liu_parents(weights)

    root = int(np.flatnonzero(parents < 0)[0])
    assert list(order).index(root) in {length // 2, (length - 1) // 2}

    def depth(v):
        return 0 if parents[v] < 0 else 1 + depth(parents[v])

    assert max(map(depth, range(length))) == length // 2


def test_independent_variables_still_span():
    parents = chow_liu_parents(np.zeros((4, 4)))
    assert (parents >= 0).sum() == 3


def test_finds_the_tree_that_data_came_from():
    parents = [-1, 0, 1, 1, 0, 4, 4]
    x = drawn_from_a_tree(parents)
    tree = hidden_chow_liu_tree(x, levels=2, own_latents=True)
    assert tree.regions == tree.variables == 7
    found = [-1 if tree.parent[r] < 0 else tree.origin[tree.parent[r]] for r in tree.region]
    assert edges(found) == edges(parents)

    # Leaves hang on the regions of 0, 1 and 4.
    small = hidden_chow_liu_tree(x, levels=2)
    assert small.regions == 3
    groups = [{v for v in range(7) if small.region[v] == r} for r in range(3)]
    assert sorted(map(sorted, groups)) == [[0], [1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("own_latents", [False, True])
@pytest.mark.parametrize("variables", [1, 2, 3])
def test_few_variables(variables, own_latents):
    x = np.random.default_rng(0).integers(0, 2, (20, variables))
    tree = hidden_chow_liu_tree(x, own_latents=own_latents)
    assert tree.variables == variables


def test_images():
    x = np.random.default_rng(0).integers(0, 256, (20, 2, 3, 1), dtype=np.uint8)
    tree = hidden_chow_liu_tree(x)
    assert tree.variables == 6
    assert tree.parent.tolist() == hidden_chow_liu_tree(torch.tensor(x)).parent.tolist()


@pytest.mark.parametrize("shape", [(5,), (0, 3), (3, 0), ()])
def test_rejects_shapes(shape):
    with pytest.raises(ValueError, match=r"expected data with shape \(N, D\)"):
        hidden_chow_liu_tree(np.zeros(shape, dtype=int))


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 3)), np.zeros((0, 0)), np.array([[0, math.nan], [math.nan, 0]])]
)
def test_rejects_information(bad):
    with pytest.raises(ValueError, match=r"expected finite information with shape \(D, D\)"):
        chow_liu_parents(bad)
