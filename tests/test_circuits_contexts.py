r"""Tests for networks of circuits whose contexts are images."""

import math
from typing import NamedTuple

import pytest
import torch
from circuit_cases import TREES, assert_exact, randomise
from torch import Tensor
from torch.testing import assert_close

from probnets.circuits import (
    Binomial,
    Categorical,
    ConditionalCircuit,
    EMSettings,
    Gaussian,
    ImageContext,
    Stage,
    TreeCircuit,
    conditional_log_prob,
    conditional_sample,
    enumerate_values,
    fit,
    flatten_parameters,
    most_probable,
    parameter_count,
    quad_tree,
)
from probnets.layers import Backbone, LatentRead

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {
    "Categorical": lambda n: Categorical(n, 2, 3),
    "Binomial": lambda n: Binomial(n, 2, 3),
    "Gaussian": lambda n: Gaussian(n, 2),
}


def backbone(**options):
    return Backbone("C-T", in_channels=1, width=8, stem=1, **options)


def template_on(name="binary", family="Categorical"):
    tree = TREES[name]()
    return randomise(TreeCircuit(tree, FAMILIES[family](tree.inputs)))


def reader(features=16):
    return LatentRead(features, 3, heads=2, out_features=5)


def shaken(network):
    with torch.no_grad():
        network.head.weight.normal_()
    return network


def images(*batch):
    return torch.rand(*batch, 1, 8, 8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("read", [None, reader], ids=["mean", "read"])
def test_starts_as_the_template(family, read):
    template = template_on(family=family)
    network = ImageContext(backbone(), template, reader=read and read())
    x = torch.randint(3, (6, 4)).float()
    x[2, 1] = math.nan

    flat = network(100 * images(6), torch.zeros(6, 0))
    assert torch.equal(flat, flatten_parameters(template).expand(6, -1))
    circuit = ConditionalCircuit([Stage(template, network)], context_dims=3)
    assert_close(circuit.log_prob(x, 100 * images(6)), template.log_prob(x))
    assert_close(circuit.at(images()).log_prob(x), template.log_prob(x))


def test_second_stage_starts_as_its_template():
    first, second = template_on(), template_on("chain")
    stages = [
        Stage(first, ImageContext(backbone(), first)),
        Stage(second, ImageContext(backbone(), second, earlier=4)),
    ]
    circuit = ConditionalCircuit(stages, context_dims=3)
    x = torch.randint(3, (5, 8))
    expected = first.log_prob(x[:, :4]) + second.log_prob(x[:, 4:])
    assert_close(circuit.log_prob(x, images(5)), expected)
    assert circuit.sample(images(5)).shape == (5, 8)


@pytest.mark.parametrize("read", [None, reader], ids=["mean", "read"])
def test_parameters_are_linear_in_features(read):
    template, own = template_on(), read and read()
    network = shaken(ImageContext(backbone(), template, earlier=2, reader=own))
    context, earlier = images(3), torch.tensor([[0, 2], [1, 1], [2, 0]])
    maps = network.backbone.maps(context)[-1]
    assert maps.shape == (3, 16, 4, 4)
    if own is None:
        features = maps.mean(dim=(2, 3))
    else:
        features = own(maps.flatten(2).transpose(1, 2)).reshape(3, 15)

    weight, bias = network.head.weight, network.head.bias
    expected = features @ weight[:, :-2].T + earlier.float() @ weight[:, -2:].T + bias
    found = network(context, earlier)
    assert found.shape == (3, parameter_count(template))
    assert_close(found, expected)


@pytest.mark.parametrize("read", [None, reader], ids=["mean", "read"])
def test_images_and_earlier_values_matter(read):
    first, second = template_on(), template_on()
    stages = [
        Stage(first, shaken(ImageContext(backbone(), first, reader=read and read()))),
        Stage(second, shaken(ImageContext(backbone(), second, earlier=4, reader=read and read()))),
    ]
    circuit = ConditionalCircuit(stages, context_dims=3)
    x, context = torch.randint(3, (5, 8)), images(5)
    whole = circuit.log_prob(x, context)
    rows = [circuit.log_prob(row, image) for row, image in zip(x, context, strict=True)]
    assert_close(whole, torch.stack(rows))
    assert (circuit.log_prob(x, images(5)) - whole).abs().min() > 1e-4

    a, b = (flatten_parameters(circuit.at(context[0], row[:4])) for row in x[:2])
    assert not torch.allclose(a, b)
    parts = circuit.at(context[0]).log_prob(x[0, :4]), circuit.at(context[0], x[0, :4])
    assert_close(parts[0] + parts[1].log_prob(x[0, 4:]), whole[0])


def test_sums_to_one():
    template = template_on("any, tied")
    network = shaken(ImageContext(backbone(dtype=torch.float64), template.double()))
    circuit = ConditionalCircuit([Stage(template, network)], context_dims=3)
    prob = circuit.log_prob(enumerate_values(template), images(3, 1).double()).exp()
    assert prob.shape == (3, 3**5)
    assert_exact(prob.sum(dim=-1).detach(), torch.ones(3).double())


def test_every_weight_learns():
    template = template_on()
    network = shaken(ImageContext(backbone(), template, reader=reader()))
    circuit = ConditionalCircuit([Stage(template, network)], context_dims=3)
    circuit.log_prob(torch.randint(3, (5, 4)), images(5)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in circuit.stages[0].template.parameters())


def test_bytes_are_contexts():
    template = template_on()
    network = shaken(ImageContext(backbone(), template))
    x = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    none = torch.zeros(3, 0)
    assert torch.equal(network(x, none), network(x.float(), none))


def test_head_is_of_the_type_of_the_backbone():
    network = ImageContext(backbone(dtype=torch.float64), template_on())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}


