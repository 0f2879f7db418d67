r"""Tests for the probnets.circuits.plots module."""

import math
import sys

import numpy as np
import pytest
import torch

from probnets.circuits import (
    Categorical,
    Gaussian,
    Tree,
    TreeCircuit,
    chain,
    conditional_sample,
    enumerate_values,
    hidden_chow_liu_tree,
    most_probable,
    plot_completions,
    plot_samples,
    plot_tree,
    quad_tree,
    sample,
)

pytest.importorskip("matplotlib")
SHAPES = {"grey": (3, 4), "one channel": (3, 4, 1), "colour": (3, 4, 3)}


def build(shape=(3, 4), values=5):
    tree = quad_tree(*shape[:2], channels=math.prod(shape[2:]))
    return TreeCircuit(tree, Categorical(tree.inputs, 2, values), shape=shape)


def shown(axes):
    (image,) = axes.images
    assert image.get_clim() == (0.0, 1.0) or image.get_array().ndim == 3
    return np.asarray(image.get_array())


def source():
    return torch.Generator().manual_seed(3)


# Samples


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_samples_are_shown(shape):
    circuit = build(shape)
    figure = plot_samples(circuit, 2, 3, generator=source())
    images = sample(circuit, (6,), generator=source()).numpy() / 4

    assert len(figure.axes) == 6
    for axes, image in zip(figure.axes, images, strict=True):
        assert np.array_equal(shown(axes), image[..., 0] if shape[2:] == (1,) else image)


def test_real_values_are_spread_from_black_to_white():
    tree = quad_tree(2, 2)
    circuit = TreeCircuit(tree, Gaussian(tree.inputs, 2), shape=(2, 2))
    figure = plot_samples(circuit, 1, 5)
    pixels = np.stack([shown(axes) for axes in figure.axes])
    assert (pixels.min(), pixels.max()) == (0.0, 1.0)


def test_figures_are_their_own():
    before = set(sys.modules)
    figure = plot_samples(build(), 1, 1)
    figure.canvas.draw()
    assert "matplotlib.pyplot" not in set(sys.modules) - before
    assert plot_samples(build(), 1, 1) is not figure


# Completions


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_completions_are_shown(shape):
    circuit = build(shape)
    images = sample(circuit, (2,), generator=source())
    observed = torch.ones(shape, dtype=torch.bool)
    observed[:, 2:] = False
    figure = plot_completions(circuit, images, observed, samples=3, generator=source())

    assert len(figure.axes) == 2 * 7
    titles = [axes.get_title() for axes in figure.axes[:7]]
    assert titles == ["original", "observed", *["sample"] * 3, "most probable", "mean"]
    assert all(axes.get_title() == "" for axes in figure.axes[7:])

    mask = observed.expand(images.shape)
    drawn = conditional_sample(circuit, images, 3, observed=mask, generator=source())
    mode = most_probable(circuit, images, mask).values
    for n in range(2):
        original, masked, *completions, mean = figure.axes[7 * n : 7 * n + 7]
        flat = (3, 4, 3) if shape[2:] == (3,) else (3, 4)
        assert np.array_equal(shown(original), images[n].numpy().reshape(flat) / 4)
        for axes, expected in zip(completions, [*drawn, mode], strict=True):
            assert np.array_equal(shown(axes), expected[n].numpy().reshape(flat) / 4)

        paint = shown(masked)
        assert paint.shape == (3, 4, 3)
        colours = np.broadcast_to(images[n].numpy().reshape(3, 4, -1) / 4, (3, 4, 3))
        assert np.array_equal(paint[:, :2], colours[:, :2])
        assert len(np.unique(paint[:, 2:].reshape(-1, 3), axis=0)) == 1
        assert not np.array_equal(paint[0, 3], colours[0, 3])
        assert np.array_equal(shown(mean)[:, :2], shown(original)[:, :2])


def test_the_mean_is_that_of_the_posterior():
    circuit = build((1, 4), values=3).double()
    x = torch.tensor([[[2, 0, 1, 1]]])
    observed = torch.tensor([True, False, True, False])
    figure = plot_completions(circuit, x, observed, samples=1)

    values = enumerate_values(circuit)
    with torch.no_grad():
        prob = circuit.log_prob(values).exp() * (values[:, [0, 2]] == torch.tensor([2, 1])).all(1)
    mean = (prob @ values.double()) / prob.sum()
    np.testing.assert_allclose(shown(figure.axes[-1])[0], mean.numpy() / 2, rtol=1e-12)


