r"""Compressing images to bytes and back."""

__all__ = [
    "Mode",
    "check_fit",
    "compress",
    "compress_batch",
    "decompress",
    "decompress_batch",
]

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

import numpy as np
from torch import Tensor

from probnets.circuits import TreeCircuit

from .codec import GROUP, decode_rows, encode_rows
from .errors import ImageWarning, StreamError
from .images import ImageLike, array_and_notes
from .models import AnyModel, ImageModel, as_model, shipped_model
from .notes import Notes, pack_notes, unpack_notes
from .payloads import Mode, Region, check_mode, decode_image, encode_image
from .stream import DTYPES, Header, Reader, index, open_stream, seal

Model = AnyModel | TreeCircuit | str | Path | None


def compress(
    img: ImageLike,
    pc_model: Model = None,
    *,
    mode: Mode = "fast",
    notes: Notes | None = None,
    workers: int | None = None,
) -> bytes:
    r"""Compresses an image without loss.

    The bytes depend on the image and the model alone, not on the machine, the number of
    threads or the number of images that are compressed together.

    What a file or a PIL image says beside its pixels, such as its colour profile and EXIF,
    goes into the stream as well: see :class:`probnets.coding.Notes` for what is kept, and
    :func:`probnets.coding.read_notes`, which gives it back. Pixels lie as they are stored, so
    that an image that EXIF says to turn comes back unturned, with the same EXIF.

    References:
        | Lossless Compression with Probabilistic Circuits (Liu, Mandt & Van den Broeck, 2022)
        | https://arxiv.org/abs/2111.11632

    Arguments:
        img: The image, with shape :math:`(H, W)` or :math:`(H, W, C)` and of dtype bool, uint8
            or uint16: an array, a tensor, a PIL image or the path of a file.
        pc_model: The model: of photographs or of tiles, for images of any size, or a circuit
            whose shape is that of the image. By default the model of photographs that ships
            with the package.
        mode: Whether the model may adapt to the image, ``"slow"``, which takes about twice the
            time for one or two percent fewer bytes. Only models of photographs know it.
        notes: What to keep beside the pixels. By default what the file or PIL image says, and
            nothing for arrays. Pass `Notes()` to keep the pixels alone.
        workers: The number of threads. By default as many as PyTorch uses.

    Returns:
        The stream, which :func:`decompress` takes.

    Raises:
        TypeError: If it is not an image, or its dtype cannot be coded.
        ValueError: If its shape or values do not fit the model, or the mode is another.

    Example:
        >>> img = np.arange(256, dtype=np.uint8).reshape(16, 16)
        >>> blob = compress(img)
        >>> np.array_equal(decompress(blob), img)
        True
    """
    model = as_model(pc_model)
    check_mode(mode, model)
    array, own = _whole(model, img) if _is_whole(model) else array_and_notes(img)
    packed = pack_notes(own if notes is None else notes)
    if _is_whole(model):
        payload = encode_rows(model.tables, _rows(array, 1), workers=workers)[0]
    else:
        payload = encode_image(model, array, mode=mode, workers=workers)
    return seal(Header(model.digest, array.dtype, array.shape, notes=packed), payload)


def decompress(
    blob: bytes,
    pc_model: Model = None,
    *,
    region: Region | None = None,
    limit: int | None = None,
    workers: int | None = None,
) -> np.ndarray:
    r"""Restores an image, bit for bit, shape and dtype included.

    What the stream holds beside it is read by :func:`probnets.coding.read_notes`.

    Arguments:
        blob: The stream.
        pc_model: The model that the image was compressed with. By default the shipped model that
            the stream names.
        region: The rows and columns that are wanted, as slices of step 1. Of photographs only
            the cells that these touch are decoded, of about 2^18 pixels each. By default all.
        limit: The largest number of numbers in an image that is accepted, a guard against
            forged streams. By default 2^16 for each byte of the stream, or 2^28 if that is more.
        workers: The number of threads. By default as many as PyTorch uses.

    Returns:
        The image.

    Raises:
        TypeError: If the stream is not made of bytes.
        ValueError: If the region is not one of the image.
        StreamError: If it is not a sound stream of this model.
    """
    header, reader = open_stream(blob, limit=limit)
    model = _model_of(header, pc_model)
    if header.batch:
        raise StreamError("expected the stream of one image, got a batch; use decompress_batch")
    unpack_notes(header.notes)  # a stream is sound as a whole or not at all
    region = None if region is None else _region(region, header.shape)
    if not _is_whole(model):
        return decode_image(
            model, header.shape, header.dtype, reader, region=region, workers=workers
        )
    _check_whole(model, header.shape)
    streams = [reader.take(reader.left)]
    x = decode_rows(model.tables, streams, 1, workers=workers)
    array = _restore(x, header.shape, header.dtype)
    return array if region is None else array[region]


