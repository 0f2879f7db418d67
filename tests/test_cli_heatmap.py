r"""Tests for the probnets.cli.heatmap module: where the bits go."""

import io
import sys

import numpy as np
import pytest
from cli_cases import exif, files, noise, runner, save
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from probnets.cli import heatmap as cli
from probnets.cli.heatmap import heatmap, upright


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    pytest.importorskip("matplotlib")
    return runner(capsys)


KINDS = [((20, 30), "bool"), ((20, 30), "uint16"), ((1, 1, 1), "uint8"), ((20, 9, 4), "uint8")]


@pytest.mark.parametrize(("shape", "dtype"), [*KINDS, ((20, 9, 2), "uint8"), ((9, 9, 3), "uint8")])
def test_figures_of_all_kinds(run, folder, shape, dtype):
    save("a.npy", noise(*shape, dtype=dtype))

    out, _ = run("heatmap", "a.npy", "-o", "map.png")

    assert out.startswith("map.png: ")
    assert "bits per pixel" in out
    with Image.open("map.png") as figure:
        assert figure.size[0] > 1000


def test_nothing_is_overwritten(run, folder):
    save("a.png", noise(4, 5))

    _, (line,) = run("heatmap", "a.png", "-o", "a.png", "--force", code=1)
    assert "expected a result beside its source" in line
    save("map.png", noise(4, 5))
    _, (line,) = run("heatmap", "a.png", "-o", "map.png", code=1)
    assert "expected no file at map.png" in line
    run("heatmap", "a.png", "-o", "map.png", "--force")


@pytest.mark.parametrize("name", ["map.jpg", "map"])
def test_figures_are_png(run, folder, name):
    save("a.png", noise(4, 5))

    _, (line,) = run("heatmap", "a.png", "-o", name, code=1)

    assert f"expected a name in .png for a figure, got {name}; it is drawn as PNG" in line
    assert files(folder) == ["a.png"]


def test_says_nothing_of_what_streams_lose(run, folder):
    img = Image.fromarray(noise(4, 5)).convert("P")
    img.save("a.png", pnginfo=private())

    run("heatmap", "a.png", "-o", "map.png")
    run("compress", "a.png", warnings=2)


def private():
    chunks = PngInfo()
    chunks.add(b"caBX", b"claims")
    return chunks


def test_without_matplotlib(folder, capsys, monkeypatch):
    save("a.png", noise(4, 5))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    _, (line,) = runner(capsys)("heatmap", "a.png", "-o", "map.png", code=1)

    assert "expected Matplotlib to draw with, got none; install probnets[plots]" in line
    assert files(folder) == ["a.png"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(orientation):
    image = noise(3, 5, 3)
    img = Image.fromarray(image)
    img.info["exif"] = exif(orientation)

    expected = np.asarray(ImageOps.exif_transpose(img))

    assert np.array_equal(upright(image, orientation), expected)


def test_large_images_are_averaged(monkeypatch):
    monkeypatch.setattr(cli, "SIDE", 3)
    array = np.arange(35.0).reshape(5, 7)

    found = cli._averaged(array)

    assert found.shape == (2, 3)
    assert found[0, 0] == array[:3, :3].mean()
    assert found[1, 2] == array[3:, 6:].mean()


def test_bright_where_bits_are():
    pytest.importorskip("matplotlib")
    lengths = np.zeros((20, 20, 1))
    lengths[:, 10:] = 8.0

    with Image.open(io.BytesIO(heatmap(np.zeros((20, 20), np.uint8), lengths))) as figure:
        pixels = np.asarray(figure.convert("L"), dtype=float)

    right = pixels[100:-100, pixels.shape[1] // 2 + 20 : -250]  # beside the colour bar
    middle = right.shape[1] // 2
    assert right[:, middle + 30 :].mean() > right[:, : middle - 30].mean() + 50

    with pytest.raises(ValueError, match=r"expected bits with shape \(H, W, C\)"):
        heatmap(np.zeros((20, 20), np.uint8), lengths[:9])
