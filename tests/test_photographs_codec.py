r"""Tests for the payload of photographs: cells, levels and planes."""

from collections import Counter
from importlib import resources

import hypothesis.strategies as st
import numpy as np
import pytest
from coding_cases import picture
from hypothesis import assume, example, given, settings
from numpy.testing import assert_array_equal
from payload_cases import (
    CHANNELS,
    MODES,
    SIZES,
    assert_same,
    decoded,
    encoded,
    memory,
    model,
    noise,
    parts,
)

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
from probnets.coding.photographs import codec
from probnets.coding.photographs.codec import (
    decode_photograph,
    photograph_lengths,
)
from probnets.coding.photographs.levels import pack_levels
from probnets.coding.photographs.model import Settings
from probnets.coding.photographs.planes import (
    colour_planes,
    encode_planes,
)
from probnets.coding.photographs.repeats import enlarge
from probnets.coding.stream import Header, Reader, open_stream, seal, varint

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
