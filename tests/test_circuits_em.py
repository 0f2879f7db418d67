r"""Tests for the probnets.circuits.em, estep and mstep modules."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from circuit_cases import TREES, circuit_on, joint, kill, observations, randomise, with_nan
from torch.testing import assert_close

from probnets.circuits import (
    Bernoulli,
    Binomial,
    Categorical,
    DiscretisedLogistic,
    Gaussian,
    Tree,
    TreeCircuit,
    binary_tree,
    chain,
    quad_tree,
)
from probnets.circuits.em import EMSettings, fit
from probnets.circuits.estep import Tables, expected_counts
from probnets.circuits.learner import Learner, expected_counts_torch
from probnets.circuits.mstep import maximise

FAMILIES = {
    "Categorical": lambda H: Categorical(H, 3, 4),
    "Binomial": lambda H: Binomial(H, 3, 4),
    "Bernoulli": lambda H: Bernoulli(H, 3),
    "DiscretisedLogistic": lambda H: DiscretisedLogistic(H, 3, 4),
    "Gaussian": lambda H: Gaussian(H, 3),
}

TREE = quad_tree(2, 3)


def build(family, tree=TREE, seed=0):
    torch.manual_seed(seed)
    return TreeCircuit(tree, FAMILIES[family](tree.inputs))


def clusters(family="Categorical", rows=200, seed=0, tree=TREE):
    r"""Draws rows around three centres."""
    source = np.random.default_rng(seed)
    most = {"Bernoulli": 2}.get(family, 4)
    centres = np.random.default_rng(9).integers(0, most, (3, tree.variables))
    x = centres[source.integers(0, 3, rows)]
    if family == "Gaussian":
        return (x + 0.3 * source.normal(size=x.shape)).astype(np.float32)
    noise = source.integers(0, most, x.shape)
    return np.where(source.random(x.shape) < 0.2, noise, x)


def assert_equal(one, two):
    assert one.state_dict().keys() == two.state_dict().keys()
    for name, value in one.state_dict().items():
        assert_close(value, two.state_dict()[name], rtol=0, atol=0)


# Expected counts


def counts_by_loop(circuit, x, observed, weights, workers=1):
    rows = x.masked_fill(~observed, -1).to(torch.int16).numpy()
    tables = circuit.tables()
    return expected_counts(circuit.tree, tables, rows, weights.numpy(), workers=workers)


def counts_by_torch(circuit, x, observed, weights):
    return expected_counts_torch(copy.deepcopy(circuit).double(), x, observed, weights.double())


def assert_counts_close(found, expected, rows):
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5 * max(rows, 1))


def test_counts_by_hand():
    # One region whose two units explain a bit: the posterior of unit 0 is 0.8, given one.
    inputs = Categorical(1, 2, 2)
    circuit = TreeCircuit(chain(1), inputs)
    with torch.no_grad():
        circuit.root_logits.zero_()
        inputs.logits.copy_(torch.tensor([[[0.2, 0.8], [0.8, 0.2]]]).log())
    x, seen = torch.tensor([[1], [0]]), torch.tensor([[True], [False]])
    for counts in (counts_by_loop, counts_by_torch):
        found = counts(circuit, x, seen, torch.tensor([3.0, 10.0]))
        np.testing.assert_allclose(found.root, [3 * 0.8 + 5, 3 * 0.2 + 5], rtol=1e-6)
        np.testing.assert_allclose(found.inputs, [[[0, 0], [2.4, 0.6]]], rtol=1e-6)
        np.testing.assert_allclose(found.log_prob, [math.log(0.5), 0.0], atol=1e-6)


@pytest.mark.parametrize("name", TREES)
def test_counts_match_enumeration(name):
    circuit = circuit_on(name)
    x, observed = observations(circuit)
    weights = torch.rand(len(x)).double()
    found = expected_counts_torch(circuit, x, observed, weights)

    states, prob = joint(circuit, with_nan(x, observed))
    weighted = weights[:, None] * prob / prob.sum(-1, keepdim=True)  # (B, S)
    unit = torch.nn.functional.one_hot(states, circuit.units).double()  # (S, R, K)
    tree = circuit.tree
    root = torch.einsum("bs,sk->k", weighted, unit[:, 0])
    sums, inputs = np.zeros_like(found.sums), np.zeros_like(found.inputs)
    for r in range(1, tree.regions):
        pairs = torch.einsum("bs,sj,sk->jk", weighted, unit[:, tree.parent[r]], unit[:, r])
        sums[tree.sum_group[r]] += pairs.numpy()
    for b, v in observed.nonzero().tolist():
        group, region = tree.input_group[v], tree.region[v]
        inputs[group, x[b, v]] += (weighted[b] @ unit[:, region]).numpy()

    for one, two in zip(found, (root, sums, inputs, prob.sum(-1).log()), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("units", [1, 2, 5, 16, 24])
@pytest.mark.parametrize("rows", [1, 3, 64, 65, 130])
@pytest.mark.parametrize("workers", [1, 2])
def test_loop_matches_torch(units, rows, workers):
    circuit = circuit_on("any, tied", units=units, dtype=torch.float32)
    x, observed = observations(circuit, rows)
    weights = torch.rand(rows) * 3
    found = counts_by_loop(circuit, x, observed, weights, workers)
    assert_counts_close(found, counts_by_torch(circuit, x, observed, weights), rows)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("zeros", [False, True])
def test_loop_matches_torch_on_every_tree(name, zeros):
    circuit = circuit_on(name, units=3, dtype=torch.float32)
    circuit = kill(circuit, share=0.6) if zeros else circuit
    x, observed = observations(circuit, 70)
    weights = torch.rand(70)
    found = counts_by_loop(circuit, x, observed, weights)
    assert_counts_close(found, counts_by_torch(circuit, x, observed, weights), 70)


LARGE = {
    "chain": chain(50),
    "binary": binary_tree(50),
    "quad": quad_tree(7, 7, channels=3),
    "star": Tree.from_parents([-1] + [0] * 40, range(41)),
    "many variables": Tree.from_parents([-1, 0, 0, 1], [1] * 6 + [2] * 3 + [3] * 20 + [0] * 3),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("least", [1e-3, 1e-8])
def test_loop_does_not_underflow(name, least):
    # Each value is as rare as one that no row of the training data had.
    tree = LARGE[name]
    circuit = randomise(TreeCircuit(tree, Categorical(tree.inputs, 4, 2)))
    with torch.no_grad():
        rare = least * (0.5 + torch.rand(tree.inputs, 4))
        circuit.inputs.logits.copy_(torch.stack([1 - rare, rare], dim=1).log())
    x = torch.ones(2, tree.variables, dtype=torch.long)
    everything, weights = torch.ones_like(x, dtype=torch.bool), torch.ones(2)
    found = counts_by_loop(circuit, x, everything, weights)
    expected = counts_by_torch(circuit, x, everything, weights)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, rtol=1e-5)
    assert_counts_close(found, expected, 2)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("least", [1e-10, 5e-12, 1e-15])
def test_log_prob_of_what_underflows(name, least):
    # The loop gives up on such rows, and PyTorch takes them.
    tree = LARGE[name]
    circuit = randomise(TreeCircuit(tree, Categorical(tree.inputs, 4, 2)))
    with torch.no_grad():
        rare = least * (0.5 + torch.rand(tree.inputs, 4))
        circuit.inputs.logits.copy_(torch.stack([torch.ones_like(rare), rare], dim=1).log())
        x = torch.ones(2, tree.variables, dtype=torch.long)
        seen = torch.ones_like(x, dtype=torch.bool)
        expected = circuit.log_prob_torch(x, seen)
        torch.testing.assert_close(circuit.log_prob(x), expected, rtol=1e-5, atol=1e-4)


def test_rows_without_weight_may_be_impossible():
    circuit = randomise(TreeCircuit(chain(2), Categorical(2, 2, 2)))
    with torch.no_grad():
        circuit.inputs.logits[0, 1] = -math.inf
    settings = EMSettings(epochs=0, pseudocount=0.0)
    data = np.array([[0, 0], [0, 1], [1, 0]])
    fit(circuit, data, settings, weights=np.array([1.0, 1.0, 0.0]), progress=False)
    with pytest.raises(ValueError, match="positive probability, got row 2"):
        fit(circuit, data, settings, progress=False)


def test_loop_with_wide_values():
    circuit = randomise(TreeCircuit(chain(2), Categorical(2, 2, 70_000)))
    x = np.array([[69_999, 5], [-1, 40_000]], dtype=np.int32)
    found = expected_counts(circuit.tree, circuit.tables(), x, np.ones(2, np.float32), workers=1)
    seen = torch.from_numpy(x >= 0)
    expected = counts_by_torch(circuit, torch.from_numpy(x).clamp(min=0), seen, torch.ones(2))
    assert_counts_close(found, expected, 2)


def test_loop_without_counting():
    circuit = circuit_on("quad", dtype=torch.float32)
    x, _ = observations(circuit, 5)
    data, weights = x.to(torch.int16).numpy(), np.ones(5, np.float32)
    arguments = circuit.tree, circuit.tables(), data, weights
    full = expected_counts(*arguments, workers=1)
    only = expected_counts(*arguments, workers=1, counting=False)
    np.testing.assert_array_equal(full.log_prob, only.log_prob)


# M-steps


def test_m_step_by_hand():
    circuit = TreeCircuit(chain(2, tied=True), Categorical(1, 2, 2))
    tables = circuit.tables()
    root = np.array([1, 3], dtype=np.float32)
    sums = np.array([[[3, 1], [0, 0]]], dtype=np.float32)
    inputs = np.array([[[0, 2], [4, 2]]], dtype=np.float32)
    counts = expected_counts(
        circuit.tree, tables, np.zeros((0, 2), np.int16), np.zeros(0, np.float32), workers=1
    )._replace(root=root, sums=sums, inputs=inputs)

    new = maximise(circuit, counts, tables, 0.0)
    assert new is not None
    np.testing.assert_allclose(new.root, [0.25, 0.75])
    np.testing.assert_allclose(new.sums[0, 0], [0.75, 0.25])
    np.testing.assert_allclose(new.sums[0, 1], tables.sums[0, 1])  # which nothing used
    np.testing.assert_allclose(new.inputs, [[[0.0, 0.5], [1.0, 0.5]]])

    new = maximise(circuit, counts, tables, 2.0)
    assert new is not None
    np.testing.assert_allclose(new.root, [3 / 8, 5 / 8])
    np.testing.assert_allclose(new.sums[0], [[5 / 8, 3 / 8], [0.5, 0.5]])
    np.testing.assert_allclose(new.inputs, [[[2 / 8, 0.5], [6 / 8, 0.5]]])

    half = maximise(circuit, counts, tables, 2.0, step=0.5)
    assert half is not None
    for one, old, all_the_way in zip(half[:3], tables[:3], new[:3], strict=True):
        np.testing.assert_allclose(one, (old + all_the_way) / 2, rtol=1e-6)


# Fits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("missing", [False, True])
def test_full_batches_never_lower_the_likelihood(family, missing):
    circuit, x = build(family), clusters(family)
    source = np.random.default_rng(1)
    observed = source.random(x.shape) < 0.7 if missing else None
    weights = source.random(len(x)).astype(np.float32) if missing else None
    settings = EMSettings(epochs=0, full_epochs=12, pseudocount=0.0)
    result = fit(circuit, x, settings, observed=observed, weights=weights, progress=False)
    bits = [train for train, _ in result.history]
    assert len(bits) == 12
    assert all(after <= before + 2e-5 for before, after in itertools.pairwise(bits))
    assert bits[-1] < bits[0] - 0.05
    assert math.isnan(result.best)


@pytest.mark.parametrize("family", FAMILIES)
def test_history_measures_the_circuit(family):
    circuit, x = build(family), torch.from_numpy(clusters(family))
    before = circuit.bits_per_dimension(x)
    result = fit(circuit, x, EMSettings(epochs=0, full_epochs=1), progress=False)
    assert result.history[0][0] == pytest.approx(before, rel=1e-5)
    assert circuit.bits_per_dimension(x) < before


@pytest.mark.parametrize("family", FAMILIES)
def test_mini_batches(family):
    circuit, x = build(family), clusters(family)
    settings = EMSettings(epochs=6, full_epochs=1, batch_size=32, first_step=0.5)
    result = fit(circuit, x, settings, validation=clusters(family, seed=1), progress=False)
    assert len(result.history) == 7
    assert result.history[-1][0] < result.history[0][0]
    held_out = circuit.bits_per_dimension(torch.from_numpy(clusters(family, seed=1)))
    assert held_out == pytest.approx(result.best, rel=1e-4)
    assert result.best == min(valid for _, valid in result.history)


def test_weights_count_rows():
    x = clusters(rows=30)
    weights = np.random.default_rng(0).integers(0, 3, 30)
    settings = EMSettings(epochs=0, full_epochs=4)
    one, two = build("Categorical"), build("Categorical")
    fit(one, x, settings, weights=weights, progress=False)
    fit(two, np.repeat(x, weights, axis=0), settings, progress=False)
    data = torch.from_numpy(x)
    assert_close(one.log_prob(data), two.log_prob(data), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Categorical", "Gaussian"])
def test_missing_values_by_nan_and_by_mask(family):
    x = clusters(family, rows=30)
    observed = np.random.default_rng(1).random(x.shape) < 0.6
    settings = EMSettings(epochs=2, full_epochs=2, batch_size=10)
    one, two = build(family), build(family)
    fit(one, x, settings, observed=observed, progress=False)
    fit(two, np.where(observed, x, np.nan), settings, progress=False)
    assert_equal(one, two)


def test_shapes_of_data():
    x = clusters(rows=20)
    settings = EMSettings(epochs=0, full_epochs=2)
    one, two = build("Categorical"), build("Categorical")
    two = TreeCircuit(TREE, two.inputs, shape=(2, 3))
    two.load_state_dict(one.state_dict())
    fit(one, x, settings, progress=False)
    fit(two, torch.from_numpy(x).view(20, 2, 3).to(torch.uint8), settings, progress=False)
    assert_equal(one, two)


def test_double_precision():
    circuit = build("Categorical").double()
    fit(circuit, clusters(rows=50), EMSettings(epochs=0, full_epochs=3), progress=False)
    assert {p.dtype for p in circuit.parameters()} == {torch.float64}
    assert circuit.log_prob(torch.zeros(6).long()).isfinite()


# Choice by validation data


def test_patience_ends_and_the_best_is_kept():
    # Few rows and no pseudocount to speak of: the circuit learns them by heart.
    x, valid = clusters(rows=20), clusters(rows=200, seed=5)
    circuit = build("Categorical")
    settings = EMSettings(epochs=60, full_epochs=0, batch_size=10, pseudocount=1e-3, patience=3)
    result = fit(circuit, x, settings, validation=valid, progress=False)
    scores = [score for _, score in result.history]
    assert len(scores) < 60
    assert int(np.argmin(scores)) == len(scores) - 4
    assert result.best == min(scores)
    assert circuit.bits_per_dimension(torch.from_numpy(valid)) == pytest.approx(
        result.best, rel=1e-5
    )


def test_patience_without_validation_data_is_endless():
    settings = EMSettings(epochs=4, full_epochs=1, batch_size=10, patience=1)
    result = fit(build("Categorical"), clusters(rows=30), settings, progress=False)
    assert len(result.history) == 5


def test_full_epochs_follow_when_patience_ends():
    settings = EMSettings(epochs=50, full_epochs=2, batch_size=10, patience=1, pseudocount=1e-3)
    valid = clusters(rows=200, seed=5)
    circuit = build("Categorical")
    learned = []

    def steps(self, counts, step, share):
        learned.append(step)
        return maximise_(self, counts, step, share)

    maximise_ = Learner.maximise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "maximise", steps)
        result = fit(circuit, clusters(rows=20), settings, validation=valid, progress=False)
    assert len(result.history) < 52
    assert learned[-2:] == [1.0, 1.0]


@pytest.mark.parametrize("family", ["Categorical", "Gaussian"])
def test_chooses_the_pseudocount(family):
    x, valid = clusters(family, rows=15), clusters(family, rows=200, seed=5)
    scores = {}
    for pseudocount in (0.001, 3.0, 1000.0, (0.001, 3.0, 1000.0)):
        settings = EMSettings(epochs=0, full_epochs=6, pseudocount=pseudocount)
        result = fit(build(family), x, settings, validation=valid, progress=False)
        scores[pseudocount] = result.best
    assert result.pseudocount in (0.001, 3.0, 1000.0)
    assert scores.pop((0.001, 3.0, 1000.0)) <= scores[0.001] + 1e-6


# Checkpoints


class StopError(Exception):
    pass


def interrupted_fit(circuit, *args, after, **kwargs):
    r"""Fits until a checkpoint is written for the last time."""
    save, count = Learner.save, 0

    def save_and_stop(self, path):
        nonlocal count
        save(self, path)
        count += 1
        if count == after:
            raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "save", save_and_stop)
        with pytest.raises(StopError):
            fit(circuit, *args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("after", [1, 4, 6])
def test_resumed_fit_equals_uninterrupted(family, after, tmp_path):
    x, valid = clusters(family, rows=60), clusters(family, rows=30, seed=1)
    observed = np.random.default_rng(2).random(x.shape) < 0.8
    settings = EMSettings(epochs=4, full_epochs=2, batch_size=16, pseudocount=(0.1, 1.0))
    arguments = {"observed": observed, "validation": valid, "progress": False}

    whole = build(family)
    expected = fit(whole, x, settings, **arguments)

    file = tmp_path / "checkpoint"
    interrupted_fit(build(family), x, settings, after=after, checkpoint=file, **arguments)
    resumed = build(family, seed=99)  # the parameters are those of the file
    result = fit(resumed, x, settings, checkpoint=file, **arguments)
    assert_equal(resumed, whole)
    assert result == expected


def test_finished_checkpoint_is_the_result(tmp_path):
    file, x = tmp_path / "checkpoint", clusters("Binomial", rows=30)
    settings = EMSettings(epochs=1, full_epochs=1)
    one, two = build("Binomial"), build("Binomial", seed=5)
    fit(one, x, settings, checkpoint=file, progress=False)
    fit(two, x, settings, checkpoint=file, progress=False)
    assert_equal(one, two)


def test_foreign_checkpoint_is_refused(tmp_path):
    file, x = tmp_path / "checkpoint", clusters(rows=30)
    settings = EMSettings(epochs=2, batch_size=10)
    rest = {"checkpoint": file, "progress": False}
    fit(build("Categorical"), x, settings, **rest)

    sentence = "expected a checkpoint of this fit in .* remove it to start anew"
    changed = x.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 4
    with pytest.raises(ValueError, match=sentence):
        fit(build("Categorical"), changed, settings, **rest)
    with pytest.raises(ValueError, match=sentence):
        fit(build("Categorical"), x, EMSettings(epochs=3, batch_size=10), **rest)
    with pytest.raises(ValueError, match=sentence):
        fit(build("Categorical", tree=chain(6)), x, settings, **rest)
    with pytest.raises(ValueError, match=sentence):
        fit(build("Binomial"), x, settings, **rest)
    with pytest.raises(ValueError, match=sentence):
        fit(build("Categorical"), x, settings, weights=np.arange(30), **rest)
    with pytest.raises(ValueError, match=sentence):
        fit(build("Categorical"), x, settings, validation=x, **rest)

    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected a file that probnets wrote"):
        fit(build("Categorical"), x, settings, **rest)


def test_checkpoint_knows_missing_reals(tmp_path):
    file, x = tmp_path / "checkpoint", clusters("Gaussian", rows=10)
    x[0, 0] = 0.0
    rest = {"checkpoint": file, "progress": False}
    fit(build("Gaussian"), x, EMSettings(epochs=1), **rest)
    x[0, 0] = math.nan  # which is zero where it is not looked at
    with pytest.raises(ValueError, match="expected a checkpoint of this fit"):
        fit(build("Gaussian"), x, EMSettings(epochs=1), **rest)


# Edges and errors


@pytest.mark.parametrize("tree", [chain(1), chain(3), quad_tree(2, 2, tied=True)])
@pytest.mark.parametrize(("units", "values"), [(1, 1), (1, 2), (2, 1)])
def test_smallest(tree, units, values):
    circuit = TreeCircuit(tree, Categorical(tree.inputs, units, values))
    x = torch.randint(values, (3, tree.variables))
    result = fit(circuit, x, EMSettings(epochs=2, batch_size=2), progress=False)
    assert np.isfinite([train for train, _ in result.history]).all()


def test_variable_that_is_never_observed():
    for family in FAMILIES:
        circuit, x = build(family), clusters(family, rows=20)
        before = copy.deepcopy(circuit.inputs)
        observed = np.ones_like(x, dtype=bool)
        observed[:, 2] = False
        settings = EMSettings(epochs=1, batch_size=10, pseudocount=0.0)
        fit(circuit, x, settings, observed=observed, progress=False)
        for new, old in zip(circuit.inputs.parameters(), before.parameters(), strict=True):
            assert not new.isnan().any()
            if family != "DiscretisedLogistic":  # whose ascent sees all parameters at once
                assert_close(new[2].softmax(0), old[2].softmax(0), rtol=1e-4, atol=1e-4)


def test_rejects_data():
    circuit = build("Categorical")
    good = clusters(rows=5)
    for bad in (good[:0], good[0], good[None]):
        with pytest.raises(ValueError, match=r"expected data with one batch dimension \(N, …\)"):
            fit(circuit, bad, progress=False)
    for bad in (good + 4, good - 9, good + 0.5):
        with pytest.raises(ValueError, match="expected integers from 0 to 3, got"):
            fit(circuit, bad, progress=False)
    with pytest.raises(ValueError, match=r"expected x with shape \(\*, 6\), got \(5, 5\)"):
        fit(circuit, good[:, :5], progress=False)
    with pytest.raises(ValueError, match="integers from 0 to 3"):
        fit(circuit, good, validation=good + 1, progress=False)


@pytest.mark.parametrize("bad", [[1.0] * 4, [0.0] * 5, [1, 1, 1, 1, -1.0], [math.nan] * 5])
def test_rejects_weights(bad):
    with pytest.raises(ValueError, match="expected 5 non-negative weights, not all zero"):
        fit(build("Categorical"), clusters(rows=5), weights=np.array(bad), progress=False)


def test_rejects_data_of_probability_zero():
    inputs = Categorical(TREE.inputs, 3, 4)
    circuit = TreeCircuit(TREE, inputs)
    with torch.no_grad():
        inputs.logits[:, 3] = -math.inf
    x = np.zeros((4, 6), dtype=int)
    x[2, 1] = 3
    sentence = "expected data of positive probability, got row 2"
    with pytest.raises(ValueError, match=sentence):
        fit(circuit, x, EMSettings(epochs=0), progress=False)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epochs": -1}, "expected no negative epochs"),
        ({"full_epochs": -1}, "expected no negative epochs"),
        ({"batch_size": 0}, "a batch size of 1 or more"),
        ({"first_step": 0.0}, r"expected steps in \(0, 1\]"),
        ({"last_step": 1.5}, r"expected steps in \(0, 1\]"),
        ({"pseudocount": -0.1}, "expected pseudocounts of 0 or more"),
        ({"pseudocount": ()}, "expected pseudocounts of 0 or more"),
        ({"pseudocount": (0.1, -1.0)}, "expected pseudocounts of 0 or more"),
    ],
)
def test_rejects_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        EMSettings(**settings)


def test_tables_are_named():
    assert Tables._fields == ("root", "sums", "inputs", "log_scale")
