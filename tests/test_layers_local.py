r"""Tests for the probnets.layers.local module."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from probnets.layers.attention import MultiHeadAttention
from probnets.layers.local import LocalAttention, LocalAttentionBlock, _max_pool

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(layer):
    layer = layer.double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def means(**options):
    r"""Creates an attention to all keys alike, of one channel, with values as they are."""
    layer = LocalAttention(1, heads=1, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.qkv.conv.weight[2] = 1.0
        layer.output.conv.weight.fill_(1.0)
    return layer


# Values by hand


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"block": 2}, [2.0, 2.0, 7.0, 7.0, 4.0]),
        ({"block": 2, "halo": 1}, [3.0, 3.0, 5.25, 5.25, 6.5]),
        ({"block": 2, "shift": 1}, [1.0, 4.0, 4.0, 6.5, 6.5]),
        ({"block": 4, "query_pool": 2}, [4.5, 4.5, 4.0]),
        ({"block": 4, "shift": 2, "query_pool": 2}, [2.0, 6.0, 6.0]),
        ({"block": 64}, [4.4] * 5),
        ({"block": 2, "halo": 9}, [4.4] * 5),
    ],
)
def test_blocks_by_hand(options, expected):
    x = torch.tensor([[[[1.0, 3.0, 5.0, 9.0, 4.0]]]])
    assert_close(means(**options)(x), torch.tensor([[[expected]]]))
    assert_close(means(**options)(x.mT), torch.tensor([[[expected]]]).mT)


def test_positions_by_hand():
    layer = means(block=2, halo=1)
    assert layer.positions is not None
    assert layer.positions.shape == (1, 5, 5)
    with torch.no_grad():
        layer.positions[0, 2, 3] = math.log(3.0)  # the key to the right counts three times

    y = layer(torch.tensor([[[[1.0, 3.0, 5.0, 9.0]]]]))
    assert_close(y, torch.tensor([[[[15 / 5, 19 / 5, 35 / 5, 17 / 3]]]]))


def test_max_pool_by_hand():
    x = torch.tensor([[[[-1.0, -5.0, -3.0]]]])
    assert_close(_max_pool(x, None, 2), torch.tensor([[[[-1.0, -3.0]]]]))

    x = torch.tensor([[[[7.0, 8.0, -4.0, -2.0], [9.0, 9.0, -6.0, -5.0]]]], requires_grad=True)
    y = _max_pool(x, torch.tensor([[[[False, True]]]]), 2)
    assert_close(y, torch.tensor([[[[0.0, -2.0]]]]))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.nonzero().tolist() == [[0, 0, 0, 3]]


# Definition


def definition(layer, x, visible):
    r"""Computes an attention pixel by pixel; hidden outputs are zero."""
    B, _, H, W = x.shape
    p, b, a, s, d = layer.stride, layer.block, layer.halo, layer.shift, layer.head_features
    if visible is None:
        visible = torch.ones(B, 1, 1, 1, dtype=torch.bool)
    shown = nn.functional.interpolate(visible.double(), (H, W))[:, 0] > 0
    q, k, v = layer.qkv(x).chunk(3, dim=1)
    height, width = -(-H // p), -(-W // p)
    y = q.new_zeros(B, layer.heads * d, height, width)

    def around(i):
        start = (p * i - s) // b * b + s
        return range(start - a, start + b + a)

    for n in range(B):
        for i in range(height):
            for j in range(width):
                cell = shown[n, p * i : p * i + p, p * j : p * j + p]
                if not cell.any():
                    continue
                query = q[n, :, p * i : p * i + p, p * j : p * j + p][:, cell].amax(1)
                keys = [(r, c) for r in around(i) for c in around(j)]
                keys = [(r, c) for r, c in keys if 0 <= r < H and 0 <= c < W and shown[n, r, c]]
                for h in range(layer.heads):
                    f = slice(h * d, h * d + d)
                    scores = [query[f] @ k[n, f, r, c] / math.sqrt(d) for r, c in keys]
                    if layer.positions is not None:
                        m = b + a - p
                        for t, (r, c) in enumerate(keys):
                            scores[t] = (
                                scores[t] + layer.positions[h, m + r - p * i, m + c - p * j]
                            )
                    shares = torch.stack(scores).softmax(0)
                    y[n, f, i, j] = sum(
                        w * v[n, f, r, c] for w, (r, c) in zip(shares, keys, strict=True)
                    )
    return layer.output(y)


@torch.no_grad()
@pytest.mark.parametrize("size", [(3, 4), (5, 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"block": 2},
        {"block": 2, "halo": 1},
        {"block": 1, "halo": 1},
        {"block": 2, "halo": 3, "shift": 1},
        {"block": 3, "shift": 2},
        {"block": 4, "shift": 2, "query_pool": 2},
        {"block": 2, "halo": 1, "query_pool": 2},
        {"block": 9, "halo": 1, "query_pool": 3},
        {"block": 6, "shift": 4},
        {"block": 2, "halo": 1, "position": "none", "head_features": 5},
    ],
    ids=str,
)
def test_matches_definition(options, size):
    layer, x = drawn(LocalAttention(3, 4, heads=2, **options)), draw(1, 3, *size)
    assert_close(layer(x), definition(layer, x, None))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"block": 2},
        {"block": 4, "halo": 1},
        {"block": 4, "shift": 2, "query_pool": 2},
        {"block": 3, "position": "none"},
    ],
    ids=str,
)
def test_hidden_pixels_are_no_keys(options):
    layer, x = drawn(LocalAttention(3, 4, heads=2, **options)), draw(2, 3, 4, 6)
    visible = torch.tensor([[[True, False, True], [False, False, True]], [[True] * 3] * 2])
    visible = visible[:, None]
    y = layer(x, visible)
    shown = visible.repeat_interleave(y.shape[2] // 2, 2).repeat_interleave(y.shape[3] // 3, 3)
    shown = shown.expand_as(y)
    assert_close(y[shown], definition(layer, x, visible)[shown])


@torch.no_grad()
@pytest.mark.parametrize("options", [{"block": 6}, {"block": 2, "halo": 6}], ids=str)
def test_a_block_that_covers_the_map_is_global(options):
    layer = drawn(LocalAttention(8, heads=2, position="none", **options))
    other = MultiHeadAttention(8, heads=2).double()
    state = {name.replace(".conv", ""): w for name, w in layer.state_dict().items()}
    other.load_state_dict({n: w.squeeze((2, 3)) if w.ndim > 1 else w for n, w in state.items()})

    x = draw(2, 8, 6, 4)
    assert_close(layer(x), other(x.flatten(2).mT).mT.unflatten(2, (6, 4)))


# Laws


@torch.no_grad()
def test_a_shift_moves_the_map():
    layer, x = drawn(LocalAttention(4, heads=2, block=3, halo=0, shift=2)), draw(1, 4, 9, 8)
    y = layer(x)
    layer.shift = 0
    assert_close(y[:, :, 2:, 2:], layer(x[:, :, 2:, 2:]))
    assert_close(y[:, :, :2, :2], layer(x[:, :, :2, :2]))


@torch.no_grad()
def test_blocks_do_not_depend_on_the_size_of_the_map():
    layer, x = drawn(LocalAttention(4, heads=2, block=3, halo=2)), draw(1, 4, 9, 12)
    assert_close(layer(x)[:, :, :6, :6], layer(x[:, :, :8, :8])[:, :, :6, :6])


@torch.no_grad()
def test_fused_and_plain_attention_agree():
    layer, x = drawn(LocalAttention(4, heads=2, block=3, halo=2, shift=1)), draw(2, 4, 7, 5)
    visible = torch.rand(2, 1, 7, 5) < 0.5
    for mask in (None, visible):
        with torch.enable_grad():
            plain = layer(x.requires_grad_(), mask)
        assert_close(layer(x.detach(), mask), plain.detach())


def test_all_hidden_stays_finite():
    layer = drawn(LocalAttentionBlock(4, heads=2, block=2, halo=1, query_pool=2))
    x = draw(1, 4, 4, 4).requires_grad_()
    y = layer(x, torch.zeros(1, 1, 2, 2, dtype=torch.bool))
    y.square().sum().backward()
    assert x.grad is not None
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@torch.no_grad()
def test_block_is_two_branches():
    block = drawn(LocalAttentionBlock(4, heads=2, block=2, shift=1, res_scale=0.5))
    x = draw(1, 4, 3, 5)
    y = x + 0.5 * block.attention(block.norm1(x))
    assert_close(block(x), y + 0.5 * block.feed_forward(block.norm2(y)))
    assert block.shortcut is None


@torch.no_grad()
def test_pooled_shortcut():
    block = drawn(LocalAttentionBlock(4, heads=2, block=2, query_pool=2, res_scale=0.0))
    x = draw(1, 4, 4, 4)
    assert block.shortcut is not None
    z = block.shortcut(block.norm1(x))
    assert_close(block(x)[0, :, 1, 0], z[0, :, 2:, :2].amax((1, 2)))


# Other libraries


def timm_state(block):
    r"""Renames the weights of a block as timm does."""
    names = {"attention.qkv.conv": "attn.qkv", "attention.output.conv": "attn.proj"}
    names |= {"norm1.norm": "norm1", "norm2.norm": "norm2", "shortcut.conv": "proj"}
    names |= {"feed_forward.layer.expand": "mlp.fc1", "feed_forward.layer.project": "mlp.fc2"}
    state = {}
    for name, weight in block.state_dict().items():
        path, _, kind = name.rpartition(".")
        if path in names:
            state[f"{names[path]}.{kind}"] = weight.flatten(1) if weight.ndim > 1 else weight
    return state


def layer_norm(features, **options):
    return nn.LayerNorm(features, eps=1e-6, **options)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_swin(shift):
    swin = pytest.importorskip("timm.models.swin_transformer")
    block = drawn(LocalAttentionBlock(8, heads=2, block=4, shift=shift))
    other = swin.SwinTransformerBlock(
        8, (12, 16), num_heads=2, window_size=4, shift_size=shift, norm_layer=layer_norm
    )
    state = timm_state(block)
    # Swin counts from keys to queries, so that its table is ours turned around.
    table = block.attention.positions
    assert table is not None
    state["attn.relative_position_bias_table"] = table.flip(1, 2).flatten(1).mT
    other.double().eval().load_state_dict(state)

    x = draw(2, 8, 12, 16)
    expected = other(x.movedim(1, -1)).movedim(-1, 1)
    assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("halo", [1, 3])
def test_halonet(halo):
    halonet = pytest.importorskip("timm.layers.halo_attn")
    layer = drawn(LocalAttention(16, heads=2, block=4, halo=halo, position="none"))
    other = halonet.HaloAttn(16, num_heads=2, block_size=4, halo_size=halo, qkv_bias=True).double()
    # There each head has its keys and values side by side, and no map of the outputs.
    order = torch.arange(32).view(2, 2, 8).transpose(0, 1).flatten()
    weight, bias = layer.qkv.conv.weight, layer.qkv.conv.bias
    assert bias is not None
    state = {name: torch.zeros_like(w) for name, w in other.state_dict().items()}
    state |= {"q.weight": weight[:16], "q.bias": bias[:16]}
    state |= {"kv.weight": weight[16:][order], "kv.bias": bias[16:][order]}
    other.load_state_dict(state)

    # There the zeros around the map are keys too, so that blocks at the border differ.
    x = draw(2, 16, 16, 12)
    expected = layer.output(other(x))
    inside = slice(None), slice(None), slice(4, -4), slice(4, -4)
    assert_close(layer(x)[inside], expected[inside], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(x), expected)


@pytest.mark.slow
@torch.no_grad()
def test_hiera():
    hiera = pytest.importorskip("timm.models.hiera")
    block = drawn(LocalAttentionBlock(8, 16, heads=2, block=4, query_pool=2))
    other = hiera.HieraBlock(
        8, 16, 2, norm_layer=layer_norm, q_stride=4, window_size=4, use_mask_unit_attn=True
    )
    other.double().load_state_dict(timm_state(block))
    nn.init.zeros_(block.attention.get_parameter("positions"))  # there are none

    # There a token is numbered by its place in what is pooled, then by its pool, then its unit.
    x = draw(2, 8, 8, 12)
    tokens = x.unflatten(3, (3, 2, 2)).unflatten(2, (2, 2, 2))  # (B, C, m, i, r, n, j, c)
    tokens = tokens.permute(0, 4, 7, 3, 6, 2, 5, 1).flatten(1, 6)
    expected = other(tokens).unflatten(1, (2, 2, 2, 3))  # (B, i, j, m, n, C)
    expected = expected.permute(0, 5, 3, 1, 4, 2).flatten(4).flatten(2, 3)
    assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block": 0},
            r"expected block >= 1, halo >= 0 and shift in \[0, block\), got 0, 0 and 0",
        ),
        ({"halo": -1}, r"expected block >= 1, halo >= 0 and shift in \[0, block\), got 8, -1"),
        ({"block": 4, "shift": 4}, r"shift in \[0, block\), got 4, 0 and 4"),
        ({"shift": -1}, r"shift in \[0, block\), got 8, 0 and -1"),
        ({"block": 3, "query_pool": 2}, "block and shift divisible by query_pool 2, got 3 and 0"),
        ({"shift": 1, "query_pool": 2}, "block and shift divisible by query_pool 2, got 8 and 1"),
        ({"position": "absolute"}, "expected position relative or none, got 'absolute'"),
        ({"heads": 3}, "expected features divisible by heads, got 8 and 3"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    options = {"heads": 2} | options
    with pytest.raises(ValueError, match=message):
        LocalAttention(8, **options)
