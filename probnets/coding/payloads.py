r"""How models of images of any size turn an image into a payload and back."""

__all__ = ["Mode", "Region", "check_mode", "decode_image", "encode_image"]

from typing import get_args

import numpy as np

from .cells import Region
from .models import AnyModel
from .photographs.codec import decode_photograph, encode_photograph
from .photographs.model import Mode, PhotographModel
from .stream import Reader
from .tilecodec import decode_tiles, encode_tiles
from .treecodec import decode_trees, encode_trees
from .trees import TreeModel


def check_mode(mode: Mode, model: AnyModel) -> None:
    r"""Raises ``ValueError`` unless there is this mode, and the model knows it."""
    if mode not in get_args(Mode):
        raise ValueError(f"expected mode 'fast' or 'slow', got {mode!r}")
    if mode != "fast" and model.kind != "photographs":
        what = {"whole": "whole images", "tree": "trees"}.get(model.kind, model.kind)
        raise ValueError(f"expected mode 'fast' for a model of {what}, got {mode!r}")


def encode_image(model: AnyModel, array: np.ndarray, *, mode: Mode, workers: int | None) -> bytes:
    r"""Encodes an image to a payload.

    Arguments:
        model: The model, not one of whole images.
        array: The image, as :func:`as_array` returns it.
        mode: The mode, which the model knows.
        workers: The number of threads.
    """
    if isinstance(model, PhotographModel):
        return encode_photograph(model, array, mode=mode, workers=workers)
    if isinstance(model, TreeModel):
        return encode_trees(model, array, workers=workers)
    return encode_tiles(model, array, workers=workers)


def decode_image(
    model: AnyModel,
    shape: tuple[int, ...],
    dtype: np.dtype,
    reader: Reader,
    *,
    region: Region | None = None,
    workers: int | None = None,
) -> np.ndarray:
    r"""Restores the image that a payload holds and ends with, or a part of it.

    Arguments:
        model: The model, not one of whole images.
        shape: The shape of the image.
        dtype: The dtype of the image.
        reader: The payload.
        region: The rows and columns that are wanted. By default all.
        workers: The number of threads.

    Raises:
        StreamError: If it is not the payload of an image.
    """
    if isinstance(model, PhotographModel):
        return decode_photograph(model, shape, dtype, reader, region=region, workers=workers)
    if isinstance(model, TreeModel):
        return decode_trees(model, shape, dtype, reader, region=region, workers=workers)
    array = decode_tiles(model, shape, dtype, reader, workers=workers)
    return array if region is None else array[region]
