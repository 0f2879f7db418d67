r"""Tests for the probnets.coding.notes module: what streams hold beside pixels."""

import struct
import time
import tracemalloc
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
from cli_cases import exif, profile
from coding_cases import picture, tile_model, whole_model
from hypothesis import given
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from probnets.coding import (
    ImageWarning,
    Notes,
    StreamError,
    compress,
    compress_batch,
    decompress,
    read_notes,
)
from probnets.coding.images import array_and_notes, as_array
from probnets.coding.notes import MOST, TEXTS, pack_notes, printable, unpack_notes
from probnets.coding.stream import Header, seal, varint

IMAGE = picture((9, 7, 3), np.uint8)
TAGS = exif().removeprefix(b"Exif\0\0")
FULL = Notes(
    profile=profile(),
    exif=TAGS,
    xmp=b"<x/>",
    gamma=0.45455,
    chromaticity=(0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06),
    intent=0,
    dpi=(300.0, 0.1),
    text=(("a", ""), ("b", "猫")),
)
WORDS = st.integers(0, 2**32 - 2).map(lambda word: word / 100_000)
SIDES = st.floats(0, exclude_min=True, allow_infinity=False)
NOTES = st.builds(
    Notes,
    profile=st.binary(),
    exif=st.binary(),
    xmp=st.binary(),
    gamma=st.none() | WORDS,
    chromaticity=st.just(()) | st.tuples(*[WORDS] * 8),
    intent=st.none() | st.integers(0, 255),
    dpi=st.none() | st.tuples(SIDES, SIDES),
    text=st.lists(st.tuples(st.text(min_size=1), st.text())).map(tuple),
)
REALS = st.floats() | st.integers() | st.fractions() | st.sampled_from([42949.672949, 1e-9, True])
LETTERS = st.text(st.characters() | st.just("\ud800"), max_size=4)
ANYTHING = st.fixed_dictionaries(
    {},
    optional={
        "profile": st.binary() | st.text(),
        "gamma": REALS | st.text(),
        "chromaticity": st.lists(st.floats(0, 1), max_size=9).map(tuple) | st.tuples(*[REALS] * 8),
        "intent": st.integers() | st.floats(),
        "dpi": REALS | st.tuples(REALS, REALS) | st.tuples(REALS),
        "text": st.lists(st.lists(LETTERS, max_size=3).map(tuple), max_size=3).map(tuple),
    },
)


# The format


def test_by_hand():
    notes = Notes(exif=b"MM", gamma=0.5, intent=3, text=(("k", "vw"),))
    plain = b"\2\2MM" + b"\4\4\0\0\xc3\x50" + b"\6\1\3" + b"\x08\5\1k\2vw"

    assert zlib.decompress(pack_notes(notes)) == plain
    assert unpack_notes(zlib.compress(plain)) == notes
    assert pack_notes(Notes()) == b""


@given(NOTES)
def test_round_trip(notes):
    again = unpack_notes(pack_notes(notes))
    assert again == notes
    assert bool(again) == (notes != Notes())


@given(ANYTHING)
def test_what_is_accepted_comes_back(arguments):
    notes, sentence = Notes(), ""
    try:
        notes = Notes(**arguments)
    except (TypeError, ValueError) as error:
        sentence = str(error)

    assert not sentence or sentence.startswith("expected ")
    assert unpack_notes(pack_notes(notes)) == notes


@given(st.lists(st.binary(max_size=6) | st.sampled_from([b"\x08\2\1k", b"\4\4\0"]), max_size=3))
def test_what_is_read_is_written(parts):
    plain = b"".join(parts)
    try:
        notes = unpack_notes(zlib.compress(plain))
    except StreamError:
        return

    assert zlib.decompress(pack_notes(notes)) == plain


def test_numbers_are_rounded_as_they_are_kept():
    notes = Notes(gamma=1 / 2.2, chromaticity=(1 / 3,) * 8, dpi=(72, 96))

    assert (notes.gamma, notes.chromaticity) == (0.45455, (0.33333,) * 8)
    assert notes.dpi == (72.0, 96.0)


