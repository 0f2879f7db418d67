r"""Tests for the probnets.circuits.conditional module."""

import copy
import math

import pytest
import torch
from circuit_cases import TREES, assert_exact, exact_log_prob, randomise
from scipy import stats
from torch import nn
from torch.testing import assert_close

from probnets.circuits import (
    Bernoulli,
    Binomial,
    Categorical,
    ConditionalCircuit,
    DiscretisedLogistic,
    Gaussian,
    IntegerParameters,
    ParameterNetwork,
    Stage,
    TreeCircuit,
    chain,
    enumerate_values,
    flatten_parameters,
    parameter_count,
    posterior,
    unflatten_parameters,
)

FAMILIES = {
    "Categorical": lambda n: Categorical(n, 2, 3, dtype=torch.float64),
    "Binomial": lambda n: Binomial(n, 2, 3, dtype=torch.float64),
    "Bernoulli": lambda n: Bernoulli(n, 2, dtype=torch.float64),
    "DiscretisedLogistic": lambda n: DiscretisedLogistic(n, 2, 3, dtype=torch.float64),
    "Gaussian": lambda n: Gaussian(n, 2, dtype=torch.float64),
}
CONTEXT = 3


def template_on(name, family="Categorical"):
    tree = TREES[name]()
    return randomise(TreeCircuit(tree, FAMILIES[family](tree.inputs)))


def conditional(*templates, context=CONTEXT):
    r"""Draws a stage for each template, with a network of one hidden layer."""
    stages, inputs = [], context
    for template in templates:
        last = nn.Linear(5, parameter_count(template))
        nn.init.normal_(last.bias, std=1.5)  # far from uniform
        layers = nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), last)
        stages.append(Stage(template, ParameterNetwork(layers.double())))
        inputs += template.tree.variables
    return ConditionalCircuit(stages)


def contexts(*batch):
    return torch.randn(*batch, CONTEXT, dtype=torch.float64)


def by_stacking(circuit, x, context):
    r"""Computes each row by ordinary circuits, with missing values only at the end."""
    rows = []
    for row, y in zip(x, context, strict=True):
        total, start = 0.0, 0
        for size in circuit.sizes:
            own = row[start : start + size]
            if not own.isnan().all():
                total = total + circuit.at(y, row[:start]).log_prob(own).detach()
            start += size
        rows.append(torch.as_tensor(total, dtype=torch.float64))
    return torch.stack(rows)


class Given(nn.Module):
    r"""Is the network whose parameters are the context."""

    def forward(self, context, earlier):
        return context


# Values


def test_by_hand():
    template = TreeCircuit(chain(1), Categorical(1, units=2, values=2, dtype=torch.float64))
    circuit = ConditionalCircuit([Stage(template, Given())])
    # p(x) = 1/4 (0.9, 0.1) + 3/4 (0.2, 0.8), then one unit alone
    first = torch.tensor([0.25, 0.75, 0.9, 0.2, 0.1, 0.8]).double().log()
    second = torch.tensor([1.0, 0.0, 0.5, 0.3, 0.5, 0.7]).double().log()
    log_prob = circuit.log_prob(torch.tensor([[0], [1]]), torch.stack([first, second]))
    assert_close(log_prob.exp(), torch.tensor([0.25 * 0.9 + 0.75 * 0.2, 0.5]).double())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["one variable", "one region", "binary", "any, tied"])
def test_matches_ordinary_circuits(name, family):
    circuit = conditional(template_on(name, family), template_on("one variable"))
    context = contexts(5)
    x = circuit.sample(context).double()
    x[1, 0] = x[2, -1] = x[1, -1] = math.nan
    x[3] = math.nan

    log_prob = circuit.log_prob(x, context)
    assert_exact(log_prob.detach(), by_stacking(circuit, x, context))
    assert log_prob[3] == 0.0


@pytest.mark.parametrize("name", TREES)
def test_matches_enumeration(name):
    circuit = conditional(template_on(name))
    context = contexts(3)
    x = circuit.sample(context).double()
    x[torch.rand(x.shape) < 0.4] = math.nan

    log_prob = circuit.log_prob(x, context).detach()
    for n in range(3):
        expected = exact_log_prob(circuit.at(context[n]), x[n : n + 1])
        assert_exact(log_prob[n : n + 1], expected)


def test_sums_to_one_over_all_stages():
    circuit = conditional(template_on("chain"), template_on("one variable", "Binomial"))
    every = enumerate_values(TreeCircuit(chain(5), Categorical(5, 2, 3)))
    prob = circuit.log_prob(every, contexts(4, 1)).exp()
    assert prob.shape == (4, 3**5)
    assert_exact(prob.sum(-1).detach(), torch.ones(4).double())


