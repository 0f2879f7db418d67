r"""Tests for learned queries that read tokens."""

import math

import pytest
import torch

from probnets.layers.latents import LatentRead

pytestmark = pytest.mark.usefixtures("one_thread")


def read(**kwargs):
    return LatentRead(8, 3, heads=2, out_features=4, dtype=torch.float64, **kwargs)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_read_by_hand():
    layer = LatentRead(1, 2, heads=1, norm="none")
    with torch.no_grad():
        layer.queries.copy_(torch.tensor([[0.0], [math.log(3.0)]]))
        layer.kv.weight.copy_(torch.tensor([[1.0], [10.0]]))
        layer.kv.bias.zero_()
        layer.output.weight.fill_(2.0)
        layer.output.bias.fill_(1.0)
    y = layer(torch.tensor([[[0.0], [1.0]]]))
    torch.testing.assert_close(y, torch.tensor([[[2 * 5.0 + 1], [2 * 7.5 + 1]]]))


@pytest.mark.parametrize("norm", ["layer", "layer_plain", "none"])
@pytest.mark.parametrize("hidden", [False, True])
@torch.no_grad()
def test_read_is_an_explicit_sum(norm, hidden):
    layer = read(head_features=5, norm=norm)
    x = double(2, 6, 8)
    visible = torch.rand(2, 6) < 0.5 if hidden else torch.ones(2, 6, dtype=torch.bool)
    visible[:, 2] = True
    k, v = layer.kv(layer.norm(x)).view(2, 6, 2, 2, 5).unbind(2)  # (B, N, H, d)
    q = layer.queries.view(3, 2, 5)
    weights = torch.einsum("chd,bnhd->bchn", q, k).div(5**0.5).exp() * visible[:, None, None]
    mean = torch.einsum("bchn,bnhd->bchd", weights / weights.sum(-1, keepdim=True), v)
    y = layer(x, visible) if hidden else layer(x)
    torch.testing.assert_close(y, layer.output(mean.reshape(2, 3, 10)))


def test_order_of_tokens_does_not_matter():
    layer, x = read(), double(2, 6, 8)
    order = torch.randperm(6)
    visible = torch.rand(2, 6) < 0.5
    visible[:, 0] = True
    torch.testing.assert_close(layer(x[:, order]), layer(x))
    torch.testing.assert_close(layer(x[:, order], visible[:, order]), layer(x, visible))


def test_queries_read_apart():
    layer, x = read(), double(2, 6, 8)
    order = torch.tensor([2, 0, 1])
    y = layer(x)
    with torch.no_grad():
        layer.queries.copy_(layer.queries[order])
    torch.testing.assert_close(layer(x), y[:, order])
    assert not torch.allclose(y[:, 0], y[:, 1])


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("content", [1e300, torch.inf, torch.nan])
def test_hidden_tokens_do_not_exist(norm, watched, content):
    layer, x = read(norm=norm).requires_grad_(watched), double(2, 6, 8)
    visible = torch.tensor([True, True, False, True, False, False]).expand(2, 6)
    y = layer(x, visible)
    torch.testing.assert_close(y, layer(x[:, visible[0]]))
    changed = x.masked_fill(~visible[..., None], content)
    assert torch.equal(layer(changed, visible), y)


def test_mask_that_hides_nothing():
    layer, x = read(), double(2, 6, 8)
    torch.testing.assert_close(layer(x, torch.ones(2, 6, dtype=torch.bool)), layer(x))


def test_sizes():
    x = torch.randn(2, 1, 8)
    layer = LatentRead(8, 3, heads=2)
    assert layer(x).shape == (2, 3, 8)
    assert layer(x.expand(2, 40, 8)).shape == (2, 3, 8)
    torch.testing.assert_close(layer(x.expand(2, 40, 8)), layer(x))
    assert layer(x[:0]).shape == (0, 3, 8)
    assert layer(x[:0], torch.ones(0, 1, dtype=torch.bool)).shape == (0, 3, 8)


def test_queries_start_normal():
    queries = LatentRead(64, 100, heads=2).queries.detach()
    assert queries.shape == (100, 64)
    assert abs(queries.mean()) < 0.06
    assert abs(queries.var() - 1) < 0.1
    assert LatentRead(64, 100, heads=2).fan_in("queries") == 1


@pytest.mark.parametrize("shape", [(2, 5, 7), (5, 8), (2, 0, 8), (2, 8, 1, 5)])
def test_wrong_tokens(shape):
    with pytest.raises(ValueError, match=r"expected x with shape \(B, N, 8\), got"):
        read()(double(*shape))


def test_wrong_masks():
    layer, x = read(), double(2, 5, 8)
    with pytest.raises(ValueError, match=r"a boolean mask with shape \(2, 5\), got torch.bool"):
        layer(x, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"a boolean mask with shape \(2, 5\), got torch.float32"):
        layer(x, torch.ones(2, 5))
    visible = torch.tensor([[True] * 5, [False] * 5])
    with pytest.raises(ValueError, match=r"visible tokens in each sample.*in samples \[1\]"):
        layer(x, visible)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="expected latents >= 1, got 0"):
        LatentRead(8, 0, heads=2)
    with pytest.raises(ValueError, match="expected out_features >= 1, got 0"):
        LatentRead(8, 3, heads=2, out_features=0)
    with pytest.raises(ValueError, match="expected features divisible by heads, got 8 and 3"):
        LatentRead(8, 3, heads=3)
