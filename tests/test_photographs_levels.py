r"""Tests for images of few levels, and for those that were enlarged."""

import hypothesis.strategies as st
import numpy as np
import pytest
from coding_cases import picture
from hypothesis import given, settings
from numpy.testing import assert_array_equal
from payload_cases import MODES, assert_same, decoded, encoded, memory, model, parts

from probnets.coding import (
    StreamError,
    compress,
    decompress,
)
from probnets.coding.photographs import codec
from probnets.coding.photographs.codec import (
    photograph_lengths,
)
from probnets.coding.photographs.levels import pack_levels, unpack_levels, used_levels
from probnets.coding.photographs.repeats import enlarge, repetition
from probnets.coding.stream import varint

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
