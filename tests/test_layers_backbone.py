r"""Tests for the probnets.layers.backbone module."""

import math

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import nn
from torch.func import functional_call, vmap
from torch.testing import assert_close

from probnets import layers
from probnets.backend import checkpoints
from probnets.layers import Backbone, load_backbone, save_backbone
from probnets.layers.blocks import BLOCKS
from probnets.layers.visible import expand, gather

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = "".join(sorted(BLOCKS))
LAYOUTS = ["CC-CC-CCT-TT", "N", "TK-T", "W-V", "A-SQ-GF", "L-I-R-P"]


def build(layout, **options):
    r"""Creates a small backbone in float64, with weights and statistics far from their start."""
    options = {"in_channels": 2, "width": [16] * len(layout.split("-")), "stem": 2} | options
    net = Backbone(layout, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# Shapes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(16, 24), (13, 7), (1, 1)], ids=str)
def test_shapes(layout, size):
    stages = layout.split("-")
    widths = [16, 32, 16, 48][: len(stages)]
    net = build(layout, width=widths, classes=5)
    x = draw(2, 2, *size)

    maps = net.maps(x)
    strides = [2 * 2**i for i in range(len(stages))]
    shapes = [
        (2, channels, math.ceil(size[0] / s), math.ceil(size[1] / s))
        for channels, s in zip(widths, strides, strict=True)
    ]
    assert [m.shape for m in maps] == shapes
    assert all(m.isfinite().all() for m in maps)
    assert (net.widths, net.out_channels, net.stride) == (widths, widths[-1], strides[-1])
    assert [len(stage) for stage in net.stages] == list(map(len, stages))  # type: ignore[arg-type]

    tokens = net.tokens(x)
    assert torch.equal(tokens[:, -1], maps[-1][:, :, -1, -1])
    assert tokens.shape == (2, shapes[-1][2] * shapes[-1][3], widths[-1])
    assert_close(net.features(x), tokens.mean(dim=1))
    assert net.head is not None
    assert_close(net.logits(x), net.features(x) @ net.head.weight.T + net.head.bias)


def test_dashes_double_the_width():
    net = Backbone("P-P-P", width=8, norm="none")
    assert net.widths == [8, 16, 32]
    assert (net.in_channels, net.stride) == (3, 16)
    with torch.no_grad():
        assert [m.shape[1:] for m in net.maps(torch.zeros(1, 3, 33, 16))] == [
            (8, 9, 4),
            (16, 5, 2),
            (32, 3, 1),
        ]


@pytest.mark.parametrize("output", ["features", "tokens", "maps", "logits"])
def test_output_by_choice(output):
    net, x = build("C-T", classes=3, output=output), draw(2, 2, 9, 8)
    mask = torch.tensor([[[[True, False]]], [[[False, True]]]])
    for args in ((x,), (x[:, :, :8], mask)):
        called, named = net(*args), getattr(net, output)(*args)
        assert type(called) is (list if output == "maps" else torch.Tensor)
        assert all(torch.equal(*pair) for pair in zip(called, named, strict=True))


def test_output_by_default():
    assert Backbone("P", width=8).output == "features"
    assert Backbone("P", width=8, classes=3).output == "logits"
    assert "layout='P-P', output='maps'" in repr(Backbone("P-P", width=8, output="maps"))


@pytest.mark.parametrize(("patches", "kernels"), [(False, [7, 3]), (True, [4, 3])])
def test_stems(patches, kernels):
    net = Backbone("P-P", width=8, patches=patches)
    reducers = [m.conv.conv for m in net.modules() if isinstance(m, layers.ConvEmbedding)]
    assert [m.kernel_size[0] for m in reducers] == kernels
    assert [m.stride[0] for m in reducers] == [4, 2]


# What an output sees


@pytest.mark.parametrize(
    ("layout", "options", "field"),
    [("N-N", {}, 43), ("PP-R", {"norm": "none", "patches": True}, 30), ("A", {"stem": 1}, 10)],
)
def test_receptive_field(layout, options, field):
    net = build(layout, width=[4] * len(layout.split("-")), **options)
    assert net.receptive_field == field

    x = draw(1, 2, 8, 64).requires_grad_()
    y = net.maps(x)[-1]
    extent = 0
    for i in range(y.shape[3]):
        (slope,) = torch.autograd.grad(
            (y * torch.randn_like(y))[..., i].sum(), x, retain_graph=True
        )
        seen = slope.abs().amax(dim=(0, 1, 2)).nonzero()
        extent = max(extent, int(seen.max() - seen.min()) + 1)
    assert extent == field


@pytest.mark.parametrize("layout", ["T", "N-NT", "V", "C", "Q-N"])
def test_receptive_field_of_all(layout):
    assert Backbone(layout, width=16).receptive_field is None


# Norms and scales


def test_no_norm_at_all():
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    count = {
        norm: sum(isinstance(m, kinds) for m in Backbone(ALL, width=16, norm=norm).modules())
        for norm in (None, "none")
    }
    assert count["none"] == 0
    assert count[None] > len(ALL)


def test_one_norm_for_all():
    net = Backbone("CN-R", width=8, norm="batch")
    kinds = {type(m) for m in net.modules() if type(m).__module__.startswith("torch.nn.modules")}
    assert nn.BatchNorm2d in kinds
    assert not kinds & {nn.LayerNorm, nn.GroupNorm}
    assert not net.function
    assert net.per_sample


def test_is_a_function_in_training():
    net, x = build(ALL).train(), draw(3, 2, 6, 6)
    assert net.function
    before = {k: v.clone() for k, v in net.state_dict().items()}
    together = net(x)
    assert_close(together, torch.cat([net(row[None]) for row in x]))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("given", "scale"), [(1.0, 1.0), (0.25, 0.25), ("depth", 1 / math.sqrt(10))]
)
def test_res_scale_reaches_all_blocks(given, scale):
    net = Backbone("CC-NTR", width=16, res_scale=given)
    scales = [m.res_scale for m in net.modules() if hasattr(m, "res_scale")]
    assert scales == [scale] * 5


