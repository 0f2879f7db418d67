r"""What is kept of an image file beside its pixels, and what is not."""

__all__ = ["notes_of", "unkept"]

import math
from typing import Any

from PIL import ExifTags, Image, TiffTags

from .notes import Notes, is_short, printable

_EXIF_HEAD = b"Exif\0\0"
_XMP_KEY = "XML:com.adobe.xmp"
_DESCRIPTIVE = (  # tags of a TIFF file that tell of the photograph, not of how it is stored
    *(ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model),
    *(ExifTags.Base.Orientation, ExifTags.Base.Software, ExifTags.Base.DateTime),
    *(ExifTags.Base.Artist, ExifTags.Base.HostComputer, ExifTags.Base.Copyright),
)
_KEPT = {  # keys of PIL's info that become notes or pixels
    *("chromaticity", "comment", "dpi", "exif", "gamma", "icc_profile", "srgb", "transparency"),
    *("xmp", _XMP_KEY),
}
_HARMLESS = {  # keys that tell how a file is stored, or how one frame alone would move
    *("adobe", "adobe_transform", "background", "bbox", "blend", "bpp", "compression"),
    *("default_image", "disposal", "duration", "interlace", "jfif", "jfif_unit", "jfif_version"),
    *("loop", "mp", "mpoffset", "orientation", "progression", "progressive", "resolution"),
    *("sizes", "timestamp", "version"),
}
_HARMLESS_BLOCKS = {0x03ED, 0x0409, 0x040C, 0x0425}  # resolution, thumbnails, digest of IPTC
_HARMLESS_TAGS = {  # of a TIFF file: structure, resolution, and what info or EXIF holds as well
    *range(254, 259), 259, 262, 263, 264, 265, 266, 273, *range(277, 285), 288, 289, 290, 291,
    292, 293, 296, 297, 317, 320, *range(322, 326), 330, 338, 339, 340, 341, 347,
    *range(512, 522), *range(529, 533), 700, 34665, 34675, 34853, 40965,
}  # fmt: skip


def notes_of(img: Image.Image) -> Notes:
    r"""Collects the notes of a PIL image that is loaded.

    Arguments:
        img: The image.

    Raises:
        ValueError: If there are more than 4,096 texts, or if the notes hold more than 16 MiB.
    """
    info = _info(img)
    gamma, chromaticity, intent = (info.get(k) for k in ("gamma", "chromaticity", "srgb"))
    if not isinstance(chromaticity, tuple) or len(chromaticity) != 8:
        chromaticity = ()
    return Notes(
        profile=_bytes(info.get("icc_profile")),
        exif=_exif(img, info),
        xmp=_bytes(info.get("xmp")),
        gamma=gamma if _is_number(gamma) else None,
        chromaticity=chromaticity if all(map(_is_number, chromaticity)) else (),
        intent=intent if isinstance(intent, int) and 0 <= intent < 256 else None,
        dpi=_dpi(info.get("dpi")),
        text=tuple((key, text) for key, text in _texts(img) if _is_sound(key, text)),
    )


def unkept(img: Image.Image) -> list[str]:
    r"""Lists what a PIL image that is loaded says beside its pixels and is not kept.

    What only tells how its file was stored is not listed.

    Arguments:
        img: The image.

    Returns:
        Names for people, each in one short line.

    Example:
        >>> img = Image.new("L", (6, 4))
        >>> img.info.update(dpi=(300, 300), photoshop={0x0404: b"IPTC"}, progressive=1)
        >>> unkept(img)
        ['IPTC or Photoshop blocks']
    """
    info = _info(img)
    names = [_named(key, value) for key, value in info.items() if key not in _KEPT | _HARMLESS]
    texts = getattr(img, "text", {})
    if not all(_is_sound(key, text) for key, text in _texts(img)):
        names.append("texts without a keyword or in no UTF-8")
    if any(getattr(text, "lang", "") for key, text in texts.items() if key != _XMP_KEY):
        names.append("languages of texts")
    chunks = [chunk[0].decode("latin-1") for chunk in getattr(img, "private_chunks", [])]
    tags = set(getattr(img, "tag_v2", {})) - _HARMLESS_TAGS - set(_DESCRIPTIVE)
    names += [f"chunk {printable(kind)}" for kind in chunks]
    names += [f"tag {TiffTags.lookup(tag).name} ({tag})" for tag in tags]
    return sorted({name for name in names if name})


def _named(key: object, value: Any) -> str:  # noqa: ANN401
    r"""Returns the name of what PIL keeps under a key, empty if it is worth nothing."""
    if key == "photoshop":
        only = isinstance(value, dict) and _HARMLESS_BLOCKS.issuperset(value)
        return "" if only else "IPTC or Photoshop blocks"
    if key in ("aspect", "jfif_density"):  # without a unit
        square = isinstance(value, tuple) and len(set(value)) == 1
        return "" if square else "aspect of pixels"
    if key == "extension" and str(value).startswith(("(b'NETSCAPE", "(b'ANIMEXTS")):
        return ""  # of a GIF, how often it repeats
    return printable(str(key))


def _info(img: Image.Image) -> dict[Any, Any]:
    r"""Returns what PIL tells of an image, without the texts of a PNG that lie among it."""
    texts = getattr(img, "text", {})
    info = {k: v for k, v in img.info.items() if not (k in texts and texts[k] == v)}
    if info.get("jfif_unit"):  # then dots per inch say as much
        info.pop("jfif_density", None)
    return info


def _texts(img: Image.Image) -> list[tuple[str, str]]:
    texts = [(k, str(v)) for k, v in getattr(img, "text", {}).items() if k != _XMP_KEY]
    if isinstance(comment := _info(img).get("comment"), bytes | str):
        texts.append(("Comment", comment if isinstance(comment, str) else _decoded(comment)))
    return texts


def _is_number(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, int | float) and is_short(value)


def _is_sound(key: str, text: str) -> bool:
    return bool(key) and (key + text).encode("utf-8", "ignore").decode("utf-8") == key + text


def _bytes(value: object) -> bytes:
    r"""Takes bytes for what they are, text for its UTF-8, and all else for nothing."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return bytes(value) if isinstance(value, bytes | bytearray) else b""


def _decoded(comment: bytes) -> str:
    try:
        return comment.decode("utf-8")
    except UnicodeDecodeError:
        return comment.decode("latin-1")


def _dpi(value: Any) -> tuple[float, float] | None:  # noqa: ANN401
    r"""Returns dots per inch, unless they are none or 1, PIL's word for a TIFF without."""
    if not isinstance(value, tuple):
        return None
    try:
        x, y = map(float, value)
    except (ArithmeticError, TypeError, ValueError):
        return None
    sound = all(math.isfinite(side) and side > 0 for side in (x, y))
    return (x, y) if sound and (x, y) != (1.0, 1.0) else None


def _exif(img: Image.Image, info: dict[Any, Any]) -> bytes:
    r"""Returns the EXIF of a file as it is, or what a TIFF file has in its place."""
    if "exif" in info:
        return _bytes(info["exif"]).removeprefix(_EXIF_HEAD)
    if not hasattr(img, "tag_v2"):
        return b""
    found, kept = img.getexif(), Image.Exif()
    for tag in _DESCRIPTIVE:
        if tag in found:
            kept[tag] = found[tag]
    for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if tags := found.get_ifd(ifd):
            kept[ifd] = dict(tags)
    return kept.tobytes().removeprefix(_EXIF_HEAD) if len(kept) else b""
