r"""Coding with circuits whose parameters come from a context, in integers.

This is plain and defines the bytes. As in :mod:`probnets.coding.reference`, every operation on
floats is exact or correctly rounded: sums of products are integers below :math:`2^{53}`.
"""

__all__ = ["decode_conditional", "encode_conditional"]

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probnets.circuits import (
    Binomial,
    Categorical,
    ConditionalCircuit,
    DiscretisedLogistic,
    IntegerParameters,
    Stage,
    TreeCircuit,
    unflatten_parameters,
)
from probnets.circuits.integertables import (
    integer_logistic,
    integer_softmax,
    log2_binomials,
    octaves,
)

from .errors import unsound_stream
from .rangecoder import RangeDecoder, RangeEncoder
from .reference import _normalise
from .schedule import CODE, ENTER, Schedule
from .tables import TOTAL

_BLOCK = 1024  # rows whose tables are held at once; the bytes depend on it
_SURE = 1 << 27  # log-odds in octaves of 2^-20 beyond which nothing changes


def encode_conditional(circuit: ConditionalCircuit, x: Tensor, context: Tensor) -> bytes:
    r"""Encodes observations given contexts that the decoder has as well.

    All rows share one stream, which does not hold their number. In each block of 1024 rows, and
    in each stage, the rows take turns at every variable.

    Arguments:
        circuit: The circuit, whose inputs are discrete and whose networks are
            :class:`~probnets.circuits.IntegerParameters`.
        x: The observations, integers with shape :math:`(*, D)`, none missing.
        context: The contexts, integers, one for each observation.

    Returns:
        The stream, whose length is close to what :meth:`ConditionalCircuit.log_prob` promises.

    Raises:
        TypeError: If the networks or the inputs are not fit for exact coding.
        ValueError: If observations or contexts do not fit the circuit.

    Example:
        >>> from torch import nn
        >>> from probnets.circuits import Categorical, ParameterNetwork, chain, parameter_count
        >>> template = TreeCircuit(chain(3), Categorical(3, units=2, values=4))
        >>> layers = nn.Sequential(nn.Linear(5, parameter_count(template)))
        >>> network = ParameterNetwork(layers, input_scale=0.1).to_integers()
        >>> circuit = ConditionalCircuit([Stage(template, network)])
        >>> context = torch.randint(10, (100, 5))
        >>> x = circuit.sample(context)
        >>> stream = encode_conditional(circuit, x, context)
        >>> bool((decode_conditional(circuit, stream, context) == x).all())
        True
    """
    values, seen, rows, batch = circuit.prepare(x, context)
    if not bool(seen.all()) or batch != circuit.batch_shape(context):
        raise ValueError(
            "expected observations without missing values and one context for each, got "
            f"{int((~seen).sum())} missing values, and contexts {tuple(context.shape)} "
            f"for x {tuple(x.shape)}"
        )
    encoder = RangeEncoder()
    values = values.long().cpu()

    def code(block: slice, column: int, bounds: Tensor) -> None:
        value = values[block, column, None]
        pairs = bounds.gather(1, torch.cat([value, value + 1], dim=1)).tolist()
        for low, high in pairs:
            encoder.encode(low, high - low)

    _run(circuit, values, rows, code)
    return encoder.finish()


def decode_conditional(circuit: ConditionalCircuit, blob: bytes, context: Tensor) -> Tensor:
    r"""Decodes what :func:`encode_conditional` encoded with the same circuit and contexts.

    The stream has no checksum: damage either raises or gives the values whose stream it is.

    Arguments:
        circuit: The circuit.
        blob: The stream.
        context: The contexts, with batch shape `*`.

    Returns:
        The observations, int64 on the CPU with shape :math:`(*, D)`.

    Raises:
        StreamError: If the stream is not one that the encoder wrote.
        TypeError: If the networks or the inputs are not fit for exact coding.
    """
    batch = circuit.batch_shape(context)
    rows = context.reshape(batch.numel(), *context.shape[len(batch) :])
    values = torch.zeros(len(rows), circuit.variables, dtype=torch.long)
    decoder = RangeDecoder(blob)

    def code(block: slice, column: int, bounds: Tensor) -> None:
        drawn = []
        for bound in bounds.numpy():
            value = int(np.searchsorted(bound, decoder.peek(), side="right")) - 1
            decoder.advance(bound[value], bound[value + 1] - bound[value])
            drawn.append(value)
        values[block, column] = torch.tensor(drawn)

    _run(circuit, values, rows, code)
    if not decoder.canonical():
        raise unsound_stream()
    return values.reshape(*batch, circuit.variables)


class _Tables(NamedTuple):
    r"""The probabilities of each row in units of :math:`2^{-24}`, as float64."""

    root: Tensor  # (B, K)
    sums: Tensor  # (B, G, K, K)
    cumulative: Tensor  # (B, H, X + 1, K)


