r"""Tests for the probnets.circuits.circuit module."""

import copy
import math

import numpy as np
import pytest
import torch
from circuit_cases import (
    TREES,
    Query,
    assert_exact,
    assert_single,
    circuit_on,
    exact_log_prob,
    kill,
    observations,
    randomise,
    with_nan,
)
from safetensors.torch import load, save
from torch.testing import assert_close

from probnets.circuits import (
    Binomial,
    Categorical,
    DiscretisedLogistic,
    Gaussian,
    TreeCircuit,
    binary_tree,
    chain,
    enumerate_joint,
    enumerate_values,
    quad_tree,
)


def by_hand():
    r"""A chain of two steps: root (1/4, 3/4), sums ((1/2, 1/2), (1/5, 4/5))."""
    inputs = Categorical(2, units=2, values=2, dtype=torch.float64)
    circuit = TreeCircuit(chain(2), inputs)
    first = torch.tensor([[0.9, 0.2], [0.1, 0.8]])
    second = torch.tensor([[0.3, 1.0], [0.7, 0.0]])
    with torch.no_grad():
        circuit.root_logits.copy_(torch.tensor([0.25, 0.75]).log())
        circuit.sum_logits.copy_(torch.tensor([[[0.5, 0.5], [0.2, 0.8]]]).log())
        inputs.logits.copy_(torch.stack([first, second]).log())
    return circuit


# Values


