r"""Tests for the probnets.coding.conditional module."""

import math

import numpy as np
import pytest
import torch
from circuit_cases import TREES, randomise
from torch import nn

from probnets.circuits import (
    Bernoulli,
    Binomial,
    Categorical,
    ConditionalCircuit,
    DiscretisedLogistic,
    Gaussian,
    IntegerNetwork,
    IntegerParameters,
    ParameterNetwork,
    Stage,
    TreeCircuit,
    chain,
    parameter_count,
)
from probnets.coding import StreamError, decode_conditional, encode_conditional
from probnets.coding.conditional import _tables
from probnets.coding.reference import encode_rows_torch
from probnets.coding.tables import TOTAL, CodeTables

FAMILIES = {
    "Categorical": lambda n: Categorical(n, 3, 5),
    "Binomial": lambda n: Binomial(n, 3, 5),
    "Bernoulli": lambda n: Bernoulli(n, 3),
    "DiscretisedLogistic": lambda n: DiscretisedLogistic(n, 3, 5),
}


def template_on(name, family="Categorical"):
    tree = TREES[name]()
    return randomise(TreeCircuit(tree, FAMILIES[family](tree.inputs)))


def conditional(*templates, context=2):
    r"""Draws a stage for each template, with an integer network of one hidden layer."""
    stages, inputs = [], context
    for template in templates:
        P = parameter_count(template)
        last = nn.Linear(8, P)
        with torch.no_grad():
            last.bias.normal_(std=2.0)
        layers = nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), last)
        network = ParameterNetwork(layers, input_scale=0.1).to_integers(input_bits=8)
        stages.append(Stage(template.double(), network))
        inputs += template.tree.variables
    return ConditionalCircuit(stages)


def contexts(*batch):
    return torch.randint(30, (*batch, 2))


def ideal_bytes(circuit, x, context):
    return -circuit.log_prob(x, context).double().sum().item() / math.log(2) / 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["one variable", "one region", "chain", "any, tied", "quad, odd"])
def test_round_trip(name, family):
    circuit = conditional(template_on(name, family), template_on("one variable", "Binomial"))
    context = contexts(60)
    x = circuit.sample(context)
    stream = encode_conditional(circuit, x, context)
    found = decode_conditional(circuit, stream, context)
    assert found.dtype == torch.int64
    assert found.tolist() == x.tolist()

    ideal = ideal_bytes(circuit, x, context)
    assert abs(len(stream) - ideal) < 0.002 * ideal + 2


def test_cost_of_a_mixture_of_logistics():
    template = TreeCircuit(chain(1), DiscretisedLogistic(1, 4, 256))
    last = nn.Linear(16, parameter_count(template))
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0, 1, -1, 0, 40, 90, 150, 220, 1.0, 2, 3, 0.0]))
    layers = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), last)
    examples = contexts(100)
    network = ParameterNetwork(layers, input_scale=0.1).to_integers(examples)
    circuit = ConditionalCircuit([Stage(template.double(), network)])
    context = contexts(3000)  # more than two blocks
    x = circuit.sample(context)
    stream = encode_conditional(circuit, x, context)
    assert decode_conditional(circuit, stream, context).tolist() == x.tolist()
    ideal = ideal_bytes(circuit, x, context)
    assert abs(len(stream) - ideal) < 0.001 * ideal + 1


def test_values_of_no_chance_have_a_code():
    circuit = conditional(template_on("binary", "DiscretisedLogistic"))
    context = contexts(20)
    for value in (0, 2, 4):
        x = torch.full((20, 4), value)
        stream = encode_conditional(circuit, x, context)
        assert decode_conditional(circuit, stream, context).tolist() == x.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_are_those_of_the_circuit(family):
    template = template_on("any, tied", family)
    flat = torch.randint(-(3 << 12), 3 << 12, (4, parameter_count(template)))
    tables = _tables(template, flat, 12)
    circuit = conditional(template)
    for n in range(4):
        network = _constant(flat[n])
        stage = Stage(template.double(), network)
        ordinary = ConditionalCircuit([stage]).at(torch.zeros(2))
        expected = CodeTables.from_circuit(ordinary)
        own = [part[n].numpy().astype(np.int32) for part in tables]
        CodeTables(circuit.stages[0].template.tree, *own)  # which checks them
        others = expected.root, expected.sums, expected.cumulative
        for found, other in zip(own, others, strict=True):
            np.testing.assert_allclose(found, other, rtol=0, atol=2e-5 * TOTAL)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TREES)
def test_one_row_costs_what_an_ordinary_circuit_does(name, family):
    template = template_on(name, family)
    flat = torch.randint(-(3 << 12), 3 << 12, (parameter_count(template),))
    circuit = ConditionalCircuit([Stage(template, _constant(flat))])
    context = torch.zeros(1, 2)
    own = [part[0].numpy().astype(np.int32) for part in _tables(template, flat[None], 12)]
    tables = CodeTables(template.tree, *own)
    for _ in range(3):
        x = circuit.sample(context)
        stream = encode_conditional(circuit, x, context)
        assert [stream] == encode_rows_torch(tables, x.numpy())


