r"""The command ``probnets``: compresses images, restores them and trains models of them."""

__all__ = ["main"]

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from probnets import __version__
from probnets.circuits.em import EMSettings
from probnets.coding import (
    ImageModel,
    compress,
    decompress,
    decompress_batch,
    pretrained,
    train_tiles,
    train_whole,
)
from probnets.coding.stream import MAGIC, Header, open_stream
from probnets.data import image_folder
from probnets.data.folders import SUFFIXES

from .demo import HEADER, demonstrate, figure, pictures
from .formats import npy_bytes, png_bytes, read_image
from .imagesets import ImageSet
from .jobs import Job, Writer, list_jobs, writing

SUFFIX = ".pn"


def main(argv: Sequence[str] | None = None) -> int:
    r"""Runs the command.

    Arguments:
        argv: The arguments, by default those of the process.

    Returns:
        0, or 1 if something went wrong, of which stderr tells in one line each. Arguments that
        make no sense exit with 2.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        tqdm.write("probnets: interrupted", file=sys.stderr)
        return 130
    except (ImportError, MemoryError, OSError, TypeError, ValueError) as error:
        _complain(error)
        return 1


# ----------------------------------------------------------------------------------------------
# Compression


def _compress(args: argparse.Namespace) -> int:
    model, writer = _model(args), Writer(args.force)
    before, after = [], []

    def work(job: Job) -> None:
        target = job.target(job.source.name + SUFFIX)
        writer.check(target, job.source)
        image = read_image(job.source)
        stream = compress(image, model)
        writer.write(target, stream, job.source)
        before.append(job.source.stat().st_size)
        after.append(len(stream))
        rate = 8 * len(stream) / image.size
        _say(f"{target}: {_sizes(before[-1], after[-1])}, {rate:.3f} bits per subpixel")

    code = _each(args, image_folder, work)
    if len(after) > 1:
        _say(f"{len(after)} images: {_sizes(sum(before), sum(after))}")
    return code


def _decompress(args: argparse.Namespace) -> int:
    model, writer = _model(args), Writer(args.force)

    def work(job: Job) -> None:
        blob = job.source.read_bytes()
        header, _ = open_stream(blob, limit=args.limit)
        target = job.target(_restored_name(job.source.name, header))
        suffix = target.suffix.lower()
        if suffix not in (".npy", ".png") or (suffix == ".png" and not _fits_png(header)):
            wanted = ".png or .npy" if _fits_png(header) else ".npy"
            what = f"{header.dtype} with shape {header.shape}"
            raise ValueError(f"expected a name in {wanted} for {what}, got {target}")
        writer.check(target, job.source)
        restore = decompress_batch if header.batch else decompress
        array = restore(blob, model, limit=args.limit)
        content = png_bytes(array) if suffix == ".png" else None
        writer.write(target, npy_bytes(array) if content is None else content, job.source)
        _say(f"{target}: {array.dtype} with shape {array.shape}")

    return _each(args, _streams, work)


def _streams(folder: Path) -> list[Path]:
    r"""Lists the streams below a folder."""
    streams = sorted(file for file in folder.rglob(f"*{SUFFIX}") if file.is_file())
    if not streams:
        raise FileNotFoundError(f"expected files in {SUFFIX} in {folder}, got none")
    return streams


def _fits_png(header: Header) -> bool:
    if header.batch:
        return False
    corner = (1, 1, *header.shape[2:])
    return png_bytes(np.zeros(corner, dtype=header.dtype)) is not None


def _restored_name(name: str, header: Header) -> str:
    r"""Returns `photo.png` for `photo.jpg.pn`, or `photo.npy` where PNG would not be exact."""
    stem = Path(name.removesuffix(SUFFIX))
    stem = stem.with_suffix("") if stem.suffix.lower() in (*SUFFIXES, ".npy") else stem
    return stem.name + (".png" if _fits_png(header) else ".npy")


def _each(
    args: argparse.Namespace, search: Callable[[Path], list[Path]], work: Callable[[Job], None]
) -> int:
    r"""Works on all files that are named, and goes on when one fails."""
    errors = []

    def fail(error: Exception, source: Path) -> None:
        _complain(error, source)
        errors.append(error)

    jobs = list_jobs(args.files, args.out, search, fail)
    for job in tqdm(jobs, unit="image", disable=None if len(jobs) > 1 else True):
        try:
            work(job)
        except (MemoryError, OSError, TypeError, ValueError) as error:
            fail(error, job.source)
    return 1 if errors else 0


# ----------------------------------------------------------------------------------------------
# Information


def _info(args: argparse.Namespace) -> int:
    path: Path = args.file
    if not path.is_file():
        raise FileNotFoundError(f"expected a stream or a model at {path}, got no file")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(MAGIC):
        facts = _stream_facts(path.read_bytes())
    elif start[8:] == b"{":  # a safetensors file: a length, then JSON
        facts = _model_facts(path)
    else:
        raise ValueError(f"expected a stream or a model in {path}, got neither")
    _say(str(path))
    for name, value in facts.items():
        _say(f"  {name:<20}{value}")
    return 0


def _stream_facts(blob: bytes) -> dict[str, object]:
    header, _ = open_stream(blob, limit=2**64)
    ours = header.digest == pretrained().digest
    return {
        "what": f"{'batch' if header.batch else 'image'}, a stream of version {blob[3]}",
        "shape": header.shape,
        "dtype": header.dtype,
        "model": f"{header.digest.hex()}, {'shipped with probnets' if ours else 'another one'}",
        "bytes": f"{len(blob):,} of {header.size * header.dtype.itemsize:,}",
        "bits per subpixel": f"{8 * len(blob) / header.size:.4f}",
    }


def _model_facts(path: Path) -> dict[str, object]:
    model = ImageModel.load(path)
    tree, tables = model.tables.tree, model.tables
    inputs = tree.inputs * tables.units * tables.values
    return {
        "what": f"a model of {'images' if model.kind == 'whole' else 'tiles of images'}",
        "kind": model.kind,
        "shape": model.shape,
        "units": tables.units,
        "values": tables.values,
        "regions": tree.regions,
        "parameters": f"{tables.root.size + tables.sums.size + inputs:,}",
        "digest": f"{model.digest.hex()}, {tables.digest.hex()}",
        "bytes": f"{path.stat().st_size:,}",
    }


# ----------------------------------------------------------------------------------------------
# Training


def _train(args: argparse.Namespace) -> int:
    writer = Writer(args.force)
    writer.check(args.out)
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
    _say(f"{args.out}: {model.kind} {model.shape}, {args.out.stat().st_size:,} bytes")
    _say(f"{result.best:.4f} bits per dimension on validation data")
    return 0


# ----------------------------------------------------------------------------------------------
# Demonstration


def _demo(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    decompress(compress(np.zeros((17, 17), dtype=np.uint8)))
    _say(f"compiled loops loaded in {time.perf_counter() - start:.1f} s, not counted below")
    _say("cat and camera are photographs, the others are made from them;")
    _say("WebP stores grey and masks as colours; bits are per subpixel, of probnets\n")
    _say(HEADER)
    rows = []
    for row in demonstrate(pictures()):
        _say(str(row))
        rows.append(row)
    if args.figure:
        Writer(force=True).write(args.figure, figure(rows))
    exact = all(row.exact for row in rows)
    _say("exact" if exact else "NOT exact")
    return 0 if exact else 1


# ----------------------------------------------------------------------------------------------
# Words and arguments


def _say(text: str) -> None:
    tqdm.write(text)


def _complain(error: Exception, source: Path | None = None) -> None:
    tqdm.write(f"probnets: error: {_named(error, source)}", file=sys.stderr)


def _named(error: Exception, source: Path | None) -> str:
    r"""Returns the sentence of an error in one line, with the file it is about."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"expected to open {error.filename or source}, got: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = f"expected more memory, got: {text or 'none left'}"
    return text if source is None or str(source) in text else f"{text} (in {source})"


def _sizes(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} bytes ({100 * after / max(before, 1):.1f} %)"


def _model(args: argparse.Namespace) -> ImageModel:
    return pretrained() if args.model is None else ImageModel.load(args.model)


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

    pack = command("compress", _compress, "compress images to files in .pn")
    unpack = command("decompress", _decompress, "restore images as PNG, or as .npy")
    for one, what in ((pack, "images, or folders of them"), (unpack, "files in .pn, or folders")):
        one.add_argument("files", metavar="FILE", nargs="+", type=Path, help=what)
        one.add_argument("-o", dest="out", help="the file or folder to write")
        one.add_argument("--model", type=Path, help="the model, by default the shipped one")
        one.add_argument("--force", action="store_true", help="overwrite files")
    unpack.add_argument("--limit", type=_positive, help="the most numbers an image may have")

    info = command("info", _info, "tell what a stream or a model holds")
    info.add_argument("file", metavar="FILE", type=Path)

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
    demo.add_argument("--figure", type=Path, metavar="FILE", help="a PNG to draw")
    return parser
