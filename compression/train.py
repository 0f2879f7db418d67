r"""Trains a model of images, by default the one of tiles that ships with the package.

python compression/train.py --out tiles.safetensors --units 16
python compression/train.py --data mnist --out mnist.safetensors --units 32 --epochs 40

`--data` is a folder of photographs, `mnist` or `fashion`. An interrupted run goes on where it
stopped, from OUT.checkpoint. Bits per dimension are those of images that the training did not see:
the test set of MNIST, or the photographs in a folder `valid` beside the one that is named.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from probnets import data
from probnets.circuits import TreeCircuit
from probnets.circuits.em import EMSettings
from probnets.cli.imagesets import ImageSet
from probnets.coding import ImageModel, encode_rows, train_tiles, train_whole
from probnets.coding.training import tile_rows

DIGITS = {"mnist": data.mnist, "fashion": data.fashion}


def main(argv: Sequence[str] | None = None) -> int:
    r"""Trains a model and reports how well it codes."""
    args = _arguments(argv)
    try:
        with TemporaryDirectory() as scratch:
            _run(args, Path(scratch))
    except (OSError, TypeError, ValueError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace, scratch: Path) -> None:
    settings = EMSettings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        pseudocount=tuple(args.pseudocount),
        patience=args.patience,
        seed=args.seed,
    )
    out = args.out or (scratch / "model.safetensors" if args.smoke else None)
    if out is None:
        raise ValueError("expected the file of the model to write, got none; name it with --out")
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    if args.data in DIGITS or args.smoke == "whole":
        digits = _noise(64, 8, 8) if args.smoke else DIGITS[args.data](data.folder(args.folder))
        train, test = (digits, digits[:9]) if isinstance(digits, np.ndarray) else digits[::2]
        model, circuit, result = train_whole(
            train, units=args.units, settings=settings, checkpoint=checkpoint
        )
        rows = test.reshape(len(test), -1)
    else:
        images, unseen = _photographs(args)
        model, circuit, result = train_tiles(
            images, units=args.units, tile=args.tile, settings=settings, checkpoint=checkpoint
        )
        rows = tile_rows(unseen, args.tile) if unseen is not None else None
    model.save(out)
    checkpoint.unlink(missing_ok=True)

    print(f"{out}: {model}, {out.stat().st_size:,} bytes")
    print(f"{len(result.history)} epochs, pseudocount {result.pseudocount}")
    print(f"{result.best:.4f} bits per dimension on what was held out of the training data")
    if rows is None:
        print("no folder 'valid' beside the images, hence no bits per dimension on new ones")
    else:
        _report(model, circuit, rows[: args.rows])


def _photographs(
    args: argparse.Namespace,
) -> tuple[Iterable[np.ndarray], Iterable[np.ndarray] | None]:
    r"""Returns the images to train on, and others to report on if there are any."""
    if args.smoke:
        return list(_noise(2, 32, 40, 3)), list(_noise(1, 32, 32, 3))
    folder = Path(args.data) if args.data else data.folder(args.folder) / "photos" / "train"
    valid = folder.with_name("valid")
    return ImageSet(folder), ImageSet(valid) if valid.is_dir() and valid != folder else None


def _report(model: ImageModel, circuit: TreeCircuit, rows: np.ndarray) -> None:
    r"""Compares the circuit in floating point with the integers that code."""
    ideal = circuit.bits_per_dimension(torch.from_numpy(rows.astype(np.int64)))
    coded = 8 * sum(map(len, encode_rows(model.tables, rows, chained=True))) / rows.size
    print(f"{ideal:.5f} bits per dimension on {len(rows):,} new rows, as floats")
    print(f"{coded:.5f} bits per dimension in bytes, {100 * (coded / ideal - 1):+.4f} %")


def _noise(*shape: int) -> np.ndarray:
    r"""Makes images of smooth noise."""
    steps = np.random.default_rng(len(shape)).normal(scale=2.0, size=shape)
    return (128 + steps.cumsum(1).cumsum(2)).clip(0, 255).astype(np.uint8)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a folder of photographs, mnist or fashion")
    parser.add_argument("--folder", type=Path, help="the data folder, for mnist and fashion")
    parser.add_argument("--out", type=Path, help="the model to write")
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--tile", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--pseudocount", type=float, nargs="+", default=[0.1, 0.03, 0.3, 1.0])
    parser.add_argument("--patience", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2000, help="new rows to report on")
    parser.add_argument("--smoke", choices=["tiles", "whole"], nargs="?", const="tiles")
    args = parser.parse_args(argv)
    if args.smoke:
        args.units, args.epochs, args.batch_size, args.tile = 4, 1, 16, 8
    return args


if __name__ == "__main__":
    sys.exit(main())
