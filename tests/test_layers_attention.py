r"""Tests for attention between tokens."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.nn.functional import scaled_dot_product_attention

from probnets.layers import attention
from probnets.layers.attention import AttentionBlock, FeedForward, MultiHeadAttention, attend

pytestmark = pytest.mark.usefixtures("one_thread")


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def draw(bias=None):
    r"""Draws queries, keys, values and perhaps a bias, all with two dimensions in front."""
    q, k, v = double(2, 3, 4, 6), double(2, 3, 5, 6), double(2, 3, 5, 6)
    if bias is None:
        return [q, k, v, None]
    mask = double(*bias)
    mask[..., 1::2] = -torch.inf
    return [q, k, v, mask]


@pytest.fixture
def fused(monkeypatch):
    r"""Counts the calls of the fused attention."""
    calls = []

    def spy(*args, **kwargs):
        calls.append(args)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    return calls


MASKS = [None, (4, 5), (2, 1, 1, 5), (2, 3, 4, 5), (3, 4, 5), (5,)]


def test_attend_by_hand():
    q = torch.tensor([[2 * math.log(3.0), 0.0, 0.0, 0.0]])
    k = torch.tensor([[1.0, 5.0, 0.0, 0.0], [0.0, 7.0, 0.0, 0.0]])
    v = torch.tensor([[4.0], [8.0]])
    assert attend(q, k, v).item() == pytest.approx(0.75 * 4 + 0.25 * 8)  # odds of exp(log 3)
    bias = torch.tensor([0.0, math.log(3.0)])
    assert attend(q, k, v, bias=bias).item() == pytest.approx(6)
    assert attend(q, k, v, bias=torch.tensor([0.0, -torch.inf])).item() == 4


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("watched", [False, True])
def test_attend_is_a_loop_over_queries(shape, watched):
    q, k, v, bias = draw(shape)
    y = attend(q.requires_grad_(watched), k, v, bias=bias)
    table = torch.zeros(2, 3, 4, 5).double() if bias is None else bias.expand(2, 3, 4, 5)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist():
        weights = [
            math.exp(q[b, h, n].dot(k[b, h, m]).item() / 6**0.5 + table[b, h, n, m].item())
            for m in range(5)
        ]
        expected = sum(w * v[b, h, m] for m, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(y[b, h, n], expected)


@pytest.mark.parametrize("shape", MASKS[:4])
def test_fused_attention_agrees(shape, fused):
    tensors = draw(shape)
    fast = attend(*tensors[:3], bias=tensors[3])
    assert len(fused) == 1
    slow = attention._attend_torch(*tensors)
    torch.testing.assert_close(fast, slow)

    q, k, v = inputs = [x.requires_grad_() for x in tensors[:3]]
    direction = double(2, 3, 4, 6)
    both = attend(*inputs, bias=tensors[3]), attention._attend_torch(q, k, v, tensors[3])
    slopes = [torch.autograd.grad(y, inputs, direction) for y in both]
    torch.testing.assert_close(*slopes)
    assert len(fused) == 3  # forward, and once more for the gradient

    if tensors[3] is not None:  # the gradient of a bias needs the scores
        attend(*inputs, bias=tensors[3].requires_grad_())
        assert len(fused) == 3


def test_tensors_may_come_from_one_another():
    x = double(2, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: attend(2 * x, x, x.sin()), x)
    first, second = (
        torch.autograd.grad(attend(x, x, x).square().sum(), x, create_graph=again)[0]
        for again in (True, False)
    )
    torch.testing.assert_close(first, second)


def test_queries_of_another_type_are_not_fused(fused):
    q, k, v = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        attend(q, k.bfloat16(), v.bfloat16()).sum().backward()
    assert not fused
    assert q.grad is not None


def test_fused_attention_keeps_no_scores():
    q, k, v = (torch.randn(1, 1, 64, 4, requires_grad=True) for _ in range(3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        attend(q, k, v)
    assert sum(kept) == 3 * 64 * 4


def test_fused_attention_stands_in_where_it_can(fused):
    q, k, v, bias = draw((2, 1, 1, 5))
    attend(q, k, v, bias=bias)
    assert len(fused) == 1

    torch.testing.assert_close(vmap(attend)(q, k, v), attend(q, k, v))
    attend(q[0, 0], k[0, 0], v[0, 0])
    attend(q, k, v[..., :2])
    attend(q, k[:1], v)
    attend(q, k, v, bias=bias.float())
    assert len(fused) == 2


# PyTorch's own rules of forward derivatives are compiled the old way.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_attention_has_all_derivatives(fused):
    q, k, v, bias = draw((4, 5))
    inputs = [x[:1, :1].clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, bias=bias), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, bias=bias), inputs)
    assert fused
    learned = bias.clamp(min=-2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x[:3], bias=x[3]), (*inputs, learned))

    fused.clear()
    change = double(2, 3, 4, 6)
    slope = grad(lambda x: attend(x, k, v, bias=bias).sum())(q)
    with forward_ad.dual_level():
        y = attend(forward_ad.make_dual(q, change), k, v, bias=bias)
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent.sum(), (slope * change).sum())
    assert not fused


@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention_is_that_of_torch(bias):
    ours = MultiHeadAttention(8, heads=2, bias=bias).double()
    peer = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        peer.in_proj_weight.copy_(ours.qkv.weight)
        peer.out_proj.weight.copy_(ours.output.weight)
        if bias:
            peer.in_proj_bias.copy_(ours.qkv.bias)
            peer.out_proj.bias.copy_(ours.output.bias)
    x = double(3, 5, 8)
    torch.testing.assert_close(ours(x), peer(x, x, x, need_weights=False)[0])


def test_heads_may_be_wide():
    x = double(2, 5, 4)
    layer = MultiHeadAttention(4, heads=3, head_features=6).double()
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    heads = [
        ((q[..., s] @ k[..., s].mT) / 6**0.5).softmax(-1) @ v[..., s]
        for s in (slice(0, 6), slice(6, 12), slice(12, 18))
    ]
    torch.testing.assert_close(layer(x), layer.output(torch.cat(heads, dim=-1)))


def test_one_token_attends_to_itself():
    layer = MultiHeadAttention(4, heads=2)
    x = torch.randn(3, 1, 4)
    torch.testing.assert_close(layer(x), layer.output(layer.qkv(x)[..., 8:]))


def test_feed_forward_by_hand():
    layer = FeedForward(1, expansion=2, activation="relu")
    gated = FeedForward(1, expansion=2, kind="geglu", activation="relu")
    with torch.no_grad():
        layer.expand.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.expand.bias.copy_(torch.tensor([0.0, 1.0]))
        layer.project.weight.copy_(torch.tensor([[2.0, 3.0]]))
        layer.project.bias.fill_(0.5)
        gated.expand.weight.copy_(torch.tensor([[1.0], [-1.0], [10.0], [20.0]]))
        gated.expand.bias.zero_()
        gated.project.weight.copy_(torch.tensor([[2.0, 3.0]]))
        gated.project.bias.zero_()
    x = torch.tensor([[[3.0], [-1.0]]])
    assert layer(x).flatten().tolist() == [6.5, 6.5]  # 2 * 3 and 3 * (1 + 1), and 0.5
    assert gated(x).flatten().tolist() == [2 * 3 * 30, 3 * 1 * -20]


def test_two_thirds_of_the_expansion_give_as_many_weights():
    def count(**kwargs):
        layer = FeedForward(12, **kwargs)
        return layer.expand.weight.numel() + layer.project.weight.numel()

    assert count(expansion=3) == count(expansion=2, kind="geglu") == 2 * 12 * 36


@pytest.mark.parametrize("kind", ["mlp", "geglu"])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("norm", ["layer", "layer_plain", "none"])
def test_block_is_two_branches(kind, layer_scale, norm):
    block = AttentionBlock(
        8, heads=2, kind=kind, norm=norm, layer_scale=layer_scale, res_scale=0.3
    ).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(double(*parameter.shape))
    one = torch.ones(8).double()
    first, second = (one if g is None else g for g in (block.scale1, block.scale2))

    def normed(x, layer):
        if norm == "none":
            return x
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return y if norm == "layer_plain" else y * layer.weight + layer.bias

    x = double(3, 5, 8)
    y = x + 0.3 * first * block.attention(normed(x, block.norm1))
    y = y + 0.3 * second * block.feed_forward(normed(y, block.norm2))
    torch.testing.assert_close(block(x), y)


def test_scales_start_where_told():
    block = AttentionBlock(8, heads=2, layer_scale=1e-3)
    assert block.scale1 is not None
    assert block.scale2 is not None
    assert block.scale1.tolist() == block.scale2.tolist() == pytest.approx([1e-3] * 8)
    assert block.scale1 is not block.scale2
    zero = AttentionBlock(8, heads=2, layer_scale=0.0)
    x = torch.randn(2, 3, 8)
    assert torch.equal(zero(x), x)


@pytest.mark.slow
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_block_is_that_of_timm(layer_scale):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    ours = AttentionBlock(16, heads=4, layer_scale=layer_scale)
    norm = partial(nn.LayerNorm, eps=1e-6)
    peer = vision_transformer.Block(16, 4, qkv_bias=True, init_values=layer_scale, norm_layer=norm)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    names = {
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.output",
        "mlp.fc1": "feed_forward.expand",
        "mlp.fc2": "feed_forward.project",
        "ls1.gamma": "scale1",
        "ls2.gamma": "scale2",
    }
    weights = ours.state_dict()
    copied = {}
    for name in peer.state_dict():
        stem, _, leaf = name.rpartition(".")
        copied[name] = weights[names.get(name, f"{names.get(stem, stem)}.{leaf}")]
    assert len(copied) == len(weights)
    peer.load_state_dict(copied)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(ours(x), peer(x), atol=1e-5, rtol=1e-5)


def test_heads_divide_the_features():
    with pytest.raises(ValueError, match="features divisible by heads, got 8 and 3; give head_f"):
        MultiHeadAttention(8, heads=3)
    with pytest.raises(ValueError, match="expected heads >= 1, got 0"):
        AttentionBlock(8, heads=0)
    with pytest.raises(ValueError, match="expected head_features >= 1, got 0"):
        MultiHeadAttention(8, heads=2, head_features=0)


def test_wrong_networks_of_tokens():
    with pytest.raises(ValueError, match="expected kind mlp or geglu, got 'swiglu'"):
        FeedForward(8, kind="swiglu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hidden layer of one or more.*; raise expansion"):
        FeedForward(8, expansion=0.01)
    with pytest.raises(ValueError, match="expected an activation"):
        FeedForward(8, activation="swish")  # type: ignore[arg-type]
