r"""Tests of mean field: certificates, gradients and what is observed."""

import itertools
from typing import Any

import pytest
import torch

from probnets.boltzmann import FreeCoupling, GramCoupling, free_energy, mean_field, prepare
from probnets.boltzmann.acceleration import Anderson
from probnets.boltzmann.couplings import Cap
from probnets.boltzmann.meanfield import SOLVERS
from probnets.boltzmann.newton import Newton

SIZES = [2, 3, 4, 2, 1]
TIGHT: dict[str, Any] = {"tolerance": 1e-12, "adjoint_tolerance": 1e-12}


def gram(cap: Cap = "extended", scale=2.0, sizes=SIZES):
    made = GramCoupling(sizes, 4, cap=cap, dtype=torch.float64)
    made.weight.data.mul_(scale)
    return made


def free(cap: Cap = "extended", sizes=SIZES):
    return FreeCoupling(sizes, cap=cap, std=0.7, dtype=torch.float64)


def query(made, batch=3) -> tuple[torch.Tensor, dict[str, Any]]:
    r"""Returns biases, and what is observed, which differs from sample to sample."""
    bias = torch.randn(batch, made.states, dtype=torch.float64)
    observed = torch.rand(batch, made.variables) < 0.4
    values = torch.zeros_like(bias)
    values[:, made.groups.starts] = 1.0
    return bias, {"observed": observed, "values": values}


def states_of(made):
    r"""Returns all joint states as one-hot rows."""
    parts = [torch.eye(size, dtype=torch.float64) for size in made.groups.sizes.tolist()]
    return torch.stack([torch.cat(rows) for rows in itertools.product(*parts)])


def test_a_pair_by_hand():
    made = FreeCoupling([2, 2], cap=None, dtype=torch.float64)
    block = torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=torch.float64)
    made.weight.data = torch.kron(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), block)
    values = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    observed = torch.tensor([True, False])
    bias = torch.zeros(4, dtype=torch.float64)
    found = mean_field(made, bias, observed=observed, values=values, tolerance=1e-12)
    expected = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double()
    expected[0, 2:] = torch.tensor([0.5, -0.5]).double().softmax(0)
    torch.testing.assert_close(found.marginals, expected)
    log_sum = torch.tensor([0.5, -0.5]).double().logsumexp(0)
    torch.testing.assert_close(found.free_energy, -log_sum[None])  # exact with one variable


@pytest.mark.parametrize("cap", ["paper", "extended"])
@pytest.mark.parametrize("make", [gram, free])
def test_the_free_energy_bounds_the_partition_function(make, cap):
    made = make(cap)
    bias, _ = query(made)
    x = states_of(made)
    with torch.no_grad():
        scores = 0.5 * (x * made(x)).sum(1) + bias @ x.T
    found = mean_field(made, bias, tolerance=1e-10)
    log_z = scores.logsumexp(1)
    assert (found.free_energy >= -log_z).all()
    assert (found.free_energy <= -log_z + 1.0).all()
    again = free_energy(made, bias, found.marginals)
    torch.testing.assert_close(found.free_energy, again.detach())
    with torch.no_grad():
        problem, _ = prepare(made, bias)
        inner = problem.free_energy(found.logits, found.marginals, made(found.marginals))
    torch.testing.assert_close(inner, found.free_energy, rtol=0, atol=1e-9)


def test_without_couplings_it_is_exact():
    made = gram(scale=0.0)
    bias, known = query(made)
    found = mean_field(made, bias, **known)
    expected = torch.cat([x.softmax(1) for x in bias.split(SIZES, 1)], 1)
    seen = known["observed"][:, made.groups.index]
    expected = torch.where(seen, known["values"], expected)
    torch.testing.assert_close(found.marginals, expected)
    assert (found.steps == 0).all()