def test_completions_of_real_values():
    tree = quad_tree(2, 2)
    circuit = TreeCircuit(tree, Gaussian(tree.inputs, 1), shape=(2, 2))
    images = torch.tensor([[[0.0, 4.0], [math.nan, 2.0]]])  # NaN is missing too
    with torch.no_grad():
        circuit.inputs.get_parameter("mean").fill_(1.0)
    figure = plot_completions(circuit, images, torch.ones(2, 2), samples=0)
    assert shown(figure.axes[-1]).tolist() == [[0.0, 1.0], [0.25, 0.5]]
    assert shown(figure.axes[-2]).tolist() == [[0.0, 1.0], [0.25, 0.5]]


# Trees


def collections(figure):
    (axes,) = figure.axes
    lines = {lines.get_label(): lines.get_segments() for lines in axes.collections}
    points = {points.get_label(): np.stack(points.get_data(), axis=1) for points in axes.lines}
    return lines, points


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_tree_with_a_region_a_pixel(channels):
    tree = quad_tree(4, 4, channels=channels)
    lines, points = collections(plot_tree(tree, (4, 4, channels)))
    assert len(lines["edges"]) == tree.regions - 1 == 20
    assert lines["ties"] == []
    assert len(points["variables"]) == 16 * channels
    assert points["root"].tolist() == [[1.5, 1.5]]

    ends = {tuple(segment[0]) for segment in lines["edges"]}
    assert ends >= {(i, j) for i in range(4) for j in range(4)}


def test_a_learned_tree():
    data = np.random.default_rng(0).integers(0, 8, (50, 5, 6))
    tree = hidden_chow_liu_tree(data)
    lines, points = collections(plot_tree(tree, (5, 6)))
    assert len(lines["edges"]) == tree.regions - 1
    sizes = np.bincount(tree.region)
    assert len(lines["ties"]) <= sizes[sizes > 1].sum()
    assert points["variables"].tolist() == [[v % 6, v // 6] for v in range(30)]


def test_places_by_hand():
    # The root holds the corners left and right, its child the middle, and nothing the last one.
    tree = Tree.from_parents([-1, 0, 1], regions=[0, 1, 0])
    lines, points = collections(plot_tree(tree, (1, 3)))
    assert points["root"].tolist() == [[1.0, 0.0]]
    assert np.array(lines["edges"]).tolist() == [[[1, 0], [1, 0]], [[1, 0], [1, 0]]]
    assert np.array(lines["ties"]).tolist() == [[[0, 0], [1, 0]], [[2, 0], [1, 0]]]


def test_a_circuit_brings_its_shape():
    lines, _ = collections(plot_tree(build((3, 4, 3))))
    assert len(lines["edges"]) == build((3, 4, 3)).tree.regions - 1
    lines, _ = collections(plot_tree(build((3, 4)), (4, 3)))
    assert lines["ties"] == []


def test_one_region():
    lines, points = collections(plot_tree(chain(1), (1, 1)))
    assert lines == {"edges": [], "ties": []}
    assert points["root"].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    "plot",
    [
        lambda: plot_samples(build(), 2, 2),
        lambda: plot_completions(build((3, 4, 3)), torch.zeros(1, 3, 4, 3), torch.zeros(3, 4, 3)),
        lambda: plot_tree(build()),
        lambda: plot_tree(chain(1), (1, 1)),
    ],
)
def test_figures_are_drawn(plot, tmp_path):
    plot().savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


# Errors


def test_matplotlib_is_optional(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for plot in (plot_samples, plot_tree):
        with pytest.raises(ImportError, match=r"pip install 'probnets\[plots\]'"):
            plot(build())


@pytest.mark.parametrize("shape", [(12,), (3, 2, 2), (3, 2, 2, 1)])
def test_rejects_what_is_no_image(shape):
    circuit = TreeCircuit(chain(12), Categorical(12, 2, 2), shape=shape)
    with pytest.raises(ValueError, match=r"expected images with shape \(H, W\) or \(H, W, C\)"):
        plot_samples(circuit)
    with pytest.raises(ValueError, match=r"expected images with shape \(H, W\) or \(H, W, C\)"):
        plot_completions(circuit, torch.zeros(1, *shape), torch.ones(shape))


def test_rejects_wrong_arguments():
    with pytest.raises(ValueError, match="expected one row and column or more, got 0 and 8"):
        plot_samples(build(), 0)
    with pytest.raises(
        ValueError, match=r"expected images with shape \('N', 3, 4\), got \(3, 4\)"
    ):
        plot_completions(build(), torch.zeros(3, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="expected a mask that expands to"):
        plot_completions(build(), torch.zeros(2, 3, 4), torch.ones(5))
    with pytest.raises(ValueError, match="expected the shape of an image with a tree"):
        plot_tree(chain(4))
    with pytest.raises(ValueError, match=r"expected \(2, 3\) to hold 4 variables"):
        plot_tree(chain(4), (2, 3))
    with pytest.raises(ValueError, match="expected images with shape"):
        plot_tree(chain(4), (4,))
