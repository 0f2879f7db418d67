r"""Circuits whose parameters come from a context."""

__all__ = [
    "ConditionalCircuit",
    "ParameterNetwork",
    "Stage",
    "flatten_parameters",
    "parameter_count",
    "unflatten_parameters",
]

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .circuit import TreeCircuit
from .inputs import Discrete
from .integers import IntegerNetwork, IntegerParameters


def parameter_count(template: TreeCircuit) -> int:
    r"""Counts the scalars `P` in the parameters of a circuit.

    Arguments:
        template: The circuit.

    Example:
        >>> from probnets.circuits import DiscretisedLogistic, chain
        >>> parameter_count(TreeCircuit(chain(1), DiscretisedLogistic(1, units=4, values=256)))
        12
    """
    return sum(parameter.numel() for parameter in template.parameters())


def flatten_parameters(template: TreeCircuit) -> Tensor:
    r"""Lays the parameters of a circuit out in one vector.

    They come in the order of ``named_parameters()``, each in row-major order: ``root_logits``
    with shape :math:`(K)`, ``sum_logits`` :math:`(G, K, K)`, then those of the inputs. As the
    bias of a network's last layer the vector makes the network start from this circuit.

    Arguments:
        template: The circuit.

    Returns:
        The parameters, detached, with shape :math:`(P,)`.
    """
    return torch.cat([parameter.detach().flatten() for parameter in template.parameters()])


def unflatten_parameters(template: TreeCircuit, flat: Tensor) -> dict[str, Tensor]:
    r"""Undoes :func:`flatten_parameters`.

    Arguments:
        template: The circuit.
        flat: The parameters, with shape :math:`(*, P)`.

    Returns:
        Each parameter by its name, with its shape after `*`.

    Raises:
        ValueError: If there are more or fewer than the circuit has.
    """
    named = dict(template.named_parameters())
    sizes = [parameter.numel() for parameter in named.values()]
    if flat.ndim == 0 or flat.shape[-1] != sum(sizes):
        raise ValueError(f"expected parameters (*, {sum(sizes)}), got {tuple(flat.shape)}")
    parts = zip(named.items(), flat.split(sizes, dim=-1), strict=True)
    return {name: part.unflatten(-1, p.shape) for (name, p), part in parts}


class ParameterNetwork(nn.Module):
    r"""Creates the network of a stage from layers that take one vector.

    Context and earlier values are flattened, joined in this order and scaled.

    Arguments:
        layers: The layers, with as many inputs as there are numbers in a context and in the
            values of the earlier stages, and :math:`P` outputs.
        input_scale: What the inputs are multiplied by: one number, or one for each input.

    Example:
        >>> network = ParameterNetwork(nn.Linear(5, 12), input_scale=1 / 255)
        >>> network(torch.randint(256, (7, 3)), torch.randint(256, (7, 2))).shape
        torch.Size([7, 12])
    """

    input_scale: Tensor  # () or (D,)

    def __init__(
        self, layers: nn.Module, *, input_scale: float | Sequence[float] | Tensor = 1.0
    ) -> None:
        super().__init__()
        like = next(layers.parameters(), torch.empty(0))
        scale = torch.as_tensor(input_scale, dtype=like.dtype, device=like.device)
        self.layers = layers
        self.register_buffer("input_scale", scale)

    def forward(self, context: Tensor, earlier: Tensor) -> Tensor:
        scale = self.input_scale
        parts = [context.flatten(1).to(scale.dtype), earlier.to(scale.dtype)]
        return self.layers(torch.cat(parts, dim=1) * scale)

    def to_integers(
        self,
        context: Tensor | None = None,
        earlier: Tensor | None = None,
        *,
        input_bits: int = 16,
        activation_bits: int = 15,
        fraction_bits: int = 12,
    ) -> IntegerParameters:
        r"""Exports the network in integers, for exact coding.

        Arguments:
            context: Contexts of the kind to come, with shape :math:`(B, \dots)`, which tell how
                large activations become. By default the largest that could be are assumed.
            earlier: Values of the earlier stages that go with them.
            input_bits: As for :meth:`~probnets.circuits.IntegerNetwork.from_module`.
            activation_bits: Likewise.
            fraction_bits: Likewise.

        Raises:
            TypeError: If the layers are not an ``nn.Sequential`` that integers can follow.
            ValueError: If the numbers do not fit.
        """
        examples = context
        if context is not None:
            none = context.new_zeros(len(context), 0)
            parts = [context.flatten(1), none if earlier is None else earlier]
            examples = torch.cat([part.double() for part in parts], dim=1)
        return IntegerParameters(
            IntegerNetwork.from_module(
                self.layers,
                input_scale=self.input_scale,
                examples=examples,
                input_bits=input_bits,
                activation_bits=activation_bits,
                fraction_bits=fraction_bits,
            )
        )


