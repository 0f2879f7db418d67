r"""Mean-field problems: couplings, fields, and what is observed."""

__all__ = ["Problem", "prepare"]

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from probnets.backend import grouped_softmax, project_tangent, segment_logsumexp

from .couplings import Coupling


class Problem:
    r"""Is a batch of mean-field problems over hidden variables.

    .. math:: \min_q \; F(q) = -\tfrac12 q^\top \Phi q - b^\top q + \sum_i q_i^\top \log q_i

    Vectors have shape :math:`(B, N)`, and are zero at the states of observed variables.

    Arguments:
        coupling: The coupling :math:`\Phi`.
        field: The biases of hidden states, what observed variables add to them included.
        hidden: Which states are hidden, or None if all are.
        largest: What no eigenvalue of :math:`P \Phi P` exceeds.
        smallest: An estimate of its smallest eigenvalue, from below.
        multiply: The multiplication with :math:`\Phi`, or None to ask the coupling for it.
        constant: What observed variables add to the free energy, of shape :math:`(B,)`, or None
            for zero.
    """

    def __init__(
        self,
        coupling: Coupling,
        field: Tensor,
        hidden: Tensor | None,
        *,
        largest: float,
        smallest: float,
        multiply: Callable[[Tensor], Tensor] | None = None,
        constant: Tensor | None = None,
    ) -> None:
        self.multiply = coupling.operator() if multiply is None else multiply
        self.constant = constant
        self._matrix: list[Tensor] = []  # none or one, shared with the problems of some samples
        self.coupling, self.field, self.hidden = coupling, field, hidden
        self.groups = coupling.groups
        self.largest, self.smallest = largest, smallest
        self.products = 0

    def couple(self, v: Tensor) -> Tensor:
        r"""Multiplies by the coupling of hidden variables, and counts it."""
        self.products += 1
        return self.hide(self.multiply(v))

    def dense(self) -> Tensor:
        r"""Returns the matrix :math:`\Phi`, worked out once, for small models."""
        if not self._matrix:
            self._matrix.append(self.coupling.dense().detach().to(self.field.dtype))
        return self._matrix[0]

    def single(self) -> "Problem":
        r"""Returns the problem in single precision, without gradients."""
        return Problem(
            self.coupling,
            self.field.detach().float(),
            None if self.hidden is None else self.hidden.float(),
            largest=self.largest,
            smallest=self.smallest,
            multiply=self.coupling.operator(torch.float32),
        )

    def hide(self, v: Tensor) -> Tensor:
        r"""Sets the states of observed variables to zero."""
        return v if self.hidden is None else v * self.hidden

    def marginals(self, theta: Tensor) -> Tensor:
        r"""Computes the marginals of logits, zero at observed variables."""
        return self.hide(grouped_softmax(theta, self.groups))

    def centre(self, v: Tensor) -> Tensor:
        r"""Centres each variable."""
        return project_tangent(v, self.groups)

    def residual(self, theta: Tensor, phi: Tensor) -> Tensor:
        r"""Computes the gradient of the free energy on the tangent space.

        .. math:: r = P (\theta - \Phi q - b)

        Arguments:
            theta: The logits :math:`\theta` of :math:`q`.
            phi: The products :math:`\Phi q`.
        """
        return self.hide(self.centre(theta - phi - self.field))

    def error(self, residual: Tensor) -> Tensor:
        r"""Bounds the distance of the marginals from the solution, for each sample.

        .. math:: \| q - q^* \|_2 \leq \frac{\| r \|_2}{2 - \lambda_{\max}(P \Phi P)}

        It is infinite if the solution may not be unique.

        Arguments:
            residual: The residuals :math:`r`.
        """
        return self.distance(torch.linalg.vector_norm(residual, dim=1))

    def distance(self, norm: Tensor) -> Tensor:
        r"""Bounds the distance of the marginals from the solution, as :meth:`error` does.

        Arguments:
            norm: The norms of the residuals, of shape :math:`(B,)`.
        """
        if self.largest >= 2:
            return torch.full_like(norm, math.inf)
        return norm / (2 - self.largest)

    def free_energy(self, theta: Tensor, q: Tensor, phi: Tensor) -> Tensor:
        r"""Computes the free energy of each sample, of shape :math:`(B,)`.

        It leaves out what observed variables add.
        """
        log_q = (
            theta
            - segment_logsumexp(theta, self.groups.index, len(self.groups))[:, self.groups.index]
        )
        log_q = torch.where(q > 0, log_q, 0.0)  # 0 log 0 = 0
        return (q * (log_q - 0.5 * phi - self.field)).sum(dim=1)

    def take(self, rows: Tensor) -> "Problem":
        r"""Returns the problems of some samples, by their indices or a boolean mask."""
        hidden, constant = (None if x is None else x[rows] for x in (self.hidden, self.constant))
        taken = Problem(
            self.coupling,
            self.field[rows],
            hidden,
            largest=self.largest,
            smallest=self.smallest,
            multiply=self.multiply,
            constant=constant,
        )
        taken._matrix = self._matrix
        return taken


