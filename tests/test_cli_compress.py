r"""Tests for the probnets.cli.compression module: the commands compress and decompress."""

import errno
import io
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cli_cases import exif, files, noise, profile, runner, save, smooth
from PIL import Image

from probnets import compress, compress_batch, decompress
from probnets.cli import commands
from probnets.cli import compression as cli
from probnets.cli.formats import jpegxl_bytes, png_bytes, png_notes, read_image, webp_bytes
from probnets.coding import Notes, read_notes
from probnets.coding.images import array_and_notes

TILES = Path(cli.__file__).parents[1] / "assets" / "tiles.safetensors"


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


# Formats


KINDS = {
    "mask": ((6, 9), "bool", "png"),
    "grey": ((6, 9), "uint8", "png"),
    "words": ((6, 9), "uint16", "png"),
    "colour": ((6, 9, 3), "uint8", "png"),
    "alpha": ((6, 9, 4), "uint8", "png"),
    "one channel": ((6, 9, 1), "uint8", "npy"),
    "grey and alpha": ((6, 9, 2), "uint8", "png"),
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


def ink(folder):
    Image.fromarray(noise(4, 5)).convert("CMYK").save(folder / "bad.jpg")


def animation(folder):
    frames = [Image.fromarray(image) for image in (noise(4, 5), noise(4, 5)[::-1])]
    frames[0].save(folder / "bad.png", save_all=True, append_images=frames[1:])


def floats(folder):
    np.save(folder / "bad.npy", np.zeros((4, 5)))


def objects(folder):
    np.save(folder / "bad.npy", np.array([{}, None]))


def channels(folder):
    np.save(folder / "bad.npy", noise(4, 5, 6))


BAD_IMAGES = {
    "truncated": (truncated, "expected an image in bad.png, got: .*truncated"),
    "ink": (ink, r"expected a PIL image in mode .* got CMYK; .* \(in bad.jpg\)"),
    "animation": (animation, r"expected a single image, got 2 frames; .* \(in bad.png\)"),
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
    (folder / "a.pn").write_bytes(compress(noise(9, 9, 1)))

    _, (line,) = run("decompress", "a.pn", "-o", name, code=1)

    assert f"expected a name in {wanted} for uint8 with shape (9, 9, 1), got {name}" in line
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

    def compress(*_, **__):
        raise MemoryError

    monkeypatch.setattr(cli, "compress", compress)
    _, (line,) = run("compress", "a.png", code=1)

    assert line.endswith("expected more memory, got: none left (in a.png)")


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace", "compress"])
@pytest.mark.parametrize("names", [["a.png"], ["a.png", "b.png"]], ids=["one", "two"])
def test_interrupt_leaves_no_half_file(folder, monkeypatch, capsys, where, names):
    for name in names:
        save(name, noise(4, 5))
    monkeypatch.setattr(*((cli, where) if where == "compress" else (where,)), interrupt)

    assert commands.main(["compress", *names, "--jobs", "2"]) == 130
    assert capsys.readouterr().err.endswith("probnets: interrupted\n")
    assert files(folder) == names


def test_interrupt_lets_what_is_at_work_end(folder, monkeypatch, capsys):
    names = [f"{n:02}.png" for n in range(30)]
    for name in names:
        save(name, noise(4, 5))
    first, second = threading.Event(), threading.Event()

    def slowly(image, *_, **__):
        if not first.is_set():
            first.set()
            second.wait(10)
            raise KeyboardInterrupt
        second.set()
        return b"done"

    monkeypatch.setattr(cli, "compress", slowly)

    assert commands.main(["compress", *names, "--jobs", "2"]) == 130
    out, err = capsys.readouterr()
    assert err.endswith("probnets: interrupted\n")
    made = [name for name in files(folder) if name.endswith(".pn")]
    assert 1 <= len(made) < 30
    assert [line.split(":")[0] for line in out.splitlines()] == made  # nothing without a word


# Many images


def test_folders_in_parallel(run, folder):
    images = {f"in/{n:02}.png": noise(4 + n, 9, 3) for n in range(20)}
    for name, image in images.items():
        save(name, image)

    for jobs in (1, 4):
        out, _ = run("compress", "in", "-o", f"out{jobs}", "--jobs", jobs)
        said = [line.split(":")[0] for line in out.splitlines()]
        assert said == [f"out{jobs}/{n:02}.png.pn" for n in range(20)] + ["20 images"]
    run("decompress", "out4", "-o", "back", "--jobs", 3)

    for name, image in images.items():
        stem = Path(name).name
        assert Path(f"out1/{stem}.pn").read_bytes() == Path(f"out4/{stem}.pn").read_bytes()
        assert np.array_equal(read_image(f"back/{stem}"), image)


def test_errors_come_in_order(run, folder):
    for n in range(12):
        save(f"{n:02}.png", noise(4, 5))
    for n in (3, 7):
        Path(f"{n:02}.png").write_bytes(b"no image")

    out, lines = run("compress", ".", "--jobs", 4, code=1)

    assert [re.findall(r"\d\d", line)[0] for line in lines] == ["03", "07"]
    assert "10 images: " in out
    assert len([name for name in files(folder) if name.endswith(".pn")]) == 10


def test_summary_beside_png(run, folder, monkeypatch):
    image = smooth(1, 20, 30)[0]
    png = save("a.png", image).stat().st_size
    save("b.npy", image)
    Image.fromarray(image).save("c.bmp")

    out, _ = run("compress", "a.png", "b.npy", "c.bmp")

    made = [Path(f"{name}.pn").stat().st_size for name in ("a.png", "b.npy", "c.bmp")]
    notes = read_notes(Path("c.bmp.pn").read_bytes())
    sizes = [png, *(len(png_bytes(image, n, optimize=False) or b"") for n in (None, notes))]
    last = out.splitlines()[-1]
    assert f"; as PNG {sum(sizes):,} bytes ({100 * sum(made) / sum(sizes):.1f} %)" in last
    assert f"{100 * made[1] / sizes[1]:.1f} % of PNG" in out.splitlines()[1]
    assert "of PNG" not in out.splitlines()[0]

    monkeypatch.setattr(cli, "CHEAP", 100)
    out, _ = run("compress", "a.png", "b.npy", "-o", "out")
    total = png + Path("b.npy").stat().st_size
    assert f"as PNG (source bytes for 1 of them) {total:,} bytes" in out


def test_mode(run, folder):
    save("a.png", noise(4, 5))

    run("compress", "a.png", "--mode", "fast")
    _, (line,) = run("compress", "a.png", "--mode", "slow", "--force", "--model", TILES, code=1)

    assert "expected mode 'fast' for a model of tiles, got 'slow' (in a.png)" in line


# Notes


TAGS = exif()
NOTED = {"icc_profile": profile(), "exif": TAGS, "dpi": (300, 300)}


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.webp"])
def test_notes_come_back(run, folder, name):
    if name.endswith("webp"):
        pytest.importorskip("PIL._webp")
    Image.fromarray(noise(9, 7, 3)).save(name, **NOTED)
    with Image.open(name) as photo:
        photo.load()
    run("compress", name, "-o", "photo.pn")

    run("decompress", "photo.pn", "-o", "back.png")

    with Image.open("back.png") as back:
        back.load()
    assert np.array_equal(np.asarray(back), np.asarray(photo))
    assert back.info["icc_profile"] == photo.info["icc_profile"] == profile()
    assert back.info["exif"] == b"Exif\0\0" + TAGS.removeprefix(b"Exif\0\0")
    assert back.getexif()[0x0112] == 6
    if "dpi" in photo.info:
        assert back.info["dpi"] == pytest.approx((300, 300), abs=0.01)


def test_all_png_notes_come_back(run, folder):
    notes = Notes(
        profile=b"",
        xmp=b"<x:xmpmeta/>\xff",
        gamma=0.45455,
        chromaticity=(0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06),
        intent=2,
        dpi=(11811 * 0.0254, 5906 * 0.0254),
        text=(("Author", "Ä"), ("Title", "猫")),
    )
    Path("a.png").write_bytes(png_bytes(noise(4, 5), notes) or b"")

    run("compress", "a.png")
    run("decompress", "a.png.pn", "-o", "b.png")

    assert read_notes(Path("a.png.pn").read_bytes()) == notes
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_png_leaves_out_what_it_cannot_hold(run, folder):
    keys = ("ключ", "k" * 80, " k", "a\nb", "\x80", "Title", "k" * 79, "Größe")
    notes = Notes(dpi=(1e300, 72.0), text=tuple((key, "t") for key in keys))
    (folder / "a.pn").write_bytes(compress(noise(4, 5), notes=notes))

    _, (line,) = run("decompress", "a.pn", warnings=1)

    assert line == (
        "probnets: warning: expected notes that PNG can hold, got more that stay in the stream: "
        f"dots per inch, text ключ, text {'k' * 60}..., text k, text a b, text (in a.pn)"
    )
    _, found = array_and_notes("a.png")
    assert found == Notes(text=notes.text[5:])
    assert read_notes(Path("a.pn").read_bytes()) == notes


@pytest.mark.parametrize("dpi", [5e-324, 0.0254, (2**31 - 1) * 0.0254, 1e308])
def test_png_holds_whole_dots_per_metre(dpi):
    notes, others = png_notes(Notes(dpi=(dpi, dpi)))
    content = png_bytes(noise(4, 5), notes)

    assert content is not None
    assert (b"pHYs" in content) == (not others)
    assert bool(others) == (dpi in (5e-324, 1e308, (2**31 - 1) * 0.0254))


def test_72_dots_per_inch(run, folder):
    (folder / "a.pn").write_bytes(compress(noise(4, 5), notes=Notes(dpi=(72.0, 72.0))))

    run("decompress", "a.pn")

    assert array_and_notes("a.png")[1].dpi == pytest.approx((72.009, 72.009))


def test_arrays_hold_no_notes(run, folder):
    blob = compress(noise(4, 5), notes=Notes(profile=profile()))
    (folder / "a.pn").write_bytes(blob)

    _, (line,) = run("decompress", "a.pn", "-o", "a.npy", warnings=1)

    assert line == (
        "probnets: warning: expected a PNG file to keep notes, got a.npy: it holds the pixels "
        "alone (in a.pn)"
    )


@pytest.mark.parametrize("jobs", [1, 4])
def test_warnings_are_told(run, folder, jobs):
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(noise(4, 5)).convert("P").save(name)
    save("d.png", noise(4, 5))

    _, lines = run("compress", ".", "--jobs", jobs, warnings=3)

    sentence = "expected pixels, got a palette; its colours are kept as RGB, exactly, but not it"
    assert lines == [f"probnets: warning: {sentence} (in {name}.png)" for name in "abc"]
