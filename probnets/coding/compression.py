r"""Compressing images to bytes and back."""

__all__ = ["compress", "compress_batch", "decompress", "decompress_batch"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probnets.circuits import TreeCircuit

from .codec import GROUP, decode_rows, encode_rows
from .errors import StreamError
from .images import ImageLike, as_array, group_widths, join_planes, split_planes
from .models import ImageModel, as_model
from .stream import LIMIT, Header, Reader, index, open_stream, seal, varint
from .tiles import cut, paste, tile_classes
from .transforms import forward, inverse

Model = ImageModel | TreeCircuit | str | Path | None


def compress(img: ImageLike, pc_model: Model = None, *, workers: int | None = None) -> bytes:
    r"""Compresses an image without loss.

    The bytes depend on the image and the model alone, not on the machine, the number of
    threads or the number of images that are compressed together.

    References:
        | Lossless Compression with Probabilistic Circuits (Liu, Mandt & Van den Broeck, 2022)
        | https://arxiv.org/abs/2111.11632

    Arguments:
        img: The image, with shape :math:`(H, W)` or :math:`(H, W, C)` and of dtype bool, uint8
            or uint16: an array, a tensor, a PIL image or the path of a file.
        pc_model: The model: of tiles, for images of any size, or a circuit whose shape is that
            of the image. By default the model that ships with the package.
        workers: The number of threads. By default as many as PyTorch uses.

    Returns:
        The stream, which :func:`decompress` takes.

    Raises:
        TypeError: If it is not an image, or its dtype cannot be coded.
        ValueError: If its shape or values do not fit the model.

    Example:
        >>> img = np.arange(256, dtype=np.uint8).reshape(16, 16)
        >>> blob = compress(img)
        >>> np.array_equal(decompress(blob), img)
        True
    """
    model = as_model(pc_model)
    if model.kind == "whole":
        array = _whole(model, img, batch=False)
        rows = array.reshape(1, -1)
        payload = encode_rows(model.tables, _plain(rows), workers=workers)[0]
    else:
        array = as_array(img)
        payload = _encode_tiles(model, array, workers)
    return seal(Header(model.digest, array.dtype, array.shape), payload)


def decompress(
    blob: bytes, pc_model: Model = None, *, limit: int = LIMIT, workers: int | None = None
) -> np.ndarray:
    r"""Restores an image, bit for bit, shape and dtype included.

    Arguments:
        blob: The stream.
        pc_model: The model that the image was compressed with.
        limit: The largest number of numbers in an image that is accepted, a guard against
            forged streams.
        workers: The number of threads. By default as many as PyTorch uses.

    Raises:
        StreamError: If it is not a sound stream of this model.
    """
    model = as_model(pc_model)
    header, reader = open_stream(blob, limit=limit)
    _check_model(model, header)
    if header.batch:
        raise StreamError("expected the stream of one image, got a batch; use decompress_batch")
    if model.kind == "tiles":
        array = _decode_tiles(model, header, reader, workers)
        reader.end()
        return array
    _check_whole(model, header.shape)
    streams = [reader.take(reader.left)]
    return _restore(decode_rows(model.tables, streams, 1, workers=workers), header)


def compress_batch(
    images: np.ndarray | Sequence[ImageLike],
    pc_model: Model = None,
    *,
    chained: bool = True,
    workers: int | None = None,
) -> bytes:
    r"""Compresses images of one shape and dtype into one stream with an index.

    Arguments:
        images: The images, with shape :math:`(N, H, W)` or :math:`(N, H, W, C)`, or a sequence
            of images.
        pc_model: The model, as in :func:`compress`.
        chained: Whether whole images share streams in groups of 256, which saves about half a
            byte and an entry of the index per image, and makes access random by groups
            instead of single images. Images of tiles always have streams of their own.
        workers: The number of threads.

    Returns:
        The stream, which :func:`decompress_batch` takes.

    Example:
        >>> images = np.zeros((3, 8, 8), dtype=np.uint8)
        >>> decompress_batch(compress_batch(images)).shape
        (3, 8, 8)
    """
    model = as_model(pc_model)
    if model.kind == "whole":
        array = _whole(model, images, batch=True)
        streams = encode_rows(
            model.tables, _plain(array.reshape(len(array), -1)), chained=chained, workers=workers
        )
    else:
        arrays = [as_array(img) for img in images]
        if len({(a.shape, a.dtype) for a in arrays}) != 1:
            raise ValueError("expected images of one shape and dtype; compress others one by one")
        streams = [_encode_tiles(model, a, workers) for a in arrays]
        array, chained = np.broadcast_to(arrays[0], (len(arrays), *arrays[0].shape)), False
    header = Header(model.digest, array.dtype, array.shape, batch=True)
    return seal(header, bytes([chained]) + index(streams) + b"".join(streams))


def decompress_batch(
    blob: bytes,
    pc_model: Model = None,
    *,
    select: slice | None = None,
    limit: int = LIMIT,
    workers: int | None = None,
) -> np.ndarray:
    r"""Restores images from a batch, all or some.

    Arguments:
        blob: The stream.
        pc_model: The model that the images were compressed with.
        select: The images that are wanted, of step 1. Only the groups they are in are decoded.
            By default all.
        limit: The largest number of numbers in all images that is accepted.
        workers: The number of threads.

    Returns:
        The images, with shape :math:`(N, H, W)` or :math:`(N, H, W, C)`.

    Raises:
        StreamError: If it is not a sound stream of this model.
    """
    model = as_model(pc_model)
    header, reader = open_stream(blob, limit=limit)
    _check_model(model, header)
    if not header.batch or len(header.shape) < 2:
        raise StreamError("expected a batch, got the stream of one image; use decompress")
    chained = reader.take(1)[0]
    if chained > (model.kind == "whole"):
        raise StreamError(f"expected a kind of batch that exists, got {chained}")

    count, *shape = header.shape
    group = GROUP if chained else 1
    lengths = reader.index(-(-count // group))
    first, last, step = (select or slice(None)).indices(count)
    if step != 1:
        raise ValueError(f"expected images in a row, got a step of {step}; select from the result")
    begin = first // group
    end = max(-(-last // group), begin)
    reader.take(sum(lengths[:begin]))
    streams = [reader.take(n) for n in lengths[begin:end]]
    reader.take(sum(lengths[end:]))
    reader.end()

    if model.kind == "whole":
        _check_whole(model, tuple(shape))
        rows = min(count, end * group) - begin * group
        x = decode_rows(
            model.tables, streams, max(rows, 0), chained=bool(chained), workers=workers
        )[first - begin * group : max(last, first) - begin * group]
        return _restore(x, Header(header.digest, header.dtype, (len(x), *shape)))

    one = Header(header.digest, header.dtype, tuple(shape))
    images = np.empty((len(streams), *shape), dtype=header.dtype)
    for image, stream in zip(images, streams, strict=True):
        part = Reader(stream)
        image[...] = _decode_tiles(model, one, part, workers)
        part.end()
    return images


def _check_model(model: ImageModel, header: Header) -> None:
    if header.digest != model.digest:
        raise StreamError(
            f"expected a stream of model {model.digest.hex()}, got one of model "
            f"{header.digest.hex()}; pass the model that wrote it"
        )


def _check_whole(model: ImageModel, shape: tuple[int, ...]) -> None:
    if _core(shape) != _core(model.shape):
        raise StreamError(f"expected an image with shape {model.shape}, got {shape}")


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    r"""Takes axes of length one off the end of a shape."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _whole(
    model: ImageModel, img: np.ndarray | ImageLike | Sequence[ImageLike], *, batch: bool
) -> np.ndarray:
    r"""Checks that images have the shape of a model of whole images."""
    if batch and not isinstance(img, np.ndarray):
        arrays = [_whole(model, one, batch=False) for one in img]  # type: ignore[union-attr]
        if len({(a.shape, a.dtype) for a in arrays}) != 1:
            raise ValueError("expected images of one shape and dtype, got none or several")
        return np.stack(arrays)
    array = img if batch or _is_vector(model, img) else as_array(img)  # type: ignore[arg-type]
    array = np.ascontiguousarray(array)
    shape = array.shape[1:] if batch else array.shape
    if array.dtype.name not in ("bool", "uint8", "uint16") or array.size == 0:
        raise TypeError(
            f"expected images of bool, uint8 or uint16, got {array.dtype} with shape {array.shape}"
        )
    if _core(shape) != _core(model.shape):
        raise ValueError(
            f"expected an image with shape {model.shape}, got {shape}; a model of tiles takes "
            "images of any shape"
        )
    return array


def _is_vector(model: ImageModel, img: object) -> bool:
    return isinstance(img, np.ndarray) and img.ndim == 1 and len(model.shape) == 1


def _plain(rows: np.ndarray) -> np.ndarray:
    return rows.view(np.uint8) if rows.dtype == np.bool_ else rows


def _restore(x: np.ndarray, header: Header) -> np.ndarray:
    most = 1 if header.dtype == np.bool_ else np.iinfo(header.dtype).max
    if x.size and x.max() > most:
        raise StreamError(f"expected values of {header.dtype}, got {x.max()}; it is damaged")
    return x.astype(header.dtype).reshape(header.shape)


# ----------------------------------------------------------------------------------------------
# Tiles

_RAW, _CODED = 0, 1


def _encode_tiles(model: ImageModel, array: np.ndarray, workers: int | None) -> bytes:
    r"""Codes the groups of planes of an image one after the other."""
    out = []
    for planes in split_planes(array):
        symbols = forward(planes)
        parts = []
        for cls in tile_classes(*array.shape[:2], tile=model.shape[:2]):
            rows, present = _tile_rows(model, cut(symbols, cls), cls.mask)
            streams = encode_rows(
                model.tables, rows, present=present, chained=True, workers=workers
            )
            parts += [index(streams), *streams]
        coded = b"".join(parts)
        # Noise, say the low bytes of 16 bits, is not worth coding.
        if len(coded) < planes.size:
            out += [bytes([_CODED]), coded]
        else:
            out += [bytes([_RAW]), planes.tobytes()]
    return b"".join(out)


def _tile_rows(
    model: ImageModel, tiles: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Lays tiles with one or three channels out as rows of the circuit."""
    channels = tiles.shape[-1]
    rows = np.zeros((len(tiles), *model.shape), dtype=np.uint16)
    rows[..., :channels] = tiles
    present = np.zeros(model.shape, dtype=bool)
    present[..., :channels] = mask[..., None]
    return rows.reshape(len(tiles), present.size), present.ravel()


def _decode_tiles(
    model: ImageModel, header: Header, reader: Reader, workers: int | None
) -> np.ndarray:
    try:
        widths = group_widths(header.shape, header.dtype)
    except (TypeError, ValueError) as error:
        raise StreamError(f"expected an image: {error}") from None
    height, width = header.shape[:2]
    groups = []
    for channels in widths:
        coded = reader.take(1)[0]
        if coded == _RAW:
            raw = reader.take(height * width * channels)
            groups.append(np.frombuffer(raw, np.uint8).reshape(height, width, channels))
            continue
        if coded != _CODED:
            raise StreamError(f"expected planes raw or coded, got {coded}; it is damaged")
        symbols = np.zeros((height, width, channels), dtype=np.int16)
        for cls in tile_classes(height, width, tile=model.shape[:2]):
            streams = [reader.take(n) for n in reader.index(-(-cls.total // GROUP))]
            _, present = _tile_rows(model, np.zeros((0, *model.shape[:2], channels)), cls.mask)
            rows = decode_rows(
                model.tables, streams, cls.total, present=present, chained=True, workers=workers
            )
            paste(symbols, cls, rows.reshape(-1, *model.shape)[..., :channels].astype(np.int16))
        try:
            groups.append(inverse(symbols))
        except ValueError as error:
            raise StreamError(f"expected residuals of an image: {error}") from None
    try:
        return join_planes(groups, header.shape, header.dtype)
    except ValueError as error:
        raise StreamError(f"expected values of {header.dtype}: {error}") from None
