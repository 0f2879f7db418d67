r"""Tests for the probnets.circuits.queries module."""

import itertools
import math

import pytest
import torch
from circuit_cases import (
    TREES,
    Query,
    assert_exact,
    circuit_on,
    exact_log_prob,
    joint,
    kill,
    observations,
    randomise,
    with_nan,
)
from torch.testing import assert_close

from probnets.circuits import (
    Binomial,
    Categorical,
    Gaussian,
    TreeCircuit,
    chain,
    conditional_log_prob,
    conditional_sample,
    enumerate_values,
    leave_one_out,
    most_probable,
    posterior,
    quad_tree,
    sample,
)


def possible(circuit, count=8):
    r"""Draws observations with missing values, none of which is impossible."""
    x, observed = observations(circuit, 40)
    x = with_nan(x, observed)
    return x[circuit.log_prob(x).isfinite()][:count]


@pytest.fixture(params=[False, True], ids=["positive", "zeros"])
def drawn(request):
    r"""Returns a function that draws a circuit, some of whose units may be dead."""

    def draw(name, **kwargs):
        circuit = circuit_on(name, **kwargs)
        return kill(circuit, share=0.5) if request.param else circuit

    return draw


# Values


def test_by_hand():
    # Two coins: the root's unit picks heads with 3/4 or 1/4, and both variables follow it.
    inputs = Categorical(2, units=2, values=2, dtype=torch.float64)
    circuit = TreeCircuit(chain(2), inputs)
    with torch.no_grad():
        circuit.root_logits.zero_()
        circuit.sum_logits.copy_(torch.eye(2).log())
        table = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).double()
        inputs.logits.copy_(table.log().expand(2, 2, 2))
    x = torch.tensor([0.0, math.nan])

    units = torch.tensor([[0.75, 0.25], [0.75, 0.25]]).double()
    assert_exact(posterior(circuit, x), units)
    other = torch.tensor([10 / 16, 6 / 16]).double()
    assert_close(leave_one_out(circuit, x), torch.stack([torch.full((2,), 0.5), other]).double())
    full, given = torch.tensor([0, 0]), torch.tensor([True, False])
    assert conditional_log_prob(circuit, full, given=given).exp().item() == pytest.approx(10 / 16)
    best = most_probable(circuit, x)
    assert best.values.tolist() == [0, 0]
    assert best.states.tolist() == [0, 0]
    assert best.log_prob.exp().item() == pytest.approx(0.5 * 0.75 * 0.75)


# Enumeration


@pytest.mark.parametrize("name", TREES)
def test_conditional_log_prob(name, drawn):
    circuit = drawn(name)
    x = possible(circuit)
    for part in (0.0, 0.5, 1.0):
        given = torch.rand(x.shape) < part
        evidence = exact_log_prob(circuit, x.masked_fill(~given, math.nan))
        expected = exact_log_prob(circuit, x) - evidence

        assert_exact(conditional_log_prob(circuit, x, given=given), expected)
        integers, observed = x.nan_to_num(0).long(), ~x.isnan()
        found = conditional_log_prob(circuit, integers, given=given, observed=observed)
        assert_exact(found, expected)


@pytest.mark.parametrize("name", TREES)
def test_posterior(name, drawn):
    circuit = drawn(name)
    x = possible(circuit)
    states, prob = joint(circuit, x)
    prob = prob / prob.sum(-1, keepdim=True)
    is_unit = torch.nn.functional.one_hot(states, circuit.units).double()  # (S, R, K)

    assert_exact(posterior(circuit, x), torch.einsum("bs,srk->brk", prob, is_unit))


@pytest.mark.parametrize("name", TREES)
def test_leave_one_out(name, drawn):
    circuit = drawn(name)
    x = possible(circuit)

    def given_the_others(v):
        changed = x.repeat(circuit.inputs.values, 1, 1)
        changed[..., v] = torch.arange(circuit.inputs.values)[:, None]
        return joint(circuit, changed.flatten(0, 1))[1].sum(-1).view(-1, len(x)).T  # (B, X)

    table = torch.stack([given_the_others(v) for v in range(x.shape[1])], dim=1)
    expected = table / table.sum(-1, keepdim=True)
    assert_exact(leave_one_out(circuit, x), expected)


@pytest.mark.parametrize("name", TREES)
def test_most_probable(name, drawn):
    circuit = drawn(name)
    for x in possible(circuit, 4):
        best = most_probable(circuit, x)
        missing = x.isnan()
        assert_close(best.values[~missing], x[~missing])

        top = -math.inf
        grid = itertools.product(range(circuit.inputs.values), repeat=int(missing.sum()))
        for values in grid:
            filled = x.clone()
            filled[missing] = torch.tensor(values, dtype=x.dtype)
            top = max(top, joint(circuit, filled[None])[1].max().log().item())
        assert best.log_prob.item() == pytest.approx(top, abs=1e-10)

        states, prob = joint(circuit, best.values[None])
        found = prob[0][(states == best.states).all(-1)]
        assert found.log().item() == pytest.approx(top, abs=1e-10)


