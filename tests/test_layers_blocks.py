r"""Tests for the probnets.layers.blocks module."""

import inspect
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from probnets import layers
from probnets.layers.blocks import BLOCKS, heads_for, make_block

pytestmark = pytest.mark.usefixtures("one_thread")

LETTERS = sorted(BLOCKS)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# Values


@pytest.mark.parametrize(
    ("channels", "heads"),
    [(1, 1), (16, 1), (32, 2), (40, 2), (48, 3), (54, 3), (33, 1), (256, 16)],
)
def test_heads_by_hand(channels, heads):
    assert heads_for(channels) == heads


@pytest.mark.parametrize(
    ("letter", "kind"),
    [("C", layers.FusedInvertedResidual), ("N", layers.ConvNeXtBlock), ("P", layers.ConvNormAct)],
)
def test_letters_by_hand(letter, kind):
    assert isinstance(make_block(letter, 8), kind)


def test_letters_of_tokens():
    for letter, kind in (("T", layers.AttentionBlock), ("K", layers.CrateBlock)):
        block = make_block(letter, 8)
        assert isinstance(block, layers.OnMaps)
        assert isinstance(block.layer, kind)


# Laws


@pytest.mark.parametrize("channels", [16, 32])
@pytest.mark.parametrize("letter", LETTERS)
def test_blocks_are_functions_of_one_sample(letter, channels):
    block = make_block(letter, channels, dtype=torch.float64).train()
    assert layers.is_function(block)
    assert layers.is_per_sample(block)
    assert (block.in_channels, block.out_channels, block.stride) == (channels, channels, 1)

    x = draw(2, channels, 5, 4)
    y = block(x)
    assert y.shape == x.shape
    assert_close(block(x[:1]), y[:1])


@pytest.mark.parametrize("letter", LETTERS)
def test_docstring_lists_the_letter(letter):
    assert re.search(rf"^(\s*|.*\s\s){letter}   \w", inspect.getdoc(make_block) or "", re.M)


@pytest.mark.parametrize("letter", LETTERS)
def test_res_scale_reaches_the_block(letter):
    scales = [
        m.res_scale
        for m in make_block(letter, 16, res_scale=0.3).modules()
        if hasattr(m, "res_scale")
    ]
    assert scales == ([0.3] if BLOCKS[letter].residual else [])


@pytest.mark.parametrize("letter", LETTERS)
def test_heads_by_default(letter):
    heads = {m.heads for m in make_block(letter, 32).modules() if hasattr(m, "heads")}
    assert heads == ({2} if BLOCKS[letter].heads else set())


@pytest.mark.parametrize("letter", LETTERS)
def test_norms_reach_the_block(letter):
    def kinds(block):
        norms = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
        return {type(m) for m in block.modules() if isinstance(m, norms)}

    group = BLOCKS[letter].norm == "group"
    assert kinds(make_block(letter, 16)) == {nn.GroupNorm if group else nn.LayerNorm}
    assert kinds(make_block(letter, 16, norm="none")) == set()
    if letter not in "KT":
        assert kinds(make_block(letter, 16, norm="batch")) == {nn.BatchNorm2d}


@pytest.mark.parametrize("letter", LETTERS)
def test_blocks_that_see_no_places_take_pixels_in_any_order(letter):
    block = make_block(letter, 16, dtype=torch.float64)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, order = draw(1, 16, 36), torch.randperm(36)
    y, moved = (block(z.unflatten(2, (6, 6))).flatten(2) for z in (x, x[:, :, order]))
    assert torch.allclose(moved, y[:, :, order]) == BLOCKS[letter].tokens


@pytest.mark.parametrize("letter", BLOCKS)
@pytest.mark.parametrize("name", layers.NORMS)
def test_every_block_goes_with_every_norm(letter, name):
    block, x = make_block(letter, 16, norm=name).eval(), torch.randn(2, 16, 5, 3)
    assert block(x).shape == x.shape
    alone = {"layer", "layer_plain", "none"} if BLOCKS[letter].tokens else set(layers.NORMS)
    twin = make_block(letter, 16)
    assert (repr(block) == repr(twin.eval())) == (name == BLOCKS[letter].norm or name not in alone)


def test_options_reach_the_block():
    assert make_block("N", 8, options={"kernel_size": 3}).receptive_field == 3
    assert make_block("A", 8, options={"block": 5, "halo": 1}).receptive_field == 7
    block = make_block("T", 32, options={"heads": 8, "norm": "none", "res_scale": 0.5})
    assert isinstance(block, layers.OnMaps)
    assert isinstance(block.layer, layers.AttentionBlock)
    assert (block.layer.attention.heads, block.layer.res_scale) == (8, 0.5)
    assert not any(isinstance(m, nn.LayerNorm) for m in block.modules())


# Errors


@pytest.mark.parametrize("letter", ["X", "c", "", "CC", "-"])
def test_unknown_letters(letter):
    with pytest.raises(ValueError, match=f"expected a block of ACFGIKLNPQRSTVW, got '{letter}'"):
        make_block(letter, 8)


@pytest.mark.parametrize("letter", LETTERS)
def test_unknown_options(letter):
    with pytest.raises(ValueError, match=f"block '{letter}' of 16 channels: .*'wings'"):
        make_block(letter, 16, options={"wings": 2})


def test_wrong_options():
    with pytest.raises(ValueError, match="block 'W' of 6 channels: expected channels divisible"):
        make_block("W", 6)
    with pytest.raises(ValueError, match="block 'T' of 8 channels: expected features divisible"):
        make_block("T", 8, options={"heads": 3})
    with pytest.raises(ValueError, match="block 'T' of 8 channels: expected a norm of tokens"):
        make_block("T", 8, options={"norm": "group"})


@pytest.mark.parametrize(
    ("letter", "options", "found"),
    [
        ("P", {"stride": 2}, "8 channels and stride 2"),
        ("R", {"out_channels": 12}, "12 channels and stride 1"),
        ("A", {"query_pool": 2}, "8 channels and stride 2"),
    ],
)
def test_options_that_change_the_shape(letter, options, found):
    sentence = f"block '{letter}' of 8 channels: expected options that keep .*, got {found}"
    with pytest.raises(ValueError, match=sentence):
        make_block(letter, 8, options=options)
