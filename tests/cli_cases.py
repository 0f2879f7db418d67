r"""What the tests of the command share: images, files and a way to run it."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image

from probnets.cli import commands
from probnets.cli.formats import npy_bytes, png_bytes


def noise(*shape, dtype="uint8"):
    values = np.random.default_rng(len(shape)).integers(0, 2**16, shape)
    return (values % 2).astype(bool) if dtype == "bool" else values.astype(dtype)


def smooth(*shape):
    steps = np.random.default_rng(0).normal(size=shape)
    return (128 + steps.cumsum(1).cumsum(2)).clip(0, 255).astype(np.uint8)


def save(path, array):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = npy_bytes(array) if path.suffix == ".npy" else png_bytes(array)
    assert content is not None
    path.write_bytes(content)
    return path


def files(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def runner(capsys):
    r"""Returns what runs a command and holds it to one line for each error or warning."""

    def command(*argv, code=0, warnings=0):
        found = commands.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert found == code, err
        bars = "EM:"  # and what clears them, spaces
        lines = [line for line in err.splitlines() if line.strip() and not line.startswith(bars)]
        errors = [line for line in lines if line.startswith("probnets: error: expected")]
        warned = [line for line in lines if line.startswith("probnets: warning: expected")]
        assert len(errors) + len(warned) == len(lines), err
        assert len(warned) == warnings, err
        assert bool(errors) == (code == 1) or "exact" in out
        return out, lines

    return command


def profile(name="A profile", version=2):
    r"""Returns the bytes of an ICC profile that holds its name alone."""
    if version == 2:
        tag = b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name.encode() + b"\0"
    else:
        text = name.encode("utf-16-be")
        tag = b"mluc" + bytes(4) + struct.pack(">II", 1, 12)
        tag += b"enUS" + struct.pack(">II", len(text), 28) + text
    table = struct.pack(">I", 1) + b"desc" + struct.pack(">II", 144, len(tag))
    return bytes(128) + table + tag


def exif(orientation=6):
    r"""Returns the bytes of EXIF, as PIL takes them."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "A camera"
    return tags.tobytes()