def compress_batch(
    images: np.ndarray | Tensor | Sequence[ImageLike],
    pc_model: Model = None,
    *,
    mode: Mode = "fast",
    chained: bool = True,
    workers: int | None = None,
) -> bytes:
    r"""Compresses images of one shape and dtype into one stream with an index.

    A batch holds pixels alone, and an :class:`ImageWarning` tells of files that say more.

    Arguments:
        images: The images, with shape :math:`(N, H, W)` or :math:`(N, H, W, C)`, or a sequence
            of images.
        pc_model: The model, as in :func:`compress`.
        mode: The mode, as in :func:`compress`.
        chained: Whether whole images share streams in groups of 256, which saves about half a
            byte and an entry of the index per image, and makes access random by groups
            instead of single images. Images of any size always have streams of their own.
        workers: The number of threads.

    Returns:
        The stream, which :func:`decompress_batch` takes.

    Raises:
        TypeError: If these are not images, or their dtype cannot be coded.
        ValueError: If there are none, or if their shapes, dtypes or values do not fit.

    Example:
        >>> images = np.zeros((3, 8, 8), dtype=np.uint8)
        >>> decompress_batch(compress_batch(images)).shape
        (3, 8, 8)
    """
    if isinstance(images, str | Path):
        raise TypeError(f"expected a sequence of images, got the path {str(images)!r}")
    model = as_model(pc_model)
    check_mode(mode, model)
    if _is_whole(model):
        array = _whole_batch(model, images)
        shape, dtype = array.shape, array.dtype
        rows = _rows(array, len(array))
        streams = encode_rows(model.tables, rows, chained=chained, workers=workers)
    else:
        arrays = _alike(_pixels([array_and_notes(img) for img in images]))
        shape, dtype, chained = (len(arrays), *arrays[0].shape), arrays[0].dtype, False
        streams = [encode_image(model, a, mode=mode, workers=workers) for a in arrays]
    header = Header(model.digest, dtype, shape, batch=True)
    return seal(header, bytes([chained]) + index(streams) + b"".join(streams))


