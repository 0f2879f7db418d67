r"""Tests for the probnets.coding.images module."""

import zlib
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from probnets.coding import ImageWarning
from probnets.coding.images import (
    array_and_notes,
    as_array,
    group_widths,
    join_planes,
    split_planes,
)

DTYPES = ["bool", "uint8", "uint16"]
SIDES = st.integers(1, 7)
SHAPES = st.tuples(SIDES, SIDES) | st.tuples(SIDES, SIDES, st.integers(1, 4))
ARRAYS = hnp.arrays(st.sampled_from(DTYPES), SHAPES)


def pattern(mode, size=(5, 3)):
    """Returns a PIL image with many different values."""
    width, height = size
    if mode in ("I;16", "I;16B"):
        dtype = "<u2" if mode == "I;16" else ">u2"
        words = (np.arange(height * width) * 4001 % 65536).astype(dtype)
        return Image.frombytes(mode, size, words.tobytes())
    data = bytes(i * 37 % 256 for i in range(height * width * 4))
    img = Image.frombytes("RGBA", size, data)
    return img if mode == "RGBA" else img.convert("RGB").convert(mode)


def png_chunk(kind, data):
    body = kind + data
    return len(data).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)


def write_deep_png(path, color_type, channels):
    """Writes a PNG of one pixel with 16-bit channels, which PIL cannot write."""
    header = bytes([0, 0, 0, 1, 0, 0, 0, 1, 16, color_type, 0, 0, 0])
    pixel = zlib.compress(bytes(1 + 2 * channels))
    chunks = [(b"IHDR", header), (b"IDAT", pixel), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))


@pytest.mark.parametrize(
    ("shape", "dtype", "widths"),
    [
        ((2, 3), "bool", [1]),
        ((2, 3), "uint8", [1]),
        ((2, 3), "uint16", [1, 1]),
        ((2, 3, 1), "uint8", [1]),
        ((2, 3, 2), "uint8", [1, 1]),
        ((2, 3, 3), "uint8", [3]),
        ((2, 3, 4), "uint8", [3, 1]),
        ((2, 3, 3), "bool", [1, 1, 1]),
        ((2, 3, 3), "uint16", [3, 1, 1, 1]),
        ((2, 3, 4), "uint16", [3, 1, 1, 1, 1, 1]),
    ],
)
def test_widths_by_hand(shape, dtype, widths):
    assert group_widths(shape, dtype) == widths


def test_words_by_hand():
    groups = split_planes(np.array([[[0x0102, 0x0304, 0x0506]]], dtype=np.uint16))

    assert [group.tolist() for group in groups] == [
        [[[1, 3, 5]]],
        [[[2]]],
        [[[4]]],
        [[[6]]],
    ]


@given(array=ARRAYS)
def test_planes_round_trip(array):
    groups = split_planes(array)
    widths = group_widths(array.shape, array.dtype)
    assert all(group.dtype == np.uint8 for group in groups)
    assert [group.shape for group in groups] == [(*array.shape[:2], c) for c in widths]

    joined = join_planes(groups, array.shape, array.dtype)
    assert joined.dtype == array.dtype
    np.testing.assert_array_equal(joined, array, strict=True)