def test_options_reach_the_blocks_of_a_letter():
    net = Backbone("NT-TN", width=16, options={"T": {"heads": 4}, "N": {"kernel_size": 3}})
    heads = [
        m.heads
        for m in net.modules()
        if isinstance(m, layers.AttentionBlock | layers.MultiHeadAttention) and hasattr(m, "heads")
    ]
    assert heads == [4, 4]
    widths = [
        m.depthwise.conv.kernel_size[0]
        for m in net.modules()
        if isinstance(m, layers.ConvNeXtBlock)
    ]
    assert widths == [3, 3]


# Randomness


@pytest.mark.parametrize("options", [{"layout": ALL}, {"layout": "N", "stem": 1, "patches": True}])
def test_weights_come_from_the_generator(options):
    states = []
    for seed, other in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(other)
        generator = torch.Generator().manual_seed(seed)
        net = Backbone(**options, in_channels=1, width=16, classes=4, generator=generator)
        states.append(net.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    fixed = ("attention.values.weight", "attention.position")  # where gated attention starts
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1 and net.fan_in(name) > 1 and not name.endswith(fixed):
            assert not torch.equal(states[0][name], states[2][name]), name


def test_weights_have_the_scale_of_their_fan_in():
    net = Backbone("CT", width=64, classes=64, generator=torch.Generator().manual_seed(0))
    count = 0
    for name, weight in net.named_parameters():
        if weight.numel() > 4000:
            count += 1
            std = 0.8796 / math.sqrt(net.fan_in(name))
            assert_close(weight.std().item(), std, rtol=0.05, atol=0)
    assert count == 8


def test_device_and_dtype():
    net = Backbone("CT-N", width=16, classes=2, device="meta", dtype=torch.bfloat16)
    assert {(v.device.type, v.dtype) for v in net.state_dict().values()} == {
        ("meta", torch.bfloat16)
    }


def test_weights_come_from_outside():
    net, x = build("C-T"), draw(2, 2, 6, 6)
    weights = {k: torch.stack([v, 2 * v, v - 0.1]) for k, v in net.named_parameters()}
    together = vmap(lambda w: functional_call(net, w, (x,)))(weights)
    for s in range(3):
        one = functional_call(net, {k: v[s] for k, v in weights.items()}, (x,))
        assert_close(together[s], one)
    assert not torch.allclose(together[0], together[1])


# Inputs


def test_standardise_by_hand():
    net = Backbone("P", in_channels=3, width=8)
    images = torch.zeros(2, 3, 1, 2, dtype=torch.uint8)
    images[:, 0] = torch.tensor([[[0, 2]], [[4, 250]]])
    images[:, 1] = 7
    net.standardise(images)
    assert net.input_mean.tolist() == [64, 7, 0]
    std = math.sqrt((64**2 + 62**2 + 60**2 + 186**2) / 4)
    assert_close(net.input_std, torch.tensor([std, 1, 1]))
    assert net.input_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_standardised_images(dtype):
    images = (100 + 20 * torch.randn(1500, 2, 3, 4)).clamp(0, 255).to(dtype)
    net = build("P")
    plain = net.features(
        (images.double() - images.double().mean(dim=(0, 2, 3), keepdim=True))
        / images.double().std(dim=(0, 2, 3), correction=0, keepdim=True)
    )
    net.standardise(images)
    assert_close(net.features(images), plain)
    net.standardise(images)  # a second time changes nothing
    assert_close(net.features(images), plain)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 123.456, 1e-8, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_channels_keep_their_scale(value, dtype):
    net = build("P")
    images = draw(1500, 2, 5, 7).to(dtype)
    images[:, 1] = value
    net.standardise(images)
    assert net.input_std[1] == 1
    assert_close(net.input_mean[1].item(), images[0, 1, 0, 0].item())
    assert_close(net.input_std[0].item(), images[:, 0].double().std(correction=0).item())


# Masks


@pytest.mark.parametrize(
    ("layout", "norm"), [("CN-CT", None), ("T-K", None), ("W-SV", None), ("CN-R", "group")]
)
def test_hidden_pixels_do_not_matter(layout, norm):
    net, x = build(layout, classes=3, patches=True, norm=norm), draw(3, 2, 16, 24)
    order = torch.rand(3, 6).argsort(dim=1)
    visible = (order < 2).view(3, 1, 2, 3)
    mask = expand(visible, x).bool()
    other = torch.where(mask, x, 100 * torch.randn_like(x))

    features = net.features(x, visible)
    assert torch.equal(net.features(other, visible), features)
    assert torch.equal(net.logits(other, visible), net.logits(x, visible))
    assert not torch.allclose(net.features(other), net.features(x))
    last = net.maps(x, visible)[-1]
    assert_close(features, gather(last, visible).mean(dim=1))
    assert_close(net.features(x, torch.ones_like(visible)), net.features(x))


def test_masks_reach_all_layers():
    net, masks = build("CN-R"), []
    inner = [*net.reducers, *(b for s in net.stages for b in s.children()), net.norm]
    for layer in inner:
        layer.register_forward_pre_hook(lambda _, args: masks.append(args[1]))
    visible = torch.tensor([[[[True, False]]]])
    net(draw(1, 2, 4, 8), visible)
    assert len(masks) == 6
    assert all(mask is visible for mask in masks)


def test_masks_that_do_not_fit():
    net, x = build("P-P"), draw(1, 2, 8, 8)
    assert net(x, torch.ones(1, 1, 2, 2, dtype=torch.bool)).shape == (1, 16)
    with pytest.raises(ValueError, match="H divisible by 16, for 4 patches and stride 4, got 8"):
        net(x, torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"a boolean mask with shape \(1, 1, h, w\)"):
        net(x, torch.ones(2, 1, 2, 2, dtype=torch.bool))


# Positions


@pytest.mark.parametrize("layout", ["T", "K", "TKT"])
def test_positions_tell_places(layout, monkeypatch):
    net, x = build(layout, patches=True), draw(2, 2, 8, 8)
    moved = x.roll((4, 4), dims=(2, 3))  # permutes patches
    assert not torch.allclose(net.features(moved), net.features(x), rtol=1e-3)

    sizes = []

    def none(height, width, like, *, channels):
        sizes.append((height, width, channels))
        return torch.zeros_like(like)

    monkeypatch.setattr("probnets.layers.backbone.sincos_positions", none)
    assert_close(net.features(moved), net.features(x))
    assert sizes == [(4, 4, 16)] * 2


def test_positions_are_added_once(monkeypatch):
    sizes = []

    def none(height, width, like, *, channels):
        sizes.append((height, width, channels))
        return torch.zeros_like(like)

    monkeypatch.setattr("probnets.layers.backbone.sincos_positions", none)
    build("T-TK")(draw(1, 2, 7, 4))
    assert sizes == [(4, 2, 16)]


@pytest.mark.parametrize("letter", sorted(BLOCKS.keys() - set("TK")))
def test_other_layouts_need_no_positions(letter, monkeypatch):
    def fail(*args, **options):
        pytest.fail("asked for positions")

    monkeypatch.setattr("probnets.layers.backbone.sincos_positions", fail)
    assert build(f"{letter}T-K")(draw(1, 2, 4, 4)).shape == (1, 16)


# Files


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("CN-CT", {"classes": 3, "options": {"T": {"heads": 4}}, "res_scale": "depth"}),
        ("RP", {"norm": "batch", "patches": True, "output": "tokens", "stem": 3}),
        (ALL, {"width": 16}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_files_hold_everything(tmp_path, layout, options, dtype):
    net = build(layout, **options).to(dtype).train()
    images = (3 * draw(4, 2, 9, 7) + 1).to(dtype)
    net.standardise(images)
    net(images)  # moves running statistics
    net.eval()
    save_backbone(tmp_path / "new" / "net", net)

    other = load_backbone(str(tmp_path / "new" / "net"))
    assert not other.training
    assert other.config == net.config
    assert repr(other) == repr(net.eval())
    assert other.state_dict().keys() == net.state_dict().keys()
    assert other.input_mean.dtype == dtype
    assert torch.equal(other(images), net(images))


def test_files_go_to_a_device(tmp_path):
    save_backbone(tmp_path / "net", Backbone("P", width=4))
    assert load_backbone(tmp_path / "net", device="meta").input_mean.device.type == "meta"
    with pytest.raises(FileNotFoundError, match="expected a file of arrays at"):
        load_backbone(tmp_path / "none")


@pytest.fixture
def saved(tmp_path):
    r"""Returns the path, arrays and facts of a backbone."""
    path = tmp_path / "net"
    save_backbone(path, Backbone("P-P", width=4, norm="batch"))
    return path, *checkpoints.read(path)


def test_other_files(saved):
    path, arrays, facts = saved
    content = path.read_bytes()
    for bad in (content[:-1], content[:100], b"", save({"a": np.zeros(3)})):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"expected a file that probnets wrote at .*net"):
            load_backbone(path)

    checkpoints.write(path, arrays, {**facts, "what": "circuit"})
    with pytest.raises(ValueError, match=r"expected a backbone in .*net, got 'circuit'"):
        load_backbone(path)
    checkpoints.write(path, arrays, {**facts, "format": 2})
    with pytest.raises(ValueError, match="format 1, got 2; a newer probnets may read it"):
        load_backbone(path)


@pytest.mark.parametrize(
    "name", ["input_mean", "input_std", "norm.norm.running_var", "reducers.1.conv.conv.weight"]
)
def test_files_with_wrong_arrays(saved, name):
    path, arrays, facts = saved
    assert load_backbone(path).get_buffer("input_std").tolist() == [1, 1, 1]
    found = f"expected a backbone in .*net: .*{name}"
    for bad in (None, arrays[name][:-1], arrays[name].astype(np.float16)):
        if name == "input_mean" and bad is not None and bad.dtype == np.float16:
            found = "expected a backbone in .*net: expected .* of torch.float16"
        others = {k: v for k, v in arrays.items() if k != name}
        checkpoints.write(path, others if bad is None else {**others, name: bad}, facts)
        with pytest.raises(ValueError, match=found):
            load_backbone(path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"layout": "X-P"}, "expected a layout of blocks"),
        ({"layout": 3}, "'int' object has no attribute 'split'"),
        ({"layout": "P-R"}, "expected stages.1.0"),
        ({"width": [4, 5]}, "expected reducers.1"),
        ({"wings": 2}, ".* unexpected keyword argument 'wings'"),
        (None, "'config'"),
    ],
)
def test_files_with_other_facts(saved, change, found):
    path, arrays, facts = saved
    config = {} if change is None else {"config": {**facts.pop("config"), **change}}
    facts.pop("config", None)
    checkpoints.write(path, arrays, {**facts, **config})
    with pytest.raises(ValueError, match=f"expected a backbone in .*net: {found}"):
        load_backbone(path)


