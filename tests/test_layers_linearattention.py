r"""Tests of linear attention and of norms that fold."""

from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from probnets.layers import linearattention
from probnets.layers.linearattention import LinearAttention, LinearAttentionBlock, ProgressiveNorm
from probnets.layers.norms import LayerNorm, NoNorm

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = partial(ProgressiveNorm, steps=3)


def randomised(layer):
    layer = layer.double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        for name, buffer in layer.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return layer


def advance(layer, count):
    for module in layer.modules():
        if isinstance(module, ProgressiveNorm):
            module.count.fill_(count)
    return layer


def direct(layer, x):
    r"""Sums over pairs of pixels, one head and one pixel after the other."""
    B, C, H, W = x.shape
    d = C // layer.heads
    tokens = x.flatten(2).mT
    q, k, v = (
        tokens @ w.mT + b
        for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    )
    y = torch.zeros_like(v)
    for b in range(B):
        for h in range(layer.heads):
            own = slice(h * d, (h + 1) * d)
            for i in range(H * W):
                scores = [q[b, i, own].relu() @ k[b, j, own].relu() for j in range(H * W)]
                values = sum(s * v[b, j, own] for j, s in enumerate(scores))
                y[b, i, own] = values / (sum(scores) + 1e-6)
    conv = layer.depthwise.conv
    values = v.mT.unflatten(2, (H, W))
    rim = conv.kernel_size[0] // 2
    local = functional.conv2d(values, conv.weight, conv.bias, padding=rim, groups=C)
    return layer.output(y + local.flatten(2).mT).mT.unflatten(2, (H, W))


def test_by_hand():
    layer = LinearAttention(1, heads=1, kernel_size=1).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.qkv.weight.copy_(torch.tensor([[1.0], [-1.0], [2.0]]))
        layer.qkv.bias.copy_(torch.tensor([0.0, 3.0, 0.0]))
        layer.depthwise.conv.weight.fill_(10.0)
        layer.output.weight.fill_(1.0)
    # x = 1, 2, 4 gives k = 2, 1, 0 and v = 2, 4, 8: the mean of values is 8 / 3.
    y = layer(torch.tensor([[[[1.0, 2.0, 4.0]]]], dtype=torch.float64))
    expected = torch.tensor([[[[20.0, 40.0, 80.0]]]], dtype=torch.float64) + 8 / 3
    assert_close(y, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [(1, 2), (3, 4)])
def test_against_a_sum_over_pairs(size):
    layer = randomised(LinearAttention(6, heads=2, kernel_size=3))
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    assert_close(layer(x), direct(layer, x))


def test_both_associations_are_equal():
    q, k, v = torch.rand(3, 2, 2, 7, 4, dtype=torch.float64)
    first = linearattention._keys_first(q, k, v)
    assert_close(first, linearattention._queries_first(q, k, v))


@pytest.mark.parametrize(("pixels", "used"), [(3, "_queries_first"), (5, "_keys_first")])
def test_takes_the_cheaper_association(monkeypatch, pixels, used):
    q, k, v = torch.rand(3, 1, pixels, 4)
    monkeypatch.setattr(linearattention, used, lambda q, k, v: torch.full_like(v, torch.nan))
    assert linearattention._attend_linearly(q, k, v).isnan().all()


def test_half_precision_sums_in_single():
    q = k = torch.full((1, 4096, 1), 8.0, dtype=torch.float16)
    v = torch.full((1, 4096, 1), 2.0, dtype=torch.float16)
    # The sum of scores is 262144, more than this type holds.
    assert torch.equal(linearattention._attend_linearly(q, k, v), v)


def test_hidden_pixels_are_no_keys():
    layer = randomised(LinearAttention(4, heads=2, kernel_size=3))
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    shown = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    shown[:, :, :2, 1:3] = True
    assert_close(layer(x, shown)[:, :, :2, 1:3], layer(x[:, :, :2, 1:3]))


def test_share_of_the_layer_norm_falls():
    layer = randomised(ProgressiveNorm(4, steps=4))
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    shares = []
    for _ in range(6):
        share = layer.eval().share
        assert_close(layer(x), share * layer.layer(x) + (1 - share) * layer.batch(x))
        shares.append(share.item())
        layer.train()(x)
    assert shares == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_training_uses_the_share_before_the_pass():
    layer = ProgressiveNorm(4, steps=1).double().train()
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    assert_close(layer(x), layer.layer(x))
    assert_close(layer(x), layer.batch(x))


def test_finished_norm_folds():
    layer = advance(randomised(ProgressiveNorm(4, steps=4)), 4)
    scale, shift = layer.fold()
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    assert_close(layer(x), x * scale[:, None, None] + shift[:, None, None])


@pytest.mark.parametrize(
    ("norm", "left"),
    [
        ("layer", LayerNorm),
        ("layer_plain", LayerNorm),
        ("batch", NoNorm),
        ("rep_batch", NoNorm),
        (STEPS, NoNorm),
        ("none", NoNorm),
    ],
    ids=str,
)
def test_merged_block_computes_the_same(norm, left):
    block = advance(randomised(LinearAttentionBlock(4, heads=2, norm=norm, res_scale=0.5)), 3)
    before = {k: v.clone() for k, v in block.state_dict().items()}
    one = block.merged()

    for norms in (one.norm1, one.norm2):
        assert type(norms) is left
        assert not list(norms.parameters())
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    assert_close(one(x), block(x))
    shown = torch.tensor([[[[1, 0, 1], [1, 1, 0], [1, 1, 1], [0, 0, 1], [1, 0, 1]]]]).bool()
    shown = shown.expand(2, -1, -1, -1)
    assert_close(one(x, shown) * shown, block(x, shown) * shown)
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


@pytest.mark.parametrize("norm", ["group", STEPS], ids=str)
def test_norms_that_cannot_fold_stay(norm):
    block = advance(randomised(LinearAttentionBlock(4, heads=2, norm=norm)), 2)
    one = block.merged()
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    assert torch.equal(one(x), block(x))


def test_block_is_two_scaled_branches():
    block = randomised(LinearAttentionBlock(4, heads=2, expansion=1.5, res_scale=0.5))
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    middle = x + 0.5 * block.attention(block.norm1(x))
    tokens = block.expand(block.norm2(middle).flatten(2).mT)
    assert tokens.shape[-1] == 6
    y = block.project(functional.gelu(tokens)).mT.unflatten(2, (3, 2))
    assert_close(block(x), middle + 0.5 * y)


def test_folding_too_early():
    layer = advance(ProgressiveNorm(4, steps=5), 4)
    with pytest.raises(ValueError, match=r"expected 5 passes in training mode .* got 4"):
        layer.fold()


def test_no_steps():
    with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
        ProgressiveNorm(4, steps=0)


@pytest.mark.parametrize("heads", [0, 3])
def test_wrong_heads(heads):
    with pytest.raises(ValueError, match=f"expected heads that divide 4 channels, got {heads}"):
        LinearAttention(4, heads=heads)


def test_wrong_expansion():
    with pytest.raises(ValueError, match="expected a hidden layer of one or more"):
        LinearAttentionBlock(4, heads=2, expansion=0.0)
