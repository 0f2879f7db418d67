r"""Tests for the probnets.layers.merging module."""

import copy

import torch
from torch import nn
from torch.testing import assert_close

from probnets import layers


def shake(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module


class Net(nn.Module):
    r"""Has mergeable layers at several depths, and a child that is None."""

    def __init__(self):
        super().__init__()
        self.stem = layers.Conv2d(3, 8, dtype=torch.float64)
        self.nothing = None
        self.parts = nn.ModuleDict(
            {
                "large": nn.Sequential(
                    nn.ReLU(), layers.DilatedReparamConv2d(8, 7, dtype=torch.float64)
                ),
                "block": nn.ModuleList([layers.LargeKernelBlock(8, 5, dtype=torch.float64)]),
            }
        )
        self.last = layers.FFNAttentionBlock(8, kernel_size=5, dtype=torch.float64)

    def forward(self, x):
        x = self.parts["large"](self.stem(x))
        for block in self.parts["block"]:  # type: ignore[attr-defined]
            x = block(x)
        return self.last(x)


def test_nested_layers_are_merged():
    net = shake(Net())
    one = layers.merge(net)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    assert_close(one(x), net.eval()(x))

    kinds = {type(m) for m in one.modules()}
    assert not kinds & {layers.DilatedReparamConv2d}
    assert {layers.DilatedReparamConv2d} <= {type(m) for m in net.modules()}
    assert not any(m.training for m in one.modules())
    assert one.nothing is None


def test_the_network_stays_as_it_is():
    net = shake(Net()).train()
    before, text = copy.deepcopy(net.state_dict()), repr(net)
    one = layers.merge(net)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert repr(net) == text
    assert all(m.training for m in net.modules())
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_network_itself_is_merged():
    layer = shake(layers.DilatedReparamConv2d(4, 9, dtype=torch.float64)).eval()
    one = layers.merge(layer)
    assert isinstance(one, layers.Conv2d)
    x = torch.randn(2, 4, 11, 10, dtype=torch.float64)
    assert_close(one(x), layer(x))


def test_networks_without_branches_are_copied():
    net = nn.Sequential(layers.Conv2d(3, 4), nn.BatchNorm2d(4))
    one = layers.merge(net)
    assert repr(one) == repr(net)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in one.state_dict().items())
    assert one[0] is not net[0]


def test_backbones_are_merged():
    net = shake(layers.Backbone("L-F", in_channels=2, width=8, stem=2, dtype=torch.float64))
    one = layers.merge(net)
    x = torch.randn(2, 2, 9, 12, dtype=torch.float64)
    assert_close(one.features(x), net.features(x))
    assert len(list(one.parameters())) < len(list(net.parameters()))
