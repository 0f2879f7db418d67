r"""Writes the golden files: models, images, and the streams that pin the format.

    python tests/golden/make.py

Old streams decode for ever. Once a version is released, its files stay as they are; a new
version of the format gets files of its own beside them.
"""

__all__ = ["make", "make_photographs"]

import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))


def make(folder: Path = FOLDER) -> None:
    r"""Writes all golden files into a folder, over those that are there.

    Arguments:
        folder: The folder.
    """
    from coding_cases import picture, tile_model, whole_model

    from probnets.coding import compress, compress_batch

    whole, tiles = whole_model((4, 4), 16), tile_model()
    whole.save(folder / "whole.safetensors")
    tiles.save(folder / "tiles.safetensors")

    source = np.random.default_rng(0)
    images = {
        "whole": picture((4, 4), np.uint8) // 16,
        "whole_batch": source.integers(0, 16, (300, 4, 4), dtype=np.uint8),
        "tiles_rgb": picture((33, 31, 3), np.uint8),
        "tiles_rgba": picture((9, 12, 4), np.uint8),
        "tiles_grey": picture((8 * 17 + 1, 8 * 16), np.uint8),  # more than one stream
        "tiles_bool": picture((20, 9), np.bool_),
        "tiles_uint16": picture((7, 11, 1), np.uint16),
        "tiles_noise": source.integers(0, 256, (12, 12, 3), dtype=np.uint8),
        "tiles_batch": np.stack([picture((9, 10, 3), np.uint8, seed) for seed in range(3)]),
    }
    streams = {name: compress(images[name], whole if "whole" in name else tiles)
               for name in images if "batch" not in name}  # fmt: skip
    streams["whole_batch"] = compress_batch(images["whole_batch"], whole, chained=False)
    streams["whole_chain"] = compress_batch(images["whole_batch"], whole, chained=True)
    streams["tiles_batch"] = compress_batch(images["tiles_batch"], tiles)

    _write(folder, "images", images, streams)


def make_photographs(folder: Path = FOLDER) -> None:
    r"""Writes the golden files of the models that stand in the folder: photographs and trees.

    Arguments:
        folder: The folder.
    """
    from coding_cases import picture

    from probnets.coding import Notes, compress, load_model

    colours = picture((33, 31, 3), np.uint8)
    images = {
        "photographs_rgb": colours,
        "photographs_slow": colours,
        "photographs_grey": picture((20, 70), np.uint8),
        "photographs_rgba": picture((9, 12, 4), np.uint8),
        "photographs_uint16": picture((7, 11, 3), np.uint16),
        "photographs_bool": picture((20, 9), np.bool_),
        "photographs_levels": np.tile(picture((30, 30), np.uint8) // 64 * 50, (2, 2)),
        "photographs_repeated": colours.repeat(3, axis=0).repeat(2, axis=1)[:-1],
        "photographs_noted": colours[:5],
        "trees_rgb": colours,
        "trees_grey": picture((20, 70), np.uint8),
        "trees_uint16": picture((7, 11, 1), np.uint16),
    }
    notes = Notes(gamma=0.45455, text=(("Title", "golden"),))
    streams = {}
    for name, image in images.items():
        model = load_model(FOLDER / f"{name.split('_')[0]}.safetensors")
        streams[name] = compress(
            image,
            model,
            mode="slow" if name.endswith("slow") else "fast",
            notes=notes if name.endswith("noted") else None,
        )
    _write(folder, "photographs", images, streams)


def _write(folder: Path, name: str, images: dict, streams: dict) -> None:
    np.savez_compressed(folder / f"{name}.npz", **images)
    for stem, stream in streams.items():
        (folder / f"{stem}.pn").write_bytes(stream)


if __name__ == "__main__":
    make()
    make_photographs()
