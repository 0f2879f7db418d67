r"""Tests of what every layer promises, over a table of all layers."""

import copy
import inspect
import math

import pytest
import torch
from layer_cases import CASES, LINEAR, MAPS, TOKENS, build, draw, every
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

from probnets import layers
from probnets.layers.visible import expand

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(1, 1), (1, 6), (5, 7), (8, 9)]
SUBJECTS = {n: c for n, c in CASES.items() if build(c).state_dict()}


def test_every_layer_is_in_the_table():
    public = {
        c for _, c in inspect.getmembers(layers, inspect.isclass) if issubclass(c, layers.Layer)
    }
    public = {c for c in public if not inspect.isabstract(c)}
    inside = {type(m) for case in CASES.values() for m in build(case).modules()}
    assert public - inside - {layers.Backbone, layers.Layer} == set()


@pytest.mark.parametrize(**every(CASES))
def test_docstring_names_its_users(case):
    text = inspect.getdoc(type(build(case))) or ""
    assert any(core in text for core in ("circuits", "boltzmann", "priors", "bottleneck")) or (
        "norm" in text.splitlines()[0]
    )


# Shapes


@pytest.mark.parametrize(**every(MAPS))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_maps_shrink_by_the_stride(case, size):
    layer = build(case)
    y = layer(draw(case, size=size))

    height, width = (math.ceil(n / layer.stride) for n in size)
    assert y.shape == (2, layer.out_channels, height, width)
    assert y.isfinite().all()


@pytest.mark.parametrize(**every(TOKENS))
@pytest.mark.parametrize("count", [1, 7])
def test_tokens_keep_their_shape(case, count):
    x = torch.randn(3, count, case.shape[1], dtype=torch.float64)
    assert build(case)(x).shape == x.shape


@pytest.mark.parametrize(**every(TOKENS))
def test_permuted_tokens_permute_outputs(case):
    layer, x, order = build(case), draw(case), torch.tensor([3, 0, 4, 1, 2])
    assert_close(layer(x[:, order]), layer(x)[:, order])


@pytest.mark.parametrize(**every(CASES))
def test_an_empty_batch_stays_empty(case):
    layer = build(case)
    assert layer(draw(case, batch=0)).shape == (0, *layer(draw(case)).shape[1:])


@pytest.mark.parametrize(**every(MAPS | LINEAR))
def test_wrong_shapes_of_maps(case):
    layer, x = build(case), draw(case)
    for bad in (x[0], x[:, :1].expand(-1, 31, -1, -1), x[:, :, :0], x[:, :, :, :0]):
        with pytest.raises(ValueError, match=r"expected .* shape \(B, \d+, H, W\), got"):
            layer(bad)


@pytest.mark.parametrize(**every({n: c for n, c in CASES.items() if len(c.shape) == 2}))
def test_wrong_shapes_of_tokens(case):
    layer, x = build(case), draw(case)
    for bad in (x[0], x[:, :, :5], x[:, :0]):
        with pytest.raises(ValueError, match=r"expected x with shape \(B, N, 8\), got"):
            layer(bad)


# Samples


@pytest.mark.parametrize(**every(CASES))
def test_samples_do_not_see_each_other(case):
    layer, x = build(case), draw(case, batch=3)
    assert layer.per_sample
    rows = torch.cat([layer(row[None]) for row in x])
    assert_close(layer(x), rows)


@pytest.mark.parametrize(**every(CASES))
def test_functions_are_functions_in_training(case):
    layer, x = build(case).train(), draw(case, batch=3)
    assert layer.function == case.function

    before = copy.deepcopy(layer.state_dict())
    together = layer(x)
    rows = torch.cat([layer(row[None]) for row in x])
    assert torch.allclose(together, rows) == case.function
    same = all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert same == case.function


@pytest.mark.parametrize(**every(CASES))
def test_is_deterministic(case):
    layer, x = build(case), draw(case)
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_live_statistics_are_seen():
    live = nn.Sequential(layers.Conv2d(3, 4), nn.BatchNorm2d(4, track_running_stats=False))
    assert not layers.is_per_sample(live)
    assert not layers.is_function(live)
    assert not layers.is_function(nn.Dropout(0.1))
    assert not layers.is_function(nn.InstanceNorm2d(3, track_running_stats=True))
    assert layers.is_function(nn.InstanceNorm2d(3))


# Linear maps


@pytest.mark.parametrize(**every(LINEAR))
@pytest.mark.parametrize("size", [(8, 8), (12, 4), (9, 7)], ids=str)
def test_adjoint_is_exact(case, size):
    layer = build(case)
    if any(isinstance(m, layers.Haar) for m in layer.modules()) and size == (9, 7):
        with pytest.raises(ValueError, match="divisible"):
            layer(draw(case, size=size))
        return

    x = draw(case, size=size)
    y = torch.randn_like(layer(x))
    assert isinstance(layer, layers.LinearLayer)
    back = layer.adjoint(y, size)
    assert back.shape == x.shape
    assert_close((layer(x) * y).sum(), (x * back).sum())
    assert_close(layer.gram(x), layer.adjoint(layer(x), size))


