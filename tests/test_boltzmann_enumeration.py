import itertools
import math
from typing import Any

import pytest
import torch

from probnets.boltzmann import FreeCoupling, GramCoupling, enumeration, free_energy, mean_field
from probnets.boltzmann.enumeration import enumerate_states, exact

SIZES = [2, 3, 1, 4]
N = sum(SIZES)


def coupling(sizes=SIZES, cap: Any = "extended"):
    return FreeCoupling(sizes, cap=cap, std=1.0, dtype=torch.float64).requires_grad_(
        requires_grad=False
    )


def bias(batch, states=N):
    return torch.randn(batch, states, dtype=torch.float64)


def one_hots(sizes):
    for states in itertools.product(*map(range, sizes)):
        yield torch.cat([torch.eye(k).double()[s] for k, s in zip(sizes, states, strict=True)])


def brute_force(model, b, keep=lambda x: True):
    r"""Sums over all configurations that are kept, one by one."""
    Phi = model.dense()
    x = torch.stack([x for x in one_hots(model.groups.sizes.tolist()) if keep(x)])
    score = torch.stack([0.5 * v @ Phi @ v + b @ v for v in x])
    p = score.softmax(0)
    mean = p @ x
    return score.logsumexp(0), mean, torch.einsum("s,si,sj->ij", p, x - mean, x - mean)


def test_states_by_hand():
    expected = torch.tensor(
        [
            [1, 0, 1, 0, 0],
            [1, 0, 0, 1, 0],
            [1, 0, 0, 0, 1],
            [0, 1, 1, 0, 0],
            [0, 1, 0, 1, 0],
            [0, 1, 0, 0, 1],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(enumerate_states([2, 3], dtype=torch.float64), expected)


def test_two_spins_by_hand():
    # Two bits that are coupled by J if equal and by -J if not: Z = 2 (e^J + e^-J).
    J = 0.7
    model = FreeCoupling([2, 2], cap=None, dtype=torch.float64).requires_grad_(requires_grad=False)
    block = torch.tensor([[J, -J], [-J, J]], dtype=torch.float64)
    model.weight.zero_()
    model.weight[:2, 2:], model.weight[2:, :2] = block, block

    answer = exact(model, torch.zeros(4, dtype=torch.float64))
    assert answer.log_partition.item() == pytest.approx(math.log(4 * math.cosh(J)))
    torch.testing.assert_close(answer.marginals, torch.full((1, 4), 0.5).double())
    assert answer.covariance[0, 0, 2].item() == pytest.approx(math.tanh(J) / 4)
    assert answer.covariance[0, 0, 3].item() == pytest.approx(-math.tanh(J) / 4)


@pytest.mark.parametrize("held", [1, 64, 2**22])
def test_matches_a_loop(held, monkeypatch):
    monkeypatch.setattr(enumeration, "_HELD", held)
    model, b = coupling(), 3 * bias(3)
    answer = exact(model, b)
    for row in range(3):
        log_z, mean, covariance = brute_force(model, b[row])
        torch.testing.assert_close(answer.log_partition[row], log_z)
        torch.testing.assert_close(answer.marginals[row], mean)
        torch.testing.assert_close(answer.covariance[row], covariance)


def test_observed_matches_a_loop():
    model, b = coupling(), bias(4)
    observed = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1], [1, 0, 0, 0]]).bool()
    values = torch.stack([next(one_hots(SIZES)), *itertools.islice(one_hots(SIZES), 7, 10)])
    answer = exact(model, b, observed=observed, values=values)
    for row in range(4):
        seen = observed[row][model.groups.index]
        log_z, mean, covariance = brute_force(
            model, b[row], lambda x, row=row, seen=seen: torch.equal(x[seen], values[row][seen])
        )
        torch.testing.assert_close(answer.log_partition[row], log_z)
        torch.testing.assert_close(answer.marginals[row], mean)
        torch.testing.assert_close(answer.covariance[row], covariance)


def test_observed_probabilities_add_up():
    model, b = coupling(), bias(1)
    total = exact(model, b).log_partition
    observed = torch.tensor([False, True, False, False])
    values = torch.zeros(3, N, dtype=torch.float64)
    values[range(3), range(2, 5)] = 1.0
    parts = exact(model, b.expand(3, N), observed=observed, values=values).log_partition
    torch.testing.assert_close(parts.logsumexp(0, keepdim=True), total)


