r"""Codes a corpus: what do a model and other formats make of a folder of images?

python compression/corpus.py ../shared/data/photos/valid --model tiles.safetensors --effort 7

Prints the bytes of each image and their sum as PNG, lossless WebP, JPEG XL (with the package
imagecodecs) and with the model, by default the shipped one, and checks that each image comes back
bit for bit.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probnets.cli.formats import jpegxl_bytes, png_bytes, read_image, webp_bytes
from probnets.coding import compress, decompress, load_model, pretrained
from probnets.coding.models import AnyModel
from probnets.data import image_folder

FORMATS = ("PNG", "WebP", "JPEG XL", "probnets")


def main(argv: Sequence[str] | None = None) -> int:
    r"""Prints the table, and returns 1 if an image did not come back as it was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--effort", type=int, default=7, help="of JPEG XL, from 1 to 9")
    parser.add_argument("--smoke", action="store_true", help="two synthetic images")
    args = parser.parse_args(argv)
    try:
        if args.folder is None and not args.smoke:
            raise ValueError("expected a folder of images, got none")
        model = load_model(args.model) if args.model else pretrained()
        return _table(_images(args), model, args.effort)
    except (OSError, TypeError, ValueError) as error:
        print(f"corpus.py: error: {error}", file=sys.stderr)
        return 1


def _images(args: argparse.Namespace) -> dict[str, Path | np.ndarray]:
    if args.smoke:
        noise = np.random.default_rng(0).normal(size=(2, 24, 40, 3)).cumsum(1).cumsum(2)
        images = (128 + noise).clip(0, 255).astype(np.uint8)
        return {"colour": images[0], "grey": images[1, ..., 0]}
    return {str(path.relative_to(args.folder)): path for path in image_folder(args.folder)}


def _table(images: dict[str, Path | np.ndarray], model: AnyModel, effort: int) -> int:
    decompress(compress(np.zeros((17, 17), np.uint8)))  # compiles the loops
    totals, known = np.zeros(len(FORMATS), dtype=np.int64), np.ones(len(FORMATS), dtype=bool)
    subpixels, raw, encoding, decoding, exact = 0, 0, 0.0, 0.0, True
    print(f"{'image':<28}{'raw':>12}" + "".join(f"{name:>12}" for name in FORMATS))
    for name, source in images.items():
        image = read_image(source) if isinstance(source, Path) else source
        start = time.perf_counter()
        stream = compress(image, model)
        middle = time.perf_counter()
        back = decompress(stream, model)
        encoding, decoding = encoding + middle - start, decoding + time.perf_counter() - middle
        same = back.dtype == image.dtype and np.array_equal(back, image)
        exact = exact and same

        others = (png_bytes(image), webp_bytes(image), jpegxl_bytes(image, effort=effort))
        sizes = [None if other is None else len(other) for other in others] + [len(stream)]
        known &= [size is not None for size in sizes]
        totals += [size or 0 for size in sizes]
        subpixels, raw = subpixels + image.size, raw + image.nbytes
        print(_line(name, image.nbytes, sizes) + ("" if same else "  NOT exact"))

    sums = [int(t) if k else None for t, k in zip(totals, known, strict=True)]
    print(_line("total", raw, sums))
    rates = "".join(f"{'-' if s is None else f'{8 * s / subpixels:.4f}':>12}" for s in sums)
    print(f"{'bits per subpixel':<28}{8 * raw / subpixels:>12.4f}{rates}")
    if sums[2] is None:
        print("JPEG XL: not available; pip install imagecodecs")
    print(f"{raw / 1e6 / encoding:.2f} MB/s to encode, {raw / 1e6 / decoding:.2f} MB/s to decode")
    print("exact" if exact else "NOT exact")
    return 0 if exact else 1


def _line(name: str, raw: int, sizes: Sequence[int | None]) -> str:
    cells = "".join(f"{'-' if size is None else f'{size:,}':>12}" for size in sizes)
    return f"{name:<28}{raw:>12,}{cells}"


if __name__ == "__main__":
    sys.exit(main())
