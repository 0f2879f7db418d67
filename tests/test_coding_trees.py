r"""Tests for the quad tree of residuals: model, codec, predictor and training."""

import math
from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from coding_cases import picture
from hypothesis import given, settings
from numpy.testing import assert_array_equal
from torch.testing import assert_close

from probnets.backend.checkpoints import write
from probnets.circuits import (
    Categorical,
    DiscretisedLogistic,
    TreeCircuit,
    enumerate_joint,
    enumerate_values,
    leave_one_out,
    quad_tree,
    sample,
)
from probnets.circuits.em import EMSettings
from probnets.coding import CodeTables, StreamError, encode_rows, treecodec
from probnets.coding.stream import Reader
from probnets.coding.tables import TOTAL
from probnets.coding.treecodec import (
    _decode,
    _encode,
    _measure,
    decode_trees,
    encode_trees,
    tree_lengths,
    tree_parts,
)
from probnets.coding.treeresiduals import image_residuals, restore_image
from probnets.coding.trees import SHIFT, VALUES, TreeModel, image_tree
from probnets.coding.treetraining import residual_crops, train_trees

SIZES = [(1, 1), (1, 7), (9, 1), (2, 2), (5, 8), (13, 6), (40, 17)]
SHAPES = [(1, 1), (1, 1, 3), (5, 9, 1), (17, 6, 3), (3, 40, 4), (8, 8, 2), (1, 30)]
SETTINGS = EMSettings(epochs=2, full_epochs=1, batch_size=20, pseudocount=0.1)


@torch.no_grad()
def circuit_on(height, width, *, units=3, seed=0):
    r"""Draws a circuit whose states are scales, and tend to stay what they are."""
    source = torch.Generator().manual_seed(seed)
    inputs = DiscretisedLogistic(3, units, VALUES)
    circuit = TreeCircuit(image_tree(height, width), inputs, shape=(height, width, 3))
    shape = circuit.sum_logits.shape
    circuit.sum_logits.copy_(3 * torch.eye(units) + torch.randn(shape, generator=source))
    circuit.root_logits.copy_(torch.randn(units, generator=source))
    inputs.mean.copy_(SHIFT + 0.3 * torch.randn(3, units, generator=source))
    inputs.log_scale.copy_(torch.linspace(-1.0, 3.0, units).expand(3, units))
    return circuit


@cache
def model():
    return TreeModel.from_circuit(circuit_on(8, 8))


def symbols(shape, seed=0):
    r"""Draws residuals, most of them small."""
    source = np.random.default_rng(seed)
    size = source.choice([0.5, 3.0, 100.0], p=[0.5, 0.4, 0.1], size=shape)
    return (SHIFT + (size * source.standard_normal(shape)).round().clip(-255, 255)).astype("u2")


def drawn_from_circuit(shape):
    r"""Draws residuals from the model itself."""
    circuit = model().circuit(shape[0], shape[1], channels=shape[2])
    drawn = sample(circuit, (1,), generator=torch.Generator().manual_seed(1))
    return drawn.numpy().reshape(shape).astype(np.uint16)


def ideal_bits(x):
    r"""Computes the code length of residuals under the circuit of their size."""
    circuit = model().circuit(x.shape[0], x.shape[1], channels=x.shape[2]).double()
    return -circuit.log_prob(torch.from_numpy(x.astype(np.int64))).item() / math.log(2)


# Trees


def test_tree_by_hand():
    tree = image_tree(2, 3, channels=2)
    # The root, its left block with four pixels, and its right block with two.
    assert tree.parent.tolist() == [-1, 0, 1, 1, 1, 1, 0, 6, 6]
    assert tree.sum_group.tolist() == [-1, 1, 0, 0, 0, 0, 1, 0, 0]
    assert tree.region.tolist() == [2, 2, 3, 3, 7, 7, 4, 4, 5, 5, 8, 8]
    assert tree.input_group.tolist() == [0, 1] * 6


@pytest.mark.parametrize("side", [1, 2, 8])
def test_tree_of_a_power_of_two_is_the_quad_tree(side):
    tree, other = image_tree(side, side), quad_tree(side, side, channels=3)
    assert_array_equal(tree.parent, other.parent)
    assert_array_equal(tree.region, other.region)


@pytest.mark.parametrize("size", SIZES)
def test_tree_of_any_size(size):
    tree = image_tree(*size, channels=2, levels=2)
    assert_array_equal(np.unique(tree.region), np.flatnonzero(tree.height == 0))
    assert (tree.depth[tree.region] == tree.depth.max()).all()
    assert tree.sums == min(tree.depth.max(), 2)
    above = (tree.depth.max() - tree.depth[1:]).clip(0, 1)
    assert_array_equal(tree.sum_group[1:], above)


