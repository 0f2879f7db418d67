r"""Tests for the probnets.layers.fans, promises and activations modules."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from probnets.layers.activations import ACTIVATIONS, activation
from probnets.layers.fans import fan_in, fan_ins, initialise
from probnets.layers.promises import is_function, is_per_sample

pytestmark = pytest.mark.usefixtures("one_thread")

# Values


@pytest.mark.parametrize(
    ("module", "fan"),
    [
        (nn.Linear(6, 2), 6),
        (nn.Conv2d(4, 8, (3, 5)), 60),
        (nn.Conv2d(8, 8, 7, groups=8), 49),
        (nn.Conv2d(8, 4, 3, groups=2), 36),
        (nn.Conv1d(6, 2, 5, groups=2), 15),
        (nn.ConvTranspose2d(6, 4, 4, stride=2), 24),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), 12),
        (nn.ConvTranspose2d(6, 4, 2, stride=3), 6),
        (nn.BatchNorm2d(6), 1),
        (nn.LayerNorm(6), 1),
    ],
    ids=str,
)
def test_fans_by_hand(module, fan):
    assert fan_ins(module) == {"weight": fan, "bias": 1}


# Oracles


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (2, 2), (4, 2), (3, 2), (1, 3)])
@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_fans_count_what_meets_in_one_output(kernel, stride, dilation, groups):
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": False}
    for kind in (nn.Conv2d, nn.ConvTranspose2d):
        conv = kind(6, 9, kernel, **options)
        nn.init.ones_(conv.weight)
        most = conv(torch.ones(1, 6, 20, 20)).max()
        assert fan_in(conv, "weight") == int(most)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 4))
        self.other = nn.Parameter(torch.ones(3, 4))

    def own_fan_in(self, name):
        return {"table": 1, "other": 4}.get(name)


def test_names_of_inner_weights():
    net = nn.Sequential(nn.Linear(3, 5), nn.ModuleDict({"a": Table()}))
    assert fan_ins(net) == {"0.weight": 3, "0.bias": 1, "1.a.table": 1, "1.a.other": 4}


# Laws


def test_what_initialise_leaves():
    linear, scale, table = nn.Linear(8, 8), nn.GroupNorm(2, 8), Table()
    for parameter in scale.parameters():
        nn.init.constant_(parameter, 5)
    initialise(nn.Sequential(linear, scale, table))
    assert torch.equal(linear.bias, torch.zeros(8))
    assert all(torch.equal(p, torch.full((8,), 5.0)) for p in scale.parameters())
    assert torch.equal(table.table, torch.ones(3, 4))
    assert not (table.other == 1).any()


@pytest.mark.parametrize(
    "module", [nn.Linear(1, 2000), nn.Conv2d(2000, 2000, 1, groups=2000), nn.Linear(20, 100)]
)
def test_initialise_draws_all_linear_maps(module):
    generator, weights = torch.Generator(), []
    for seed in (1, 2, 1):
        module.reset_parameters()
        initialise(module, gain=3.0, generator=generator.manual_seed(seed))
        weights.append(module.weight.detach().clone())
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])
    std = 3 / math.sqrt(fan_in(module, "weight"))
    # A normal cut at two standard deviations has 0.8796 of its own.
    assert_close(weights[0].std().item(), 0.8796 * std, rtol=0.06, atol=0)
    assert weights[0].abs().max() <= 2 * std


def test_promises_of_networks():
    batch = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    assert is_per_sample(batch)
    assert not is_function(batch)
    assert not is_per_sample(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)))
    assert is_per_sample(nn.InstanceNorm2d(4, track_running_stats=True))
    assert is_function(nn.Dropout2d(0.0))
    assert not is_function(nn.Sequential(nn.Dropout2d(0.1)))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gelu", [-0.15865525, 0.0, 3.99987316]),
        ("hardswish", [-1 / 3, 0.0, 4.0]),
        ("none", [-1.0, 0.0, 4.0]),
        ("relu", [0.0, 0.0, 4.0]),
        ("relu6", [0.0, 0.0, 4.0]),
        ("silu", [-0.26894142, 0.0, 3.92805517]),
        ("tanh", [-0.76159416, 0.0, 0.99932930]),
    ],
)
def test_activations_by_hand(name, values):
    assert_close(activation(name)(torch.tensor([-1.0, 0.0, 4.0])), torch.tensor(values))


def test_activations_are_told_apart():
    x = torch.tensor([-4.0, -1.0, 2.0, 7.0])
    values = {tuple(activation(name)(x).tolist()) for name in ACTIVATIONS}  # type: ignore[arg-type]
    assert len(values) == len(ACTIVATIONS) == 7


# Errors


def test_weights_without_a_fan():
    with pytest.raises(AttributeError, match="expected the name of a parameter, got 'scale'"):
        fan_in(nn.Linear(3, 5), "scale")
    with pytest.raises(AttributeError, match="no attribute"):
        fan_in(nn.Linear(3, 5), "inner.weight")
    with pytest.raises(
        TypeError, match=r"fan-in of '0.weight', which Bilinear does not tell; give"
    ):
        fan_ins(nn.Sequential(nn.Bilinear(2, 3, 4)))


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"expected an activation of \['gelu', .*, got 'ReLU'"):
        activation("ReLU")  # type: ignore[arg-type]
