r"""Tests for the probnets.circuits.distribution module."""

import copy
import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam  # type: ignore
from torch.testing import assert_close

from probnets.circuits import (
    Binomial,
    Categorical,
    Gaussian,
    TreeCircuit,
    binary_tree,
    chain,
    enumerate_values,
    quad_tree,
    sample,
)
from probnets.circuits.distribution import CircuitDistribution


@pytest.fixture(autouse=True)
def _clear():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def small():
    return TreeCircuit(quad_tree(2, 2), Categorical(4, 2, 3), shape=(2, 2))


def real():
    return TreeCircuit(chain(3), Gaussian(3, 2))


# The contract of torch.distributions


@pytest.mark.parametrize("make", [small, real])
@pytest.mark.parametrize("batch_shape", [(), (5,), (0,), (4, 1)])
@pytest.mark.parametrize("sample_shape", [(), (3,), (2, 0)])
def test_shapes(make, batch_shape, sample_shape):
    circuit = make()
    distribution = CircuitDistribution(circuit, batch_shape)
    assert distribution.batch_shape == batch_shape
    assert distribution.event_shape == circuit.shape

    x = distribution.sample(sample_shape)
    assert x.shape == distribution.shape(sample_shape)
    assert distribution.log_prob(x).shape == sample_shape + batch_shape
    if x.numel():
        assert bool(distribution.support.check(x).all())
    assert distribution.support.event_dim == len(circuit.shape)


@pytest.mark.parametrize("make", [small, real])
def test_log_prob_is_the_circuits(make):
    circuit = make().double()
    x = sample(circuit, (6,))
    distribution = CircuitDistribution(circuit)
    assert torch.equal(distribution.log_prob(x), circuit.log_prob(x))

    whole = distribution.expand((6, 1)).log_prob(x)  # broadcasts
    assert_close(whole, circuit.log_prob(x).expand(6, 6))
    assert distribution.log_prob(x).requires_grad


def test_gradients_are_the_circuits():
    circuit = small().double()
    x = sample(circuit, (4,))
    one = torch.autograd.grad(circuit.log_prob(x).sum(), list(circuit.parameters()))
    log_prob = CircuitDistribution(circuit).expand((4,)).log_prob(x)
    two = torch.autograd.grad(log_prob.sum(), list(circuit.parameters()))
    assert_close(one, two)


def test_samples_come_from_the_global_source():
    distribution = CircuitDistribution(small())
    torch.manual_seed(5)
    one = distribution.sample((20,))
    torch.manual_seed(5)
    assert torch.equal(distribution.sample((20,)), one)
    assert not torch.equal(distribution.sample((20,)), one)
    assert not one.requires_grad
    assert not distribution.has_rsample


def test_batches_are_independent_draws():
    x = CircuitDistribution(small()).expand((200,)).sample()
    assert len(x.flatten(1).unique(dim=0)) > 10


def test_supports():
    assert CircuitDistribution(small()).support.is_discrete
    assert not CircuitDistribution(real()).support.is_discrete


def test_support_is_enumerated():
    circuit = small().double()
    distribution = CircuitDistribution(circuit)
    assert distribution.has_enumerate_support
    values = distribution.enumerate_support()
    assert torch.equal(values, enumerate_values(circuit).view(81, 2, 2))
    assert distribution.log_prob(values).exp().sum().item() == pytest.approx(1.0)

    expanded = distribution.expand((5, 1))
    assert expanded.enumerate_support().shape == (81, 5, 1, 2, 2)
    assert expanded.enumerate_support(expand=False).shape == (81, 1, 1, 2, 2)
    assert torch.equal(expanded.enumerate_support()[:, 3, 0], values)


@pytest.mark.parametrize("circuit", [TreeCircuit(chain(21), Binomial(21, 2, 2)), real()])
def test_support_that_is_not_enumerated(circuit):
    distribution = CircuitDistribution(circuit)
    assert not distribution.has_enumerate_support
    with pytest.raises(NotImplementedError, match="expected at most 1048576 observations"):
        distribution.enumerate_support()


def test_expansion():
    distribution = CircuitDistribution(small(), (3, 1), validate_args=False)
    assert distribution.expand((2, 3, 4)).batch_shape == (2, 3, 4)
    assert distribution.expand((2, 3, 4)).circuit is distribution.circuit
    assert distribution.expand_by((7,)).batch_shape == (7, 3, 1)
    assert distribution.to_event(1).event_shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"expected a shape to which \(3, 1\) expands, got \(4,"):
        distribution.expand((4, 1))
    with pytest.raises(ValueError, match=r"expected a shape to which \(3, 1\) expands, got \(\)"):
        distribution.expand(())


