r"""Boltzmann machines: a coupling with biases, and a network that adds to them."""

__all__ = ["BoltzmannMachine", "Clamped", "Options"]

from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from .couplings import Coupling
from .meanfield import MeanField, SolverName, free_energy, mean_field
from .solvers import Solver


class Options(TypedDict, total=False):
    r"""Is what :func:`mean_field` takes besides a query."""

    solver: SolverName | Solver
    tolerance: float
    max_steps: int
    initial: Tensor | MeanField | None
    adjoint_tolerance: float
    strict: bool


class Clamped(NamedTuple):
    r"""Is the least free energy of a batch of queries.

    Attributes:
        value: The free energies :math:`F^* \geq -\log Z`, with shape :math:`(B,)`. They have
            gradients.
        field: The mean field, without gradients.
    """

    value: Tensor
    field: MeanField


class BoltzmannMachine(nn.Module):
    r"""Creates a Boltzmann machine of one-hot variables.

    .. math:: p(x) \propto \exp\left( \tfrac12 x^\top \Phi x
        + (b + \beta(x_o))^\top x \right)

    The biases :math:`b` are learned and zero at first. A network may add a field
    :math:`\beta(x_o)` that it computes of what is observed. Mean field has one solution
    whatever the biases and the network are, since only the coupling decides.

    A constant added to the biases of all states of a variable changes no marginal, and all free
    energies alike. Gradients of losses sum to zero over the states of a variable, hence nobody
    needs to centre biases; whoever wants to may, with ``project_tangent``.

    References:
        | Monotone deep Boltzmann machines (Feng et al., 2023)
        | https://arxiv.org/abs/2307.04990

    Arguments:
        coupling: The coupling :math:`\Phi`.
        field: The network :math:`\beta`. It is called as ``field(values, observed)``, with
            values of shape :math:`(B, N)`, zero where hidden, and a boolean mask of shape
            :math:`(B, n)`, and returns a tensor of shape :math:`(B, N)`.

    Example:
        >>> from probnets.boltzmann import GramCoupling
        >>> machine = BoltzmannMachine(GramCoupling([2, 3, 3], 5))
        >>> machine.mean_field().marginals.shape
        torch.Size([1, 8])
    """

    def __init__(self, coupling: Coupling, *, field: nn.Module | None = None) -> None:
        super().__init__()
        like = next(coupling.parameters())
        self.coupling, self.field = coupling, field
        bias = torch.zeros(coupling.states, device=like.device, dtype=like.dtype)
        self.bias = nn.Parameter(bias)

    @property
    def states(self) -> int:
        r"""The number :math:`N` of states of all variables."""
        return self.coupling.states

    @property
    def variables(self) -> int:
        r"""The number :math:`n` of variables."""
        return self.coupling.variables

    def biases(self, values: Tensor | None = None, observed: Tensor | None = None) -> Tensor:
        r"""Computes the biases, what the network adds included.

        Arguments:
            values: The values of observed variables, with shape :math:`(N,)` or :math:`(B, N)`.
            observed: Which variables are observed, boolean with shape :math:`(n,)` or
                :math:`(B, n)`. By default none are.

        Returns:
            The biases, with shape :math:`(N,)` without a network, and :math:`(B, N)` with one.

        Raises:
            ValueError: If shapes do not fit.
        """
        if self.field is None:
            return self.bias
        values, observed = self._checked(values, observed)
        seen = observed[:, self.coupling.groups.index]
        added = self.field(torch.where(seen, values.to(self.bias.dtype), 0.0), observed)
        if not isinstance(added, Tensor) or added.shape != values.shape:
            found = tuple(added.shape) if isinstance(added, Tensor) else type(added).__name__
            raise ValueError(
                f"expected a field network that returns shape {tuple(values.shape)}, got {found}"
            )
        return self.bias + added

    def mean_field(
        self,
        values: Tensor | None = None,
        observed: Tensor | None = None,
        **options: Unpack[Options],
    ) -> MeanField:
        r"""Computes the marginals of hidden variables, as :func:`mean_field` does.

        Arguments:
            values: The values of observed variables, with shape :math:`(N,)` or :math:`(B, N)`.
            observed: Which variables are observed, boolean with shape :math:`(n,)` or
                :math:`(B, n)`. By default none are.
            options: What else :func:`mean_field` takes.

        Returns:
            The mean field, with gradients.
        """
        bias = self.biases(values, observed)
        return mean_field(self.coupling, bias, values=values, observed=observed, **options)

    def free_energy(
        self,
        values: Tensor | None = None,
        observed: Tensor | None = None,
        *,
        given: Tensor | None = None,
        **options: Unpack[Options],
    ) -> Clamped:
        r"""Computes the least free energy given what is observed, with gradients.

        .. math:: F^*(x_o) = \min_{q :\, q_o = x_o} F(q) \geq -\log \sum_{x_h} \exp\left(
            \tfrac12 x^\top \Phi x + b^\top x \right)

        The slope in the marginals vanishes at the minimum, so gradients need no linear system.
        They are as precise as the marginals are: choose the tolerance accordingly. Second
        derivatives do need one, and are wrong here.

        Arguments:
            values: The values of observed variables, with shape :math:`(N,)` or :math:`(B, N)`.
            observed: Which variables are observed, boolean with shape :math:`(n,)` or
                :math:`(B, n)`. By default none are.
            given: Which of them the network is told of. By default all are.
            options: What else :func:`mean_field` takes.
        """
        bias = self.biases(values, observed if given is None else given)
        with torch.no_grad():
            field = mean_field(self.coupling, bias, values=values, observed=observed, **options)
        q = field.marginals
        if values is not None and observed is not None:  # they may have gradients
            seen = observed[..., self.coupling.groups.index]
            q = torch.where(seen, values.to(q.dtype), q)
        return Clamped(free_energy(self.coupling, bias, q), field)

    def free_energy_difference(
        self, values: Tensor, observed: Tensor, targets: Tensor, **options: Unpack[Options]
    ) -> Tensor:
        r"""Computes a stand-in for the negative log-likelihood of some variables given others.

        .. math:: F^*(x_o, x_t) - F^*(x_o) \approx -\log p(x_t \mid x_o)

        It is never negative, as clamping only narrows the search. Each term is above
        :math:`-\log Z` by the divergence of mean field from the truth, hence the difference is
        wrong by how much these divergences differ. If nothing is hidden once the targets are
        known, the first term is exact, and the difference is at most the negative
        log-likelihood and convex in the coupling and the biases. With latent variables it is
        neither a lower nor an upper bound. The gradient in the biases is the difference
        of the marginals.

        Arguments:
            values: The values of observed variables and targets, with shape :math:`(B, N)`.
            observed: Which variables are observed, with shape :math:`(n,)` or :math:`(B, n)`.
            targets: Which variables are targets, likewise.
            options: What else :func:`mean_field` takes.

        Returns:
            The differences, with shape :math:`(B,)` and gradients.
        """
        whole = self.free_energy(values, observed | targets, given=observed, **options).value
        return whole - self.free_energy(values, observed, **options).value

    def _checked(self, values: Tensor | None, observed: Tensor | None) -> tuple[Tensor, Tensor]:
        r"""Returns values and a mask of one batch, for the network."""
        N, n = self.states, self.variables
        if (observed is None) != (values is None):
            raise ValueError("expected observed and values together, got one without the other")
        if values is None or observed is None:
            mask = torch.zeros(1, n, dtype=torch.bool, device=self.bias.device)
            return self.bias.new_zeros(1, N), mask
        values = values[None] if values.ndim == 1 else values
        observed = observed[None] if observed.ndim == 1 else observed
        fits = values.shape[1:] == (N,) and observed.shape[1:] == (n,)
        batch = {len(values), len(observed)} if fits else set()
        if not fits or len(batch - {1}) > 1:
            raise ValueError(
                f"expected values with shape (B, {N}) and observed with shape (B, {n}), got "
                f"{tuple(values.shape)} and {tuple(observed.shape)}"
            )
        if observed.dtype != torch.bool:
            raise ValueError(
                f"expected a boolean mask of observed variables, got {observed.dtype}"
            )
        B = max(batch - {1}, default=1)
        return values.expand(B, N), observed.expand(B, n)
