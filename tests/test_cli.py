r"""Tests for the probnets.cli module and what it is made of."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probnets import __version__, compress, compress_batch, decompress
from probnets.circuits.learner import Learner
from probnets.cli import commands as cli
from probnets.cli import demo, jobs
from probnets.cli.formats import jpegxl_bytes, npy_bytes, png_bytes, read_image, webp_bytes
from probnets.cli.imagesets import ImageSet
from probnets.coding import ImageModel, pretrained
from probnets.coding.stream import MAGIC


def noise(*shape, dtype="uint8"):
    values = np.random.default_rng(len(shape)).integers(0, 2**16, shape)
    return (values % 2).astype(bool) if dtype == "bool" else values.astype(dtype)


def smooth(*shape):
    steps = np.random.default_rng(0).normal(size=shape)
    return (128 + steps.cumsum(1).cumsum(2)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    r"""Runs a command in an empty folder, and holds it to one line for each error."""

    def command(*argv, code=0):
        found = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert found == code, err
        bars = "EM:"  # and what clears them, spaces
        lines = [line for line in err.splitlines() if line.strip() and not line.startswith(bars)]
        assert all(line.startswith("probnets: error: expected") for line in lines), err
        assert bool(lines) == (code == 1) or "exact" in out
        return out, lines

    return command


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    r"""Returns the file of a model of images with shape (8, 8)."""
    folder = tmp_path_factory.mktemp("model")
    np.savez(folder / "set.npz", images=smooth(40, 8, 8))
    out = folder / "small.safetensors"
    words = ["--units", "4", "--epochs", "1", "--batch-size", "16"]
    assert cli.main(["train", str(folder / "set.npz"), "-o", str(out), *words]) == 0
    return out


def save(path, array):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = npy_bytes(array) if path.suffix == ".npy" else png_bytes(array)
    assert content is not None
    path.write_bytes(content)
    return path


def files(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


# Formats


KINDS = {
    "mask": ((6, 9), "bool", "png"),
    "grey": ((6, 9), "uint8", "png"),
    "words": ((6, 9), "uint16", "png"),
    "colour": ((6, 9, 3), "uint8", "png"),
    "alpha": ((6, 9, 4), "uint8", "png"),
    "one channel": ((6, 9, 1), "uint8", "npy"),
    "two channels": ((6, 9, 2), "uint8", "npy"),
    "colour masks": ((6, 9, 3), "bool", "npy"),
    "colour words": ((6, 9, 3), "uint16", "npy"),
}


@pytest.mark.parametrize(("shape", "dtype", "suffix"), KINDS.values(), ids=list(KINDS))
def test_kinds_come_back(run, folder, shape, dtype, suffix):
    image = noise(*shape, dtype=dtype)
    source = save(f"a.{suffix}", image)
    run("compress", source)
    source.unlink()

    out, _ = run("decompress", f"a.{suffix}.pn")

    assert files(folder) == [f"a.{suffix}", f"a.{suffix}.pn"]
    assert out == f"a.{suffix}: {dtype} with shape {shape}\n"
    back = read_image(source)
    assert back.dtype == image.dtype
    assert np.array_equal(back, image)


@pytest.mark.parametrize(("shape", "dtype", "suffix"), KINDS.values(), ids=list(KINDS))
def test_png_is_exact_or_none(shape, dtype, suffix):
    image = noise(*shape, dtype=dtype)
    content = png_bytes(image)

    assert (content is not None) == (suffix == "png")
    if content is not None:
        back = np.asarray(Image.open(io.BytesIO(content)))
        assert back.dtype == image.dtype
        assert np.array_equal(back, image)


def test_webp_is_exact_or_none():
    faded = noise(5, 7, 4)
    faded[..., 3] = 0  # the colours below must stay
    content = webp_bytes(faded)
    if content is None:
        pytest.skip("needs Pillow with WebP")

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), faded)
    assert webp_bytes(noise(5, 7, dtype="bool")) is not None
    assert webp_bytes(noise(5, 7, 2)) is None
    assert webp_bytes(noise(5, 7, dtype="uint16")) is None
    assert webp_bytes(noise(1, 16384)) is None


def test_formats_may_be_missing(monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)

    assert webp_bytes(noise(5, 7)) is None
    assert jpegxl_bytes(noise(5, 7)) is None


def test_jpegxl_is_exact():
    codecs = pytest.importorskip("imagecodecs")
    image = noise(5, 7, 3)
    content = jpegxl_bytes(image, effort=1)
    if content is None:
        pytest.skip("needs imagecodecs with JPEG XL")

    assert np.array_equal(codecs.jpegxl_decode(content), image)


# Compression


def test_sizes_are_told(run, folder):
    image = smooth(1, 20, 30)[0]
    before = save("a.png", image).stat().st_size

    out, _ = run("compress", "a.png")

    after = (folder / "a.png.pn").stat().st_size
    assert (folder / "a.png.pn").read_bytes() == compress(image)
    assert f"a.png.pn: {before:,} -> {after:,} bytes" in out
    assert f"{8 * after / 600:.3f} bits per subpixel" in out


def test_folders_keep_their_shape(run, folder):
    for name in ("in/a.png", "in/b/a.png"):
        save(name, noise(4, 5))

    out, _ = run("compress", "in", "-o", "packed")
    run("decompress", "packed", "-o", "back")

    assert "2 images: " in out
    names = [name for name in files(folder) if not name.startswith("in")]
    assert names == ["back/a.png", "back/b/a.png", "packed/a.png.pn", "packed/b/a.png.pn"]
    assert np.array_equal(read_image("back/b/a.png"), read_image("in/b/a.png"))


def test_out_is_a_file_or_a_folder(run, folder):
    save("a.png", noise(4, 5))
    (folder / "there").mkdir()

    for out in ("new/x.bin", "there", "trailing/"):
        run("compress", "a.png", "-o", out)
    run("decompress", "new/x.bin", "-o", "y.npy")

    names = ["a.png", "new/x.bin", "there/a.png.pn", "trailing/a.png.pn", "y.npy"]
    assert files(folder) == names
    assert np.array_equal(read_image("y.npy"), read_image("a.png"))


def test_restored_names(run, folder):
    image = noise(4, 5)
    for name in ("a.jpg.pn", "b.pn", "c.v2.pn", "d.bin"):
        (folder / name).write_bytes(compress(image))

    run("decompress", *files(folder))

    assert {"a.png", "b.png", "c.v2.png", "d.bin.png"} < set(files(folder))


def test_nothing_is_overwritten(run, folder):
    save("a.png", noise(4, 5))
    (folder / "a.png.pn").write_bytes(b"mine")

    _, (line,) = run("compress", "a.png", code=1)
    assert "expected no file at a.png.pn, got one; pass --force to overwrite it" in line
    assert (folder / "a.png.pn").read_bytes() == b"mine"

    run("compress", "a.png", "--force")
    before = (folder / "a.png").read_bytes()
    _, (line,) = run("decompress", "a.png.pn", code=1)
    assert "expected no file at a.png, got one" in line
    assert (folder / "a.png").read_bytes() == before

    run("decompress", "a.png.pn", "--force")
    assert files(folder) == ["a.png", "a.png.pn"]


def test_source_is_never_its_own_target(run, folder):
    before = save("a.png", noise(4, 5)).read_bytes()

    _, (line,) = run("compress", "a.png", "-o", "./a.png", "--force", code=1)

    assert "expected a result beside its source, got a.png for both" in line
    assert (folder / "a.png").read_bytes() == before


def test_targets_differ_even_by_force(run, folder):
    save("x/a.png", noise(4, 5))
    save("y/a.png", noise(5, 4))

    _, (line,) = run("compress", "x/a.png", "y/a.png", "-o", "out", "--force", code=1)

    assert "expected a target for each file, got out/a.png.pn twice" in line
    assert decompress((folder / "out/a.png.pn").read_bytes()).shape == (4, 5)


def test_the_rest_goes_on(run, folder):
    save("a.png", noise(4, 5))
    save("d.png", noise(4, 5))
    (folder / "b.png").write_bytes(b"no image")
    (folder / "empty").mkdir()

    _, lines = run("compress", "a.png", "b.png", "c.png", "empty", "d.png", code=1)

    assert len(lines) == 3
    assert "expected images in 'empty', got none" in lines[0]
    assert "expected an image in b.png, got a file of no known format" in lines[1]
    assert "expected an image at c.png, got no file" in lines[2]
    assert files(folder) == ["a.png", "a.png.pn", "b.png", "d.png", "d.png.pn"]


def test_one_file_is_no_folder(run, folder):
    save("a.png", noise(4, 5))
    save("b.png", noise(4, 5))

    _, (line,) = run("compress", "a.png", "b.png", "-o", "a.png", code=1)

    assert "expected a folder for several results, got the file a.png" in line


def truncated(folder):
    content = save("whole.png", noise(40, 50)).read_bytes()
    Path("whole.png").rename("bad.png").write_bytes(content[: len(content) // 2])


def palette(folder):
    Image.fromarray(noise(4, 5)).convert("P").save(folder / "bad.png")


def floats(folder):
    np.save(folder / "bad.npy", np.zeros((4, 5)))


def objects(folder):
    np.save(folder / "bad.npy", np.array([{}, None]))


def channels(folder):
    np.save(folder / "bad.npy", noise(4, 5, 6))


BAD_IMAGES = {
    "truncated": (truncated, "expected an image in bad.png, got: .*truncated"),
    "palette": (palette, r"expected a PIL image in mode .* got P; .* \(in bad.png\)"),
    "floats": (floats, r"expected dtype bool, uint8 or uint16, got float64; .* \(in bad.npy\)"),
    "objects": (objects, "expected an image in bad.npy, got: .*allow_pickle"),
    "channels": (channels, r"expected an image with shape .* got \(4, 5, 6\)"),
}


@pytest.mark.parametrize(("make", "sentence"), BAD_IMAGES.values(), ids=list(BAD_IMAGES))
def test_bad_images(run, folder, make, sentence):
    make(folder)
    (name,) = files(folder)

    _, (line,) = run("compress", name, code=1)

    assert re.search(sentence, line), line
    assert files(folder) == [name]


BAD_STREAMS = {
    "foreign": (lambda blob: b"GIF89a", "expected a probnets stream, got foreign bytes"),
    "cut": (lambda blob: blob[:-3], "expected a stream with a matching checksum"),
    "flipped": (lambda blob: blob[:20] + bytes([blob[20] ^ 1]) + blob[21:], "matching checksum"),
    "empty": (lambda blob: b"", "expected a probnets stream"),
}


@pytest.mark.parametrize(("damage", "sentence"), BAD_STREAMS.values(), ids=list(BAD_STREAMS))
def test_bad_streams(run, folder, damage, sentence):
    (folder / "a.pn").write_bytes(damage(compress(noise(9, 9))))

    _, (line,) = run("decompress", "a.pn", code=1)

    assert sentence in line
    assert "(in a.pn)" in line
    assert files(folder) == ["a.pn"]


def test_missing_stream(run, folder):
    _, (line,) = run("decompress", "a.pn", code=1)
    assert "expected to open a.pn, got: No such file" in line

    _, (line,) = run("decompress", ".", code=1)
    assert "expected files in .pn in ., got none" in line


def test_limit(run, folder):
    (folder / "a.pn").write_bytes(compress(noise(9, 9)))

    _, (line,) = run("decompress", "a.pn", "--limit", "80", code=1)

    assert "expected an image of at most 80 numbers" in line
    run("decompress", "a.pn", "--limit", "81")


@pytest.mark.parametrize(("name", "wanted"), [("b.png", ".npy"), ("b.jpg", ".npy"), ("b", ".npy")])
def test_names_suit_what_they_hold(run, folder, name, wanted):
    (folder / "a.pn").write_bytes(compress(noise(9, 9, 2)))

    _, (line,) = run("decompress", "a.pn", "-o", name, code=1)

    assert f"expected a name in {wanted} for uint8 with shape (9, 9, 2), got {name}" in line
    assert files(folder) == ["a.pn"]


def test_batches(run, folder):
    images = smooth(3, 9, 10)
    (folder / "a.pn").write_bytes(compress_batch(images))

    run("decompress", "a.pn")

    assert np.array_equal(np.load("a.npy"), images)


def test_own_model(run, folder, small):
    image = smooth(1, 8, 8)[0]
    save("a.png", image)
    save("b.png", noise(9, 9))

    run("compress", "a.png", "--model", small)
    _, (line,) = run("compress", "b.png", "--model", small, code=1)
    assert "expected an image with shape (8, 8), got (9, 9)" in line

    _, (line,) = run("decompress", "a.png.pn", "-o", "c.png", code=1)
    assert "pass the model that wrote it" in line

    run("decompress", "a.png.pn", "-o", "c.png", "--model", small)
    assert np.array_equal(read_image("c.png"), image)


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_bad_model(run, folder, command):
    save("a.png", noise(4, 5))

    _, (line,) = run(command, "a.png", "--model", "none.safetensors", code=1)
    assert "expected a file of arrays at none.safetensors, got none" in line

    _, (line,) = run(command, "a.png", "--model", "a.png", code=1)
    assert "expected a file that probnets wrote at a.png" in line


# Disks that are full, and folders that are closed


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("old", [None, b"mine"])
def test_full_disk(run, folder, monkeypatch, where, old):
    image = noise(4, 5)
    save("a.png", image)
    if old:
        (folder / "out").write_bytes(old)
    before = files(folder)
    monkeypatch.setattr(where, full)

    _, (line,) = run("compress", "a.png", "-o", "out", "--force", code=1)

    assert line.endswith("expected to write out, got: No space left on device (in a.png)")
    assert files(folder) == before
    assert old is None or (folder / "out").read_bytes() == old


def test_full_disk_in_training(run, folder, monkeypatch):
    np.savez("set.npz", images=smooth(40, 8, 8))
    monkeypatch.setattr("os.fsync", full)

    words = ("--units", 4, "--epochs", 1, "--batch-size", 16)
    _, (line,) = run("train", "set.npz", "-o", "m", *words, code=1)

    assert "expected to write m.checkpoint, got: No space left on device" in line
    assert files(folder) == ["set.npz"]


def test_folder_that_is_a_file(run, folder):
    save("a.png", noise(4, 5))
    before = files(folder)

    _, (line,) = run("compress", "a.png", "-o", "a.png/b", code=1)

    assert "expected to write a.png/b, got: " in line
    assert files(folder) == before


def test_target_that_is_a_folder(run, folder):
    save("a.png", noise(4, 5))
    (folder / "a.png.pn").mkdir()

    _, (line,) = run("compress", "a.png", "--force", code=1)

    assert "expected to write a.png.pn, got: " in line
    assert files(folder) == ["a.png"]


def test_memory_that_is_full(run, folder, monkeypatch):
    save("a.png", noise(4, 5))

    def compress(*_):
        raise MemoryError

    monkeypatch.setattr(cli, "compress", compress)
    _, (line,) = run("compress", "a.png", code=1)

    assert line.endswith("expected more memory, got: none left (in a.png)")


def test_interrupt(folder, monkeypatch, capsys):
    save("a.png", noise(4, 5))

    def compress(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compress", compress)

    assert cli.main(["compress", "a.png"]) == 130
    assert capsys.readouterr().err == "probnets: interrupted\n"
    assert files(folder) == ["a.png"]


# Information


def test_info_on_streams(run, folder, small):
    (folder / "a.pn").write_bytes(blob := compress(noise(9, 10, dtype="uint16")))
    (folder / "b.pn").write_bytes(compress_batch(smooth(3, 8, 8), small))

    out, _ = run("info", "a.pn")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines()[1:-1])
    assert facts["what"] == "image, a stream of version 1"
    assert facts["shape"] == "(9, 10)"
    assert facts["dtype"] == "uint16"
    assert facts["model"] == f"{pretrained().digest.hex()}, shipped with probnets"
    assert facts["bytes"] == f"{len(blob)} of 180"
    assert out.endswith(f"  bits per subpixel   {8 * len(blob) / 90:.4f}\n")

    out, _ = run("info", "b.pn")
    assert "batch, a stream of version 1" in out
    assert f"{ImageModel.load(small).digest.hex()}, another one" in out


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
