r"""Tests for models that predict the hidden patches of images."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from probnets.layers import (
    BLOCKS,
    AttentionBlock,
    Backbone,
    CrateDecoderBlock,
    MapDecoder,
    MaskedImageModel,
    TokenDecoder,
)
from probnets.layers.decoders import Decoder
from probnets.layers.visible import expand

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = [*BLOCKS, "C-T", "NR-VT", "A-K", "TK", "T-T", "W-L-S"]


def model_of(layout="C-T", *, width=16, stem=2, **options):
    own = {k: options.pop(k) for k in ("in_channels", "norm", "patches") if k in options}
    backbone = Backbone(layout, width=width, stem=stem, **{"in_channels": 1, **own})
    return MaskedImageModel(backbone, width=16, **options)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Constant(Decoder):
    r"""Is the decoder that predicts one image."""

    def __init__(self, image):
        super().__init__()
        self.image = nn.Parameter(image)

    def forward(self, maps, visible):
        return self.image.expand(len(visible), -1, -1, -1)


# Masks


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(0.6, 6), (0.5, 8), (0.75, 4), (0.28, 12), (0.001, 15), (0.999, 1)],
)
def test_masks_show_as_many_patches_each(ratio, shown):
    x = torch.rand(50, 1, 16, 16)
    visible = model_of(mask_ratio=ratio).draw_masks(x)
    assert visible.dtype == torch.bool
    assert visible.shape == (50, 1, 4, 4)
    assert visible.flatten(1).sum(dim=1).tolist() == [shown] * 50


def test_two_patches_leave_one_each():
    x = torch.rand(9, 1, 4, 8)
    for ratio in (1e-6, 0.5, 1 - 1e-6):
        assert model_of(mask_ratio=ratio).draw_masks(x).sum(dim=(1, 2, 3)).tolist() == [1] * 9


def test_every_pair_of_patches_is_as_likely():
    count = 20_000
    visible = model_of().draw_masks(torch.zeros(count, 1, 16, 8), generator=seeded(1)).flatten(1)
    share = 3 / 8  # of 8 patches 3 are visible
    error = 5 * math.sqrt(share * (1 - share) / count)
    assert_close(
        visible.double().mean(dim=0), torch.full((8,), share).double(), atol=error, rtol=0
    )

    pairs = torch.einsum("bi,bj->ij", visible.double(), visible.double()) / count
    share = 3 / 8 * 2 / 7
    error = 5 * math.sqrt(share * (1 - share) / count)
    apart = ~torch.eye(8, dtype=torch.bool)
    assert (pairs[apart] - share).abs().max() < error


def test_masks_come_from_the_generator():
    model, x = model_of(), torch.rand(8, 1, 16, 16)
    before = torch.get_rng_state()
    first = model.draw_masks(x, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, model.draw_masks(x, generator=seeded(3)))
    assert not torch.equal(first, model.draw_masks(x, generator=seeded(4)))
    assert not torch.equal(first[:4], first[4:])


@pytest.mark.parametrize("size", [(18, 16), (16, 10), (4, 4), (0, 16)], ids=str)
def test_images_must_be_multiples_of_patches(size):
    with pytest.raises(ValueError, match=f"sides are multiples of 4.*got {size[0]}x{size[1]}"):
        model_of().draw_masks(torch.rand(2, 1, *size))


# Targets and loss


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1000.0], ids=str)
def test_targets_are_standardised_patches(channels, scale):
    model = model_of(in_channels=channels, patch=4).double()
    x = scale * (5 + torch.rand(2, channels, 8, 12, dtype=torch.float64))
    model.backbone.standardise(x)
    y, mean, std = model.targets(x)
    for top in (0, 4):
        for left in (0, 4, 8):
            own = (slice(None), slice(None), slice(top, top + 4), slice(left, left + 4))
            patch = x[own].flatten(1)
            assert_close(y[own].flatten(1).mean(dim=1), torch.zeros(2).double(), atol=1e-9, rtol=0)
            assert_close(y[own].flatten(1).var(dim=1), torch.ones(2).double(), atol=1e-4, rtol=0)
            assert_close(mean[own].flatten(1), patch.mean(1, keepdim=True).expand_as(patch))
            assert_close(
                std[own].flatten(1), patch.std(1, keepdim=True).expand_as(patch), rtol=1e-4, atol=0
            )
    assert_close(y * std + mean, x)


def test_flat_patches_become_zero():
    model = model_of()
    x = torch.full((2, 1, 8, 8), 17, dtype=torch.uint8)
    x[1, :, :4, :4] = torch.arange(16, dtype=torch.uint8).view(4, 4)
    for images in (x, x[:1]):  # of no scale at all, too
        model.backbone.standardise(images)
        y, _, _ = model.targets(images)
        assert y.dtype == torch.float32
        assert y[0].abs().max() == 0
        assert y.isfinite().all()
    model.backbone.standardise(x)
    assert model.targets(x)[0][1, :, :4, :4].abs().max() > 1


def test_targets_of_whole_images():
    model = model_of(in_channels=2, target="image")
    x = torch.rand(3, 2, 8, 8) * torch.tensor([1.0, 9.0])[:, None, None] + 4
    model.backbone.standardise(x)
    y, mean, std = model.targets(x)
    assert_close(y.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    assert_close(y.std(dim=(0, 2, 3), correction=0), torch.ones(2))
    assert_close(y * std + mean, x)
    assert mean.shape == std.shape == x.shape


def test_loss_by_hand():
    image = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]])[None, None]
    decoder = Constant(torch.arange(8.0).view(1, 1, 2, 4))
    model = MaskedImageModel(
        Backbone("P", in_channels=1, width=4, stem=2), decoder=decoder, target="image"
    )
    with torch.no_grad():
        model.backbone.input_mean.fill_(1.0)
        model.backbone.input_std.fill_(2.0)
    # Errors of the left patch: (0, 1, 4, 5) - (0, 0.5, 1, 1.5); of the right: (2, 3, 6, 7) + 0.5.
    left = (0 + 0.5**2 + 3**2 + 3.5**2) / 4
    right = (2.5**2 + 3.5**2 + 6.5**2 + 7.5**2) / 4
    for shown, expected in (([False, True], left), ([True, False], right)):
        visible = torch.tensor([[[shown]]])
        assert model.loss(image, visible).item() == pytest.approx(expected)
    both = torch.tensor([[[[False, True]]], [[[True, False]]]])
    loss = model.loss(image.repeat(2, 1, 1, 1), both)
    assert loss.item() == pytest.approx((left + right) / 2)


@pytest.mark.parametrize("target", ["patch", "image"])
@pytest.mark.parametrize("layout", ["C-T", "T"])
def test_loss_from_predictions(layout, target):
    model = model_of(layout, in_channels=3, patch=4, target=target).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    visible = model.draw_masks(x)
    error = model(x, visible) - model.targets(x)[0]
    terms = [
        error[b, c, i, j].square()
        for b in range(2)
        for c in range(3)
        for i in range(8)
        for j in range(8)
        if not visible[b, 0, i // 4, j // 4]
    ]
    assert_close(model.loss(x, visible), torch.stack(terms).mean())


# What is predicted from what


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_predictions_see_visible_patches_alone(layout, mode):
    stride = 2 ** (1 + layout.count("-"))
    patch = 2 * stride if set(layout) & set("VW") else stride
    model = model_of(layout, patches=layout[0] in "TK", patch=patch).train(mode == "train")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.rand(2, 1, 16, 32)
    visible = model.draw_masks(x)
    shown = expand(visible, x).bool()

    outputs = []
    for other in (x, torch.where(shown, x, 100 * torch.randn_like(x))):
        model.load_state_dict(start)  # running statistics, if there are any
        outputs.append(model(other, visible))
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()
    assert not torch.allclose(outputs[0], model(torch.where(shown, 1 - x, x), visible))
    assert not torch.allclose(outputs[0], model(x, visible.flip(2, 3)))


@pytest.mark.parametrize("norm", ["batch", "rep_batch", "instance_batch", "group", "none"])
def test_norms_see_visible_patches_alone(norm):
    model = model_of("CR-N", norm=norm).train()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.rand(3, 1, 16, 16)
    visible = model.draw_masks(x)
    outputs, states = [], []
    for other in (x, torch.where(expand(visible, x).bool(), x, 100 * torch.randn_like(x))):
        model.load_state_dict(start)
        outputs.append(model(other, visible))
        states.append({k: v.clone() for k, v in model.backbone.state_dict().items()})
    assert torch.equal(*outputs)
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("layout", ["C-T", "T", "K", "A-K"])
def test_slopes_of_predictions_are_zero_at_hidden_pixels(layout):
    model, x = model_of(layout), torch.rand(2, 1, 16, 16, requires_grad=True)
    visible = model.draw_masks(x)
    model(x, visible).square().sum().backward()
    assert x.grad is not None
    shown = expand(visible, x).bool()
    assert x.grad[~shown].abs().max() == 0
    assert x.grad[shown].abs().min() > 0


@pytest.mark.parametrize("layout", ["C-T", "T", "K", "NR-C"])
def test_every_weight_learns(layout):
    model, x = model_of(layout), torch.rand(4, 1, 16, 16)
    model.loss(x, model.draw_masks(x)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("target", ["patch", "image"])
def test_reconstructions_keep_what_is_visible(target):
    model = model_of(in_channels=3, target=target)
    x = 40 + 9 * torch.rand(2, 3, 16, 16)
    model.backbone.standardise(x)
    visible = model.draw_masks(x)
    shown = expand(visible, x).bool().expand_as(x)
    y = model.reconstruct(x, visible)
    assert not y.requires_grad
    assert torch.equal(y[shown], x[shown])

    _, mean, std = model.targets(x)
    assert_close(y[~shown], (model(x, visible) * std + mean)[~shown].detach())
    whole = model.reconstruct(x.byte(), visible)
    assert torch.equal(whole[shown], x.byte().float()[shown])


# The decoder


@pytest.mark.parametrize(
    ("layout", "kind", "block"),
    [
        ("T", TokenDecoder, AttentionBlock),
        ("TTT", TokenDecoder, AttentionBlock),
        ("KK", TokenDecoder, CrateDecoderBlock),
        ("TK", MapDecoder, None),
        ("T-T", MapDecoder, None),
        ("C", MapDecoder, None),
        ("C-T", MapDecoder, None),
    ],
)
def test_decoder_follows_from_the_layout(layout, kind, block):
    decoder = model_of(layout, in_channels=3).decoder
    assert type(decoder) is kind
    kinds = {type(m) for m in decoder.modules()} & {AttentionBlock, CrateDecoderBlock}
    assert kinds == ({block} if block else set())


def test_given_decoder_is_kept():
    decoder = Constant(torch.rand(1, 1, 16, 16))
    weights = decoder.image.clone()
    model = model_of("T", decoder=decoder)
    assert model.decoder is decoder
    assert torch.equal(decoder.image, weights)


@pytest.mark.parametrize("layout", ["C-T", "T", "K"])
def test_weights_come_from_the_generator(layout):
    backbone = Backbone(layout, in_channels=1, width=16)
    weights = []
    for seed in (1, 1, 2):
        torch.randn(3)  # the global state is another
        model = MaskedImageModel(backbone, width=16, generator=seeded(seed))
        weights.append(nn.utils.parameters_to_vector(model.decoder.parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_decoder_is_of_the_type_of_the_backbone():
    for layout in ("C-T", "T", "K"):
        model = MaskedImageModel(Backbone(layout, in_channels=1, width=16, dtype=torch.float64))
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        x = torch.rand(2, 1, 16, 16, dtype=torch.float32)
        assert model.loss(x, model.draw_masks(x)).dtype == torch.float64


# Errors


@pytest.mark.parametrize("patch", [0, -4, 2, 6])
def test_patches_must_be_multiples_of_the_stride(patch):
    with pytest.raises(
        ValueError, match=f"multiple of the stride 4 of the backbone, got {patch};"
    ):
        model_of(patch=patch)


def test_patches_of_one_pixel():
    with pytest.raises(ValueError, match=r"expected patches of two pixels or more.* got 1; give"):
        model_of("T", stem=1)
    assert model_of("T", stem=1, patch=2).patch == 2


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_mask_ratio_must_be_a_share(ratio):
    with pytest.raises(ValueError, match=r"expected mask_ratio in \(0, 1\), got"):
        model_of(mask_ratio=ratio)


def test_unknown_target():
    with pytest.raises(ValueError, match="expected target 'patch' or 'image', got 'pixels'"):
        model_of(target="pixels")


def test_masks_of_another_size():
    model, x = model_of(), torch.rand(2, 1, 16, 16)
    for bad in (torch.ones(2, 1, 8, 8), torch.ones(3, 1, 4, 4)):
        with pytest.raises(ValueError, match="expected"):
            model.loss(x, bad.bool())
