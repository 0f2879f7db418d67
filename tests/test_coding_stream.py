r"""Tests for the probnets.coding.stream module, and for what forged streams may do."""

import struct
import time
import tracemalloc
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
from coding_cases import picture, tile_model, whole_model
from hypothesis import given

from probnets.coding import (
    StreamError,
    compress,
    compress_batch,
    decompress,
    decompress_batch,
    encode_rows,
)
from probnets.coding.images import group_widths
from probnets.coding.stream import Header, Reader, index, open_stream, seal, varint
from probnets.coding.tilecodec import _read_group

RGB = picture((13, 21, 3), np.uint8)
SMALL = picture((4, 5), np.uint8) // 16
MANY = np.stack([picture((4, 5), np.uint8, seed) // 16 for seed in range(9)])


def streams():
    r"""One stream of each kind: the image, the stream and how to restore it."""
    tiles, whole = tile_model(), whole_model()

    def one(blob, model):
        return lambda b=blob: decompress(b, model)

    def many(blob, model):
        return lambda b=blob: decompress_batch(b, model)

    made = {}
    for name, image, model in [
        ("tiles", RGB, tiles),
        ("tiles, 16 bits", picture((5, 9), np.uint16), tiles),
        ("tiles, bool", picture((9, 8, 2), np.bool_), tiles),
        ("whole", SMALL, whole),
    ]:
        blob = compress(image, model)
        made[name] = (image, blob, one(blob, model))
    for name, images, model, chained in [
        ("batch of tiles", np.stack([RGB[:9, :9], RGB[:9, 1:10]]), tiles, False),
        ("batch", MANY, whole, False),
        ("batch, chained", MANY, whole, True),
    ]:
        blob = compress_batch(images, model, chained=chained)
        made[name] = (images, blob, many(blob, model))
    return made


STREAMS = streams()
each = pytest.mark.parametrize("name", STREAMS)


def resealed(blob):
    r"""Forges the checksum."""
    return blob[:-4] + struct.pack("<I", zlib.crc32(blob[:-4]))


def outcome(decode, blob):
    r"""What comes of a stream: an array, or None for a StreamError. Nothing else may."""
    try:
        return decode(blob)
    except StreamError:
        return None


def header_of(shape=(28, 28), dtype="uint8", *, batch=False):
    return Header(b"abcd", np.dtype(dtype), shape, batch)


# The container


def test_by_hand():
    blob = seal(header_of((300, 7), "uint16"), b"payload")
    body = b"\x9dPN" + b"\1" + b"abcd" + bytes([2 | 2 << 2]) + b"\xac\x02\x07" + b"payload"
    assert blob == body + struct.pack("<I", zlib.crc32(body))


@given(
    shape=st.lists(st.integers(1, 50), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(["bool", "uint8", "uint16"]),
    digest=st.binary(min_size=4, max_size=4),
    batch=st.booleans(),
    notes=st.binary(max_size=300),
    payload=st.binary(),
)
def test_round_trip(shape, dtype, digest, batch, notes, payload):
    header = Header(digest, np.dtype(dtype), shape, batch, b"" if batch else notes)
    again, reader = open_stream(seal(header, payload))
    assert again == header
    assert again.size == np.prod(shape)
    assert reader.take(reader.left) == payload
    reader.end()


@given(st.integers(0, 2**63 - 1))
def test_varint(value):
    reader = Reader(varint(value))
    assert reader.varint() == value
    reader.end()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "expected 1 more bytes, got 0"),
        ("80", "expected 1 more bytes, got 0"),
        ("8000", "shortest form"),
        ("ff" * 9, "below 2.63"),
        ("ff" * 8 + "8001", "below 2.63"),
    ],
)
def test_rejects_varints(data, message):
    with pytest.raises(StreamError, match=message):
        Reader(bytes.fromhex(data)).varint()


def test_index():
    parts = [b"", b"a" * 200, b"bc"]
    reader = Reader(index(parts) + b"".join(parts))
    lengths = reader.index(3)
    assert [reader.take(n) for n in lengths] == parts
    reader.end()

    with pytest.raises(StreamError, match="an index of 1000000 streams, got 3 bytes"):
        Reader(b"\0\0\0").index(10**6)
    with pytest.raises(StreamError, match="expected 11 more bytes, got 2"):
        Reader(b"\x05\x06ab").index(2)
    with pytest.raises(StreamError, match="expected the end of the stream, got 3 more"):
        Reader(b"abc").end()


