r"""Tests for the probnets.backend.dispatch module."""

import pytest
import torch
from torch.autograd import forward_ad

from probnets.backend import compiled

x = torch.ones(2, 3)

# Forward mode scripts its own formulas when it is first used.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


class Subclass(torch.Tensor):
    pass


PLAIN = {
    "float32": x,
    "float64": x.double(),
    "int64": x.long(),
    "bool": x.bool(),
    "uint16": x.to(torch.uint16),
    "empty": x[:0],
    "non-contiguous": x.mT,
    "frozen parameter": torch.nn.Parameter(x, requires_grad=False),
}

OTHER = {
    "half": x.half(),
    "bfloat16": x.bfloat16(),
    "complex": x.to(torch.complex64),
    "tracked": x.clone().requires_grad_(),
    "sparse": x.to_sparse(),
    "meta": x.to("meta"),
    "subclass": x.as_subclass(Subclass),
    "lazily negative": (x * 1j).conj().imag,
}


@pytest.mark.parametrize("x", PLAIN.values(), ids=list(PLAIN))
def test_plain(x):
    assert compiled(x)
    assert compiled(x, torch.zeros(1))


@pytest.mark.parametrize("x", OTHER.values(), ids=list(OTHER))
def test_other(x):
    assert not compiled(x)
    assert not compiled(torch.zeros(1), x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tracked_without_gradient(mode):
    with mode():
        assert compiled(x.clone().requires_grad_())


def ask(answers):
    def f(x):
        answers.append(compiled(x))
        return (x * x).sum()

    return f


@forward_mode
@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.vmap,
        torch.func.jacfwd,
        lambda f: torch.func.vmap(torch.func.grad(f)),
    ],
    ids=["grad", "vmap", "jacfwd", "vmap of grad"],
)
def test_transforms(transform):
    answers = []
    with torch.no_grad():
        transform(ask(answers))(x)

    assert answers == [False]


@forward_mode
def test_forward_mode():
    with forward_ad.dual_level():
        assert compiled(x)
        assert not compiled(forward_ad.make_dual(x, x))


def test_compile():
    seen = torch.compile(lambda x: x + 1 if compiled(x) else x, backend="eager")

    assert compiled(x)
    assert torch.equal(seen(x), x)


def test_without_private_functions(monkeypatch):
    monkeypatch.delattr("torch._C._functorch.is_functorch_wrapped_tensor")
    assert not compiled(x)
