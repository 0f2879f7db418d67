r"""Tests for the probnets.backend.segments module."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from probnets.backend import segment_logsumexp, segment_sum
from probnets.backend.segments import _segment_logsumexp_torch, _segment_sum_torch

SUM = {"torch": _segment_sum_torch, "public": segment_sum}
LOGSUMEXP = {"torch": _segment_logsumexp_torch, "public": segment_logsumexp}
BOTH = {f"{name} sum": f for name, f in SUM.items()}
BOTH |= {f"{name} logsumexp": f for name, f in LOGSUMEXP.items()}

sums = pytest.mark.parametrize("sum_", SUM.values(), ids=list(SUM))
logsumexps = pytest.mark.parametrize("logsumexp", LOGSUMEXP.values(), ids=list(LOGSUMEXP))
both = pytest.mark.parametrize("reduce", BOTH.values(), ids=list(BOTH))

indices = st.lists(st.integers(0, 6), max_size=40)
dtypes = st.sampled_from([torch.float32, torch.float64])


@sums
def test_sum_by_hand(sum_):
    y = sum_(torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.0, 8.0]]), torch.tensor([2, 0, 2]), 4)
    assert y.tolist() == [[2.0, 0.0, 5.0, 0.0], [0.0, 0.0, 8.5, 0.0]]


@logsumexps
def test_logsumexp_by_hand(logsumexp):
    x = torch.tensor([[0.0, math.log(2.0), -math.inf, -math.inf]])
    y = logsumexp(x, torch.tensor([0, 0, 2, 2]), 3)

    assert_close(y, torch.tensor([[math.log(3.0), -math.inf, -math.inf]]))


@settings(max_examples=40)
@given(index=indices, dtype=dtypes)
def test_sum_matches_definition(index, dtype):
    i = torch.tensor(index, dtype=torch.long)
    x = torch.randn(3, len(index), dtype=dtype)

    for name, sum_ in SUM.items():
        y = sum_(x, i, 7)
        for s in range(7):
            assert_close(y[:, s], x[:, i == s].sum(1), msg=name)


@settings(max_examples=40)
@given(index=indices, dtype=dtypes, shift=st.sampled_from([0.0, 1e3, -1e3]), dead=st.floats(0, 1))
def test_logsumexp_matches_definition(index, dtype, shift, dead):
    i = torch.tensor(index, dtype=torch.long)
    x = torch.randn(3, len(index), dtype=dtype) + shift
    x[torch.rand_like(x) < dead] = -math.inf

    for name, logsumexp in LOGSUMEXP.items():
        y = logsumexp(x, i, 7)
        for s in range(7):
            assert_close(y[:, s], torch.logsumexp(x[:, i == s], dim=1), msg=name)


@both
def test_order_of_edges_is_free(reduce):
    x, i = torch.randn(2, 30).double(), torch.randint(5, (30,))
    order = torch.randperm(30)
    assert_close(reduce(x[:, order], i[order], 5), reduce(x, i, 5))


@both
def test_gradient(reduce):
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    i = torch.tensor([3, 0, 1, 1, 3, 3])

    live = [0, 1, 3]  # the third segment is empty
    assert gradcheck(lambda x: reduce(x, i, 4)[:, live], x)
    assert gradgradcheck(lambda x: reduce(x, i, 4)[:, live], x)


def test_dead_segments_have_zero_gradient():
    i = torch.tensor([0, 0, 1, 3, 3])
    x = torch.randn(2, 5)
    x[:, 3:] = -math.inf
    x.requires_grad_()

    segment_logsumexp(x, i, 4).sum().backward()

    expected = torch.zeros(2, 5)
    expected[:, :2] = x.detach()[:, :2].softmax(dim=1)
    expected[:, 2] = 1.0
    assert_close(x.grad, expected)


@both
@pytest.mark.parametrize(("B", "E", "S"), [(0, 3, 2), (2, 0, 3), (2, 0, 0), (1, 1, 1)])
def test_small(reduce, B, E, S):
    y = reduce(torch.zeros(B, E), torch.zeros(E, dtype=torch.long), S)

    assert y.shape == (B, S)
    if E == 0:
        assert_close(y, reduce(torch.zeros(B, 1), torch.tensor([S]), S + 1)[:, :S])


@logsumexps
@pytest.mark.parametrize("special", [math.inf, math.nan])
def test_infinity_and_nan_stay_visible(logsumexp, special):
    for edges in ([0.0, special], [special, 0.0], [special, special], [-math.inf, special]):
        y = logsumexp(torch.tensor([edges]), torch.tensor([0, 0]), 1)
        assert_close(y, torch.tensor([[special]]), equal_nan=True)


@both
def test_non_contiguous(reduce):
    x, i = torch.randn(9, 4), torch.tensor([0, 2, 9, 2, 1, 2, 9, 2])
    wide = x.mT[:, ::2]  # (4, 5)
    i = i[::2].repeat(2)[:5] % 3

    assert_close(reduce(wide, i, 3), reduce(wide.contiguous(), i.contiguous(), 3))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_index_dtypes(dtype):
    x, i = torch.randn(2, 4), torch.tensor([0, 1, 1, 3])
    assert_close(segment_sum(x, i.to(dtype), 4), segment_sum(x, i, 4))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
def test_integers_are_summed_without_overflow(dtype):
    y = segment_sum(torch.ones(1, 300, dtype=dtype), torch.zeros(300, dtype=torch.long), 2)

    assert y.dtype == torch.int64
    assert y.tolist() == [[300, 0]]


def test_vmap():
    x, i = torch.randn(5, 2, 4), torch.tensor([0, 1, 1, 3])

    for reduce in (segment_sum, segment_logsumexp):
        y = torch.func.vmap(lambda x, reduce=reduce: reduce(x, i, 4))(x)
        assert_close(y, torch.stack([reduce(row, i, 4) for row in x]))


@both
@pytest.mark.parametrize("bad", [-1, 2])
def test_rejects_stray_index(reduce, bad):
    with pytest.raises((IndexError, RuntimeError), match=r"index"):
        reduce(torch.zeros(1, 2), torch.tensor([0, bad]), 2)


@pytest.mark.parametrize("reduce", [segment_sum, segment_logsumexp])
def test_error_sentences(reduce):
    i = torch.zeros(3, dtype=torch.long)

    with pytest.raises(ValueError, match=r"expected x \(B, E\) and index \(E,\), got \(2, 4\)"):
        reduce(torch.zeros(2, 4), i, 1)
    with pytest.raises(ValueError, match=r"expected x \(B, E\)"):
        reduce(torch.zeros(3), i, 1)
    with pytest.raises(ValueError, match="expected segments >= 0, got -1"):
        reduce(torch.zeros(2, 3), i, -1)
    with pytest.raises(TypeError, match=r"expected index of an integer dtype, got torch\.float32"):
        reduce(torch.zeros(2, 3), i.float(), 1)
    with pytest.raises(IndexError, match=r"expected index in \[0, 1\), got values from 0 to 1"):
        reduce(torch.zeros(2, 2), torch.tensor([0, 1]), 1)


def test_logsumexp_rejects_integers():
    with pytest.raises(TypeError, match=r"expected x of a floating point dtype.*x.double\(\)"):
        segment_logsumexp(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1).long(), 1)
