r"""The command ``heatmap``: where in a photograph the bits go."""

__all__ = ["check_figure", "heatmap", "run_heatmap", "upright"]

import argparse
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from probnets.coding import ImageWarning, code_lengths
from probnets.coding.models import load_model

from .formats import read_noted
from .jobs import Writer
from .words import say

SIDE = 1200  # pixels of a figure's longer side, to which larger photographs are averaged

_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF orientations
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: np.rot90,
}


def run_heatmap(args: argparse.Namespace) -> int:
    r"""Draws a photograph beside the bits that each of its pixels takes."""
    writer, source = Writer(force=args.force), args.file
    check_figure(args.out)
    writer.claim(args.out, source)
    _figure_class()  # before the work, which takes a while
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImageWarning)  # of what a stream would not keep
        image, notes = read_noted(source)
    model = None if args.model is None else load_model(args.model)
    lengths = code_lengths(image, model, mode=args.mode)
    turned = (upright(array, notes.orientation) for array in (image, lengths))
    writer.write(args.out, heatmap(*turned, title=source.name))
    say(f"{args.out}: {_totals(lengths)}")
    return 0


def check_figure(path: Path) -> None:
    r"""Raises unless the name of a figure says that it is a PNG file."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"expected a name in .png for a figure, got {path}; it is drawn as PNG")


def heatmap(image: np.ndarray, lengths: np.ndarray, *, title: str = "") -> bytes:
    r"""Draws an image beside the bits that each of its pixels takes, as the bytes of a PNG file.

    Arguments:
        image: The image, with shape :math:`(H, W)` or :math:`(H, W, C)`.
        lengths: The bits of each number, with shape :math:`(H, W, C)`, as
            :func:`probnets.coding.code_lengths` gives them.
        title: What stands above.

    Raises:
        ImportError: If Matplotlib is missing.
        ValueError: If the two are not of one size.
    """
    if image.shape[:2] != lengths.shape[:2] or lengths.ndim != 3:
        raise ValueError(
            f"expected bits with shape (H, W, C) of an image with shape {image.shape}, "
            f"got {lengths.shape}"
        )
    height, width = image.shape[:2]
    canvas = _figure_class()(figsize=(12.0, 1.2 + 5.2 * min(height / width, 2.0)))
    canvas.set_layout_engine("constrained")
    left, right = canvas.subplots(1, 2)
    left.imshow(_shown(image), cmap="gray", vmin=0.0, vmax=1.0)
    left.set_title(title)
    pixels = _averaged(lengths.sum(axis=2))
    top = max(float(np.quantile(pixels, 0.995)), 1e-3)
    drawn = right.imshow(pixels, cmap="magma", vmin=0.0, vmax=top)
    canvas.colorbar(drawn, ax=right, label="bits per pixel")
    right.set_title(_totals(lengths))
    for axes in (left, right):
        axes.set_axis_off()
    file = io.BytesIO()
    canvas.savefig(file, format="png", dpi=120)
    return file.getvalue()


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    r"""Turns an array as EXIF says to.

    Arguments:
        array: The array, with shape :math:`(H, W)` or :math:`(H, W, C)`.
        orientation: The orientation, from 1 to 8.

    Example:
        >>> upright(np.array([[1, 2, 3]]), 6).tolist()
        [[1], [2], [3]]
    """
    return _TURNS[orientation](array) if orientation in _TURNS else array


def _totals(lengths: np.ndarray) -> str:
    height, width, channels = lengths.shape
    rates = lengths.mean(axis=(0, 1))
    parts = "" if channels == 1 else f" ({' + '.join(f'{rate:.2f}' for rate in rates)})"
    return (
        f"{round(lengths.sum() / 8):,} bytes, {lengths.sum() / (height * width):.2f} bits per "
        f"pixel{parts}"
    )


def _shown(image: np.ndarray) -> np.ndarray:
    r"""Returns an image as numbers from 0 to 1, grey or in colours, on white where it is clear."""
    scale = {"bool": 1, "uint8": 255, "uint16": max(int(image.max()), 1)}[image.dtype.name]
    shown = _averaged(image.reshape(*image.shape[:2], -1)) / scale
    if shown.shape[2] in (2, 4):
        alpha = shown[..., -1:]
        shown = shown[..., :-1] * alpha + 1 - alpha
    return shown[..., 0] if shown.shape[2] == 1 else shown


def _averaged(array: np.ndarray) -> np.ndarray:
    r"""Averages blocks of an array, those at the border as well, until a figure can show it."""
    step = -(-max(array.shape[:2]) // SIDE)
    if step == 1:
        return array.astype(np.float64)
    for axis in (0, 1):
        starts = np.arange(0, array.shape[axis], step)
        counts = np.diff(starts, append=array.shape[axis])
        total = np.add.reduceat(array, starts, axis=axis, dtype=np.float64)
        array = total / counts.reshape([-1 if n == axis else 1 for n in range(array.ndim)])
    return array


def _figure_class():  # noqa: ANN202
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "expected Matplotlib to draw with, got none; install probnets[plots]"
        ) from None
    return Figure
