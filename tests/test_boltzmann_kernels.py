r"""Tests of the inner loops of the solvers."""

import math

import pytest
import torch

from probnets.backend import Groups
from probnets.boltzmann.ascent import _sweep_torch, sweep
from probnets.boltzmann.kernels import _damp_torch, _measure_torch, damp, measure

GROUPS = Groups([1, 2, 5, 3])
DAMP = {"torch": _damp_torch, "public": damp}
MEASURE = {"torch": _measure_torch, "public": measure}
SWEEP = {"torch": _sweep_torch, "public": sweep}


def draw(*shape):
    return 2 * torch.randn(*shape, dtype=torch.float64)


def masks(batch):
    hidden = (torch.rand(batch, 4) < 0.6)[:, GROUPS.index].double()
    return {"none": None, "some": hidden, "all": torch.zeros_like(hidden)}


@pytest.mark.parametrize("name", DAMP)
def test_damping_by_hand(name):
    theta, phi, field = (torch.tensor([x]).double() for x in ([0, 2], [3, 1], [1, 1]))
    new, q = DAMP[name](
        theta, phi, field, torch.full((1, 1), 0.5).double(), hidden=None, groups=Groups([2])
    )
    assert new.tolist() == [[2.0, 2.0]]
    assert q.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("name", MEASURE)
def test_measures_by_hand(name):
    rows = [[math.log(3), 0, 5], [0.75, 0.25, 1], [0, 2, 4], [math.log(3), 0, 1]]
    theta, q, phi, field = torch.tensor(rows, dtype=torch.float64)[:, None]
    norm, energy, r = MEASURE[name](theta, q, phi, field, hidden=None, groups=Groups([2, 1]))
    entropy = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    expected = entropy - 0.75 * math.log(3) - 0.25 - 2 - 1
    assert norm.item() == pytest.approx(math.sqrt(2), rel=1e-14)
    assert energy.item() == pytest.approx(expected, rel=1e-14)
    torch.testing.assert_close(r, torch.tensor([[1.0, -1.0, 0.0]]).double())


@pytest.mark.parametrize("mask", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loops_are_pytorch(mask, dtype):
    hidden = masks(6)[mask]
    theta, phi, field = (draw(6, 11) for _ in range(3))
    fixed = {"hidden": None if hidden is None else hidden.to(dtype), "groups": GROUPS}
    theta, phi, field = (x.to(dtype) for x in (theta, phi, field))
    rate = torch.rand(6, 1).to(dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}

    pairs = [f(theta, phi, field, rate, **fixed) for f in (damp, _damp_torch)]
    torch.testing.assert_close(*pairs, **close)
    theta, q = pairs[0]
    if hidden is not None:
        assert (q[hidden == 0] == 0).all()
    pairs = [f(theta, q, phi, field, **fixed) for f in (measure, _measure_torch)]
    torch.testing.assert_close(*pairs, **close)
    A = draw(11, 11).to(dtype)
    Phi = (A + A.T).masked_fill(GROUPS.index[:, None] == GROUPS.index, 0.0)
    pairs = [f(Phi, field, theta, q, phi, **fixed) for f in (sweep, _sweep_torch)]
    torch.testing.assert_close(*pairs, **close)


@pytest.mark.parametrize("name", SWEEP)
@pytest.mark.parametrize("mask", ["none", "some", "all"])
def test_a_sweep_updates_each_variable_given_the_rest(name, mask):
    hidden, field = masks(5)[mask], draw(5, 11)
    A = draw(11, 11)
    Phi = (A + A.T).masked_fill(GROUPS.index[:, None] == GROUPS.index, 0.0)
    shown = torch.ones(5, 11).double() if hidden is None else hidden
    field = field * shown
    q = torch.rand(5, 11).double() * shown
    before = q.clone()
    phi = (q @ Phi) * shown
    fixed = {"hidden": hidden, "groups": GROUPS}
    _, found, products = SWEEP[name](Phi, field, torch.zeros_like(q), q, phi, **fixed)

    assert torch.equal(q, before)  # what it got stays as it was
    for part in torch.arange(11).split(GROUPS.sizes.tolist()):
        new = ((q @ Phi) + field)[:, part].softmax(1)
        q[:, part] = new * shown[:, part]
    torch.testing.assert_close(found, q)
    torch.testing.assert_close(products, (q @ Phi) * shown)


def test_certain_states_have_no_entropy():
    theta = torch.tensor([[0.0, -2000.0]]).double()
    q = torch.tensor([[1.0, 0.0]]).double()
    for f in MEASURE.values():
        _, energy, _ = f(theta, q, 0 * q, 0 * q, hidden=None, groups=Groups([2]))
        assert energy.item() == 0.0


def test_no_samples_and_strides():
    x = draw(0, 11)
    new, q = damp(x, x, x, x[:, :1], hidden=None, groups=GROUPS)
    assert new.shape == q.shape == (0, 11)
    norm, energy, r = measure(x, x, x, x, hidden=None, groups=GROUPS)
    assert norm.shape == energy.shape == (0,)
    assert r.shape == (0, 11)
    theta, field = draw(11, 4).T, draw(1, 11).expand(4, 11)
    rate = torch.ones(4, 1).double()
    args = theta, theta.contiguous(), field, rate
    torch.testing.assert_close(
        damp(*args, hidden=None, groups=GROUPS), _damp_torch(*args, hidden=None, groups=GROUPS)
    )


def test_gradients_go_through_pytorch():
    theta = draw(2, 11).requires_grad_()
    x, rate = draw(2, 11), torch.ones(2, 1).double()
    fixed = {"hidden": None, "groups": GROUPS}
    assert torch.autograd.gradcheck(lambda t: damp(t, x, x, rate / 3, **fixed), theta)
    q = x.softmax(1)
    assert torch.autograd.gradcheck(lambda t: measure(t, q, x, x / 2, **fixed), theta)
