r"""Tests for the probnets.backend.fixedpoint module."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from probnets.backend import fixed_point

solvers = pytest.mark.parametrize("solver", ["damped", "anderson"])


def residual(step, z):
    move = (step(z) - z).flatten(1).abs().amax(1)
    return move / z.flatten(1).abs().amax(1).clamp(min=1)


def linear(B, D, radius):
    r"""Returns z -> A z + b with a symmetric A of a given spectral radius, and its solution."""
    Q = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    A = Q * torch.linspace(-radius, radius, D, dtype=torch.float64) @ Q.T
    b = torch.randn(B, D, dtype=torch.float64)
    return (lambda z: z @ A.T + b), torch.linalg.solve(torch.eye(D).double() - A, b.T).T


# Values


def test_damped_by_hand():
    solution = fixed_point(lambda z: z / 2, torch.tensor([[0.8]]), tolerance=0.06, damping=0.5)

    # 0.8 -> 0.6 -> 0.45 -> 0.3375 -> ..., each 3/4 of the last, until half of it is below 0.06.
    assert_close(solution.value, torch.tensor([[0.8 * 0.75**7]]))
    assert_close(solution.residual, torch.tensor([0.4 * 0.75**7]))
    assert solution.steps.tolist() == [7]
    assert solution.converged.tolist() == [True]


def test_anderson_by_hand():
    # The secant through two iterates of an affine map of one number meets its fixed point.
    solution = fixed_point(lambda z: 3 * z - 4, torch.tensor([0.0]).double(), solver="anderson")

    assert_close(solution.value, torch.tensor([2.0]).double())
    assert solution.steps.tolist() == [2]


@solvers
def test_linear_contraction(solver):
    step, expected = linear(4, 12, 0.7)
    solution = fixed_point(
        step, torch.zeros(4, 12).double(), solver=solver, tolerance=1e-12, max_steps=200
    )

    assert solution.converged.all()
    assert_close(solution.value, expected)


def test_anderson_needs_fewer_steps():
    step, expected = linear(6, 40, 0.97)
    initial = torch.zeros(6, 40).double()
    damped = fixed_point(step, initial, tolerance=1e-8, max_steps=2000)
    anderson = fixed_point(step, initial, solver="anderson", tolerance=1e-8, max_steps=2000)

    assert damped.converged.all()
    assert anderson.converged.all()
    assert_close(anderson.value, expected, atol=1e-5, rtol=0)
    assert (3 * anderson.steps < damped.steps).all()


def test_anderson_finds_what_the_plain_iteration_cycles_around():
    step, expected = linear(3, 5, 1.5)
    solution = fixed_point(
        step, torch.zeros(3, 5).double(), solver="anderson", memory=10, damping=0.5
    )

    assert solution.converged.all()
    assert_close(solution.value, expected, atol=1e-4, rtol=0)


# Laws


@settings(max_examples=30)
@given(
    solver=st.sampled_from(["damped", "anderson"]),
    damping=st.floats(-0.2, 0.8),
    memory=st.integers(1, 8),
    max_steps=st.integers(0, 12),
    scale=st.sampled_from([0.5, 2.0, 50.0]),
)
def test_result_is_certified(solver, damping, memory, max_steps, scale):
    W, b = torch.randn(2, 5, 5).double()

    def step(z):
        return torch.tanh(scale * z @ W) * 3 + b

    solution = fixed_point(
        step,
        torch.randn(5, 5).double(),
        solver=solver,
        damping=damping,
        memory=memory,
        tolerance=1e-4,
        max_steps=max_steps,
    )

    assert_close(solution.residual, residual(step, solution.value))
    assert solution.converged.tolist() == (solution.residual <= 1e-4).tolist()
    assert (solution.steps <= max_steps).all()
    assert (solution.converged | (solution.steps == max_steps)).all()


@solvers
def test_samples_stop_separately(solver):
    rates = torch.tensor([0.0, 0.3, 0.9, 0.99]).double()[:, None]
    b = torch.randn(4, 3).double()
    initial = torch.randn(4, 3).double()
    solution = fixed_point(
        lambda z: rates * z.sin() + b, initial, solver=solver, tolerance=1e-9, max_steps=3000
    )

    assert solution.converged.all()
    assert len(set(solution.steps.tolist())) > 2

    # Each sample is solved as if it were alone.
    for i in range(4):
        alone = fixed_point(
            lambda z, i=i: rates[i] * z.sin() + b[i],
            initial[i : i + 1],
            solver=solver,
            tolerance=1e-9,
            max_steps=3000,
        )
        assert alone.steps.item() == solution.steps[i]
        assert_close(alone.value[0], solution.value[i], rtol=1e-12, atol=1e-12)


@solvers
def test_converged_samples_are_frozen(solver):
    seen = []

    def step(z):
        seen.append(z.clone())
        return torch.tensor([[0.1, 0.1, 0.1], [0.9, 0.5, -0.5]]) * z + 1

    steps = fixed_point(step, torch.zeros(2, 3), solver=solver, damping=0.3, max_steps=500).steps

    assert steps[0] < steps[1]
    for z in seen[steps[0] :]:
        assert torch.equal(z[0], seen[steps[0]][0])


@solvers
def test_solution_takes_no_step(solver):
    calls = []

    def step(z):
        calls.append(z)
        return z.clone()

    initial = torch.randn(3, 2)
    solution = fixed_point(step, initial, solver=solver)

    assert len(calls) == 1
    assert solution.steps.tolist() == [0, 0, 0]
    assert_close(solution.value, initial)
    assert solution.value.data_ptr() != initial.data_ptr()


# Failure


@solvers
def test_reports_what_did_not_converge(solver):
    # The first sample rotates for ever around nothing, the second converges.
    shift = torch.tensor([[1.0], [0.0]])
    solution = fixed_point(
        lambda z: z + shift * (1 + z.sin() ** 2), torch.zeros(2, 1), solver=solver, max_steps=30
    )

    assert solution.converged.tolist() == [False, True]
    assert solution.steps.tolist() == [30, 0]
    assert solution.residual[0] > 1e-2


@solvers
def test_strict_raises(solver):
    sentence = "fixed_point did not converge for 2 of 3 samples.*after 4 steps; raise max_steps"
    with pytest.raises(RuntimeError, match=sentence):
        fixed_point(
            lambda z: z + torch.tensor([1.0, 0.0, 1.0]),
            torch.zeros(3),
            solver=solver,
            max_steps=4,
            strict=True,
        )


@solvers
@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_stops_at_last_finite_value(solver, special):
    solution = fixed_point(
        lambda z: torch.where(z > 3, special, z + 1.0), torch.zeros(2, 2), solver=solver
    )

    assert not solution.converged.any()
    assert solution.value.isfinite().all()
    assert solution.residual.isfinite().all()
    assert (solution.steps < 20).all()


def test_initial_outside_of_the_domain():
    initial = torch.tensor([-1.0, 4.0])
    solution = fixed_point(torch.sqrt, initial, tolerance=1e-3)

    assert solution.converged.tolist() == [False, True]
    assert solution.residual[0] == math.inf
    assert_close(solution.value, torch.tensor([-1.0, 1.0]), atol=2e-3, rtol=0)


def test_safeguard_rejects_worse_combinations():
    # A slope that looks flat from afar: the secant overshoots.
    visited = []

    def step(z):
        visited.append(z.item())
        return z - 0.5 * (z - 2).tanh() - 0.02 * (z - 2)

    solution = fixed_point(
        step, torch.tensor([6.0]).double(), solver="anderson", tolerance=1e-10, max_steps=99
    )
    assert solution.converged.all()
    assert_close(solution.value, torch.tensor([2.0]).double())

    sizes = [abs(step(torch.tensor([z])).item() - z) for z in visited[: solution.steps + 1]]
    assert max(sizes) > sizes[0]  # a combination was worse than the start

    # From the iterate before it, a damped step was taken instead.
    worst = sizes.index(max(sizes))
    before = visited[worst - 1]
    assert_close(visited[worst + 1], step(torch.tensor(before).double()).item())


# Edges


@solvers
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (4,), (2, 1), (2, 3, 4)])
def test_shapes(solver, shape):
    seen = set()

    def step(z):
        seen.add(z.shape)
        return z / 2 + 1

    solution = fixed_point(step, torch.zeros(shape), solver=solver)

    assert seen == {shape}
    assert solution.value.shape == shape
    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == shape[:1]
    assert solution.converged.all()
    assert_close(solution.value, torch.full(shape, 2.0), atol=1e-4, rtol=0)


@solvers
def test_initial_is_left_alone(solver):
    initial = torch.randn(3, 4).mT.requires_grad_()
    before = initial.detach().clone()
    solution = fixed_point(torch.cos, initial, solver=solver)

    assert_close(initial.detach(), before)
    assert not solution.value.requires_grad


def test_error_sentences():
    z = torch.zeros(2, 3)

    with pytest.raises(ValueError, match=r"expected initial with shape \(B, \*\), got a scalar"):
        fixed_point(torch.cos, torch.tensor(0.0))
    with pytest.raises(TypeError, match="expected initial of dtype float32 or float64"):
        fixed_point(torch.cos, z.half())
    with pytest.raises(ValueError, match="expected solver 'damped' or 'anderson', got 'newton'"):
        fixed_point(torch.cos, z, solver="newton")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"expected damping in \(-1, 1\), got 1.0; 0 is"):
        fixed_point(torch.cos, z, damping=1.0)
    with pytest.raises(ValueError, match="expected memory >= 1, got 0; for none"):
        fixed_point(torch.cos, z, solver="anderson", memory=0)
    with pytest.raises(ValueError, match="expected tolerance > 0, got 0"):
        fixed_point(torch.cos, z, tolerance=0.0)
    with pytest.raises(ValueError, match="expected max_steps >= 0, got -1"):
        fixed_point(torch.cos, z, max_steps=-1)
    with pytest.raises(ValueError, match=r"expected step to return shape \(2, 3\).*got \(2,\)"):
        fixed_point(lambda z: z.sum(1), z)
    with pytest.raises(ValueError, match=r"and torch.float32, got \(2, 3\) and torch.float64"):
        fixed_point(lambda z: z.double(), z)
