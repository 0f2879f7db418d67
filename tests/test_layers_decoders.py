r"""Tests for decoders that predict images from the maps of backbones."""

import pytest
import torch
from torch.testing import assert_close

from probnets.layers import AttentionBlock, CrateDecoderBlock, MapDecoder, TokenDecoder
from probnets.layers.decoders import FillHidden
from probnets.layers.visible import expand

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = {
    "attention": lambda D: AttentionBlock(D, heads=2),
    "CRATE": lambda D: CrateDecoderBlock(D, heads=2),
}


def shaken(module):
    r"""Moves all weights from where they start, those that start at zero too."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def masks(batch, height, width):
    order = torch.rand(batch, height * width).argsort(dim=1)
    return (order < height * width // 2).view(batch, 1, height, width)


def maps_of(widths, stem, height, width=None, batch=2):
    strides = [stem * 2**i for i in range(len(widths))]
    return [
        torch.randn(batch, C, height // s, (width or height) // s, dtype=torch.float64)
        for C, s in zip(widths, strides, strict=True)
    ]


def spoil(maps, visible):
    r"""Changes all hidden places."""
    return [torch.where(expand(visible, x).bool(), x, 100 * torch.randn_like(x)) for x in maps]


def test_fill_by_hand():
    layer = FillHidden(2)
    with torch.no_grad():
        layer.value.copy_(torch.tensor([5.0, 7.0]))
    x = torch.arange(8.0).view(1, 2, 2, 2)
    visible = torch.tensor([[[[True, False]]]])
    assert layer(x, visible).tolist() == [[[[0, 5], [2, 5]], [[4, 7], [6, 7]]]]
    assert torch.equal(layer(x), x)


def test_fill_forgets_what_is_not_finite():
    layer, visible = FillHidden(1), torch.tensor([[[[True, False]]]])
    x = torch.tensor([[[[2.0, torch.nan]]]], requires_grad=True)
    y = layer(x, visible)
    y.sum().backward()
    assert y.tolist() == [[[[2, 0]]]]
    assert x.grad is not None
    assert x.grad.tolist() == [[[[1, 0]]]]
    assert layer.value.grad is not None
    assert layer.value.grad.tolist() == [1]


@pytest.mark.parametrize("stem", [1, 2, 4])
@pytest.mark.parametrize("widths", [[8], [8, 16], [4, 8, 12]], ids=len)
def test_maps_become_images(widths, stem):
    decoder = MapDecoder(widths, stem, 3, width=32).double()
    maps = maps_of(widths, stem, 16, 32)
    visible = masks(2, *maps[-1].shape[2:])
    assert decoder(maps, visible).shape == (2, 3, 16, 32)


def test_widths_halve_down_to_16():
    decoder = MapDecoder([4, 5, 6, 7], 1, 1, width=64)
    assert [p.out_channels for p in decoder.projections] == [64, 32, 16, 16]
    assert [p.in_channels for p in decoder.projections] == [7, 6, 5, 4]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_maps_decoder_forgets_hidden_places(stages):
    widths = [8, 12, 16][:stages]
    decoder = shaken(MapDecoder(widths, 2, 1, width=32))
    maps = maps_of(widths, 2, 32)
    visible = masks(2, 4, 4)
    assert torch.equal(decoder(maps, visible), decoder(spoil(maps, visible), visible))
    for stage in range(stages):  # it does look at each stage
        other = [x + torch.randn_like(x) if i == stage else x for i, x in enumerate(maps)]
        assert not torch.allclose(decoder(maps, visible), decoder(other, visible))


def test_one_stage_without_the_rest_is_a_projection():
    decoder = shaken(MapDecoder([8], 2, 3, width=16))
    (x,) = maps_of([8], 2, 8)
    visible = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    y = decoder.pixels(decoder.norm(decoder.projections[0](decoder.norms[0](x))))
    blocks = decoder([x], visible).unflatten(3, (4, 2)).unflatten(2, (4, 2))  # (B, C, h, p, w, p)
    assert_close(blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3), y)


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("stride", [1, 4])
def test_tokens_become_images(kind, stride):
    decoder = TokenDecoder(6, stride, 3, layer=TOKENS[kind], width=16)
    maps = [torch.randn(2, 99, 1, 1), torch.randn(2, 6, 3, 5)]
    assert decoder(maps, masks(2, 3, 5)).shape == (2, 3, 3 * stride, 5 * stride)


@pytest.mark.parametrize("kind", TOKENS)
def test_token_decoder_forgets_hidden_places(kind):
    decoder = shaken(TokenDecoder(6, 2, 1, layer=TOKENS[kind], width=16))
    maps, visible = maps_of([6], 2, 8), masks(2, 4, 4)
    y = decoder(maps, visible)
    assert torch.equal(y, decoder(spoil(maps, visible), visible))
    assert not torch.allclose(y, decoder([x + torch.randn_like(x) for x in maps], visible))


@pytest.mark.parametrize("kind", TOKENS)
def test_hidden_tokens_know_their_places(kind):
    decoder = shaken(TokenDecoder(6, 1, 1, layer=TOKENS[kind], width=16))
    visible = torch.tensor([[[[True, False], [False, False]]]])
    pixels = decoder(maps_of([6], 1, 2, batch=1), visible).flatten()
    assert len(set(pixels.tolist())) == 4


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_depth_counts_layers(depth):
    decoder = TokenDecoder(6, 1, 1, layer=TOKENS["attention"], depth=depth, width=8)
    blocks = [m for m in decoder.modules() if isinstance(m, AttentionBlock)]
    assert len({id(block) for block in blocks}) == depth


@pytest.mark.parametrize("kind", ["maps", *TOKENS])
def test_every_weight_learns(kind):
    if kind == "maps":
        decoder, widths, stem = MapDecoder([6, 8], 2, 1, width=32), [6, 8], 2
    else:
        decoder, widths, stem = TokenDecoder(6, 2, 1, layer=TOKENS[kind], width=16), [6], 2
    maps = maps_of(widths, stem, 8)
    visible = masks(2, *maps[-1].shape[2:])
    y = shaken(decoder)(maps, visible)
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["maps", *TOKENS])
def test_device_and_dtype_are_handed_on(kind):
    kwargs = {"device": "meta", "dtype": torch.bfloat16}
    if kind == "maps":
        decoder = MapDecoder([6, 8], 2, 1, **kwargs)
    else:
        decoder = TokenDecoder(6, 2, 1, layer=TOKENS[kind], **kwargs)
    for name, tensor in decoder.state_dict(keep_vars=True).items():
        assert (tensor.device.type, tensor.dtype) == ("meta", torch.bfloat16), name
