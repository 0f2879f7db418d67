r"""The commands ``compress`` and ``decompress``."""

__all__ = ["run_compress", "run_decompress"]

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from probnets.coding import (
    Notes,
    compress,
    decompress,
    decompress_batch,
    read_notes,
)
from probnets.coding.models import AnyModel, load_model
from probnets.coding.stream import Header, open_stream
from probnets.data import image_folder
from probnets.data.folders import SUFFIXES

from .formats import npy_bytes, png_bytes, png_notes, read_noted
from .jobs import Job, Writer, list_jobs
from .parallel import each, processors
from .words import complain, say, sizes, warn

SUFFIX = ".pn"
SHOWN = 10  # notes that a warning names
CHEAP = 1 << 24  # numbers of an image that is written as PNG only to compare


class Sizes(NamedTuple):
    r"""Is how large an image is, in bytes.

    Arguments:
        source: The size of its file.
        stream: The size of its stream.
        png: The size as PNG, or None if that is not known.
    """

    source: int
    stream: int
    png: int | None


def run_compress(args: argparse.Namespace) -> int:
    r"""Compresses images to streams, and compares their sizes."""
    model, writer = _model(args), Writer(force=args.force)
    jobs, failed, threads = _jobs(args, image_folder)
    workers = _workers(threads)

    def plan(job: Job) -> Path:
        target = job.target(job.source.name + SUFFIX)
        writer.claim(target, job.source)
        return target

    def work(job: Job, target: Path) -> Sizes:
        image, notes = read_noted(job.source)
        stream = compress(image, model, mode=args.mode, notes=notes, workers=workers)
        writer.write(target, stream)
        found = Sizes(job.source.stat().st_size, len(stream), _png_size(job.source, image, notes))
        rate = 8 * len(stream) / image.size
        beside = ""
        if found.png not in (None, found.source):
            beside = f"{100 * found.stream / found.png:.1f} % of PNG, "
        words = sizes(found.source, found.stream)
        say(f"{target}: {words}, {beside}{rate:.3f} bits per subpixel")
        return found

    found = each(jobs, plan, work, threads=threads)
    if len(found) > 1:
        say(_summary(found))
    return 1 if failed or len(found) < len(jobs) else 0


def run_decompress(args: argparse.Namespace) -> int:
    r"""Restores images from streams, as PNG with the notes that it can hold or as ``.npy``.

    Pixels come back bit for bit, notes as PNG has them: dots per inch are whole dots per metre
    there, so that 72 come back as 72.009. What PNG cannot hold stays in the stream, with a
    warning: texts with a long keyword or one beyond Latin-1. See
    :func:`probnets.coding.read_notes`.
    """
    model, writer = _model(args), Writer(force=args.force)
    jobs, failed, threads = _jobs(args, _streams)
    workers = _workers(threads)

    def plan(job: Job) -> Path:
        header, _ = open_stream(job.source.read_bytes(), limit=args.limit)
        target = job.target(_restored_name(job.source.name, header))
        suffix = target.suffix.lower()
        if suffix not in (".npy", ".png") or (suffix == ".png" and not _fits_png(header)):
            wanted = ".png or .npy" if _fits_png(header) else ".npy"
            what = f"{header.dtype} with shape {header.shape}"
            raise ValueError(f"expected a name in {wanted} for {what}, got {target}")
        writer.claim(target, job.source)
        return target

    def work(job: Job, target: Path) -> Path:
        blob = job.source.read_bytes()
        header, _ = open_stream(blob, limit=args.limit)
        restore = decompress_batch if header.batch else decompress
        array = restore(blob, model, limit=args.limit, workers=workers)
        notes = read_notes(blob)
        content = png_bytes(array, notes) if target.suffix.lower() == ".png" else None
        if content is None and notes:
            warn(f"expected a PNG file to keep notes, got {target}: it holds the pixels alone")
        elif others := png_notes(notes)[1]:
            shown = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
            warn(f"expected notes that PNG can hold, got more that stay in the stream: {shown}")
        writer.write(target, npy_bytes(array) if content is None else content)
        say(f"{target}: {array.dtype} with shape {array.shape}")
        return target

    found = each(jobs, plan, work, threads=threads)
    return 1 if failed or len(found) < len(jobs) else 0


def _jobs(
    args: argparse.Namespace, search: Callable[[Path], list[Path]]
) -> tuple[list[Job], bool, int]:
    r"""Lists the jobs, tells whether a folder has none, and counts the threads to work in."""
    failures = []

    def fail(error: Exception, source: Path) -> None:
        complain(error, source)
        failures.append(error)

    jobs = list_jobs(args.files, args.out, search, fail)
    threads = max(min(args.jobs or processors(), len(jobs)), 1)
    return jobs, bool(failures), threads


def _workers(threads: int) -> int | None:
    r"""Shares the threads of one image among images: all for one, or some for each."""
    return None if threads == 1 else max(torch.get_num_threads() // threads, 1)


def _model(args: argparse.Namespace) -> AnyModel | None:
    return None if args.model is None else load_model(args.model)


def _png_size(source: Path, image: np.ndarray, notes: Notes) -> int | None:
    r"""Returns the size of an image as PNG: of its file, or of what PIL makes if that is cheap."""
    with source.open("rb") as file:
        if file.read(4) == b"\x89PNG":
            return source.stat().st_size
    content = png_bytes(image, notes, optimize=False) if image.size <= CHEAP else None
    return None if content is None else len(content)


def _summary(found: Sequence[Sizes]) -> str:
    r"""Sums sizes up, beside those of the same images as PNG."""
    source, stream = sum(one.source for one in found), sum(one.stream for one in found)
    png = sum(one.source if one.png is None else one.png for one in found)
    unknown = sum(one.png is None for one in found)
    what = f"PNG (source bytes for {unknown} of them)" if unknown else "PNG"
    return (
        f"{len(found)} images: {sizes(source, stream)}; "
        f"as {what} {png:,} bytes ({100 * stream / max(png, 1):.1f} %)"
    )


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