# Laws


@pytest.mark.parametrize("name", TREES)
def test_conditionals_multiply_to_the_joint(name):
    circuit = circuit_on(name)
    x, _ = observations(circuit)
    D = x.shape[1]
    total = torch.zeros(len(x), dtype=torch.float64)
    before = torch.zeros(D).bool()
    for v in torch.randperm(D).tolist():
        now = before.clone()
        now[v] = True
        total += conditional_log_prob(circuit, x, given=before, observed=now)
        before = now
    assert_exact(total, circuit.log_prob(x))


def test_leave_one_out_of_missing_value_is_its_posterior():
    circuit = circuit_on("any, tied")
    x = with_nan(*observations(circuit))
    unit = posterior(circuit, x)[:, circuit.region]
    table = circuit.inputs.log_table().exp()[circuit.input_group]
    expected = torch.einsum("bdk,dxk->bdx", unit, table)
    assert_exact(leave_one_out(circuit, x)[x.isnan()], expected[x.isnan()])


def test_the_impossible_value_has_an_alternative():
    # Given all others, an impossible value is one of probability zero and nothing else.
    inputs = Categorical(1, units=2, values=2)
    circuit = TreeCircuit(chain(1), inputs)
    with torch.no_grad():
        inputs.logits[:, 1] = -math.inf
    x = torch.tensor([1])
    assert leave_one_out(circuit, x)[0].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="expected evidence of positive probability"):
        posterior(circuit, x)


# Samples


def frequencies(draws, values):
    r"""Returns how often each observation was drawn, in the order of their enumeration."""
    place = values ** torch.arange(draws.shape[-1] - 1, -1, -1)
    index = (draws.long() * place).sum(-1)
    return torch.bincount(index, minlength=values ** draws.shape[-1]) / len(draws)