def test_later_stages_see_earlier_values():
    circuit = conditional(template_on("one variable"), template_on("one variable"))
    context = contexts(CONTEXT)[0]
    a, b = (flatten_parameters(circuit.at(context, [value])) for value in (0, 2))
    assert not torch.equal(a, b)


# Missing values


def test_missing_values_are_summed_out():
    circuit = conditional(template_on("any, tied"))
    context, D = contexts(4), circuit.variables
    x = torch.randint(3, (4, D))
    observed = torch.rand(4, D) < 0.5
    whole = enumerate_values(TreeCircuit(chain(D), Categorical(D, 2, 3)))

    found = circuit.log_prob(x, context, observed).detach()
    for n in range(4):
        fits = (whole == x[n])[:, observed[n]].all(dim=1)
        prob = circuit.log_prob(whole[fits], context[n]).exp().sum()
        assert_exact(found[n].exp(), prob.detach())


def test_rejects_missing_values_that_are_needed():
    circuit = conditional(template_on("chain"), template_on("one variable"))
    x = torch.zeros(3, 5)
    x[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"before stage 1 where it is observed, got .* row 1"):
        circuit.log_prob(x, contexts(3))

    x[1, 4] = math.nan
    assert circuit.log_prob(x, contexts(3)).isfinite().all()
    x[1] = torch.tensor([0, 0, math.nan, 1, math.nan])
    twice = conditional(template_on("one variable"), template_on("chain"))
    x[1, 0] = math.nan  # the later stage has but one value
    with pytest.raises(ValueError, match="before stage 1"):
        twice.log_prob(x, contexts(3))
    nothing = torch.full((3, 5), math.nan)
    assert circuit.log_prob(nothing, contexts(3)).tolist() == [0.0] * 3


# Gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient(family):
    circuit = conditional(template_on("any, tied", family), template_on("one variable"))
    context = contexts(2)
    x = circuit.sample(context).double()
    x[1, -1] = x[1, 0] = math.nan
    free = [(name, p) for name, p in circuit.named_parameters() if p.requires_grad]
    names, values = zip(*free, strict=True)
    assert all("network" in name for name in names)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.circuit = circuit

        def forward(self, context):
            return self.circuit.log_prob(x, context)

    def function(context, *parameters):
        named = {f"circuit.{name}": p for name, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Call(), named, (context,))

    assert torch.autograd.gradcheck(function, (context.requires_grad_(), *values))


def test_missing_rows_pass_no_gradient():
    circuit = conditional(template_on("one variable", "DiscretisedLogistic"))
    context = contexts(2).requires_grad_()
    circuit.log_prob(torch.tensor([[1.0], [math.nan]]), context).sum().backward()
    assert context.grad is not None
    assert context.grad[0].abs().sum() > 0
    assert not context.grad[1].any()


