r"""Images to train on, from a folder or an archive."""

__all__ = ["ImageSet"]

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from probnets.data import image_folder

from .formats import read_image

SMALL = 64  # the largest side of images that are modelled as a whole unless asked for
FEW = 20  # images, with fewer of which no model of whole images is learned


class ImageSet:
    r"""Creates a set of images, which are read from a folder one by one, as they are needed.

    Arguments:
        source: A folder of images, or an ``.npz`` archive with an array ``images`` or ``xtr`` of
            shape :math:`(N, H, W)` or :math:`(N, H, W, C)`.

    Raises:
        FileNotFoundError: If there is no such folder or file, or no image in it.
        ValueError: If the archive is damaged or has no such array.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = Path(source)
        self._array = _read_archive(self.source) if self.source.is_file() else None
        self._paths = image_folder(self.source) if self._array is None else []

    def __len__(self) -> int:
        return len(self._paths if self._array is None else self._array)

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._array is not None:
            yield from self._array
            return
        for path in self._paths:
            try:
                yield read_image(path)
            except (TypeError, ValueError) as error:
                named = str(error) if str(path) in str(error) else f"{error} (in {path})"
                raise ValueError(named) from error

    def kind(self) -> Literal["whole", "tiles"]:
        r"""Chooses the kind of model: of whole images if there are enough, small, of one shape."""
        if self._array is not None:
            shapes = {self._array.shape[1:3]}
        else:
            shapes = set(map(_shape, self._paths))
        one = len(self) >= FEW and len(shapes) == 1
        return "whole" if one and max(next(iter(shapes))[:2]) <= SMALL else "tiles"

    def stack(self) -> np.ndarray:
        r"""Returns all images in one array.

        Raises:
            ValueError: If their shapes or dtypes differ.
        """
        if self._array is not None:
            return self._array
        images = list(self)
        kinds = {(image.shape, image.dtype.name) for image in images}
        if len(kinds) != 1:
            raise ValueError(
                f"expected images of one shape and dtype in {self.source}, got {len(kinds)} "
                "different ones; models of tiles take any"
            )
        return np.stack(images)


def _read_archive(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = [arrays[name] for name in ("images", "xtr") if name in arrays]
    except Exception as error:  # a damaged file can lead a reader anywhere
        raise ValueError(f"expected an .npz archive in {path}, got: {error}") from error
    if not found or found[0].ndim not in (3, 4):
        what = f"shape {found[0].shape}" if found else "none"
        raise ValueError(
            f"expected an array 'images' or 'xtr' (N, H, W[, C]) in {path}, got {what}"
        )
    return found[0]


def _shape(path: Path) -> tuple[int, int, int]:
    r"""Returns the shape of an image in a file from its head alone."""
    try:
        with Image.open(path) as file:
            return (file.height, file.width, len(file.getbands()))
    except Exception:  # a damaged file can lead a reader anywhere
        height, width, *_ = read_image(path).shape  # which says what is wrong
        return (height, width, 0)
