r"""Tests for the probnets.cli.information module: the command info."""

import numpy as np
import pytest
from cli_cases import exif, noise, profile, runner, save, smooth

from probnets import compress, compress_batch
from probnets.cli import commands
from probnets.coding import ImageModel, Notes, pretrained
from probnets.coding.stream import MAGIC


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    return runner(capsys)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    r"""Returns the file of a model of images with shape (8, 8)."""
    folder = tmp_path_factory.mktemp("model")
    np.savez(folder / "set.npz", images=smooth(40, 8, 8))
    out = folder / "small.safetensors"
    words = ["--units", "4", "--epochs", "1", "--batch-size", "16"]
    assert commands.main(["train", str(folder / "set.npz"), "-o", str(out), *words]) == 0
    return out


# Information


def test_info_on_streams(run, folder, small):
    (folder / "a.pn").write_bytes(blob := compress(noise(9, 10, dtype="uint16")))
    (folder / "b.pn").write_bytes(compress_batch(smooth(3, 8, 8), small))

    out, _ = run("info", "a.pn")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines()[1:-1])
    assert facts["what"] == "image, a stream of version 1"
    assert facts["shape"] == "(9, 10)"
    assert facts["dtype"] == "uint16"
    assert facts["model"] == f"{pretrained().digest.hex()}, of photographs, shipped with probnets"
    assert facts["bytes"] == f"{len(blob)} of 180"
    assert out.endswith(f"  bits per subpixel   {8 * len(blob) / 90:.4f}\n")

    assert facts["mode"] == "fast"
    assert facts["payload"] == f"{len(blob) - 15} bytes"
    assert facts["parts"] == "1 that decode on their own"

    out, _ = run("info", "b.pn")
    assert "batch, a stream of version 1" in out
    assert f"{ImageModel.load(small).digest.hex()}, another one" in out


@pytest.mark.parametrize("version", [2, 4])
def test_info_on_notes(run, folder, version):
    notes = Notes(
        profile=profile("Display P3", version),
        exif=exif(8).removeprefix(b"Exif\0\0"),
        xmp=b"<x/>",
        gamma=0.45455,
        chromaticity=(0.25,) * 8,
        intent=1,
        dpi=(300.0, 150.5),
        text=(("Author", "A"), ("Two\nlines", "B")),
    )
    (folder / "a.pn").write_bytes(compress(noise(9, 10), notes=notes))

    out, _ = run("info", "a.pn")

    facts = [line.strip() for line in out.splitlines()]
    assert "what                image, a stream of version 2" in facts
    assert f"colour profile      Display P3, {len(notes.profile)} bytes" in facts
    assert f"EXIF                {len(notes.exif)} bytes, orientation 8" in facts
    assert "XMP                 4 bytes" in facts
    assert "gamma               0.45455" in facts
    assert "chromaticities      " + " ".join(["0.25"] * 8) in facts
    assert "sRGB intent         1" in facts
    assert "dots per inch       300 x 150.5" in facts
    assert "texts               Author, Two lines" in facts


def test_info_prints_no_escapes(run, folder):
    notes = Notes(
        profile=profile("\x1b[31mred" + "long" * 99),
        text=(("\x1b]0;title\7", "A"), ("k" * 999, "B"), *((f"key{n}", "C") for n in range(4000))),
    )
    (folder / "a.pn").write_bytes(compress(noise(9, 10), notes=notes))

    out, _ = run("info", "a.pn")

    assert out.replace("\n", "").isprintable()
    assert f"colour profile      [31mred{'long' * 13}l..., {len(notes.profile)} bytes" in out
    assert f"texts               ]0;title, {'k' * 60}..., key0, " in out
    assert ", key17 and 3,982 more\n" in out


def test_info_on_models(run, small):
    out, _ = run("info", small)
    facts = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])

    model = ImageModel.load(small)
    numbers = 4 + model.tables.sums.size + 64 * 256 * 4
    assert facts["what"] == "a model of images"
    assert facts["kind"] == "whole"
    assert facts["shape"] == "(8, 8)"
    assert facts["units"] == "4"
    assert facts["values"] == "256"
    assert facts["regions"] == str(model.tables.tree.regions)
    assert facts["parameters"] == f"{numbers:,}"
    assert facts["digest"].startswith(model.digest.hex())
    assert facts["bytes"] == f"{small.stat().st_size:,}"


def test_info_on_others(run, folder):
    save("a.png", noise(4, 5))
    (folder / "b.pn").write_bytes(compress(noise(4, 5))[:-1])
    (folder / "c").write_bytes(bytes(8) + b"{")
    (folder / "d").write_bytes(MAGIC)

    for name, sentence in {
        "a.png": "expected a stream or a model in a.png, got neither",
        "b.pn": "expected a stream with a matching checksum",
        "c": "expected a file that probnets wrote at c",
        "d": "expected a stream of 14 bytes or more, got 3",
        "e": "expected a stream or a model at e, got no file",
    }.items():
        _, (line,) = run("info", name, code=1)
        assert sentence in line