def test_training_learns_the_context():
    template = TreeCircuit(chain(2), Categorical(2, units=2, values=2))
    network = nn.Linear(1, parameter_count(template))
    circuit = ConditionalCircuit([Stage(template, ParameterNetwork(network))])
    context = torch.randint(2, (200, 1)).float()
    x = context.long().expand(-1, 2)  # the context tells both values
    optimiser = torch.optim.Adam(circuit.parameters(), lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        loss = -circuit.log_prob(x, context).mean()
        loss.backward()
        optimiser.step()
    assert circuit.bits_per_dimension(x, context) < 0.1


# Sampling


@pytest.mark.parametrize("name", ["one region", "chain", "any, tied"])
def test_samples_follow_the_distribution(name):
    circuit = conditional(template_on(name), template_on("one variable", "Binomial"))
    D, N = circuit.variables, 4000
    context = contexts(2)
    x = circuit.sample(context[:, None].expand(-1, N, -1))
    assert x.shape == (2, N, D)
    assert x.dtype == torch.long

    every = enumerate_values(TreeCircuit(chain(D), Categorical(D, 2, 3)))
    index = (x * 3 ** torch.arange(D - 1, -1, -1)).sum(-1)
    for n in range(2):
        expected = N * circuit.log_prob(every, context[n]).exp().detach()
        counts = index[n].bincount(minlength=3**D).double()
        rare = expected < 5  # share a cell
        pairs = [c[~rare] for c in (counts, expected)]
        if rare.any():
            rest = (c[rare].sum()[None] for c in (counts, expected))
            pairs = [torch.cat(pair) for pair in zip(pairs, rest, strict=True)]
        assert stats.chisquare(pairs[0], pairs[1]).pvalue > 1e-4


def test_samples_of_gaussians_follow_the_distribution():
    template = TreeCircuit(chain(2), Gaussian(2, 1, dtype=torch.float64))
    circuit = conditional(template)
    context = contexts(2)
    x = circuit.sample(context[:, None].expand(-1, 3000, -1))
    for n in range(2):
        inputs = circuit.at(context[n]).inputs
        assert isinstance(inputs, Gaussian)
        z = (x[n] - inputs.mean[:, 0]) / inputs.scale()[:, 0]
        for column in z.T.detach():
            assert stats.kstest(column, "norm").pvalue > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_is_repeatable(family):
    circuit = conditional(template_on("binary", family), template_on("one variable", family))
    a, b = (circuit.sample(0 * contexts(4), generator=_generator()) for _ in range(2))
    assert_close(a, b, rtol=0, atol=0)
    assert len({tuple(row.tolist()) for row in a}) > 1  # rows draw by themselves


def _generator():
    return torch.Generator().manual_seed(3)


# Discretised logistics at single values


@pytest.mark.parametrize("values", [1, 2, 3, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logistic_at_a_value_is_the_table(values, dtype):
    inputs = DiscretisedLogistic(values + 1, 3, values, dtype=dtype)  # more groups than values
    with torch.no_grad():
        inputs.mean.copy_(1.5 * values * torch.rand(inputs.mean.shape))
        inputs.log_scale.copy_(3 * torch.randn(inputs.mean.shape))
    x = torch.arange(values)[:, None].expand(values, values + 1)
    group = torch.arange(values + 1)
    assert x.numel() <= inputs.groups * inputs.values
    direct, table = inputs.log_prob(x, group), inputs.log_table()[group, x]
    assert_close(direct, table, rtol=1e-6, atol=0)

    again = torch.cat([x, x])  # so many values that the table is the way
    assert_close(inputs.log_prob(again, group), torch.cat([table, table]), rtol=0, atol=0)

    if values > 1:
        for found in torch.autograd.grad(direct.sum(), [inputs.mean, inputs.log_scale]):
            assert found.isfinite().all()


def test_logistic_tails_have_a_gradient_at_any_scale():
    # A scale of e^60 leaves nothing to the values between, yet half to each tail.
    inputs = DiscretisedLogistic(1, 1, 256)
    with torch.no_grad():
        inputs.log_scale.fill_(60.0)
    for x in (0, 255):
        log_prob = inputs.log_prob(torch.tensor([[x]]), torch.tensor([0]))
        assert log_prob.item() == pytest.approx(-math.log(2))
        for gradient in torch.autograd.grad(log_prob, [inputs.mean, inputs.log_scale]):
            assert gradient.isfinite().all()


# Shapes


def test_shapes():
    circuit = conditional(template_on("chain"), template_on("one variable"))
    x, context = torch.randint(3, (4, 2, 5)), contexts(4, 2)
    expected = circuit.log_prob(x.reshape(8, 5), context.reshape(8, 3)).view(4, 2)
    assert_exact(circuit.log_prob(x, context), expected)
    assert circuit.log_prob(x, context[0]).shape == (4, 2)
    assert circuit.log_prob(x[0, 0], context[0, 0]).shape == ()
    assert circuit.log_prob(x[0, 0], context).shape == (4, 2)
    assert circuit.log_prob(x[:0], context[:0]).shape == (0, 2)
    assert circuit.sample(context[0, 0]).shape == (5,)
    assert circuit.sample(context[:0]).shape == (0, 2, 5)
    constant = ConditionalCircuit([Stage(template_on("chain"), _Constant())])
    assert constant.log_prob(x[..., :4], torch.zeros(4, 2, 0)).shape == (4, 2)
    one = torch.tensor([True, False, True, True, False])
    assert_exact(circuit.log_prob(x, context, one), circuit.log_prob(x, context, one.expand_as(x)))


def test_contexts_of_many_dimensions():
    template = template_on("one variable")
    network = ParameterNetwork(nn.Linear(12, parameter_count(template)).double())
    circuit = ConditionalCircuit([Stage(template, network)], context_dims=3)
    x = circuit.sample(torch.rand(5, 3, 2, 2))
    assert x.shape == (5, 1)
    assert circuit.log_prob(x, torch.rand(5, 3, 2, 2)).shape == (5,)

    bare = ConditionalCircuit([Stage(template, _Table(template))], context_dims=0)
    assert bare.log_prob(x, torch.arange(5)).shape == (5,)


class _Constant(nn.Module):
    def forward(self, context, earlier):
        return flatten_parameters(template_on("chain")).expand(len(context), -1)


class _Table(nn.Module):
    def __init__(self, template):
        super().__init__()
        self.rows = nn.Embedding(5, parameter_count(template))

    def forward(self, context, earlier):
        return self.rows(context)


def test_flat_parameters():
    template = template_on("any, tied", "DiscretisedLogistic")
    flat = flatten_parameters(template)
    assert flat.shape == (parameter_count(template),)
    parts = unflatten_parameters(template, flat)
    assert list(parts) == ["root_logits", "sum_logits", "inputs.mean", "inputs.log_scale"]
    for name, parameter in template.named_parameters():
        assert_close(parts[name], parameter.detach(), rtol=0, atol=0)
    assert unflatten_parameters(template, flat.expand(2, 3, -1))["root_logits"].shape == (2, 3, 2)
    with pytest.raises(ValueError, match=r"expected parameters \(\*, "):
        unflatten_parameters(template, flat[1:])


def test_starts_from_the_template():
    template = template_on("binary")
    linear = nn.Linear(CONTEXT, parameter_count(template)).double()
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(flatten_parameters(template))
    circuit = ConditionalCircuit([Stage(template, ParameterNetwork(linear))])
    x = torch.randint(3, (6, 4))
    assert_exact(circuit.log_prob(x, contexts(6)), template.log_prob(x))
    assert circuit.bits_per_dimension(x, contexts(6)) == pytest.approx(
        template.bits_per_dimension(x)
    )


def test_at_serves_every_query():
    circuit = conditional(template_on("one variable"), template_on("any, tied"))
    ordinary = circuit.at(contexts(1)[0], torch.tensor([2]))
    assert posterior(ordinary, torch.zeros(5)).shape == (6, 2)
    assert all(parameter.requires_grad for parameter in ordinary.parameters())


# Errors


def test_rejects_shapes():
    circuit = conditional(template_on("chain"))
    with pytest.raises(ValueError, match=r"expected x with shape \(\*, 4\), got \(2, 3\)"):
        circuit.log_prob(torch.zeros(2, 3), contexts(2))
    with pytest.raises(ValueError, match=r"broadcasts with \(2,\), got \(3,\)"):
        circuit.log_prob(torch.zeros(2, 4), contexts(3))
    with pytest.raises(ValueError, match="contexts of 1 dimensions or more"):
        circuit.log_prob(torch.zeros(2, 4), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"a mask that expands to \(2, 4\), got \(3,\)"):
        circuit.log_prob(torch.zeros(2, 4), contexts(2), torch.ones(3).bool())
    with pytest.raises(ValueError, match="one observed value or more"):
        circuit.bits_per_dimension(torch.full((2, 4), math.nan), contexts(2))
    with pytest.raises(ValueError, match=r"\[0\] earlier values, none missing"):
        circuit.at(contexts(1)[0], [0, 1])
    with pytest.raises(ValueError, match="expected one context of 1 dimensions"):
        circuit.at(contexts(2))
    with pytest.raises(ValueError, match="expected one stage or more"):
        ConditionalCircuit([])


def test_rejects_values_and_networks():
    template = template_on("one variable", "DiscretisedLogistic")
    circuit = conditional(template)
    for bad in (3, -1, 0.5):
        with pytest.raises(ValueError, match="expected integers from 0 to 2"):
            circuit.log_prob(torch.tensor([[bad]]), contexts(1))
    wrong = ConditionalCircuit([Stage(template, Given())])
    with pytest.raises(ValueError, match=r"a network that returns \(1, 6\), got \(1, 3\)"):
        wrong.log_prob(torch.zeros(1, 1), contexts(1))


# Plumbing


def test_plumbing():
    circuit = conditional(template_on("chain", "DiscretisedLogistic"))
    x, context = torch.randint(3, (6, 4)), contexts(6)
    expected = circuit.log_prob(x, context)
    assert "DiscretisedLogistic" in repr(circuit)
    assert "variables=4" in repr(circuit)

    other = conditional(template_on("chain", "DiscretisedLogistic"))
    other.load_state_dict(circuit.state_dict())
    assert_close(other.log_prob(x, context), expected, rtol=0, atol=0)
    twin = copy.deepcopy(circuit).float()
    assert twin.log_prob(x, context.float()).dtype == torch.float32
    assert_close(twin.log_prob(x, context.float()).double(), expected, rtol=1e-3, atol=1e-3)


def test_device(device):
    circuit = conditional(template_on("any, tied"), template_on("one variable"))
    x, context = torch.randint(3, (6, 6)), contexts(6)
    expected = circuit.log_prob(x, context)
    circuit.to(device)
    found = circuit.log_prob(x.to(device), context.to(device))
    assert_exact(found.cpu(), expected)
    assert circuit.sample(context.to(device)).device.type == device.type


def test_to_integers():
    template = template_on("one variable", "DiscretisedLogistic")
    layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, parameter_count(template)))
    network = ParameterNetwork(layers, input_scale=[0.1, 0.1, 0.2])
    context, earlier = torch.randint(10, (50, 2)), torch.randint(10, (50, 1))
    for examples in ((), (context, earlier)):
        exact = network.to_integers(*examples, input_bits=4)
        assert isinstance(exact, IntegerParameters)
        found = exact(context, earlier.double())
        assert found.dtype == torch.float64
        expected = network(context, earlier).double()
        assert_close(found, expected, rtol=0, atol=2e-3)
