r"""Tests for the probnets.circuits.inputs and probnets.circuits.ordinal modules."""

import copy
import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load, save
from scipy import stats
from torch.testing import assert_close

from probnets.circuits import Bernoulli, Binomial, Categorical, DiscretisedLogistic, Gaussian
from probnets.circuits.ordinal import _descend

DISCRETE = {
    "Categorical": Categorical,
    "Binomial": Binomial,
    "DiscretisedLogistic": DiscretisedLogistic,
}

FAMILIES = {
    "Categorical": lambda H, K, **kwargs: Categorical(H, K, 5, **kwargs),
    "Binomial": lambda H, K, **kwargs: Binomial(H, K, 5, **kwargs),
    "Bernoulli": lambda H, K, **kwargs: Bernoulli(H, K, **kwargs),
    "DiscretisedLogistic": lambda H, K, **kwargs: DiscretisedLogistic(H, K, 5, **kwargs),
    "Gaussian": lambda H, K, **kwargs: Gaussian(H, K, **kwargs),
}


def posterior(shape, units):
    return torch.rand(*shape, units, dtype=torch.float64)


# Distributions


@pytest.mark.parametrize("values", [1, 2, 5, 256])
def test_binomial(values):
    inputs = Binomial(2, 3, values, dtype=torch.float64)
    p = inputs.logits.detach().sigmoid().numpy()[:, None]
    expected = stats.binom.logpmf(np.arange(values)[:, None], values - 1, p)
    assert_allclose(inputs.log_table().detach(), expected, rtol=1e-10, atol=1e-10)


def test_bernoulli():
    inputs = Bernoulli(1, 2, dtype=torch.float64)
    p = inputs.logits.detach().sigmoid()
    assert_close(inputs.log_table().exp(), torch.stack([1 - p, p], dim=1))
    with pytest.raises(ValueError, match="expected two values of a Bernoulli variable, got 3"):
        Bernoulli(1, 2, 3)


@pytest.mark.parametrize("values", [2, 3, 256])
def test_discretised_logistic(values):
    inputs = DiscretisedLogistic(2, 3, values, dtype=torch.float64)
    mean, scale = inputs.mean.detach().numpy(), inputs.log_scale.detach().exp().numpy()
    edges = np.r_[-np.inf, np.arange(1, values) - 0.5, np.inf][:, None, None]
    cdf = stats.logistic.cdf(edges, mean, scale)
    expected = (cdf[1:] - cdf[:-1]).transpose(1, 0, 2)
    assert_allclose(inputs.log_table().detach().exp(), expected, rtol=1e-8, atol=1e-14)


def test_discretised_logistic_in_the_tails():
    inputs = DiscretisedLogistic(1, 1, 256, dtype=torch.float64)
    with torch.no_grad():
        inputs.mean.fill_(10.0)
        inputs.log_scale.fill_(-2.0)
    scale = math.exp(-2.0)
    upper = [stats.logistic.logsf(x - 0.5, 10, scale) for x in range(20, 255)]
    lost = math.log(-math.expm1(-1 / scale))  # of one value to all above
    assert_allclose(inputs.log_table()[0, 20:255, 0].detach(), np.array(upper) + lost, rtol=1e-6)


def test_gaussian():
    inputs = Gaussian(2, 3, dtype=torch.float64)
    group = torch.tensor([1, 0, 1])
    x = torch.randn(4, 3).double()
    mean, scale = inputs.mean.detach()[group], inputs.scale().detach()[group]
    expected = stats.norm.logpdf(x[..., None], mean, scale)
    assert_allclose(inputs.log_prob(x, group).detach(), expected, rtol=1e-10)


