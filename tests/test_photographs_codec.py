r"""Tests for the payload of photographs: cells, levels and planes."""

import tracemalloc
from collections import Counter
from contextlib import contextmanager
from importlib import resources
from typing import get_args

import hypothesis.strategies as st
import numpy as np
import pytest
from coding_cases import picture
from hypothesis import assume, example, given, settings
from numpy.testing import assert_array_equal
from numpy.typing import DTypeLike

from probnets.coding import (
    PhotographModel,
    StreamError,
    code_lengths,
    compress,
    compress_batch,
    decompress,
    decompress_batch,
    pretrained,
)
from probnets.coding import cells as parts_of_images
from probnets.coding.cells import cells, each, overlap, touches
from probnets.coding.images import as_array
from probnets.coding.photographs import codec, reference
from probnets.coding.photographs.codec import (
    decode_photograph,
    encode_photograph,
    photograph_lengths,
    photograph_parts,
)
from probnets.coding.photographs.kernel import ENCODE, MARGIN, Buffers, Record
from probnets.coding.photographs.layout import PLACES
from probnets.coding.photographs.levels import pack_levels, unpack_levels, used_levels
from probnets.coding.photographs.model import Mode, Settings
from probnets.coding.photographs.planes import (
    colour_planes,
    contexts,
    decode_planes,
    encode_planes,
    measure_planes,
    residuals,
    restore,
)
from probnets.coding.photographs.repeats import enlarge, repetition
from probnets.coding.photographs.tables import tables
from probnets.coding.rangecoder import RangeEncoder
from probnets.coding.stream import Header, Reader, open_stream, seal, varint
from probnets.data import image_folder

MODES = get_args(Mode)
SIZES = [(1, 1), (1, 9), (7, 1), (13, 17)]
CHANNELS = [(), (1,), (2,), (3,), (4,)]
FIT = Settings().fit("fast")


def model():
    found = pretrained()
    assert isinstance(found, PhotographModel)
    return found


def noise(shape, dtype: DTypeLike = np.uint8, seed=0):
    values = np.random.default_rng(seed).integers(0, 2**16, shape)
    return values % 2 == 1 if dtype == np.bool_ else values.astype(dtype)


def assert_same(found, image):
    assert_array_equal(found, image, strict=True)


def encoded(image, **options):
    return encode_photograph(model(), image, **options)


def decoded(payload, image, **options):
    r"""Decodes the payload of an image of this shape and dtype."""
    return decode_photograph(model(), image.shape, image.dtype, Reader(payload), **options)


def parts(payload, image):
    return photograph_parts(image.shape, image.dtype, Reader(payload))


