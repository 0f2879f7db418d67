r"""Tests for the probnets.circuits.files module."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.testing import assert_close

from probnets.backend import checkpoints
from probnets.circuits import (
    Bernoulli,
    Binomial,
    Categorical,
    DiscretisedLogistic,
    Gaussian,
    TreeCircuit,
    binary_tree,
    hidden_chow_liu_tree,
    load_circuit,
    quad_tree,
    save_circuit,
)

INPUTS = {
    "categorical": lambda groups, dtype: Categorical(groups, 3, 5, dtype=dtype),
    "bernoulli": lambda groups, dtype: Bernoulli(groups, 3, dtype=dtype),
    "binomial": lambda groups, dtype: Binomial(groups, 4, 6, dtype=dtype),
    "logistic": lambda groups, dtype: DiscretisedLogistic(groups, 2, 16, dtype=dtype),
    "gaussian": lambda groups, dtype: Gaussian(groups, 3, floor=0.25, dtype=dtype),
}


def build(inputs="categorical", dtype=torch.float32):
    tree = quad_tree(3, 2, channels=2, tied=True)
    return TreeCircuit(tree, INPUTS[inputs](tree.inputs, dtype), shape=(3, 2, 2))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "circuit.safetensors"


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", INPUTS)
def test_round_trip(inputs, dtype, path):
    circuit = build(inputs, dtype)
    save_circuit(circuit, path)
    again = load_circuit(path)

    assert repr(again) == repr(circuit)
    assert again.shape == circuit.shape
    assert type(again.inputs) is type(circuit.inputs)
    assert_close(again.state_dict(), circuit.state_dict(), rtol=0, atol=0)
    for name in ("parent", "region", "sum_group", "input_group", "origin"):
        assert np.array_equal(getattr(again.tree, name), getattr(circuit.tree, name))
    x = torch.randint(0, 2, (4, 3, 2, 2))
    assert torch.equal(again.log_prob(x), circuit.log_prob(x))
    assert all(p.requires_grad for p in again.parameters())


def test_gaussians_keep_their_floor(path):
    save_circuit(build("gaussian"), path)
    inputs = load_circuit(path).inputs
    assert isinstance(inputs, Gaussian)
    assert inputs.floor == 0.25


@pytest.mark.parametrize(
    "tree",
    [binary_tree(1), hidden_chow_liu_tree(np.random.default_rng(0).integers(0, 4, (30, 7)))],
    ids=["one variable", "learned"],
)
def test_any_tree(tree, path):
    circuit = TreeCircuit(tree, Categorical(tree.inputs, 2, 4)).double()
    save_circuit(circuit, path)
    x = torch.randint(0, 4, (5, tree.variables))
    assert torch.equal(load_circuit(path).log_prob(x), circuit.log_prob(x))


def test_zeros_stay_zeros(path):
    circuit = build()
    with torch.no_grad():
        circuit.sum_logits[0, 0, 1] = -torch.inf
    save_circuit(circuit, path)
    assert load_circuit(path).log_sums()[0, 0, 1] == -torch.inf


def test_saving_again_gives_the_same_file(path):
    save_circuit(build(), path)
    first = path.read_bytes()
    save_circuit(load_circuit(path), path)
    assert path.read_bytes() == first


def test_reading_draws_no_numbers(path):
    save_circuit(build("logistic"), path)
    before = torch.get_rng_state()
    load_circuit(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_circuit_is_free_of_the_file(path):
    save_circuit(build(), path)
    circuit = load_circuit(path)
    path.unlink()
    with torch.no_grad():
        circuit.root_logits.add_(1.0)
    circuit.log_prob(torch.zeros(12)).backward()
    assert circuit.root_logits.grad is not None


def test_the_format(path):
    # A promise: later versions read these names and facts.
    save_circuit(build("gaussian"), path)
    with safe_open(path, framework="numpy") as file:
        names, facts = set(file.keys()), json.loads(file.metadata()["probnets"])
    assert facts == {
        "format": "circuit",
        "version": 1,
        "inputs": {"class": "Gaussian", "groups": 2, "units": 3, "floor": 0.25},
        "shape": [3, 2, 2],
    }
    assert names == {
        *("tree.parent", "tree.region", "tree.sum_group", "tree.input_group", "tree.origin"),
        *("circuit.root_logits", "circuit.sum_logits"),
        *("circuit.inputs.mean", "circuit.inputs.log_scale"),
    }


# Errors


def test_rejects_inputs_of_others(path):
    class Categorical(INPUTS["categorical"](1, None).__class__):
        pass

    circuit = TreeCircuit(binary_tree(2), Categorical(2, 2, 2))
    with pytest.raises(TypeError, match=r"expected inputs of one of \['Bernoulli'"):
        save_circuit(circuit, path)
    assert not path.exists()


def test_rejects_types_that_files_do_not_hold(path):
    with pytest.raises(TypeError, match=r"expected parameters in .*, got torch.bfloat16"):
        save_circuit(build().bfloat16(), path)


def test_rejects_missing_files(path):
    with pytest.raises(FileNotFoundError, match="expected a file of arrays at"):
        load_circuit(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 an archive", bytes(100), b"\xff" * 100])
def test_rejects_foreign_files(content, path):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a file that probnets wrote at"):
        load_circuit(path)


def test_rejects_arrays_of_others(path):
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="expected a file that probnets wrote at"):
        load_circuit(path)
    checkpoints.write(path, {"x": np.zeros(3)}, {"best": 1.0})
    with pytest.raises(ValueError, match=r"expected a circuit in .*, got a file of another kind"):
        load_circuit(path)


def test_rejects_every_truncation(path):
    save_circuit(build(), path)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="expected a"):
            load_circuit(path)


def alter(path, arrays=None, **facts):
    r"""Writes a circuit and changes some of what the file says."""
    save_circuit(build(), path)
    old_arrays, old_facts = checkpoints.read(path)
    new = {**old_arrays, **(arrays or {})}
    new = {name: array for name, array in new.items() if array is not None}
    checkpoints.write(path, new, {**old_facts, **facts})


@pytest.mark.parametrize("version", [2, 1000])
def test_rejects_later_versions(version, path):
    alter(path, version=version)
    with pytest.raises(ValueError, match=rf"or less in .*, got {version}; a later release"):
        load_circuit(path)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"version": "1"}, "format version is '1'"),
        ({"version": None}, "format version is None"),
        ({"version": 0}, "format version is 0"),
        ({"shape": [4, 4]}, "expected a shape of 12 elements"),
        ({"shape": "abc"}, ""),
        ({"shape": None, "inputs": None}, ""),
        ({"inputs": {"class": "Laplace", "groups": 2, "units": 3}}, "no 'Laplace'"),
        ({"inputs": {"class": "Categorical", "groups": 2, "units": 3}}, "missing"),
        ({"inputs": {"class": "Bernoulli", "groups": 2, "units": 3}}, "have shapes"),
        ({"inputs": {"class": "Categorical", "groups": 2, "units": -3, "values": 5}}, ""),
        ({"inputs": {"class": "Categorical", "groups": 2, "units": 10**7, "values": 5}}, "shapes"),
        ({"inputs": {"class": "Categorical", "groups": 3, "units": 3, "values": 5}}, "shapes"),
        ({"inputs": {"class": "Categorical", "groups": "2", "units": 3, "values": 5}}, ""),
        ({"inputs": {"class": "Categorical", "groups": 2, "units": 3, "x": 5}}, "unexpected"),
    ],
)
def test_rejects_wrong_facts(facts, reason, path):
    alter(path, **facts)
    with pytest.raises(ValueError, match=f"expected a consistent circuit in .*: .*{reason}"):
        load_circuit(path)


R, D, G = 9, 12, 5  # of the circuit on file


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("tree.parent", None, "no 'parent'"),
        ("tree.parent", np.zeros(R, np.int64), "depth-first"),
        ("tree.parent", np.arange(-1, R), "sum groups"),
        ("tree.parent", np.zeros(R), "integers"),
        ("tree.region", np.full(D, R), "region"),
        ("tree.region", np.zeros((D, 1), np.int64), "integers"),
        ("tree.sum_group", np.arange(R) * 2 - 1, "gaps"),
        ("tree.sum_group", np.arange(R) - 1, "shapes"),
        ("tree.input_group", np.arange(D) % 3, "groups|shapes"),
        ("tree.origin", np.zeros(R, np.int64), "order"),
        ("circuit.root_logits", None, "shapes"),
        ("circuit.root_logits", np.zeros(4, np.float32), "shapes"),
        ("circuit.sum_logits", np.zeros((1, 3, 3), np.float32), "shapes"),
        ("circuit.sum_logits", np.zeros((G, 3, 3)), "types"),
        ("circuit.inputs.logits", np.zeros((2, 5, 4), np.float32), "shapes"),
        ("circuit.extra", np.zeros(1, np.float32), "shapes"),
    ],
)
def test_rejects_inconsistent_arrays(name, array, reason, path):
    alter(path, arrays={name: array})
    with pytest.raises(ValueError, match=f"expected a consistent circuit in .*: .*({reason})"):
        load_circuit(path)


def test_an_altered_file_is_still_a_file(path):
    alter(path)
    tree = load_circuit(path).tree
    assert (tree.regions, tree.variables, tree.sums) == (R, D, G)