# Errors


@pytest.mark.parametrize("layout", ["", "-", "C--T", "X", "-C", "C-", "CxT", "C T"])
def test_wrong_layouts(layout):
    found = f"expected a layout of blocks {ALL}, with single dashes between stages, got '{layout}'"
    with pytest.raises(ValueError, match=found):
        Backbone(layout)


@pytest.mark.parametrize("width", [[8], [8, 8, 8], [], [8, 0], 0, -4])
def test_wrong_widths(width):
    with pytest.raises(ValueError, match="one positive width, or one for each of 2 stages, got"):
        Backbone("P-P", width=width)


def test_wrong_arguments():
    for stray in ("T", "-", "NN"):
        with pytest.raises(ValueError, match=rf"options of blocks in 'P-N', got \['{stray}'\]"):
            Backbone("P-N", width=8, options={stray: {}})
    with pytest.raises(ValueError, match=r"block 'N' of 8 channels: .*'wings'"):
        Backbone("P-N", width=4, options={"N": {"wings": 2}})
    with pytest.raises(ValueError, match="block 'P' of 4 channels: expected options that keep"):
        Backbone("P", width=4, options={"P": {"stride": 2}})
    with pytest.raises(ValueError, match="block 'T' of 16 channels: expected a norm of tokens"):
        Backbone("PT", width=16, options={"T": {"norm": "batch"}})
    with pytest.raises(ValueError, match="expected options that a file can hold"):
        Backbone("S", width=16, options={"S": {"norm": layers.norm}})
    with pytest.raises(ValueError, match="expected options of a letter, or several in turn"):
        Backbone("S", width=16, options={"S": []})
    with pytest.raises(ValueError, match="'maps' or 'logits', got 'probabilities'"):
        Backbone("P", output="probabilities")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected stride >= 1, got 0"):
        Backbone("P", stem=0)


