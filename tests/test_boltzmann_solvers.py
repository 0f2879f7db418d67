r"""Tests of the solvers of mean-field problems."""

from typing import Any

import pytest
import torch

from probnets.boltzmann import Coupling, FreeCoupling, GramCoupling, mean_field, prepare
from probnets.boltzmann.acceleration import Anderson, Fista
from probnets.boltzmann.ascent import CoordinateAscent
from probnets.boltzmann.meanfield import SOLVERS, SolverName
from probnets.boltzmann.newton import Newton, solve_linear
from probnets.boltzmann.solvers import LogitDamping, Parallel
from probnets.boltzmann.splitting import ForwardBackward

SIZES = [2, 3, 5, 2, 4, 1, 3]
SAFE: list[SolverName] = [name for name in SOLVERS if name != "parallel"]
CLASSES = [Anderson, CoordinateAscent, Fista, ForwardBackward, LogitDamping, Newton]


def coupling(cap, features=6, scale=3.0, sizes=SIZES):
    made = GramCoupling(sizes, features, cap=cap, dtype=torch.float64)
    made.weight.data.mul_(scale)
    return made


def query(made, batch=5) -> tuple[torch.Tensor, dict[str, Any]]:
    r"""Returns biases, and what is observed, which differs from sample to sample."""
    bias = torch.randn(batch, made.states, dtype=torch.float64)
    observed = torch.rand(batch, made.variables) < 0.4
    values = torch.zeros_like(bias)
    values[:, made.groups.starts] = 1.0
    return bias, {"observed": observed, "values": values}


def pairs(strength, n, dtype=torch.float64):
    r"""Couples all pairs of n two-state variables, with the largest eigenvalue strength."""
    made = FreeCoupling([2] * n, cap=None, dtype=dtype)
    block = torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=dtype)
    pattern = torch.ones(n, n, dtype=dtype) - torch.eye(n, dtype=dtype)
    largest = n - 1 if strength > 0 else 1
    made.weight.data = torch.kron(pattern, block) * strength / largest
    return made


class Chain(Coupling):
    r"""Couples neighbours, so that two colours do."""

    def __init__(self, made):
        super().__init__(made.groups, limit=made.limit)
        near = made.groups.index[:, None] - made.groups.index
        self.weight = torch.nn.Parameter(made.dense().detach() * (near.abs() == 1))

    def forward(self, q):
        return q @ self.weight

    def colours(self):
        return torch.arange(self.variables) % 2


@pytest.mark.parametrize("name", SOLVERS)
def test_a_pair_by_hand(name):
    # q = (1 + tanh(m / 2)) / 2 with m = J tanh(m / 2) + h for two alike variables.
    made = pairs(0.8, 2)
    bias = torch.tensor([[0.15, -0.15] * 2], dtype=torch.float64)
    found = mean_field(made, bias, solver=name, tolerance=1e-12).marginals
    m = torch.tensor(0.3, dtype=torch.float64)
    for _ in range(200):
        m = 0.8 * (m / 2).tanh() + 0.3
    expected = torch.stack([m.sigmoid(), 1 - m.sigmoid()]).repeat(2)[None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cap", ["paper", "extended"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, [3] * 6])
def test_all_solvers_agree(cap, masked, sizes):
    made = coupling(cap, sizes=sizes)
    bias, known = query(made)
    known = known if masked else {}
    exact = mean_field(made, bias, solver="newton", tolerance=1e-12, **known)
    for name in SAFE:
        found = mean_field(made, bias, solver=name, tolerance=1e-10, max_steps=3000, **known)
        assert found.converged.all(), name
        torch.testing.assert_close(found.marginals, exact.marginals, rtol=0, atol=1e-8, msg=name)
    q, logits = exact.marginals, exact.logits
    fixed = torch.cat([x.softmax(1) for x in logits.split(made.groups.sizes.tolist(), 1)], 1)
    hidden = torch.ones_like(q).bool()
    if masked:
        hidden = ~known["observed"][:, made.groups.index]
    torch.testing.assert_close(q[hidden], fixed[hidden], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SAFE)
def test_rows_are_independent(name):
    made = coupling("extended")
    bias, known = query(made)
    whole = mean_field(made, bias, solver=name, tolerance=1e-6, **known)
    for i in range(len(bias)):
        row = {key: value[[i]] for key, value in known.items()}
        alone = mean_field(made, bias[[i]], solver=name, tolerance=1e-6, **row)
        assert alone.steps.item() == whole.steps[i].item()
        torch.testing.assert_close(alone.marginals[0], whole.marginals[i], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in SAFE if name != "newton"])