def test_takes_any_bytes():
    blob = compress(SMALL, whole_model())
    for same in (bytearray(blob), memoryview(blob)):
        found = decompress(same, whole_model())  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(found, SMALL)
    with pytest.raises(TypeError, match="expected bytes, got str; read the file first"):
        decompress("image.pn", whole_model())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "foreign", [b"", b"\x89PNG\r\n\x1a\n" + bytes(40), b"GIF89a", b"\xff\xd8\xff\xe0", b"\x9dPX"]
)
def test_foreign_files(foreign):
    with pytest.raises(StreamError, match="expected a probnets stream, got foreign bytes"):
        decompress(foreign, whole_model())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (3, 3, "expected a stream of version 1 or 2, got version 3; it is damaged, or a newer"),
        (3, 0, "got version 0"),
        (8, 3 | 2 << 2, "expected a known dtype, got number 3"),
        (8, 1, r"expected an image with pixels, got shape \(\)"),
        (9, 0, r"expected an image with pixels, got shape \(0, 5\)"),
        (9, 5, r"expected an image with shape \(4, 5\), got \(5, 5\)"),
        (8, 1 | 2 << 2 | 128, "expected the stream of one image, got a batch; use decompress_b"),
        (7, 0, "expected a stream of model .*, got one of model .*; pass the model that wrote"),
    ],
)
def test_forged_headers(place, value, message):
    blob = bytearray(compress(SMALL, whole_model()))
    assert blob[place] != value
    blob[place] = value
    with pytest.raises(StreamError, match=message):
        decompress(resealed(bytes(blob)), whole_model())


def test_cut_off_and_damaged():
    blob = compress(SMALL, whole_model())
    with pytest.raises(StreamError, match="of 14 bytes or more, got 9; it is cut off"):
        decompress(blob[:9], whole_model())
    with pytest.raises(StreamError, match="a matching checksum; it is damaged or cut off"):
        decompress(blob[:-1], whole_model())


def test_wrong_model():
    blob = compress(SMALL, whole_model())
    for other in (tile_model(), whole_model((5, 4)), whole_model(values=9)):
        with pytest.raises(StreamError, match="pass the model that wrote it"):
            decompress(blob, other)
        with pytest.raises(StreamError, match="pass the model that wrote it"):
            decompress_batch(blob, other)


def test_single_images_are_no_batches():
    whole, tiles = whole_model(), tile_model()
    for image, model in [(SMALL, whole), (RGB, tiles)]:
        with pytest.raises(StreamError, match="expected a batch, got the stream of one image"):
            decompress_batch(compress(image, model), model)
        with pytest.raises(StreamError, match="got a batch; use decompress_batch"):
            decompress(compress_batch(image[None], model), model)


def test_rejects_more_axes_than_the_header_holds():
    with pytest.raises(ValueError, match="expected at most 31 axes, got 32"):
        header_of((1,) * 32).pack()


# Mutations


@each
def test_streams_restore(name):
    image, blob, decode = STREAMS[name]
    np.testing.assert_array_equal(decode(), image)
    assert decode(blob).dtype == image.dtype


@each
def test_every_truncation(name):
    _, blob, decode = STREAMS[name]
    for end in range(len(blob)):
        assert outcome(decode, blob[:end]) is None
        if end > 13:
            judge(name, resealed(blob[:end]))


@each
def test_every_byte(name):
    _, blob, decode = STREAMS[name]
    for place in range(len(blob)):
        for value in {0, 255, blob[place] ^ 1, blob[place] ^ 128} - {blob[place]}:
            mutant = blob[:place] + bytes([value]) + blob[place + 1 :]
            assert outcome(decode, mutant) is None
    for place in range(len(blob) - 4):
        flipped = bytes([blob[place] ^ 1 << place % 8])
        judge(name, resealed(blob[:place] + flipped + blob[place + 1 :]))


def judge(name, blob):
    r"""Whatever a stream with a sound checksum gives, it is the one stream of just that.

    Two streams of an image can only differ in which groups of planes are raw.
    """
    image, _, decode = STREAMS[name]
    if (found := outcome(decode, blob)) is None:
        return
    assert found.dtype.name in ("bool", "uint8", "uint16")
    assert found.size <= 100 * image.size
    if "batch" not in name:
        again = compress(found, tile_model() if "tiles" in name else whole_model())
    else:
        model = tile_model() if "tiles" in name else whole_model()
        again = compress_batch(found, model, chained="chained" in name)
    assert again == blob or ("tiles" in name and raw_groups(again) != raw_groups(blob))


def raw_groups(blob):
    r"""Tells which groups of planes are raw."""
    header, reader = open_stream(blob)
    readers, shape = [reader], header.shape
    if header.batch:
        count, *shape = header.shape
        reader.take(1)
        readers = [Reader(reader.take(n)) for n in reader.index(count)]
    return [
        isinstance(_read_group(tile_model(), (*shape[:2], width), part), np.ndarray)
        for part in readers
        for width in group_widths(shape, header.dtype)
    ]


