r"""How small do photographs become, how fast and in how much memory, beside other formats?

Codes a folder, by default photos/valid of the data folder, and prints bits per subpixel, bytes,
speed (10^6 subpixels per second, two threads where a codec has threads) and memory; then the rates
of scikit-image's photographs and of the folder with noise and scaled. Every stream is checked.

    python benchmarks/photographs.py [FOLDER] [--data FOLDER] [--codecs ours-fast,WebP] [--smoke]

`pip install 'probnets[bench]'` installs peers and scikit-image, which are else left out. Memory is
how far the resident set of a fresh process rises to code the largest image and decode it: buffers,
stream and result, but not the interpreter, libraries, model, compiled loops and input.
"""

import argparse
import importlib
import importlib.util
import io
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from probnets import compress, data, decompress
from probnets.cli.formats import png_bytes, read_image, webp_bytes
from probnets.coding import pretrained

Array = np.ndarray
Rows = dict[str, dict[str, Array]]  # image, codec: subpixels, bytes, seconds to encode and decode
peers: Any = importlib.util.find_spec("imagecodecs") and importlib.import_module("imagecodecs")
CODECS: dict[str, tuple[Callable[[Array], Any], Callable[[bytes], Array]]] = {
    "ours-fast": (partial(compress, mode="fast", workers=2), partial(decompress, workers=2)),
    "ours-slow": (partial(compress, mode="slow", workers=2), partial(decompress, workers=2)),
    "ours-tree": (
        lambda x: compress(x, pretrained("tree"), workers=2),
        lambda b: decompress(b, pretrained("tree"), workers=2),
    ),
    "PNG": (png_bytes, lambda b: np.asarray(Image.open(io.BytesIO(b)))),  # level 9
}
if peers:
    CODECS["JPEG-LS"] = (peers.jpegls_encode, peers.jpegls_decode)
    CODECS["WebP"] = (webp_bytes, peers.webp_decode)  # method 6, quality 100
    for effort in (3, 7, 9):
        encode = partial(peers.jpegxl_encode, lossless=True, effort=effort, numthreads=2)
        CODECS[f"JXL{effort}"] = (encode, partial(peers.jpegxl_decode, numthreads=2))
MEASURES: dict[str, Callable[..., str]] = {
    "bits per subpixel": lambda n, size, *_: f"{8 * size / n:.4f}",
    "bytes": lambda n, size, *_: f"{size:,.0f}",
    "encode, MB/s": lambda n, _, encode, decode: f"{n / 1e6 / encode:.3g}",
    "decode, MB/s": lambda n, _, encode, decode: f"{n / 1e6 / decode:.3g}",
}
# Photographs in scikit-image's wheel: nothing drawn, computed or written, one of a stereo pair.
BUNDLED = (
    *("astronaut", "brick", "camera", "chelsea", "clock_motion", "coffee", "coins", "grass"),
    *("gravel", "hubble_deep_field", "ihc", "moon", "motorcycle_left", "retina", "rocket"),
)
VARIANTS: dict[str, Callable[[Array], Any]] = {
    "noise, sigma 2": lambda x: x + np.random.default_rng(0).normal(0, 2, x.shape),
    "half, box": lambda x: ImageOps.scale(Image.fromarray(x), 0.5, Image.Resampling.BOX),
    "0.6, bilinear": lambda x: ImageOps.scale(Image.fromarray(x), 0.6, Image.Resampling.BILINEAR),
}