def test_by_hand():
    circuit = by_hand()
    x = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    prob = [
        0.25 * 0.9 * (0.5 * 0.3 + 0.5 * 1.0) + 0.75 * 0.2 * (0.2 * 0.3 + 0.8 * 1.0),
        0.25 * 0.9 * (0.5 * 0.7) + 0.75 * 0.2 * (0.2 * 0.7),
        0.25 * 0.1 * (0.5 * 0.3 + 0.5 * 1.0) + 0.75 * 0.8 * (0.2 * 0.3 + 0.8 * 1.0),
        0.25 * 0.1 * (0.5 * 0.7) + 0.75 * 0.8 * (0.2 * 0.7),
    ]
    assert_close(circuit.log_prob(x).exp(), torch.tensor(prob).double(), rtol=1e-7, atol=0)
    assert circuit.bits_per_dimension(x) == pytest.approx(-np.mean(np.log2(prob)) / 2, rel=1e-6)

    states, table = enumerate_joint(circuit, x[1])
    assert states.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    expected = [0.25 * 0.9 * 0.5 * 0.7, 0.0, 0.75 * 0.2 * 0.2 * 0.7, 0.0]
    assert_close(table, torch.tensor(expected).double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", TREES)
def test_matches_enumeration(name):
    circuit = circuit_on(name)
    x, observed = observations(circuit)
    missing = with_nan(x, observed)

    assert_exact(circuit.log_prob(x), exact_log_prob(circuit, x))
    expected = exact_log_prob(circuit, missing)
    assert_exact(circuit.log_prob(missing), expected)
    assert_exact(circuit.log_prob(x, observed), expected)
    assert_exact(circuit.log_prob(missing.nan_to_num(7.0), observed), expected)


@pytest.mark.parametrize("name", TREES)
def test_matches_enumeration_with_zeros(name):
    circuit = kill(circuit_on(name, units=2), share=0.7)
    x, observed = observations(circuit, 12)
    missing = with_nan(x, observed)

    expected = exact_log_prob(circuit, missing)
    assert_exact(circuit.log_prob(missing), expected)
    assert_single(circuit.float().log_prob(missing.float()).double(), expected)


# Laws


@pytest.mark.parametrize("name", TREES)
def test_sums_to_one(name):
    circuit = circuit_on(name, values=2)
    prob = circuit.log_prob(enumerate_values(circuit)).exp()
    assert_exact(prob.sum(), torch.ones_like(prob.sum()))

    nothing = torch.full((circuit.tree.variables,), math.nan)
    assert_exact(circuit.log_prob(nothing).exp(), torch.ones_like(prob.sum()))


def test_order_of_units_does_not_matter():
    circuit = circuit_on("any", units=3)
    x, observed = observations(circuit)
    before = circuit.log_prob(x, observed)

    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        circuit.root_logits.copy_(circuit.root_logits[order])
        circuit.sum_logits.copy_(circuit.sum_logits[:, order][..., order])
        circuit.inputs.logits.copy_(circuit.inputs.logits[..., order])
    assert_exact(circuit.log_prob(x, observed), before)


# Gradients


@pytest.mark.parametrize("name", ["chain, tied", "quad, odd", "any, tied", "one variable"])
def test_gradient(name):
    circuit = circuit_on(name)
    x, observed = observations(circuit, 3)
    assert Query(circuit, TreeCircuit.log_prob).check(x, observed)


@pytest.mark.parametrize("family", [Gaussian, DiscretisedLogistic, Binomial])
def test_gradient_of_inputs(family):
    tree = binary_tree(3)
    sizes = (tree.inputs, 2) if family is Gaussian else (tree.inputs, 2, 4)
    circuit = TreeCircuit(tree, family(*sizes, dtype=torch.float64))
    x = torch.tensor([[0.0, 1.0, 3.0], [math.nan, 2.0, 0.0]], dtype=torch.float64)
    assert Query(circuit, TreeCircuit.log_prob).check(x)


def test_gradient_is_finite_with_zeros():
    circuit = kill(circuit_on("any, tied", units=3), share=0.8)
    x, observed = observations(circuit, 30)
    log_prob = circuit.log_prob(x, observed)
    assert log_prob.isneginf().any()

    log_prob[log_prob.isfinite()].sum().backward()
    for parameter in circuit.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_adam_raises_likelihood():
    circuit = circuit_on("quad, odd", dtype=torch.float32)
    x, observed = observations(circuit, 50, missing=0.2)
    optimiser = torch.optim.Adam(circuit.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = -circuit.log_prob(x, observed).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1

    # What the loop sees is what the optimiser left.
    with torch.no_grad():
        assert -circuit.log_prob(x, observed).mean().item() <= losses[-1] + 1e-3


# The compiled loop


@pytest.mark.parametrize("units", [1, 2, 5, 16, 24])
@pytest.mark.parametrize("rows", [0, 1, 64, 65, 300])
def test_compiled(units, rows):
    circuit = circuit_on("any, tied", units=units, dtype=torch.float32)
    x, observed = observations(circuit, rows)
    with torch.no_grad():
        assert_single(circuit.log_prob(x, observed), circuit.log_prob_torch(x, observed))


@pytest.mark.parametrize("name", TREES)
def test_compiled_on_every_tree(name):
    circuit = circuit_on(name, units=4, dtype=torch.float32)
    x, observed = observations(circuit, 20)
    with torch.no_grad():
        compiled = circuit.log_prob(with_nan(x, observed))
        assert_single(compiled, circuit.log_prob_torch(x, observed))
        assert_single(compiled, exact_log_prob(circuit, with_nan(x, observed)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.uint16, torch.float32])
def test_compiled_takes_every_type(dtype):
    circuit = randomise(TreeCircuit(chain(3), Categorical(3, 2, 256)))
    x = torch.randint(256, (5, 3))
    observed = torch.rand(5, 3) < 0.5
    with torch.no_grad():
        expected = circuit.log_prob_torch(x, observed)
        assert_single(circuit.log_prob(x.to(dtype), observed), expected)


def test_compiled_with_tiny_probabilities():
    # A binomial likelihood of 255 trials is far below the smallest float32.
    tree = chain(6)
    circuit = TreeCircuit(tree, Binomial(tree.inputs, 3, 256))
    x = torch.tensor([[0, 255] * 3, [128] * 6])
    with torch.no_grad():
        assert circuit.log_prob(x).isfinite().all()
        expected = circuit.log_prob_torch(x, torch.ones_like(x, dtype=torch.bool))
        assert_close(circuit.log_prob(x), expected, rtol=1e-4, atol=0)


def test_compiled_in_a_long_product():
    tree = chain(2000)
    circuit = randomise(TreeCircuit(tree, Categorical(tree.inputs, 3, 256)))
    x = torch.randint(256, (2, 2000))
    with torch.no_grad():
        expected = circuit.double().log_prob(x)
        assert_close(circuit.float().log_prob(x).double(), expected, rtol=1e-5, atol=0)


# Shapes and types


def test_shapes():
    tree = quad_tree(2, 3, channels=2)
    inputs = Categorical(tree.inputs, 2, 4)
    circuit = randomise(TreeCircuit(tree, inputs, shape=(2, 3, 2)))
    x = torch.randint(4, (5, 7, 2, 3, 2))
    observed = torch.rand(x.shape) < 0.5
    expected = circuit.log_prob(x.reshape(35, 12), observed.reshape(35, 12)).view(5, 7)

    assert_close(circuit.log_prob(x, observed), expected)
    assert_close(circuit.log_prob(x.reshape(5, 7, 12), observed), expected)
    assert_close(circuit.log_prob(x, observed.reshape(5, 7, 12)), expected)
    assert circuit.log_prob(x[0, 0]).shape == ()
    assert circuit.log_prob(x[0, 0].flatten()).shape == ()
    assert circuit.log_prob(x[:0]).shape == (0, 7)

    one = observed[0, 0]  # one mask for all
    expected = circuit.log_prob(x, one.expand(x.shape))
    assert_close(circuit.log_prob(x, one), expected)
    assert_close(circuit.log_prob(x, one.flatten()), expected)
    columns = torch.tensor([True, False, True])[:, None]  # of an image
    expected = circuit.log_prob(x, columns.expand(x.shape))
    assert_close(circuit.log_prob(x, columns), expected)


def test_one_row_with_the_shape_of_a_batch():
    circuit = TreeCircuit(chain(3), Categorical(3, 2, 2), shape=(1, 3))
    assert circuit.log_prob(torch.zeros(1, 3).long()).shape == ()
    assert circuit.log_prob(torch.zeros(4, 1, 3).long()).shape == (4,)
    assert circuit.log_prob(torch.zeros(4, 3).long()).shape == (4,)


def test_non_contiguous():
    circuit = circuit_on("binary", dtype=torch.float32)
    x = torch.randint(3, (4, 9)).T
    with torch.no_grad():
        assert_close(circuit.log_prob(x), circuit.log_prob(x.contiguous()), rtol=0, atol=0)


def test_one_of_everything():
    circuit = TreeCircuit(chain(1), Categorical(1, units=1, values=1))
    x = torch.zeros(3, 1).long()
    assert_close(circuit.log_prob(x), torch.zeros(3))
    with torch.no_grad():
        assert_close(circuit.log_prob(x), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixed_types(dtype):
    circuit = TreeCircuit(chain(2), Gaussian(2, 3, dtype=dtype))
    for x in (torch.zeros(4, 2).double(), torch.zeros(4, 2).half(), torch.zeros(4, 2).int()):
        assert circuit.log_prob(x).dtype == dtype


def test_bits_count_observed_values():
    circuit = circuit_on("chain")
    x, observed = observations(circuit)
    bits = -circuit.log_prob(x, observed).sum().item() / math.log(2)
    assert circuit.bits_per_dimension(x, observed) == pytest.approx(bits / observed.sum().item())
    with pytest.raises(ValueError, match="expected one observed value or more"):
        circuit.bits_per_dimension(x, torch.zeros_like(observed))


def test_deep_chain():
    tree = chain(3000)
    circuit = TreeCircuit(tree, Categorical(tree.inputs, 4, 3))
    x = torch.randint(3, (8, 3000))

    log_prob = circuit.log_prob(x)
    log_prob.sum().backward()  # about a second; in quadratic time it would be minutes
    with torch.no_grad():
        assert_close(circuit.log_prob(x), log_prob.detach(), rtol=1e-5, atol=0)


# Errors


@pytest.mark.parametrize("shape", [(), (4,), (5, 4), (2, 2, 3), (5, 0)])
def test_rejects_shapes(shape):
    circuit = TreeCircuit(quad_tree(2, 3), Categorical(6, 2, 3), shape=(2, 3))
    if shape == (2, 2, 3):
        assert circuit.log_prob(torch.zeros(shape)).shape == (2,)
        return
    with pytest.raises(ValueError, match=r"expected x with shape \(\*, 2, 3\), got"):
        circuit.log_prob(torch.zeros(shape))


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.tensor([0, 1, 3, 0]), "integers from 0 to 2, got integers from 0 to 3"),
        (torch.tensor([0, -1, 2, 0]), "integers from 0 to 2, got integers from -1 to 2"),
        (torch.tensor([0, 0.5, 2, 0]), "integers from 0 to 2, got fractions"),
        (torch.tensor([0, math.inf, 2, 0]), "integers from 0 to 2"),
        (torch.zeros(4, dtype=torch.complex64), "expected real numbers, got torch.complex64"),
    ],
)
def test_rejects_values(x, sentence):
    circuit = circuit_on("chain")
    with pytest.raises(ValueError, match=sentence):
        circuit.log_prob(x)


