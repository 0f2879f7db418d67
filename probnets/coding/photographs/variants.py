r"""Variants of photographs to train on, so that a model meets what it will be given."""

__all__ = ["Variant", "variants"]

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

_FILTERS = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
_LEAST = 16  # the least side that a photograph is scaled down to


class Variant(NamedTuple):
    r"""Is a photograph to train on: its pixels, and the weight its pixels have."""

    pixels: np.ndarray
    weight: float


def variants(img: np.ndarray, rng: np.random.Generator) -> Iterator[Variant]:
    r"""Makes variants of a photograph.

    It is turned and mirrored at random, and seen as it is, with noise, scaled down, through
    JPEG, and with 16 bits, which are the sums of squares of its pixels.

    Arguments:
        img: The photograph, of uint8 with shape :math:`(H, W, 3)`.
        rng: The source of randomness.

    Yields:
        The variants, of uint8 or uint16 with shape :math:`(H', W', 3)`. Their weights sum to one.
    """
    yield Variant(_turned(img, rng), 0.4)
    yield Variant(_turned(img, rng), 0.4)

    sigma = np.exp(rng.uniform(np.log(0.5), np.log(8.0)))
    noisy = np.rint(img + rng.normal(0.0, sigma, img.shape)).clip(0, 255).astype(np.uint8)
    yield Variant(_turned(noisy, rng), 0.07)

    factor = rng.uniform(0.4, 0.95)
    size = tuple(max(round(factor * side), _LEAST) for side in img.shape[1::-1])
    scaled = Image.fromarray(img).resize(size, _FILTERS[rng.integers(len(_FILTERS))])
    yield Variant(_turned(np.asarray(scaled), rng), 0.08)

    file = io.BytesIO()
    Image.fromarray(img).save(file, "JPEG", quality=int(rng.integers(75, 98)))
    yield Variant(_turned(np.asarray(Image.open(file)), rng), 0.025)

    yield Variant(_turned(_deep(img, rng), rng), 0.025)


def _turned(img: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""Turns an image by a multiple of 90 degrees, and mirrors it or not."""
    img = np.rot90(img, int(rng.integers(4)))
    return np.ascontiguousarray(img[:, ::-1] if rng.integers(2) else img)


def _deep(img: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""Makes an image of 10 to 16 bits, as means of squares, with some noise below eight bits."""
    side = 2 if min(img.shape[:2]) < 4 * _LEAST else int(rng.integers(2, 5))
    height, width = (n // side * side for n in img.shape[:2])
    squares = img[:height, :width].reshape(height // side, side, width // side, side, 3)
    mean = squares.mean(axis=(1, 3))
    most = 2.0 ** rng.integers(10, 17) - 1
    noise = rng.normal(0.0, rng.uniform(0.0, 0.3), mean.shape)
    return np.rint((mean + noise) / 255 * most).clip(0, most).astype(np.uint16)
