r"""Circuits as distributions of Pyro.

This module imports Pyro, which patches :mod:`torch.distributions`. Hence it is not imported
with the package: ``from probnets.circuits.distribution import CircuitDistribution``.
"""

__all__ = ["CircuitDistribution"]

from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from .circuit import TreeCircuit
from .exact import MOST, enumerate_values
from .inputs import Discrete
from .queries import sample


class CircuitDistribution(TorchDistribution):
    r"""Creates a distribution over the observations of a circuit, for Pyro and PyTorch.

    The log-likelihood is differentiable in the circuit's parameters. Samples are not: they
    are drawn from PyTorch's global source of randomness, as those of all distributions.

    An observation has a value everywhere. With ``validate_args=False`` a NaN is a missing value,
    which is summed out.

    Arguments:
        circuit: The circuit, whose shape is that of an event.
        batch_shape: The shape of independent draws from the circuit.
        validate_args: Whether values are checked. By default as PyTorch is set.

    Example:
        >>> import pyro
        >>> from probnets.circuits import Categorical, chain
        >>> circuit = TreeCircuit(chain(5), Categorical(5, units=4, values=3))
        >>> def model(x):
        ...     pyro.module("circuit", circuit)
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("x", CircuitDistribution(circuit), obs=x)
        >>> model(torch.zeros(7, 5)).shape
        torch.Size([7, 5])
    """

    def __init__(
        self,
        circuit: TreeCircuit,
        batch_shape: Sequence[int] = (),
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.circuit = circuit
        super().__init__(torch.Size(batch_shape), circuit.shape, validate_args=validate_args)

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"{type(self).__name__}({self.circuit.tree}, {shapes})"

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {}  # the circuit takes care of its own

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        inputs = self.circuit.inputs
        discrete = isinstance(inputs, Discrete)
        one = constraints.integer_interval(0, inputs.values - 1) if discrete else constraints.real
        return constraints.independent(one, len(self.event_shape))

    @property
    def has_enumerate_support(self) -> bool:
        r"""Whether the observations are few enough to be listed."""
        inputs = self.circuit.inputs
        return isinstance(inputs, Discrete) and inputs.values ** self.event_shape.numel() <= MOST

    def expand(
        self, batch_shape: Sequence[int], _instance: "CircuitDistribution | None" = None
    ) -> "CircuitDistribution":
        try:
            torch.empty(self.batch_shape, device="meta").expand(torch.Size(batch_shape))
        except RuntimeError:
            raise ValueError(
                f"expected a shape to which {tuple(self.batch_shape)} expands, "
                f"got {tuple(batch_shape)}"
            ) from None
        return CircuitDistribution(self.circuit, batch_shape, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args and value.numel():  # PyTorch cannot check nothing
            self._validate_sample(value)
        log_prob = self.circuit.log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return sample(self.circuit, (*sample_shape, *self.batch_shape))

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002
        r"""Lists every observation.

        Arguments:
            expand: Whether to repeat them over the batch.

        Returns:
            The observations, with the shape of the list, of the batch, or of as many ones, and
            of an event.

        Raises:
            NotImplementedError: If there are too many, or values are real.
        """
        if not self.has_enumerate_support:
            raise NotImplementedError(f"expected at most {MOST} observations to enumerate")
        values = enumerate_values(self.circuit)
        ones = (1,) * len(self.batch_shape)
        values = values.view(-1, *ones, *self.event_shape)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values
