r"""Pictures of circuits over images, and of their trees.

Matplotlib is needed here alone, and imported when a picture is asked for. Every function returns
a figure of its own and leaves :mod:`matplotlib.pyplot` as it is.
"""

__all__ = ["plot_completions", "plot_samples", "plot_tree"]

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .circuit import TreeCircuit
from .inputs import Discrete, Gaussian
from .queries import conditional_sample, most_probable, posterior, sample
from .structure import Tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = (0.45, 0.60, 0.80)  # the colour of what is not observed


def plot_samples(
    circuit: TreeCircuit,
    rows: int = 4,
    columns: int = 8,
    *,
    generator: torch.Generator | None = None,
) -> "Figure":
    r"""Draws images from a circuit and shows them in a grid.

    Arguments:
        circuit: The circuit over images, with shape :math:`(H, W)` or :math:`(H, W, C)`, where
            :math:`C` is one or three.
        rows: The number of rows of images.
        columns: The number of columns of images.
        generator: The source of randomness.

    Returns:
        The figure, with one axes for each image.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the circuit is not over images.

    Example:
        >>> from probnets.circuits import Categorical, quad_tree
        >>> circuit = TreeCircuit(quad_tree(4, 4), Categorical(16, 2, 256), shape=(4, 4))
        >>> figure = plot_samples(circuit, 2, 3)
        >>> len(figure.axes)
        6
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"expected one row and column or more, got {rows} and {columns}")
    _channels(circuit.shape)
    axes = _grid(rows, columns, circuit.shape)
    images = sample(circuit, (rows * columns,), generator=generator)
    low, high = _range(circuit, images)
    for place, image in zip(axes.flat, _numbers(images), strict=True):
        _show(place, image, low, high)
    return axes[0, 0].figure


def plot_completions(
    circuit: TreeCircuit,
    images: Tensor,
    observed: Tensor,
    *,
    samples: int = 2,
    generator: torch.Generator | None = None,
) -> "Figure":
    r"""Completes images in every way there is, one image a row.

    The columns are the original, what is observed of it, completions that are drawn at random,
    the most probable one with its latents, and the posterior mean. What is missing is blue.

    Arguments:
        circuit: The circuit over images, with shape :math:`(H, W)` or :math:`(H, W, C)`, where
            :math:`C` is one or three.
        images: The images, with shape :math:`(N, H, W)` or :math:`(N, H, W, C)`.
        observed: Which values are observed, with a shape that expands to that of the images.
        samples: The number of completions that are drawn of each image.
        generator: The source of randomness.

    Returns:
        The figure, with one axes for each image and column.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the circuit or the images are no images, or what is observed has
            probability zero.
    """
    _channels(circuit.shape)
    if images.shape[1:] != circuit.shape or len(images) == 0:
        raise ValueError(
            f"expected images with shape {('N', *circuit.shape)}, got {tuple(images.shape)}"
        )
    observed = circuit.prepare(images, observed)[1].view(images.shape)
    drawn = conditional_sample(circuit, images, samples, observed=observed, generator=generator)
    mode = most_probable(circuit, images, observed).values
    mean = _posterior_mean(circuit, images, observed)

    columns = [("original", images), ("observed", images)]
    columns += [("sample", part) for part in drawn]
    columns += [("most probable", mode), ("mean", mean)]
    axes = _grid(len(images), len(columns), circuit.shape)
    low, high = _range(circuit, images)
    hidden = ~observed.cpu().numpy()
    for c, (title, parts) in enumerate(columns):
        axes[0, c].set_title(title, fontsize=8)
        for n, image in enumerate(_numbers(parts)):
            _show(axes[n, c], image, low, high, hidden[n] if title == "observed" else None)
    return axes[0, 0].figure


def plot_tree(tree: TreeCircuit | Tree, shape: Sequence[int] | None = None) -> "Figure":
    r"""Draws a tree over the grid of an image.

    A region lies in the middle of its variables or, without any, of those below it. Edges
    between regions are coloured by depth, and drawn thicker the more regions hang on them. A
    region that lies on no pixel is tied to its own variables by thin lines. A cross marks the
    root.

    Arguments:
        tree: The tree, or a circuit with it.
        shape: The shape of an image, :math:`(H, W)` or :math:`(H, W, C)`. By default the
            circuit's.

    Returns:
        The figure, with one axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the variables do not fill such a shape.
    """
    if isinstance(tree, TreeCircuit):
        shape = tree.shape if shape is None else shape
        tree = tree.tree
    if shape is None:
        raise ValueError("expected the shape of an image with a tree, got none")
    height, width, channels = _channels(shape, any_number=True)
    if height * width * channels != tree.variables:
        raise ValueError(f"expected {tuple(shape)} to hold {tree.variables} variables")

    pixels = np.arange(tree.variables) // channels
    variables = np.stack([pixels % width, pixels // width], axis=1).astype(float)
    regions = _places(tree, variables)

    figure = _figure(5.0, 5.0 * height / width)
    from matplotlib.collections import LineCollection

    axes = figure.add_subplot()
    stray = (variables != regions[tree.region]).any(1)
    ties = np.stack([variables[stray], regions[tree.region[stray]]], axis=1)
    axes.add_collection(LineCollection(list(ties), colors="0.85", linewidths=0.5, label="ties"))
    edges = np.stack([regions[1:], regions[tree.parent[1:]]], axis=1)
    size = (tree.end - np.arange(tree.regions))[1:]
    widths = 0.6 + 2.4 * np.sqrt(size / tree.regions)
    lines = LineCollection(list(edges), linewidths=widths, cmap="viridis_r", label="edges")
    lines.set_array(tree.depth[1:])
    axes.add_collection(lines)
    axes.plot(*variables.T, ".", color="0.3", markersize=2, label="variables")
    axes.plot(*regions[:1].T, "X", color="crimson", markersize=9, label="root")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
    axes.set(xticks=[], yticks=[])
    return figure


def _places(tree: Tree, variables: np.ndarray) -> np.ndarray:
    r"""Finds the middle of each region's variables, or of those below it if it has none."""
    total, count = np.zeros((tree.regions, 2)), np.zeros(tree.regions)
    np.add.at(total, tree.region, variables)
    np.add.at(count, tree.region, 1.0)
    own = count > 0
    below, number = total.copy(), count.copy()
    for r in range(tree.regions - 1, 0, -1):
        below[tree.parent[r]] += below[r]
        number[tree.parent[r]] += number[r]

    middle = (
        np.where(own[:, None], total, below) / np.maximum(np.where(own, count, number), 1)[:, None]
    )
    for r in range(1, tree.regions):
        if number[r] == 0:  # nothing below it at all
            middle[r] = middle[tree.parent[r]]
    return middle


