r"""Tests of Boltzmann machines: biases, fields and free energies."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from probnets.boltzmann import GramCoupling, mean_field
from probnets.boltzmann.enumeration import exact
from probnets.boltzmann.machine import BoltzmannMachine, Options

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [2, 3, 2, 4, 1]
TIGHT: Options = {"tolerance": 1e-12, "adjoint_tolerance": 1e-12}


class Field(nn.Module):
    r"""Is a network with a memory of what it was shown."""

    def __init__(self, states, variables):
        super().__init__()
        self.layer = nn.Linear(states + variables, states, dtype=torch.float64)
        self.seen = torch.empty(0)

    def forward(self, values, observed):
        self.seen = values
        return self.layer(torch.cat([values, observed.to(values.dtype)], dim=1)).tanh()


class Narrow(nn.Module):
    r"""Forgets a state."""

    def forward(self, values, observed):
        return values[:, 1:]


def machine_of(sizes=SIZES, *, field=False, scale=2.0):
    coupling = GramCoupling(sizes, 5, dtype=torch.float64)
    coupling.weight.data.mul_(scale)
    network = Field(coupling.states, coupling.variables) if field else None
    made = BoltzmannMachine(coupling, field=network)
    made.bias.data.normal_()
    return made


def query(made, batch=3):
    groups = made.coupling.groups
    values = torch.zeros(batch, made.states, dtype=torch.float64)
    for size, start in zip(groups.sizes.tolist(), groups.starts.tolist(), strict=True):
        state = torch.randint(size, (batch,))
        values[torch.arange(batch), start + state] = 1.0
    return values, torch.rand(batch, made.variables) < 0.4


def test_free_energies_by_hand():
    # Without couplings, mean field is exact: F* = -log(1 + 3) - log(1 + 1).
    made = machine_of([2, 2], scale=0.0)
    made.bias.data = torch.tensor([0.0, math.log(3), 0.0, 0.0]).double()
    free = made.free_energy(**TIGHT)
    assert_close(free.value, torch.tensor([-math.log(8)]).double())
    assert_close(free.value, free.field.free_energy)
    values = torch.tensor([[0.0, 1.0, 1.0, 0.0]]).double()
    none, first = torch.zeros(2).bool(), torch.tensor([True, False])
    found = made.free_energy_difference(values, none, first, **TIGHT)
    assert_close(found, torch.tensor([-math.log(3 / 4)]).double())


def test_without_latents_the_difference_is_below_the_likelihood():
    made = machine_of()
    values, observed = query(made, 20)
    with torch.no_grad():
        found = made.free_energy_difference(values, observed, ~observed, **TIGHT)
        scores = 0.5 * (values * made.coupling(values)).sum(1) + values @ made.bias
    log_z = exact(made.coupling, made.bias, observed=observed, values=values).log_partition
    truth = log_z - scores
    assert (found >= 0).all()
    assert (found <= truth + 1e-9).all()
    assert (truth - found).max() > 1e-3  # they do differ
    assert_close(found, truth, rtol=0, atol=0.5)


@pytest.mark.parametrize("field", [False, True])
def test_differences_are_never_negative_and_add_up(field):
    made = machine_of(field=field)
    values, observed = query(made, 50)
    targets = (torch.rand(50, 5) < 0.5) & ~observed  # some stay hidden
    found = made.free_energy_difference(values, observed, targets, **TIGHT)
    assert (found >= -1e-9).all()
    if not field:  # a network sees what is observed, which is another distribution then
        known = observed | targets
        rest = made.free_energy_difference(values, known, ~known, **TIGHT)
        whole = made.free_energy_difference(values, observed, ~observed, **TIGHT)
        assert_close(found + rest, whole)


@pytest.mark.parametrize("field", [False, True])
def test_gradients_of_differences_are_those_of_finite_differences(field):
    made = machine_of(field=field)
    values, observed = query(made)
    targets = (torch.rand(3, 5) < 0.5) & ~observed

    def loss():
        return made.free_energy_difference(values, observed, targets, **TIGHT).sum()

    loss().backward()
    for name, weight in made.named_parameters():
        assert weight.grad is not None, name
        place, h = int(weight.grad.abs().argmax()), 1e-4
        slopes = []
        with torch.no_grad():
            for side in (h, -h):
                weight.view(-1)[place] += side
                slopes.append(loss().item())
                weight.view(-1)[place] -= side
        expected = (slopes[0] - slopes[1]) / (2 * h)
        assert abs(expected) > 1e-3
        assert weight.grad.view(-1)[place].item() == pytest.approx(expected, rel=1e-6), name


def test_the_gradient_in_biases_is_a_difference_of_marginals():
    made = machine_of()
    values, observed = query(made, 1)
    made.free_energy_difference(values, observed, ~observed, **TIGHT).sum().backward()
    expected = made.mean_field(values, observed, **TIGHT).marginals[0] - values[0]
    assert made.bias.grad is not None
    assert_close(made.bias.grad, expected.detach())
    sums = torch.zeros(5).double().index_add(0, made.coupling.groups.index, made.bias.grad)
    assert_close(sums, torch.zeros(5).double())


def test_mean_field_is_that_of_coupling_and_biases():
    made = machine_of(field=True)
    values, observed = query(made)
    found = made.mean_field(values, observed, **TIGHT)
    seen = observed[:, made.coupling.groups.index]
    assert made.field is not None
    bias = made.bias + made.field(values * seen, observed)
    expected = mean_field(made.coupling, bias, values=values, observed=observed, **TIGHT)
    assert_close(found.marginals, expected.marginals)
    assert (found.marginals - machine_of().mean_field().marginals).abs().max() > 0.01
    assert made.mean_field().marginals.shape == (1, made.states)


def test_the_network_is_not_shown_what_is_hidden():
    made = machine_of(field=True)
    values, observed = query(made)
    seen = observed[:, made.coupling.groups.index]
    blind = torch.where(seen, values, math.nan)
    found, expected = (made.mean_field(x, observed, **TIGHT).marginals for x in (blind, values))
    assert torch.equal(found, expected)
    assert (made.field.seen[~seen] == 0).all()  # type: ignore[union-attr]
    first = made.mean_field(values[0], observed[0], **TIGHT).marginals
    assert_close(first, expected[:1])


def test_the_solution_is_unique_whatever_the_network():
    made = machine_of(field=True, scale=9.0)
    made.field.layer.weight.data.mul_(30)  # type: ignore[union-attr]
    values, observed = (x[:1].expand(20, -1) for x in query(made))
    start = 10 * torch.randn(20, made.states, dtype=torch.float64)
    found = made.mean_field(values, observed, initial=start, tolerance=1e-12)
    assert found.converged.all()
    assert_close(found.marginals, found.marginals[:1].expand(20, -1), rtol=0, atol=1e-10)


def test_edges():
    made = machine_of([3])
    assert_close(made.mean_field().marginals[0], made.bias.softmax(0))
    for field in (False, True):
        made = machine_of(field=field)
        values, observed = query(made, 0)
        assert made.mean_field(values, observed).marginals.shape == (0, made.states)
        assert made.free_energy_difference(values, observed, ~observed).shape == (0,)
        values, observed = query(made)
        whole = torch.ones_like(observed)
        assert_close(made.mean_field(values, whole).marginals, values)


@pytest.mark.parametrize("field", [False, True])
def test_what_does_not_fit(field):
    made = machine_of(field=field)
    values, observed = query(made)
    with pytest.raises(ValueError, match="observed and values together"):
        made.mean_field(values)
    with pytest.raises(ValueError, match="expected values"):
        made.mean_field(values[:, 1:], observed)
    with pytest.raises(ValueError, match="expected a boolean mask"):
        made.mean_field(values, observed.double())
    with pytest.raises(ValueError, match="expected"):
        made.mean_field(values[:2], observed)
    with pytest.raises(ValueError, match="expected"):
        made.mean_field(values[0, 0], observed)


def test_networks_of_another_shape():
    coupling = GramCoupling([2, 3], 4)
    made = BoltzmannMachine(coupling, field=Narrow())
    with pytest.raises(ValueError, match=r"returns shape \(2, 5\), got \(2, 4\)"):
        made.mean_field(torch.eye(5)[:2], torch.zeros(2, 2).bool())
