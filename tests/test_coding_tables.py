r"""Tests for the probnets.coding.tables module."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from coding_cases import CASES, case, circuit_on
from hypothesis import given
from hypothesis.extra.numpy import arrays

from probnets.circuits import (
    Bernoulli,
    Categorical,
    Gaussian,
    Tree,
    TreeCircuit,
    binary_tree,
    chain,
)
from probnets.coding import CodeTables
from probnets.coding.tables import _cumulative

TOTAL = 1 << 24


def test_by_hand():
    circuit = TreeCircuit(chain(2, tied=True), Bernoulli(1, units=1, dtype=torch.float64))
    circuit.get_parameter("inputs.logits").data[0, 0] = math.log(1 / 2)  # heads in one of three
    tables = CodeTables.from_circuit(circuit)

    # Two values have a unit each for sure, and share the other 2^24 - 2 as two to one.
    assert tables.root.tolist() == [TOTAL]
    assert tables.sums.tolist() == [[[TOTAL]]]
    assert tables.cumulative[0, :, 0].tolist() == [0, round((TOTAL - 2) * 2 / 3) + 1, TOTAL]
    assert (tables.units, tables.values, tables.bits) == (1, 2, 29)


@pytest.mark.parametrize(
    ("units", "bits"), [(1, 29), (2, 28), (3, 27), (4, 27), (5, 26), (64, 23), (65, 22)]
)
def test_bits_of_a_message(units, bits):
    tables = CodeTables.from_circuit(circuit_on(chain(2), units, 2))
    assert tables.bits == bits


@pytest.mark.parametrize("name", CASES)
def test_tables_are_the_circuits_probabilities(name):
    circuit, tables = case(name)
    assert isinstance(circuit.inputs, Categorical)
    assert {a.dtype for a in (tables.root, tables.sums, tables.cumulative)} == {np.dtype("int32")}
    assert tables.root.sum() == TOTAL
    assert (tables.sums.sum(-1) == TOTAL).all()
    assert not tables.cumulative[:, 0].any()
    assert (tables.cumulative[:, -1] == TOTAL).all()
    assert (np.diff(tables.cumulative, axis=1) >= 1).all()

    with torch.no_grad():
        root, sums, inputs = circuit.log_root(), circuit.log_sums(), circuit.inputs.log_table()
    units = tables.values + 1  # of rounding
    np.testing.assert_allclose(tables.root / TOTAL, root.exp(), atol=2 / TOTAL)
    np.testing.assert_allclose(tables.sums / TOTAL, sums.exp(), atol=2 / TOTAL)
    found = np.diff(tables.cumulative, axis=1) / TOTAL
    np.testing.assert_allclose(found, inputs.exp(), atol=units / TOTAL)


@given(
    probs=arrays(
        np.float64,
        st.tuples(st.integers(1, 4), st.integers(1, 70)),
        elements=st.floats(0, 1, allow_subnormal=False) | st.sampled_from([0.0, 1e-9, 1.0]),
    ),
    floor=st.integers(0, 2),
)
def test_cumulative_sums_of_any_probabilities(probs, floor):
    probs[:, 0] += 1e-6  # some value is possible
    whole = _cumulative(probs, floor=floor)
    steps = np.diff(whole)

    assert whole.dtype == np.int32
    assert not whole[:, 0].any()
    assert (whole[:, -1] == TOTAL).all()
    assert steps.min() >= floor
    exact = probs / probs.sum(1, keepdims=True) * (TOTAL - floor * probs.shape[1]) + floor
    assert np.abs(steps - exact).max() <= 1 + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("extreme", [50.0, 1e30, math.inf])
def test_extreme_parameters(extreme):
    circuit = circuit_on(binary_tree(6), 3, 256)
    for parameter in circuit.parameters():
        parameter.copy_(extreme * parameter.sign())
        parameter[parameter > 0] = min(extreme, 1e300)
    circuit.root_logits[0] = circuit.sum_logits[..., 0] = 1.0
    circuit.get_parameter("inputs.logits")[:, 0] = 1.0
    tables = CodeTables.from_circuit(circuit)  # which checks itself
    assert np.diff(tables.cumulative, axis=1).min() == 1
    assert tables.sums.min() == 0


@torch.no_grad()
def test_certain_units():
    circuit = circuit_on(chain(3), 3, 4)
    circuit.root_logits.copy_(torch.tensor([-50.0, 50.0, -math.inf]))
    circuit.sum_logits[0, 1] = torch.tensor([-math.inf, -math.inf, 3.0])
    circuit.get_parameter("inputs.logits")[0, :, 0] = torch.tensor([-50.0, 50.0, -50.0, -math.inf])
    tables = CodeTables.from_circuit(circuit)
    assert tables.root.tolist() == [0, TOTAL, 0]
    assert tables.sums[0, 1].tolist() == [0, 0, TOTAL]
    assert np.diff(tables.cumulative[0, :, 0]).tolist() == [1, TOTAL - 3, 1, 1]


def test_float32_circuits():
    circuit = circuit_on(binary_tree(7), 16, 256)
    exact = CodeTables.from_circuit(circuit)
    single = CodeTables.from_circuit(circuit.float())
    for name in ("root", "sums", "cumulative"):
        np.testing.assert_allclose(getattr(single, name), getattr(exact, name), atol=40)


@pytest.mark.parametrize("part", ["root_logits", "sum_logits", "inputs.logits"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rejects_parameters_that_are_no_numbers(part, value):
    circuit = circuit_on(chain(3), 3, 4)
    circuit.get_parameter(part).data.flatten()[1] = value
    with pytest.raises(ValueError, match="expected finite parameters, got nan"):
        CodeTables.from_circuit(circuit)


def test_rejects_rows_without_probability():
    circuit = circuit_on(chain(3), 3, 4)
    circuit.sum_logits.data[0, 0] = -math.inf
    with pytest.raises(ValueError, match="expected finite parameters"):
        CodeTables.from_circuit(circuit)


def test_rejects_densities():
    with pytest.raises(TypeError, match="expected discrete inputs to code with, got Gaussian"):
        CodeTables.from_circuit(TreeCircuit(chain(3), Gaussian(3, units=2)))


def test_rejects_too_many_values():
    circuit = circuit_on(chain(1), 1, (1 << 16) + 1)
    with pytest.raises(ValueError, match="at most 65536 values, got 65537; split them"):
        CodeTables.from_circuit(circuit)


def broken(name):
    r"""Tables that are no probabilities, each in its own way."""
    tables = case("deep")[1]
    root, sums, cumulative = tables.root.copy(), tables.sums.copy(), tables.cumulative.copy()
    if name == "root":
        root[0] += 1
    elif name == "root below zero":
        root[:2] = (-1, root[0] + root[1] + 1)
    elif name == "sums":
        sums[0, 0, 0] -= 1
    elif name == "sums below zero":
        sums[0, 0] = (-1, TOTAL + 1, 0)
    elif name == "start":
        cumulative[0, 0, 0] = 1
    elif name == "end":
        cumulative[0, -1, 0] -= 1
    elif name == "no step":
        cumulative[0, 1, 0] = 0
    elif name == "steps that overflow":
        # Each step is positive modulo 2^32.
        cumulative[0, :, 0] = (0, 2**31 - 1, -(2**31) + 5, -9, TOTAL)
    return tables.tree, root, sums, cumulative


@pytest.mark.parametrize(
    "name",
    [
        *("root", "root below zero", "sums", "sums below zero", "start", "end", "no step"),
        "steps that overflow",
    ],
)
def test_rejects_what_is_no_probability(name):
    CodeTables(*broken("nothing"))
    with pytest.raises(ValueError, match="expected tables of probabilities in units of 2"):
        CodeTables(*broken(name))


@pytest.mark.parametrize("part", ["root", "sums", "cumulative"])
def test_rejects_other_shapes_and_types(part):
    tables = case("deep")[1]
    array = getattr(tables, part)
    for bad in (array.astype(np.int64), array[..., None], array[:-1], array.ravel()[0]):
        with pytest.raises(ValueError, match="expected int32 tables with shapes"):
            replace(tables, **{part: bad})


def test_rejects_tables_without_values():
    tables = case("deep")[1]
    with pytest.raises(ValueError, match="expected tables of probabilities"):
        replace(tables, cumulative=tables.cumulative[:, :1])


def test_digest_names_the_model():
    tables = case("deep")[1]
    same = replace(tables, root=tables.root.copy())
    assert same.digest == tables.digest
    assert len(tables.digest) == 32

    other = tables.root[::-1].copy()
    assert replace(tables, root=other).digest != tables.digest
    tree = tables.tree
    region = tree.region.copy()
    region[0] = (region[0] + 1) % tree.regions
    moved = Tree(tree.parent, region, tree.sum_group, tree.input_group, tree.origin)
    assert replace(tables, tree=moved).digest != tables.digest
    assert len({case(name)[1].digest for name in CASES}) == len(CASES)


def test_digest_is_stable():
    # Of integers, hence the same on every machine and in every version.
    half = TOTAL // 2
    tables = CodeTables(
        chain(2, tied=True),
        np.array([half, half], np.int32),
        np.array([[[TOTAL, 0], [0, TOTAL]]], np.int32),
        np.array([[[0, 0], [1, half], [TOTAL, TOTAL]]], np.int32),
    )
    assert tables.digest.hex()[:16] == "42ebd31764f40bbf"
