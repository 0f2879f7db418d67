r"""MNIST and its drop-in successor."""

__all__ = ["Digits", "fashion", "mnist", "read_idx"]

import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import folders

KEYS = ("xtr", "ytr", "xte", "yte")
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class Digits(NamedTuple):
    r"""Grey images of ten classes, split for training and testing."""

    train: np.ndarray  # (60000, 28, 28) uint8
    train_labels: np.ndarray  # (60000,) uint8
    test: np.ndarray  # (10000, 28, 28) uint8
    test_labels: np.ndarray  # (10000,) uint8


def mnist(folder: str | Path | None = None) -> Digits:
    r"""Reads the MNIST data set of handwritten digits.

    The folder holds either `mnist.npz`, with the arrays `xtr`, `ytr`, `xte` and `yte`, or the
    four original files, such as `train-images-idx3-ubyte.gz`, compressed or not. Fashion-MNIST
    gives its files the same names, hence a sub-folder `mnist` is searched for them first.

    References:
        | Gradient-Based Learning Applied to Document Recognition (LeCun et al., 1998)
        | https://ieeexplore.ieee.org/document/726791

    Arguments:
        folder: The data folder; see :func:`probnets.data.folder` for the default.

    Returns:
        The images and labels.

    Raises:
        FileNotFoundError: If the folder or the files are missing.
        ValueError: If a file is damaged or is no such data set.
    """
    return _read("mnist", folder)


def fashion(folder: str | Path | None = None) -> Digits:
    r"""Reads the Fashion-MNIST data set of articles of clothing.

    The files are those of :func:`mnist`, in `fashion.npz` or in a sub-folder `fashion`.

    References:
        | Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms
        | (Xiao et al., 2017)
        | https://arxiv.org/abs/1708.07747

    Arguments:
        folder: The data folder; see :func:`probnets.data.folder` for the default.

    Returns:
        The images and labels.

    Raises:
        FileNotFoundError: If the folder or the files are missing.
        ValueError: If a file is damaged or is no such data set.
    """
    return _read("fashion", folder)


def read_idx(path: str | Path) -> np.ndarray:
    r"""Reads an array of bytes in the IDX format, gzipped if the name ends in `.gz`.

    The format is two zero bytes, the type (8 for bytes), the number of dimensions, each
    dimension as a big-endian 32-bit integer, and the entries in row-major order.

    Arguments:
        path: The path of the file.

    Returns:
        The array, of type uint8.

    Raises:
        ValueError: If the file is damaged, truncated or of another format.
    """
    path = Path(path)
    data = path.read_bytes()

    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"expected a whole gzip file {path}, got: {error}") from None

    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(
            f"expected an IDX file of bytes (00 00 08), got {data[:3].hex(' ')!r} in {path}"
        )

    start = 4 + 4 * data[3]
    if len(data) < start:
        raise ValueError(f"expected a header of {start} bytes, got {len(data)} in {path}")

    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"expected {math.prod(shape)} bytes for the shape {shape}, "
            f"got {len(data) - start} in {path}; fetch the file again"
        )

    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


def _read(name: str, folder: str | Path | None) -> Digits:
    root = folders.folder(folder)
    archive = root / f"{name}.npz"
    if archive.is_file():
        return _checked(_read_archive(archive), archive)

    for place in (root / name, root):
        files = [_plain_or_gzipped(place / file) for file in NAMES]
        if any(file.is_file() for file in files):
            return _checked([read_idx(file) for file in files], place)

    raise FileNotFoundError(
        f"expected {name}.npz, or {NAMES[0]}[.gz] and its three fellows, "
        f"got neither in {root} nor in {root / name}; put them there, or name another folder"
    )


def _plain_or_gzipped(path: Path) -> Path:
    return path if path.is_file() else path.with_name(path.name + ".gz")


def _read_archive(path: Path) -> list[np.ndarray]:
    try:
        # NumPy would leave a file that it opened itself open if the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return [arrays[key] for key in KEYS]
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"expected an archive with the arrays {', '.join(KEYS)}, got {path}: {error}"
        ) from None


def _checked(arrays: list[np.ndarray], source: Path) -> Digits:
    for images, labels in (arrays[:2], arrays[2:]):
        if labels.ndim != 1 or images.shape != (len(labels), 28, 28):
            raise ValueError(
                "expected images (N, 28, 28) and labels (N,), "
                f"got {images.shape} and {labels.shape} in {source}"
            )
        if images.dtype != np.uint8 or labels.dtype != np.uint8:
            raise ValueError(f"expected bytes, got {images.dtype} and {labels.dtype} in {source}")

    return Digits(*arrays)
