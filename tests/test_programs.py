r"""Tests for the programs in the folder compression, which are run by path."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from probnets.circuits.em import EMSettings
from probnets.cli.formats import png_bytes
from probnets.coding import ImageModel, train_whole

ROOT = Path(__file__).parents[1]


def smooth(*shape):
    steps = np.random.default_rng(0).normal(scale=2.0, size=shape)
    return (128 + steps.cumsum(1).cumsum(2)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    r"""Runs a program in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def program(name, *argv, code=0):
        main = runpy.run_path(str(ROOT / "compression" / f"{name}.py"))["main"]
        assert main([str(word) for word in argv]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return program


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for part in ("train", "valid"):
        (folder / part).mkdir(parents=True)
        for n, image in enumerate(smooth(2, 24, 40, 3)):
            (folder / part / f"{n}.png").write_bytes(png_bytes(image))
    return folder


@pytest.fixture
def digits(tmp_path):
    r"""Returns a data folder with an archive of MNIST's form, of few images."""
    folder = tmp_path / "data"
    folder.mkdir()
    images, labels = np.zeros((60, 28, 28), np.uint8), np.zeros(60, np.uint8)
    images[:, 8:20, 8:20] = smooth(60, 12, 12)
    arrays = {"xtr": images, "ytr": labels, "xte": images[:20], "yte": labels[:20]}
    for name in ("mnist", "fashion"):
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


# The lines that a short run on synthetic data ends with.
SMOKE = {
    "corpus": (["--smoke"], "exact"),
    "figures": (["--smoke"], "bits-0.png"),
    "photographs": (["--smoke"], "new photographs"),
    "photographs tree": (["--smoke", "--kind", "tree"], "new photographs"),
    "table": (["--smoke"], "exact"),
    "train": (["--smoke"], "%"),
    "train whole": (["--smoke", "whole"], "%"),
}


@pytest.mark.parametrize("case", SMOKE)
def test_smoke(run, case, tmp_path):
    words, end = SMOKE[case]

    out = run(case.split()[0], *words)

    assert out.rstrip().endswith(end)
    assert list(tmp_path.iterdir()) == []


def test_every_program_is_tested():
    programs = {file.stem for file in (ROOT / "compression").glob("*.py")}
    assert programs == {case.split()[0] for case in SMOKE}


# Each program on files


def test_train_on_photographs(run, photos):
    words = ("--units", 4, "--epochs", 1, "--batch-size", 16, "--tile", 8)
    out = run("train", "--data", photos / "train", "--out", "m.safetensors", *words)

    assert ImageModel.load("m.safetensors").shape == (8, 8, 3)
    assert "60 new rows, as floats" in out
    assert not Path("m.safetensors.checkpoint").exists()


def test_train_on_digits(run, digits):
    words = ("--units", 4, "--epochs", 1, "--batch-size", 16)
    out = run("train", "--data", "fashion", "--folder", digits, "--out", "m.safetensors", *words)

    assert ImageModel.load("m.safetensors").shape == (28, 28)
    assert "20 new rows, as floats" in out


def test_corpus(run, photos):
    lines = run("corpus", photos / "valid", "--effort", 1).splitlines()

    names = [line.split()[0] for line in lines]
    assert names[1:4] == ["0.png", "1.png", "total"]
    ours = [int(line.split()[-1].replace(",", "")) for line in lines[1:4]]
    assert ours[0] + ours[1] == ours[2]
    assert float(lines[4].split()[-1]) == pytest.approx(8 * ours[2] / (2 * 24 * 40 * 3), abs=1e-4)


def test_table(run, digits):
    small = train_whole(smooth(40, 28, 28), units=4, settings=EMSettings(epochs=1),
                        progress=False)[0]  # fmt: skip
    small.save("mnist.safetensors")
    words = ("--data", digits, "--units", 4, "--epochs", 1, "--effort", 1, "--images", 9)

    out = run("table", *words, "--mnist", "mnist.safetensors")

    assert out.count("9 test images, 784 numbers each") == 2
    assert small.digest.hex() in out
    assert out.count("published, theoretical") == 10
    kept = Path("runs/table-fashion-4-1.safetensors")
    before = kept.stat().st_mtime_ns
    run("table", *words, "--sets", "fashion")
    assert kept.stat().st_mtime_ns == before


def test_figures(run):
    images = smooth(40, 8, 8)
    np.savez("set.npz", images=images)
    settings = EMSettings(epochs=1, batch_size=16)
    train_whole(images, units=4, settings=settings, progress=False)[0].save("m.safetensors")

    out = run("figures", "m.safetensors", "--images", "set.npz", "--out", "here", "--count", 1)

    names = ["here/whole-tree.png", "here/samples.png", "here/completions.png"]
    assert out.split() == names
    assert all(Path(name).stat().st_size > 1000 for name in names)


BAD = {
    "corpus without a folder": (("corpus",), "expected a folder of images, got none"),
    "corpus of nothing": (("corpus", "none"), "expected images in 'none', got none"),
    "no such model": (("corpus", ".", "--model", "m"), "expected a file of arrays at m"),
    "train without out": (("train",), "expected the file of the model to write"),
    "train on nothing": (("train", "--data", "none", "--out", "m"), "expected images in 'none'"),
    "table of nothing": (("table", "--data", "none"), "expected a data folder, got 'none'"),
    "figures of nothing": (("figures", "m"), "expected a file of arrays at m, got none"),
}


@pytest.mark.parametrize(("words", "sentence"), BAD.values(), ids=list(BAD))
def test_errors(run, words, sentence):
    err = run(*words, code=1)

    assert err.startswith(f"{words[0]}.py: error: {sentence}")
    assert err.count("\n") == 1