class Stage(nn.Module):
    r"""Creates one factor of a conditional circuit: a circuit and what gives its parameters.

    Arguments:
        template: The circuit over the variables of this stage. Its tree and its input family
            count; its parameters are replaced for each row, and are kept as a frozen copy.
        network: Gives the parameters. It is called as ``network(context, earlier)``, with the
            contexts, of shape :math:`(B, \dots)`, and the values of all earlier stages as
            floats, of shape :math:`(B, D')`, and returns a tensor of shape :math:`(B, P)`, laid
            out as by :func:`flatten_parameters`.
    """

    def __init__(self, template: TreeCircuit, network: nn.Module) -> None:
        super().__init__()
        self.template = copy.deepcopy(template).requires_grad_(requires_grad=False)
        self.network = network

    @property
    def variables(self) -> int:
        r"""The number of variables of this stage."""
        return self.template.tree.variables

    def parameters_for(self, context: Tensor, earlier: Tensor) -> dict[str, Tensor]:
        r"""Computes the parameters of each row by name, each after a batch dimension."""
        flat = self.network(context, earlier.to(self.template.root_logits.dtype))
        expected = len(context), parameter_count(self.template)
        if flat.shape != expected:
            raise ValueError(
                f"expected a network that returns {expected}, got {tuple(flat.shape)}"
            )
        return unflatten_parameters(self.template, flat)

    def log_prob(self, x: Tensor, seen: Tensor, context: Tensor, earlier: Tensor) -> Tensor:
        r"""Computes the log-likelihood of prepared rows, with shape :math:`(B,)`.

        Rows without an observed value get exactly zero, whatever their context.

        Arguments:
            x: The values of this stage, zero where missing.
            seen: Which of them are observed.
            context: The contexts.
            earlier: The values of the earlier stages.
        """
        any_seen = seen.any(dim=1)
        if not bool(any_seen.any()):  # no network has to run
            return x.new_zeros(len(x), dtype=self.template.root_logits.dtype)
        parts = self.parameters_for(context, earlier)

        def one(circuit: TreeCircuit, x: Tensor, seen: Tensor) -> Tensor:
            return circuit.log_prob_torch(x[None], seen[None])[0]

        return _by_row(self.template, parts, one, x, seen).masked_fill(~any_seen, 0.0)

    @torch.no_grad()
    def sample(
        self, context: Tensor, earlier: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""Draws the values of this stage for each row, with shape :math:`(B, D)`.

        Arguments:
            context: The contexts.
            earlier: The values of the earlier stages.
            generator: The source of randomness.
        """
        template, rows = self.template, torch.arange(len(context), device=context.device)
        if not len(context):
            return template.root_logits.new_zeros(0, self.variables)
        parts = self.parameters_for(context, earlier)
        root = _by_row(template, parts, TreeCircuit.log_root).exp()
        sums = _by_row(template, parts, TreeCircuit.log_sums).exp()  # (B, G, K, K)

        states = [torch.multinomial(root, 1, generator=generator)[:, 0]]
        pairs = zip(template.tree.parent.tolist(), template.tree.sum_group.tolist(), strict=True)
        for parent, group in list(pairs)[1:]:
            edges = sums[rows, group, states[parent]]
            states.append(torch.multinomial(edges, 1, generator=generator)[:, 0])
        unit = torch.stack(states, dim=1)[:, template.region]  # (B, D)

        if not isinstance(template.inputs, Discrete):
            return _by_row(template, parts, _draw_inputs(generator), unit)
        table = _by_row(template, parts, _log_table).exp()  # (B, H, X, K)
        groups = template.tree.input_group.tolist()
        draws = [
            torch.multinomial(table[rows, g, :, u], 1, generator=generator)
            for g, u in zip(groups, unit.T, strict=True)
        ]
        return torch.cat(draws, dim=1)


class ConditionalCircuit(nn.Module):
    r"""Creates a chain of circuits whose parameters come from a context.

    .. math:: p(x \mid y) = \prod_s p_s(x_s \mid y, x_{<s})

    Each stage is a tree circuit over its own block of variables, with sums and inputs that a
    network computes from the context :math:`y` and from the values of the stages before. Given
    these a stage is smooth and decomposable: all queries over its own variables are exact. With
    one stage this is a conditional sum-product network; with stages of one variable it is
    autoregressive.

    A value may be missing only if no later stage is observed in that row, since later networks
    need it. Values are missing where they are NaN or ``observed`` is false.

    References:
        | Conditional Sum-Product Networks: Imposing Structure on Deep Probabilistic
        | Architectures (Shao et al., 2020)
        | https://arxiv.org/abs/1905.08550

    Arguments:
        stages: The stages. The columns of an observation are their variables in a row.
        context_dims: The number of dimensions of one context.

    Example:
        >>> from probnets.circuits import Categorical, chain
        >>> template = TreeCircuit(chain(3), Categorical(3, units=2, values=4))
        >>> first = Stage(template, ParameterNetwork(nn.Linear(5, parameter_count(template))))
        >>> second = Stage(template, ParameterNetwork(nn.Linear(8, parameter_count(template))))
        >>> circuit = ConditionalCircuit([first, second])
        >>> context = torch.randn(7, 5)
        >>> x = circuit.sample(context)
        >>> x.shape, circuit.log_prob(x, context).shape
        (torch.Size([7, 6]), torch.Size([7]))
    """

    def __init__(self, stages: Sequence[Stage], *, context_dims: int = 1) -> None:
        super().__init__()
        if not stages or context_dims < 0:
            raise ValueError(
                "expected one stage or more and contexts of no less than 0 dimensions, "
                f"got {len(stages)} and {context_dims}"
            )
        self.blocks = nn.ModuleList(stages)
        self.context_dims = context_dims

    @property
    def stages(self) -> list[Stage]:
        r"""The stages in order."""
        return [block for block in self.blocks if isinstance(block, Stage)]

    @property
    def sizes(self) -> list[int]:
        r"""The number of variables of each stage."""
        return [stage.variables for stage in self.stages]

    @property
    def variables(self) -> int:
        r"""The number of variables :math:`D` of all stages."""
        return sum(self.sizes)

    def extra_repr(self) -> str:
        return f"variables={self.variables}, context_dims={self.context_dims}"

    def prepare(
        self, x: Tensor, context: Tensor, observed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
        r"""Checks observations and contexts, and flattens their batch dimensions.

        Arguments:
            x: The observations, with shape :math:`(*, D)`.
            context: The contexts, with a batch shape that broadcasts with `*`.
            observed: Which values are observed, with a shape that expands to that of `x`.

        Returns:
            Values with shape :math:`(B, D)`, zero where missing; which of them are observed;
            contexts with shape :math:`(B, \dots)`; and the common batch shape.

        Raises:
            ValueError: If shapes do not fit, an observed value is out of range, or a value is
                missing that a later stage needs.
        """
        if x.ndim == 0 or x.shape[-1] != self.variables:
            raise ValueError(f"expected x with shape (*, {self.variables}), got {tuple(x.shape)}")
        batch, own = x.shape[:-1], self.batch_shape(context)
        try:
            batch = torch.broadcast_shapes(batch, own)
        except RuntimeError:
            raise ValueError(
                f"expected contexts whose batch broadcasts with {tuple(batch)}, got {tuple(own)} "
                f"of contexts of {self.context_dims} dimensions"
            ) from None

        mask = torch.ones_like(x, dtype=torch.bool) if observed is None else observed
        try:
            mask = mask.expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"expected a mask that expands to {tuple(x.shape)}, got {tuple(mask.shape)}"
            ) from None
        blocks = zip(x.split(self.sizes, dim=-1), mask.split(self.sizes, dim=-1), strict=True)
        parts = [
            stage.template.prepare(*block)[:2]
            for stage, block in zip(self.stages, blocks, strict=True)
        ]
        flat = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        shape = *batch, self.variables
        values, seen = (
            part.reshape(x.shape).expand(shape).reshape(-1, self.variables) for part in flat
        )
        self._require_earlier(seen)

        event = context.shape[len(own) :]
        contexts = context.expand(*batch, *event).reshape(batch.numel(), *event)
        return values, seen, contexts, batch

    def log_prob(self, x: Tensor, context: Tensor, observed: Tensor | None = None) -> Tensor:
        r"""Computes the log-likelihood of observations given contexts.

        All rows go through the passes of PyTorch together, each with parameters of its own.

        Arguments:
            x: The observations :math:`x`, with shape :math:`(*, D)`.
            context: The contexts :math:`y`, with ``context_dims`` dimensions after a batch shape
                that broadcasts with `*`.
            observed: Which values are observed. By default all that are not NaN.

        Returns:
            The log-likelihoods, with the common batch shape.

        Raises:
            ValueError: As for :meth:`prepare`.
        """
        x, seen, context, batch = self.prepare(x, context, observed)
        total, start = x.new_zeros(()), 0
        for stage in self.stages:
            own = slice(start, start + stage.variables)
            total = total + stage.log_prob(x[:, own], seen[:, own], context, x[:, :start])
            start = own.stop
        return total.reshape(batch)

    def sample(self, context: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        r"""Draws one observation for each context, stage after stage.

        Arguments:
            context: The contexts, with ``context_dims`` dimensions after the batch shape `*`.
            generator: The source of randomness.

        Returns:
            The observations, with shape :math:`(*, D)`; integers if all inputs are discrete.
        """
        batch = self.batch_shape(context)
        rows = context.reshape(batch.numel(), *context.shape[len(batch) :])
        x = rows.new_zeros(len(rows), 0, dtype=torch.long)
        for stage in self.stages:
            drawn = stage.sample(rows, x, generator=generator)
            x = torch.cat([x, drawn], dim=1)
        return x.reshape(*batch, self.variables)

    @torch.no_grad()
    def at(self, context: Tensor, earlier: Sequence[float] | Tensor = ()) -> TreeCircuit:
        r"""Returns the circuit of one stage for one context, for every query there is.

        Arguments:
            context: One context, without batch dimensions.
            earlier: The values of all earlier stages. Their number tells which stage is meant;
                by default it is the first.

        Returns:
            A circuit over the variables of the stage, with parameters of its own.

        Raises:
            ValueError: If the values are not those of the first stages, all of them observed.
        """
        given = torch.as_tensor(earlier, device=context.device).flatten()
        starts = [sum(self.sizes[:s]) for s in range(len(self.stages))]
        if len(self.batch_shape(context)) or len(given) not in starts or bool(given.isnan().any()):
            raise ValueError(
                f"expected one context of {self.context_dims} dimensions and {starts} earlier "
                f"values, none missing, got {tuple(context.shape)} and {given.tolist()}"
            )
        stage = self.stages[starts.index(len(given))]
        circuit = copy.deepcopy(stage.template)
        parts = stage.parameters_for(context[None], given[None])
        for name, parameter in circuit.named_parameters():
            parameter.copy_(parts[name][0])
        return circuit.requires_grad_()

    @torch.no_grad()
    def bits_per_dimension(
        self, x: Tensor, context: Tensor, observed: Tensor | None = None
    ) -> float:
        r"""Computes the mean ideal code length per observed value, in bits.

        Arguments:
            x: The observations, as in :meth:`log_prob`.
            context: The contexts.
            observed: Which values are observed.
        """
        seen = self.prepare(x, context, observed)[1]
        if not bool(seen.any()):
            raise ValueError("expected one observed value or more, got none")
        total = -self.log_prob(x, context, observed).double().sum().item()
        return total / (int(seen.sum()) * math.log(2))

    def batch_shape(self, context: Tensor) -> torch.Size:
        r"""Returns the shape of contexts before the dimensions of a single one."""
        if context.ndim < self.context_dims:
            raise ValueError(
                f"expected contexts of {self.context_dims} dimensions or more, "
                f"got {tuple(context.shape)}"
            )
        return context.shape[: context.ndim - self.context_dims]

    def _require_earlier(self, seen: Tensor) -> None:
        blocks = seen.split(self.sizes, dim=1)
        whole = seen.new_ones(len(seen))
        for number, block in enumerate(blocks):
            bad = block.any(dim=1) & ~whole
            if bool(bad.any()):
                raise ValueError(
                    f"expected all values of the stages before stage {number} where it is "
                    f"observed, got missing ones in row {int(bad.nonzero()[0])}; leave the later "
                    "values out as well, or model them in one stage"
                )
            whole = whole & block.all(dim=1)


class _Method(nn.Module):
    r"""Is a function of a circuit as a module, whose parameters can be replaced."""

    def __init__(self, circuit: TreeCircuit, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.circuit = circuit
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self.circuit, *args)


def _by_row(
    template: TreeCircuit,
    parts: dict[str, Tensor],
    function: Callable[..., Tensor],
    *args: Tensor,
) -> Tensor:
    r"""Calls a function of a circuit for all rows at once, each with its own parameters."""
    method = _Method(template, function)

    def one(parts: dict[str, Tensor], *args: Tensor) -> Tensor:
        named = {f"circuit.{name}": part for name, part in parts.items()}
        return torch.func.functional_call(method, named, args)

    return torch.func.vmap(one, randomness="different")(parts, *args)


def _log_table(circuit: TreeCircuit) -> Tensor:
    assert isinstance(circuit.inputs, Discrete)
    return circuit.inputs.log_table()


def _draw_inputs(generator: torch.Generator | None) -> Callable[..., Tensor]:
    def draw(circuit: TreeCircuit, unit: Tensor) -> Tensor:
        return circuit.inputs.sample(unit[None], circuit.input_group, generator=generator)[0]

    return draw