def test_missing_values_may_be_anything():
    circuit = circuit_on("chain")
    observed = torch.tensor([True, False, True, True])
    expected = circuit.log_prob(torch.tensor([0, 1, 2, 0]), observed)
    for strange in (-7, 99):
        x = torch.tensor([0, strange, 2, 0])
        assert_exact(circuit.log_prob(x, observed), expected)


def test_rejects_masks():
    circuit = circuit_on("chain")
    with pytest.raises(ValueError, match=r"a mask that expands to \(5, 4\), got \(5, 3\)"):
        circuit.log_prob(torch.zeros(5, 4), torch.ones(5, 3).bool())
    with pytest.raises(ValueError, match=r"a mask that expands to \(5, 4\), got \(2, 4\)"):
        circuit.log_prob(torch.zeros(5, 4), torch.ones(2, 4).bool())


def test_rejects_infinite_reals():
    circuit = TreeCircuit(chain(1), Gaussian(1, 2))
    with pytest.raises(ValueError, match="finite values"):
        circuit.log_prob(torch.tensor([math.inf]))


def test_rejects_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="expected 3 groups of inputs, got 2"):
        TreeCircuit(chain(3), Categorical(2, 2, 2))
    with pytest.raises(ValueError, match="a shape of 3 elements"):
        TreeCircuit(chain(3), Categorical(3, 2, 2), shape=(2, 2))
    with pytest.raises(TypeError, match="discrete inputs, got Gaussian"):
        TreeCircuit(chain(3), Gaussian(3, 2)).tables()


