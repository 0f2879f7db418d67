r"""Tests for the probnets.backend.implicit module."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from probnets.backend import (
    Solution,
    conjugate_gradient,
    fixed_point,
    gmres,
    grouped_softmax,
    implicit_fixed_point,
    project_tangent,
    softmax_jvp,
)

exact = partial(fixed_point, solver="anderson", tolerance=1e-13, max_steps=500)
search = partial(
    implicit_fixed_point,
    solve=exact,
    solve_adjoint=partial(gmres, tolerance=1e-13, max_steps=500),
    strict=True,
)


def contraction(D, radius=0.6):
    A = torch.randn(D, D, dtype=torch.float64)
    return radius * A / torch.linalg.matrix_norm(A, 2)


def symmetric(D, radius):
    A = torch.randn(D, D, dtype=torch.float64)
    A = A + A.T
    return radius * A / torch.linalg.matrix_norm(A, 2)


def test_by_hand():
    # z = a z + b, hence z = b / (1 - a), dz/da = z / (1 - a) and dz/db = 1 / (1 - a).
    a = torch.tensor([0.5, 0.75], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    z = search(lambda z: a * z + b, torch.zeros(2, dtype=torch.float64)).value
    da, db = torch.autograd.grad(z.sum(), (a, b))

    assert_close(z, torch.tensor([2.0, 8.0], dtype=torch.float64))
    assert_close(da, torch.tensor([4.0, 32.0], dtype=torch.float64))
    assert_close(db, torch.tensor([2.0, 4.0], dtype=torch.float64))


def test_linear_map_against_dense_solver():
    A = contraction(6).requires_grad_()
    b = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 6, dtype=torch.float64)

    z = search(lambda z: z @ A.T + b, torch.zeros(3, 6, dtype=torch.float64)).value
    expected = torch.linalg.solve(torch.eye(6) - A, b.T).T

    assert_close(z, expected)
    for ours, theirs in zip(
        torch.autograd.grad(z, (A, b), g), torch.autograd.grad(expected, (A, b), g), strict=True
    ):
        assert_close(ours, theirs)


def test_matches_unrolled_iteration():
    W, b = contraction(5).requires_grad_(), torch.randn(4, 5).double().requires_grad_()

    def step(z):
        return torch.tanh(z @ W.T + b)

    z = torch.zeros(4, 5).double()
    solution = search(step, z)
    for _ in range(100):
        z = step(z)

    assert_close(solution.value, z)
    for ours, theirs in zip(
        torch.autograd.grad(solution.value.square().sum(), (W, b)),
        torch.autograd.grad(z.square().sum(), (W, b)),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_gradcheck():
    W, b = contraction(4).requires_grad_(), torch.randn(2, 2, 2).double().requires_grad_()

    def solve(W, b):
        def step(z):
            return torch.tanh(z.flatten(1) @ W.T).view_as(z) + b

        return search(step, torch.zeros_like(b)).value

    assert gradcheck(solve, (W, b))


def test_gradcheck_symmetric():
    # Gradient steps towards the minimum of log cosh(z) + z' H z / 2 - b' z.
    G, b = symmetric(4, 0.5).requires_grad_(), torch.randn(3, 4).double().requires_grad_()

    def solve(G, b):
        H = (G + G.T) / 2 + torch.eye(4)
        step = lambda z: z - 0.4 * (z.tanh() + z @ H - b)  # noqa: E731
        adjoint = partial(conjugate_gradient, tolerance=1e-13)
        return search(step, torch.zeros_like(b), solve_adjoint=adjoint).value

    assert gradcheck(solve, (G, b))


def mean_field(Phi, b, groups, adjoint):
    def step(z):
        return grouped_softmax(z @ (Phi + Phi.T) / 2 + b, groups)

    solution = exact(step, grouped_softmax(b.detach(), groups))
    return search(
        step,
        b,
        solve=lambda step, initial: solution,
        solve_adjoint=adjoint(solution.value, groups),
    ).value


def by_gmres(z, groups):
    return partial(gmres, tolerance=1e-13)


def by_conjugate_gradient(z, groups):
    # J' = Phi S is not symmetric, but I - J' is self-adjoint in the inner product of S. What S
    # cannot see is projected away.
    def solve(operator, rhs):
        return conjugate_gradient(
            lambda v: project_tangent(operator(v), groups),
            project_tangent(rhs, groups),
            metric=lambda v: softmax_jvp(z, v, groups),
            tolerance=1e-12,
        )

    return solve


@pytest.mark.parametrize("groups", [3, torch.tensor([4, 2])])
@pytest.mark.parametrize("adjoint", [by_gmres, by_conjugate_gradient])
def test_gradcheck_mean_field(groups, adjoint):
    Phi = symmetric(6, 1.5).requires_grad_()
    b = torch.randn(2, 6).double().requires_grad_()

    assert gradcheck(partial(mean_field, groups=groups, adjoint=adjoint), (Phi, b))


def test_adjoint_where_the_plain_iteration_diverges():
    # Eigenvalues of J down to -5: w = J' w + g is no way to solve the adjoint.
    A = torch.diag(torch.linspace(-5, 0.5, 8)).double()
    b = torch.randn(2, 8).double().requires_grad_()
    solve = partial(fixed_point, damping=0.8, tolerance=1e-13, max_steps=1000)
    z = search(lambda z: z @ A + b, torch.zeros(2, 8).double(), solve=solve).value

    assert_close(torch.autograd.grad(z.sum(), b)[0], (1 / (1 - A.diagonal())).expand(2, 8))


def test_reaches_the_parameters_of_a_module():
    layer = nn.Linear(3, 3).double()
    with torch.no_grad():
        layer.weight.mul_(0.3)
    x = torch.randn(5, 3).double().requires_grad_()
    search(lambda z: layer(z.tanh()) + x, torch.zeros(5, 3).double()).value.sum().backward()

    for tensor in (layer.weight, layer.bias, x):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_memory_does_not_grow_with_steps():
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    counts = []
    for tolerance in (1e-1, 1e-4, 1e-12):
        saved.clear()
        a = torch.full((4, 9), 0.9).double().requires_grad_()
        solve = partial(fixed_point, tolerance=tolerance, max_steps=1000)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            search(lambda z, a=a: (a * z).sin() + 1, torch.zeros(4, 9).double(), solve=solve)
        counts.append(sum(saved))

    assert counts[0] == counts[1] == counts[2] > 0


def test_custom_solver():
    def bisection(step, initial):
        low, high = torch.zeros_like(initial), torch.full_like(initial, 2.0)
        for _ in range(60):
            middle = (low + high) / 2
            above = step(middle) < middle
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        done = torch.ones(len(initial), dtype=torch.bool)
        return Solution(low, (step(low) - low).abs(), done.long() * 60, done)

    a = torch.tensor([0.5, 1.0]).double().requires_grad_()
    z = search(lambda z: (a * z).cos(), torch.ones(2).double(), solve=bisection).value

    assert gradcheck(
        lambda a: search(lambda z: (a * z).cos(), torch.ones(2).double(), solve=bisection).value, a
    )
    assert_close(z, (a * z).cos())


def test_residual_belongs_to_value():
    b = torch.ones(3, 2).double().requires_grad_()
    solution = implicit_fixed_point(
        lambda z: z / 2 + b, torch.zeros(3, 2).double(), solve=partial(fixed_point, tolerance=0.1)
    )
    expected = (1 - solution.value / 2).amax(1) / solution.value.amax(1)

    assert_close(solution.residual, expected)


# Edges


def test_without_gradient():
    a = torch.tensor([0.5], requires_grad=True)
    calls = []

    def step(z):
        calls.append(torch.is_grad_enabled())
        return a * z

    with torch.no_grad():
        assert not implicit_fixed_point(step, torch.ones(1)).value.requires_grad
    assert not any(calls)
    assert not implicit_fixed_point(lambda z: 0.5 * z, torch.ones(1)).value.requires_grad


def test_initial_gets_no_gradient():
    initial = torch.zeros(2, requires_grad=True)
    b = torch.ones(2, requires_grad=True)
    z = implicit_fixed_point(lambda z: z / 2 + b, initial).value

    assert torch.autograd.grad(z.sum(), initial, allow_unused=True) == (None,)


def test_map_that_ignores_its_argument():
    b = torch.ones(2, 3, requires_grad=True)
    z = implicit_fixed_point(lambda z: 2 * b, torch.zeros(2, 3)).value
    (gradient,) = torch.autograd.grad(z.sum(), b)

    assert_close(gradient, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (3,), (2, 2, 2)])
def test_shapes(shape):
    b = torch.ones(shape, requires_grad=True)
    solution = implicit_fixed_point(lambda z: z / 2 + b, torch.zeros(shape))
    (gradient,) = torch.autograd.grad(solution.value.sum(), b)

    assert_close(gradient, torch.full(shape, 2.0))
    assert solution.steps.shape == shape[:1]


def test_no_second_derivative():
    b = torch.ones(2, requires_grad=True)
    z = implicit_fixed_point(lambda z: (z + b).sin(), torch.zeros(2)).value
    (gradient,) = torch.autograd.grad(z.sum(), b, create_graph=True)
    (again,) = torch.autograd.grad(z.sum(), b, create_graph=True)

    with pytest.raises(RuntimeError, match="expected to differentiate the fixed point once"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="expected to differentiate the fixed point once"):
        torch.autograd.grad(again.sum(), b)


def test_backward_twice_with_retained_graph():
    b = torch.ones(2, requires_grad=True)
    z = implicit_fixed_point(lambda z: (z + b).sin() / 2, torch.zeros(2)).value
    (first,) = torch.autograd.grad(z.sum(), b, retain_graph=True)
    (second,) = torch.autograd.grad(z.sum(), b)

    assert_close(first, second)


# Failure


def test_warns_of_an_adjoint_that_did_not_converge():
    A = contraction(20, 0.95).float()
    b = torch.ones(1, 20, requires_grad=True)
    short = partial(
        implicit_fixed_point,
        lambda z: z @ A + b,
        torch.zeros(1, 20),
        solve=partial(fixed_point, max_steps=500),
        solve_adjoint=partial(gmres, max_steps=2),
    )
    sentence = "the backward pass did not converge for 1 of 1 samples"

    z = short().value
    with pytest.warns(RuntimeWarning, match=sentence):
        z.sum().backward()

    z = short(strict=True).value
    with pytest.raises(RuntimeError, match=sentence):
        z.sum().backward()


def test_strict_search():
    with pytest.raises(RuntimeError, match="solve did not converge for 1 of 1 samples"):
        implicit_fixed_point(lambda z: z + 1, torch.zeros(1), strict=True)


def test_rejects_other_shapes():
    with pytest.raises(ValueError, match=r"expected step to return shape \(2, 1\)"):
        implicit_fixed_point(lambda z: z[0], torch.zeros(2, 1))
