r"""Tests for the probnets.backend.krylov module."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from probnets.backend import conjugate_gradient, gmres, grouped_softmax, softmax_jvp

SOLVERS = {"conjugate_gradient": conjugate_gradient, "gmres": gmres}
solvers = pytest.mark.parametrize("solve", SOLVERS.values(), ids=list(SOLVERS))


def positive_definite(B, D, condition=20.0):
    Q = torch.linalg.qr(torch.randn(B, D, D, dtype=torch.float64)).Q
    spectrum = torch.logspace(0, 1, D, base=condition, dtype=torch.float64)
    return Q * spectrum @ Q.mT


def product(A):
    return lambda x: torch.einsum("bij,bj->bi", A, x)


@solvers
def test_by_hand(solve):
    # Two eigenvectors, hence two steps; one, hence one.
    A = torch.diag(torch.tensor([1.0, 4.0])).double()
    solution = solve(lambda x: x @ A, torch.tensor([[1.0, 4.0], [0.0, 2.0], [0.0, 0.0]]).double())

    assert_close(solution.value, torch.tensor([[1.0, 1.0], [0.0, 0.5], [0.0, 0.0]]).double())
    assert solution.steps.tolist() == [2, 1, 0]
    assert solution.converged.tolist() == [True] * 3


@solvers
@settings(max_examples=30)
@given(B=st.integers(1, 4), D=st.integers(1, 12), dtype=st.sampled_from(["float32", "float64"]))
def test_matches_dense_solver(solve, B, D, dtype):
    dtype = getattr(torch, dtype)
    A, b = positive_definite(B, D), torch.randn(B, D).double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    solution = solve(product(A.to(dtype)), b.to(dtype), tolerance=tolerance, max_steps=60)

    assert solution.converged.all()
    assert_close(
        solution.value.double(), torch.linalg.solve(A, b), rtol=0, atol=30 * D * tolerance
    )


@solvers
def test_residual_is_measured(solve):
    A, b = positive_definite(3, 30, condition=1e3), torch.randn(3, 30).double()
    for max_steps in (0, 1, 7, 500):
        solution = solve(product(A), b, max_steps=max_steps, tolerance=1e-8)

        left = (b - product(A)(solution.value)).norm(dim=1) / b.norm(dim=1)
        assert_close(solution.residual, left)
        assert solution.converged.tolist() == (left <= 1e-8).tolist()
        assert (solution.steps <= max_steps).all()
    assert solution.converged.all()


@pytest.mark.parametrize("memory", [1, 3, 20])
@settings(max_examples=20)
@given(B=st.integers(1, 4), D=st.integers(1, 15))
def test_gmres_of_contractions(memory, B, D):
    # I - J with |J| < 1, not symmetric: positive real, so that even one vector of memory will do.
    J = torch.randn(B, D, D).double()
    A = torch.eye(D) - 0.7 * J / torch.linalg.matrix_norm(J, 2)[:, None, None]
    b = torch.randn(B, D).double()
    solution = gmres(product(A), b, memory=memory, tolerance=1e-11, max_steps=300)

    assert solution.converged.all()
    assert_close(solution.value, torch.linalg.solve(A, b))


def test_gmres_of_rotations():
    # Neither positive nor symmetric: every step but the last leaves the residual as it is.
    A = torch.eye(6).double().roll(1, 0)
    b = torch.eye(6).double()[:1]
    solution = gmres(lambda x: x @ A.T, b, tolerance=1e-12)

    assert solution.steps.tolist() == [6]
    assert_close(solution.value, torch.linalg.solve(A, b.T).T)


def test_gmres_ends_within_dimension():
    A, b = torch.randn(5, 9, 9).double() + 3 * torch.eye(9), torch.randn(5, 9).double()
    solution = gmres(product(A), b, tolerance=1e-9)

    assert solution.converged.all()
    assert (solution.steps <= 9 + 2).all()  # and perhaps a restart to mend rounding


def test_conjugate_gradient_in_a_metric():
    # The adjoint of a mean field: not symmetric, but self-adjoint under the softmax Jacobian.
    B, D, K = 4, 12, 3
    G = torch.randn(D, D).double()
    Phi = (G + G.T) / 8
    z = grouped_softmax(torch.randn(B, D).double(), K)
    g = torch.randn(B, D).double()

    solution = conjugate_gradient(
        lambda x: x - softmax_jvp(z, x, K) @ Phi,
        g,
        metric=lambda x: softmax_jvp(z, x, K),
        tolerance=1e-12,
    )

    S = torch.stack([softmax_jvp(row, torch.eye(D).double(), K) for row in z])
    expected = torch.linalg.solve(torch.eye(D) - Phi @ S, g)
    assert solution.converged.all()
    assert_close(product(S)(solution.value), product(S)(expected))


@solvers
def test_samples_stop_separately(solve):
    condition = [1.0, 3.0, 300.0]
    A = torch.cat([positive_definite(1, 25, c) for c in condition])
    b = torch.randn(3, 25).double()
    seen = []

    def operator(x):
        seen.append(x)
        return product(A)(x)

    solution = solve(operator, b, tolerance=1e-9, max_steps=200)
    assert solution.converged.all()
    assert solution.steps[0] == 1
    assert solution.steps[0] < solution.steps[1] < solution.steps[2]
    assert len(seen) < 2 * solution.steps.max()

    for i in range(3):
        alone = solve(product(A[i : i + 1]), b[i : i + 1], tolerance=1e-9, max_steps=200)
        assert alone.steps.item() == solution.steps[i]
        assert_close(alone.value[0], solution.value[i], rtol=1e-9, atol=1e-9)


@solvers
def test_singular_operator(solve):
    # Nothing reaches the second coordinate. The samples that do not ask for it are solved.
    A = torch.diag(torch.tensor([2.0, 0.0])).double()
    b = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]).double()
    solution = solve(lambda x: x @ A, b, max_steps=50)

    assert solution.converged.tolist() == [False, False, True]
    assert solution.value.isfinite().all()
    assert_close(solution.value[2], torch.tensor([0.5, 0.0]).double())
    assert solve(lambda x: 0 * x, b).steps.tolist() == [1, 1, 1]


def test_conjugate_gradient_stops_at_negative_curvature():
    A = torch.diag(torch.tensor([1.0, -1.0])).double()
    b = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    solution = conjugate_gradient(lambda x: x @ A, b)

    assert solution.converged.tolist() == [False, True]
    assert solution.steps.tolist() == [1, 1]
    assert solution.value.tolist() == [[0.0, 0.0], [1.0, 0.0]]


@solvers
def test_nan_stays_in_its_sample(solve):
    scale = torch.tensor([[2.0], [torch.nan], [torch.inf]])
    solution = solve(lambda x: x * scale, torch.ones(3, 4))

    assert solution.converged.tolist() == [True, False, False]
    assert_close(solution.value, torch.tensor([[0.5], [0.0], [0.0]]).expand(3, 4))


@solvers
def test_stops_at_last_finite_value(solve):
    # The second direction leads out of the domain of the operator.
    def operator(x):
        return torch.where(x[:, 1:].abs() > 0, torch.nan, x + x.roll(1, 1))

    solution = solve(operator, torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    assert not solution.converged.any()
    assert solution.value.isfinite().all()
    assert solution.residual.isfinite().all()


@solvers
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (4,), (2, 3, 4)])
def test_shapes(solve, shape):
    solution = solve(lambda x: 2 * x, torch.ones(shape))

    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == shape[:1]
    assert solution.converged.all()
    assert_close(solution.value, torch.full(shape, 0.5))


@solvers
def test_non_contiguous(solve):
    b = torch.randn(3, 4).mT
    assert_close(solve(lambda x: 2 * x, b).value, b / 2)


@solvers
def test_error_sentences(solve):
    b = torch.ones(2, 3)

    with pytest.raises(ValueError, match=r"expected rhs with shape \(B, \*\), got a scalar"):
        solve(lambda x: x, torch.tensor(1.0))
    with pytest.raises(TypeError, match="expected rhs of dtype float32 or float64"):
        solve(lambda x: x, b.long())
    with pytest.raises(ValueError, match=r"expected operator to return shape \(2, 3\)"):
        solve(lambda x: x[:1], b)
    with pytest.raises(RuntimeError, match=f"{solve.__name__} did not converge for 2 of 2"):
        solve(lambda x: 0 * x, b, strict=True)


def test_more_error_sentences():
    with pytest.raises(ValueError, match="expected memory >= 1, got 0"):
        gmres(lambda x: x, torch.ones(2, 3), memory=0)
    with pytest.raises(ValueError, match="expected metric to return shape"):
        conjugate_gradient(lambda x: x, torch.ones(2, 3), metric=lambda x: x.sum())
