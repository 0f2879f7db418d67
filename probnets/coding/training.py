r"""Learning models of images."""

__all__ = ["tile_rows", "train_tiles", "train_whole"]

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from probnets.circuits import Categorical, TreeCircuit, hidden_chow_liu_tree, quad_tree
from probnets.circuits.em import EMSettings, FitResult, fit
from probnets.circuits.starts import kmeans_start, random_start

from .images import ImageLike, as_array
from .models import ImageModel
from .tiles import cut, tile_classes
from .transforms import forward


def train_whole(
    images: np.ndarray,
    *,
    units: int = 16,
    settings: EMSettings | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> tuple[ImageModel, TreeCircuit, FitResult]:
    r"""Learns a hidden Chow-Liu tree of small images of one shape.

    A tenth of the images, at most 1,000, is held out to choose the pseudocount and the best
    epoch.

    Arguments:
        images: The images, with shape :math:`(N, H, W)` or :math:`(N, H, W, C)`, of dtype bool,
            uint8 or uint16.
        units: The number of units :math:`K`.
        settings: The settings of expectation maximisation.
        checkpoint: The file to resume from.
        progress: Whether to show a progress bar.

    Returns:
        The model, the circuit it was rounded from, and how the fit went.
    """
    if images.ndim < 2 or len(images) < 20 or images.dtype.name not in ("bool", "uint8", "uint16"):
        raise ValueError(
            "expected 20 images or more with shape (N, H, W) of bool, uint8 or uint16, "
            f"got {images.shape} of {images.dtype}"
        )
    settings = settings or EMSettings()
    rows = images.reshape(len(images), -1)
    rows = rows.astype(np.uint8) if rows.dtype == np.bool_ else rows
    values = 2 if images.dtype == np.bool_ else 256 if images.dtype == np.uint8 else 65536
    order = np.random.default_rng(settings.seed).permutation(len(rows))
    held = min(len(rows) // 10, 1000)
    train, valid = rows[np.sort(order[held:])], rows[np.sort(order[:held])]

    tree = hidden_chow_liu_tree(train)
    inputs = _categorical(tree.inputs, units, values, settings.seed)
    circuit = TreeCircuit(tree, inputs, shape=images.shape[1:])
    random_start(circuit, generator=torch.Generator().manual_seed(settings.seed))
    result = fit(
        circuit, train, settings, validation=valid, checkpoint=checkpoint, progress=progress
    )
    return ImageModel.from_circuit(circuit), circuit, result


def train_tiles(
    images: Iterable[ImageLike],
    *,
    units: int = 16,
    tile: int = 16,
    settings: EMSettings | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> tuple[ImageModel, TreeCircuit, FitResult]:
    r"""Learns a tied quad tree of tiles of residuals, for images of any size.

    The images are seen in both orientations, upright and on their sides, and a few tiles as
    masks, so that the model knows images with few levels too. Every twentieth tile is held out,
    in all these forms, to choose the pseudocount and the best epoch.

    Arguments:
        images: The images, in colour. Grey ones are left out.
        units: The number of units :math:`K`.
        tile: The side of a tile, in pixels.
        settings: The settings of expectation maximisation.
        checkpoint: The file to resume from.
        progress: Whether to show a progress bar.

    Returns:
        The model, the circuit it was rounded from, and how the fit went.
    """
    settings = settings or EMSettings()
    rows, number = _numbered_tiles(images, tile, masks=8)
    held = number % 20 == 19
    if not held.any():
        raise ValueError(f"expected 20 complete tiles or more, got {len(np.unique(number))}")
    train, valid = rows[~held], rows[held]
    tree = quad_tree(tile, tile, channels=3, tied=True)
    inputs = _categorical(tree.inputs, units, 512, settings.seed)
    circuit = TreeCircuit(tree, inputs, shape=(tile, tile, 3))
    kmeans_start(circuit, train, seed=settings.seed)

    result = fit(
        circuit, train, settings, validation=valid, checkpoint=checkpoint, progress=progress
    )
    return ImageModel.from_circuit(circuit, kind="tiles"), circuit, result


def tile_rows(images: Iterable[ImageLike], tile: int) -> np.ndarray:
    r"""Cuts images into complete tiles of residuals, in both orientations.

    Arguments:
        images: The images.
        tile: The side of a tile, in pixels.

    Returns:
        The residuals, with shape :math:`(N, 3 t^2)`.

    Raises:
        ValueError: If no image in colour is as large as a tile.
    """
    return _numbered_tiles(images, tile)[0]


def _numbered_tiles(
    images: Iterable[ImageLike], tile: int, *, masks: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    r"""Cuts images into tiles, and numbers them so that forms of one tile share a number.

    With `masks` there is a tile of a mask, which tells the pixels that are brighter than half
    of the image, for so many other tiles.
    """
    rows, numbers, count = [], [], 0
    for img in images:
        array = as_array(img)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (3, 4):
            continue
        grid = np.arange(array.shape[0] // tile * (array.shape[1] // tile)) + count
        grid = grid.reshape(array.shape[0] // tile, -1) if grid.size else grid.reshape(0, 0)
        count += grid.size
        colour = array[..., :3]
        views = [(colour, grid, 1), (colour.transpose(1, 0, 2), grid.T, 1)]
        if masks is not None:
            mask = (colour > np.median(colour[..., 1]))[..., 1:2].astype(np.uint8)
            views.append((mask.repeat(3, axis=2), grid, max(masks // 2, 1)))
        for view, places, step in views:
            symbols = forward(np.ascontiguousarray(view))
            classes = tile_classes(*view.shape[:2], tile=(tile, tile))
            whole = [cls for cls in classes if cls.mask.all()]
            rows.extend(cut(symbols, cls).reshape(cls.total, -1)[::step] for cls in whole)
            numbers.append(places.ravel()[::step])
    if not rows:
        raise ValueError(
            f"expected an image in colour of {tile} x {tile} pixels or more, got none"
        )
    return np.concatenate(rows), np.concatenate(numbers)


def _categorical(groups: int, units: int, values: int, seed: int) -> Categorical:
    inputs = Categorical(groups, units, values)
    noise = torch.randn(inputs.logits.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        inputs.logits.copy_(0.1 * noise)
    return inputs
