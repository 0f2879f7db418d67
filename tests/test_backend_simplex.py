r"""Tests for the probnets.backend.simplex module."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev, vmap
from torch.testing import assert_close

from probnets.backend import Groups, grouped_softmax, project_tangent, softmax_jvp
from probnets.backend.simplex import _grouped_softmax_torch

SOFTMAX = {
    "torch": lambda x, sizes: _grouped_softmax_torch(x, Groups(sizes)),
    "public": grouped_softmax,
}
softmaxes = pytest.mark.parametrize("softmax", SOFTMAX.values(), ids=list(SOFTMAX))

# Equal and ragged groups, of one element and more, in every form that is understood.
GROUPS = {
    "int": 3,
    "equal sizes": torch.tensor([2, 2, 2]),
    "sizes": torch.tensor([1, 3, 2]),
    "list": [2, 4],
    "groups": Groups([3, 1, 1, 1]),
    "one group": 6,
    "singletons": 1,
}
groupings = pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))

some_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def split(x, groups):
    sizes = groups.sizes if isinstance(groups, Groups) else groups
    if isinstance(sizes, torch.Tensor):
        sizes = sizes.tolist()
    return x.split(sizes, dim=-1)


def definition(x, groups):
    return torch.cat([part.softmax(-1) for part in split(x, groups)], dim=-1)


@softmaxes
def test_softmax_by_hand(softmax):
    logits = torch.tensor([0.0, math.log(3.0), 7.0, -math.inf, 0.0, 0.0])
    z = softmax(logits, [2, 1, 3])

    assert_close(z, torch.tensor([0.25, 0.75, 1.0, 0.0, 0.5, 0.5]))


@settings(max_examples=40)
@given(
    sizes=some_sizes,
    lead=st.sampled_from([(), (3,), (2, 3), (0,)]),
    shift=st.sampled_from([0.0, 1e3, -1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_softmax_matches_definition(sizes, lead, shift, dtype):
    logits = 3 * torch.randn(*lead, sum(sizes), dtype=dtype) + shift

    for name, softmax in SOFTMAX.items():
        z = softmax(logits, sizes)
        assert z.dtype == dtype
        assert_close(z, definition(logits, sizes), msg=name)
        assert_close(
            torch.stack([part.sum(-1) for part in z.split(sizes, -1)], -1),
            torch.ones(*lead, len(sizes), dtype=dtype),
            msg=name,
        )


@groupings
def test_softmax_of_every_grouping(groups):
    logits = torch.randn(2, 4, 6)
    assert_close(grouped_softmax(logits, groups), definition(logits, groups))


@softmaxes
@pytest.mark.parametrize("place", range(5))
def test_softmax_does_not_overflow(softmax, place):
    logits = torch.zeros(5).index_fill(0, torch.tensor(place), 1e4)
    z = softmax(logits, [3, 2])

    assert_close(z, definition(logits, [3, 2]))
    assert z[place] == 1


@softmaxes
def test_softmax_ignores_shift_of_each_group(softmax):
    sizes = [2, 1, 4]
    logits = torch.randn(3, 7).double()
    shift = torch.tensor([5.0, -9.0, 100.0]).double().repeat_interleave(torch.tensor(sizes))

    assert_close(softmax(logits + shift, sizes), softmax(logits, sizes))


@softmaxes
def test_softmax_follows_permutation_of_groups(softmax):
    a, b = torch.randn(3, 2), torch.randn(3, 5)
    there = softmax(torch.cat([a, b], 1), [2, 5])
    back = softmax(torch.cat([b, a], 1), [5, 2])

    assert_close(torch.cat([back[:, 5:], back[:, :5]], 1), there)


@softmaxes
def test_softmax_without_mass_is_nan_in_its_group_alone(softmax):
    z = softmax(torch.tensor([-math.inf, -math.inf, 0.0, math.nan, 0.0, 0.0, 0.0]), [2, 3, 2])
    assert_close(z, torch.tensor([*[math.nan] * 5, 0.5, 0.5]), equal_nan=True)


@softmaxes
def test_softmax_of_non_contiguous(softmax):
    logits = torch.randn(7, 3).mT
    assert_close(softmax(logits, [3, 4]), definition(logits, [3, 4]))


@groupings
def test_softmax_gradient(groups):
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(grouped_softmax, (logits, groups))
    assert gradgradcheck(grouped_softmax, (logits, groups))


@pytest.mark.parametrize("sizes", [[2, 1, 3], 3])
def test_softmax_gradient_of_excluded_states_is_zero(sizes):
    logits = torch.randn(6).index_fill(0, torch.tensor([1, 4]), -math.inf).requires_grad_()
    (grouped_softmax(logits, sizes) * torch.arange(6)).sum().backward()

    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[[1, 4]].tolist() == [0.0, 0.0]


@groupings
def test_jvp_matches_jacobian(groups):
    logits, v = torch.randn(2, 5, 6, dtype=torch.float64)
    jacobian = vmap(jacrev(lambda x: grouped_softmax(x, groups)))(logits)
    product = softmax_jvp(grouped_softmax(logits, groups), v, groups)

    assert_close(product, torch.einsum("bij,bj->bi", jacobian, v))
    assert_close(product, torch.einsum("bij,bi->bj", jacobian, v))  # symmetric


def test_jvp_by_hand():
    z, v = torch.tensor([0.25, 0.75, 1.0]), torch.tensor([4.0, 0.0, 5.0])
    assert softmax_jvp(z, v, [2, 1]).tolist() == [0.75, -0.75, 0.0]


@groupings
def test_jvp_gradient(groups):
    z, v = torch.rand(2, 3, 6, dtype=torch.float64).requires_grad_().unbind()
    assert gradcheck(lambda z, v: softmax_jvp(z, v, groups), (z, v))


@groupings
def test_jvp_broadcasts(groups):
    z, v = torch.rand(4, 6), torch.randn(3, 1, 6)
    expected = torch.stack([softmax_jvp(z, row.expand(4, 6), groups) for row in v])
    assert_close(softmax_jvp(z, v, groups), expected)


@groupings
def test_projection(groups):
    v = torch.randn(5, 6).double()
    p = project_tangent(v, groups)

    assert_close(p, torch.cat([x - x.mean(-1, keepdim=True) for x in split(v, groups)], -1))
    assert_close(project_tangent(p, groups), p)
    assert_close((project_tangent(v[:1], groups) * v[1:2]).sum(), (v[:1] * p[1:2]).sum())


@pytest.mark.parametrize("groups", [3, [], torch.zeros(0, dtype=torch.long)])
def test_no_features(groups):
    empty = torch.zeros(2, 0)
    assert grouped_softmax(empty, groups).shape == (2, 0)
    assert softmax_jvp(empty, empty, groups).shape == (2, 0)
    assert project_tangent(empty, groups).shape == (2, 0)


def test_groups():
    groups = Groups(torch.tensor([2, 1, 3], dtype=torch.int32))

    assert groups.sizes.tolist() == [2, 1, 3]
    assert groups.starts.tolist() == [0, 2, 3]
    assert groups.index.tolist() == [0, 0, 1, 2, 2, 2]
    assert len(groups) == 3
    assert groups.size is None
    assert Groups([4, 4]).size == 4


def test_groups_follow_their_module():
    groups = copy.deepcopy(Groups([2, 1]))

    assert not groups.state_dict()
    assert groups.to("meta").index.device.type == "meta"
    assert groups.double().sizes.dtype == torch.int64
    assert repr(Groups([2, 1])) == "Groups(sizes=[2, 1])"
    assert repr(Groups([2] * 99)) == "Groups(groups=99, size=2)"
    assert repr(Groups([1, 2] * 50)) == "Groups(groups=100)"


def test_vmap():
    logits = torch.randn(5, 2, 6)
    z = vmap(lambda x: grouped_softmax(x, [4, 2]))(logits)
    assert_close(z, grouped_softmax(logits, [4, 2]))


def test_error_sentences():
    x = torch.zeros(2, 6)

    for function in (grouped_softmax, project_tangent, lambda x, g: softmax_jvp(x, x, g)):
        for size in (4, 0, -3):
            with pytest.raises(ValueError, match=f"groups to divide 6 features, got size {size}"):
                function(x, size)
        with pytest.raises(ValueError, match="that add up to 6 features, got 5"):
            function(x, [2, 3])
        with pytest.raises(ValueError, match="got a scalar"):
            function(torch.tensor(0.0), 1)

    with pytest.raises(TypeError, match="expected logits of a floating point dtype"):
        grouped_softmax(x.long(), 3)
    with pytest.raises(ValueError, match="expected group sizes >= 1, got 0; leave out empty"):
        Groups([2, 0])
    with pytest.raises(ValueError, match=r"expected group sizes \(G,\), got \(1, 2\)"):
        Groups(torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="expected group sizes of an integer dtype"):
        Groups(torch.ones(2))
