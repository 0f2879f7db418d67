r"""Gradients of fixed points by the implicit function theorem."""

__all__ = ["implicit_fixed_point"]

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from .fixedpoint import fixed_point
from .krylov import gmres
from .solution import Solution, check_converged, check_like, describe

Step = Callable[[Tensor], Tensor]


def implicit_fixed_point(
    step: Step,
    initial: Tensor,
    *,
    solve: Callable[[Step, Tensor], Solution] = fixed_point,
    solve_adjoint: Callable[[Step, Tensor], Solution] = gmres,
    strict: bool = False,
) -> Solution:
    r"""Searches a fixed point :math:`z = f(z)` for each sample and gives it a gradient.

    With :math:`J = \partial f / \partial z` at the solution, the gradient :math:`g` of a loss
    with respect to :math:`z` is handed on to all that :math:`f` depends on as the gradient

    .. math:: w = (I - J^\top)^{-1} g

    with respect to the output of :math:`f`. The solver is not recorded: memory is that of one
    evaluation of the map, however many steps it takes. The backward pass needs nothing but
    products :math:`J^\top v`, and warns where it does not converge.

    The gradient is that of an exact fixed point: it is as good as the solution, and means
    nothing for a sample that did not converge. It cannot be differentiated again. Nothing
    flows back to the first iterates.

    References:
        | Deep Equilibrium Models (Bai et al., 2019)
        | https://arxiv.org/abs/1909.01377

    Arguments:
        step: The map :math:`f`, from shape :math:`(B, *)` to the same shape, without mixing
            samples. Gradients reach every tensor that it uses, such as the parameters of a
            module, if they stay as they are until the backward pass.
        initial: The first iterates, with shape :math:`(B, *)`.
        solve: The solver, which gets the map and the first iterates. Options go in by
            :func:`functools.partial`, and a solution that is known already as
            ``lambda step, initial: solution``.
        solve_adjoint: The solver of the linear system, which gets :math:`I - J^\top` and
            :math:`g`. :func:`gmres` is right for any map. :func:`conjugate_gradient` is faster
            where :math:`J` is symmetric and :math:`I - J` positive definite, as for a gradient
            step :math:`z - \eta \nabla F(z)` towards a strict minimum.
        strict: Whether to raise if a sample does not converge, forward or backward.

    Returns:
        The solution, with a value that can be differentiated.

    Raises:
        RuntimeError: If the search is strict and a sample does not converge.

    Example:
        >>> a = torch.tensor([4.0, 9.0], requires_grad=True)
        >>> root = implicit_fixed_point(lambda z: (z + a / z) / 2, torch.ones(2))
        >>> root.value
        tensor([2., 3.], grad_fn=<_ImplicitGradientBackward>)
        >>> torch.autograd.grad(root.value.sum(), a)[0]
        tensor([0.2500, 0.1667])
    """
    with torch.no_grad():
        solution = solve(step, initial.detach())
    if strict:
        check_converged("solve", solution)
    if not torch.is_grad_enabled():
        return solution

    value = solution.value.detach()
    image = check_like("step", step(value), value)

    def adjoint(gradient: Tensor) -> Tensor:
        found = solve_adjoint(_adjoint_operator(step, value), gradient)
        if strict:
            return check_converged("the backward pass", found).value
        if not found.converged.all():
            warnings.warn(describe("the backward pass", found), RuntimeWarning, stacklevel=2)
        return found.value

    return solution._replace(value=_ImplicitGradient.apply(image, value, adjoint))


class _Context(FunctionCtx):
    adjoint: Callable[[Tensor], Tensor]
    saved_tensors: tuple[Tensor, ...]


class _ImplicitGradient(Function):
    r"""Returns the value, and replaces its gradient by the adjoint solution at the image."""

    @staticmethod
    def forward(
        ctx: _Context, image: Tensor, value: Tensor, adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.adjoint = adjoint
        ctx.save_for_backward(image)
        return value.clone()

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        with torch.no_grad():
            found = ctx.adjoint(gradient)
        if torch.is_grad_enabled():  # the graph of the gradient itself is being recorded
            found = _NoSecondGradient.apply(found, gradient, *ctx.saved_tensors)
        return found, None, None


class _NoSecondGradient(Function):
    r"""Returns its first argument, and refuses to be differentiated by what it depends on."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, *_: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        raise RuntimeError(
            "expected to differentiate the fixed point once, got a second derivative; "
            "record the steps of the map for that"
        )


def _adjoint_operator(step: Step, value: Tensor) -> Step:
    with torch.enable_grad():
        z = value.detach().requires_grad_()
        image = step(z)

    def operator(v: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(image, z, v, retain_graph=True, materialize_grads=True)
        return v - product

    return operator