def test_observed_variables_are_a_smaller_model():
    made = free()
    bias, _ = query(made, 1)
    values = torch.zeros(12, dtype=torch.float64)
    values[:5] = torch.tensor([0.75, 0.25, 0.0, 0.75, 0.25])  # distributions are welcome
    observed = torch.tensor([True, True, False, False, False])
    found = mean_field(made, bias, observed=observed, values=values, tolerance=1e-12)
    small = FreeCoupling([4, 2, 1], cap=None, dtype=torch.float64)
    with torch.no_grad():
        Phi = made.dense()
        small.weight.data = Phi[5:, 5:].clone()
        shifted = bias[:, 5:] + Phi[5:, :5] @ values[:5]
    alone = mean_field(small, shifted, tolerance=1e-12)
    torch.testing.assert_close(found.marginals[:, 5:], alone.marginals, rtol=0, atol=1e-11)
    assert torch.equal(found.marginals[0, :5].detach(), values[:5])
    torch.testing.assert_close(found.logits[:, 5:], alone.logits, rtol=0, atol=1e-10)


def test_values_of_hidden_variables_are_ignored():
    made = gram()
    bias, known = query(made)
    clean = mean_field(made, bias, **known)
    seen = known["observed"][:, made.groups.index]
    dirty = known["values"].masked_fill(~seen, float("nan"))
    found = mean_field(made, bias, observed=known["observed"], values=dirty)
    assert torch.equal(found.marginals, clean.marginals)


@pytest.mark.parametrize("name", ["damping", "anderson", "newton", "coordinate", "parallel"])
@pytest.mark.parametrize("cap", ["paper", "extended"])
def test_the_distance_never_exceeds_its_certificate(name, cap):
    for trial in range(5):
        made = gram(cap, scale=0.5 + trial)
        bias, known = query(made, 200)
        exact = mean_field(made, bias, solver="newton", tolerance=1e-12, **known)
        for steps in (0, 1, 2, 3, 6):
            found = mean_field(made, bias, solver=name, tolerance=1e-2, max_steps=steps, **known)
            distance = (found.marginals - exact.marginals).norm(dim=1)
            assert (distance <= found.error + 1e-12).all()
            assert (found.error <= 1e3).all()
            assert torch.equal(found.converged, found.error <= 1e-2)
            excess = found.free_energy - exact.free_energy
            bound = found.residual.square() / (2 * (2 - made.limit))
            assert (excess <= bound + 1e-12).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [gram, free])
@pytest.mark.parametrize("cap", ["paper", "extended"])
def test_gradients(make, masked, cap):
    made = make(cap, sizes=[2, 3])
    bias, known = query(made, 2)
    known["observed"][0, 0] = True
    known = known if masked else {}

    def marginals(bias, weight):  # the weight is that of the coupling
        return mean_field(made, bias, **TIGHT, **known)[:2]

    bias.requires_grad_()
    assert torch.autograd.gradcheck(marginals, (bias, made.weight), atol=1e-6, rtol=1e-6)


def test_gradients_in_what_is_observed():
    made = gram()
    bias, known = query(made, 1)
    observed = known["observed"]
    weights = torch.randn_like(bias)

    def loss(raw):
        values = torch.cat([x.softmax(1) for x in raw.split(SIZES, 1)], 1)
        found = mean_field(made, bias, observed=observed, values=values, **TIGHT)
        return (weights * found.marginals).sum()

    raw = torch.randn_like(bias).requires_grad_()
    assert torch.autograd.gradcheck(loss, raw, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("make", [gram, free])
def test_the_envelope_gradient_is_that_of_the_minimum(make):
    made = make()
    bias, known = query(made)

    def minimum(bias):
        return mean_field(made, bias, tolerance=1e-11, **known).free_energy.sum().item()

    q = mean_field(made, bias, **TIGHT, **known).marginals.detach()
    bias.requires_grad_()
    loss = free_energy(made, bias, q).sum()
    by_bias, by_weight = torch.autograd.grad(loss, (bias, made.weight))
    for tensor, gradient in ((bias.detach(), by_bias), (made.weight.data, by_weight)):
        direction = torch.randn_like(tensor)
        ends = []
        for sign in (1, -1):
            tensor += sign * 1e-5 * direction
            ends.append(minimum(bias.detach()))
            tensor -= sign * 1e-5 * direction
        slope = (ends[0] - ends[1]) / 2e-5
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-6, abs=1e-8)