def test_a_step_needs_one_product(name):
    made = coupling("extended")
    found = mean_field(made, query(made)[0], solver=name, max_steps=7, tolerance=1e-15)
    assert found.products == 1 + 7


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("cap", ["paper", "extended"])
def test_the_free_energy_never_rises(name, cap):
    made = coupling(cap)
    bias, known = query(made, 20)
    with torch.no_grad():
        problem, _ = prepare(made, bias, **known)
        solver = SOLVERS[name]()
        state = solver.start(problem, 3 * torch.randn_like(bias))
        energy = problem.free_energy(state.theta, state.q, state.phi)
        first = energy
        for _ in range(40):
            state = solver.step(problem, state)
            new = problem.free_energy(state.theta, state.q, state.phi)
            assert (new <= energy + 1e-11).all()
            energy = new
    free = known["observed"].logical_not().any(1)
    assert (energy[free] < first[free] - 1e-3).all()


@pytest.mark.parametrize("name", SAFE)
def test_one_solution_from_all_starts_below_two(name):
    made = pairs(1.9, 4)
    bias = torch.zeros(50, 8, dtype=torch.float64)
    bias[:, 0] = 0.01
    start = 4 * torch.randn_like(bias)
    found = mean_field(made, bias, solver=name, initial=start, tolerance=1e-10, max_steps=5000)
    assert found.converged.all()
    assert found.error.isinf().all()  # nothing is certified without a cap
    assert (found.residual <= 1e-10).all()
    assert (found.marginals - found.marginals[0]).abs().max() < 1e-8


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("n", [2, 6])
def test_two_solutions_above_two(name, n):
    made = pairs(2.05, n)
    start = 4 * torch.randn(50, 1, dtype=torch.float64).sign()
    start = start * torch.tensor([1.0, -1.0] * n, dtype=torch.float64)
    bias = torch.zeros(50, 2 * n, dtype=torch.float64)
    found = mean_field(made, bias, solver=name, initial=start, tolerance=1e-10, max_steps=5000)
    assert found.converged.all()
    ones = found.marginals[:, 0].round(decimals=7).unique()
    assert len(ones) == 2
    assert ones[0] < 0.5 < ones[1]
    assert ones.sum().item() == pytest.approx(1, abs=1e-6)


def test_the_plain_iteration_swings_where_the_others_converge():
    made = pairs(-0.9, 12)  # its smallest eigenvalue is -9.9
    assert made.spectrum().smallest == pytest.approx(-9.9, rel=1e-6)
    bias = 0.1 * torch.randn(3, 24, dtype=torch.float64)
    failed = mean_field(made, bias, solver="parallel", max_steps=500)
    assert not failed.converged.any()
    with torch.no_grad():
        problem, _ = prepare(made, bias)
        state = Parallel().start(problem, failed.logits)
        after = Parallel().step(problem, state)
        again = Parallel().step(problem, after)
    assert (after.q - state.q).abs().max() > 0.5
    torch.testing.assert_close(again.q, state.q, rtol=0, atol=1e-9)
    for name in SAFE:
        assert mean_field(made, bias, solver=name, max_steps=500).converged.all(), name


def test_colours_stand_in_for_a_sweep():
    made = Chain(coupling("paper"))
    bias, known = query(made)
    found = mean_field(made, bias, solver="coordinate", tolerance=1e-11, **known)
    expected = mean_field(made, bias, solver="newton", tolerance=1e-11, **known)
    torch.testing.assert_close(found.marginals, expected.marginals, rtol=0, atol=1e-9)
    assert found.products == 1 + 2 * found.steps.max()


def test_sweeps_recover_from_wrong_products():
    made = coupling("extended").float()
    bias = query(made)[0].float()
    with torch.no_grad():
        problem, _ = prepare(made, bias)
        state = CoordinateAscent().start(problem, bias)
        state = state._replace(phi=state.phi + 0.1)
        for _ in range(40):
            state = CoordinateAscent().step(problem, state)
        torch.testing.assert_close(state.phi, problem.couple(state.q), rtol=0, atol=3e-6)