def test_gaussian_has_a_floor():
    inputs = Gaussian(1, 1, floor=0.1)
    with torch.no_grad():
        inputs.log_scale.fill_(-50.0)
    assert inputs.scale().item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="expected a positive floor, got 0"):
        Gaussian(1, 1, floor=0)


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("values", [1, 2, 7, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_to_one(name, values, dtype):
    inputs = DISCRETE[name](3, 4, values, dtype=dtype)
    table = inputs.log_table()
    assert table.shape == (3, values, 4)
    assert table.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert_close(table.exp().sum(1), torch.ones(3, 4, dtype=dtype), rtol=tolerance, atol=0)


def test_certain_binomial():
    inputs = Binomial(1, 2, 4)
    with torch.no_grad():
        inputs.logits.copy_(torch.tensor([[math.inf, -math.inf]]))
    assert inputs.log_table()[0].exp().tolist() == [[0, 1], [0, 0], [0, 0], [1, 0]]


@pytest.mark.parametrize("name", DISCRETE)
def test_log_prob_looks_up_the_table(name):
    inputs = DISCRETE[name](2, 3, 5)
    group, x = torch.tensor([0, 1, 1]), torch.tensor([[4, 0, 2], [1, 3, 3]])
    found = inputs.log_prob(x, group)
    for b in range(2):
        for d in range(3):
            assert_close(found[b, d], inputs.log_table()[group[d], x[b, d]])


@pytest.mark.parametrize("name", DISCRETE)
def test_gradient(name):
    inputs = DISCRETE[name](2, 2, 4, dtype=torch.float64)
    names, values = zip(*inputs.named_parameters(), strict=True)
    weights = torch.randn(2, 4, 2).double()

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inputs = inputs

        def forward(self):
            return self.inputs.log_table() * weights

    def function(*parameters):
        replaced = {f"inputs.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Table(), replaced, ())

    assert torch.autograd.gradcheck(function, values)


# Samples and modes


@pytest.mark.parametrize("name", DISCRETE)
def test_samples(name):
    inputs = DISCRETE[name](2, 2, 4)
    group, unit = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])
    source = torch.Generator().manual_seed(2)
    draws = inputs.sample(unit.expand(20_000, 3), group, generator=source)
    assert draws.shape == (20_000, 3)
    for d in range(3):
        prob = inputs.log_table().exp()[group[d], :, unit[d]].detach()
        found = torch.bincount(draws[:, d], minlength=4) / 20_000
        assert ((found - prob).abs() <= 5 * (prob * (1 - prob) / 20_000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_of_no_rows(name):
    unit, group = torch.zeros(0, 2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    assert FAMILIES[name](1, 2).sample(unit, group, generator=None).shape == (0, 2)


@pytest.mark.parametrize("name", DISCRETE)
def test_most_probable(name):
    inputs = DISCRETE[name](3, 4, 6)
    value, log_prob = inputs.most_probable()
    assert value.shape == log_prob.shape == (3, 4)
    for h in range(3):
        for k in range(4):
            column = inputs.log_table()[h, :, k]
            assert log_prob[h, k] == column.max() == column[value[h, k]]


# M-steps


@pytest.mark.parametrize("name", DISCRETE)
def test_statistics_by_hand(name):
    inputs = DISCRETE[name](2, 1, 3)
    x, group = torch.tensor([[0, 2, 1], [2, 2, 0]]), torch.tensor([0, 0, 1])
    weights = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 16.0]])[..., None]
    counts = inputs.statistics(x, group, weights)
    assert counts[..., 0].tolist() == [[1.0, 0.0, 10.0], [16.0, 4.0, 0.0]]


def test_categorical_m_step_by_hand():
    inputs = Categorical(1, 2, 3)
    before = inputs.log_table()[0, :, 1].detach()
    inputs.maximise(torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]]]), 0.0)
    assert_close(inputs.log_table()[0, :, 0].exp(), torch.tensor([0.25, 0.75, 0.0]))
    assert_close(inputs.log_table()[0, :, 1], before)  # nothing used this unit

    inputs.maximise(torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]]]), 2.0)
    assert_close(inputs.log_table()[0].exp().T, torch.tensor([[0.3, 0.5, 0.2], [1 / 3] * 3]))


def test_binomial_m_step_by_hand():
    inputs = Binomial(1, 4, 3)
    before = inputs.logits[0, 3].item()
    # Counts of 0, 1 and 2 successes in two trials.
    counts = torch.tensor([[[1.0, 0.0, 5.0, 0.0], [2.0, 0.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0]]])
    inputs.maximise(counts, 0.0)
    p = inputs.logits[0].sigmoid()
    assert_close(p[:3], torch.tensor([0.5, 1.0, 0.0]))
    assert inputs.logits.isfinite().all()
    assert inputs.logits[0, 3].item() == before

    inputs.maximise(counts, 1.0)  # a success and a failure
    expected = torch.tensor([5 / 10, 7 / 8, 1 / 12, 1 / 2])
    assert_close(inputs.logits[0].sigmoid(), expected)


def test_gaussian_m_step_by_hand():
    inputs = Gaussian(2, 2, floor=0.5, dtype=torch.float64)
    before = inputs.mean.detach().clone(), inputs.log_scale.detach().clone()
    x = torch.tensor([[1.0], [3.0], [8.0]]).double()
    weights = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 2.0]]]).double()
    statistics = inputs.statistics(x, torch.tensor([0]), weights)
    inputs.maximise(statistics, 0.0)
    assert_close(inputs.mean[0], torch.tensor([2.0, 8.0]).double())
    assert_close(inputs.scale()[0], torch.tensor([1.0, 0.5]).double())

    # One pseudo-observation with the moments of all: mean 5, mean square 138 / 4.
    inputs.maximise(statistics, 1.0)
    assert_close(inputs.mean[0], torch.tensor([9 / 3, 21 / 3]).double())
    square = torch.tensor([(10 + 138 / 4) / 3 - 9, (128 + 138 / 4) / 3 - 49]).double()
    assert_close(inputs.scale()[0], square.sqrt())

    # Nothing used the other group, with or without a pseudocount.
    assert_close(inputs.mean[1], before[0][1])
    assert_close(inputs.log_scale[1], before[1][1])