def test_memory_does_not_grow_with_steps():
    made = gram(scale=20.0)
    bias = query(made)[0].requires_grad_()

    def saved(steps):
        sizes = []

        def pack(x):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found = mean_field(made, bias, solver="damping", max_steps=steps, tolerance=1e-14)
        assert found.steps.max() == steps
        return len(sizes), sum(sizes)

    assert saved(50) == saved(1)


def test_without_gradients_none_are_recorded():
    made = gram().requires_grad_(requires_grad=False)
    assert not mean_field(made, query(made)[0]).marginals.requires_grad
    made.requires_grad_()
    with torch.no_grad():
        assert not mean_field(made, query(made)[0]).marginals.requires_grad
    found = mean_field(made, query(made)[0])
    assert found.marginals.requires_grad
    assert found.logits.requires_grad
    assert not found.free_energy.requires_grad


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_warm_start_takes_no_steps(name, dtype):
    made = gram("paper", scale=0.7 if name == "parallel" else 20.0).to(dtype)  # the map expands
    bias, known = query(made)
    bias, known["values"] = bias.to(dtype), known["values"].to(dtype)
    found = mean_field(made, bias, solver=name, tolerance=1e-3, **known)
    assert found.steps.max() > 0
    assert found.converged.all()
    again = mean_field(made, bias, solver=name, tolerance=1e-3, initial=found, **known)
    assert (again.steps == 0).all()
    assert again.products == 1
    torch.testing.assert_close(again.marginals, found.marginals, rtol=0, atol=1e-5)


def test_a_warm_start_helps_a_like_query():
    made = gram(scale=20.0)
    bias, known = query(made)
    near = mean_field(made, bias, solver="damping", tolerance=1e-8, **known)
    seen = known["observed"][:, made.groups.index]
    assert (near.start[seen] == 0).all()
    bias = bias + 1e-3 * torch.randn_like(bias)
    cold = mean_field(made, bias, solver="damping", **known)
    warm = mean_field(made, bias, solver="damping", initial=near, **known)
    assert (warm.steps < cold.steps)[~known["observed"].all(1)].all()


@pytest.mark.parametrize("make", [gram, free])
def test_weights_are_worked_out_once_a_query(make, monkeypatch):
    made = make(scale=20.0) if make is gram else make()
    bias, known = query(made)
    mean_field(made, bias)  # which keeps the spectrum
    calls, whole = [], made.dense
    monkeypatch.setattr(made, "dense", lambda: calls.append(1) or whole())
    found = mean_field(made, bias, solver="damping", **known)
    assert found.steps.max() > 3
    found.marginals.square().sum().backward()
    assert len(calls) == 1
    mean_field(made, bias, solver="coordinate", **known)
    assert len(calls) == 3  # one for products, one for sweeps


def test_samples_stop_by_themselves():
    made = gram(scale=20.0)
    bias, known = query(made, 6)
    known["observed"][0] = True
    known["observed"][1] = False
    found = mean_field(made, bias, solver="damping", **known)
    assert found.steps[0] == 0
    assert found.steps[1] > 3
    assert len(found.steps.unique()) > 2
    assert (found.error <= 1e-3).all()


def test_all_observed():
    made = gram()
    bias, known = query(made)
    known["observed"][:] = True
    bias.requires_grad_()
    found = mean_field(made, bias, **known)
    assert torch.equal(found.marginals.detach(), known["values"])
    assert found.converged.all()
    assert (found.error == 0).all()
    x = known["values"]
    with torch.no_grad():
        expected = -0.5 * (x * made(x)).sum(1) - (x * bias).sum(1)
    torch.testing.assert_close(found.free_energy, expected)
    (gradient,) = torch.autograd.grad(found.marginals.sum(), bias)
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_batches_of_one_and_none(name):
    made = gram()
    bias, _ = query(made)
    one = mean_field(made, bias[0], solver=name, tolerance=1e-8)
    batch = mean_field(made, bias, solver=name, tolerance=1e-8)
    assert one.marginals.shape == (1, 12)
    torch.testing.assert_close(one.marginals[0], batch.marginals[0], rtol=0, atol=1e-7)
    none = mean_field(made, bias[:0], solver=name)
    assert none.marginals.shape == (0, 12)
    assert none.converged.shape == none.error.shape == (0,)


