import math

import pytest
import torch
from boltzmann_cases import SIZES, N, bias, coupling, n, query

from probnets.backend import Groups
from probnets.boltzmann import FreeCoupling, prepare
from probnets.boltzmann.enumeration import enumerate_states, exact
from probnets.boltzmann.gibbs import GibbsSampler, _draw_kernel, _draw_torch, draw


def run(model, b, **options):
    settings = {"chains": 200, "sweeps": 200, "burn_in": 50, "progress": False} | options
    return GibbsSampler(model).sample(b, **settings)


def agrees(found, truth):
    error = (found.marginals - truth.marginals).abs()
    return bool((error <= 5 * found.standard_error + 1e-12).all())


# The augmentation


def test_weights_of_two_spins():
    # The tangent space has an even mode of eigenvalue 2 J and an odd one of -2 J, which is zero
    # once 2 J is added: one auxiliary variable with W = sqrt(4 J) (1, -1, 1, -1) / 2.
    J = 0.25
    model = FreeCoupling([2, 2], cap=None, dtype=torch.float64).requires_grad_(requires_grad=False)
    block = torch.tensor([[J, -J], [-J, J]], dtype=torch.float64)
    model.weight.zero_()
    model.weight[:2, 2:], model.weight[2:, :2] = block, block
    sampler = GibbsSampler(model)
    assert sampler.shift == pytest.approx(2 * J)
    expected = torch.tensor([[1, -1, 1, -1]]).double() * math.sqrt(J)
    torch.testing.assert_close(sampler.weight * sampler.weight[0, 0].sign(), expected)


@pytest.mark.parametrize("kind", ["free", "gram"])
@pytest.mark.parametrize("cap", ["paper", "extended"])
def test_energies_of_all_configurations(kind, cap):
    model = coupling(kind, cap)
    sampler, Phi = GibbsSampler(model), model.dense()
    given = query(model, 5)
    problem, _ = prepare(model, bias(5), **given)
    slope, constant = sampler.linearise(problem)
    assert problem.hidden is not None
    for row in range(5):
        x = enumerate_states(SIZES, dtype=torch.float64) * problem.hidden[row]
        expected = 0.5 * ((x @ Phi) * x).sum(1)
        found = 0.5 * (x @ sampler.weight.T).square().sum(1) + x @ slope[row] + constant[row]
        torch.testing.assert_close(found, expected)


def test_weights_hold_no_constants():
    # Features of the paper's cap are not centred; the augmentation does not pay for that.
    model = coupling("gram", "paper")
    model.weight.add_(3.0)
    sampler = GibbsSampler(model)
    groups = torch.nn.functional.one_hot(model.groups.index).double()
    torch.testing.assert_close(
        sampler.weight @ groups, torch.zeros(len(sampler.weight), n).double()
    )
    assert len(sampler.weight) <= N - n
    assert sampler.shift < -torch.linalg.eigvalsh(model.dense())[0].item() / 2


# Draws