@given(array=ARRAYS)
@settings(max_examples=30)
def test_arrays_and_tensors_agree(array):
    tensor = torch.from_numpy(array)
    strided = np.repeat(array, 2, axis=1)[:, ::2]

    for img in (array, strided, np.asfortranarray(array), tensor, torch.from_numpy(strided)):
        result = as_array(img)
        assert result.flags.c_contiguous
        np.testing.assert_array_equal(result, array, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_nothing_needlessly(dtype):
    array = np.ones((4, 5, 4), dtype=dtype)

    assert np.shares_memory(as_array(array), array)
    assert np.shares_memory(as_array(torch.from_numpy(array)), array)
    shared = [np.shares_memory(group, array) for group in split_planes(array)]
    assert all(shared) == (dtype != "uint16")


@pytest.mark.parametrize("order", ["<", ">"])
def test_byte_order_is_native(order):
    array = np.array([[1, 258], [3, 65535]], dtype=f"{order}u2")
    result = as_array(array)

    assert result.dtype == np.dtype(np.uint16)
    assert result.dtype.isnative
    np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize(
    ("mode", "dtype", "shape"),
    [
        ("1", "bool", (3, 5)),
        ("L", "uint8", (3, 5)),
        ("LA", "uint8", (3, 5, 2)),
        ("RGB", "uint8", (3, 5, 3)),
        ("RGBA", "uint8", (3, 5, 4)),
        ("I;16", "uint16", (3, 5)),
        ("I;16B", "uint16", (3, 5)),
    ],
)
def test_pil_modes(mode, dtype, shape, tmp_path):
    img = pattern(mode)
    array = as_array(img)

    assert (array.dtype, array.shape) == (np.dtype(dtype), shape)
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, np.asarray(img))
    assert len(np.unique(array)) > 1

    path = tmp_path / "img.tiff"
    img.save(path)
    for name in (path, str(path)):
        np.testing.assert_array_equal(as_array(name), array, strict=True)


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [
        ("CMYK", r"img\.convert\('RGB'\)"),
        ("YCbCr", r"img\.convert\('RGB'\)"),
        ("LAB", r"img\.convert\('RGB'\)"),
        ("RGBa", r"img\.convert\('RGBA'\)"),
        ("I", r"np\.asarray\(img\)\.astype\(np\.uint16\)"),
        ("F", r"np\.asarray\(img\)\.round\(\)\.astype\(np\.uint16\)"),
    ],
)
def test_rejects_pil_modes(mode, remedy):
    img = Image.new(mode, (5, 3))
    sentence = rf"in mode 1, L, LA, P, PA, RGB, RGBA or I;16, got {mode}; convert it with {remedy}"
    with pytest.raises(ValueError, match=sentence):
        as_array(img)


# Palettes and transparent colours


def png_of(path, colour_type, depth, rows, **chunks):
    """Writes a PNG with rows of packed bytes, and chunks that PIL would not write."""
    size = (chunks.pop("width", 4), len(rows))
    header = b"".join(n.to_bytes(4) for n in size) + bytes([depth, colour_type, 0, 0, 0])
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    named = [(name.encode(), bytes(data)) for name, data in chunks.items()]
    parts = [(b"IHDR", header), *named, (b"IDAT", data), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts))
    return path


COLOURS = np.array([[9, 8, 7], [255, 0, 1], [0, 0, 0], [4, 5, 6]], dtype=np.uint8)
INDEX = np.array([[0, 1, 2, 3], [3, 3, 0, 1]], dtype=np.uint8)


@pytest.mark.parametrize("alpha", [None, [0], [0, 128], [7, 6, 5, 4]], ids=str)
def test_palettes_are_exact(alpha, tmp_path):
    more = {} if alpha is None else {"tRNS": alpha}
    path = png_of(tmp_path / "a.png", 3, 8, INDEX, PLTE=COLOURS.ravel(), **more)

    with pytest.warns(ImageWarning, match="expected pixels, got a palette; its colours are kept"):
        array = as_array(path)

    expected = COLOURS[INDEX]
    if alpha is not None:
        table = np.array([*alpha, *[255] * (4 - len(alpha))], dtype=np.uint8)
        expected = np.dstack([expected, table[INDEX]])  # colours below clear pixels stay
    np.testing.assert_array_equal(array, expected, strict=True)


def test_palettes_in_memory():
    img = Image.frombytes("P", (4, 2), INDEX.tobytes())
    img.putpalette(COLOURS.tobytes())
    faded = img.convert("PA")
    faded.putalpha(Image.fromarray(np.full((2, 4), 77, dtype=np.uint8)))

    with pytest.warns(ImageWarning, match="kept as RGB,"):
        np.testing.assert_array_equal(as_array(img), COLOURS[INDEX])
    with pytest.warns(ImageWarning, match="kept as RGBA,"):
        array = as_array(faded)
    np.testing.assert_array_equal(array[..., :3], COLOURS[INDEX])
    assert (array[..., 3] == 77).all()


GREYS = {1: [[0b01100000]], 2: [[0b00011011]], 4: [[0x01, 0x9F]], 8: [[0, 1, 9, 255]]}
DECODED = {1: [0, 255, 255, 0], 2: [0, 85, 170, 255], 4: [0, 17, 153, 255], 8: [0, 1, 9, 255]}


