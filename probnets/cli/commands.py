r"""The command ``probnets``: compresses images, restores them and trains models of them."""

__all__ = ["main"]

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from probnets import __version__
from probnets.circuits.em import EMSettings
from probnets.coding import compress, decompress, train_tiles, train_whole
from probnets.coding.compression import Mode

from .compression import run_compress, run_decompress
from .demo import HEADER, demonstrate, figure, pictures
from .heatmap import check_figure, run_heatmap
from .imagesets import ImageSet
from .information import run_info
from .jobs import Writer, writing
from .words import complain, interrupted, say, spoken_warnings

PLOTS = "; it needs pip install 'probnets[plots]'"


def main(argv: Sequence[str] | None = None) -> int:
    r"""Runs the command.

    Arguments:
        argv: The arguments, by default those of the process.

    Returns:
        0, or 1 if something went wrong, of which stderr tells in one line each, or 130 if the
        user interrupted. Arguments that make no sense exit with 2.
    """
    args = _parser().parse_args(argv)
    with spoken_warnings():
        try:
            return args.run(args)
        except KeyboardInterrupt:
            interrupted()
            return 130
        except (ImportError, MemoryError, OSError, TypeError, ValueError) as error:
            complain(error)
            return 1


# ----------------------------------------------------------------------------------------------
# Training


def _train(args: argparse.Namespace) -> int:
    Writer(force=args.force).claim(args.out)
    checkpoint: Path = args.checkpoint or args.out.with_name(args.out.name + ".checkpoint")
    if checkpoint.exists() and not args.resume:
        raise FileExistsError(
            f"expected no checkpoint at {checkpoint}, got one; pass --resume to continue it, "
            "or remove it"
        )
    settings = EMSettings(epochs=args.epochs, batch_size=args.batch_size, seed=args.seed)
    images = ImageSet(args.source)
    kind = images.kind() if args.kind == "auto" else args.kind
    with writing(checkpoint):
        if kind == "whole":
            model, _, result = train_whole(
                images.stack(), units=args.units, settings=settings, checkpoint=checkpoint
            )
        else:
            model, _, result = train_tiles(
                images,
                units=args.units,
                tile=args.tile,
                settings=settings,
                checkpoint=checkpoint,
            )
    with writing(args.out):
        model.save(args.out)
    checkpoint.unlink(missing_ok=True)
    say(f"{args.out}: {model.kind} {model.shape}, {args.out.stat().st_size:,} bytes")
    say(f"{result.best:.4f} bits per dimension on validation data")
    return 0


# ----------------------------------------------------------------------------------------------
# Demonstration


def _demo(args: argparse.Namespace) -> int:
    if args.figure:
        check_figure(args.figure)
    start = time.perf_counter()
    decompress(compress(np.zeros((17, 17), dtype=np.uint8)))
    say(f"compiled loops loaded in {time.perf_counter() - start:.1f} s, not counted below")
    say("cat and camera are photographs, the others are made from them;")
    say("WebP stores grey and masks as colours; bits are per subpixel, of probnets\n")
    say(HEADER)
    rows = []
    for row in demonstrate(pictures()):
        say(str(row))
        rows.append(row)
    if args.figure:
        Writer(force=True).write(args.figure, figure(rows))
    exact = all(row.exact for row in rows)
    say("exact" if exact else "NOT exact")
    return 0 if exact else 1


# ----------------------------------------------------------------------------------------------
# Arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="probnets", description="Lossless image compression.")
    parser.add_argument("--version", action="version", version=f"probnets {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str):  # noqa: ANN202
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        return one

    pack = command("compress", run_compress, "compress images to files in .pn")
    unpack = command("decompress", run_decompress, "restore images as PNG, or as .npy")
    for one, what in ((pack, "images, or folders of them"), (unpack, "files in .pn, or folders")):
        one.add_argument("files", metavar="FILE", nargs="+", type=Path, help=what)
        one.add_argument("-o", dest="out", help="the file or folder to write")
        one.add_argument(
            "--jobs", type=_positive, help="images at a time, by default as many as processors"
        )
    unpack.add_argument("--limit", type=_positive, help="the most numbers an image may have")

    info = command("info", run_info, "tell what a stream or a model holds")
    info.add_argument("file", metavar="FILE", type=Path)

    heat = command("heatmap", run_heatmap, f"draw where in a photograph the bits go{PLOTS}")
    heat.add_argument("file", metavar="PHOTO", type=Path)
    heat.add_argument("-o", dest="out", type=Path, required=True, help="the PNG to draw")
    for one in (pack, unpack, heat):
        one.add_argument("--model", type=Path, help="the model, by default the shipped one")
        one.add_argument("--force", action="store_true", help="overwrite files")
    for one in (pack, heat):
        one.add_argument(
            "--mode", choices=get_args(Mode), default="fast", help="default: %(default)s"
        )

    train = command("train", _train, "train a model on images")
    train.add_argument("source", metavar="DIR", type=Path, help="a folder, or an .npz archive")
    train.add_argument("-o", dest="out", type=Path, required=True, help="the model to write")
    train.add_argument("--force", action="store_true", help="overwrite the model")
    train.add_argument("--kind", choices=["auto", "tiles", "whole"], default="auto")
    train.add_argument("--units", type=_positive, default=16, help="default: %(default)s")
    train.add_argument("--tile", type=_positive, default=16, help="the side of a tile")
    train.add_argument("--epochs", type=_positive, default=20, help="default: %(default)s")
    train.add_argument("--batch-size", type=_positive, default=500, help="default: %(default)s")
    train.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    train.add_argument("--checkpoint", type=Path, help="by default MODEL.checkpoint")
    train.add_argument("--resume", action="store_true", help="continue from the checkpoint")

    demo = command("demo", _demo, "compress and restore the images that ship with probnets")
    demo.add_argument("--figure", type=Path, metavar="FILE", help=f"a PNG to draw{PLOTS}")
    return parser