# Learning


class Learned(NamedTuple):
    r"""Is a circuit of lower halves given upper halves, and what it has not seen."""

    template: TreeCircuit
    circuit: ConditionalCircuit
    upper: Tensor
    lower: Tensor


def halves(count, seed):
    r"""Draws binary images whose lower half is the upper one, shifted and with noise."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.randint(2, (count, 2, 4), generator=generator).repeat_interleave(2, dim=1)
    noise = torch.rand(count, 4, 4, generator=generator) < 0.1
    lower = upper.roll(1, dims=2) ^ noise.long()
    return upper[:, None].float(), lower.flatten(1)


@pytest.fixture(scope="module")
def learned():
    torch.manual_seed(0)
    upper, lower = halves(600, 1)
    template = TreeCircuit(quad_tree(4, 4), Categorical(16, units=2, values=2))
    fit(template, lower, EMSettings(epochs=5, batch_size=100), progress=False)

    own = Backbone("C-T", in_channels=1, width=16, stem=1)
    own.standardise(upper)
    network = ImageContext(own, template)
    circuit = ConditionalCircuit([Stage(template, network)], context_dims=3)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for rows in torch.randint(len(upper), (80, 64)):
        optimiser.zero_grad()
        (-circuit.log_prob(lower[rows], upper[rows]).mean()).backward()
        optimiser.step()
    return Learned(template, circuit, *halves(200, 2))


def test_images_help(learned):
    # Each pixel of the lower half is a bit of noise that is set with probability 0.1.
    ideal = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    without = learned.template.bits_per_dimension(learned.lower)
    given = learned.circuit.bits_per_dimension(learned.lower, learned.upper)
    assert without > 0.7
    assert 0.95 * ideal < given < 1.25 * ideal
    wrong = learned.circuit.bits_per_dimension(learned.lower, learned.upper.roll(1, dims=0))
    assert wrong > 1


def test_samples_follow_images(learned):
    generator = torch.Generator().manual_seed(3)
    x = learned.circuit.sample(learned.upper, generator=generator)
    expected = learned.upper[:, 0].roll(1, dims=2).flatten(1)
    assert x.shape == (200, 16)
    assert 0.8 < (x == expected).double().mean() < 0.95


def test_queries_of_one_image(learned):
    upper, lower = learned.upper[7], learned.lower[7]
    clean = upper[0].roll(1, dims=1).flatten()
    circuit = learned.circuit.at(upper)
    assert_close(circuit.log_prob(lower), learned.circuit.log_prob(lower, upper))

    nothing = torch.full((16,), math.nan)
    assert most_probable(circuit, nothing).values.tolist() == clean.tolist()
    given = torch.arange(16) < 5
    assert_close(
        conditional_log_prob(circuit, lower, given=given),
        circuit.log_prob(lower) - learned.circuit.log_prob(lower, upper, given),
    )

    some = lower.float().masked_fill(~given, math.nan)
    generator = torch.Generator().manual_seed(4)
    draws = conditional_sample(circuit, some, 2000, generator=generator)
    assert (draws[:, given] == lower[given]).all()
    ones = torch.where(torch.eye(16, dtype=torch.bool), 1.0, some)  # one more pixel is set in each
    marginals = (circuit.log_prob(ones) - circuit.log_prob(some)).exp()[~given].detach()
    assert_close(draws[:, ~given].float().mean(dim=0), marginals, atol=0.06, rtol=0)
    assert torch.equal(marginals > 0.5, clean[~given] > 0.5)


# Errors


def test_reader_of_other_features():
    with pytest.raises(ValueError, match="expected a reader of 16 features, got one of 8"):
        ImageContext(backbone(), template_on(), reader=reader(8))


@pytest.mark.parametrize(("declared", "found"), [(0, 4), (3, 4), (4, 0)])
def test_earlier_values_of_another_number(declared, found):
    network = ImageContext(backbone(), template_on(), earlier=declared)
    with pytest.raises(
        ValueError,
        match=rf"expected earlier values with shape \(3, {declared}\), got \(3, {found}\)",
    ):
        network(images(3), torch.zeros(3, found))


def test_stages_in_the_wrong_order():
    template = template_on()
    network = ImageContext(backbone(), template, earlier=4)
    circuit = ConditionalCircuit([Stage(template, network)], context_dims=3)
    with pytest.raises(ValueError, match=r"expected earlier values with shape \(2, 4\), got"):
        circuit.log_prob(torch.zeros(2, 4), images(2))


def test_contexts_that_are_no_images():
    template = template_on()
    circuit = ConditionalCircuit([Stage(template, ImageContext(backbone(), template))])
    with pytest.raises(ValueError, match=r"expected images with shape \(B, 1, H, W\), got \(2, 3"):
        circuit.log_prob(torch.zeros(2, 4), torch.zeros(2, 3))


def test_head_of_another_template():
    network = ImageContext(backbone(), template_on("chain"))
    circuit = ConditionalCircuit([Stage(template_on("one variable"), network)], context_dims=3)
    with pytest.raises(ValueError, match="expected a network that returns"):
        circuit.log_prob(torch.zeros(2, 1), images(2))
