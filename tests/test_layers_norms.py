r"""Tests for the probnets.layers.norms module."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from probnets.layers import norms
from probnets.layers.norms import (
    NORMS,
    BatchNorm,
    GroupNorm,
    InstanceBatchNorm,
    LayerNorm,
    RepBatchNorm,
    ResponseNorm,
    norm,
    token_norm,
)
from probnets.layers.visible import expand, gather

pytestmark = pytest.mark.usefixtures("one_thread")


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


def draw(*shape):
    return 3 * torch.randn(*shape, dtype=torch.float64) + 1


def mask_of(batch, h, w, count):
    order = torch.rand(batch, h * w).argsort(dim=1)
    return (order < count).view(batch, 1, h, w)


# Values


def test_response_norm_by_hand():
    layer = ResponseNorm(2, eps=0.5)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.0, 10.0]))
    x = torch.tensor([[[[3.0, 4.0]], [[0.0, -2.0]]]])
    # Norms 5 and 2, their mean 3.5, plus 0.5: ratios 1.25 and 0.5.
    assert_close(layer(x), torch.tensor([[[[6.75, 9.0]], [[10.0, 6.0]]]]))


def test_response_norm_starts_as_identity_and_has_slopes_at_zero():
    layer = ResponseNorm(3)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer(x), x)

    zero = torch.zeros(1, 3, 2, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(shake(layer)(zero).sum(), zero)
    assert slope.isfinite().all()


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (7, 1), (16, 2), (20, 2), (24, 3), (44, 4), (512, 32)]
)
def test_groups_by_default(channels, groups):
    assert GroupNorm(channels).norm.num_groups == groups


@pytest.mark.parametrize(
    ("channels", "ratio", "sizes"),
    [(5, 0.5, (2, 3)), (7, 0.3, (2, 5)), (2, 0.1, (1, 1)), (3, 0.1, (1, 2)), (2, 0.99, (1, 1))],
)
def test_shares_of_channels(channels, ratio, sizes):
    layer = InstanceBatchNorm(channels, ratio=ratio)
    assert layer.sizes == sizes
    assert layer(torch.randn(2, channels, 3, 3)).shape == (2, channels, 3, 3)


# Oracles


def test_layer_norm_is_over_channels_of_each_pixel():
    x = draw(2, 5, 3, 4)
    layer = shake(LayerNorm(5, dtype=torch.float64))
    y = layer(x)
    for i in range(3):
        for j in range(4):
            pixel = x[:, :, i, j]
            centred = pixel - pixel.mean(dim=1, keepdim=True)
            scale = (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
            assert_close(y[:, :, i, j], centred / scale * layer.norm.weight + layer.norm.bias)
    assert not list(norm("layer_plain", 5).parameters())
    assert_close(
        norm("layer_plain", 5)(x),
        functional.layer_norm(x.mT.movedim(1, 3), (5,), eps=1e-6).movedim(3, 1).mT,
    )


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_of_visible_pixels_alone(groups):
    x, mask = draw(3, 6, 8, 4), mask_of(3, 4, 2, 3)
    layer = shake(GroupNorm(6, groups=groups, dtype=torch.float64))

    alone = gather(x, mask).mT[..., None]  # (B, C, N, 1)
    plain = functional.group_norm(alone, groups, layer.norm.weight, layer.norm.bias)
    assert_close(gather(layer(x, mask), mask), plain[..., 0].mT)
    assert_close(layer(x), functional.group_norm(x, groups, layer.norm.weight, layer.norm.bias))


@pytest.mark.parametrize("momentum", [0.1, 0.4])
def test_batch_norm_of_visible_pixels_alone(momentum):
    x = draw(3, 5, 8, 4)
    mask = torch.rand(3, 1, 4, 2) < 0.5  # as many as there are in each sample
    mask[0, 0, 0, 0] = True
    layer = shake(BatchNorm(5, momentum=momentum, dtype=torch.float64))
    other = nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64)
    other.load_state_dict(layer.norm.state_dict())

    shown = expand(mask, x).bool()[:, 0]  # (B, H, W)
    rows = x.movedim(1, -1)[shown]  # (N, C)
    for _ in range(2):
        y, plain = layer(x, mask), other(rows[..., None, None])[:, :, 0, 0]
        assert_close(y.movedim(1, -1)[shown], plain)
    for name, value in other.state_dict().items():
        assert_close(layer.norm.state_dict()[name], value)
    assert int(layer.norm.get_buffer("num_batches_tracked")) == 2


@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_in_evaluation_leaves_statistics(masked):
    x, layer = draw(3, 5, 4, 4), shake(BatchNorm(5, dtype=torch.float64)).eval()
    before = copy.deepcopy(layer.state_dict())
    y = layer(x, mask_of(3, 2, 2, 2) if masked else None)
    mean, variance = (layer.norm.get_buffer(f"running_{k}") for k in ("mean", "var"))
    plain = (x.movedim(1, -1) - mean) / (variance + 1e-5).sqrt()
    assert_close(y, (plain * layer.norm.weight + layer.norm.bias).movedim(-1, 1))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("kind", [BatchNorm, RepBatchNorm])
def test_folded_equals_evaluation(kind):
    x, layer = draw(3, 5, 4, 4), shake(kind(5, dtype=torch.float64)).eval()
    scale, shift = layer.fold()
    assert not scale.requires_grad
    assert_close(x * scale[:, None, None] + shift[:, None, None], layer(x))


def test_rep_batch_norm_is_its_formula():
    x, layer = draw(3, 5, 4, 4), shake(RepBatchNorm(5, dtype=torch.float64))
    batch = copy.deepcopy(layer.batch)
    assert_close(layer(x), batch(x) + layer.alpha * x)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("channels", "ratio"), [(5, 0.5), (7, 0.3)])
def test_instance_beside_batch(channels, ratio, masked):
    x = draw(3, channels, 4, 6)
    mask = mask_of(3, 2, 3, 4) if masked else None
    layer = shake(InstanceBatchNorm(channels, ratio=ratio, dtype=torch.float64))
    part = int(channels * ratio)
    alone = gather(x, mask).mT  # (B, C, N)

    first = functional.instance_norm(
        alone[:, :part], weight=layer.instance.norm.weight, bias=layer.instance.norm.bias
    )
    weight, bias = layer.batch.norm.weight, layer.batch.norm.bias
    second = functional.batch_norm(alone[:, part:], None, None, weight, bias, training=True)
    y = gather(layer(x, mask), mask).mT
    assert_close(y, torch.cat([first, second], dim=1))


def test_response_norm_of_visible_pixels_alone():
    x, mask = draw(3, 5, 4, 6), mask_of(3, 2, 3, 4)
    layer = shake(ResponseNorm(5, dtype=torch.float64))
    alone = gather(x, mask).mT[..., None]
    assert_close(gather(layer(x, mask), mask), layer(alone)[..., 0].mT)


# Laws


@pytest.mark.parametrize("name", NORMS)
def test_names_promise_what_norms_keep(name):
    layer = norm(name, 8)
    assert layer.per_sample == NORMS[name].per_sample
    assert layer.function == NORMS[name].function
    assert layer.in_channels == layer.out_channels == 8


def test_norms_of_one_pixel():
    x = draw(2, 4, 1, 1)
    layer = shake(GroupNorm(4, groups=4, dtype=torch.float64))
    assert_close(layer(x), layer.norm.bias.expand(2, 4)[..., None, None])


def test_norms_of_tokens():
    x = draw(2, 3, 6)
    layer = token_norm("layer", 6, dtype=torch.float64)
    assert len(list(layer.parameters())) == 2
    plain = token_norm("layer_plain", 6, dtype=torch.float64)
    assert not list(plain.parameters())
    centred = x - x.mean(dim=-1, keepdim=True)
    expected = centred / (x.var(dim=-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert_close(plain(x), expected)
    assert_close(layer(x), expected)
    assert token_norm("none", 6)(x) is x


# Errors


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"expected a norm of \['batch', .*, got 'layers'"):
        norms.norm("layers", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer, layer_plain or none, got 'batch'"):
        token_norm("batch", 4)  # type: ignore[arg-type]
    for channels, ratio in ((1, 0.5), (4, 0.0), (4, 1.0)):
        found = f"expected channels >= 2 and ratio in .0, 1., got {channels} and {ratio}"
        with pytest.raises(ValueError, match=found):
            InstanceBatchNorm(channels, ratio=ratio)
    with pytest.raises(ValueError, match="divisible by num_groups"):
        GroupNorm(6, groups=4)
    with pytest.raises(ValueError, match="expected in_channels >= 1, got 0"):
        LayerNorm(0)
