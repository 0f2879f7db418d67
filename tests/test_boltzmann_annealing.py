import math

import pytest
import torch
from boltzmann_cases import N, bias, coupling, n, query

from probnets.boltzmann import mean_field
from probnets.boltzmann.annealing import _estimate, annealed_log_partition
from probnets.boltzmann.enumeration import exact


def run(model, b, **options):
    settings = {"chains": 100, "temperatures": 100, "progress": False} | options
    return annealed_log_partition(model, b, **settings)


def test_estimates_by_hand():
    # Weights 1 and 3: the mean is 2, the deviation is sqrt 2, and 16 / 10 chains are effective.
    log_w = torch.tensor([[1.0, 3.0]]).double().log() + 1000
    found = _estimate(log_w, torch.tensor([5.0]).double(), 0.9, None)
    assert found.log_partition.item() == pytest.approx(1005 + math.log(2))
    assert found.standard_error.item() == pytest.approx(0.5)
    assert found.effective.item() == pytest.approx(1.6)
    assert found.lower.item() == pytest.approx(1005)
    assert found.upper.item() == pytest.approx(1005 + math.log(3))


def test_intervals_cover_as_often_as_they_say():
    log_w = 0.5 * torch.randn(400, 200, dtype=torch.float64) - 0.125  # of mean 1
    found = _estimate(log_w, torch.zeros(400).double(), 0.8, None)
    covered = ((found.lower < 0) & (found.upper > 0)).double().mean().item()
    assert abs(covered - 0.8) < 5 * math.sqrt(0.16 / 400)
    spread = found.log_partition.std().item()
    assert found.standard_error.mean().item() == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("start", ["mean_field", "bias"])
@pytest.mark.parametrize("kind", ["free", "gram"])
@pytest.mark.parametrize("cap", ["paper", "extended"])
def test_log_partition(kind, cap, start):
    model, b = coupling(kind, cap), bias(20)
    given = query(model, 20)
    found, truth = run(model, b, **given, start=start), exact(model, b, **given)
    error = (found.log_partition - truth.log_partition).abs()
    assert (error <= 5 * found.standard_error + 1e-9).all()
    assert found.standard_error.max() < 0.05
    assert (found.lower <= found.log_partition + 1e-12).all()
    assert (found.log_partition <= found.upper + 1e-12).all()
    assert (found.effective > 80).all()


def test_one_temperature_is_importance_sampling():
    # Without any sweep, the weights are those of the base product.
    model, b = coupling(), bias(5)
    found, truth = run(model, b, temperatures=1, chains=1000), exact(model, b)
    error = (found.log_partition - truth.log_partition).abs()
    assert (error <= 5 * found.standard_error).all()
    finer = run(model, b, temperatures=100, chains=1000)
    assert (finer.standard_error < 0.5 * found.standard_error).all()


def test_closer_than_mean_field():
    model, b = coupling(), bias(10)
    truth, field = exact(model, b).log_partition, mean_field(model, b)
    error = (run(model, b).log_partition - truth).abs()
    assert error.mean() < 0.2 * (truth + field.free_energy).mean()


def test_uncapped_couplings():
    model = coupling(cap=None)
    model.weight.mul_(1.5)
    b = bias(5)
    assert torch.linalg.eigvalsh(model.dense())[-1] > 2
    found, truth = run(model, b, start="bias", temperatures=500), exact(model, b)
    error = (found.log_partition - truth.log_partition).abs()
    assert (error <= 5 * found.standard_error).all()


def test_distributions_that_are_observed():
    model, b = coupling(), bias(3)
    given = query(model, 3)
    uniform = 1 / model.groups.sizes[model.groups.index].double()
    given["values"] = 0.5 * given["values"] + 0.5 * uniform
    found, truth = run(model, b, **given), exact(model, b, **given)
    error = (found.log_partition - truth.log_partition).abs()
    assert (error <= 5 * found.standard_error + 1e-9).all()


@pytest.mark.parametrize("start", ["mean_field", "bias"])
def test_without_coupling_all_is_exact(start):
    model, b = coupling(), bias(3)
    model.weight.zero_()
    found = run(model, b, temperatures=3, chains=4, start=start)
    torch.testing.assert_close(found.log_partition, exact(model, b).log_partition)
    assert found.standard_error.max() < 1e-12
    torch.testing.assert_close(found.lower, found.upper)
    torch.testing.assert_close(found.effective, torch.full((3,), 4.0).double())


def test_all_observed():
    model, b = coupling(), bias(2)
    given = query(model, 2) | {"observed": torch.ones(n, dtype=torch.bool)}
    found = run(model, b, **given, temperatures=3, chains=4)
    torch.testing.assert_close(found.log_partition, exact(model, b, **given).log_partition)


@pytest.mark.parametrize("sizes", [[3], [1], [1, 1]])
def test_smallest_models(sizes):
    model, b = coupling(sizes=sizes), bias(2, sum(sizes))
    found = run(model, b, temperatures=2, chains=3)
    torch.testing.assert_close(found.log_partition, exact(model, b).log_partition)


def test_batch_of_zero_and_single_precision():
    model = coupling().float()
    assert run(model, torch.zeros(0, N), temperatures=2, chains=3).upper.shape == (0,)
    found, truth = run(model, torch.zeros(N)), exact(model, torch.zeros(N))
    assert found.log_partition.dtype == torch.float64
    error = (found.log_partition - truth.log_partition).abs()
    assert (error <= 5 * found.standard_error + 1e-5).all()


def test_generators_make_it_repeatable():
    model, b = coupling(), bias(1)
    first, second = (
        run(model, b, temperatures=5, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert not torch.equal(first.log_partition, run(model, b, temperatures=5).log_partition)


def test_progress(capsys):
    run(coupling(), bias(1), temperatures=2, progress=True)
    assert "annealing" in capsys.readouterr().err
    run(coupling(), bias(1), temperatures=2)
    assert not capsys.readouterr().err


def test_errors():
    model, b = coupling(), bias(1)
    with pytest.raises(
        ValueError, match="expected chains >= 2 and temperatures >= 1, got 1 and 5"
    ):
        run(model, b, chains=1, temperatures=5)
    with pytest.raises(ValueError, match="expected chains >= 2 and temperatures >= 1"):
        run(model, b, temperatures=0)
    with pytest.raises(ValueError, match="expected start 'mean_field' or 'bias', got 'cold'"):
        run(model, b, start="cold")
    with pytest.raises(ValueError, match=r"expected confidence in \(0, 1\), got 1"):
        run(model, b, confidence=1)
