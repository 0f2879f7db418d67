r"""A demonstration on the two photographs that ship with the package."""

__all__ = ["Row", "demonstrate", "figure", "pictures"]

import io
import time
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

import numpy as np

from probnets.coding import compress, decompress

from .formats import png_bytes, read_image, webp_bytes

HEADER = (
    f"{'image':<16}{'kind':<18}{'raw':>9}{'PNG':>9}{'WebP':>9}{'probnets':>10}"
    f"{'bits':>8}{'encode':>9}{'decode':>9}"
)


class Row(NamedTuple):
    r"""Is what happened to one image.

    Arguments:
        name: The name of the image.
        image: The image.
        sizes: The bytes of it raw, as PNG, as WebP and as a stream, None where a format cannot
            store it.
        seconds: The time that encoding and decoding took.
        exact: Whether it came back bit for bit, shape and dtype included.
    """

    name: str
    image: np.ndarray
    sizes: tuple[int, int | None, int | None, int]
    seconds: tuple[float, float]
    exact: bool

    @property
    def rate(self) -> float:
        r"""The bits per subpixel of the stream."""
        return 8 * self.sizes[-1] / self.image.size

    def __str__(self) -> str:
        raw, png, webp, ours = ("-" if size is None else f"{size:,}" for size in self.sizes)
        kind = f"{self.image.dtype} {'x'.join(map(str, self.image.shape))}"
        encode, decode = (f"{seconds:.3f} s" for seconds in self.seconds)
        return (
            f"{self.name:<16}{kind:<18}{raw:>9}{png:>9}{webp:>9}{ours:>10}"
            f"{self.rate:>8.3f}{encode:>9}{decode:>9}"
        )


def pictures() -> dict[str, np.ndarray]:
    r"""Returns two photographs and images of other kinds that are made from them.

    Example:
        >>> {name: image.dtype.name for name, image in pictures().items()}["mask"]
        'bool'
    """
    assets = resources.files("probnets") / "assets"
    with resources.as_file(assets) as folder:
        cat, camera = (read_image(folder / f"{name}.png") for name in ("chelsea", "camera"))
    height, width = cat.shape[:2]
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    alpha = (255 * np.clip(2 - 2 * np.hypot(x, y), 0, 1)).round().astype(np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(camera, (8, 8))
    return {
        "cat": cat,
        "camera": camera,
        "cat, faded": np.dstack([cat, alpha]),
        "camera, blurred": windows.sum((2, 3), dtype=np.uint16),
        "mask": camera > 128,
    }


def demonstrate(images: dict[str, np.ndarray]) -> Iterator[Row]:
    r"""Compresses and restores images, each beside what PNG and WebP make of it.

    Arguments:
        images: The images by name.
    """
    for name, image in images.items():
        start = time.perf_counter()
        stream = compress(image)
        middle = time.perf_counter()
        back = decompress(stream)
        end = time.perf_counter()
        same = back.dtype == image.dtype and np.array_equal(back, image)
        others = (png_bytes(image), webp_bytes(image, effort=75))
        png, webp = (None if other is None else len(other) for other in others)
        sizes = (image.nbytes, png, webp, len(stream))
        yield Row(name, image, sizes, (middle - start, end - middle), same)


def figure(rows: list[Row]) -> bytes:
    r"""Draws images and their bits per subpixel in each format, as the bytes of a PNG file.

    Arguments:
        rows: What :func:`demonstrate` yields.

    Raises:
        ImportError: If Matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "expected Matplotlib to draw with, got none; install probnets[plots]"
        ) from None
    canvas = Figure(figsize=(2.4 * len(rows), 4.2), layout="constrained")
    for column, row in enumerate(rows):
        image = row.image / row.image.max() if row.image.dtype == np.uint16 else row.image
        picture = canvas.add_subplot(2, len(rows), column + 1, title=row.name)
        picture.imshow(image, cmap="gray")
        picture.set_axis_off()
        bars = canvas.add_subplot(2, len(rows), len(rows) + column + 1)
        named = zip(("PNG", "WebP", "probnets"), row.sizes[1:], strict=True)
        rates = {name: 8 * size / row.image.size for name, size in named if size is not None}
        bars.bar_label(bars.bar(list(rates), list(rates.values())), fmt="%.2f")
        bars.margins(y=0.15)
        if column == 0:
            bars.set_ylabel("bits per subpixel")
    file = io.BytesIO()
    canvas.savefig(file, format="png", dpi=120)
    return file.getvalue()