def assert_frequencies(found, prob, count):
    error = (prob * (1 - prob) / count).sqrt()
    assert ((found - prob).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("name", ["chain", "binary, tied", "quad", "any", "one region"])
def test_sample(name, drawn):
    circuit = drawn(name, values=2)
    draws = sample(circuit, (20_000,), generator=torch.Generator().manual_seed(3))
    assert draws.dtype == torch.long

    prob = circuit.log_prob(enumerate_values(circuit)).exp()
    assert_frequencies(frequencies(draws, 2), prob.detach(), 20_000)


@pytest.mark.parametrize("name", ["chain, tied", "quad, odd", "any, tied"])
def test_conditional_sample(name, drawn):
    circuit = drawn(name, values=2, scale=3.0)
    x = possible(circuit, 4)
    source = torch.Generator().manual_seed(4)
    draws = conditional_sample(circuit, x, 10_000, generator=source)
    assert draws.shape == (10_000, *x.shape)

    everything = enumerate_values(circuit)
    for b, row in enumerate(x):
        fits = ((everything == row) | row.isnan()).all(-1)
        log_prob = circuit.log_prob(everything) - circuit.log_prob(row)
        prob = torch.where(fits, log_prob.exp(), 0.0).detach()
        assert_frequencies(frequencies(draws[:, b], 2), prob, 10_000)


def test_gaussian_samples():
    inputs = Gaussian(2, units=1)
    circuit = TreeCircuit(chain(2), inputs)
    with torch.no_grad():
        inputs.mean.copy_(torch.tensor([[1.0], [-2.0]]))
        inputs.log_scale.copy_(torch.tensor([[0.0], [1.0]]))
    draws = sample(circuit, (20_000,), generator=torch.Generator().manual_seed(5))

    scale = torch.tensor([1.0, math.e])
    assert ((draws.mean(0) - torch.tensor([1.0, -2.0])).abs() < 5 * scale / 20_000**0.5).all()
    assert ((draws.std(0) / scale - 1).abs() < 5 / 40_000**0.5).all()

    assert most_probable(circuit, torch.tensor([0.5, math.nan])).values.tolist() == [0.5, -2.0]


def test_samples_are_reproducible():
    circuit = circuit_on("quad, odd")
    one, two = (sample(circuit, (9,), generator=torch.Generator().manual_seed(1)) for _ in "ab")
    assert one.tolist() == two.tolist()


# Gradients

QUERIES = {
    "posterior": posterior,
    "leave_one_out": leave_one_out,
    "conditional_log_prob": lambda c, x: conditional_log_prob(c, x, given=torch.arange(4) < 2),
}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("name", ["chain", "quad"])
def test_gradient(query, name):
    circuit = circuit_on(name)
    x = with_nan(*observations(circuit, 2))
    assert Query(circuit, QUERIES[query]).check(x)


# Edges


def test_shapes():
    inputs = Categorical(12, units=2, values=4)
    circuit = randomise(TreeCircuit(quad_tree(2, 3, channels=2), inputs, shape=(2, 3, 2)))
    R = circuit.tree.regions
    for batch in ((), (3,), (2, 3), (0,)):
        x = torch.randint(4, (*batch, 2, 3, 2), dtype=torch.uint8)
        observed = torch.rand(x.shape) < 0.5
        best = most_probable(circuit, x, observed)
        assert best.values.shape == x.shape
        assert best.values.dtype == x.dtype
        assert best.states.shape == (*batch, R)
        assert best.log_prob.shape == batch
        assert posterior(circuit, x, observed).shape == (*batch, R, 2)
        assert leave_one_out(circuit, x, observed).shape == (*batch, 12, 4)
        assert conditional_log_prob(circuit, x, given=observed).shape == batch
        draws = conditional_sample(circuit, x, 5, observed=observed)
        assert draws.shape == (5, *x.shape)
        assert draws.dtype == x.dtype
        assert (draws == x)[observed.expand(draws.shape)].all()
        assert sample(circuit, batch).shape == (*batch, 2, 3, 2)


def test_masks_take_either_shape():
    circuit = randomise(TreeCircuit(quad_tree(2, 2), Categorical(4, 2, 4), shape=(2, 2)))
    x, given = torch.randint(4, (5, 2, 2)), torch.tensor([[True, False], [True, True]])
    expected = conditional_log_prob(circuit, x, given=given)
    assert_close(conditional_log_prob(circuit, x, given=given.flatten()), expected)
    assert_close(conditional_log_prob(circuit, x.flatten(1), given=given), expected)


def test_values_that_the_type_cannot_hold():
    inputs = Categorical(1, units=1, values=300)
    circuit = TreeCircuit(chain(1), inputs)
    with torch.no_grad():
        inputs.logits[0, 299] = 50.0
    x, missing = torch.zeros(1, dtype=torch.uint8), torch.tensor([False])
    assert most_probable(circuit, x, missing).values.tolist() == [299]
    assert conditional_sample(circuit, x, observed=missing).tolist() == [[299]]

    circuit = TreeCircuit(chain(1), Gaussian(1, 1))
    drawn = conditional_sample(circuit, torch.tensor([0]), observed=missing)
    assert drawn.is_floating_point()


def test_nothing_is_missing():
    circuit = circuit_on("any")
    x, _ = observations(circuit)
    assert conditional_sample(circuit, x).tolist() == [x.tolist()]
    assert most_probable(circuit, x).values.tolist() == x.tolist()


def test_deep_chain():
    tree = chain(3000)
    circuit = TreeCircuit(tree, Categorical(tree.inputs, 3, 2))
    x = torch.randint(2, (2, 3000)).float()
    x[:, ::3] = math.nan
    with torch.no_grad():
        unit = posterior(circuit, x)
        assert_close(unit.sum(-1), torch.ones(2, 3000))
        assert most_probable(circuit, x).log_prob.isfinite().all()
        assert not conditional_sample(circuit, x).isnan().any()


def test_single_precision():
    circuit = circuit_on("any, tied")
    x = with_nan(*observations(circuit))
    expected = posterior(circuit, x), leave_one_out(circuit, x)
    found = posterior(circuit.float(), x.float()), leave_one_out(circuit, x.float())
    for one, two in zip(expected, found, strict=True):
        assert_close(two.double(), one, rtol=1e-4, atol=1e-5)


# Errors


def test_rejects_impossible_evidence():
    inputs = Binomial(2, units=2, values=2)
    circuit = TreeCircuit(chain(2), inputs)
    with torch.no_grad():
        inputs.logits.fill_(-math.inf)
    x = torch.tensor([[0, 0], [0, 1]])
    given = torch.tensor([False, True])
    sentence = "positive probability, got probability zero in row 1; train with a pseudocount"
    for query in (posterior, leave_one_out, most_probable, conditional_sample):
        with pytest.raises(ValueError, match=sentence):
            query(circuit, x)
    with pytest.raises(ValueError, match=sentence):
        conditional_log_prob(circuit, x, given=given)


def test_rejects_inputs_without_a_table():
    circuit = TreeCircuit(chain(2), Gaussian(2, 2))
    with pytest.raises(TypeError, match="expected discrete inputs, got Gaussian"):
        leave_one_out(circuit, torch.zeros(2))


def test_rejects_masks():
    circuit = circuit_on("chain")
    with pytest.raises(ValueError, match="a mask that expands to"):
        conditional_log_prob(circuit, torch.zeros(5, 4), given=torch.ones(3).bool())
