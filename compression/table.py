r"""Prints the table of MNIST and Fashion-MNIST: how small do their test sets become?

python compression/table.py --mnist mnist.safetensors --fashion fashion.safetensors --effort 9

Models that are not named are trained, with `--units` and `--epochs`, and kept under `runs/`. Each
row is what the 10,000 test images take together, in bytes and in bits per dimension: our models
with all images in one stream, with each image on its own, and the bare codewords of the latter;
then PNG, lossless WebP and JPEG XL (with the package imagecodecs), an image a file.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from probnets import data
from probnets.circuits.em import EMSettings
from probnets.cli.formats import jpegxl_bytes, png_bytes, webp_bytes
from probnets.coding import (
    ImageModel,
    compress_batch,
    decompress_batch,
    encode_rows,
    train_whole,
)

# Negative log-likelihoods on the test sets, without a coder, as Sparse Probabilistic Circuits via
# Pruning and Growing (Dang et al., 2022), table 1, https://arxiv.org/abs/2211.12551, lists them.
PUBLISHED = {
    "HCLT (Liu et al., 2022)": {"mnist": 1.20, "fashion": 3.34},
    "IDF": {"mnist": 1.90, "fashion": 3.47},
    "BitSwap": {"mnist": 1.27, "fashion": 3.28},
    "BB-ANS": {"mnist": 1.39, "fashion": 3.66},
    "McBits": {"mnist": 1.98, "fashion": 3.72},
}


def main(argv: Sequence[str] | None = None) -> int:
    r"""Prints a table for each data set, and returns 1 if a stream does not give them back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", type=Path, help="a model of MNIST")
    parser.add_argument("--fashion", type=Path, help="a model of Fashion-MNIST")
    parser.add_argument("--data", type=Path, help="the data folder")
    parser.add_argument("--sets", nargs="+", choices=["mnist", "fashion"])
    parser.add_argument("--images", type=int, help="take so many test images, not all")
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--effort", type=int, default=7, help="of JPEG XL, from 1 to 9")
    parser.add_argument("--smoke", action="store_true", help="a few synthetic images")
    args = parser.parse_args(argv)
    try:
        exact = [_table(name, args) for name in args.sets or ("mnist", "fashion")]
    except (OSError, TypeError, ValueError) as error:
        print(f"table.py: error: {error}", file=sys.stderr)
        return 1
    return 0 if all(exact) else 1


def _table(name: str, args: argparse.Namespace) -> bool:
    train, test = _digits(name, args)
    model = _model(name, train, args)
    test = test[: args.images]
    print(f"\n{name}: {len(test):,} test images, {test[0].size} numbers each; {model}")

    chained = compress_batch(test, model)
    single = compress_batch(test, model, chained=False)
    exact = all(np.array_equal(decompress_batch(s, model), test) for s in (chained, single))
    words = sum(map(len, encode_rows(model.tables, test.reshape(len(test), -1))))
    _line("probnets, one stream", len(chained), test)
    _line("probnets, each image on its own", len(single), test)
    _line("    of which codewords", words, test)

    others: dict[str, Callable[[np.ndarray], bytes | None]] = {
        "PNG": png_bytes,
        "WebP": webp_bytes,
        f"JPEG XL, effort {args.effort}": lambda image: jpegxl_bytes(image, effort=args.effort),
    }
    for label, encode in others.items():
        if encode(test[0]) is None:
            print(f"{label:<34} not available; JPEG XL needs imagecodecs, WebP Pillow with it")
            continue
        with ThreadPoolExecutor() as pool:
            _line(label, sum(len(file or b"") for file in pool.map(encode, test)), test)
    for label, figures in PUBLISHED.items():
        print(f"{label:<34}{'-':>13}{figures[name]:>9.2f}  published, theoretical")
    print("exact" if exact else "NOT exact")
    return exact


def _line(label: str, size: int, images: np.ndarray) -> None:
    print(f"{label:<34}{size:>13,}{8 * size / images.size:>9.4f}")


def _digits(name: str, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    if args.smoke:
        noise = np.random.default_rng(0).normal(scale=4.0, size=(80, 8, 8)).cumsum(1).cumsum(2)
        images = (128 + noise).clip(0, 255).astype(np.uint8)
        return images[:60], images[60:]
    digits = {"mnist": data.mnist, "fashion": data.fashion}[name](data.folder(args.data))
    return digits.train, digits.test


def _model(name: str, train: np.ndarray, args: argparse.Namespace) -> ImageModel:
    r"""Loads the model that is named or was trained before, or trains one."""
    if named := getattr(args, name):
        return ImageModel.load(named)
    settings = EMSettings(epochs=args.epochs)
    if args.smoke:
        return train_whole(train, units=4, settings=EMSettings(epochs=1), progress=False)[0]
    path = Path("runs", f"table-{name}-{args.units}-{args.epochs}.safetensors")
    if not path.is_file():
        print(f"training a model of {name} with {args.units} units, to keep in {path}")
        checkpoint = path.with_suffix(".checkpoint")
        model = train_whole(train, units=args.units, settings=settings, checkpoint=checkpoint)[0]
        model.save(path)
        checkpoint.unlink(missing_ok=True)
    return ImageModel.load(path)


if __name__ == "__main__":
    sys.exit(main())