def test_version_2_by_hand():
    model, packed = whole_model(), pack_notes(FULL)
    image = picture((4, 5), np.uint8) // 16
    plain, noted = compress(image, model), compress(image, model, notes=FULL)

    assert noted[:11] == plain[:3] + b"\2" + plain[4:11]
    assert len(packed) < 128 * 128
    size = bytes([len(packed) & 127 | 128, len(packed) >> 7])
    body = noted[:11] + size + packed + plain[11:-4]
    assert noted == body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -1.0}, r"expected gamma in \[0, 42949.67294\], got -1; leave"),
        ({"gamma": 42949.672949}, r"expected gamma in \[0, 42949.67294\], got 42949.7"),
        ({"gamma": 10**400}, "expected gamma in .*, got nan"),
        ({"chromaticity": (0.1, 0.2)}, "expected 8 numbers for chromaticity, got 2$"),
        ({"chromaticity": (0.1,) * 10**6}, "expected 8 numbers for chromaticity, got 1,000,000$"),
        ({"intent": 256}, "expected an intent from 0 to 255, got one beyond"),
        ({"dpi": (0.0, 1.0)}, r"expected positive dots per inch, got \(0.0, 1.0\)"),
        ({"dpi": (float("nan"), 1.0)}, "expected positive dots per inch"),
        ({"dpi": (72.0,)}, "expected 2 numbers for dpi, got 1$"),
        ({"text": (("", "a"),)}, "expected a keyword for each text, got an empty one"),
        ({"text": (("a", "\ud800"),)}, "expected texts that UTF-8 can hold, got .*; drop it"),
        ({"text": (("a", ""),) * (TEXTS + 1)}, "expected at most 4,096 texts, got 4,097; keep"),
        ({"xmp": bytes(MOST)}, "expected notes of at most 16,777,216 bytes, got 16,777,221"),
    ],
)
def test_rejects_notes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Notes(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"profile": None}, "expected profile as bytes, got NoneType; pass"),
        ({"exif": "x"}, "expected exif as bytes, got str; pass"),
        ({"xmp": bytearray(2)}, "expected xmp as bytes, got bytearray; pass"),
        ({"gamma": "2"}, "expected gamma in real numbers, got str; pass"),
        (
            {"chromaticity": [0.1] * 8},
            "expected chromaticity as a tuple of numbers, got list",
        ),
        ({"intent": 1.0}, "expected intent as an integer, got float; pass"),
        ({"dpi": 72}, "expected dpi as a tuple of numbers, got int; pass a tuple of 2"),
        ({"dpi": ("a", "b")}, "expected dpi in real numbers, got str; pass"),
        ({"text": {"a": "b"}}, "expected text as a tuple of pairs, got dict; pass"),
        (
            {"text": (("a", "b", "c"),)},
            "expected a keyword and a text, two strings, got 3 of",
        ),
        (
            {"text": (("a", b"b"),)},
            "expected a keyword and a text, two strings, got 2 of",
        ),
        ({"text": ("ab",)}, "expected a keyword and a text, two strings, got str; pass"),
    ],
)
def test_rejects_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        Notes(**arguments)


def test_rejects_what_are_no_notes():
    with pytest.raises(TypeError, match=r"expected notes as .*Notes, got str; pass Notes"):
        pack_notes("hi")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"expected notes as .*Notes, got str; pass Notes"):
        compress(IMAGE, tile_model(), notes="hi")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("line", ["a\nb", "\x1b]0;title\7", "a\u202eb", "ab" * 99], ids=ascii)
def test_printable(line):
    shown = printable(line)

    assert shown.isprintable()
    assert 3 <= len(shown) <= 63


# In streams


@pytest.mark.parametrize("make", [tile_model, whole_model])
def test_streams_keep_notes(make):
    model = make()
    image = IMAGE if model.kind == "tiles" else picture((4, 5), np.uint8) // 16
    blob = compress(image, model, notes=FULL)

    np.testing.assert_array_equal(decompress(blob, model), image)
    assert read_notes(blob) == FULL
    assert read_notes(compress(image, model)) == Notes()
    assert compress(image, model, notes=Notes()) == compress(image, model)