def test_validation():
    distribution = CircuitDistribution(small(), validate_args=True)
    with pytest.raises(ValueError, match="must match event_shape"):
        distribution.log_prob(torch.zeros(4))
    for bad in (3.0, -1.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="to be within the support"):
            distribution.log_prob(torch.full((2, 2), bad))
        with pytest.raises(ValueError, match="to be within the support"):
            distribution.expand((2,)).log_prob(torch.full((2, 2, 2), bad))

    free = CircuitDistribution(small(), validate_args=False)
    nothing = torch.full((2, 2), math.nan)
    assert free.log_prob(nothing).item() == pytest.approx(0.0, abs=1e-6)


def test_plumbing():
    distribution = CircuitDistribution(small(), (3,))
    again = copy.deepcopy(distribution)
    x = distribution.sample()
    assert torch.equal(again.log_prob(x), distribution.log_prob(x))
    assert again.circuit is not distribution.circuit
    assert repr(distribution).startswith("CircuitDistribution(Tree(regions=5")
    assert repr(distribution).endswith("batch_shape=(3,), event_shape=(2, 2))")


def test_the_package_does_not_import_pyro():
    code = "import sys, probnets.circuits; sys.exit('pyro' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# In models of Pyro


def fit(model, guide, data, elbo, *, steps, lr):
    svi = SVI(model, guide, Adam({"lr": lr}), elbo)
    return [float(svi.step(data)) / len(data) for _ in range(steps)]  # type: ignore


def nothing(data):
    r"""A guide for models whose latents are enumerated."""


@pytest.mark.usefixtures("one_thread")
def test_learns_a_circuit():
    # Two units suffice for any distribution of two bits.
    circuit = TreeCircuit(binary_tree(2), Categorical(2, 2, 2))
    for parameter in circuit.parameters():  # away from independence, a saddle
        parameter.data.normal_()
    truth = torch.tensor([0.4, 0.1, 0.2, 0.3])
    data = enumerate_values(circuit).repeat_interleave((10 * truth).round().long(), dim=0)

    def model(data):
        pyro.module("circuit", circuit)
        with pyro.plate("data", len(data)):
            pyro.sample("x", CircuitDistribution(circuit), obs=data)

    losses = fit(model, nothing, data, Trace_ELBO(), steps=100, lr=0.15)
    entropy = -(truth * truth.log()).sum().item()
    assert losses[0] > entropy + 0.05
    assert losses[-1] == pytest.approx(entropy, abs=1e-3)
    learned = circuit.log_prob(enumerate_values(circuit)).exp()
    assert_close(learned.detach(), truth, rtol=0, atol=0.02)


@pytest.mark.usefixtures("one_thread")
def test_learns_the_weight_of_a_mixture_of_circuits():
    torch.manual_seed(1)
    circuits = [TreeCircuit(binary_tree(8), Binomial(8, 2, 4)) for _ in range(2)]
    label = torch.arange(300) < 210
    data = torch.where(label[:, None], *(sample(c, (300,)) for c in circuits))

    @config_enumerate
    def model(data):
        first = pyro.param("first", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Bernoulli(first))
            for n, circuit in enumerate(circuits):
                chosen = CircuitDistribution(circuit).mask(z == 1 - n)
                pyro.sample(f"x{n}", chosen, obs=data)

    losses = fit(model, nothing, data, TraceEnum_ELBO(max_plate_nesting=1), steps=60, lr=0.05)
    assert losses[-1] < losses[0]

    # Where EM for the weight alone ends.
    with torch.no_grad():
        one, two = (circuit.log_prob(data).double() for circuit in circuits)
        weight = torch.tensor(0.5).double()
        for _ in range(200):
            weight = (one + weight.log() - (two + (-weight).log1p())).sigmoid().mean()
    assert pyro.param("first").item() == pytest.approx(weight.item(), abs=0.005)
    assert weight.item() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / 300))


def test_a_circuit_as_an_enumerated_latent():
    # Its values are the means of what is observed: the posterior is by Bayes' rule.
    circuit = TreeCircuit(chain(2), Categorical(2, 2, 3))
    data = torch.tensor([0.3, 1.8])

    @config_enumerate
    def model(data):
        z = pyro.sample("z", CircuitDistribution(circuit))
        pyro.sample("y", dist.Normal(z.float(), 1.0).to_event(1), obs=data)

    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(model, nothing, data)
    values = enumerate_values(circuit)
    likelihood = dist.Normal(values.float(), 1.0).log_prob(data).sum(-1)
    exact = torch.logsumexp(circuit.log_prob(values) + likelihood, dim=0)
    assert loss == pytest.approx(-exact.item(), rel=1e-5)


def test_prior_draws_in_a_model():
    circuit = small()
    with pyro.plate("data", 6):
        x = pyro.sample("x", CircuitDistribution(circuit))
    assert x.shape == (6, 2, 2)