def test_gaussian_m_step_far_from_zero():
    inputs = Gaussian(1, 1)
    x = 1e4 + torch.randn(500, 1)
    inputs.maximise(inputs.statistics(x, torch.tensor([0]), torch.ones(500, 1, 1)), 0.0)
    assert inputs.scale().item() == pytest.approx(x.double().std(correction=0).item(), rel=1e-3)


def test_discretised_logistic_m_step():
    # From the counts of another logistic, its parameters come back.
    inputs, truth = (
        DiscretisedLogistic(1, 2, 32, dtype=torch.float64),
        DiscretisedLogistic(1, 2, 32, dtype=torch.float64),
    )
    with torch.no_grad():
        truth.mean.copy_(torch.tensor([[9.0, 20.0]]))
        truth.log_scale.copy_(torch.tensor([[0.5, 1.0]]))
    counts = 1000 * truth.log_table().exp().detach()
    for _ in range(5):
        inputs.maximise(counts, 0.0)
    assert_close(inputs.mean, truth.mean, rtol=1e-2, atol=0)
    assert_close(inputs.log_scale, truth.log_scale, rtol=0, atol=2e-2)


def test_ascent_that_gets_lost_returns():
    start = torch.ones(2)
    (found,) = _descend(lambda p: torch.where(p == 1, p - 1, math.nan).sum(), start)
    assert found.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pseudocount", [0.0, 0.5])
def test_m_step_raises_the_expected_likelihood(name, pseudocount):
    inputs = FAMILIES[name](2, 3, dtype=torch.float64)
    x, group = torch.randint(2, (40, 4)), torch.tensor([0, 1, 1, 0])
    x = x.double() if name == "Gaussian" else x
    weights = posterior((40, 4), 3)

    def objective():
        return (weights * inputs.log_prob(x, group)).sum().item()

    before = objective()
    inputs.requires_grad_(requires_grad=False)  # the M-step needs no gradient of the user's
    inputs.maximise(inputs.statistics(x, group, weights), pseudocount)
    assert objective() >= before
    assert not any(p.isnan().any() for p in inputs.parameters())
    assert all(p.grad is None for p in inputs.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_m_step_without_counts_changes_nothing(name):
    inputs = FAMILIES[name](2, 3)
    before = copy.deepcopy(inputs.state_dict())
    x, group = torch.zeros(0, 2).long(), torch.tensor([0, 1])
    inputs.maximise(inputs.statistics(x, group, torch.zeros(0, 2, 3)), 0.0)
    for key, value in inputs.state_dict().items():
        assert_close(value, before[key], rtol=0, atol=0)


# Errors and plumbing


def test_rejects_sizes():
    with pytest.raises(ValueError, match="expected one group and one unit or more, got 0 and 2"):
        Categorical(0, 2, 2)
    with pytest.raises(ValueError, match="expected one group and one unit or more, got 1 and 0"):
        Gaussian(1, 0)
    with pytest.raises(ValueError, match="expected at least one value, got 0"):
        Categorical(1, 2, 0)


@pytest.mark.parametrize("name", DISCRETE)
def test_check(name):
    inputs = DISCRETE[name](1, 1, 3)
    inputs.check(torch.tensor([0, 2]))
    inputs.check(torch.tensor([]))
    inputs.check(torch.tensor([0.0, 2.0]))
    for bad in ([-1, 0], [0, 3], [0.0, 0.5]):
        with pytest.raises(ValueError, match="expected integers from 0 to 2, got"):
            inputs.check(torch.tensor(bad))


@pytest.mark.parametrize("name", FAMILIES)
def test_plumbing(name):
    inputs = FAMILIES[name](2, 3)
    assert "groups=2, units=3" in repr(inputs)
    assert all(p.shape[0] == 2 and p.shape[-1] == 3 for p in inputs.parameters())

    x, group = torch.randint(2, (4, 2)), torch.tensor([0, 1])
    expected = inputs.log_prob(x, group)
    other = FAMILIES[name](2, 3)
    other.load_state_dict(load(save(inputs.state_dict())))
    assert_close(other.log_prob(x, group), expected, rtol=0, atol=0)
    assert_close(copy.deepcopy(inputs).log_prob(x, group), expected, rtol=0, atol=0)
    assert inputs.to(torch.float64).log_prob(x, group).dtype == torch.float64

    made = FAMILIES[name](2, 3, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.float64)}
