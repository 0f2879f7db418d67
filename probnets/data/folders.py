r"""Where the data lie."""

__all__ = ["folder", "image_folder"]

import os
from pathlib import Path

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def folder(path: str | Path | None = None) -> Path:
    r"""Finds the data folder.

    The first of these that is given wins: the argument, the environment variable
    `PROBNETS_DATA`, and `../shared/data` beside the checkout that is the current directory.
    A folder that is named but missing is an error; no other is taken in its place.

    Arguments:
        path: The folder, if the caller knows it.

    Returns:
        The folder, which exists.

    Raises:
        FileNotFoundError: If there is no such folder.

    Example:
        >>> folder(".").is_dir()
        True
    """
    found = Path(path or os.environ.get("PROBNETS_DATA") or Path("..", "shared", "data"))
    if not found.is_dir():
        raise FileNotFoundError(
            f"expected a data folder, got {str(found)!r}, which does not exist; "
            "name one by argument (programs: --data) or by PROBNETS_DATA"
        )

    return found


def image_folder(path: str | Path) -> list[Path]:
    r"""Lists the image files below a folder, by suffix and in sorted order.

    Arguments:
        path: The folder, which is searched with its sub-folders.

    Returns:
        The paths of the images, at least one.

    Raises:
        FileNotFoundError: If the folder is missing or holds no image.
    """
    images = [file for file in Path(path).rglob("*") if file.suffix.lower() in SUFFIXES]
    images = sorted(file for file in images if file.is_file())
    if not images:
        raise FileNotFoundError(
            f"expected images in {str(path)!r}, got none; their names end in {' '.join(SUFFIXES)}"
        )

    return images
