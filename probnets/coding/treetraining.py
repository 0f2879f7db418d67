r"""Learning quad trees of residuals."""

__all__ = ["residual_crops", "train_trees"]

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.cluster import vq

from probnets.circuits import DiscretisedLogistic, TreeCircuit
from probnets.circuits.em import EMSettings, FitResult, fit

from .images import ImageLike, as_array
from .treeresiduals import image_residuals
from .trees import CHANNELS, SHIFT, VALUES, TreeModel, image_tree

_SETTINGS = EMSettings(epochs=8, batch_size=100, first_step=0.5, pseudocount=(0.1, 1.0))
_CROPS = 1000  # crops that learning starts from, at most
_POINTS = 4000  # blocks of each level that are clustered


def train_trees(
    images: Iterable[ImageLike],
    *,
    units: int = 32,
    crop: int = 64,
    settings: EMSettings | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> tuple[TreeModel, TreeCircuit, FitResult]:
    r"""Learns a quad tree of residuals, for images of any size.

    Crops of the residuals are taken for images of their own. Learning starts from clusters of
    blocks by how large their residuals are, one cluster for each state, and goes on by
    expectation maximisation. Every twentieth crop is held out to choose the pseudocount and the
    best epoch.

    Arguments:
        images: The images, in colour. Grey ones are left out.
        units: The number of states of a block :math:`K`.
        crop: The side of a crop in pixels, a power of two. Larger blocks than that take the
            matrix of the largest.
        settings: The settings of expectation maximisation. By default there are eight epochs
            in batches of 100 crops.
        checkpoint: The file to resume from.
        progress: Whether to show a progress bar.

    Returns:
        The model, the circuit of a crop that it was rounded from, and how the fit went.

    Raises:
        ValueError: If the crop is no power of two, or there are fewer than 20.
    """
    if crop < 2 or crop & (crop - 1):
        raise ValueError(f"expected a crop that is a power of two from 2, got {crop}")
    settings = settings or _SETTINGS
    crops = residual_crops(images, crop)
    held = np.arange(len(crops)) % 20 == 19
    if not held.any():
        raise ValueError(f"expected 20 crops of {crop} x {crop} pixels or more, got {len(crops)}")
    train, valid = crops[~held], crops[held]
    inputs = DiscretisedLogistic(CHANNELS, units, VALUES)
    circuit = TreeCircuit(image_tree(crop, crop), inputs, shape=train.shape[1:])
    _start(circuit, inputs, train, settings.seed)
    result = fit(
        circuit, train, settings, validation=valid, checkpoint=checkpoint, progress=progress
    )
    return TreeModel.from_circuit(circuit), circuit, result


def residual_crops(images: Iterable[ImageLike], crop: int) -> np.ndarray:
    r"""Cuts the residuals of images into crops.

    Arguments:
        images: The images. Those that are not three or four channels of uint8 are left out.
        crop: The side of a crop in pixels.

    Returns:
        The residuals with 255 added, of int16 with shape :math:`(N, h, h, 3)`.
    """
    parts = [np.empty((0, crop, crop, CHANNELS), dtype=np.int16)]
    for img in images:
        array = as_array(img)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] < CHANNELS:
            continue
        rows, columns = array.shape[0] // crop, array.shape[1] // crop
        left = image_residuals(array[..., :CHANNELS]) + np.int16(SHIFT)
        left = left[: rows * crop, : columns * crop]
        left = left.reshape(rows, crop, columns, crop, CHANNELS).swapaxes(1, 2)
        parts.append(left.reshape(-1, crop, crop, CHANNELS))
    return np.concatenate(parts)


@torch.no_grad()
def _start(
    circuit: TreeCircuit, inputs: DiscretisedLogistic, crops: np.ndarray, seed: int
) -> None:
    r"""Sets the parameters to what clusters of blocks by the sizes of residuals suggest."""
    source = np.random.default_rng(seed)
    crops = crops[source.permutation(len(crops))[:_CROPS]]
    K, labels = circuit.units, _labels(crops, circuit.units, source)
    sizes = np.abs(crops.astype(np.float32) - SHIFT)
    counts = np.bincount(labels[0].ravel(), minlength=K)
    scales = [
        np.bincount(labels[0].ravel(), sizes[..., c].ravel(), minlength=K) for c in range(CHANNELS)
    ]
    scales = (np.stack(scales) / np.maximum(counts, 1)).clip(0.1) * 0.7  # E|r| is 1.4 scales
    inputs.mean.fill_(SHIFT)
    inputs.log_scale.copy_(torch.from_numpy(np.log(scales)))

    root = np.bincount(labels[-1].ravel(), minlength=K) + 0.5
    circuit.root_logits.copy_(torch.from_numpy(np.log(root)))
    for level, (below, above) in enumerate(pairwise(labels)):
        state = above.repeat(2, axis=1).repeat(2, axis=2)
        pairs = np.bincount((state * K + below).ravel(), minlength=K * K) + 0.5
        logits = torch.from_numpy(np.log(pairs.reshape(K, K)))
        circuit.sum_logits[level] = logits


def _labels(crops: np.ndarray, units: int, source: np.random.Generator) -> list[np.ndarray]:
    r"""Clusters blocks of all levels together, and returns their labels level by level."""
    sizes = np.abs(crops.astype(np.float32) - SHIFT)  # (N, h, h, C)
    edged = np.pad(sizes, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    side = sizes.shape[1]
    near = sum(edged[:, i : i + side, j : j + side] for i in range(3) for j in range(3))
    features = [np.log2(np.asarray(near) / 9 + 0.25)]  # one pixel alone says little
    while side > 1:
        side //= 2
        sizes = sizes.reshape(len(sizes), side, 2, side, 2, CHANNELS).mean((2, 4))
        features.append(np.log2(sizes + 0.25))

    flat = [feature.reshape(-1, CHANNELS) for feature in features]
    points = np.concatenate([f[source.integers(len(f), size=_POINTS)] for f in flat])
    points += source.normal(0.0, 1e-3, points.shape).astype(np.float32)  # tells all apart
    centres = points[source.permutation(len(points))[:units]]
    for _ in range(20):
        nearest = vq.vq(points, centres)[0]
        sums = np.stack([np.bincount(nearest, p, minlength=units) for p in points.T], axis=1)
        counts = np.bincount(nearest, minlength=units)[:, None]
        centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres).astype(np.float32)
    centres = centres[centres.mean(1).argsort()]
    return [
        vq.vq(f, centres)[0].reshape(feature.shape[:3])
        for f, feature in zip(flat, features, strict=True)
    ]
