import math
from typing import Any

import pytest
import torch

from probnets.boltzmann import FreeCoupling, GramCoupling, mean_field
from probnets.boltzmann.corrections import linear_response, second_order, tap_marginals
from probnets.boltzmann.enumeration import exact

SIZES = [2, 3, 4, 2, 3]
N, n = sum(SIZES), len(SIZES)


def free(sizes=SIZES, cap: Any = "extended", std=1.0):
    return FreeCoupling(sizes, cap=cap, std=std, dtype=torch.float64).requires_grad_(
        requires_grad=False
    )


def bias(batch, states=N):
    return torch.randn(batch, states, dtype=torch.float64)


def query(model, batch) -> Any:
    r"""Observes some variables at random states."""
    states = model.groups.starts + (torch.rand(batch, n) * model.groups.sizes).long()
    values = torch.zeros(batch, model.states, dtype=torch.float64).scatter_(1, states, 1.0)
    return {"observed": torch.rand(batch, n) < 0.3, "values": values}


def spins(J):
    r"""Returns two bits that are coupled by J if equal and by -J if not."""
    model = FreeCoupling([2, 2], cap=None, dtype=torch.float64).requires_grad_(requires_grad=False)
    block = torch.tensor([[J, -J], [-J, J]], dtype=torch.float64)
    model.weight.zero_()
    model.weight[:2, 2:], model.weight[2:, :2] = block, block
    return model


def covariance(q, groups):
    own = groups.index[:, None] == groups.index
    return torch.diag_embed(q) - (q[:, :, None] * q[:, None]) * own


# Linear response


def test_linear_response_of_two_spins():
    # In units of spins, C = (1 - J)^-1 on the even mode and (1 + J)^-1 on the odd one.
    J = 0.4
    q = torch.full((1, 4), 0.5, dtype=torch.float64)
    C = linear_response(spins(J), q)[0]
    assert 4 * C[0, 0].item() == pytest.approx(1 / (1 - J**2))
    assert 4 * C[0, 2].item() == pytest.approx(J / (1 - J**2))


def test_linear_response_is_the_inverse_on_the_tangent_space():
    model, b = free(), bias(3)
    q = mean_field(model, b, tolerance=1e-10).marginals
    S = covariance(q, model.groups)
    own = model.groups.index[:, None] == model.groups.index
    P = torch.eye(N).double() - own / model.groups.sizes[model.groups.index].double()
    inverse = torch.linalg.pinv(S, rcond=1e-12) - P @ model.dense() @ P
    expected = torch.linalg.pinv(inverse, rcond=1e-10, hermitian=True)
    torch.testing.assert_close(linear_response(model, q), expected)


def test_linear_response_is_the_jacobian_of_mean_field():
    model, b = free(), bias(1)
    given = query(model, 1)
    given["observed"][0, 1:3] = torch.tensor([True, False])
    q = mean_field(model, b, **given, tolerance=1e-12).marginals
    h = 1e-5
    near = b + h * torch.cat([torch.eye(N), -torch.eye(N)]).double()
    given = {name: value.expand(2 * N, -1) for name, value in given.items()}
    moved = mean_field(model, near, **given, tolerance=1e-12).marginals
    C = linear_response(model, q, given["observed"][:1])
    torch.testing.assert_close(((moved[:N] - moved[N:]) / (2 * h))[None], C, atol=1e-8, rtol=1e-6)


def test_linear_response_error_is_of_second_order():
    model, b = free(std=1.0), bias(10)
    errors = {}
    for scale in (0.1, 0.05):
        small = free(cap=None)
        small.weight.copy_(scale * model.dense())
        C = linear_response(small, mean_field(small, b, tolerance=1e-10).marginals)
        truth = exact(small, b).covariance
        errors[scale] = torch.linalg.matrix_norm(C - truth).mean().item()
        assert torch.corrcoef(torch.stack([C.flatten(), truth.flatten()]))[0, 1] > 0.99
    assert 3.5 < errors[0.1] / errors[0.05] < 4.5