def decompress_batch(
    blob: bytes,
    pc_model: Model = None,
    *,
    select: slice | None = None,
    limit: int | None = None,
    workers: int | None = None,
) -> np.ndarray:
    r"""Restores images from a batch, all or some.

    Arguments:
        blob: The stream.
        pc_model: The model that the images were compressed with.
        select: The images that are wanted, of step 1. Only the groups they are in are decoded.
            By default all.
        limit: The largest number of numbers in all images that is accepted, as in
            :func:`decompress`.
        workers: The number of threads.

    Returns:
        The images, with shape :math:`(N, H, W)` or :math:`(N, H, W, C)`.

    Raises:
        TypeError: If the stream is not made of bytes, or the images are not given by a slice.
        ValueError: If the slice has another step.
        StreamError: If it is not a sound stream of this model.
    """
    header, reader = open_stream(blob, limit=limit)
    model = _model_of(header, pc_model)
    if not header.batch or len(header.shape) < 2:
        raise StreamError("expected a batch, got the stream of one image; use decompress")
    count, *shape = header.shape
    first, last = _selected(select, count)

    chained = reader.take(1)[0]
    if chained > _is_whole(model):
        raise StreamError(f"expected a kind of batch that exists, got {chained}")
    group = GROUP if chained else 1
    streams = [reader.take(n) for n in reader.index(-(-count // group))]
    reader.end()

    begin, end = first // group, -(-last // group)
    streams = streams[begin:end] if first < last else []
    if not _is_whole(model):
        images = np.empty((len(streams), *shape), dtype=header.dtype)
        for image, stream in zip(images, streams, strict=True):
            part = Reader(stream)
            image[...] = decode_image(model, image.shape, image.dtype, part, workers=workers)
        return images

    _check_whole(model, tuple(shape))
    rows = min(count, end * group) - begin * group if streams else 0
    x = decode_rows(model.tables, streams, rows, chained=bool(chained), workers=workers)
    x = x[first - begin * group : last - begin * group] if streams else x
    return _restore(x, (len(x), *shape), header.dtype)


def check_fit(model: ImageModel, shape: tuple[int, ...], dtype: np.dtype) -> None:
    r"""Raises unless an image is of a shape and dtype that a model of whole images codes."""
    if dtype.name not in DTYPES:
        raise TypeError(f"expected images of bool, uint8 or uint16, got {dtype}")
    if _core(shape) != _core(model.shape):
        raise ValueError(
            f"expected an image with shape {model.shape}, got {shape}; a model of tiles takes "
            "images of any shape"
        )


def _is_whole(model: AnyModel) -> TypeGuard[ImageModel]:
    return isinstance(model, ImageModel) and model.kind == "whole"


def _model_of(header: Header, pc_model: Model) -> AnyModel:
    r"""Returns the model that wrote a stream, which is the one that is given, or a shipped one."""
    model = shipped_model(header.digest) if pc_model is None else as_model(pc_model)
    if model is None:
        raise StreamError(
            f"expected a stream of a model that ships with probnets, got one of model "
            f"{header.digest.hex()}; pass the model that wrote it"
        )
    if header.digest != model.digest:
        raise StreamError(
            f"expected a stream of model {model.digest.hex()}, got one of model "
            f"{header.digest.hex()}; pass the model that wrote it"
        )
    return model


def _region(region: Region, shape: tuple[int, ...]) -> Region:
    r"""Returns the rows and columns of a region as plain slices."""
    if not (isinstance(region, tuple) and len(region) == 2 <= len(shape)):
        raise ValueError(f"expected two slices of an image, got {region!r} of shape {shape}")
    parts = []
    for own, size in zip(region, shape, strict=False):
        first, last = _selected(own, size)
        if first >= last:
            raise ValueError(f"expected a region within shape {shape}, got {region}")
        parts.append(slice(first, last))
    return parts[0], parts[1]


def _check_whole(model: ImageModel, shape: tuple[int, ...]) -> None:
    if _core(shape) != _core(model.shape):
        raise StreamError(f"expected an image with shape {model.shape}, got {shape}")


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    r"""Takes axes of length one off the end of a shape."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _selected(select: slice | None, count: int) -> tuple[int, int]:
    r"""Returns the first of the images that are wanted, and one past the last."""
    if not isinstance(select, slice | None):
        raise TypeError(f"expected a slice of the images, got {type(select).__name__}")
    first, last, step = (select or slice(None)).indices(count)
    if step != 1:
        raise ValueError(f"expected images in a row, got a step of {step}; select from the result")
    return first, last


def _alike(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    r"""Checks that there are images, all of one shape and dtype."""
    kinds = sorted({f"{a.shape} of {a.dtype}" for a in arrays})
    if len(kinds) != 1:
        raise ValueError(
            f"expected images of one shape and dtype, got {', '.join(kinds) or 'none'}; "
            "compress others one by one"
        )
    return arrays


def _pixels(images: Sequence[tuple[np.ndarray, Notes]]) -> list[np.ndarray]:
    r"""Takes the arrays alone, and warns if that leaves notes behind."""
    if noted := sum(bool(notes) for _, notes in images):
        warnings.warn(
            f"expected pixels alone in a batch, got notes of {noted} images, which are not kept; "
            "compress images one by one to keep them",
            ImageWarning,
            stacklevel=3,
        )
    return [array for array, _ in images]


def _whole(model: ImageModel, img: ImageLike) -> tuple[np.ndarray, Notes]:
    r"""Returns an image that has the shape of a model of whole images, and its notes."""
    vector = isinstance(img, np.ndarray | Tensor) and img.ndim == len(model.shape) == 1
    if vector and not isinstance(img, np.ma.MaskedArray):
        array, notes = np.asarray(img), Notes()  # a vector, which is no image
    else:
        array, notes = array_and_notes(img)
    check_fit(model, array.shape, array.dtype)
    return array, notes


def _whole_batch(
    model: ImageModel, images: np.ndarray | Tensor | Sequence[ImageLike]
) -> np.ndarray:
    r"""Returns images that have the shape of a model of whole images as one array."""
    if not isinstance(images, np.ndarray) or isinstance(images, np.ma.MaskedArray):
        return np.stack(_alike(_pixels([_whole(model, img) for img in images])))
    if len(images) == 0:
        raise ValueError(f"expected one image or more, got shape {images.shape}")
    check_fit(model, images.shape[1:], images.dtype)
    return images


def _rows(array: np.ndarray, count: int) -> np.ndarray:
    r"""Lays images out as so many rows of numbers."""
    rows = array.reshape(count, -1)
    return rows.astype(np.uint8) if rows.dtype == np.bool_ else rows


def _restore(x: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    r"""Lays rows of numbers out as images."""
    most = 1 if dtype == np.bool_ else np.iinfo(dtype).max
    if x.size and x.max() > most:
        raise StreamError(f"expected values of {dtype}, got {x.max()}; it is damaged")
    return x.astype(dtype).reshape(shape)