def test_options_in_turn():
    shifts = [{"block": 4, "shift": s} for s in (0, 2)]
    net = Backbone("AA-NA", width=16, options={"A": shifts, "N": {"kernel_size": 3}})
    found = [m.shift for m in net.modules() if isinstance(m, layers.LocalAttention)]
    assert found == [0, 2, 0]


def test_norms_reach_all_blocks_that_know_them():
    net = Backbone("C-T", width=16, norm="batch")
    kinds = {type(m).__name__ for m in net.modules()}
    assert {"BatchNorm2d", "LayerNorm"} <= kinds
    assert "GroupNorm" not in kinds


@pytest.mark.parametrize("layout", [*BLOCKS, "C-T", "A-W"])
def test_hidden_pixels_may_be_missing(layout):
    net = Backbone(layout, in_channels=1, width=16, stem=2).double()
    x = torch.rand(2, 1, 16, 16).double()
    visible = torch.tensor([[1, 0], [0, 1]]).bool().expand(2, 1, 2, 2)
    holes = x.masked_fill(~visible.repeat_interleave(8, 2).repeat_interleave(8, 3), torch.nan)
    found = net.features(holes, visible)
    assert torch.equal(found, net.features(x, visible))
    found.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_something_must_be_visible():
    visible = torch.tensor([True, False]).view(2, 1, 1, 1)
    with pytest.raises(ValueError, match="expected one visible patch or more in each sample"):
        build("P").features(draw(2, 2, 4, 4), visible)