@pytest.mark.parametrize("depth", GREYS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_transparent_greys_are_exact(depth, place, tmp_path):
    key = DECODED[depth][place] * (2**depth - 1) // 255
    path = png_of(tmp_path / "a.png", 0, depth, GREYS[depth], tRNS=[0, key])

    with pytest.warns(ImageWarning, match="got a transparent colour; it is kept as alpha"):
        array = as_array(path)

    grey = np.array([DECODED[depth]], dtype=np.uint8)
    clear = np.where(grey == DECODED[depth][place], 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(array, np.dstack([grey, grey, grey, clear]), strict=True)


def test_transparent_colours_are_exact(tmp_path):
    rows = [[9, 8, 7, 9, 8, 6, 9, 8, 7, 0, 0, 0]]
    path = png_of(tmp_path / "a.png", 2, 8, rows, tRNS=[0, 9, 0, 8, 0, 7])

    with pytest.warns(ImageWarning, match="transparent colour"):
        array = as_array(path)

    np.testing.assert_array_equal(array[..., :3], np.reshape(rows, (1, 4, 3)))
    assert array[..., 3].tolist() == [[0, 255, 0, 255]]


@pytest.mark.parametrize(("mode", "key"), [("I;16", 5), ("L", 256), ("L", b"\0"), ("RGB", (1, 2))])
def test_rejects_transparent_colours_that_are_none(mode, key):
    img = pattern(mode)
    img.info["transparency"] = key

    with pytest.raises(ValueError, match=r"a transparent colour of eight bits, got .*; drop it"):
        as_array(img)


# What is refused


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff"])
def test_rejects_animations(suffix, tmp_path):
    path = tmp_path / f"img.{suffix}"
    frames = [pattern("RGB"), pattern("RGB").rotate(180)]
    frames[0].save(path, save_all=True, append_images=frames[1:])

    with pytest.raises(ValueError, match=r"expected a single image, got 2 frames; pick one"):
        as_array(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_turned_images_stay_as_they_are(suffix, tmp_path):
    path = tmp_path / f"img.{suffix}"
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        pattern("RGB").save(path, exif=exif)

        array, notes = array_and_notes(path)
        with Image.open(path) as img:
            np.testing.assert_array_equal(array, np.asarray(img))
        if suffix == "tiff":  # PIL turns it upright
            assert notes.orientation == 1
            assert array.shape == ((3, 5, 3) if orientation < 5 else (5, 3, 3))
        else:
            assert notes.orientation == orientation
            assert array.shape == (3, 5, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "I;16"])
def test_one_pixel(mode, tmp_path):
    path = tmp_path / "img.png"
    Image.new(mode, (1, 1)).save(path)

    array = as_array(path)

    assert array.shape[:2] == (1, 1)
    assert not array.any()


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_rejects_files_that_pil_would_cut(color_type, channels, tmp_path):
    path = tmp_path / "img.png"
    write_deep_png(path, color_type, channels)
    with pytest.raises(ValueError, match=r"more than eight bits per colour"):
        as_array(path)


def test_rejects_deep_ppm(tmp_path):
    path = tmp_path / "img.ppm"
    path.write_bytes(b"P6 1 1 65535\n" + bytes(6))
    with pytest.raises(ValueError, match=r"expected a file that PIL reads in full"):
        as_array(path)

    path.write_bytes(b"P6 1 1 255\n" + bytes([1, 2, 3]))
    assert as_array(path).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize(
    ("suffix", "head", "place", "flip"),
    [("jp2", b"\xff\x4f\xff\x51", 42, 7 ^ 15), ("avif", b"av1C", 6, 64)],
)
def test_rejects_deep_heads(suffix, head, place, flip, tmp_path):
    path = tmp_path / f"img.{suffix}"
    try:
        pattern("RGB", (64, 64)).save(path)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"needs Pillow with {suffix}")
    assert as_array(path).shape == (64, 64, 3)

    content = bytearray(path.read_bytes())
    content[content.index(head) + place] ^= flip
    if suffix == "avif":  # which states its depth twice
        start = content.index(b"pixi") + 9
        content[start : start + 3] = bytes([10, 10, 10])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"more than eight bits per colour"):
        as_array(path)


