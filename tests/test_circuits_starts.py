r"""Tests for the probnets.circuits.starts module."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from probnets.circuits import Binomial, Categorical, Gaussian, TreeCircuit, chain, quad_tree
from probnets.circuits.em import EMSettings, fit
from probnets.circuits.starts import kmeans_start, random_start

FAMILIES = {
    "Categorical": lambda H: Categorical(H, 4, 16),
    "Binomial": lambda H: Binomial(H, 4, 16),
    "Gaussian": lambda H: Gaussian(H, 4),
}


def clusters(rows=300, seed=0):
    r"""Draws images around four centres."""
    source = np.random.default_rng(seed)
    centres = np.random.default_rng(9).integers(2, 14, (4, 4, 4))
    noise = source.integers(-1, 2, (rows, 4, 4))
    return centres[source.integers(0, 4, rows)] + noise


def build(family, *, tied=False, seed=0):
    torch.manual_seed(seed)
    tree = quad_tree(4, 4, tied=tied)
    return TreeCircuit(tree, FAMILIES[family](tree.inputs), shape=(4, 4))


def probabilities(circuit):
    parts = [circuit.log_root(), circuit.log_sums()]
    if isinstance(circuit.inputs, Categorical):
        parts.append(circuit.inputs.log_table().transpose(1, 2))
    return [part.exp() for part in parts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_clusters_are_better_than_chance(family, tied):
    x = clusters()
    data = torch.from_numpy(x)
    chance, start = build(family, tied=tied), build(family, tied=tied)
    random_start(chance)
    kmeans_start(start, x)
    assert start.bits_per_dimension(data) < chance.bits_per_dimension(data) - 0.1

    for table in probabilities(start):
        assert (table > 0).all()
        assert_close(table.sum(-1), torch.ones_like(table.sum(-1)))


def test_learning_from_clusters_is_better_than_from_chance():
    x, valid = clusters(), torch.from_numpy(clusters(seed=1))
    settings = EMSettings(epochs=0, full_epochs=3)
    chance, start = build("Categorical"), build("Categorical")
    random_start(chance)
    kmeans_start(start, x)
    for circuit in (chance, start):
        fit(circuit, x, settings, progress=False)
    assert start.bits_per_dimension(valid) < chance.bits_per_dimension(valid)


def test_two_clusters_by_hand():
    # Rows are all zeros or all ones, so that a unit stands for one of the two.
    circuit = TreeCircuit(chain(3), Categorical(3, 2, 2))
    x = np.repeat([[0, 0, 0], [1, 1, 1]], [30, 10], axis=0)
    kmeans_start(circuit, x, pseudocount=1e-6)
    ones, zeros = torch.ones(3).long(), torch.zeros(3).long()
    assert circuit.log_prob(ones).exp().item() == pytest.approx(0.25, abs=1e-3)
    assert circuit.log_prob(zeros).exp().item() == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_is_reproducible(family):
    one, two = build(family), build(family, seed=1)
    for circuit in (one, two):
        kmeans_start(circuit, clusters(), seed=3)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert_close(a, b)

    for circuit in (one, two):
        random_start(circuit, generator=torch.Generator().manual_seed(2))
    assert_close(one.sum_logits, two.sum_logits, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_few_rows(rows):
    circuit = build("Categorical")
    kmeans_start(circuit, clusters(rows))
    assert np.isfinite(circuit.bits_per_dimension(torch.from_numpy(clusters(rows))))


def test_some_of_the_rows():
    circuit = build("Categorical")
    kmeans_start(circuit, clusters(), rows=20)
    assert np.isfinite(circuit.bits_per_dimension(torch.from_numpy(clusters())))


def test_missing_values():
    x = clusters().astype(np.float32)
    x[np.random.default_rng(0).random(x.shape) < 0.3] = np.nan
    for family in FAMILIES:
        circuit = build(family)
        kmeans_start(circuit, x)
        assert np.isfinite(circuit.bits_per_dimension(torch.from_numpy(x)))


def test_rejects_data():
    with pytest.raises(ValueError, match="expected integers from 0 to 15"):
        kmeans_start(build("Categorical"), clusters() + 9)
    with pytest.raises(ValueError, match=r"expected x with shape \(\*, 4, 4\)"):
        kmeans_start(build("Categorical"), clusters()[:, :2])
