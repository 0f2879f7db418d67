r"""Trains the models of photographs that ship with the package, or others like them.

python compression/photographs.py --out photographs.safetensors
python compression/photographs.py --kind tree --out tree.safetensors

`--data` is a folder of photographs of red, green and blue in eight bits, by default photos/train
of the data folder; others are left out, with a line that says so. An interrupted run goes on where
it stopped, from OUT.checkpoint. Bits are measured on photographs that the training did not see:
those in a folder `valid` beside the one that is named, or every tenth.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from probnets import data
from probnets.circuits.em import EMSettings
from probnets.cli.imagesets import ImageSet
from probnets.coding import (
    PhotographModel,
    TrainingSettings,
    TreeModel,
    compress,
    train_photographs,
    train_trees,
)


def main(argv: Sequence[str] | None = None) -> int:
    r"""Trains a model and reports how well it codes."""
    args = _arguments(argv)
    try:
        with TemporaryDirectory() as scratch:
            _run(args, Path(scratch))
    except (OSError, TypeError, ValueError) as error:
        print(f"photographs.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace, scratch: Path) -> None:
    out = args.out or (scratch / "model.safetensors" if args.smoke else None)
    if out is None:
        raise ValueError("expected the file of the model to write, got none; name it with --out")
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    if args.smoke:
        train, valid = list(_noise(3, 48, 40, 3)), list(_noise(1, 40, 48, 3))
    else:
        folder = args.data or data.folder() / "photos" / "train"
        beside = folder.with_name("valid")
        train = _colours(folder)
        valid = _colours(beside) if beside.is_dir() and beside != folder else None
    if valid is None:
        train, valid = [img for n, img in enumerate(train) if n % 10], train[::10]

    if args.kind == "tree":
        model = _tree(args, train, checkpoint)
    else:
        model = _photographs(args, train, valid, checkpoint)
    model.save(out)
    checkpoint.unlink(missing_ok=True)
    print(f"{out}: {model}, {out.stat().st_size:,} bytes")

    modes = ("fast", "slow") if isinstance(model, PhotographModel) else ("fast",)
    numbers = sum(img.size for img in valid)
    for mode in modes:
        total = sum(len(compress(img, model, mode=mode)) for img in valid)
        print(f"{mode}: {8 * total / numbers:.4f} bits per number of {len(valid)} new photographs")


def _photographs(
    args: argparse.Namespace,
    train: Sequence[np.ndarray],
    valid: Sequence[np.ndarray],
    checkpoint: Path,
) -> PhotographModel:
    settings = TrainingSettings(
        units=args.units or 96, samples=args.samples, steps=args.steps, seed=args.seed
    )
    model, result = train_photographs(
        train, validation=valid, settings=settings, checkpoint=checkpoint
    )
    real, integer = np.mean(result.real), np.mean(result.integer)
    print(f"{real:.4f} bits per number by networks of floats, each photograph as one part")
    print(f"{integer:.4f} by networks of integers, {100 * (integer / real - 1):+.3f} %")
    return model


def _tree(args: argparse.Namespace, train: Sequence[np.ndarray], checkpoint: Path) -> TreeModel:
    settings = EMSettings(
        epochs=args.epochs,
        batch_size=100,
        first_step=0.5,
        pseudocount=(0.1, 1.0),
        seed=args.seed,
    )
    model, _, result = train_trees(
        train,
        units=args.units or 32,
        crop=8 if args.smoke else 64,
        settings=settings,
        checkpoint=checkpoint,
    )
    print(f"{result.best:.4f} bits per number of what was held out of the training data")
    return model


def _colours(folder: Path) -> list[np.ndarray]:
    r"""Reads the photographs of a folder, without those of another kind."""
    images = list(ImageSet(folder))
    kept = [img for img in images if img.dtype == np.uint8 and img.shape[2:] == (3,)]
    if left := len(images) - len(kept):
        print(f"{left} images left out, not of three colours of eight bits", file=sys.stderr)
    return kept


def _noise(*shape: int) -> np.ndarray:
    r"""Makes images of smooth noise."""
    steps = np.random.default_rng(len(shape)).normal(scale=2.0, size=shape)
    return (128 + steps.cumsum(1).cumsum(2)).clip(0, 255).astype(np.uint8)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder of photographs")
    parser.add_argument("--out", type=Path, help="the model to write")
    parser.add_argument("--kind", choices=["photographs", "tree"], default="photographs")
    parser.add_argument("--units", type=int, help="hidden units (96), or those of the tree (32)")
    parser.add_argument("--samples", type=int, default=2_000_000, help="pixels to learn from")
    parser.add_argument("--steps", type=int, default=9000, help="steps for each of three planes")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the tree")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a short run on synthetic data")
    args = parser.parse_args(argv)
    if args.smoke:
        args.units, args.samples, args.steps, args.epochs = 32, 2000, 20, 1
        args.units = 4 if args.kind == "tree" else 32
    return args


if __name__ == "__main__":
    sys.exit(main())
