r"""Tests of dense couplings, their caps and their operators."""

import math

import pytest
import torch

from probnets.boltzmann import Coupling, FreeCoupling, GramCoupling, capped
from probnets.boltzmann.couplings import CAPS, Cap

SIZES = [2, 3, 1, 4, 2]
KINDS = ["gram", "free"]


def build(kind, cap: Cap = "extended", *, scale=5.0, sizes=SIZES, margin=0.1):
    if kind == "gram":
        made = GramCoupling(sizes, 4, cap=cap, margin=margin, dtype=torch.float64)
    else:
        made = FreeCoupling(sizes, cap=cap, margin=margin, std=0.3, dtype=torch.float64)
    made.weight.data.mul_(scale)
    return made


def centring(made):
    own = (made.groups.index[:, None] == made.groups.index).double()
    return torch.eye(made.states).double() - own / made.groups.sizes[made.groups.index]


def test_a_gram_by_hand():
    made = GramCoupling([2, 1], 1, cap="paper", margin=0.75, dtype=torch.float64)
    made.weight.data = torch.tensor([[3.0, 4.0, 0.25]]).double()
    # Columns (3, 4) shrink to length 1 / 2, and 1 / 4 stays.
    expected = [[0.0, 0.0, -0.075], [0.0, 0.0, -0.1], [-0.075, -0.1, 0.0]]
    torch.testing.assert_close(made.dense(), torch.tensor(expected).double())


def test_a_free_coupling_by_hand():
    made = FreeCoupling([2, 2], cap=None, dtype=torch.float64)
    made.weight.data = torch.zeros(4, 4).double()
    made.weight.data[0, 2] = 8.0
    block = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()
    expected = torch.kron(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), block)
    torch.testing.assert_close(made.dense(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", sorted(CAPS))
def test_couplings_are_symmetric_hollow_and_capped(kind, cap):
    for scale in (0.1, 5.0, 100.0):
        made = build(kind, cap, scale=scale)
        Phi, P = made.dense().detach(), centring(made)
        assert torch.equal(Phi, Phi.T)
        assert (Phi[made.groups.index[:, None] == made.groups.index] == 0).all()
        ends = torch.linalg.eigvalsh(P @ Phi @ P)[[0, -1]]
        assert ends[1] <= made.limit + 1e-12
        largest, smallest = made.spectrum()
        assert largest == made.limit == pytest.approx(CAPS[cap] - 0.1)
        assert smallest == pytest.approx(ends[0].item(), rel=1e-3, abs=1e-6)
        assert smallest <= ends[0] + 1e-9


def test_a_free_coupling_meets_its_cap():
    made = build("free", scale=100.0)
    assert torch.linalg.eigvalsh(made.dense())[-1].item() == pytest.approx(1.9)
    small = build("free", scale=0.01)
    torch.testing.assert_close(small.dense(), FreeCoupling.dense(_uncapped(small)))


def _uncapped(made):
    other = FreeCoupling(made.groups, cap=None, dtype=torch.float64)
    other.weight.data = made.weight.data
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_the_coupling(kind):
    made = build(kind)
    q = torch.randn(3, made.states, dtype=torch.float64)
    for multiply in (made, made.operator()):
        torch.testing.assert_close(multiply(q), q @ made.dense())
    pairs = [
        torch.autograd.grad(multiply(q).square().sum(), made.weight)
        for multiply in (made, made.operator())
    ]
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_works_out_weights_once(kind, monkeypatch):
    made = build(kind)
    calls, whole = [], made.dense
    monkeypatch.setattr(made, "dense", lambda: calls.append(1) or whole())
    multiply = made.operator()
    for _ in range(5):
        multiply(torch.randn(2, made.states, dtype=torch.float64))
    assert len(calls) == 1
    made.spectrum()
    assert len(calls) == 2


def test_a_coupling_is_its_own_operator():
    class Nothing(Coupling):
        def forward(self, q):
            return 0 * q

    made = Nothing([2, 3], limit=0.0)
    assert made.operator() is made
    assert made.colours().tolist() == [0, 1]


def test_spectra_are_kept_until_weights_change(monkeypatch):
    made = build("gram")
    first = made.spectrum()
    monkeypatch.setattr(made, "smallest_eigenvalue", lambda: -7.0)
    assert made.spectrum() == first
    made.weight.data.mul_(1.001)
    assert made.spectrum().smallest == -7.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1], [3], [1, 1, 1]])
def test_variables_that_cannot_couple(kind, sizes):
    made = build(kind, sizes=sizes)
    assert made.dense().abs().max() < 1e-12
    assert made.spectrum().smallest == pytest.approx(0, abs=1e-9)


def test_no_cap_certifies_nothing():
    assert FreeCoupling([2, 2], cap=None).spectrum().largest == math.inf


def test_errors():
    bad: Cap = "none"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"expected a cap of \['extended', 'paper'\], got 'none'"):
        capped(bad, 0.1)
    with pytest.raises(
        ValueError, match=r"expected a margin in \(0, 1\) for the cap 'paper', got"
    ):
        capped("paper", 1.0)
    with pytest.raises(ValueError, match="expected features >= 1, got 0"):
        GramCoupling([2], 0)
    with pytest.raises(ValueError, match="expected one variable or more, got none"):
        FreeCoupling([])