@torch.no_grad()
def _posterior_mean(circuit: TreeCircuit, x: Tensor, observed: Tensor) -> Tensor:
    r"""Fills missing values in with their posterior means."""
    inputs = circuit.inputs
    if isinstance(inputs, Discrete):
        table = inputs.log_table().exp()  # (H, X, K)
        values = torch.arange(inputs.values, device=table.device, dtype=table.dtype)
        means = torch.einsum("hxk,x->hk", table, values)
    elif isinstance(inputs, Gaussian):
        means = inputs.mean
    else:
        raise TypeError(f"expected discrete or Gaussian inputs, got {type(inputs).__name__}")
    units = posterior(circuit, x, observed)[:, circuit.region]  # (N, D, K)
    mean = (units * means[circuit.input_group]).sum(-1).view(x.shape)
    return torch.where(observed, x.to(mean), mean)


def _channels(shape: Sequence[int], *, any_number: bool = False) -> tuple[int, int, int]:
    if len(shape) == 2:
        return shape[0], shape[1], 1
    if len(shape) == 3 and (any_number or shape[2] in (1, 3)):
        return shape[0], shape[1], shape[2]
    raise ValueError(
        "expected images with shape (H, W) or (H, W, C) of one or three channels, "
        f"got {tuple(shape)}; give the circuit such a shape"
    )


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"expected matplotlib for a picture, got: {error}; pip install 'probnets[plots]'"
        ) from None
    figure = Figure(figsize=(width, height), layout="compressed")
    FigureCanvasAgg(figure)
    return figure


def _grid(rows: int, columns: int, shape: Sequence[int]) -> np.ndarray:
    r"""Makes a figure of axes without frames, with shape (rows, columns)."""
    size = 0.9
    figure = _figure(size * columns, size * rows * shape[0] / shape[1] + 0.2)
    axes = figure.subplots(rows, columns, squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    return axes


def _range(circuit: TreeCircuit, images: Tensor) -> tuple[float, float]:
    r"""Returns what is black and what is white."""
    if isinstance(circuit.inputs, Discrete):
        return 0.0, max(circuit.inputs.values - 1.0, 1.0)
    some = images[~images.isnan()]
    low, high = (some.min().item(), some.max().item()) if some.numel() else (0.0, 1.0)
    return low, max(high, low + 1e-6)


def _numbers(images: Tensor) -> np.ndarray:
    return images.detach().double().cpu().numpy()


def _show(
    axes: "Axes", image: np.ndarray, low: float, high: float, hidden: np.ndarray | None = None
) -> None:
    r"""Shows an image, grey or in colour, with hidden values painted over."""
    bright = ((image - low) / (high - low)).clip(0.0, 1.0)
    bright = bright.reshape(*image.shape[:2], -1)
    if hidden is not None:
        hidden = hidden.reshape(bright.shape)
        bright = np.where(hidden, MISSING, np.broadcast_to(bright, (*bright.shape[:2], 3)))
    if bright.shape[2] == 1:
        axes.imshow(bright[..., 0], cmap="gray", vmin=0.0, vmax=1.0)
    else:
        axes.imshow(bright)