def test_one_bias_for_many_observations():
    made = gram()
    bias, known = query(made)
    found = mean_field(made, bias[0], tolerance=1e-8, **known)
    whole = mean_field(made, bias[:1].expand(3, -1), tolerance=1e-8, **known)
    torch.testing.assert_close(found.marginals, whole.marginals, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_single_precision(name):
    made = gram("paper")
    bias, known = query(made)
    expected = mean_field(made, bias, tolerance=1e-8, **known)
    known["values"] = known["values"].float()
    found = mean_field(made.float(), bias.float(), solver=name, **known)
    assert found.marginals.dtype == found.error.dtype == torch.float32
    assert found.converged.all()
    assert (found.marginals - expected.marginals).norm(dim=1).max() < 1.1e-3
    found.marginals.square().sum().backward()
    assert made.weight.grad is not None
    assert made.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "parallel"])
def test_what_rounding_forbids_ends(name):
    made = gram(scale=20.0).float()
    bias = query(made)[0].float()
    found = mean_field(made, bias, solver=name, tolerance=1e-12, max_steps=3000)
    assert not found.converged.all()  # a residual may be zero by luck
    assert found.residual.max() < 1e-4  # it went on while there was progress
    assert found.products < 400
    with pytest.raises(RuntimeError, match="expected mean field to converge"):
        mean_field(made, bias, solver=name, tolerance=1e-12, strict=True)


def test_a_sample_that_does_not_converge_is_flagged():
    made = gram(scale=20.0)
    bias, known = query(made)
    known["observed"][0] = True
    found = mean_field(made, bias, solver="damping", max_steps=2, tolerance=1e-9, **known)
    assert found.converged.tolist() == [True, False, False]
    assert found.steps.tolist() == [0, 2, 2]
    with pytest.raises(RuntimeError, match=r"expected mean field to converge within 2 steps, but"):
        mean_field(made, bias, solver="damping", max_steps=2, tolerance=1e-9, strict=True, **known)


def test_the_automatic_choice_goes_by_size_and_tolerance(monkeypatch):
    made = gram()
    bias, _ = query(made)
    cases = (1e-2, Anderson(), 4096), (1e-8, Newton(), 4096), (1e-8, Anderson(), 12)
    for tolerance, solver, large in cases:
        monkeypatch.setattr("probnets.boltzmann.meanfield._LARGE", large)
        found = mean_field(made, bias, tolerance=tolerance)
        expected = mean_field(made, bias, tolerance=tolerance, solver=solver)
        assert found.products == expected.products
        assert torch.equal(found.marginals, expected.marginals)


@pytest.mark.parametrize("make", [gram, free])
def test_the_first_steps_of_large_problems_are_in_single_precision(make, monkeypatch):
    made = make()
    bias, known = query(made)
    expected = mean_field(made, bias, **TIGHT, **known)
    monkeypatch.setattr("probnets.boltzmann.meanfield._LARGE", 12)
    monkeypatch.setattr(made, "single_pays", True)
    types, whole = [], made.operator

    def operator(dtype=None):
        inner = whole(dtype)
        return lambda v: types.append(v.dtype) or inner(v)

    monkeypatch.setattr(made, "operator", operator)
    for tolerance in (1e-4, 1e-10):
        types.clear()
        with torch.no_grad():
            found = mean_field(made, bias, tolerance=tolerance, **known)
        assert found.converged.all()
        assert found.marginals.dtype == torch.float64
        distance = (found.marginals - expected.marginals).norm(dim=1)
        assert (distance <= found.error + 1e-10).all()
        assert types.count(torch.float32) >= 3
        if tolerance == 1e-4:
            assert types.count(torch.float64) <= 3  # what is observed, and the certificate
    few = mean_field(made, bias, max_steps=2, tolerance=1e-10, **known)
    assert few.steps.max() == 2
    assert not few.converged.all()
    again = mean_field(made, bias[:0])
    assert again.marginals.shape == (0, 12)


