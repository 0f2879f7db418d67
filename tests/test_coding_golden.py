r"""Tests of stored streams, whose bytes are a promise. See golden/make.py."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from probnets.coding import (
    ImageModel,
    compress,
    compress_batch,
    decode_rows,
    decompress,
    decompress_batch,
    encode_rows,
    load_model,
    read_notes,
)
from probnets.coding.reference import decode_rows_torch, encode_rows_torch
from probnets.coding.stream import open_stream

FOLDER = Path(__file__).parent / "golden"
STREAMS = sorted(path.stem for path in FOLDER.glob("*.pn"))
SINGLE = [name for name in STREAMS if name.split("_")[-1] not in ("batch", "chain")]
BATCHES = sorted(set(STREAMS) - set(SINGLE))


@cache
def model_of(name):
    return load_model(FOLDER / f"{name.split('_')[0]}.safetensors")


def tables_of(name):
    model = model_of(name)
    assert isinstance(model, ImageModel)
    return model.tables


def image_of(name):
    archive = "photographs" if name.startswith(("photographs", "trees")) else "images"
    with np.load(FOLDER / f"{archive}.npz", allow_pickle=False) as images:
        return images[name.replace("chain", "batch")]


def stream_of(name):
    return (FOLDER / f"{name}.pn").read_bytes()


def test_all_are_here():
    kinds = {
        "photographs": "bool grey levels noted repeated rgb rgba slow uint16",
        "tiles": "bool grey noise rgb rgba uint16",
        "trees": "grey rgb uint16",
    }
    named = [f"{model}_{kind}" for model, some in kinds.items() for kind in some.split()]
    assert [*named, "whole"] == SINGLE
    assert BATCHES == ["tiles_batch", "whole_batch", "whole_chain"]


def test_digests():
    assert tables_of("whole").digest.hex()[:16] == "db857ceac09b0508"
    assert tables_of("tiles").digest.hex()[:16] == "1e10c3a8b27e6258"


@pytest.mark.parametrize("name", SINGLE)
def test_images(name):
    image, stream, model = image_of(name), stream_of(name), model_of(name)
    found = decompress(stream, model)
    assert (found.shape, found.dtype) == (image.shape, image.dtype)
    np.testing.assert_array_equal(found, image)
    mode = "slow" if name.endswith("slow") else "fast"
    assert compress(image, model, mode=mode, notes=read_notes(stream)) == stream
    assert bool(read_notes(stream)) == name.endswith("noted")


def test_what_streams_of_photographs_hold():
    flags = {"levels": 2, "repeated": 4, "slow": 1}
    for name in SINGLE:
        model, _, kind = name.partition("_")
        if model == "photographs":
            _, reader = open_stream(stream_of(name))
            assert reader.take(1)[0] == flags.get(kind, 0)


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name):
    images, stream, model = image_of(name), stream_of(name), model_of(name)
    found = decompress_batch(stream, model)
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    np.testing.assert_array_equal(found, images)
    assert compress_batch(images, model, chained="chain" in name) == stream


@pytest.mark.parametrize(
    ("encode", "decode"),
    [(encode_rows, decode_rows), (encode_rows_torch, decode_rows_torch)],
    ids=["compiled", "torch"],
)
def test_rows(encode, decode):
    x, tables = image_of("whole_batch").reshape(300, -1), tables_of("whole")
    for name in ("whole_batch", "whole_chain"):
        chained = name == "whole_chain"
        _, reader = open_stream(stream_of(name))
        assert reader.take(1)[0] == chained
        streams = [reader.take(n) for n in reader.index(2 if chained else 300)]
        reader.end()
        assert encode(tables, x, chained=chained) == streams
        np.testing.assert_array_equal(decode(tables, streams, 300, chained=chained), x)


def test_header_of_the_first_version():
    digest = model_of("whole").digest
    assert stream_of("whole")[:11] == b"\x9dPN\x01" + digest + b"\x09\x04\x04"
    assert stream_of("whole_batch")[:13] == b"\x9dPN\x01" + digest + b"\x8d\xac\x02\x04\x04"