def test_notes_may_be_replaced(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png", icc_profile=profile())
    model = tile_model()

    assert read_notes(compress(tmp_path / "a.png", model)).profile_name == "A profile"
    assert read_notes(compress(tmp_path / "a.png", model, notes=FULL)) == FULL
    assert compress(tmp_path / "a.png", model, notes=Notes()) == compress(IMAGE, model)


def test_batches_hold_pixels_alone():
    img = Image.fromarray(IMAGE)
    img.info["icc_profile"] = profile()
    model = tile_model()

    with pytest.warns(ImageWarning, match="got notes of 2 images, which are not kept; compress"):
        blob = compress_batch([img, IMAGE, img], model)

    assert blob == compress_batch([IMAGE] * 3, model)


def forged(packed, **changes):
    r"""Returns a stream with these bytes for notes, with a sound checksum."""
    model = tile_model()
    header = Header(model.digest, np.dtype(np.uint8), IMAGE.shape, notes=packed, **changes)
    return seal(header, b"\0" + IMAGE.tobytes())


def test_forged_is_otherwise_sound():
    np.testing.assert_array_equal(decompress(forged(pack_notes(FULL)), tile_model()), IMAGE)


DAMAGED = {
    "no zlib": b"notes",
    "cut off": pack_notes(FULL)[:-1],
    "goes on": pack_notes(FULL) + b"\0",
    "empty": zlib.compress(b""),
    "unknown": zlib.compress(b"\x09\1a"),
    "zero": zlib.compress(b"\0\1a"),
    "twice": zlib.compress(b"\1\1a\1\1a"),
    "wrong order": zlib.compress(b"\2\1a\1\1a"),
    "without bytes": zlib.compress(b"\1\0"),
    "longer than there is": zlib.compress(b"\1\2a"),
    "length not shortest": zlib.compress(b"\1\x81\0a"),
    "gamma": zlib.compress(b"\4\3abc"),
    "two gammas": zlib.compress(b"\4\x08" + bytes(8)),
    "large gamma": zlib.compress(b"\4\4\xff\xff\xff\xff"),
    "chromaticities": zlib.compress(b"\5\4abcd"),
    "intents": zlib.compress(b"\6\2ab"),
    "dots": zlib.compress(b"\7\x10" + bytes(16)),
    "dots cut": zlib.compress(b"\7\x08" + bytes(8)),
    "key without text": zlib.compress(b"\x08\2\1k"),
    "empty keyword": zlib.compress(b"\x08\3\0\1v"),
    "texts beyond their end": zlib.compress(b"\x08\2\1k\1v"),
    "text beyond all": zlib.compress(b"\x08\4\1k\5v"),
    "too many texts": zlib.compress(b"\x08\x83\x60" + b"\1k\0" * (TEXTS + 1)),
    "not UTF-8": zlib.compress(b"\x08\3\1\xff\0"),
}


@pytest.mark.parametrize("packed", DAMAGED.values(), ids=list(DAMAGED))
def test_damaged_notes(packed):
    for attempt in (read_notes, lambda blob: decompress(blob, tile_model())):
        with pytest.raises(StreamError, match=r"expected sound notes: .*; they are damaged"):
            attempt(forged(packed))


def test_bombs_take_little_memory():
    bomb = zlib.compressobj(9)
    packed = b"".join(bomb.compress(bytes(2**24)) for _ in range(16)) + bomb.flush()
    assert len(packed) < 2**19
    blob = forged(packed)

    tracemalloc.start()
    with pytest.raises(StreamError, match="expected sound notes: they do not end"):
        read_notes(blob)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3 * MOST


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("unit", [b"\0", b"\1k\0", b"\2\xc3\xa4\x00"], ids=["zeros", "k", "ä"])
def test_large_notes_take_little(number, unit):
    count = (MOST - 5) // len(unit) * len(unit)
    plain = bytes([number]) + varint(count) + unit * (count // len(unit))
    blob = forged(zlib.compress(plain, 9))
    del plain
    sound = number < 4

    sentence = ""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        read_notes(blob)
    except StreamError as error:
        sentence = str(error)
    spent = time.perf_counter() - start
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bool(sentence) != sound
    assert len(sentence) < 200
    assert most < 3 * MOST
    assert spent < 10


def test_one_large_text():
    notes = Notes(text=(("k", "a" * (MOST - 20)),))
    packed = pack_notes(notes)

    tracemalloc.start()
    again = unpack_notes(packed)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert again == notes
    assert most < 5 * MOST


def test_versions_tell_of_notes():
    batch = bytearray(compress_batch(IMAGE[None], tile_model()))
    single = bytearray(compress(IMAGE, tile_model()))
    empty = single[:12] + b"\0" + single[12:]
    for blob in (batch, empty):
        blob[3] = 2
        body = bytes(blob[:-4])
        with pytest.raises(StreamError, match=r"expected notes of one|more bytes"):
            read_notes(body + struct.pack("<I", zlib.crc32(body)))


def test_mutations():
    source, sound = np.random.default_rng(0), compress(IMAGE, tile_model(), notes=FULL)
    size = len(pack_notes(FULL))
    accepted = 0
    for _ in range(2000):
        blob = bytearray(sound)
        for _ in range(source.integers(1, 4)):
            blob[source.integers(12, 14 + size)] = source.integers(256)
        body = bytes(blob[:-4])
        try:
            notes = read_notes(body + struct.pack("<I", zlib.crc32(body)))
        except StreamError:
            continue
        accepted += 1
        assert notes == FULL
    assert accepted < 20  # where a byte was drawn as it was


# Of files


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
def test_files_tell(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    img, given = Image.fromarray(IMAGE), {"icc_profile": profile(), "dpi": (300, 200)}
    tags = Image.Exif()
    tags.load(b"Exif\0\0" + TAGS)
    try:
        img.save(path, exif=tags if suffix == "tiff" else exif(), **given)
    except (KeyError, OSError):
        pytest.skip(f"needs Pillow with {suffix}")

    _, notes = array_and_notes(path)

    assert notes.profile == profile()
    if suffix == "tiff":  # which has tags of its own, and is turned upright
        again = Image.Exif()
        again.load(b"Exif\0\0" + notes.exif)
        assert dict(again) == {0x010F: "A camera"}
    else:
        assert (notes.exif, notes.orientation) == (TAGS, 6)
    if suffix != "webp":
        assert notes.dpi == pytest.approx((300, 200), abs=0.01)


def test_late_chunks_of_png(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(IMAGE).save(path)
    content, end = path.read_bytes()[:-12], path.read_bytes()[-12:]
    for kind, data in ((b"tEXt", b"Title\0late"), (b"eXIf", TAGS)):
        chunk = kind + data
        content += len(data).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    path.write_bytes(content + end)

    _, notes = array_and_notes(path)

    assert notes == Notes(exif=TAGS, text=(("Title", "late"),))


def test_texts_and_comments(tmp_path):
    img, chunks = Image.fromarray(IMAGE[..., 0]), PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", "<x/>")
    chunks.add_text("Author", "Ä", zip=True)
    img.save(tmp_path / "a.png", pnginfo=chunks)
    img.save(tmp_path / "a.jpg", comment="Grüße".encode())
    img.save(tmp_path / "b.jpg", comment=b"\xff")

    found = [array_and_notes(tmp_path / name)[1] for name in ("a.png", "a.jpg", "b.jpg")]

    assert (found[0].xmp, found[0].text) == (b"<x/>", (("Author", "Ä"),))
    assert [notes.text for notes in found[1:]] == [(("Comment", "Grüße"),), (("Comment", "ÿ"),)]


@pytest.mark.parametrize(
    "info",
    [
        {"dpi": (0, 0)},
        {"dpi": 72},
        {"dpi": (1, 1)},
        {"dpi": "72"},
        {"srgb": 256},
        {"chromaticity": ("x",) * 8},
        {"gamma": "x"},
        {"chromaticity": (1,)},
        {"icc_profile": None},
        {"srgb": None},
        {"exif": 9},
    ],
    ids=str,
)
def test_nonsense_is_no_note(info):
    img = Image.fromarray(IMAGE)
    img.info.update(info)

    assert array_and_notes(img)[1] == Notes()


def test_texts_are_no_other_notes(tmp_path):
    img, chunks = Image.fromarray(IMAGE), PngInfo()
    texts = (("dpi", "72"), ("xmp", "a"), ("icc_profile", "b"), ("comment", "c"))
    for key, text in texts:
        chunks.add_text(key, text)
    img.save(tmp_path / "a.png", pnginfo=chunks)

    assert array_and_notes(tmp_path / "a.png")[1] == Notes(text=texts)


LOST = r"expected pixels and notes, got more, which is not kept: "


@pytest.mark.parametrize(
    ("info", "names"),
    [
        ({"photoshop": {0x0404: b"IPTC"}}, "IPTC or Photoshop blocks"),
        ({"photoshop": 1, "flashpix": b""}, "IPTC or Photoshop blocks, flashpix"),
        ({"aspect": (1, 2)}, "aspect of pixels"),
        ({"jfif_unit": 0, "jfif_density": (1, 2)}, "aspect of pixels"),
        ({"extension": (b"XMP DataXMP", 9)}, "extension"),
        ({"Author\x1b[1m": "in memory"}, r"Author \[1m"),
        ({"comment": "\ud800"}, "texts without a keyword or in no UTF-8"),
        ({chr(97 + n): 1 for n in range(12)}, "a, b, c, d, e, f, g, h, i, j, ...$"),
    ],
    ids=ascii,
)
def test_what_is_not_kept_is_named(info, names):
    img = Image.fromarray(IMAGE)
    img.info.update(info)

    with pytest.warns(ImageWarning, match=f"{LOST}{names}"):
        assert array_and_notes(img)[1] == Notes()
    np.testing.assert_array_equal(as_array(img), IMAGE)  # pixels alone are all that is asked for


@pytest.mark.parametrize(
    "info",
    [
        {"photoshop": {0x03ED: {}, 0x040C: b""}},
        {"aspect": (2, 2)},
        {"jfif": 257, "jfif_version": (1, 1), "jfif_unit": 1, "jfif_density": (72, 96)},
        {"jfif_unit": 0, "jfif_density": (1, 1), "adobe": 100, "adobe_transform": 1},
        {"progressive": 1, "interlace": 1, "compression": "jpeg", "loop": 0, "duration": 5},
        {"extension": (b"NETSCAPE2.0", 9), "version": b"GIF89a", "background": 0},
    ],
    ids=str,
)
def test_how_a_file_is_stored_is_no_loss(info):
    img = Image.fromarray(IMAGE)
    img.info.update(info)

    assert array_and_notes(img)[1] == Notes()


def test_files_with_more(tmp_path):
    img, chunks = Image.fromarray(IMAGE), PngInfo()
    chunks.add_itxt("Title", "Katze", lang="de")
    chunks.add(b"caBX", b"claims")
    img.save(tmp_path / "a.png", pnginfo=chunks)
    img.save(tmp_path / "a.jpg")
    block = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x04\x1c\x02\0\0"
    content = (tmp_path / "a.jpg").read_bytes()
    segment = b"\xff\xed" + (len(block) + 2).to_bytes(2) + block
    (tmp_path / "a.jpg").write_bytes(content[:2] + segment + content[2:])
    img.save(tmp_path / "a.tiff", tiffinfo={33723: b"IPTC", 271: "A camera"})

    for name, lost in {
        "a.png": "chunk caBX, languages of texts$",
        "a.jpg": "IPTC or Photoshop blocks$",
        "a.tiff": r"tag \w+ \(33723\)$",
    }.items():
        with pytest.warns(ImageWarning, match=LOST + lost):
            array_and_notes(tmp_path / name)


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_in_both_orders(order):
    tags = Image.Exif()
    tags.endian = order
    tags[0x0112] = 7

    assert Notes(exif=tags.tobytes().removeprefix(b"Exif\0\0")).orientation == 7


@given(st.binary(max_size=60), st.integers(0, 40))
def test_damaged_notes_have_no_meaning(data, cut):
    for part in (TAGS[:cut] + data, b"MM\0*" + data, data):
        assert 1 <= Notes(exif=part).orientation <= 8
    for part in (bytes(128) + data, profile()[: 128 + cut] + data):
        assert isinstance(Notes(profile=part).profile_name, str)


@pytest.mark.parametrize("version", [2, 4])
def test_profile_names(version):
    assert Notes(profile=profile("Display P3", version)).profile_name == "Display P3"
    assert Notes(profile=bytes(200)).profile_name == ""