def test_enumeration_rejects_what_is_large():
    circuit = TreeCircuit(chain(30), Categorical(30, 2, 2))
    with pytest.raises(ValueError, match=r"got 2\^30; enumerate smaller circuits"):
        enumerate_values(circuit)
    with pytest.raises(ValueError, match=r"expected x with shape \(30,\), got \(1, 30\)"):
        enumerate_joint(circuit, torch.zeros(1, 30))
    with pytest.raises(TypeError, match="discrete inputs, got Gaussian"):
        enumerate_values(TreeCircuit(chain(2), Gaussian(2, 2)))


# Plumbing

FAMILIES = {
    "Categorical": lambda n: Categorical(n, 3, 5),
    "Binomial": lambda n: Binomial(n, 3, 5),
    "DiscretisedLogistic": lambda n: DiscretisedLogistic(n, 3, 5),
    "Gaussian": lambda n: Gaussian(n, 3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_plumbing(family):
    def build():
        tree = quad_tree(2, 2)
        return randomise(TreeCircuit(tree, FAMILIES[family](tree.inputs), shape=(2, 2)))

    circuit, x = build(), torch.randint(5, (6, 2, 2))
    expected = circuit.log_prob(x)
    assert family in repr(circuit)
    assert "regions=5" in repr(circuit)
    assert "units=3" in repr(circuit)

    state = circuit.state_dict()
    assert all(value.is_floating_point() for value in state.values())  # no index is saved
    other = build()
    other.load_state_dict(load(save(state)))
    assert_close(other.log_prob(x), expected, rtol=0, atol=0)

    twin = copy.deepcopy(circuit)
    assert twin.tree is circuit.tree
    randomise(circuit)
    assert_close(twin.log_prob(x), expected, rtol=0, atol=0)

    double = twin.to(torch.float64)
    assert double.log_prob(x).dtype == torch.float64
    assert_close(double.log_prob(x).float(), expected, rtol=1e-4, atol=1e-4)
    assert {buffer.device.type for buffer in double.to("meta").buffers()} == {"meta"}


def test_device(device):
    circuit = circuit_on("quad, odd").to(device)
    x, observed = observations(circuit)
    log_prob = circuit.log_prob(x.to(device), observed.to(device))
    assert_exact(log_prob.cpu(), exact_log_prob(circuit.cpu(), with_nan(x, observed)))
