r"""Tests for linear probes."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from probnets.layers import LinearProbe, fit_probe

pytestmark = pytest.mark.usefixtures("one_thread")


def classes(count, features, labels, *, seed=1):
    r"""Draws correlated features and labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    x = 3 + torch.randn(count, features, generator=generator, dtype=torch.float64) @ mix
    logits = (x - 3) @ torch.randn(features, labels, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    y[:labels] = torch.arange(labels)
    return x, y


def by_scipy(x, y, penalty):
    r"""Solves the same problem, with a gradient worked out by hand."""
    x, y = x.numpy(), y.numpy()
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    (N, D), V = z.shape, y.max() + 1
    truth = np.eye(V)[y]

    def loss(flat):
        W, b = flat[: V * D].reshape(V, D), flat[V * D :]
        logits = z @ W.T + b
        logits -= logits.max(axis=1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        rest = (np.exp(logs) - truth) / N
        value = -(logs * truth).sum() / N + penalty / 2 * (W**2).sum()
        return value, np.concatenate([(rest.T @ z + penalty * W).ravel(), rest.sum(axis=0)])

    options = {"maxiter": 100_000, "maxfun": 100_000, "ftol": 1e-16, "gtol": 1e-10}
    found = minimize(loss, np.zeros(V * D + V), jac=True, method="L-BFGS-B", options=options).x
    return torch.from_numpy(found[: V * D].reshape(V, D)), torch.from_numpy(found[V * D :])


def probe_by_hand():
    parts = {
        "mean": [1.0, 2.0],
        "std": [2.0, 4.0],
        "weight": [[1.0, 0.0], [0.0, 3.0], [-1.0, -1.0]],
        "bias": [0.0, 0.5, 0.0],
    }
    return LinearProbe(**{k: torch.tensor(v) for k, v in parts.items()}, penalty=0.1)


def test_logits_and_accuracy_by_hand():
    probe = probe_by_hand()
    x = torch.tensor([[3.0, 2.0], [1.0, 6.0], [-1.0, -2.0], [5.0, 2.0]])
    logits = [[1, 0.5, -1], [0, 3.5, -1], [-1, -2.5, 2], [2, 0.5, -2]]
    assert probe(x).tolist() == logits
    assert probe(x[None, :2]).tolist() == [logits[:2]]
    assert probe(x.double()).dtype == torch.float32
    assert probe.accuracy(x, torch.tensor([0, 1, 2, 0])) == 1
    assert probe.accuracy(x, torch.tensor([0, 1, 1, 2])) == 0.5
    assert probe.accuracy(x, torch.tensor([2, 2, 1, 1])) == 0


def test_two_points_by_hand():
    # Standardised they are -1 and 1. By symmetry the weights are -w and w, without biases, and
    # the slope is zero where sigmoid(-2 w) = penalty * w.
    probe = fit_probe(torch.tensor([[4.0], [8.0]]), torch.tensor([0, 1]), penalties=[0.25])
    w = probe.weight[1, 0].item()
    assert 1 / (1 + math.exp(2 * w)) == pytest.approx(0.25 * w, abs=1e-6)
    assert_close(probe.weight, torch.tensor([[-w], [w]], dtype=torch.float64))
    assert_close(probe.bias, torch.zeros(2, dtype=torch.float64), atol=1e-7, rtol=0)
    assert (probe.mean.item(), probe.std.item()) == (6, 2)


@pytest.mark.parametrize("penalty", [1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize(("features", "labels"), [(5, 2), (12, 4)])
def test_weights_are_those_of_scipy(penalty, features, labels):
    x, y = classes(150, features, labels)
    probe = fit_probe(x, y, penalties=[penalty])
    weight, bias = by_scipy(x, y, penalty)
    assert probe.penalty == penalty
    assert_close(probe.weight, weight, atol=1e-4, rtol=0)
    assert_close(probe.bias, bias, atol=1e-4, rtol=0)
    assert probe.weight.abs().max() > 0.01


def test_units_do_not_matter():
    x, y = classes(100, 4, 3)
    scale = torch.tensor([1e-6, 1.0, 1e3, 1e6], dtype=torch.float64)
    first = fit_probe(x, y, penalties=[0.01])
    second = fit_probe(x * scale - 7, y, penalties=[0.01])
    assert_close(second.weight, first.weight, atol=1e-5, rtol=1e-5)
    assert_close(second(x * scale - 7), first(x), atol=1e-4, rtol=1e-4)


def test_any_type_of_features():
    x, y = classes(60, 3, 2)
    x = (10 * x).round()
    expected = fit_probe(x, y, penalties=[0.1])
    for dtype in (torch.float32, torch.int32):
        probe = fit_probe(
            x.to(dtype).requires_grad_(dtype.is_floating_point), y.int(), penalties=[0.1]
        )
        assert torch.equal(probe.weight, expected.weight)
        assert not probe.weight.requires_grad
    with torch.no_grad():
        assert torch.equal(fit_probe(x, y, penalties=[0.1]).weight, expected.weight)


# Penalties


def scores_of(x, y, penalties, folds, seed):
    r"""Computes the accuracy of each penalty in cross-validation."""
    part = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)) % folds
    return {
        penalty: np.mean(
            [
                fit_probe(x[part != f], y[part != f], penalties=[penalty]).accuracy(
                    x[part == f], y[part == f]
                )
                for f in range(folds)
            ]
        )
        for penalty in penalties
    }


@pytest.mark.parametrize("seed", range(4))
def test_penalty_is_the_best_in_cross_validation(seed):
    x, y = classes(60, 12, 2, seed=seed)
    penalties = (1e-4, 0.1, 100.0)
    scores = scores_of(x, y, penalties, 3, seed)
    best = max(p for p in penalties if scores[p] == pytest.approx(max(scores.values())))
    generator = torch.Generator().manual_seed(seed)
    probe = fit_probe(x, y, penalties=penalties, folds=3, generator=generator)
    assert probe.penalty == best
    alone = fit_probe(x, y, penalties=[best])  # fitted to all samples
    assert torch.equal(probe.weight, alone.weight)


def test_penalty_depends_on_the_data():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 2
    weak = torch.randn(80, 60, generator=generator)  # one weak feature among much noise
    weak[:, 0] += 2 * y
    assert fit_probe(weak, y, penalties=[1e-6, 1.0], generator=generator).penalty == 1.0

    x = torch.randn(300, 2, generator=generator)
    thin = (x[:, 0] + 100 * (x[:, 1] > 2) > 0.5).long()  # needs large weights
    assert fit_probe(x, thin, penalties=[1e-4, 100.0], generator=generator).penalty == 1e-4


def test_ties_go_to_the_largest_penalty():
    x = torch.cat([torch.randn(30, 2) - 50, torch.randn(30, 2) + 50])
    y = torch.arange(60) // 30
    for penalties in ((0.1, 1e-3, 0.5, 1e-2), (0.5, 0.1)):
        assert fit_probe(x, y, penalties=penalties).penalty == 0.5


def test_parts_come_from_the_generator():
    x, y = classes(40, 8, 3)
    before = torch.get_rng_state()
    first, second = (
        fit_probe(x, y, penalties=[0.01, 1], generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert first.penalty == second.penalty
    assert torch.equal(first.weight, second.weight)


# Edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [7, 100, 1001])
def test_constant_features_do_nothing(dtype, count):
    x, y = classes(count, 3, 2)
    x = x.to(dtype)
    x[:, 1] = 0.1  # whose mean is rounded
    probe = fit_probe(x, y, penalties=[0.01])
    assert probe.std[1] == 1
    assert probe.weight[:, 1].abs().max() < 1e-10

    other = x.clone()
    other[:, 1] = 0.2
    assert_close(probe(other), probe(x))
    rest = fit_probe(x[:, [0, 2]], y, penalties=[0.01])
    assert_close(probe.weight[:, [0, 2]], rest.weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("count", [7, 1001])
def test_one_constant_feature(count):
    # Its standard deviation in one column is of roundings, and not zero.
    x, y = torch.full((count, 1), 0.1, dtype=torch.float64), torch.arange(count) % 2
    probe = fit_probe(x, y, penalties=[0.01])
    assert probe.std.item() == 1
    assert_close(probe(x + 1), probe(x))


def test_labels_that_no_sample_has():
    x, y = classes(50, 3, 2)
    probe = fit_probe(x, 3 * y, penalties=[0.1])
    assert probe.weight.shape == (4, 3)
    assert set(probe(x).argmax(dim=1).tolist()) == {0, 3}


def test_one_label():
    x = torch.randn(20, 3)
    probe = fit_probe(x, torch.zeros(20, dtype=torch.long))
    assert probe.weight.shape == (1, 3)
    assert probe.accuracy(x, torch.zeros(20)) == 1


def test_separable_labels():
    x = torch.linspace(-1, 1, 40)[:, None]
    probe = fit_probe(x, (x[:, 0] > 0).long())
    assert probe.accuracy(x, (x[:, 0] > 0).long()) == 1
    assert probe.weight.isfinite().all()


def test_one_penalty_needs_no_parts():
    x, y = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 1, 1])
    assert fit_probe(x, y, penalties=[0.1], folds=5).weight.shape == (2, 1)
    with pytest.raises(ValueError, match="of 5 samples or more, got"):
        fit_probe(x, y, folds=5)


def test_state_dict_round_trip():
    probe = fit_probe(*classes(40, 3, 2))
    other = fit_probe(*classes(40, 3, 2, seed=9))
    other.load_state_dict(probe.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(other(x), probe(x))
    assert list(probe.parameters()) == []


@pytest.mark.parametrize(
    ("x", "labels"),
    [((20,), (20,)), ((20, 3, 1), (20,)), ((20, 3), (20, 1)), ((20, 3), (19,)), ((4, 3), (4,))],
)
def test_wrong_shapes(x, labels):
    with pytest.raises(ValueError, match=r"expected features \(N, D\) and labels \(N,\) of 5 sam"):
        fit_probe(torch.zeros(x), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("labels", [torch.zeros(20), torch.arange(20) - 1])
def test_wrong_labels(labels):
    with pytest.raises(ValueError, match="expected labels that are integers from 0"):
        fit_probe(torch.randn(20, 3), labels)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite(value):
    x, y = classes(20, 3, 2)
    x[4, 1] = value
    with pytest.raises(ValueError, match="expected finite features, got NaN or infinity"):
        fit_probe(x, y)


@pytest.mark.parametrize(
    "bad", [{"penalties": []}, {"penalties": [0.1, 0.0]}, {"penalties": [-1.0]}, {"folds": 1}]
)
def test_wrong_penalties_and_folds(bad):
    with pytest.raises(ValueError, match="expected positive penalties and two folds or more, got"):
        fit_probe(*classes(20, 3, 2), **bad)
