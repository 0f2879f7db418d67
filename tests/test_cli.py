r"""Tests for the probnets.cli module: training, the demonstration and arguments."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_cases import files, noise, runner, save, smooth
from PIL import Image

from probnets import __version__, decompress
from probnets.circuits.learner import Learner
from probnets.cli import commands as cli
from probnets.cli import demo, jobs
from probnets.cli.imagesets import ImageSet
from probnets.coding import ImageModel


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    return runner(capsys)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Training


WORDS = ("--units", 4, "--epochs", 2, "--batch-size", 16)


def test_training_on_a_folder(run, folder):
    for n, image in enumerate(smooth(24, 8, 8)):
        save(f"set/{n}.png", image)

    out, _ = run("train", "set", "-o", "m.safetensors", *WORDS)

    model = ImageModel.load("m.safetensors")
    assert (model.kind, model.shape, model.tables.units) == ("whole", (8, 8), 4)
    size = (folder / "m.safetensors").stat().st_size
    assert f"m.safetensors: whole (8, 8), {size:,} bytes" in out
    assert "bits per dimension on validation data" in out
    assert not (folder / "m.safetensors.checkpoint").exists()


def test_training_tiles(run, folder):
    image = np.moveaxis(smooth(3, 24, 70), 0, -1)
    save("set/a.png", image)
    save("set/b.png", image[..., 0])

    run("train", "set", "-o", "m.safetensors", "--tile", 8, *WORDS)
    save("a.png", image)
    run("compress", "a.png", "--model", "m.safetensors")

    model = ImageModel.load("m.safetensors")
    assert (model.kind, model.shape) == ("tiles", (8, 8, 3))
    assert np.array_equal(decompress((folder / "a.png.pn").read_bytes(), model), image)


def test_training_goes_on(run, folder, monkeypatch, capsys):
    np.savez("set.npz", xtr=smooth(40, 8, 8))
    run("train", "set.npz", "-o", "whole", *WORDS)

    epochs = []
    save_state = Learner.save

    def stop(self, path):
        save_state(self, path)
        epochs.append(len(self.history))
        if len(epochs) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "save", stop)
    assert cli.main(["train", "set.npz", "-o", "m", *map(str, WORDS)]) == 130
    assert capsys.readouterr().err.endswith("probnets: interrupted\n")
    assert files(folder) == ["m.checkpoint", "set.npz", "whole"]

    _, (line,) = run("train", "set.npz", "-o", "m", *WORDS, code=1)
    assert "expected no checkpoint at m.checkpoint, got one; pass --resume" in line
    _, (line,) = run("train", "set.npz", "-o", "m", *WORDS, "--seed", 1, "--resume", code=1)
    assert "expected a checkpoint of this fit in m.checkpoint" in line

    run("train", "set.npz", "-o", "m", *WORDS, "--resume")
    assert epochs == [1, 2, 3]
    assert files(folder) == ["m", "set.npz", "whole"]
    assert ImageModel.load("m").digest == ImageModel.load("whole").digest


def test_training_needs_images(run, folder):
    save("few/a.png", noise(20, 20, 3))
    save("mixed/a.png", noise(20, 20, 3))
    save("mixed/b.png", noise(20, 20))
    save("grey/a.png", noise(20, 20))
    (folder / "bad").mkdir()
    (folder / "bad/a.png").write_bytes(b"no image")
    (folder / "model").write_bytes(b"mine")
    np.savez("names.npz", wrong=noise(4, 5))
    np.savez("flat.npz", images=noise(4, 5))

    for words, sentence in {
        ("none", "-o", "m"): "expected images in 'none', got none",
        ("bad", "-o", "m"): "expected an image in bad/a.png, got a file of no known format",
        ("grey", "-o", "m"): "expected an image in colour of 16 x 16 pixels or more, got none",
        ("mixed", "-o", "m", "--kind", "whole"): "expected images of one shape and dtype in mixed",
        ("few", "-o", "m", "--kind", "whole"): "expected 20 images or more",
        ("few/a.png", "-o", "m"): "expected an .npz archive in few/a.png",
        ("names.npz", "-o", "m"): "expected an array 'images' or 'xtr' .* got none",
        ("flat.npz", "-o", "m"): r"expected an array 'images' or 'xtr' .* got shape \(4, 5\)",
        ("few", "-o", "model"): "expected no file at model, got one; pass --force",
    }.items():
        _, (line,) = run("train", *words, code=1)
        assert re.search(sentence, line), line
        assert not (folder / "m").exists()


def test_kind_is_chosen(folder):
    for n in range(20):
        save(f"same/{n}.png", noise(4, 64))
        save(f"wide/{n}.png", noise(4, 65))
    save("few/0.png", noise(4, 4))
    np.savez("set.npz", images=noise(20, 4, 64, 3))

    kinds = {name: ImageSet(name).kind() for name in ("same", "wide", "few", "set.npz")}
    assert kinds == {"same": "whole", "wide": "tiles", "few": "tiles", "set.npz": "whole"}
    assert ImageSet("same").stack().shape == (20, 4, 64)
    assert len(list(ImageSet("set.npz"))) == len(ImageSet("set.npz")) == 20


def test_full_disk_in_training(run, folder, monkeypatch):
    np.savez("set.npz", images=smooth(40, 8, 8))
    monkeypatch.setattr("os.fsync", full)

    words = ("--units", 4, "--epochs", 1, "--batch-size", 16)
    _, (line,) = run("train", "set.npz", "-o", "m", *words, code=1)

    assert "expected to write m.checkpoint, got: No space left on device" in line
    assert files(folder) == ["set.npz"]


# Demonstration


def test_demo_is_exact(run, folder):
    out, _ = run("demo", "--figure", "figure.png")

    lines = out.splitlines()
    assert lines[-1] == "exact"
    assert [line[:16].strip() for line in lines[-6:-1]] == list(demo.pictures())
    assert {image.dtype.name for image in demo.pictures().values()} == {"bool", "uint8", "uint16"}
    with Image.open("figure.png") as figure:
        assert figure.size[0] > 1000


def test_demo_notices(run, monkeypatch):
    images = {"noise": noise(20, 20), "words": noise(20, 20, dtype="uint16")}
    monkeypatch.setattr(cli, "pictures", lambda: images)
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    out, _ = run("demo")
    assert [line.split()[5] for line in out.splitlines()[-3:-1]] == ["-", "-"]

    monkeypatch.setattr(demo, "decompress", lambda stream: images["noise"] + 1)
    assert cli.main(["demo"]) == 1


def test_demo_figures_are_png(run, folder):
    _, (line,) = run("demo", "--figure", "figure.jpg", code=1)

    assert "expected a name in .png for a figure, got figure.jpg" in line


@pytest.mark.parametrize("command", ["heatmap", "demo"])
def test_help_tells_of_matplotlib(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])

    assert "pip install 'probnets[plots]'" in " ".join(capsys.readouterr().out.split())


def test_demo_without_matplotlib(run, folder, monkeypatch):
    monkeypatch.setattr(cli, "pictures", lambda: {"noise": noise(20, 20)})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    _, (line,) = run("demo", "--figure", "figure.png", code=1)

    assert "expected Matplotlib to draw with, got none; install probnets[plots]" in line


# Arguments


@pytest.mark.parametrize(
    "words",
    [
        *([], ["unknown"], ["compress"], ["info"], ["info", "a", "b"], ["train", "a"]),
        *(["train", "a", "-o", "b", "--units", "0"], ["decompress", "a", "--limit", "x"]),
    ],
    ids=" ".join,
)
def test_usage(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)

    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])

    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"probnets {__version__}\n"


@pytest.mark.slow
def test_module_runs(tmp_path):
    command = [sys.executable, "-m", "probnets", "info", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 1
    assert done.stderr == "probnets: error: expected a stream or a model at none, got no file\n"


def test_jobs_by_hand():
    def fail(error, source):
        raise AssertionError(source)

    found = jobs.list_jobs([Path("x/a")], None, lambda folder: [], fail)

    assert [job.target("b") for job in found] == [Path("x/b")]