@pytest.mark.parametrize("layout", ["L", "S", "F", "CL-TS"])
def test_merged_backbones_are_kept(layout, tmp_path):
    net = Backbone(layout, in_channels=1, width=16, norm="batch").eval()
    x, one = torch.rand(2, 1, 16, 16), layers.merge(net)
    save_backbone(tmp_path / "one", one)
    again = load_backbone(tmp_path / "one")
    assert again.state_dict().keys() == one.state_dict().keys() != net.state_dict().keys()
    assert torch.equal(again(x), one(x))

    one.head = torch.nn.Linear(16, 3)
    with pytest.raises(ValueError, match="a backbone as it was composed, or merged, got one"):
        save_backbone(tmp_path / "one", one)


def test_wrong_classes():
    with pytest.raises(ValueError, match="expected classes >= 1 for logits, got None"):
        Backbone("P", output="logits")
    with pytest.raises(ValueError, match="expected classes >= 1 for logits, got 0"):
        Backbone("P", classes=0)
    with pytest.raises(
        ValueError, match="a backbone with classes, got one without; give classes="
    ):
        build("P").logits(draw(1, 2, 4, 4))


def test_wrong_images():
    net, x = build("P"), draw(1, 2, 4, 4)
    for bad in (x[0], x[:, :1], x[:, :, :0], x[..., :0]):
        with pytest.raises(ValueError, match=r"images with shape \(B, 2, H, W\), got \("):
            net(bad)
        with pytest.raises(ValueError, match=r"images with shape \(N, 2, H, W\), got \("):
            net.standardise(bad)
    with pytest.raises(ValueError, match=r"images with shape \(N, 2, H, W\), got \(0, 2, 4, 4\)"):
        net.standardise(x[:0])
    assert net(x[:0]).shape == (0, 16)