@pytest.mark.parametrize("sizes", [(0, 1), (3, 0)])
def test_tree_needs_pixels(sizes):
    with pytest.raises(ValueError, match="expected a height, a width"):
        image_tree(*sizes)


# Residuals


@given(st.tuples(st.integers(1, 20), st.integers(1, 20)), st.sampled_from([1, 3]), st.booleans())
@settings(deadline=None, max_examples=30)
def test_residuals_round_trip(size, channels, smooth):
    shape = (*size, channels)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    planes = picture(shape, np.uint8) if smooth else noise
    residuals = image_residuals(planes)
    assert np.abs(residuals).max() <= 255
    assert_array_equal(restore_image(residuals), planes)


def test_residuals_are_small():
    planes = picture((64, 64, 3), np.uint8)
    assert np.abs(image_residuals(planes)).mean() < 10 < np.abs(np.diff(planes, axis=1)).mean()


def test_residuals_of_no_image():
    residuals = image_residuals(picture((9, 9, 3), np.uint8))
    residuals[4, 4, 1] += 255
    with pytest.raises(StreamError, match="decodes to something else"):
        restore_image(residuals)


@pytest.mark.parametrize("shape", [(3, 3), (0, 3, 1), (3, 3, 2)])
def test_residuals_need_planes(shape):
    with pytest.raises(ValueError, match=r"expected planes with shape \(H, W, 1\)"):
        image_residuals(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="expected planes of uint8"):
        image_residuals(np.zeros((3, 3, 1)))


# Circuits


def test_marginals_agree_with_enumeration():
    torch.manual_seed(0)
    tree = image_tree(2, 2, channels=2)
    circuit = TreeCircuit(tree, DiscretisedLogistic(2, 3, 3), shape=(2, 2, 2)).double()
    values = enumerate_values(circuit)
    log_prob = circuit.log_prob(values)
    assert_close(log_prob.logsumexp(0).exp().item(), 1.0)

    x = torch.tensor([[[2.0, math.nan], [1.0, 0.0]], [[0.0, 1.0], [math.nan, math.nan]]])
    seen = ~x.isnan()
    agree = ((values.view(-1, 2, 2, 2) == x) | ~seen).flatten(1).all(1)
    assert_close(circuit.log_prob(x), log_prob[agree].logsumexp(0))
    _, joint = enumerate_joint(circuit, x.flatten().double())
    assert_close(circuit.log_prob(x).exp(), joint.sum())


def test_conditionals_agree_with_sums_over_all_residuals():
    circuit = model().circuit(2, 2).double()
    x = torch.from_numpy(symbols((2, 2, 3)).astype(np.float64))
    others = x.repeat(VALUES, 1, 1, 1)
    others[:, 1, 0, 2] = torch.arange(VALUES)
    joint = circuit.log_prob(others)
    missing = x.clone()
    missing[1, 0, 2] = math.nan
    assert_close(circuit.log_prob(missing), joint.logsumexp(0))
    assert_close(leave_one_out(circuit, x)[8], joint.softmax(0))


def test_circuit_is_that_of_a_larger_image_with_the_rest_summed_out():
    small, large = model().circuit(3, 2).double(), model().circuit(7, 8).double()
    x = torch.from_numpy(symbols((3, 2, 3)).astype(np.float64))
    padded = torch.full((7, 8, 3), math.nan, dtype=torch.float64)
    padded[:3, :2] = x
    assert_close(small.log_prob(x), large.log_prob(padded), rtol=1e-5, atol=0.0)

    grey = model().circuit(3, 2, channels=1).double()
    x[..., 1:] = math.nan
    assert_close(grey.log_prob(x[..., :1]), small.log_prob(x))


def test_circuit_gives_back_what_it_was_rounded_from():
    circuit = circuit_on(8, 8)
    again = model().circuit(8, 8)
    assert_close(again.log_root(), circuit.log_root(), atol=1e-5, rtol=0.0)
    assert_close(again.log_sums(), circuit.log_sums(), atol=1e-5, rtol=0.0)
    x = sample(circuit, (5,), generator=torch.Generator().manual_seed(0))
    assert_close(again.log_prob(x), circuit.log_prob(x), atol=0.0, rtol=1e-4)


# Codes of residuals


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_code_is_that_of_the_circuit(size, channels):
    x = symbols((*size, channels))
    stream = _encode(model(), x)
    tables = model().tables(*size, channels=channels)
    assert [stream] == encode_rows(tables, x.reshape(1, -1))
    assert_array_equal(_decode(model(), stream, x.shape), x)

    lengths = _measure(model(), x)
    assert 8 * len(stream) == pytest.approx(lengths.sum(), abs=8)
    drawn = drawn_from_circuit(x.shape)
    assert _measure(model(), drawn).sum() == pytest.approx(ideal_bits(drawn), abs=1.0)