def test_takes_colours_of_five_bits(tmp_path):
    path = tmp_path / "img.bmp"  # of 16 bits a pixel, 5 6 5, which PIL keeps in full
    words = np.array([0xF800, 0x07E0, 0x001F, 0x0000], dtype="<u2").tobytes()
    masks = b"".join(n.to_bytes(4, "little") for n in (0xF800, 0x07E0, 0x001F))
    head = b"".join(n.to_bytes(4, "little") for n in (40, 4, 1)) + b"\1\0\x10\0"
    head += b"".join(n.to_bytes(4, "little") for n in (3, 8, 2835, 2835, 0, 0))
    start = 14 + len(head) + 12
    file = b"BM" + (start + 8).to_bytes(4, "little") + bytes(4) + start.to_bytes(4, "little")
    path.write_bytes(file + head + masks + words)

    primaries = [[[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]]
    assert as_array(path).tolist() == primaries


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int32", "int64"])
def test_rejects_dtypes(dtype):
    floating = dtype.startswith("float")
    remedy = r"\(255 \* img\)\.round\(\)" if floating else "img"
    message = rf"expected dtype bool, uint8 or uint16, got .*{dtype}; convert with {remedy}\."

    with pytest.raises(TypeError, match=message + r"astype\(np\.uint8\)"):
        as_array(np.zeros((2, 2), dtype=dtype))
    with pytest.raises(TypeError, match=message + r"to\(torch\.uint8\)"):
        as_array(torch.zeros(2, 2, dtype=getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), r"shape \(H, W\) or \(H, W, C\), got \(\)"),
        ((4,), r"shape \(H, W\) or \(H, W, C\), got \(4,\)"),
        ((1, 2, 3, 4), r"shape \(H, W\) or \(H, W, C\), got \(1, 2, 3, 4\)"),
        ((0, 4), r"at least one pixel, got shape \(0, 4\)"),
        ((4, 4, 0), r"at least one pixel, got shape \(4, 4, 0\)"),
        ((3, 6, 8), r"C is at most 4, got \(3, 6, 8\); if channels come first, move"),
    ],
)
def test_rejects_shapes(shape, message):
    for img in (np.zeros(shape, dtype=np.uint8), torch.zeros(shape, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=message):
            as_array(img)
    with pytest.raises(ValueError, match=message):
        group_widths(shape, np.uint8)


def test_rejects_other_objects(tmp_path):
    with pytest.raises(TypeError, match=r"a PIL image or a path, got list"):
        as_array([[1, 2], [3, 4]])  # pyright: ignore[reportArgumentType]
    for take in (as_array, array_and_notes):
        for path in ("no-such.png", Path("no-such.png")):
            with pytest.raises(FileNotFoundError, match=r"expected an image at no-such\.png"):
                take(path)
        with pytest.raises(FileNotFoundError, match=r"expected an image at .*, got no file"):
            take(tmp_path)


@pytest.mark.parametrize("mask", [np.ma.nomask, [[True, False]]], ids=str)
def test_rejects_masks(mask):
    img = np.ma.array(np.zeros((1, 2), dtype=np.uint8), mask=mask)

    with pytest.raises(TypeError, match=r"without a mask, got a masked one; fill it with"):
        as_array(img)
    assert as_array(img.filled(0)).shape == as_array(img.data).shape == (1, 2)


def test_join_rejects_other_groups():
    groups = split_planes(np.zeros((2, 3, 4), dtype=np.uint8))

    with pytest.raises(ValueError, match=r"expected groups with shapes .*\(2, 3, 1\)\], got"):
        join_planes(groups[::-1], (2, 3, 4), np.uint8)
    with pytest.raises(ValueError, match=r"expected groups with shapes"):
        join_planes(groups[:1], (2, 3, 4), np.uint8)
    with pytest.raises(TypeError, match=r"expected groups of uint8, got .*int16"):
        join_planes([group.astype(np.int16) for group in groups], (2, 3, 4), np.uint8)
    with pytest.raises(ValueError, match=r"expected a boolean image of 0 and 1, got 2"):
        join_planes([np.full((2, 3, 1), 2, dtype=np.uint8)], (2, 3), np.bool_)


@pytest.mark.gpu
def test_tensor_on_gpu():
    tensor = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(as_array(tensor.cuda()), tensor.numpy(), strict=True)
