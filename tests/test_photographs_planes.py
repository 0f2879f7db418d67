r"""Tests for the planes of a part of a photograph, and for real photographs."""

from typing import get_args

import hypothesis.strategies as st
import numpy as np
import pytest
from coding_cases import picture
from hypothesis import given, settings
from numpy.testing import assert_array_equal
from payload_cases import FIT, MODES, assert_same, model, noise

from probnets.coding import (
    PhotographModel,
    StreamError,
    compress,
    decompress,
    pretrained,
)
from probnets.coding.images import as_array
from probnets.coding.photographs import reference
from probnets.coding.photographs.kernel import ENCODE, MARGIN, Buffers, Record
from probnets.coding.photographs.layout import PLACES
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
from probnets.coding.photographs.tables import tables
from probnets.coding.rangecoder import RangeEncoder
from probnets.data import image_folder

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