def test_code_of_residuals_is_a_promise():
    root, matrix = np.array([2, 2], np.int32), np.array([[3, 1], [2, 2]], np.int32)
    scales = np.tile(np.array([0, 8192], np.int32), (3, 1))
    golden = TreeModel(
        roots=np.stack([root, root]) * np.int32(TOTAL // 4),
        sums=matrix[None] * np.int32(TOTAL // 4),
        means=np.full_like(scales, SHIFT << 12),
        log_scales=scales,
    )
    assert golden.digest.hex() == "421f313d"
    x = np.arange(36, dtype=np.uint16).reshape(4, 3, 3) * 7 % 11 + SHIFT - 5
    assert _encode(golden, x).hex() == "1f81648da750497a04027b3d82e3c3842d0091f94e"


@given(st.binary(max_size=40))
@settings(deadline=None, max_examples=40)
def test_code_of_residuals_is_sound_or_raises(stream):
    try:
        x = _decode(model(), stream, (3, 4, 3))
    except StreamError:
        return
    assert _encode(model(), x) == stream


# Images


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, dtype):
    array = picture(shape, dtype)
    payload = encode_trees(model(), array)
    assert encode_trees(model(), array, workers=2) == payload
    again = decode_trees(model(), array.shape, array.dtype, Reader(payload), workers=2)
    assert again.dtype == array.dtype
    assert_array_equal(again, array)


def test_payload_is_the_ideal_code_length():
    array = picture((33, 50, 3), np.uint8)
    payload, bits = encode_trees(model(), array), tree_lengths(model(), array)
    x = (image_residuals(array) + SHIFT).astype(np.uint16)
    assert tree_parts(array.shape, array.dtype, Reader(payload)) == [len(payload) - 2]
    assert len(payload) == pytest.approx(ideal_bits(x) / 8, abs=6)
    assert len(payload) == pytest.approx(bits.sum() / 8, abs=4)
    assert_array_equal(bits[..., 1], _measure(model(), x)[..., 0])  # green goes first


def test_noise_is_stored_as_it_is():
    array = np.random.default_rng(0).integers(0, 256, (20, 20, 2), dtype=np.uint8)
    assert len(encode_trees(model(), array)) == array.size + 4
    assert_array_equal(tree_lengths(model(), array), 8.0)
    deep = array.astype(np.uint16) << 8
    assert (tree_lengths(model(), deep) < 25).all()


def test_cells_have_streams_of_their_own(monkeypatch):
    rows, columns = [slice(0, 8), slice(8, 21)], [slice(0, 16), slice(16, 30)]
    cells = [(row, column) for row in rows for column in columns]
    monkeypatch.setattr(treecodec, "cells", lambda height, width: cells)
    array = picture((21, 30, 4), np.uint8)
    payload = encode_trees(model(), array, workers=2)
    sizes = tree_parts(array.shape, array.dtype, Reader(payload))
    assert len(sizes) == 8
    assert sum(sizes) == pytest.approx(tree_lengths(model(), array).sum() / 8, abs=8)

    def decode(blob, region):
        reader = Reader(blob)
        return decode_trees(model(), array.shape, array.dtype, reader, region=region, workers=2)

    assert_array_equal(decode(payload, None), array)
    for region in [(slice(0, 21), slice(3, 5)), (slice(9, 10), slice(15, 30))]:
        assert_array_equal(decode(payload, region), array[region])
    broken = bytearray(payload)
    broken[-2] ^= 255
    assert_array_equal(decode(broken, (slice(0, 8), slice(0, 30))), array[:8])
    other = _or_none(decode, bytes(broken), None)
    assert other is None or (other != array).any()


def _or_none(decode, *arguments):
    try:
        return decode(*arguments)
    except StreamError:
        return None


def test_damaged_payloads():
    array = picture((16, 12, 3), np.uint8)
    payload = encode_trees(model(), array)

    def decode(blob, shape=array.shape, dtype=array.dtype):
        return decode_trees(model(), shape, np.dtype(dtype), Reader(blob))

    with pytest.raises(StreamError, match="end of the stream"):
        decode(payload + b"\0")
    for end in range(len(payload)):
        with pytest.raises(StreamError):
            decode(payload[:end])
    with pytest.raises(StreamError, match="expected an image"):
        decode(payload, (16, 12, 5))
    with pytest.raises(StreamError, match="expected at most 4 bytes of a cell, got 5"):
        decode(b"\5abcde", (2, 2))
    raised = 0
    for place in range(2, len(payload), 7):  # another image at best, whose payload this is
        damaged = bytearray(payload)
        damaged[place] ^= 1 << place % 8
        other = _or_none(decode, bytes(damaged))
        raised += other is None
        assert other is None or encode_trees(model(), other) == damaged
    assert raised > 5


def test_residuals_of_no_image_in_a_payload():
    stream = _encode(model(), np.full((4, 4, 1), SHIFT + 200, np.uint16))
    for dtype in ("uint8", "bool"):
        payload = bytes([len(stream)]) + stream
        with pytest.raises(StreamError, match=r"decodes to something else|at most 16 bytes"):
            decode_trees(model(), (4, 4), np.dtype(dtype), Reader(payload))
    with pytest.raises(StreamError, match="expected values of bool"):
        decode_trees(model(), (2, 2), np.dtype(bool), Reader(b"\4\0\1\2\0"))


def test_workers_are_counted():
    with pytest.raises(ValueError, match="expected one worker or more, got 0"):
        encode_trees(model(), np.zeros((2, 2), np.uint8), workers=0)


# Models


def test_model_in_a_file(tmp_path):
    path = tmp_path / "model.safetensors"
    model().save(path)
    again = TreeModel.load(path)
    assert again.digest == model().digest
    assert (again.kind, again.units, again.levels, again.parameters) == ("tree", 3, 3, 38)
    assert_array_equal(again.cumulative, model().cumulative)
    assert repr(again) == f"TreeModel({again.digest.hex()}, kind='tree', units=3, levels=3)"
    other = TreeModel.from_circuit(circuit_on(8, 8, seed=1))
    assert other.digest != again.digest


def test_files_of_other_things(tmp_path):
    path = tmp_path / "file"
    arrays = {name: getattr(model(), name) for name in ("roots", "sums", "means", "log_scales")}
    for facts, sentence in [
        ({"what": "image model"}, "expected a tree model"),
        ([], "expected a tree model"),
        ({"what": "tree model", "format": 9}, "format 1, got 9"),
    ]:
        write(path, arrays, facts)
        with pytest.raises(ValueError, match=sentence):
            TreeModel.load(path)
    for change in [{"roots": arrays["roots"][1:]}, {"sums": arrays["sums"] + np.int32(1)}]:
        write(path, arrays | change, {"what": "tree model", "format": 1})
        with pytest.raises(ValueError, match="expected a sound model"):
            TreeModel.load(path)
    with pytest.raises(FileNotFoundError):
        TreeModel.load(Path(tmp_path / "none"))


def test_model_needs_int32():
    parts = model().roots, model().sums, model().means.astype(np.int64), model().log_scales
    with pytest.raises(ValueError, match="expected parameters of int32"):
        TreeModel(*parts)


def test_model_needs_a_circuit_of_residuals():
    quad = quad_tree(4, 4, channels=3, tied=True)
    other = TreeCircuit(quad, DiscretisedLogistic(3, 2, VALUES), shape=(4, 4, 3))
    with pytest.raises(ValueError, match="expected a circuit over image_tree"):
        TreeModel.from_circuit(other)
    categorical = TreeCircuit(image_tree(4, 4), Categorical(3, 2, VALUES), shape=(4, 4, 3))
    with pytest.raises(ValueError, match="expected DiscretisedLogistic of 511 values"):
        TreeModel.from_circuit(categorical)


def test_tables_are_sound():
    tables = model().tables(5, 9)
    assert isinstance(tables, CodeTables)
    assert_array_equal(tables.root, model().roots[-1])
    assert_array_equal(model().tables(1, 1).root, model().roots[0])


# Training


def test_training():
    images = [picture((48, 40, 3), np.uint8, seed) for seed in range(3)]
    trained, circuit, result = train_trees(
        images, units=3, crop=8, settings=SETTINGS, progress=False
    )
    assert (trained.units, trained.levels) == (3, 3)
    assert len(result.history) == 3
    x = torch.from_numpy(residual_crops(images, 8))
    assert x.shape == (90, 8, 8, 3)
    assert circuit.bits_per_dimension(x) < 5
    again = trained.circuit(8, 8)
    assert again.bits_per_dimension(x) == pytest.approx(circuit.bits_per_dimension(x), rel=1e-4)
    new = picture((31, 50, 3), np.uint8, 7)
    assert 8 * len(encode_trees(trained, new)) / new.size < 5.2


def test_training_leaves_grey_images_out():
    images = [picture((48, 48, 3), np.uint8), picture((48, 48), np.uint8)]
    assert len(residual_crops(images, 16)) == 9
    with pytest.raises(ValueError, match="expected 20 crops of 16 x 16 pixels or more, got 9"):
        train_trees(images, crop=16)
    with pytest.raises(ValueError, match="power of two"):
        train_trees(images, crop=12)