def test_linear_response_correlates_with_the_truth():
    model = GramCoupling(SIZES, 8, cap="paper", dtype=torch.float64).requires_grad_(
        requires_grad=False
    )
    b, given = bias(20), query(model, 20)
    q = mean_field(model, b, **given, tolerance=1e-8).marginals
    C, truth = linear_response(model, q, given["observed"]), exact(model, b, **given).covariance
    off = (model.groups.index[:, None] != model.groups.index).expand_as(C)
    assert torch.corrcoef(torch.stack([C[off], truth[off]]))[0, 1] > 0.99
    assert torch.linalg.eigvalsh(C).min() > -1e-12


def test_linear_response_of_observed_is_zero():
    model = free()
    q = torch.softmax(bias(2, N), dim=1)
    seen = torch.tensor([True, False, False, True, False])
    states = seen[model.groups.index]
    C = linear_response(model, q, seen)
    assert not C[:, states].any()
    assert not C[:, :, states].any()
    assert C[:, ~states][:, :, ~states].any()
    assert not linear_response(model, q, torch.ones(n, dtype=torch.bool)).any()
    assert linear_response(model, q[:0]).shape == (0, N, N)


# Second order


def test_second_order_of_two_spins():
    # log Z = log 4 + log cosh J, and log cosh J = J^2 / 2 + O(J^4).
    J = 0.3
    field = mean_field(spins(J), torch.zeros(1, 4, dtype=torch.float64))
    estimate = second_order(spins(J), torch.zeros(4).double(), field)
    assert estimate.log_partition.item() == pytest.approx(math.log(4) + J**2 / 2)
    assert estimate.standard_error.item() == 0.0


@pytest.mark.parametrize("held", [1, 2**23])
def test_second_order_matches_dense_algebra(held, monkeypatch):
    monkeypatch.setattr("probnets.boltzmann.corrections._HELD", held)
    model, b = free(), bias(4)
    given = query(model, 4)
    field = mean_field(model, b, **given)
    hidden = (~given["observed"])[:, model.groups.index]
    M = covariance(field.marginals * hidden, model.groups) @ model.dense()
    expected = -field.free_energy + torch.einsum("bij,bji->b", M, M) / 4
    found = second_order(model, b, field, observed=given["observed"])
    torch.testing.assert_close(found.log_partition, expected)
    torch.testing.assert_close(second_order(model, b, field).log_partition, expected)


def test_second_order_error_is_of_third_order():
    model, b = free(), bias(10)
    errors = {}
    for scale in (0.1, 0.05):
        small = free(cap=None)
        small.weight.copy_(scale * model.dense())
        field = mean_field(small, b, tolerance=1e-10)
        gap = exact(small, b).log_partition - second_order(small, b, field).log_partition
        errors[scale] = gap.abs().mean().item()
    assert errors[0.1] / errors[0.05] > 6


@pytest.mark.parametrize("cap", ["paper", "extended"])
def test_second_order_is_closer_than_mean_field(cap):
    before, after = [], []
    for _ in range(10):
        model, b = free(cap=cap, std=2.0), bias(5)
        given = query(model, 5)
        field, truth = mean_field(model, b, **given), exact(model, b, **given).log_partition
        estimate = second_order(model, b, field, observed=given["observed"]).log_partition
        before.append((truth + field.free_energy).mean().item())
        after.append((truth - estimate).abs().mean().item())
        assert (truth + field.free_energy > -1e-9).all()
    assert sum(after) < sum(before) / 3


def test_probes_are_unbiased():
    model, b = free(), bias(3)
    field = mean_field(model, b)
    exactly = second_order(model, b, field).log_partition
    generator = torch.Generator().manual_seed(1)
    found = second_order(model, b, field, probes=1000, generator=generator)
    assert ((found.log_partition - exactly).abs() < 5 * found.standard_error).all()
    assert (found.standard_error < 0.1 * (exactly + field.free_energy)).all()


def test_second_order_has_gradients():
    model = FreeCoupling([2, 3, 2], std=0.2, dtype=torch.float64)
    q = torch.rand(2, 7, dtype=torch.float64, requires_grad=True)

    def value(weight, q):
        return torch.func.functional_call(Second(model), {"model.weight": weight}, (q,))

    assert torch.autograd.gradcheck(value, (model.weight.detach().requires_grad_(), q))


class Second(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, q):
        return second_order(self.model, torch.zeros(7).double(), q).log_partition


# Stationary points of the second order