@contextmanager
def memory(most):
    r"""Holds what runs within to so many bytes of memory."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most


@pytest.fixture
def small_cells(monkeypatch):
    r"""Makes cells of about 96 pixels, with at least 4 rows and at most 16 columns."""
    for name, value in {"_PIXELS": 96, "_ROWS": 4, "_COLUMNS": 16}.items():
        monkeypatch.setattr(parts_of_images, name, value)


@pytest.fixture
def decodes(monkeypatch):
    r"""Returns the shapes of planes that are decoded while the test runs."""
    shapes = []

    def spy(model, stream, shape, **options):
        shapes.append(shape)
        return decode_planes(model, stream, shape, **options)

    monkeypatch.setattr(codec, "decode_planes", spy)
    return shapes


# Images


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16])
@pytest.mark.parametrize("channels", CHANNELS)
def test_images_of_every_kind(channels, dtype, mode):
    for size in SIZES:
        for image in (picture((*size, *channels), dtype), noise((*size, *channels), dtype)):
            assert_same(decompress(compress(image, mode=mode)), image)


def test_the_model_stays_as_it_was():
    image = picture((20, 30, 3), np.uint8)
    first = [compress(image, mode=mode) for mode in MODES]
    assert [compress(image, mode=mode) for mode in MODES] == first


@pytest.mark.parametrize("value", ["least", "largest"])
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16])
def test_extremes(dtype, value):
    for channels in CHANNELS:
        image = np.zeros((40, 24, *channels)).astype(dtype)
        if value == "largest":
            image = ~image
        assert_same(decompress(compress(image)), image)
        image[::2, ::3] = ~image[::2, ::3]
        image[5, 5] = ~image[5, 5]
        assert_same(decompress(compress(image, mode="slow")), image)


@given(
    st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 4)),
    st.sampled_from([np.bool_, np.uint8, np.uint16]),
    st.sampled_from(MODES),
    st.integers(0, 99),
    st.integers(0, 16),
)
@settings(max_examples=25)
def test_images_of_any_size(shape, dtype, mode, seed, fewer):
    image = noise(shape, dtype, seed)
    if dtype != np.bool_:
        image = image >> fewer % (8 * image.itemsize)  # fewer and fewer levels
    assert_same(decoded(encoded(image, mode=mode), image), image)


def test_modes_differ_and_are_recorded():
    image = picture((60, 50, 3), np.uint8)
    fast, slow = (encoded(image, mode=mode) for mode in MODES)
    assert fast[1:] != slow[1:]
    assert parts(fast, image) == ("fast", [len(fast) - 3])
    assert parts(slow, image) == ("slow", [len(slow) - 3])

    # One is not the other.
    for payload in (fast, slow):
        with pytest.raises(StreamError, match="decodes to something else"):
            decoded(bytes([payload[0] ^ 1]) + payload[1:], image)


def test_slow_mode_adapts():
    # Stripes that no photograph has cost less and less.
    image = np.tile(np.array([[0, 255, 40, 7], [9, 130, 200, 8]], np.uint8), (75, 12))
    fast, slow = (photograph_lengths(model(), image, mode=mode)[..., 0] for mode in MODES)
    assert_array_equal(fast[0, 0], slow[0, 0])
    assert slow[-50:].mean() < 0.9 * fast[-50:].mean()


def test_photographs_shrink():
    with resources.as_file(resources.files("probnets") / "assets" / "chelsea.png") as path:
        image = as_array(path)
    blob = compress(image)
    assert len(blob) < 140_000 < 0.35 * image.nbytes
    assert_same(decompress(blob), image)


def test_noise_is_stored():
    for dtype in (np.uint8, np.uint16):
        for image in (noise((64, 64, 4), dtype), noise((30, 9), dtype)):
            payload, own = encoded(image), parts(encoded(image), image)[1]
            assert sum(own) == image.nbytes
            assert len(payload) <= image.nbytes + 8
            assert_same(decoded(payload, image), image)
            assert_array_equal(photograph_lengths(model(), image), 8 * image.itemsize)
    masks = noise((64, 64, 4), np.bool_)
    assert len(encoded(masks)) < 1.25 * masks.size / 8


@pytest.mark.usefixtures("small_cells")
def test_some_parts_are_stored():
    image = picture((23, 37, 4), np.uint8)
    image[:10, :20] = noise((10, 20, 4))
    payload = encoded(image)
    _, sizes = parts(payload, image)
    stored = sum(
        size == (rows.stop - rows.start) * (columns.stop - columns.start) * channels
        for size, ((rows, columns), channels) in zip(
            sizes, ((cell, n) for cell in cells(23, 37) for n in (3, 1)), strict=True
        )
    )
    assert 2 <= stored < len(sizes)
    assert_same(decoded(payload, image), image)
    assert_same(decoded(payload, image, region=(slice(3, 9), slice(9, 30))), image[3:9, 9:30])


def test_stored_numbers_have_their_bounds():
    # Those of a mask, and of an image of few levels.
    mask = np.zeros((2, 3), np.bool_)
    found = decoded(b"\0\6" + bytes([0, 1, 1, 0, 0, 1]), mask)
    assert_same(found, np.array([[0, 1, 1], [0, 0, 1]], np.bool_))
    with pytest.raises(StreamError, match="expected values up to 1, got 2"):
        decoded(b"\0\6" + bytes([0, 1, 1, 0, 0, 2]), mask)

    level = pack_levels(np.array([3, 9, 250]))
    grey = np.zeros((2, 2), np.uint8)
    payload = b"\2" + varint(len(level)) + level + b"\4"
    assert decoded(payload + bytes([0, 1, 2, 0]), grey).tolist() == [[3, 9], [250, 3]]
    with pytest.raises(StreamError, match="expected values up to 2, got 3"):
        decoded(payload + bytes([0, 1, 3, 0]), grey)


def test_stored_numbers_are_little_endian():
    deep = decoded(b"\0\4" + bytes([1, 0, 2, 3]), np.zeros((1, 2), np.uint16))
    assert deep.tolist() == [[1, 0x0302]]


def test_batches():
    images = np.stack([picture((9, 11, 3), np.uint8, seed) for seed in range(4)])
    for mode in MODES:
        blob = compress_batch(images, mode=mode)
        assert compress_batch(list(images), mode=mode, chained=False, workers=2) == blob
        assert_same(decompress_batch(blob), images)
        for select in (slice(1, 3), slice(2, 2), slice(-1, None)):
            assert_same(decompress_batch(blob, select=select), images[select])
        for image in images:
            assert encoded(image, mode=mode) in blob


# Cells


@given(
    height=st.integers(1, 1 << 20),
    width=st.integers(1, 1 << 20),
    pixels=st.integers(1, 1 << 20),
    rows=st.integers(1, 1 << 8),
    columns=st.integers(1, 1 << 14),
)
@example(height=1, width=1, pixels=1, rows=1, columns=1)
@example(height=540, width=860, pixels=1 << 18, rows=64, columns=1 << 13)
@example(height=1 << 20, width=1, pixels=1 << 18, rows=64, columns=1 << 13)
@example(height=1, width=1 << 20, pixels=1 << 18, rows=64, columns=1 << 13)
@settings(max_examples=200)
def test_cells_cover_each_pixel_once(height, width, pixels, rows, columns):
    assume(height * width < 200 * min(pixels, rows * columns))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_PIXELS": pixels, "_ROWS": rows, "_COLUMNS": columns}.items():
            patch.setattr(parts_of_images, name, value)
        found = cells(height, width)

    down, across = (list(dict.fromkeys(part)) for part in zip(*map(ends, found), strict=True))
    assert [ends(cell) for cell in found] == [(r, c) for r in down for c in across]
    for lines, size in ((down, height), (across, width)):
        assert [a for a, _ in lines] == [0, *(b for _, b in lines[:-1])]
        assert lines[-1][1] == size
        sizes = [b - a for a, b in lines]
        assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1

    tallest, widest = (max(b - a for a, b in lines) for lines in (down, across))
    assert widest <= columns
    assert (tallest - 1) * widest <= 1.5 * pixels or tallest <= 2 * rows
    assert len(down) == 1 or tallest >= rows


def ends(cell):
    rows, columns = cell
    return (rows.start, rows.stop), (columns.start, columns.stop)


def test_cells_by_hand():
    assert cells(1, 1) == [(slice(0, 1), slice(0, 1))]
    assert len(cells(512, 512)) == 1
    assert len(cells(1024, 1024)) == 4
    assert [c.stop - c.start for _, c in cells(64, 20_000)] == [6666, 6667, 6667]
    assert [r.stop - r.start for r, _ in cells(200, 8192)] == [66, 67, 67]  # no less than 64


@given(st.lists(st.integers(0, 6), min_size=8, max_size=8))
def test_overlap_by_definition(ends):
    boxes = [(ends[i], ends[i] + 1 + ends[i + 1]) for i in range(0, 8, 2)]
    cell, region = ((slice(*a), slice(*b)) for a, b in (boxes[:2], boxes[2:]))
    numbers = np.arange(400).reshape(20, 20)
    shared = np.intersect1d(numbers[cell], numbers[region])

    assert touches(cell, region) == touches(region, cell) == bool(shared.size)
    if touches(cell, region):
        here, there = overlap(cell, region)
        assert_array_equal(numbers[cell][here], numbers[region][there])
        assert_array_equal(numbers[cell][here].ravel(), shared)


@pytest.mark.parametrize("workers", [1, 2, 9, None])
def test_each(workers):
    assert each(lambda n: n * n, range(20), workers) == [n * n for n in range(20)]
    assert each(lambda n: n * n, [], workers) == []
    with pytest.raises(ZeroDivisionError):
        each(lambda n: 1 // n, [1, 0, 1], workers)


@pytest.mark.parametrize("workers", [0, -1])
def test_rejects_workers(workers):
    image = picture((9, 8), np.uint8)
    payload = encoded(image)
    for work in (encoded, lambda img, **more: decoded(payload, img, **more)):
        with pytest.raises(ValueError, match=f"expected one worker or more, got {workers}"):
            work(image, workers=workers)


@pytest.mark.usefixtures("small_cells")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_many_cells(channels, mode):
    image = picture((23, 37, *channels), np.uint8)
    payload = encoded(image, mode=mode, workers=1)
    assert len(cells(23, 37)) == 3 * 3

    groups = {(): 1, (1,): 1, (2,): 2, (3,): 1, (4,): 2}[channels]
    told, sizes = parts(payload, image)
    assert (told, len(sizes)) == (mode, 9 * groups)
    assert sum(sizes) < len(payload) <= sum(sizes) + 1 + 2 * len(sizes)

    for workers in (1, 2, 5, None):
        assert encoded(image, mode=mode, workers=workers) == payload
        assert_same(decoded(payload, image, workers=workers), image)
        lengths = photograph_lengths(model(), image, mode=mode, workers=workers)
        assert_array_equal(lengths, photograph_lengths(model(), image, mode=mode, workers=1))


@pytest.mark.usefixtures("small_cells")
def test_cells_are_coded_apart():
    image = picture((23, 37, 3), np.uint8)
    _, sizes = parts(whole := encoded(image), image)
    found = b""
    for cell in cells(23, 37):
        planes = colour_planes(image[cell])
        found += encode_planes(model(), planes, top=255)
    assert whole.endswith(found)
    assert sum(sizes) == len(found)


# Regions


REGIONS = {  # of an image of 23 x 37 pixels; its cells begin at 0, 7, 15 and at 0, 12, 24
    "all": (slice(None), slice(None)),
    "a cell": (slice(7, 15), slice(12, 24)),
    "a pixel": (slice(9, 10), slice(13, 14)),
    "the first pixel": (slice(1), slice(1)),
    "the last pixel": (slice(-1, None), slice(-1, None)),
    "inside of a cell": (slice(9, 12), slice(26, 30)),
    "across a line": (slice(5, 9), slice(2, 10)),
    "across a column": (slice(1, 3), slice(9, 13)),
    "around a corner": (slice(6, 8), slice(23, 25)),
    "up to a border": (slice(3, 7), slice(0, 12)),
    "from a border": (slice(15, 20), slice(24, 30)),
    "a line": (slice(14, 15), slice(None)),
    "a column": (slice(None), slice(36, 37)),
    "beyond the end": (slice(-5, 99), slice(30, 99)),
}


@pytest.mark.usefixtures("small_cells")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REGIONS)
def test_regions(name, mode, decodes):
    region = REGIONS[name]
    for image in (
        picture((23, 37), np.uint16),
        picture((23, 37, 4), np.uint8),
        picture((23, 37, 2), np.uint8) // 64 * 64,  # few levels
    ):
        blob = compress(image, mode=mode)
        decodes.clear()
        assert_same(decompress(blob, region=region), image[region])

        # Only the cells that it touches are decoded, each of their groups once.
        rows, columns = (set(range(n)[own]) for n, own in zip((23, 37), region, strict=True))
        touched = [
            (r.stop - r.start, c.stop - c.start)
            for r, c in cells(23, 37)
            if rows & set(range(r.start, r.stop)) and columns & set(range(c.start, c.stop))
        ]
        widths = {2: [1], 3: [1, 1], 4: [3, 1]}[len(image.shape) + (image.shape[2:] == (4,))]
        assert Counter(decodes) == Counter((w, *cell) for cell in touched for w in widths)


@pytest.mark.usefixtures("small_cells")
@given(st.data())
@settings(max_examples=40)
def test_any_region(data):
    image = picture((23, 37, 3), np.uint8)
    region = tuple(
        slice(*sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))))
        for n in image.shape[:2]
    )
    assert_same(decoded(encoded(image), image, region=region), image[region])


def test_regions_of_other_models_are_crops():
    image = picture((23, 37, 3), np.uint8)
    for name in ("tiles", "tree"):
        blob = compress(image, pretrained(name))
        region = (slice(5, 9), slice(-7, None))
        assert_same(decompress(blob, region=region), image[region])


@pytest.mark.parametrize(
    ("region", "error", "message"),
    [
        ((slice(0, 5, 2), slice(None)), ValueError, "a step of 2"),
        ((slice(None, None, -1), slice(None)), ValueError, "a step of -1"),
        ((slice(3, 3), slice(None)), ValueError, r"expected a region within shape \(9, 8, 3\)"),
        ((slice(None), slice(8, 20)), ValueError, "expected a region within shape"),
        ((slice(5, 2), slice(None)), ValueError, "expected a region within shape"),
        ((slice(None),), ValueError, "expected two slices of an image"),
        ((slice(None),) * 3, ValueError, "expected two slices of an image"),
        (slice(None), ValueError, "expected two slices of an image"),
        ((0, 0), TypeError, "expected a slice of the images, got int"),
    ],
)
def test_rejects_regions(region, error, message):
    blob = compress(picture((9, 8, 3), np.uint8))
    with pytest.raises(error, match=message):
        decompress(blob, region=region)


# Code lengths


@pytest.mark.usefixtures("small_cells")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16])
@pytest.mark.parametrize("channels", CHANNELS)
def test_lengths_sum_to_the_size(channels, dtype, mode):
    image = picture((23, 37, *channels), dtype)
    bits = photograph_lengths(model(), image, mode=mode)

    assert bits.shape == (23, 37, *(channels or (1,)))
    assert bits.dtype == np.float64
    assert bits.min() >= 0
    _, sizes = parts(encoded(image, mode=mode), image)
    assert bits.sum() / 8 - 4 * len(sizes) <= sum(sizes) <= bits.sum() / 8 + 2 * len(sizes)
    assert_array_equal(code_lengths(image, mode=mode), bits)


@pytest.mark.parametrize("noisy", range(4))
def test_lengths_lie_where_the_bits_go(noisy):
    image = picture((40, 40, 4), np.uint8) // 32 + 100
    image[..., noisy] = noise((40, 40))
    if noisy == 1:  # red and blue are relative to green
        image[..., 0] = image[..., 2] = image[..., 1]
    bits = photograph_lengths(model(), image).mean((0, 1))
    assert bits[noisy] > 7.5
    assert np.delete(bits, noisy).max() < 3


def test_edges_cost_more():
    image = np.full((64, 64, 3), 30, np.uint8)
    image[:, 32:] = 200
    columns = photograph_lengths(model(), image).sum((0, 2))
    assert columns[1:].argmax() == 31


# Levels


def levels_case(name):
    r"""Returns an image with few levels."""
    smooth = picture((60, 50, 4), np.uint8)
    deep = picture((120, 130), np.uint16)
    return {
        "a mask of two greys": (smooth[..., 0] > 100) * np.uint8(255),
        "sixteen greys": smooth[..., 0] // 16 * 17,
        "gaps": (np.arange(256, dtype=np.uint8) * 3 // 4 * 4 // 3 & 252)[smooth[..., :3]],
        "a constant channel": smooth * np.array([1, 0, 1, 1], np.uint8),
        "12 bits": deep // 16 * 16,
        "12 bits, the high ones repeated": (deep >> 4) * 16 + (deep >> 12),
        "8 of 16 bits": (deep >> 8) * np.uint16(257),
        "other levels in each channel": smooth // np.array([16, 1, 32, 128], np.uint8) * 16,
        "two channels": smooth[..., :2] & np.array([0xC0, 0xFF], np.uint8),
    }[name]


LEVELS = [
    *("a mask of two greys", "sixteen greys", "gaps", "a constant channel", "12 bits"),
    *("12 bits, the high ones repeated", "8 of 16 bits", "other levels in each channel"),
    "two channels",
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LEVELS)
def test_few_levels(name, mode, monkeypatch):
    image = levels_case(name)
    payload = encoded(image, mode=mode)
    assert payload[0] == 2 + (mode == "slow")
    assert_same(decoded(payload, image), image)

    # Both decode, whatever the encoder of another version thinks pays. Among colours it does
    # not for some alone, whose numbers are as many as those of the others.
    monkeypatch.setattr(codec, "used_levels", lambda *_: None)
    plain = encoded(image, mode=mode)
    assert plain[0] == (mode == "slow")
    assert_same(decoded(plain, image), image)
    assert len(payload) < len(plain) + 20 * (name == "a constant channel")


@pytest.mark.usefixtures("small_cells")
def test_levels_are_those_of_the_whole_image():
    # No cell has them all.
    image = np.arange(0, 240, 10, dtype=np.uint8)[:, None] + np.arange(200, dtype=np.uint8) % 2
    payload = encoded(image)
    assert payload[0] == 2
    assert_same(decoded(payload, image), image)
    assert_same(decoded(payload, image, region=(slice(9, 11), slice(9, 99))), image[9:11, 9:99])


@given(
    st.sampled_from([2, 256, 65536]),
    st.data(),
    st.integers(1, 3000),
)
@settings(max_examples=30)
def test_used_levels(values, data, size):
    some = data.draw(st.lists(st.integers(0, values - 1), min_size=1, max_size=40))
    random = np.random.default_rng(size)
    channel = random.choice(np.array(some, np.uint16), size)
    found = used_levels(channel, values)
    if found is not None:
        assert_array_equal(found.values, np.unique(channel))
        assert found.packed == pack_levels(found.values)
        assert_array_equal(unpack_levels(found.packed, values), found.values)
        assert len(found.packed) < channel.size * 2  # it pays


def test_levels_that_are_not_worth_a_name():
    assert used_levels(np.arange(256), 256) is None
    assert used_levels(np.arange(50, 90).repeat(100), 256) is None  # without gaps
    assert used_levels(np.array([3, 250]), 256) is None  # a small image
    assert used_levels(np.array([0, 1] * 1000), 2) is None


@given(st.sampled_from([2, 256, 65536]), st.data())
@settings(max_examples=30)
def test_levels_round_trip(values, data):
    some = data.draw(st.sets(st.integers(0, values - 1), min_size=1))
    levels = np.array(sorted(some))
    assert_array_equal(unpack_levels(pack_levels(levels), values), levels)


def test_regular_levels_take_few_bytes():
    for first, step, count in [(0, 1, 256), (3, 17, 15), (7, 1, 1), (0, 16, 4096), (9, 257, 200)]:
        levels = first + step * np.arange(count)
        assert len(pack_levels(levels)) <= 10
        assert_array_equal(unpack_levels(pack_levels(levels), 65536), levels)
    some = np.array([1, 2, 4, 7, 8, 9, 12, 13])
    assert pack_levels(3 + 5 * some)[2:] == pack_levels(some)[2:]


def packed(*numbers, code=b""):
    return b"".join(map(varint, numbers)) + code


LEVELS_OF = np.array([0, 6, 9, 12, 30, 33, 255])
GOOD = pack_levels(LEVELS_OF)
DAMAGED_LEVELS = {
    "nothing": (b"", 256),
    "cut off": (GOOD[:2], 256),
    "more bytes": (GOOD + b"\0", 256),
    "two of them": (GOOD + GOOD, 256),
    "no level": (packed(0, 1, 0), 256),
    "no step": (packed(3, 0, 2), 256),
    "a step of one level": (packed(3, 2, 1), 256),
    "steps with a divisor": (packed(0, 1, 3, code=b"\0"), 256),
    "the first beyond the last": (packed(2, 1, 1), 2),
    "the last beyond the last": (packed(0, 1, 3), 2),
    "those of other values": (GOOD, 255),
    "huge numbers": (packed(2**62, 2**62, 2**62), 65536),
    "a huge count": (packed(0, 1, 2**62), 65536),
    "a huge step": (packed(0, 2**62, 2), 65536),
    "a longer form": (b"\x80\0" + GOOD[1:], 256),
}


@pytest.mark.parametrize("name", DAMAGED_LEVELS)
def test_damaged_levels(name):
    data, values = DAMAGED_LEVELS[name]
    with memory(1 << 20), pytest.raises(StreamError, match="expected"):
        unpack_levels(data, values)
    if not data or values == 255:
        return
    dtype = {2: np.bool_, 256: np.uint8, 65536: np.uint16}[values]
    with pytest.raises(StreamError, match="expected"):
        decoded(b"\2" + varint(len(data)) + data + b"\0", np.zeros((4, 4), dtype))


@given(st.binary(max_size=12), st.sampled_from([2, 256, 65536]))
def test_any_levels(data, values):
    try:
        levels = unpack_levels(data, values)
    except StreamError:
        return
    assert pack_levels(levels) == data
    assert 0 <= levels[0] <= levels[-1] < values
    assert (np.diff(levels) > 0).all()


@pytest.mark.parametrize("most", [2, 3, 200])
def test_numbers_beyond_the_levels(most):
    # Red has three levels, among colours that have 256.
    image = picture((30, 20, 3), np.uint8)
    image[..., 0] = np.arange(600).reshape(30, 20) % (most + 1)
    payload = encoded(image)
    assert payload[0] == 0
    level = pack_levels(np.array([3, 9, 250]))
    payload = b"\2" + varint(len(level)) + level + b"\0\0" + payload[1:]
    if most == 2:
        found = decoded(payload, image)
        assert_array_equal(found[..., 0], np.array([3, 9, 250])[image[..., 0]])
        assert_array_equal(found[..., 1:], image[..., 1:])
        return
    with pytest.raises(StreamError, match="expected levels of the image, got others"):
        decoded(payload, image)


# Enlarged images


def enlarged_cases():
    random = np.random.default_rng(0)
    for shape in [(5, 6, 3), (4, 5, 2), (1, 6, 1), (7, 1, 4), (1, 1, 3)]:
        for factors in [(2, 3), (1, 4), (5, 1), (4, 4)]:
            height, width = (n * k for n, k in zip(shape, factors, strict=False))
            for size in [(height, width), (max(height - 1, 1), max(width - 1, 1))]:
                small = random.integers(0, 256, shape, dtype=np.uint8)
                yield small, factors, enlarge(small, factors, size)


@pytest.mark.parametrize("mode", MODES)
def test_enlarged_images(mode):
    for small, _, image in enlarged_cases():
        payload, own = encoded(image, mode=mode), encoded(small, mode=mode)
        assert_same(decoded(payload, image), image)
        bits = photograph_lengths(model(), image, mode=mode)
        assert bits.shape == image.shape
        assert bits.sum() / 8 - 16 <= sum(parts(payload, image)[1]) <= bits.sum() / 8 + 2
        assert len(payload) <= len(own) + 2


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 99),
)
def test_repetition_by_definition(size, factors, seed):
    # An enlargement by more is found only if it is there.
    small = np.random.default_rng(seed).integers(0, 2, (*size, 1))
    image = enlarge(small, factors, (size[0] * factors[0], size[1] * factors[1]))
    assert image.shape[:2] == (size[0] * factors[0], size[1] * factors[1])
    found = repetition(image)
    for own, least in zip(found, factors, strict=True):
        assert own % least == 0
    again = image[:: found[0], :: found[1]]
    assert_array_equal(enlarge(again, found, image.shape[:2]), image)
    assert repetition(again) == (1, 1)


def test_repetition_by_hand():
    column = np.array([4, 4, 4, 4, 9, 9, 1, 1, 1])  # two lines, and one that is cut off
    assert repetition(column[:, None, None]) == (2, 1)
    assert repetition(column[None, :, None]) == (1, 2)
    assert repetition(column[1:, None, None]) == (1, 1)
    assert repetition(np.zeros((600, 30, 2))) == (255, 30)
    assert repetition(np.arange(2).repeat(510)[:, None, None]) == (255, 1)
    assert repetition(np.arange(2).repeat(257)[:, None, None]) == (1, 1)  # a prime beyond 255


@pytest.mark.parametrize("shape", [(600, 30), (300, 700, 3), (1, 1000, 4)])
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16])
def test_constant_images(shape, dtype):
    for image in (np.zeros(shape, dtype), np.ones(shape, dtype)):
        blob = compress(image)
        assert len(blob) < 80
        assert_same(decompress(blob), image)


@pytest.mark.usefixtures("small_cells")
@given(st.data())
@settings(max_examples=40)
def test_regions_of_enlarged_images(data):
    small = picture((23, 37, 3), np.uint8)
    image = enlarge(small, (2, 3), (45, 110))
    payload = encoded(image)
    assert payload[:3] == bytes([4, 2, 3])
    region = tuple(
        slice(*sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))))
        for n in image.shape[:2]
    )
    assert_same(decoded(payload, image, region=region), image[region])


@pytest.mark.usefixtures("small_cells")
def test_regions_of_enlarged_images_need_few_cells(decodes):
    image = enlarge(picture((23, 37), np.uint8), (2, 3), (46, 111))
    payload = encoded(image)
    region = slice(2 * 7, 2 * 15), slice(3 * 12, 3 * 24)  # a cell
    assert_same(decoded(payload, image, region=region), image[region])
    assert decodes == [(1, 8, 12)]


@pytest.mark.parametrize("factors", [(0, 2), (2, 0), (1, 1), (0, 0), (10, 1), (2, 9)])
def test_rejects_factors(factors):
    image = picture((9, 8, 3), np.uint8)
    with pytest.raises(
        StreamError, match=r"expected factors of an enlargement to \(9, 8, 3\), got"
    ):
        decoded(b"\4" + bytes(factors) + encoded(image)[1:], image)


# Damage


@pytest.mark.parametrize("flags", [8, 9, 15, 64, 128, 255])
def test_rejects_flags(flags):
    image = picture((9, 8, 3), np.uint8)
    payload = encoded(image)
    for read in (decoded, parts):
        with pytest.raises(StreamError, match=f"expected a known kind of payload, got {flags}"):
            read(bytes([flags]) + payload[1:], image)


def damaged_case(name):
    image = picture((8, 9, 4), np.uint8)
    return {
        "plain": image[..., :3],
        "alpha": image,
        "levels": picture((20, 24, 4), np.uint8) // 32 * 32,
        "repeated": enlarge(image, (3, 2), (22, 17)),
        "grey": image[..., 0] // 32 * 32,
    }[name]


DAMAGED = ["plain", "alpha", "levels", "repeated", "grey"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DAMAGED)
def test_changed_bytes(name, mode):
    # What still decodes is the code of another image.
    image = damaged_case(name)
    blob = compress(image, mode=mode)
    header, reader = open_stream(blob)
    payload = reader.take(reader.left)
    places = range(0, len(payload), 1 + len(payload) // 150)
    unnoticed = 0
    for place in places:
        for change in (1, 0x80, 0xFF):
            changed = bytearray(payload)
            changed[place] ^= change
            try:
                found = decompress(seal(header, bytes(changed)))
            except StreamError:
                continue
            unnoticed += 1
            assert (found.shape, found.dtype) == (image.shape, image.dtype)
            if not changed[0] & 6:
                again = "slow" if changed[0] & 1 else "fast"
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(codec, "used_levels", lambda *_: None)
                    patch.setattr(codec, "repetition", lambda *_: (1, 1))
                    assert encoded(found, mode=again) == bytes(changed)
    assert unnoticed < 3 * len(places)

    for place in places:  # without a new checksum
        changed = bytearray(blob)
        changed[place] ^= 0x10
        with pytest.raises(StreamError):
            decompress(bytes(changed))


@pytest.mark.parametrize("name", DAMAGED)
def test_cut_off_or_longer(name):
    image = damaged_case(name)
    header, reader = open_stream(compress(image))
    payload = reader.take(reader.left)
    for end in range(len(payload)):
        with pytest.raises(StreamError, match="expected"):
            decompress(seal(header, payload[:end]))
    with pytest.raises(StreamError, match="expected the end of the stream, got 1 more bytes"):
        decompress(seal(header, payload + b"\0"))


@pytest.mark.usefixtures("small_cells")
def test_an_index_that_lies():
    image = picture((16, 20), np.uint8)
    _, sizes = parts(payload := encoded(image), image)
    streams = payload[-sum(sizes) :]
    assert len(sizes) == 4

    def told(*lengths):
        return payload[:1] + b"".join(map(varint, lengths)) + streams

    assert told(*sizes) == payload
    a, b, c, d = sizes
    for wrong in [(a + 1, b - 1, c, d), (a - 1, b + 1, c, d), (b, a, c, d), (a + b, 0, c, d)]:
        assert wrong != tuple(sizes)
        with pytest.raises(StreamError, match="decodes to something else"):
            decoded(told(*wrong), image)
    for wrong, message in {
        (a, b, c, d + 1): "more bytes, got",
        (2**62, 2**62, 2**62, 2**62): "more bytes, got",
        (a, b, c, d - 1): "expected the end of the stream",
        (a, b, c): "expected",
    }.items():
        with pytest.raises(StreamError, match=message):
            decoded(told(*wrong), image)


@given(st.binary(max_size=60), st.sampled_from([(), (3,), (4,)]), st.sampled_from([1, 2]))
@settings(max_examples=150)
def test_any_bytes(payload, channels, itemsize):
    image = np.zeros((5, 6, *channels), f"u{itemsize}")
    try:
        found = decoded(payload, image)
    except StreamError:
        return
    assert (found.shape, found.dtype) == (image.shape, image.dtype)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 5), (2, 2, 2, 2)])
def test_shapes_that_no_image_has(shape):
    blob = seal(Header(model().digest, np.dtype(np.uint8), shape), b"\0" * 100)
    with pytest.raises(StreamError, match=r"expected an image, got uint8 with shape"):
        decompress(blob)


@pytest.mark.parametrize(
    "shape", [(4096, 4096), (2, 2**23), (2**24, 1), (2**12, 2**10, 4), (1, 2**30)]
)
def test_a_huge_image_in_few_bytes(shape, decodes):
    header = Header(model().digest, np.dtype(np.uint8), shape)
    blob = seal(header, b"\0" * (20 if max(shape) <= 2**24 else 2**14))
    with memory(16 << 20), pytest.raises(StreamError, match=r"index of .* streams"):
        decompress(blob)
    with pytest.raises(StreamError, match="expected an image of at most 1000 numbers"):
        decompress(blob, limit=1000)
    assert not decodes


def test_streams_of_another_model():
    other = PhotographModel(model().stages, Settings(ridge=63))
    image = picture((20, 30, 3), np.uint8)
    with pytest.raises(StreamError, match=f"of model {other.digest.hex()}, got one of"):
        decompress(compress(image), other)
    with pytest.raises(StreamError, match="decodes to something else"):
        decode_photograph(other, image.shape, image.dtype, Reader(encoded(image)))


# Planes


def test_colour_planes_by_hand():
    colours = np.array([[[1, 2, 3], [255, 0, 128]]], np.uint8)
    assert colour_planes(colours).tolist() == [[[2, 0]], [[-1, 255]], [[1, 128]]]
    deep = np.array([[[0, 65535, 1]]], np.uint16)
    assert colour_planes(deep).tolist() == [[[65535]], [[-65535]], [[-65534]]]


def planes_of(count, top, size=(11, 18), seed=0):
    r"""Draws planes of a picture."""
    smooth = picture((*size, 3), np.uint16, seed).astype(np.int64) * (top + 1) >> 16
    return colour_planes(smooth)[:count].astype(np.int32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("top", [0, 1, 2, 100, 255, 4095, 65535])
@pytest.mark.parametrize("count", [1, 3])
def test_planes(count, top, mode):
    planes = planes_of(count, top)
    stream = encode_planes(model(), planes, top=top, mode=mode)
    assert_same(decode_planes(model(), stream, planes.shape, top=top, mode=mode), planes)
    bits = measure_planes(model(), planes, top=top, mode=mode)
    assert (bits.shape, bits.dtype) == (planes.shape, np.float32)
    assert 0 <= bits.min() <= bits.max() <= 24
    assert bits.sum() / 8 - 4 <= len(stream) <= bits.sum() / 8 + 2
    if top == 0:
        assert not bits.any()


def test_the_largest_rates():
    # However fast a network adapts, it decodes what it encoded.
    fast = PhotographModel(model().stages, Settings(1, 256, (8, 8), (2**20 - 1, 2**20 - 1)))
    for planes in (planes_of(3, 255), colour_planes(noise((40, 40, 3)))):
        stream = encode_planes(fast, planes, top=255, mode="slow")
        found = decode_planes(fast, stream, planes.shape, top=255, mode="slow")
        assert_array_equal(found, planes)


def test_streams_of_other_planes():
    planes = planes_of(3, 255)
    stream = encode_planes(model(), planes, top=255)
    for bad in (stream + b"\0", stream + b"\1", stream + stream, bytes(100)):
        with pytest.raises(StreamError, match="decodes to something else"):
            decode_planes(model(), bad, planes.shape, top=255)


@given(st.binary(max_size=80), st.sampled_from([1, 3]), st.sampled_from(MODES))
@settings(max_examples=100)
def test_a_stream_is_the_code_of_its_planes_or_unsound(stream, count, mode):
    try:
        planes = decode_planes(model(), stream, (count, 3, 4), top=255, mode=mode)
    except StreamError:
        return
    assert encode_planes(model(), planes, top=255, mode=mode) == stream


def test_contexts():
    planes = planes_of(3, 255)
    for plane, context in enumerate(contexts(PLACES, planes, top=255, fit=FIT)):
        assert context.inputs.shape == (11 * 18, PLACES[plane].inputs)
        assert (context.inputs.dtype, context.facts.dtype) == (np.int16, np.int32)
        assert np.abs(context.inputs).max() < 512
        value, anchor, _, low, high = context.facts.T
        assert_array_equal(value, planes[plane].ravel())
        assert_array_equal(low, -planes[0].ravel() if plane else np.zeros(11 * 18))
        assert_array_equal(high - low, 255)
        assert (16 * low <= anchor).all()
        assert (anchor <= 16 * high).all()
    assert len(contexts(PLACES, planes[:1], top=255, fit=FIT)) == 1


def test_contexts_are_causal():
    # What comes later in the plane does not change what is known.
    planes = planes_of(3, 255)
    for plane in range(3):
        changed = planes.copy()
        changed[plane].reshape(-1)[90:] += 1
        after = contexts(PLACES, changed, top=300, fit=FIT)[plane]
        expected = contexts(PLACES, planes, top=300, fit=FIT)[plane]
        assert_array_equal(after.inputs[:91], expected.inputs[:91])
        assert_array_equal(after.facts[:90], expected.facts[:90])
        assert_array_equal(after.facts[90, 1:3], expected.facts[90, 1:3])
        assert (after.inputs[91:] != expected.inputs[91:]).any()


@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 255, 65535]),
    st.booleans(),
)
@settings(max_examples=30)
def test_residuals_round_trip(size, count, top, smooth):
    planes = planes_of(count, top, size)
    if not smooth:
        planes = colour_planes(noise((*size, 3), np.uint16) & top)[:count]
    rest = residuals(PLACES, planes, top=top, fit=FIT)
    assert rest.shape == planes.shape
    assert np.abs(rest).max() <= top
    assert_same(restore(PLACES, rest, top=top, fit=FIT), planes)


def test_residuals_are_small():
    planes = planes_of(3, 255, (40, 40))
    rest = residuals(PLACES, planes, top=255, fit=FIT)
    assert np.abs(rest).mean() < 0.7 * np.abs(np.diff(planes, axis=2)).mean()


@pytest.mark.parametrize("change", [-300, 300, 2**20])
def test_residuals_of_no_image(change):
    rest = residuals(PLACES, planes_of(3, 255), top=255, fit=FIT)
    rest[1, 5, 5] += change
    with pytest.raises(StreamError, match="decodes to something else"):
        restore(PLACES, rest, top=255, fit=FIT)


# Real photographs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode", "most"), [
    ("photographs", "fast", 2.27), ("photographs", "slow", 2.21), ("tree", "fast", 2.40),
])  # fmt: skip
def test_real_photographs(name, mode, most, data_folder):
    model, taken, numbers = pretrained(name), 0, 0
    for path in image_folder(data_folder / "photos" / "valid"):
        image = as_array(path)
        stream = compress(image, model, mode=mode)
        assert_same(decompress(stream), image)
        taken, numbers = taken + len(stream), numbers + image.size
    assert 8 * taken / numbers <= most


def plain_stream(found, planes, mode):
    r"""Encodes planes by the plain Python that defines the codec."""
    _, height, width = planes.shape
    padded = np.pad(planes, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))).ravel()
    buffers = Buffers(padded, np.zeros_like(padded), np.zeros_like(padded))
    record = Record(
        np.zeros(0, np.float32), np.zeros((0, 0), np.int16), np.zeros((0, 5), np.int32)
    )
    encoder, told = RangeEncoder(), found.settings
    for plane, stage in enumerate(found.stages):
        reference.run_plane(
            ENCODE, plane, height, width, 255, found.components, buffers,
            stage.places.taps(height, width), told.fit(mode),
            stage.compiled(told.adaptation(mode)), tables(), encoder, record,
        )  # fmt: skip
    return encoder.finish()


@pytest.mark.slow
def test_definition_on_a_photograph(data_folder):
    image = as_array(image_folder(data_folder / "photos" / "valid")[0])[200:216, 300:332]
    model, planes = pretrained(), colour_planes(image)
    for mode in get_args(Mode):
        stream = encode_planes(model, planes, top=255, mode=mode)
        assert stream == plain_stream(model, planes, mode)