def test_errors_of_mean_field():
    made = gram()
    bias, _ = query(made)
    bad: dict[str, Any] = {"solver": "simplex"}
    with pytest.raises(ValueError, match=r"expected a solver of \['auto', 'anderson', .*simplex"):
        mean_field(made, bias, **bad)
    with pytest.raises(ValueError, match="expected tolerance > 0 and max_steps >= 0, got 0 and"):
        mean_field(made, bias, tolerance=0)
    with pytest.raises(ValueError, match=r"expected tolerance > 0 and .* and -1"):
        mean_field(made, bias, max_steps=-1)
    with pytest.raises(ValueError, match=r"expected initial logits with shape \(3, 12\), got \(1"):
        mean_field(made, bias, initial=bias[:1])


def test_errors_of_queries():
    made = gram()
    bias, known = query(made)
    observed, values = known["observed"], known["values"]
    with pytest.raises(ValueError, match=r"expected bias with shape \(12,\) or \(B, 12\), got"):
        prepare(made, bias[:, :3])
    with pytest.raises(ValueError, match=r"expected observed with shape \(5,\) or \(B, 5\), got"):
        prepare(made, bias, observed=observed[:, :2], values=values)
    with pytest.raises(ValueError, match="expected values of 3 samples, got 2"):
        prepare(made, bias, observed=observed, values=values[:2])
    with pytest.raises(ValueError, match=r"expected biases that are floats, got torch.int64"):
        prepare(made, bias.long())
    with pytest.raises(ValueError, match="expected finite biases, got NaN or infinity"):
        prepare(made, bias / 0)
    with pytest.raises(ValueError, match="expected observed and values together, got one"):
        prepare(made, bias, observed=observed)
    with pytest.raises(ValueError, match="expected a boolean mask of observed variables, got"):
        prepare(made, bias, observed=observed.long(), values=values)
    for wrong, found in ((2 * values, "a sum of 2"), (values * float("nan"), "a sum of nan")):
        with pytest.raises(ValueError, match=f"expected values that are a distribution.*{found}"):
            prepare(made, bias, observed=torch.ones_like(observed), values=wrong)
    negative = values.clone()
    negative[:, :2] = torch.tensor([2.0, -1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="not negative and with sum 1, got a negative value"):
        prepare(made, bias, observed=torch.ones_like(observed), values=negative)


@pytest.mark.parametrize(
    ("dtype", "offset", "tolerance"),
    [
        (torch.float32, 0.0, 1e-4),
        (torch.float32, 100.0, 1e-4),
        (torch.float32, 1e5, 1e-8),
        (torch.float64, 1e6, 1e-10),
    ],
)
def test_certificates_hold_what_rounding_hides(dtype, offset, tolerance):
    one = GramCoupling([2, 3, 4] * 5, 20, dtype=dtype).requires_grad_(requires_grad=False)
    two = GramCoupling([2, 3, 4] * 5, 20, dtype=torch.float64).requires_grad_(requires_grad=False)
    one.weight.mul_(3)
    two.weight.copy_(one.weight)
    b = 2 * torch.randn(64, 45, dtype=dtype) + offset
    found = mean_field(one, b, tolerance=tolerance, max_steps=200)
    truth = mean_field(two, b.double() - offset, tolerance=1e-12, solver="newton").marginals
    distance = (found.marginals.double() - truth).norm(dim=1)
    assert (distance <= found.error).all()
    assert found.converged.all() == (offset == 0)
    assert not (found.converged & (found.error > tolerance)).any()
