r"""Tests for the probnets.boltzmann.spectra module."""

import pytest
import torch
from torch.testing import assert_close

from probnets.backend import project_tangent
from probnets.boltzmann.couplings import Cap, FreeCoupling, GramCoupling
from probnets.boltzmann.spectra import (
    extreme_eigenvalues,
    frequency_bound,
    lanczos,
    largest_eigenvalue,
)
from probnets.boltzmann.tiers import Tier, TierCoupling

FLOAT = torch.float64

MAPS = {
    "stride 1": ([Tier(3, 1, 6, 4)], {(0, 0): 3}),
    "two tiers of one size": ([Tier(2, 2, 4, 4), Tier(3, 1, 4, 4)], {(0, 0): 2, (1, 0): 5}),
    "strides": (
        [Tier(2, 2, 8, 4), Tier(3, 1, 4, 2), Tier(2, 2, 2, 1)],
        {(0, 0): 3, (1, 0): 3, (1, 1): 2, (2, 0): 3, (2, 1): 5},
    ),
    "far kernels": ([Tier(2, 1, 2, 3)], {(0, 0): 5}),
}
HEADS = {
    "head": ([Tier(3, 1, 6, 4), Tier(4)], {(0, 0): 3, (1, 0): 1, (1, 1): 1}),
    "dense": ([Tier(3, 4), Tier(2, 3)], {(0, 0): 1, (1, 0): 1}),
}


def build(tiers, links, *, scale=1.0, cap: Cap = "extended"):
    coupling = TierCoupling(tiers, links, cap=cap, dtype=FLOAT)
    with torch.no_grad():
        for weight in coupling.parameters():
            weight.mul_(scale)
    return coupling


def eigenvalues(coupling):
    with torch.no_grad():
        phi = project_tangent(coupling.dense(), coupling.groups)
        phi = project_tangent(phi.T, coupling.groups)
    return torch.linalg.eigvalsh((phi + phi.T) / 2)


def test_lanczos_by_hand():
    A = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=FLOAT)
    start = torch.tensor([1.0, 0.0], dtype=FLOAT)
    values, residuals = lanczos(lambda v: A @ v, start, 5)
    assert_close(values, torch.tensor([1.0, 3.0], dtype=FLOAT))
    assert residuals.max() < 1e-12
    # One step sees the corner alone, and what it leaves behind.
    values, residuals = lanczos(lambda v: A @ v, start, 1)
    assert_close(values, torch.tensor([2.0], dtype=FLOAT))
    assert_close(residuals, torch.tensor([1.0], dtype=FLOAT))


def test_lanczos_finds_all_eigenvalues():
    A = torch.randn(12, 12, dtype=FLOAT)
    A = A + A.T
    values, residuals = lanczos(lambda v: v @ A, torch.randn(1, 12, dtype=FLOAT), 12)
    assert_close(values, torch.linalg.eigvalsh(A))
    assert residuals.max() < 1e-10


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_residuals_bound_the_distance(steps):
    A = torch.randn(30, 30, dtype=FLOAT)
    A = A + A.T
    exact = torch.linalg.eigvalsh(A)
    values, residuals = lanczos(lambda v: A @ v, torch.randn(30, dtype=FLOAT), steps)
    assert len(values) == steps
    distance = (values[:, None] - exact).abs().amin(1)
    assert (distance <= residuals + 1e-12).all()
    assert exact[0] <= values[0] + 1e-12
    assert values[-1] <= exact[-1] + 1e-12


def test_lanczos_stops_in_an_invariant_space():
    calls = []

    def operator(v):
        calls.append(1)
        return 3 * v

    values, residuals = lanczos(operator, torch.randn(50, dtype=FLOAT), 20)
    assert len(calls) == 1
    assert_close(values, torch.tensor([3.0], dtype=FLOAT))
    assert residuals.max() < 1e-12

    values, residuals = lanczos(operator, torch.zeros(3), 4)
    assert_close((values, residuals), (torch.zeros(1, dtype=FLOAT),) * 2)
    with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
        lanczos(operator, torch.ones(3), 0)