@pytest.mark.parametrize("kind", ["free", "gram"])
@pytest.mark.parametrize("cap", ["paper", "extended"])
@pytest.mark.parametrize("soft", [False, True])
def test_mean_field_is_a_lower_bound(kind, cap, soft):
    model = coupling(cap=cap) if kind == "free" else GramCoupling(SIZES, 6, cap=cap).double()
    b = 2 * bias(20)
    observed = torch.rand(20, len(SIZES)) < 0.3
    values = torch.stack(list(one_hots(SIZES)))[torch.randint(24, (20,))]
    if soft:
        values = 0.5 * values + 0.5 / model.groups.sizes[model.groups.index].double()
    answer = exact(model, b, observed=observed, values=values)
    field = mean_field(model, b, observed=observed, values=values)
    assert (-field.free_energy <= answer.log_partition + 1e-12).all()
    assert (-field.free_energy < answer.log_partition - 1e-6).any()


def test_derivatives_are_the_moments():
    # log Z is the cumulant generating function of the states.
    model, b, h = coupling(), bias(1), 1e-4
    answer = exact(model, b)
    near = b + h * torch.cat([torch.eye(N), -torch.eye(N)]).double()
    log_z = exact(model, near).log_partition
    torch.testing.assert_close((log_z[:N] - log_z[N:])[None] / (2 * h), answer.marginals)
    mean = exact(model, near).marginals
    torch.testing.assert_close(
        (mean[:N] - mean[N:])[None] / (2 * h), answer.covariance, atol=1e-7, rtol=1e-5
    )


def test_without_coupling_mean_field_is_exact():
    model, b = coupling(), bias(5)
    model.weight.zero_()
    answer, field = exact(model, b), mean_field(model, b)
    torch.testing.assert_close(answer.marginals, field.marginals)
    torch.testing.assert_close(answer.log_partition, -field.free_energy)


def test_all_observed():
    model, b = coupling(), bias(2)
    x = torch.stack(list(itertools.islice(one_hots(SIZES), 5, 7)))
    observed = torch.ones(len(SIZES), dtype=torch.bool)
    answer = exact(model, b, observed=observed, values=x)
    torch.testing.assert_close(answer.log_partition, -free_energy(model, b, x))
    torch.testing.assert_close(answer.marginals, x)
    assert not answer.covariance.any()


def test_one_variable_and_one_state():
    b = bias(2, 3)
    answer = exact(coupling([3]), b)
    torch.testing.assert_close(answer.log_partition, b.logsumexp(1))
    torch.testing.assert_close(answer.marginals, b.softmax(1))
    assert exact(coupling([1]), torch.tensor([2.5]).double()).log_partition.item() == 2.5


def test_batch_of_zero():
    answer = exact(coupling(), bias(0))
    assert answer.marginals.shape == (0, N)
    assert answer.covariance.shape == (0, N, N)


def test_extreme_biases():
    b = torch.zeros(1, N, dtype=torch.float64)
    b[0, [0, 2]] = 1e4
    answer = exact(coupling(), b)
    assert answer.log_partition.item() == pytest.approx(2e4, rel=1e-3)
    assert answer.marginals[0, 0].item() == 1.0


def test_large_models_with_few_hidden_variables():
    sizes = [2] * 30
    model = coupling(sizes)
    observed = torch.arange(30) >= 3
    values = torch.eye(2).double()[torch.randint(2, (30,))].flatten()
    b = bias(1, 60)
    answer = exact(model, b, observed=observed, values=values)
    field = b + model(torch.where(observed[model.groups.index], values, 0.0)[None])
    part = FreeCoupling([2] * 3, cap=None, dtype=torch.float64).requires_grad_(requires_grad=False)
    part.weight.copy_(model.dense()[:6, :6])
    torch.testing.assert_close(answer.marginals[:, :6], exact(part, field[:, :6]).marginals)


def test_errors():
    with pytest.raises(ValueError, match=r"at most 1048576 configurations, got 2\.1e\+06 of 21"):
        enumerate_states([2] * 21)
    model = coupling([2] * 21)
    with pytest.raises(ValueError, match="observe more of them, or sample"):
        exact(model, bias(1, 42))
    with pytest.raises(ValueError, match="expected bias with shape"):
        exact(model, bias(1, 3))
