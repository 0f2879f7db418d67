r"""Tests for the probnets.circuits.access module."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from probnets.circuits import (
    Bernoulli,
    Binomial,
    Categorical,
    DiscretisedLogistic,
    Gaussian,
    PathEvaluator,
    Tree,
    TreeCircuit,
    binary_tree,
    chain,
    hidden_chow_liu_tree,
    leave_one_out,
    path_conditionals,
    quad_tree,
)
from probnets.circuits.access import path_conditionals_torch


def close(actual, expected, atol=1e-12):
    assert_close(actual, expected, rtol=1e-10, atol=atol)


def spread():
    r"""Builds a tree with a wide region, an empty one and several variables in one place."""
    return Tree.from_parents([-1, *[0] * 11, 3, 3, 12], [0, *range(1, 11), 12, 14, 14, 14, 5])


def learned():
    data = np.random.default_rng(0).integers(0, 3, (60, 4, 4)) + np.arange(4)
    return hidden_chow_liu_tree(data, levels=6)


TREES = {
    "one": lambda: binary_tree(1),
    "chain": lambda: chain(9),
    "tied chain": lambda: chain(9, tied=True),
    "binary": lambda: binary_tree(13),
    "tied binary": lambda: binary_tree(16, tied=True),
    "quad": lambda: quad_tree(3, 4),
    "colour": lambda: quad_tree(2, 3, channels=3, tied=True),
    "spread": spread,
    "learned": learned,
}
INPUTS = {
    "categorical": lambda groups: Categorical(groups, 3, 4),
    "bernoulli": lambda groups: Bernoulli(groups, 3),
    "binomial": lambda groups: Binomial(groups, 2, 6),
    "logistic": lambda groups: DiscretisedLogistic(groups, 5, 7),
}


def build(tree="binary", inputs="categorical"):
    tree = TREES[tree]()
    return TreeCircuit(tree, INPUTS[inputs](tree.inputs)).double()


def agree(evaluator, circuit, x, variable):
    r"""Compares an evaluator with the queries, which take whole passes."""
    with torch.no_grad():
        expected = leave_one_out(circuit, x)[variable]
        log_prob = circuit.log_prob(x).item()
    close(evaluator.conditional(variable), expected)
    assert evaluator.log_prob() == pytest.approx(log_prob, rel=1e-10, abs=1e-10)


# By hand


def test_by_hand():
    inputs = Categorical(2, units=2, values=2)
    circuit = TreeCircuit(chain(2), inputs).double()
    with torch.no_grad():
        circuit.root_logits.copy_(torch.tensor([0.25, 0.75]).log())
        circuit.sum_logits.copy_(torch.tensor([[[0.5, 0.5], [0.0, 1.0]]]).log())
        table = torch.tensor([[[1.0, 0.5], [0.0, 0.5]], [[0.5, 0.0], [0.5, 1.0]]])
        inputs.logits.copy_(table.log())
    evaluator = PathEvaluator(circuit)
    assert evaluator.log_prob() == 0.0
    assert_close(evaluator.conditional(0), torch.tensor([0.625, 0.375]).double())

    evaluator.set(0, 1)  # the root's unit is the second, and so is the one below
    assert evaluator.log_prob() == pytest.approx(math.log(0.375))
    assert evaluator.conditional(1).tolist() == [0.0, 1.0]

    evaluator.set(1, 0)  # which never is zero
    assert evaluator.log_prob() == -math.inf
    assert evaluator.conditional(1).tolist() == [0.0, 1.0]
    assert evaluator.conditional(0).tolist() == [1.0, 0.0]
    evaluator.clear(0)
    assert evaluator.log_prob() == pytest.approx(math.log(0.0625))


# Against the queries


@pytest.mark.parametrize(
    ("tree", "inputs"),
    [*((tree, "categorical") for tree in TREES), *(("spread", inputs) for inputs in INPUTS)],
)
def test_matches_queries(tree, inputs):
    circuit = build(tree, inputs)
    D, X = circuit.tree.variables, circuit.tables().inputs.shape[1]
    source = np.random.default_rng(1)
    x = torch.full((D,), math.nan, dtype=torch.float64)

    evaluator = PathEvaluator(circuit)
    for _ in range(6):
        v = int(source.integers(D))
        if source.random() < 0.3:
            evaluator.clear(v)
            x[v] = math.nan
        else:
            x[v] = float(source.integers(X))
            evaluator.set(v, x[v].item())
        agree(evaluator, circuit, x, int(source.integers(D)))

    agree(PathEvaluator(circuit, x), circuit, x, 0)


@settings(max_examples=25)
@given(
    parents=st.lists(st.integers(0, 30), max_size=9),
    regions=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    steps=st.lists(st.tuples(st.integers(0, 11), st.integers(-1, 2)), max_size=8),
)
def test_any_tree_and_any_steps(parents, regions, steps):
    parents = [-1, *(p % (i + 1) for i, p in enumerate(parents))]
    tree = Tree.from_parents(parents, [r % len(parents) for r in regions])
    circuit = TreeCircuit(tree, Categorical(tree.inputs, 2, 3)).double()
    x = torch.full((len(regions),), math.nan, dtype=torch.float64)

    evaluator = PathEvaluator(circuit)
    for v, value in steps:
        v %= len(regions)
        evaluator.set(v, value) if value >= 0 else evaluator.clear(v)
        x[v] = value if value >= 0 else math.nan
    agree(evaluator, circuit, x, len(regions) - 1)


def test_gaussian_inputs_have_likelihoods():
    tree = quad_tree(3, 3)
    circuit = TreeCircuit(tree, Gaussian(tree.inputs, 4), shape=(3, 3)).double()
    x = 30 * torch.randn(3, 3, dtype=torch.float64)  # densities of exp(-1000) and less
    x[0, 1] = math.nan

    evaluator = PathEvaluator(circuit, x)
    assert evaluator.log_prob() == pytest.approx(circuit.log_prob(x).item(), rel=1e-12)
    x[1, 1] = -70.0
    evaluator.set(4, -70.0)
    assert evaluator.log_prob() == pytest.approx(circuit.log_prob(x).item(), rel=1e-12)
    with pytest.raises(TypeError, match="expected discrete inputs, got Gaussian"):
        evaluator.conditional(0)
    with pytest.raises(ValueError, match="expected finite values"):
        evaluator.set(4, math.inf)


# Small numbers and zeros


def test_many_small_factors_do_not_underflow():
    # Each child favours one unit by e^90: 40 of them by more than floating point can hold, and
    # the other 40 the other unit.
    tree = Tree.from_parents([-1] + [0] * 80, range(81))
    inputs = Categorical(81, 2, 2)
    circuit = TreeCircuit(tree, inputs).double()
    with torch.no_grad():
        circuit.sum_logits.copy_(torch.eye(2).log())
        inputs.logits[1:41] = torch.tensor([[-90.0, 0.0], [0.0, -90.0]])
        inputs.logits[41:] = torch.tensor([[0.0, -90.5], [-90.5, 0.0]])
    x = torch.zeros(81, dtype=torch.float64)

    evaluator = PathEvaluator(circuit)
    for v in range(81):
        evaluator.set(v, 0)
    for v in (0, 1, 80):
        agree(evaluator, circuit, x, v)
    agree(PathEvaluator(circuit, x), circuit, x, 41)


def test_tiny_inputs_count_and_zeros_do_not():
    inputs = Categorical(5, 3, 4)
    circuit = TreeCircuit(binary_tree(5), inputs).double()
    with torch.no_grad():
        inputs.logits[:, 0] = -400.0
        inputs.logits[:, 1] = -1000.0  # below the floating point type
        inputs.logits[:, 2, 0] = -math.inf
    x = torch.tensor([1.0, 0.0, 2.0, 1.0, 3.0]).double()

    evaluator = PathEvaluator(circuit, x)
    agree(evaluator, circuit, x, 3)
    assert evaluator.log_prob() < -2000
    for v, value in enumerate([0, 1, 1, 2, 2]):
        x[v] = value
        evaluator.set(v, value)
        agree(evaluator, circuit, x, 4 - v)
    order = [3, 0, 4, 1, 2]
    expected = path_conditionals_torch(circuit, x, order).detach()
    # Relative: the smallest here are e^-400.
    close(path_conditionals(circuit, x, order), expected, atol=0.0)


@pytest.mark.parametrize("far", [200.0, 485.0, 624.0])  # of 2^256, 2^512 and 2^768
def test_small_numbers_next_to_large_ones(far):
    # The lower value is e^far times more probable under the unit that the upper one excludes.
    inputs = Categorical(2, 2, 2)
    circuit = TreeCircuit(chain(2), inputs).double()
    with torch.no_grad():
        circuit.sum_logits.copy_(torch.eye(2).log())
        inputs.logits[0] = torch.tensor([[-math.inf, 0.0], [0.0, -math.inf]])
        inputs.logits[1] = torch.tensor([[0.0, -far], [-1.0, 0.0]])
    x = torch.zeros(2, dtype=torch.float64)

    agree(PathEvaluator(circuit, x), circuit, x, 0)
    expected = path_conditionals_torch(circuit, x, [1, 0]).detach()
    assert expected[0, 0] > 0.0
    close(path_conditionals(circuit, x, [1, 0]), expected, atol=0.0)


def test_zeros_are_exact():
    # A chain that must repeat its first value, and units that see one value each.
    inputs = Categorical(6, 3, 3)
    circuit = TreeCircuit(chain(6), inputs).double()
    with torch.no_grad():
        circuit.sum_logits.copy_(torch.eye(3).log())
        inputs.logits.copy_(torch.eye(3).log())
    evaluator = PathEvaluator(circuit)
    evaluator.set(3, 1)
    for v in range(6):
        if v != 3:
            assert evaluator.conditional(v).tolist() == [0.0, 1.0, 0.0]

    evaluator.set(0, 2)
    assert evaluator.log_prob() == -math.inf
    assert evaluator.conditional(0).tolist() == [0.0, 1.0, 0.0]
    assert evaluator.conditional(3).tolist() == [0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="probability zero; train with a pseudocount"):
        evaluator.conditional(5)
    evaluator.clear(3)
    assert evaluator.log_prob() == pytest.approx(-math.log(3))
    assert evaluator.conditional(5).tolist() == [0.0, 0.0, 1.0]


def test_long_use_does_not_drift():
    circuit = build("spread")
    evaluator = PathEvaluator(circuit)
    for n in range(500):
        evaluator.set(n % 16, n % 4)
    for v in range(16):
        evaluator.clear(v)
    assert evaluator.log_prob() == pytest.approx(0.0, abs=1e-14)


# The path scheme


@pytest.mark.parametrize("tree", TREES)
def test_sequence_matches_definition(tree):
    circuit = build(tree)
    D = circuit.tree.variables
    x = torch.randint(0, 4, (2, D))
    for order in (None, np.random.default_rng(2).permutation(D)):
        expected = path_conditionals_torch(circuit, x, order).detach()
        close(path_conditionals(circuit, x, order), expected)


def test_sequence_is_set_and_conditional():
    circuit = build("quad")
    x = torch.randint(0, 4, (12,))
    evaluator = PathEvaluator(circuit)
    whole = evaluator.sequence(x, range(12))
    products = evaluator.products
    assert evaluator.log_prob() == 0.0  # nothing is set

    for v in range(12):
        close(evaluator.conditional(v), whole[v])
        evaluator.set(v, int(x[v]))
    assert evaluator.products == 2 * products


@pytest.mark.parametrize("tree", ["chain", "binary", "colour", "spread", "learned"])
def test_conditionals_multiply_to_joint(tree):
    circuit = build(tree)
    D = circuit.tree.variables
    x = torch.randint(0, 4, (2, 3, D))
    order = np.random.default_rng(3).permutation(D)
    result = path_conditionals(circuit, x, order)

    assert result.shape == (2, 3, D, 4)
    assert result.dtype == torch.float64
    assert_close(result.sum(-1), torch.ones(2, 3, D, dtype=torch.float64))
    chosen = result.gather(-1, x[..., None])[..., 0]
    close(chosen.log().sum(-1), circuit.log_prob(x).detach())


def test_missing_values_are_passed_over():
    circuit = build("binary")
    x = torch.randint(0, 4, (13,)).double()
    x[[2, 7]] = math.nan
    expected = path_conditionals_torch(circuit, x, range(13)).detach()
    close(path_conditionals(circuit, x, range(13)), expected)


def test_accepts_the_shape_of_the_circuit():
    tree = quad_tree(2, 2)
    circuit = TreeCircuit(tree, Categorical(4, 2, 3), shape=(2, 2)).double()
    x = torch.randint(0, 3, (2, 2))
    assert path_conditionals(circuit, x[None]).shape == (1, 4, 3)
    assert PathEvaluator(circuit, x).log_prob() == pytest.approx(circuit.log_prob(x).item())


def test_computes_in_double_whatever_the_circuit():
    circuit = build("binary").float()
    x = torch.randint(0, 4, (13,))
    expected = leave_one_out(circuit.double(), x).detach()
    evaluator = PathEvaluator(circuit.float(), x)
    close(evaluator.conditional(5), expected[5])


def test_keeps_the_parameters_of_its_making():
    circuit = build("binary")
    evaluator = PathEvaluator(circuit, x := torch.randint(0, 4, (13,)))
    before = circuit.log_prob(x).item()
    with torch.no_grad():
        circuit.sum_logits.zero_()
    evaluator.set(0, int(x[0]))
    assert evaluator.log_prob() == pytest.approx(before)
    assert circuit.root_logits.requires_grad


# Cost


@pytest.mark.parametrize("D", [16, 64, 256])
def test_products_grow_like_the_depth(D):
    tree = binary_tree(D)
    depth = int(math.log2(D))
    evaluator = PathEvaluator(TreeCircuit(tree, Bernoulli(D, 2)))
    assert evaluator.products == 0

    for v, operation in enumerate(["set", "clear", "conditional", "log_prob"]):
        before = evaluator.products
        arguments = {"set": (v, 1), "log_prob": ()}.get(operation, (v,))
        getattr(evaluator, operation)(*arguments)
        assert evaluator.products - before == (0 if operation == "log_prob" else depth)

    before = evaluator.products
    evaluator.sequence(torch.zeros(D))
    assert evaluator.products - before == 2 * depth * D


def test_a_start_costs_one_pass():
    circuit = build("spread")
    evaluator = PathEvaluator(circuit, torch.zeros(16))
    assert evaluator.products == circuit.tree.regions - 1


# Errors


@pytest.mark.parametrize("variable", [-1, 13])
def test_rejects_stray_variables(variable):
    evaluator = PathEvaluator(build())
    for call in (evaluator.conditional, evaluator.clear, lambda v: evaluator.set(v, 0)):
        with pytest.raises(IndexError, match=f"expected a variable from 0 to 12, got {variable}"):
            call(variable)


@pytest.mark.parametrize("value", [-1, 4, 0.5, math.nan])
def test_rejects_values_out_of_range(value):
    evaluator = PathEvaluator(build())
    with pytest.raises(ValueError, match="expected integers from 0 to 3"):
        evaluator.set(0, value)
    assert evaluator.log_prob() == 0.0


def test_rejects_a_batch_and_other_shapes():
    with pytest.raises(ValueError, match="expected one observation, got a batch of shape"):
        PathEvaluator(build(), torch.zeros(2, 13))
    with pytest.raises(ValueError, match=r"expected x with shape \(\*, 13"):
        PathEvaluator(build(), torch.zeros(4))


@pytest.mark.parametrize("order", [[0, 1], [0] * 13, list(range(1, 14)), np.eye(13)])
def test_rejects_orders_that_are_no_permutation(order):
    with pytest.raises(ValueError, match="expected an order of the variables 0 to 12"):
        path_conditionals(build(), torch.zeros(13), order)


def test_rejects_gaussian_inputs():
    circuit = TreeCircuit(chain(2), Gaussian(2, 2))
    for conditionals in (path_conditionals, path_conditionals_torch):
        with pytest.raises(TypeError, match="expected discrete inputs, got Gaussian"):
            conditionals(circuit, torch.zeros(2))


def test_rejects_impossible_rows():
    inputs = Categorical(3, 2, 2)
    circuit = TreeCircuit(chain(3), inputs).double()
    with torch.no_grad():
        inputs.logits[0, 1] = -math.inf
    x = torch.tensor([[0, 0, 0], [1, 0, 0]])
    with pytest.raises(ValueError, match="got probability zero in row 1; train"):
        path_conditionals(circuit, x)
    # Nobody asks after the last variable.
    assert path_conditionals(circuit, x, [1, 2, 0])[1, 0].tolist() == [1.0, 0.0]