def main(argv: list[str] | None = None) -> int:
    r"""Runs the benchmark, which fails if an image does not come back as it was."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="of images of 8 bits, grey or RGB")
    parser.add_argument("--data", type=Path, help="the folder with photos/valid")
    parser.add_argument("--codecs", default=",".join(CODECS), help="some of %(default)s")
    parser.add_argument("--quick", action="store_true", help="the folder alone")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="seconds, on synthetic images")
    args = parser.parse_args(argv)
    codecs = args.codecs.split(",")
    if unknown := ", ".join(set(codecs) - set(CODECS)):
        parser.error(f"expected codecs among {', '.join(CODECS)}, got {unknown}")
    if not peers:
        print("left out, since imagecodecs is not installed: JPEG-LS, WebP and JPEG XL")
    corpora = _corpora(args)
    results = {title: _report(title, images, codecs) for title, images in corpora.items()}
    if not args.skip_memory and not args.smoke and sys.platform == "linux":
        largest = max(corpora["folder"].values(), key=np.size)
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            grown = {codec: [pool.submit(_memory, codec, largest).result()] for codec in codecs}
        _table("memory of the largest", {"MB": grown}, "{:.1f}".format)
    _verdicts(results)
    return 0


def _corpora(args: argparse.Namespace) -> dict[str, dict[str, Array]]:
    if args.smoke:
        walks = np.random.default_rng(0).normal(size=(24, 40, 3)).cumsum(0).cumsum(1)
        colour = (128 + walks).clip(0, 255).astype(np.uint8)
        images = {"colour": colour, "grey": colour[..., 0].copy()}
    else:
        folder = args.folder or data.folder(args.data) / "photos" / "valid"
        files = data.image_folder(folder)
        images = {str(file.relative_to(folder)): read_image(file) for file in files}
    corpora = {"folder": images}
    package = importlib.util.find_spec("skimage")
    if package and package.origin and not args.smoke and not args.quick:
        files = sorted(Path(package.origin).with_name("data").iterdir())
        corpora["scikit-image"] = {f.stem: read_image(f) for f in files if f.stem in BUNDLED}
    for title, change in () if args.quick else VARIANTS.items():
        changed = {name: np.asarray(change(x)).round().clip(0, 255) for name, x in images.items()}
        corpora[title] = {name: x.astype(np.uint8) for name, x in changed.items()}
    return corpora


def _report(title: str, images: dict[str, Array], codecs: list[str]) -> Rows:
    r"""Codes a corpus and prints its tables."""
    rows: dict[str, dict[str, Any]] = {}
    for name, image in tqdm(images.items(), desc=title, leave=False, disable=None):
        rows[name] = {codec: _cell(codec, image, timed=title == "folder") for codec in codecs}
    rows["total"] = {codec: sum(row[codec] for row in rows.values()) for codec in codecs}
    for measure in MEASURES if title == "folder" else ["bits per subpixel"]:
        _table(f"{title}: {measure}", rows, MEASURES[measure])
    return rows


def _table(title: str, rows: dict[str, Any], show: Callable[..., str]) -> None:
    codecs = next(iter(rows.values()))
    print(f"\n| {title:<36} |" + "".join(f"{codec:>10} |" for codec in codecs))
    print(f"| {'---':<36} |" + "      ---: |" * len(codecs))
    for name, row in rows.items():
        print(f"| {name:<36} |" + "".join(f"{show(*cell):>10} |" for cell in row.values()))


def _cell(codec: str, image: Array, *, timed: bool) -> Array:
    encode, decode = CODECS[codec]
    decode(encode(image[:32, :32].copy()))  # loads and compiles
    seconds, stream, back = [], b"", image
    while not seconds or (timed and len(seconds) < 5 and np.sum(seconds) < 1):
        start = time.perf_counter()
        stream = encode(image)
        middle = time.perf_counter()
        back = decode(stream)
        seconds.append((middle - start, time.perf_counter() - middle))
    back = back if back.ndim == image.ndim else back[..., 0]  # WebP has no grey
    if back.dtype != image.dtype or not np.array_equal(back, image):
        raise ValueError(f"expected the image {image.shape} back from {codec}, got another")
    return np.array([image.size, len(stream), *np.median(seconds, axis=0)])


def _memory(codec: str, image: Array) -> float:
    r"""Returns how far coding raises the resident set, in MB, which Linux alone tells."""
    (encode, decode), peaks = CODECS[codec], []
    for x in (image[:32, :32].copy(), image[:32, :32].copy(), image):  # the first one loads
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        decode(encode(x))
        peaks.append(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
    return (peaks[2] - peaks[1]) / 1e3


def _verdicts(results: dict[str, Rows]) -> None:
    totals = {title: rows["total"] for title, rows in results.items()}
    for ours in [codec for codec in totals["folder"] if codec in ("ours-fast", "ours-slow")]:
        bits = 8 * totals["folder"][ours][1] / totals["folder"][ours][0]
        name, most = {"ours-fast": ("default", 2.27)}.get(ours, (ours, 2.21))
        print(f"\n{name} <= {most}: {'yes' if bits <= most else 'no'} ({bits:.4f})")
        if "WebP" in totals["folder"]:
            worse = [f"{image} of {title}" for title, rows in results.items()
                     for image, row in rows.items() if row[ours][1] > row["WebP"][1]]  # fmt: skip
            told = "no, " + "; ".join(worse) if worse else "yes"
            print(f"{name} never worse than WebP: {told}")
        if "JXL9" in totals["folder"]:
            more = {title: row[ours][1] / row["JXL9"][1] - 1 for title, row in totals.items()}
            told = (f"{title} {'yes' if x < 0 else 'no'} ({x:+.1%})" for title, x in more.items())
            print(f"{name} better than JPEG XL effort 9 on the average: {'; '.join(told)}")


if __name__ == "__main__":
    sys.exit(main())