def test_the_splitting_of_the_paper():
    made = coupling("paper")
    bias, _ = query(made)
    slow = mean_field(made, bias, solver=ForwardBackward(0.125), tolerance=1e-8)
    fast = mean_field(made, bias, solver=ForwardBackward(), tolerance=1e-8)
    largest, smallest = made.spectrum()
    with torch.no_grad():
        problem, _ = prepare(made, bias)
        rate = ForwardBackward().start(problem, bias).memory["rate"]
    expected = torch.full_like(rate, 2 / ((1 - smallest) + (1 - largest)))
    torch.testing.assert_close(rate, expected.clamp(max=1.0))
    assert rate.max() < 1
    assert slow.converged.all()
    assert fast.products < slow.products
    torch.testing.assert_close(slow.marginals, fast.marginals, rtol=0, atol=1e-7)


def test_forward_backward_with_a_step_of_one_is_the_plain_iteration():
    made = coupling("paper", scale=0.5)
    bias, known = query(made)
    plain = mean_field(made, bias, solver="parallel", tolerance=1e-8, **known)
    found = mean_field(made, bias, solver=ForwardBackward(1.0), tolerance=1e-8, **known)
    assert torch.equal(found.steps, plain.steps)
    torch.testing.assert_close(found.marginals, plain.marginals, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", CLASSES)
def test_a_wrong_spectrum_does_no_harm(make):
    made = pairs(-0.9, 12)
    made.smallest_eigenvalue = lambda **settings: -0.01
    bias = torch.randn(3, 24, dtype=torch.float64)
    found = mean_field(made, bias, solver=make(), tolerance=1e-8, max_steps=2000)
    assert found.converged.all()


def test_newton_converges_faster_than_linearly():
    made = coupling("extended")
    bias, _ = query(made)
    with torch.no_grad():
        problem, _ = prepare(made, bias)
        state = Newton().start(problem, bias)
        norms = []
        for _ in range(9):
            norms.append(problem.residual(state.theta, state.phi).norm(dim=1))
            state = Newton().step(problem, state)
    for row in torch.stack(norms, dim=1):
        small = row[row < 0.05]
        small = small[small > 1e-12]
        assert (small[1:] <= 5 * small[:-1] ** 1.4).all()


def test_newton_solves_what_has_no_variance_at_once():
    made = coupling("extended")
    bias = 3000 * query(made)[0]
    start = torch.randn_like(bias) + bias
    found = mean_field(made, bias, solver="newton", tolerance=1e-8, initial=start)
    assert found.steps.max() == 1


def test_linear_systems_at_a_solution():
    made = coupling("extended")
    bias, known = query(made)
    with torch.no_grad():
        problem, _ = prepare(made, bias, **known)
        assert problem.hidden is not None
        q = mean_field(made, bias, tolerance=1e-10, **known).marginals * problem.hidden
        g = torch.randn_like(q)
        found = solve_linear(problem, q, g, tolerance=1e-12)
        Phi = made.dense()
    assert found.converged.all()
    index = made.groups.index
    own = (index[:, None] == index).double()
    P = torch.eye(made.states).double() - own / made.groups.sizes[index]
    for x, p, b, hidden in zip(found.value, q, g, problem.hidden, strict=True):
        S = torch.diag(p) - own * torch.outer(p, p)
        D = torch.diag(hidden)
        dense = D @ P @ D @ (torch.eye(made.states) - Phi @ S)
        torch.testing.assert_close(S @ (dense @ x), S @ (P @ (b * hidden)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAFE)
def test_one_variable_with_one_state(name):
    for sizes in ([1], [4], [1, 1]):
        made = coupling("extended", features=2, sizes=sizes)
        bias = torch.randn(2, sum(sizes), dtype=torch.float64)
        found = mean_field(made, bias, solver=name, tolerance=1e-10)
        expected = bias.softmax(1) if len(sizes) == 1 else torch.ones_like(bias)
        torch.testing.assert_close(found.marginals, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SAFE)
def test_large_biases(name):
    made = coupling("extended")
    bias = 300 * query(made)[0]
    found = mean_field(made, bias, solver=name, tolerance=1e-8)
    assert found.converged.all()
    assert found.marginals.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match="expected memory >= 1, got 0; for none, use LogitDamp"):
        Anderson(0)
    with pytest.raises(ValueError, match=r"expected alpha in \(0, 1\], got 1.5; 1 is the plain"):
        ForwardBackward(1.5)
    with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
        Newton(0)