def test_tap_is_stationary():
    model, b = free(), bias(3)
    found = tap_marginals(model, b, tolerance=1e-12, strict=True)
    theta = found.value.log().requires_grad_()
    q = torch.cat([part.softmax(1) for part in theta.split(SIZES, dim=1)], dim=1)
    (slope,) = torch.autograd.grad(second_order(model, b, q).log_partition.sum(), theta)
    assert slope.abs().max() < 1e-10


@pytest.mark.parametrize("cap", ["paper", "extended"])
def test_tap_is_closer_than_mean_field(cap):
    before, after = [], []
    for _ in range(10):
        model, b = free(cap=cap, std=2.0), bias(4)
        given = query(model, 4)
        truth = exact(model, b, **given).marginals
        found = tap_marginals(model, b, **given)
        assert found.converged.all()
        seen = given["observed"][:, model.groups.index]
        torch.testing.assert_close(found.value[seen], given["values"][seen])
        before.append((mean_field(model, b, **given).marginals - truth).abs().mean().item())
        after.append((found.value - truth).abs().mean().item())
    assert sum(after) < sum(before) / 2


def test_tap_converges_where_plain_iteration_does_not():
    sizes = [2, 3, 4] * 10
    model = GramCoupling(sizes, 10, dtype=torch.float64).requires_grad_(requires_grad=False)
    model.weight.mul_(10)
    b = bias(3, sum(sizes))
    assert model.spectrum().smallest < -6
    assert tap_marginals(model, b).converged.all()
    assert not tap_marginals(model, b, damping=0.0, max_steps=300).converged.any()


def test_tap_flags_what_does_not_converge():
    model, b = free(cap=None, std=5.0), bias(4)
    found = tap_marginals(model, b, max_steps=20)
    assert not found.converged.any()
    assert found.value.isfinite().all()
    total = torch.stack([part.sum(1) for part in found.value.split(SIZES, dim=1)])
    torch.testing.assert_close(total, torch.ones_like(total))
    with pytest.raises(RuntimeError, match="did not converge for 4 of 4"):
        tap_marginals(model, b, max_steps=20, strict=True)


def test_without_coupling_all_is_exact():
    model, b = free(), bias(3)
    model.weight.zero_()
    truth, field = exact(model, b), mean_field(model, b)
    torch.testing.assert_close(linear_response(model, field.marginals), truth.covariance)
    torch.testing.assert_close(second_order(model, b, field).log_partition, truth.log_partition)
    found = tap_marginals(model, b)
    torch.testing.assert_close(found.value, truth.marginals)
    assert not found.steps.any()


@pytest.mark.parametrize("sizes", [[3], [1], [1, 1]])
def test_smallest_models(sizes):
    model, b = free(sizes), bias(2, sum(sizes))
    truth, field = exact(model, b), mean_field(model, b)
    torch.testing.assert_close(linear_response(model, field.marginals), truth.covariance)
    torch.testing.assert_close(second_order(model, b, field).log_partition, truth.log_partition)
    torch.testing.assert_close(tap_marginals(model, b).value, truth.marginals)


def test_all_observed():
    model, b = free(), bias(2)
    given = query(model, 2) | {"observed": torch.ones(n, dtype=torch.bool)}
    field = mean_field(model, b, **given)
    found = second_order(model, b, field, observed=given["observed"])
    torch.testing.assert_close(found.log_partition, exact(model, b, **given).log_partition)
    torch.testing.assert_close(tap_marginals(model, b, **given).value, given["values"])


def test_errors(monkeypatch):
    model, q = free(), torch.full((2, N), 0.5).double()
    with pytest.raises(ValueError, match=r"expected marginals with shape \(B, 14\), got \(14,\)"):
        linear_response(model, q[0])
    with pytest.raises(ValueError, match="expected a boolean mask of observed variables"):
        linear_response(model, q, torch.zeros(3, n, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected a boolean mask of observed variables"):
        linear_response(model, q, torch.zeros(n))
    with pytest.raises(ValueError, match="expected probes >= 2, got 1"):
        second_order(model, bias(2), q, probes=1)
    monkeypatch.setattr("probnets.boltzmann.corrections._LARGEST", 13)
    with pytest.raises(ValueError, match="at most 13 states for dense algebra, got 14"):
        second_order(model, bias(2), q)
    assert second_order(model, bias(2), q, probes=2).log_partition.shape == (2,)
