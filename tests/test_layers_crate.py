r"""Tests for layers that compress and sparsify."""

import pytest
import torch

from probnets.layers.crate import CrateBlock, CrateDecoderBlock, SparseStep, SubspaceAttention

pytestmark = pytest.mark.usefixtures("one_thread")


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def normed(x, layer):
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    return y * layer.weight + layer.bias


def mssa(layer, z, heads):
    r"""Computes the attention with one sum for each formula."""
    features = z.shape[-1]
    U = layer.subspaces.weight.view(heads, -1, features).transpose(1, 2)  # (H, D, d)
    w = torch.einsum("hDd,bnD->bhnd", U, z)
    scores = torch.einsum("bhnd,bhmd->bhnm", w, w) / U.shape[-1] ** 0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    heads_out = torch.einsum("bhnm,bhmd->bnhd", weights, w).flatten(2)
    return torch.einsum("Di,bni->bnD", layer.output.weight, heads_out) + layer.output.bias


def ista(layer, z, step, threshold):
    D = layer.dictionary.weight
    down = torch.einsum("ji,bnj->bni", D, z) - torch.einsum("ji,jk,bnk->bni", D, D, z)
    return (z + step * down - step * threshold).clamp(min=0)


def shaken(layer):
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def test_sparse_step_by_hand():
    layer = SparseStep(2, step=0.5, threshold=2)
    with torch.no_grad():
        layer.dictionary.weight.copy_(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    # z - D z = (4 - 6, 3), times D^T: (0, -4); (4, 3) + 0.5 (0, -4) - 1 = (3, 0)
    assert layer(torch.tensor([[[4.0, 3.0], [-1.0, 0.5]]])).tolist() == [[[3, 0], [0, 0]]]


@pytest.mark.parametrize("width", [None, 5])
def test_attention_is_its_formula(width):
    layer = shaken(SubspaceAttention(8, heads=2, head_features=width))
    z = double(3, 5, 8)
    torch.testing.assert_close(layer(z), mssa(layer, z, 2))


def test_sparse_step_is_its_formula():
    layer, z = shaken(SparseStep(8, step=0.3, threshold=0.2)), double(3, 5, 8)
    y = layer(z)
    torch.testing.assert_close(y, ista(layer, z, 0.3, 0.2))
    assert 0 < (y == 0).sum() < y.numel()


def test_sparse_step_is_a_step_of_proximal_descent():
    step, threshold = 0.3, 0.2
    layer, z = shaken(SparseStep(8, step=step, threshold=threshold)), double(1, 9, 8)
    D = layer.dictionary.weight.detach()
    code = z.clone().requires_grad_()
    loss = 0.5 * torch.stack(
        [(x - D @ a).square().sum() for x, a in zip(z[0], code[0], strict=True)]
    )
    (slope,) = torch.autograd.grad(loss.sum(), code)
    target = z - step * slope
    y = layer(z)

    # Optimal for |a - target|^2 / 2 + step threshold sum a over a >= 0: the slope is zero at
    # positive entries, and not negative at zeros.
    slope = y - target + step * threshold
    torch.testing.assert_close(slope[y > 0], torch.zeros_like(slope[y > 0]))
    assert (slope[y == 0] >= 0).all()
    assert (y >= 0).all()


def test_small_steps_lower_the_objective():
    layer = shaken(SparseStep(8, step=0.01, threshold=0.2))
    D = layer.dictionary.weight.detach()
    x = double(4, 6, 8).abs()  # a feasible start

    def objective(code):
        return 0.5 * (x - code @ D.T).square().sum(-1) + 0.2 * code.sum(-1)

    assert (objective(layer(x)) < objective(x)).all()


def test_block_compresses_then_sparsifies():
    block = shaken(CrateBlock(8, heads=2, step=0.3, threshold=0.2, res_scale=0.7))
    x = double(3, 5, 8)
    z = x + 0.7 * mssa(block.attention, normed(x, block.norm1), 2)
    torch.testing.assert_close(block(x), ista(block.sparse, normed(z, block.norm2), 0.3, 0.2))


def test_decoder_maps_then_expands():
    block = shaken(CrateDecoderBlock(8, heads=2))
    x = double(3, 5, 8)
    z = torch.einsum("ij,bnj->bni", block.map.weight, normed(x, block.norm1))
    expected = z - mssa(block.attention, normed(z, block.norm2), 2)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("layer", [CrateBlock, CrateDecoderBlock])
def test_norms_can_be_left_out(layer):
    block = shaken(layer(8, heads=2, norm="none"))
    x = double(3, 5, 8)
    if layer is CrateBlock:
        z = x + mssa(block.attention, x, 2)
        expected = ista(block.sparse, z, 0.1, 0.1)
    else:
        z = x @ block.map.weight.T
        expected = z - mssa(block.attention, z, 2)
    torch.testing.assert_close(block(x), expected)


def test_attention_pulls_like_tokens_together():
    layer = SubspaceAttention(4, heads=1)
    with torch.no_grad():
        layer.subspaces.weight.copy_(2 * torch.eye(4))
        layer.output.weight.copy_(0.5 * torch.eye(4))
        layer.output.bias.zero_()
    x = torch.tensor([[[3.0, 0.2, 0, 0], [3.0, -0.2, 0, 0], [0, 0, 3.0, 0.2], [0, 0, 3.0, -0.2]]])
    y = layer(x)
    assert (y[0, 0] - y[0, 1]).norm() < (x[0, 0] - x[0, 1]).norm() / 2
    assert (y[0, 0] - y[0, 2]).norm() > 4


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"step > 0 and threshold >= 0, got 0 and 0\.1"):
        SparseStep(8, step=0)
    with pytest.raises(ValueError, match=r"step > 0 and threshold >= 0, got 0\.1 and -1"):
        CrateBlock(8, heads=2, threshold=-1)
    with pytest.raises(ValueError, match="expected features divisible by heads, got 8 and 3"):
        SubspaceAttention(8, heads=3)