@pytest.mark.parametrize("sizes", [[2, 3, 1, 4], [3, 3, 3], [1, 1]])
def test_draws_of_the_loop_and_of_torch(sizes):
    groups = Groups(sizes)
    p = torch.cat([torch.rand(500, k).double().softmax(1) for k in sizes], dim=1)
    p[:, 0] = 0.0 if sizes[0] > 1 else 1.0
    found = draw(p, groups, generator=torch.Generator().manual_seed(3))
    uniform = torch.empty(500, len(sizes)).double()
    uniform.uniform_(generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, _draw_torch(p, uniform, groups))
    total = torch.stack([part.sum(1) for part in found.split(sizes, dim=1)])
    assert (total == 1).all()
    assert not (found * (p == 0)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_draws_at_the_edges(dtype, edge):
    groups = Groups([4, 2])
    p = torch.tensor([[0.0, 0.3, 0.7 + 1e-7, 0.0, 1.0, 0.0]], dtype=dtype)
    uniform, looped = torch.full((1, 2), edge, dtype=dtype), torch.zeros_like(p)
    _draw_kernel()(p.numpy(), uniform.numpy(), groups.sizes.numpy(), looped.numpy())
    expected = [0, 1, 0, 0, 1, 0] if edge == 0 else [0, 0, 1, 0, 1, 0]
    assert looped.tolist() == [expected]
    assert _draw_torch(p, uniform, groups).tolist() == [expected]


def test_frequencies_of_draws():
    p = torch.tensor([0.2, 0.8, 0.1, 0.3, 0.6]).double()
    mean = draw(p.expand(20, 2000, 5), Groups([2, 3])).mean(dim=(0, 1))
    assert ((mean - p).abs() < 5 * (p * (1 - p) / 40000).sqrt()).all()


# Marginals


@pytest.mark.parametrize("kind", ["free", "gram"])
@pytest.mark.parametrize("cap", ["paper", "extended"])
def test_marginals(kind, cap):
    model, b = coupling(kind, cap), bias(3)
    given = query(model, 3)
    found, truth = run(model, b, **given), exact(model, b, **given)
    assert agrees(found, truth)
    assert found.standard_error.max() < 0.01
    assert (found.r_hat < 1.05).all()
    seen = given["observed"][:, model.groups.index]
    assert torch.equal(found.marginals[seen], given["values"][seen])
    assert not found.standard_error[seen].any()


def test_last_states_are_samples():
    model, b = coupling(), bias(2)
    given = query(model, 2)
    found, truth = run(model, b, **given, chains=3000, sweeps=30), exact(model, b, **given)
    x = found.samples
    total = torch.stack([part.sum(2) for part in x.split(SIZES, dim=2)])
    assert (total == 1).all()
    error = (x.mean(dim=1) - truth.marginals).abs()
    assert (error <= 5 * x.std(dim=1) / 3000**0.5 + 1e-12).all()
    pairs = torch.einsum("bci,bcj->bij", x, x) / 3000
    expected = truth.covariance + truth.marginals[:, :, None] * truth.marginals[:, None]
    assert (pairs - expected).abs().max() < 5 * 0.5 / 3000**0.5


def test_sweeps_of_weaker_couplings():
    # Part of the coupling is sampled as annealing does, with biases to match.
    model, b, beta = coupling("gram"), bias(1), 0.4
    model.weight.mul_(3)
    sampler, weak = GibbsSampler(model), FreeCoupling(SIZES, cap=None).double()
    weak.requires_grad_(requires_grad=False)
    weak.weight.copy_(beta * coupling_centred(model))
    problem, _ = prepare(model, b)
    logits = (b + beta * sampler.linearise(problem)[0])[:, None]
    x = draw(torch.ones(1, 4000, N).double(), model.groups)
    for _ in range(20):
        x, _ = sampler.sweep(x @ sampler.weight.T, logits, strength=beta)
    truth = exact(weak, logits[:, 0])
    assert ((x.mean(1) - truth.marginals).abs() <= 5 * x.std(1) / 4000**0.5 + 1e-12).all()


def coupling_centred(model):
    own = model.groups.index[:, None] == model.groups.index
    P = torch.eye(N).double() - own / model.groups.sizes[model.groups.index].double()
    return P @ model.dense() @ P


def test_without_coupling_all_is_exact():
    model, b = coupling(), bias(2)
    model.weight.zero_()
    found = run(model, b, chains=2, sweeps=4, burn_in=0)
    torch.testing.assert_close(found.marginals, exact(model, b).marginals)
    assert found.standard_error.max() < 1e-12
    assert GibbsSampler(model).weight.shape == (0, N)


def test_chains_that_do_not_mix_are_told():
    # Two wells that no chain leaves: an uncapped coupling of bits that want to be equal.
    model = FreeCoupling([2] * 6, cap=None, dtype=torch.float64).requires_grad_(
        requires_grad=False
    )
    model.weight.copy_(torch.eye(2).double().repeat(6, 6) * 8)
    found = run(model, torch.zeros(12).double(), chains=20, sweeps=50)
    assert (found.r_hat > 2).all()
    assert (found.standard_error > 0.05).all()


def test_all_observed():
    model, b = coupling(), bias(2)
    given = query(model, 2) | {"observed": torch.ones(n, dtype=torch.bool)}
    found = run(model, b, **given, chains=2, sweeps=4)
    assert torch.equal(found.marginals, given["values"])
    assert torch.equal(found.samples, given["values"][:, None].expand(2, 2, N))
    assert torch.equal(found.r_hat, torch.ones(2, N).double())


@pytest.mark.parametrize("sizes", [[3], [1], [1, 1]])
def test_smallest_models(sizes):
    model, b = coupling(sizes=sizes), bias(2, sum(sizes))
    found = run(model, b, chains=2, sweeps=4)
    torch.testing.assert_close(found.marginals, exact(model, b).marginals)


def test_batch_of_zero_and_single_precision():
    model = coupling().float()
    found = run(model, torch.zeros(0, N), chains=3, sweeps=5)
    assert found.marginals.shape == (0, N)
    assert found.samples.shape == (0, 3, N)
    found = run(model, torch.zeros(N), chains=3, sweeps=5)
    assert {tensor.dtype for tensor in found} == {torch.float32}


def test_generators_make_it_repeatable():
    model, b = coupling(), bias(1)
    first, second = (
        run(model, b, chains=5, sweeps=5, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert torch.equal(first.marginals, second.marginals)
    assert not torch.equal(first.marginals, run(model, b, chains=5, sweeps=5).marginals)


def test_progress(capsys):
    run(coupling(), bias(1), chains=2, sweeps=4, progress=True)
    assert "Gibbs" in capsys.readouterr().err
    run(coupling(), bias(1), chains=2, sweeps=4)
    assert not capsys.readouterr().err


def test_errors(monkeypatch):
    model = coupling()
    for wrong in ({"chains": 1}, {"sweeps": 3}, {"burn_in": -1}):
        with pytest.raises(ValueError, match="expected chains >= 2, sweeps >= 4 and burn_in >= 0"):
            run(model, bias(1), **wrong)
    monkeypatch.setattr("probnets.boltzmann.gibbs._LARGEST", 12)
    with pytest.raises(ValueError, match="at most 12 states, whose matrix is decomposed, got 13"):
        GibbsSampler(model)


def test_changed_weights_are_decomposed_again():
    model = coupling()
    sampler = GibbsSampler(model)
    with torch.no_grad():
        model.weight.mul_(-0.5)
    b = torch.zeros(1, model.states).double()
    fresh, kept = (
        s.sample(b, chains=5, sweeps=5, generator=torch.Generator().manual_seed(0), progress=False)
        for s in (GibbsSampler(model), sampler)
    )
    torch.testing.assert_close(kept.marginals, fresh.marginals)