@pytest.mark.parametrize("cap", ["paper", "extended"])
def test_extremes(cap):
    for coupling in (
        GramCoupling([2, 3, 4] * 5, 9, cap=cap, dtype=FLOAT),
        FreeCoupling([2, 5, 3], cap=cap, std=1.0, dtype=FLOAT),
        build(*MAPS["strides"], cap=cap),
    ):
        exact = eigenvalues(coupling)
        found = extreme_eigenvalues(coupling, steps=200)
        assert_close(found.smallest, exact[0].item())
        assert_close(found.largest, exact[-1].item())
        rough = extreme_eigenvalues(coupling, steps=3)
        assert found.smallest < rough.smallest < 0 < rough.largest < found.largest
        assert rough.smallest_residual > 1e-3 < rough.largest_residual
        assert_close(coupling.smallest_eigenvalue(steps=200), exact[0].item())
        top = rough.largest + rough.largest_residual
        assert largest_eigenvalue(coupling, steps=3) == top


def test_extremes_of_variables_of_one_state():
    assert extreme_eigenvalues(GramCoupling([1, 1], 3)) == (0, 0, 0, 0)


@pytest.mark.parametrize("cap", ["paper", "extended"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("name", [*MAPS, *HEADS])
def test_frequencies_enclose_all_eigenvalues(name, scale, cap):
    coupling = build(*(MAPS | HEADS)[name], scale=scale, cap=cap)
    exact = eigenvalues(coupling)
    low, high = frequency_bound(coupling)
    assert low <= exact[0] + 1e-12
    assert exact[-1] - 1e-12 <= high <= coupling.limit
    assert low > 10 * exact[0]


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_frequencies_are_those_of_the_torus(kernel):
    coupling = build([Tier(2, 2, 3, 2)], {(0, 0): kernel})
    height, width = 3 + kernel - 1, 2 + kernel - 1
    # The response of one pixel, moved to all places of the torus.
    with torch.no_grad():
        x = project_tangent(torch.eye(4, dtype=FLOAT), 2)
        x = x * coupling.factors()[0][0, 0].repeat_interleave(2)
        y = coupling.features(0, [x[:, :, None, None]])
    whole = torch.zeros(4, 4, height, width, dtype=FLOAT)
    whole[:, :, :kernel, :kernel] = y
    moved = [whole.roll((r, c), (2, 3)).flatten(1) for r in range(height) for c in range(width)]
    A = torch.cat(moved).T
    own = torch.block_diag(*[torch.ones(2, 2)] * (2 * height * width)).bool()
    exact = torch.linalg.eigvalsh(-(A.T @ A).masked_fill(own, 0.0))
    assert_close(frequency_bound(coupling), (exact[0].item(), exact[-1].item()))


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_frequencies_are_exact_for_cells_apart(kernel):
    # Windows as wide as their stride do not overlap.
    tiers = [Tier(2, 2, 4 * kernel, 4 * kernel), Tier(2, 1, 4, 4)]
    coupling = build(tiers, {(1, 0): kernel})
    exact = eigenvalues(coupling)
    assert_close(frequency_bound(coupling), (exact[0].item(), exact[-1].item()))


def test_frequencies_get_tight_on_large_maps():
    errors = []
    for width in (2, 5, 16):
        torch.manual_seed(5)
        coupling = build([Tier(2, 1, width, width)], {(0, 0): 2})
        exact, (low, high) = eigenvalues(coupling), frequency_bound(coupling)
        errors.append(exact[0].item() - low + high - exact[-1].item())
    assert errors[0] > errors[1] > errors[2] >= 0
    assert errors[2] < 0.2 * errors[0]


def test_frequency_bound_of_the_rows_of_a_head():
    coupling = build(*HEADS["dense"])
    link = coupling.link(1, 0).weight.detach()
    own = coupling.link(0, 0).weight.detach()
    largest = 0.0
    for A in (link, own):
        A = project_tangent(A, 3) * coupling.factors()[0].flatten().repeat_interleave(3)
        largest += torch.linalg.matrix_norm(A, 2).item() ** 2
    assert_close(frequency_bound(coupling), (-largest, 1.9))