def prepare(
    coupling: Coupling,
    bias: Tensor,
    *,
    observed: Tensor | None = None,
    values: Tensor | None = None,
) -> tuple[Problem, Tensor]:
    r"""Checks a query, and folds what is observed into the biases of the rest.

    Arguments:
        coupling: The coupling.
        bias: The biases :math:`b`, with shape :math:`(N,)` or :math:`(B, N)`.
        observed: Which variables are observed, boolean with shape :math:`(n,)` or
            :math:`(B, n)`. By default none are.
        values: The distributions of observed variables, one-hot if they are certain, with shape
            :math:`(N,)` or :math:`(B, N)`. Those of hidden ones are ignored, NaN included.

    Returns:
        The problem, and the values with shape :math:`(B, N)`, zero where hidden.

    Raises:
        ValueError: If shapes do not fit, an observed variable has no distribution, or biases
            are not finite.
    """
    N, n = coupling.states, coupling.variables
    shapes = {"bias": (bias, N), "observed": (observed, n), "values": (values, N)}
    batch = 1
    for name, (tensor, size) in shapes.items():
        if tensor is None:
            continue
        if tensor.ndim not in (1, 2) or tensor.shape[-1] != size:
            raise ValueError(
                f"expected {name} with shape ({size},) or (B, {size}), got {tuple(tensor.shape)}"
            )
        if tensor.ndim == 2 and len(tensor) != batch:
            if batch != 1:
                raise ValueError(f"expected {name} of {batch} samples, got {len(tensor)}")
            batch = len(tensor)
    if not bias.is_floating_point():
        raise ValueError(f"expected biases that are floats, got {bias.dtype}")
    if not bool(bias.isfinite().all()):
        raise ValueError("expected finite biases, got NaN or infinity")
    if (observed is None) != (values is None):
        raise ValueError("expected observed and values together, got one without the other")

    like = coupling.like()
    if bias.dtype != like.dtype or bias.device != like.device:
        raise ValueError(
            f"expected biases of {like.dtype} on {like.device}, as the coupling, got {bias.dtype} "
            f"on {bias.device}; convert one of them"
        )
    bias = bias.expand(batch, N)
    spectrum = coupling.spectrum()
    make = partial(Problem, coupling, largest=spectrum.largest, smallest=spectrum.smallest)
    if observed is None or values is None:
        return make(bias, None), torch.zeros_like(bias)
    if observed.dtype != torch.bool:
        raise ValueError(f"expected a boolean mask of observed variables, got {observed.dtype}")
    seen = observed.expand(batch, n)[:, coupling.groups.index]  # (B, N)
    values = torch.where(seen, values.to(bias.dtype).expand(batch, N), 0.0)
    _check_distributions(coupling, values, observed.expand(batch, n))
    hidden = (~seen).to(bias.dtype)
    multiply = coupling.operator()
    pull = multiply(values)
    with torch.no_grad():
        energy = values * (-0.5 * pull - bias) + torch.xlogy(values, values)
    field = (bias + pull) * hidden
    return make(field, hidden, multiply=multiply, constant=energy.sum(dim=1)), values


def _check_distributions(coupling: Coupling, values: Tensor, observed: Tensor) -> None:
    index = coupling.groups.index.expand_as(values)
    total = values.new_zeros(observed.shape).scatter_add(1, index, values)
    tolerance = 1e-4 if values.dtype == torch.float32 else 1e-8
    wrong = observed & ~((total - 1).abs() <= tolerance)
    if bool(wrong.any()) or bool((values < 0).any()) or bool(values.isnan().any()):
        where = wrong.nonzero()
        found = f"a sum of {total[tuple(where[0])].item():g}" if len(where) else "a negative value"
        raise ValueError(
            "expected values that are a distribution for each observed variable, not negative "
            f"and with sum 1, got {found}; one-hot if a state is certain"
        )