@pytest.mark.parametrize(**every(CASES))
def test_linear_means_linear(case):
    layer, x, y = build(case), draw(case), draw(case)
    additive = torch.allclose(layer(2 * x - 3 * y), 2 * layer(x) - 3 * layer(y))
    assert layer.linear == isinstance(layer, layers.LinearLayer)
    assert additive or not layer.linear


# Weights


@pytest.mark.parametrize(**every(CASES))
def test_every_weight_has_a_gradient(case):
    layer, x = build(case), draw(case).requires_grad_()
    y = layer(x)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(**every(CASES))
def test_gradients_are_slopes(case):
    layer, x = build(case), draw(case, batch=1)
    weights = {k: v.detach() for k, v in layer.named_parameters()}
    y = layer(x)
    target = torch.randn_like(y)

    def loss(weights, x):
        return (functional_call(layer, weights, (x,)) * target).sum()

    slopes, slope = grad(loss, argnums=(0, 1))(weights, x)
    along = {k: torch.randn_like(v) for k, v in weights.items()}, torch.randn_like(x)
    h = 1e-6
    plus = loss({k: v + h * along[0][k] for k, v in weights.items()}, x + h * along[1])
    minus = loss({k: v - h * along[0][k] for k, v in weights.items()}, x - h * along[1])
    exact = (slope * along[1]).sum() + sum((slopes[k] * along[0][k]).sum() for k in weights)
    assert_close((plus - minus) / (2 * h), torch.as_tensor(exact), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(**every(CASES))
def test_gradients_can_be_differentiated(case):
    layer, x = build(case), draw(case, batch=1).requires_grad_()
    y = layer(x)
    target = torch.randn_like(y)
    once = torch.autograd.grad((y * target).sum(), x)[0]
    again = torch.autograd.grad((layer(x) * target).sum(), x, create_graph=True)[0]
    assert_close(again, once)
    weights = list(layer.parameters())
    if again.requires_grad and weights:  # else the layer is linear, or has none
        loss = again.square().sum()
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        assert all(slope is None or slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize(**every(SUBJECTS))
def test_weights_come_from_outside(case):
    layer, x = build(case), draw(case)
    weights = {k: torch.stack([v, 2 * v, v - 0.1]) for k, v in layer.named_parameters()}
    together = vmap(lambda w: functional_call(layer, w, (x,)))(weights)
    for s in range(3):
        one = functional_call(layer, {k: v[s] for k, v in weights.items()}, (x,))
        assert_close(together[s], one)

    slopes = vmap(grad(lambda w: functional_call(layer, w, (x,)).square().sum()))(weights)
    assert all(slopes[k].isfinite().all() for k in weights)


@pytest.mark.parametrize(**every(SUBJECTS))
def test_state_dict_round_trip(case):
    layer, x, other = build(case), draw(case), case.build(dtype=torch.float64).eval()
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert repr(other)


@pytest.mark.parametrize(**every(CASES))
def test_device_and_dtype_are_handed_on(case):
    layer = case.build(device="meta", dtype=torch.bfloat16)
    for name, tensor in layer.state_dict(keep_vars=True).items():
        assert tensor.device.type == "meta", name
        assert tensor.dtype in (torch.bfloat16, torch.long), name


@pytest.mark.parametrize(**every(CASES))
def test_every_weight_has_a_fan_in(case):
    layer = build(case)
    fans = layers.fan_ins(layer)
    assert fans.keys() == dict(layer.named_parameters()).keys()
    assert all(fan >= 1 for fan in fans.values())
    assert all(layer.fan_in(name) == fan for name, fan in fans.items())
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 1:
            assert fans[name] == 1, name


def test_initialised_weights_have_their_scale():
    layer = layers.Conv2d(64, 64, 5, groups=4)
    layers.initialise(layer, gain=2.0, generator=torch.Generator().manual_seed(1))
    weight = layer.conv.weight
    std = 2 / math.sqrt(16 * 25)
    # A normal cut at two standard deviations has 0.8796 of its own.
    assert_close(weight.std().item(), 0.8796 * std, rtol=0.02, atol=0)
    assert weight.abs().max() <= 2 * std
    assert layer.conv.bias is not None
    assert layer.conv.bias.abs().max() == 0


# What an output sees


@pytest.mark.parametrize(**every(MAPS | LINEAR))
def test_receptive_field(case):
    layer = build(case)
    assert layer.receptive_field == case.field

    extent = 0
    for _ in range(3):
        x = draw(case, batch=1).requires_grad_()
        y = layer(x)
        for i in range(y.shape[2]):
            slope = torch.autograd.grad(
                y[0, :, i, i], x, torch.randn_like(y[0, :, i, i]), retain_graph=True
            )[0]
            for seen in (slope.abs().amax(dim=(0, 1, 2)), slope.abs().amax(dim=(0, 1, 3))):
                where = seen.nonzero()
                if len(where):
                    extent = max(extent, int(where.max() - where.min()) + 1)
    assert extent == (case.shape[-1] if case.field is None else case.field)


PAIRS = {
    "windows": ("AA", 4, {"block": 4}),
    "windows and kernels": ("AN", 4, {"block": 4}),
    "kernels and windows": ("NA", 4, {"block": 4}),
    "halos": ("AA", 4, {"block": 4, "halo": 1}),
    "shifts": ("AA", 4, {"block": 4, "shift": 2}),
    "wavelets": ("WW", 4, {}),
    "kernels": ("NR", 4, {}),
}


@pytest.mark.parametrize(("layout", "width", "options"), PAIRS.values(), ids=list(PAIRS))
def test_no_output_sees_more_than_stated(layout, width, options):
    own = {"A": options} if "A" in layout else None
    net = layers.Backbone(
        layout,
        in_channels=1,
        width=width,
        stem=1,
        patches=True,
        norm="layer",
        options=own,
        dtype=torch.float64,
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 1, 24, 24, dtype=torch.float64, requires_grad=True)
    y = net.maps(x)[-1]
    extent = 0
    for i in range(24):
        some = torch.randn_like(y[0, :, i, i])
        slope = torch.autograd.grad((y[0, :, i, i] * some).sum(), x, retain_graph=True)[0]
        where = slope.abs().amax(dim=(0, 1, 2)).nonzero()
        extent = max(extent, int(where.max() - where.min()) + 1)
    field = net.receptive_field
    assert field is not None
    assert extent <= field < 24
    if layout == "NR":
        assert extent == field


def patches(case, layer, x, *, shown=0.5):
    r"""Draws masks that show as many patches of each sample."""
    size = case.masks * max(1, layer.stride // case.masks)
    h, w = (n // size for n in x.shape[2:])
    count = max(1, int(h * w * shown))
    order = torch.rand(len(x), h * w).argsort(dim=1)
    return (order < count).view(len(x), 1, h, w)


@pytest.mark.parametrize(**every(MAPS))
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_hidden_patches_do_not_exist(case, mode):
    layer, x = build(case).train(mode == "train"), draw(case)
    visible = patches(case, layer, x)
    mask = expand(visible, x).bool()
    start = copy.deepcopy(layer.state_dict())

    outputs = []
    for other in (x, torch.where(mask, x, 100 * torch.randn_like(x))):
        layer.load_state_dict(start)
        y = layer(other, visible)
        assert y.isfinite().all()
        outputs.append(y * expand(visible, y))
    assert torch.equal(*outputs)
    assert outputs[0].abs().max() > 0


@pytest.mark.parametrize(**every(MAPS))
def test_masks_that_hide_nothing(case):
    layer, x = build(case), draw(case)
    visible = torch.ones_like(patches(case, layer, x))
    assert_close(layer(x, visible), layer(x))


@pytest.mark.parametrize(**every(MAPS))
def test_wrong_masks(case):
    layer, x = build(case), draw(case)
    right = patches(case, layer, x)
    for bad in (right[:1], right.float(), right[:, 0], right.repeat(1, 2, 1, 1)):
        with pytest.raises(ValueError, match=r"expected a boolean mask with shape \(2, 1, h, w\)"):
            layer(x, bad)
    with pytest.raises(ValueError, match="expected maps with H divisible by"):
        layer(x, torch.ones(2, 1, 3 * x.shape[2], 1, dtype=torch.bool))


# Merging and compiling


@pytest.mark.parametrize(**every(CASES))
def test_merged_equals_unmerged(case):
    layer, x = build(case).train(), draw(case)
    count = sum(1 for _ in layer.parameters())
    one = layers.merge(layer)

    assert layer.training
    assert not one.training
    assert_close(one(x), layer.eval()(x))
    mergeable = any(hasattr(m, "merged") for m in layer.modules())
    assert (sum(1 for _ in one.parameters()) < count) == mergeable


@pytest.mark.parametrize(**every(CASES))
def test_can_be_traced_whole(case):
    layer, x = build(case), draw(case)
    traced = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close(traced(x), layer(x))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize(**every(CASES))
def test_can_be_compiled(case):
    layer, x = build(case), draw(case)
    assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
    torch.compiler.reset()