@torch.no_grad()
def _run(
    circuit: ConditionalCircuit,
    values: Tensor,
    context: Tensor,
    code: Callable[[slice, int, Tensor], None],
) -> None:
    r"""Goes through blocks, stages and variables.

    At each variable `code` takes the bounds of all values, with shape :math:`(B, X + 1)`, and
    sees to it that `values` holds those of the block.
    """
    networks = [_exact(number, stage) for number, stage in enumerate(circuit.stages)]
    for begin in range(0, len(values), _BLOCK):
        block, start = slice(begin, begin + _BLOCK), 0
        for stage, network in zip(circuit.stages, networks, strict=True):
            earlier = values[block, :start].to(context.device)
            flat = network.integers(context[block], earlier).cpu()
            tables = _tables(stage.template, flat, network.fraction_bits)
            _run_stage(stage.template, tables, values[block], start, _within(code, block))
            start += stage.variables


def _within(
    code: Callable[[slice, int, Tensor], None], block: slice
) -> Callable[[int, Tensor], None]:
    return lambda column, bounds: code(block, column, bounds)


def _run_stage(
    template: TreeCircuit,
    tables: _Tables,
    values: Tensor,
    start: int,
    code: Callable[[int, Tensor], None],
) -> None:
    r"""Goes through the variables of a stage, whose first column is `start`."""
    room, steps = _room(tables.cumulative)
    K, rows = template.units, torch.arange(len(values))
    bits = 29 - (K - 1).bit_length()
    prior: dict[int, Tensor] = {}  # what a region's unit is, seen from above
    below: dict[int, Tensor] = {}  # what is known of it from below

    def belief(region: int) -> Tensor:
        if region not in below:
            return prior[region]
        return _normalise(prior[region] * below[region], bits)

    def learn(region: int, message: Tensor) -> None:
        known = below.get(region)
        below[region] = _normalise(message if known is None else message * known, bits)

    schedule = Schedule.depth_first(template.tree, None)
    for kind, r, parent, variable, group, *_ in schedule.operations.tolist():
        if kind == ENTER and parent < 0:
            prior[r] = _normalise(tables.root, bits)
        elif kind == ENTER:
            message = belief(parent)[:, None] @ tables.sums[:, group]
            prior[r] = _normalise(message[:, 0], bits)
        elif kind == CODE:
            weights, table = belief(r), tables.cumulative[:, group]  # (B, X + 1, K)
            total = weights.sum(-1, keepdim=True) * TOTAL
            share = (table @ weights[..., None])[..., 0] / total
            column = start + variable
            code(column, (torch.floor(share * room) + steps).long())
            value = values[:, column]
            learn(r, table[rows, value + 1] - table[rows, value])
        else:
            message = tables.sums[:, group] @ below.pop(r)[..., None]
            learn(parent, message[..., 0])


def _room(cumulative: Tensor) -> tuple[float, Tensor]:
    r"""Returns the quantiles that are free, and those that each value has for itself."""
    values = cumulative.shape[2] - 1
    return float(TOTAL - values), torch.arange(values + 1, dtype=torch.float64)


def _exact(number: int, stage: Stage) -> IntegerParameters:
    r"""Returns the network of a stage if it is one in integers, else tells how to get it."""
    network = stage.network
    if not isinstance(network, IntegerParameters):
        raise TypeError(
            f"expected IntegerParameters to code with, got {type(network).__name__} in stage "
            f"{number}; export it by ParameterNetwork.to_integers, or by "
            "IntegerParameters(IntegerNetwork.from_module(...))"
        )
    if not 1 <= network.fraction_bits <= 16:
        raise ValueError(
            f"expected parameters with 1 to 16 fraction bits, got {network.fraction_bits} in "
            f"stage {number}"
        )
    return network


def _tables(template: TreeCircuit, flat: Tensor, fraction_bits: int) -> _Tables:
    r"""Turns integer parameters into integer probabilities."""
    parts = {name: p.numpy() for name, p in unflatten_parameters(template, flat).items()}
    root = np.diff(integer_softmax(octaves(parts["root_logits"], fraction_bits)))
    sums = np.diff(integer_softmax(octaves(parts["sum_logits"], fraction_bits)))
    cumulative = _cumulative(template, parts, fraction_bits).swapaxes(-1, -2)
    tables = root, sums, np.ascontiguousarray(cumulative)
    return _Tables(*(torch.from_numpy(table.astype(np.float64)) for table in tables))


def _cumulative(
    template: TreeCircuit, parts: dict[str, np.ndarray], fraction_bits: int
) -> np.ndarray:
    r"""Computes the cumulative input distributions, with shape (B, H, K, X + 1)."""
    inputs = template.inputs
    known = isinstance(inputs, Categorical | Binomial | DiscretisedLogistic)
    if not known or inputs.values > TOTAL >> 8:
        raise TypeError(
            "expected inputs of the library's discrete classes with at most "
            f"{TOTAL >> 8} values, got {inputs}"
        )
    if isinstance(inputs, DiscretisedLogistic):
        return integer_logistic(
            parts["inputs.mean"],
            parts["inputs.log_scale"],
            inputs.values,
            fraction_bits=fraction_bits,
        )
    logits = octaves(parts["inputs.logits"], fraction_bits)
    if isinstance(inputs, Binomial):
        odds = logits.clip(-_SURE, _SURE)[..., None]
        logits = odds * np.arange(inputs.values) + log2_binomials(inputs.values - 1)
    else:
        logits = logits.swapaxes(-1, -2)  # (B, H, X, K) -> (B, H, K, X)
    return integer_softmax(logits, floor=1)
