r"""Tests of the proximal operators of the entropy."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import wrightomega

from probnets.backend import Groups
from probnets.boltzmann.prox import _prox_torch, prox, wright_omega

GROUPS = Groups([1, 2, 5, 3])


def draw(*shape, scale=3.0):
    return scale * torch.randn(*shape, dtype=torch.float64)


def both(y, groups, alpha):
    r"""Returns what the compiled loop and PyTorch compute."""
    step = torch.as_tensor(alpha, dtype=y.dtype).expand(len(y), 1)
    return prox(y, groups, alpha), _prox_torch(y, groups, step)


def test_it_solves_a_pair_by_hand():
    # z = (3/4, 1/4) has (1 - α) z + α log z = y + ν - α with α = 1/2.
    z = torch.tensor([0.75, 0.25], dtype=torch.float64)
    y = 0.5 * z + 0.5 * z.log() + 7.0
    torch.testing.assert_close(prox(y, Groups([2]), 0.5), z, rtol=1e-14, atol=0)


def test_with_a_step_of_one_it_is_the_softmax():
    y = draw(4, 11)
    for got in both(y, GROUPS, 1.0):
        expected = torch.cat([x.softmax(-1) for x in y.split([1, 2, 5, 3], dim=1)], dim=1)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


def test_it_minimises():
    y, alpha = draw(4, scale=1.0).numpy(), 0.3

    def objective(x):
        z = np.exp(x - x.max())
        z /= z.sum()
        return 0.5 * ((z - y) ** 2).sum() + alpha * ((z * np.log(z)).sum() - 0.5 * (z**2).sum())

    x = minimize(objective, np.zeros(4), tol=1e-14, options={"gtol": 1e-9}).x
    expected = np.exp(x) / np.exp(x).sum()
    got = prox(torch.tensor(y), Groups([4]), alpha)
    np.testing.assert_allclose(got, expected, atol=1e-7)


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.125, 0.5, 0.9, 1 - 1e-9])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_it_meets_its_conditions(alpha, scale):
    groups = Groups([2, 3, 256])
    y = draw(3, 261, scale=scale)
    for z in both(y, groups, alpha):
        for part, values in zip(z.split([2, 3, 256], 1), y.split([2, 3, 256], 1), strict=True):
            torch.testing.assert_close(part.sum(1), torch.ones(3).double(), rtol=0, atol=1e-13)
            nu = (1 - alpha) * part + alpha * part.log() + alpha - values
            nu = nu[:, None].expand(-1, part.shape[1], -1)
            spread = (nu - nu.mT)[(part > 1e-300)[:, None] & (part > 1e-300)[:, :, None]]
            assert spread.abs().max() < 1e-13 * max(1.0, scale)


def test_the_loop_is_pytorch():
    y, alpha = draw(5, 11), torch.tensor([[0.001], [0.125], [0.7], [1.0], [0.3]]).double()
    compiled, plain = both(y, GROUPS, alpha)
    torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-300)
    rows = torch.cat([prox(y[[i]], GROUPS, alpha[i].item()) for i in range(5)])
    assert torch.equal(compiled, rows)


def test_it_is_firmly_nonexpansive():
    y, other = draw(64, 11), draw(64, 11)
    change = prox(y, GROUPS, 0.2) - prox(other, GROUPS, 0.2)
    assert ((change * (y - other)).sum(1) >= change.square().sum(1) * 1.2 - 1e-12).all()


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
def test_gradients(alpha):
    y = draw(2, 11, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: prox(y, GROUPS, alpha), y)
    assert torch.autograd.gradgradcheck(lambda y: prox(y, GROUPS, alpha), y)


def test_single_precision():
    y = draw(8, 11)
    for got in both(y.float(), GROUPS, 0.125):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), prox(y, GROUPS, 0.125), rtol=1e-4, atol=1e-6)


def test_shapes():
    y = draw(2, 3, 11)
    assert torch.equal(prox(y, GROUPS, 0.5)[1], prox(y[1], GROUPS, 0.5))
    assert torch.equal(prox(y[0, 0], GROUPS, 0.5), prox(y, GROUPS, 0.5)[0, 0])
    assert prox(y[:0], GROUPS, 0.5).shape == (0, 3, 11)
    strided = draw(11, 4).T
    assert torch.equal(prox(strided, GROUPS, 0.5), prox(strided.contiguous(), GROUPS, 0.5))


def test_wright_omega():
    s = np.concatenate([np.linspace(-60, 60, 5001), np.geomspace(1, 1e8, 500)])
    np.testing.assert_allclose(wright_omega(torch.tensor(s)), wrightomega(s), rtol=2e-14)
    assert wright_omega(torch.tensor(-math.inf)) == 0


def test_errors():
    y = torch.zeros(2, 11)
    with pytest.raises(ValueError, match=r"expected floats with shape \(\*, 11\), got \(2, 3\)"):
        prox(torch.zeros(2, 3), GROUPS, 0.5)
    with pytest.raises(ValueError, match=r"expected floats .* of torch.int64"):
        prox(y.long(), GROUPS, 0.5)
    for alpha in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"expected alpha in \(0, 1\], got"):
            prox(y, GROUPS, alpha)
    with pytest.raises(ValueError, match=r"expected one alpha, or alphas with shape \(2, 1\)"):
        prox(y, GROUPS, torch.ones(3, 1))