def mutant(source, blob, other):
    r"""Flips, inserts, removes or splices, or claims something huge."""
    blob = bytearray(blob)
    kind, place = source.integers(6), source.integers(len(blob))
    if kind == 0:
        blob[place] ^= 1 << source.integers(8)
    elif kind == 1:
        blob[place:place] = source.bytes(source.integers(1, 40))
    elif kind == 2:
        del blob[place : place + source.integers(1, 9)]
    elif kind == 3:
        blob[place:] = other[source.integers(len(other)) :]
    elif kind == 4:
        blob[place : place + 2] = varint(int(2 ** source.uniform(7, 62)))
    else:
        place = source.integers(9, 12)
        blob[place : place + 1] = varint(int(2 ** source.uniform(0, 30)))
    return bytes(blob)


def fuzz(count):
    source = np.random.default_rng(0)
    names = list(STREAMS)
    start = time.monotonic()
    slowest = 0.0
    accepted = 0
    for _ in range(count):
        started = time.monotonic()
        name, other = source.choice(names, 2)
        image, blob, decode = STREAMS[name]
        bad = mutant(source, blob, STREAMS[other][1])
        if source.random() < 0.2:
            found = outcome(decode, bad)
            assert found is None or np.array_equal(found, image)
        else:
            found = outcome(decode, resealed(bad))
            accepted += found is not None
            if found is not None:
                judge(name, resealed(bad))
        slowest = max(slowest, time.monotonic() - started)
    assert accepted > count / 100  # it gets past the checksum
    return slowest, time.monotonic() - start


def test_mutations():
    slowest, total = fuzz(2000)
    assert slowest < 1
    assert total < 60


@pytest.mark.slow
def test_many_mutations():
    slowest, total = fuzz(20_000)
    assert slowest < 1
    assert total < 600


# What streams may claim


def peak(call):
    r"""The most memory that a call takes, in MiB."""
    tracemalloc.start()
    call()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most / 2**20


@pytest.mark.parametrize("shape", [(2**20, 2**8), (2**28, 1), (1, 2**26, 4), (2**14, 2**14)])
@pytest.mark.parametrize("payload", [b"", b"\0", b"\1", b"\1\0\0", b"\1" + b"\xff" * 40])
def test_huge_claims_without_bytes(shape, payload):
    model = tile_model()
    blob = seal(Header(model.digest, np.dtype(np.uint8), shape), payload)

    def attempt():
        with pytest.raises(StreamError):
            decompress(blob, model)

    assert peak(attempt) < 8


def test_huge_claims_with_an_index():
    # The index is as long as it should be, and the first stream is not sound.
    model = tile_model()
    payload = b"\1" + b"\x64" + b"\0" * (2**28 // 64 // 256 - 1) + b"\xab" * 100
    blob = seal(Header(model.digest, np.dtype(np.uint8), (2**14, 2**14)), payload)

    started = time.monotonic()
    with pytest.raises(StreamError, match="decodes to something else"):
        decompress(blob, model)
    assert time.monotonic() - started < 20  # not the minutes of all 2^28 pixels


@pytest.mark.parametrize("chained", [0, 1])
def test_huge_batches_without_bytes(chained):
    for model, shape in [(whole_model(), (2**23, 4, 5)), (tile_model(), (2**20, 16, 16))]:
        header = Header(model.digest, np.dtype(np.uint8), shape, batch=True)
        blob = seal(header, bytes([chained]) + b"\0" * 50)

        def attempt(blob=blob, model=model):
            with pytest.raises(StreamError):
                decompress_batch(blob, model)

        assert peak(attempt) < 8


def test_limit():
    model = whole_model()
    blob, many = compress(SMALL, model), compress_batch(MANY, model)
    np.testing.assert_array_equal(decompress(blob, model, limit=20), SMALL)
    with pytest.raises(StreamError, match=r"at most 19 numbers, got shape \(4, 5\); raise the"):
        decompress(blob, model, limit=19)
    with pytest.raises(StreamError, match=r"at most 179 numbers, got shape \(9, 4, 5\)"):
        decompress_batch(many, model, limit=179)

    huge = seal(Header(model.digest, np.dtype(np.uint8), (2**60, 2**60)), b"")
    with pytest.raises(StreamError, match="at most 268435456 numbers"):
        decompress(huge, model)


def test_values_that_the_dtype_lacks():
    model = whole_model()
    x = np.full((1, 20), 9)
    payload = encode_rows(model.tables, x)[0]
    blob = seal(Header(model.digest, np.dtype(np.bool_), (4, 5)), payload)
    with pytest.raises(StreamError, match="expected values of bool, got 9; it is damaged"):
        decompress(blob, model)
