r"""Tests for the probnets.backend.logspace module."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from probnets.backend import log_matmul


def definition(log_x, weights):
    return torch.logsumexp(log_x.unsqueeze(-2) + weights.log().unsqueeze(-3), dim=-1)


def test_by_hand():
    log_x = torch.tensor([[1.0, 2.0], [0.0, 4.0], [0.0, 0.0]]).log()
    y = log_matmul(log_x, torch.tensor([[1.0, 1.0], [3.0, 0.5], [2.0, 0.0]]))

    assert_close(y[:2], torch.tensor([[3.0, 4.0, 2.0], [4.0, 2.0, 0.0]]).log())
    assert y[2].tolist() == [-math.inf] * 3


@settings(max_examples=40)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    shift=st.sampled_from([0.0, 1e4, -1e4]),
    dead=st.floats(0, 1),
)
def test_matches_definition(sizes, shift, dead):
    N, K, J = sizes
    log_x = torch.randn(2, N, K, dtype=torch.float64) * 10 + shift
    log_x[torch.rand_like(log_x) < dead] = -math.inf
    weights = torch.rand(J, K, dtype=torch.float64)
    weights[torch.rand_like(weights) < dead / 2] = 0.0

    assert_close(log_matmul(log_x, weights), definition(log_x, weights))


def test_shift_moves_result():
    log_x, weights = torch.randn(4, 3).double(), torch.rand(2, 3).double()
    assert_close(log_matmul(log_x + 500, weights), log_matmul(log_x, weights) + 500)


@pytest.mark.parametrize(
    ("left", "right", "shape"),
    [
        ((5, 3), (4, 3), (5, 4)),
        ((2, 5, 3), (4, 3), (2, 5, 4)),
        ((2, 5, 3), (2, 4, 3), (2, 5, 4)),
        ((7, 1, 5, 3), (2, 4, 3), (7, 2, 5, 4)),
        ((0, 3), (4, 3), (0, 4)),
        ((5, 3), (0, 3), (5, 0)),
    ],
)
def test_shapes(left, right, shape):
    y = log_matmul(torch.randn(left), torch.rand(right))
    assert y.shape == shape


def test_no_inputs_is_minus_infinity():
    y = log_matmul(torch.zeros(2, 0), torch.zeros(3, 0))
    assert_close(y, torch.full((2, 3), -math.inf))


def test_non_contiguous():
    log_x, weights = torch.randn(3, 5).mT, torch.rand(3, 4).mT
    assert_close(log_matmul(log_x, weights), definition(log_x, weights))


def test_gradient():
    log_x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)

    assert gradcheck(log_matmul, (log_x, weights))
    assert gradgradcheck(log_matmul, (log_x, weights))


def test_dead_rows_have_zero_gradient():
    log_x = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.5], [0.0, 1.0]], requires_grad=True)
    log_matmul(log_x, weights)[:, :1].sum().backward()

    assert log_x.grad is not None
    assert weights.grad is not None
    assert log_x.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert weights.grad.tolist() == [[2.0, 0.0], [0.0, 0.0]]

    # All of the output, where every other sum is dead.
    gradients = torch.autograd.grad(log_matmul(log_x, weights).sum(), (log_x, weights))
    assert [g.isfinite().all().item() for g in gradients] == [True, True]


def test_nan_stays_visible():
    y = log_matmul(torch.tensor([[0.0, math.nan], [0.0, 0.0]]), torch.ones(1, 2))
    assert y.isnan().tolist() == [[True], [False]]


@pytest.mark.parametrize(
    ("left", "right"), [((3,), (2, 3)), ((2, 3), (3,)), ((2, 3), (3, 2)), ((), (2, 3))]
)
def test_rejects_mismatched_shapes(left, right):
    with pytest.raises(ValueError, match=r"expected log_x \(\*, N, K\) and weights \(\*, J, K\)"):
        log_matmul(torch.zeros(left), torch.ones(right))
