r"""The command ``info``: what a stream or a model holds."""

__all__ = ["run_info"]

import argparse
from pathlib import Path

from probnets.coding import Notes
from probnets.coding.models import load_model, shipped_model
from probnets.coding.notes import printable, unpack_notes
from probnets.coding.photographs.codec import photograph_parts
from probnets.coding.photographs.model import PhotographModel
from probnets.coding.stream import MAGIC, Header, Reader, open_stream
from probnets.coding.treecodec import tree_parts
from probnets.coding.trees import TreeModel

from .words import say

SHOWN = 20  # keywords of texts


def run_info(args: argparse.Namespace) -> int:
    r"""Says what a stream or a model holds, a line for each fact."""
    path: Path = args.file
    if not path.is_file():
        raise FileNotFoundError(f"expected a stream or a model at {path}, got no file")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(MAGIC):
        facts = _stream_facts(path.read_bytes())
    elif start[8:] == b"{":  # a safetensors file: a length, then JSON
        facts = _model_facts(path)
    else:
        raise ValueError(f"expected a stream or a model in {path}, got neither")
    say(str(path))
    for name, value in facts.items():
        say(f"  {name:<20}{value}")
    return 0


def _stream_facts(blob: bytes) -> dict[str, object]:
    header, reader = open_stream(blob, limit=2**2048)
    ours = shipped_model(header.digest)
    where = "another one" if ours is None else f"of {ours.kind}, shipped with probnets"
    return {
        "what": f"{'batch' if header.batch else 'image'}, a stream of version {blob[3]}",
        "shape": header.shape,
        "dtype": header.dtype,
        "model": f"{header.digest.hex()}, {where}",
        **_note_facts(unpack_notes(header.notes), len(header.notes)),
        **_payload_facts(header, reader),
        "bytes": f"{len(blob):,} of {header.size * header.dtype.itemsize:,}",
        "bits per subpixel": f"{8 * len(blob) / header.size:.4f}",
    }


def _payload_facts(header: Header, reader: Reader) -> dict[str, object]:
    r"""Tells what the payload says of itself. Those of some shipped models say more.

    Arguments:
        header: The header, whose digest names the model.
        reader: The payload, from its first byte on.
    """
    size, model = f"{reader.left:,} bytes", shipped_model(header.digest)
    facts: dict[str, object] = {"payload": size}
    if header.batch or not isinstance(model, PhotographModel | TreeModel):
        return facts
    if isinstance(model, PhotographModel):
        facts["mode"], sizes = photograph_parts(header.shape, header.dtype, reader)
    else:
        sizes = tree_parts(header.shape, header.dtype, reader)
    return {**facts, "parts": f"{len(sizes)} that decode on their own"}


def _note_facts(notes: Notes, size: int) -> dict[str, object]:
    r"""Tells of notes, each with its size.

    Arguments:
        notes: The notes.
        size: The bytes that they take in the stream.
    """
    if not notes:
        return {}
    facts: dict[str, object] = {"notes": f"{size:,} bytes in the stream"}
    if notes.profile:
        name = printable(notes.profile_name) or "without a name"
        facts["colour profile"] = f"{name}, {len(notes.profile):,} bytes"
    if notes.exif:
        facts["EXIF"] = f"{len(notes.exif):,} bytes, orientation {notes.orientation}"
    if notes.xmp:
        facts["XMP"] = f"{len(notes.xmp):,} bytes"
    if notes.gamma is not None:
        facts["gamma"] = f"{notes.gamma:g}"
    if notes.chromaticity:
        facts["chromaticities"] = " ".join(f"{x:g}" for x in notes.chromaticity)
    if notes.intent is not None:
        facts["sRGB intent"] = notes.intent
    if notes.dpi is not None:
        facts["dots per inch"] = " x ".join(f"{x:g}" for x in notes.dpi)
    if notes.text:
        keys = ", ".join(printable(key) for key, _ in notes.text[:SHOWN])
        more = len(notes.text) - SHOWN
        facts["texts"] = f"{keys} and {more:,} more" if more > 0 else keys
    return facts


def _model_facts(path: Path) -> dict[str, object]:
    model = load_model(path)
    if isinstance(model, PhotographModel):
        return {
            "what": "a model of photographs",
            "kind": model.kind,
            "components": model.components,
            "parameters": f"{model.parameters:,}",
            "digest": model.digest.hex(),
            "bytes": f"{path.stat().st_size:,}",
        }
    if isinstance(model, TreeModel):
        return {
            "what": "a model of trees as large as the image",
            "kind": model.kind,
            "units": model.units,
            "levels": model.levels,
            "parameters": f"{model.parameters:,}",
            "digest": model.digest.hex(),
            "bytes": f"{path.stat().st_size:,}",
        }
    tree, tables = model.tables.tree, model.tables
    inputs = tree.inputs * tables.units * tables.values
    return {
        "what": f"a model of {'images' if model.kind == 'whole' else 'tiles of images'}",
        "kind": model.kind,
        "shape": model.shape,
        "units": tables.units,
        "values": tables.values,
        "regions": tree.regions,
        "parameters": f"{tables.root.size + tables.sums.size + inputs:,}",
        "digest": f"{model.digest.hex()}, {tables.digest.hex()}",
        "bytes": f"{path.stat().st_size:,}",
    }