def _constant(flat):
    network = IntegerNetwork(
        [np.zeros((len(flat), 2), dtype=np.int16)],
        [flat.numpy()],
        [np.zeros(len(flat), dtype=np.int64)],
        [],
        input_bits=8,
        fraction_bits=12,
    )
    return IntegerParameters(network)


def test_golden():
    template = TreeCircuit(chain(2), Categorical(2, units=2, values=3))
    flat = torch.arange(parameter_count(template)) * 997 % 8192
    circuit = ConditionalCircuit([Stage(template, _constant(flat))])
    x = torch.arange(24).view(12, 2) * 7 % 3
    stream = encode_conditional(circuit, x, torch.zeros(12, 2))
    assert stream.hex() == "78890490c8"
    assert decode_conditional(circuit, stream, torch.zeros(12, 2)).tolist() == x.tolist()


def test_damage():
    circuit = conditional(template_on("chain"), template_on("one variable"))
    context = contexts(20)
    x = circuit.sample(context)
    stream = encode_conditional(circuit, x, context)
    generator = np.random.default_rng(0)
    damaged = [stream[:n] for n in range(0, len(stream), 3)]
    damaged += [stream + b"\0", stream + b"\1", b"\xff" * 99, b"", generator.bytes(50)]
    for _ in range(60):
        bad = bytearray(stream)
        bad[generator.integers(len(bad))] ^= 1 << int(generator.integers(8))
        damaged.append(bytes(bad))
    caught = 0
    for bad in damaged:
        try:
            found = decode_conditional(circuit, bad, context)
        except StreamError:
            caught += 1
        else:
            assert found.shape == x.shape
            assert 0 <= found.min() <= found.max() <= 4
            assert encode_conditional(circuit, found, context) == bad
    assert caught > 0.5 * len(damaged)  # without a checksum, some are streams of other values

    other = conditional(template_on("chain"), template_on("one variable"))
    with pytest.raises(StreamError, match="a stream of this model"):
        decode_conditional(other, stream, context)


def test_shapes():
    circuit = conditional(template_on("binary"))
    context = contexts(3, 2)
    x = circuit.sample(context)
    stream = encode_conditional(circuit, x.double(), context.float())
    assert decode_conditional(circuit, stream, context).tolist() == x.tolist()

    one = encode_conditional(circuit, x[0, 0], context[0, 0])
    assert decode_conditional(circuit, one, context[0, 0]).tolist() == x[0, 0].tolist()
    assert encode_conditional(circuit, x[:0], context[:0]) == b""
    assert decode_conditional(circuit, b"", context[:0]).shape == (0, 2, 4)
    with pytest.raises(StreamError):
        decode_conditional(circuit, b"\1", context[:0])


def test_rejects_what_has_no_code():
    template, context = template_on("one variable"), contexts(2)
    layers = nn.Sequential(nn.Linear(2, parameter_count(template)))
    floats = ConditionalCircuit([Stage(template, ParameterNetwork(layers))])
    with pytest.raises(TypeError, match="got ParameterNetwork in stage 0; export it by"):
        encode_conditional(floats, torch.zeros(2, 1), context)
    with pytest.raises(TypeError, match="got ParameterNetwork in stage 0; export it by"):
        decode_conditional(floats, b"", context)

    gaussian = TreeCircuit(chain(1), Gaussian(1, 2))
    with pytest.raises(TypeError, match="the library's discrete classes"):
        encode_conditional(conditional(gaussian), torch.zeros(2, 1), context)
    coarse = ParameterNetwork(layers).to_integers(fraction_bits=0)
    with pytest.raises(ValueError, match="expected parameters with 1 to 16 fraction bits, got 0"):
        encode_conditional(
            ConditionalCircuit([Stage(template, coarse)]), torch.zeros(2, 1), context
        )


def test_rejects_observations():
    circuit = conditional(template_on("one variable"))
    with pytest.raises(ValueError, match="got 1 missing values"):
        encode_conditional(circuit, torch.tensor([[0.0], [math.nan]]), contexts(2))
    with pytest.raises(ValueError, match="one context for each"):
        encode_conditional(circuit, torch.zeros(2, 1), contexts(1))
    with pytest.raises(ValueError, match="expected integers from 0 to 4"):
        encode_conditional(circuit, torch.full((2, 1), 5), contexts(2))
    with pytest.raises(ValueError, match="expected integers of 8 bits"):
        encode_conditional(circuit, torch.zeros(2, 1), 0.5 + contexts(2))


def test_device(device):
    circuit = conditional(template_on("chain"), template_on("one variable"))
    context = contexts(50)
    x = circuit.sample(context)
    stream = encode_conditional(circuit, x, context)
    circuit.to(device)
    assert encode_conditional(circuit, x.to(device), context.to(device)) == stream
    assert decode_conditional(circuit, stream, context.to(device)).tolist() == x.tolist()
