r"""Draws what a model has learned, as PNG files.

python compression/figures.py mnist.safetensors --images ../shared/data/mnist.npz --out runs
python compression/figures.py tiles.safetensors --images ../shared/data/photos/valid --out runs

Of a model of whole images: samples, completions of images whose lower half is hidden, and the
tree. Of a model of tiles: the tree, and where in the first images the bits go. Without a model,
the one of tiles that ships; without images, samples and the tree alone.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch

from probnets.circuits import (
    TreeCircuit,
    plot_completions,
    plot_samples,
    plot_tree,
)
from probnets.circuits.em import EMSettings
from probnets.cli.imagesets import ImageSet
from probnets.coding import ImageModel, pretrained, train_whole
from probnets.coding.tiles import cut, tile_classes
from probnets.coding.transforms import forward

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(argv: Sequence[str] | None = None) -> int:
    r"""Draws the figures and prints the names of their files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--images", type=Path, help="a folder or an .npz archive")
    parser.add_argument("--count", type=int, default=4, help="how many images to take")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="synthetic images, nothing is kept")
    args = parser.parse_args(argv)
    try:
        if not args.smoke:
            model = ImageModel.load(args.model) if args.model else pretrained("tiles")
            _draw(model, ImageSet(args.images) if args.images else (), args)
            return 0
        noise = np.random.default_rng(0).normal(scale=4, size=(40, 8, 8, 1)).cumsum(1).cumsum(2)
        images = (128 + noise).clip(0, 255).astype(np.uint8)
        settings = EMSettings(epochs=1, batch_size=16)
        small = train_whole(images[..., 0], units=4, settings=settings, progress=False)[0]
        with TemporaryDirectory() as scratch:
            args.out = Path(scratch)
            _draw(small, images[..., 0], args)
            _draw(pretrained("tiles"), [np.tile(images[0], (4, 6, 3))], args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"figures.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def _draw(model: ImageModel, images: Iterable[np.ndarray], args: argparse.Namespace) -> None:
    circuit = model.to_circuit()
    some = list(itertools.islice(images, args.count))
    _save(plot_tree(circuit), args.out / f"{model.kind}-tree.png")
    if model.kind == "tiles":
        for n, image in enumerate(some):
            _save(_heat(circuit, image), args.out / f"bits-{n}.png")
        return
    generator = torch.Generator().manual_seed(args.seed)
    _save(plot_samples(circuit, generator=generator), args.out / "samples.png")
    if some:
        x = torch.from_numpy(np.stack(some).astype(np.int64))
        seen = torch.ones(circuit.shape, dtype=torch.bool)
        seen[circuit.shape[0] // 2 :] = False
        figure = plot_completions(circuit, x, seen, generator=generator)
        _save(figure, args.out / "completions.png")


def _heat(circuit: TreeCircuit, image: np.ndarray) -> "Figure":
    r"""Shows an image in colour beside the bits per subpixel of each of its tiles."""
    from matplotlib.figure import Figure

    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[2] < 3:
        raise ValueError(f"expected images in colour, got {image.shape} of {image.dtype}")
    image = np.ascontiguousarray(image[..., :3])
    height, width = circuit.shape[:2]
    whole = tile_classes(*image.shape[:2], tile=(height, width))[0]
    if not whole.mask.all():
        raise ValueError(f"expected images of {height} x {width} or more, got {image.shape}")
    tiles = torch.from_numpy(cut(forward(image), whole).astype(np.int64))
    bits = -circuit.log_prob(tiles).detach() / (math.log(2) * circuit.shape.numel())
    grid = bits.view(len(whole.rows), len(whole.columns)).numpy()

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(image[: len(whole.rows) * height, : len(whole.columns) * width])
    shown = right.imshow(grid, cmap="magma", vmin=0.0)
    figure.colorbar(shown, ax=right, label="bits per subpixel")
    for axes in (left, right):
        axes.set_axis_off()
    return figure


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
