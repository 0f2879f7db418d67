r"""Tests for the probnets.coding.lengths module."""

from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from coding_cases import CASES, case, picture, rows, tile_model, whole_model

from probnets.coding import code_lengths, compress, pretrained, reference
from probnets.coding.lengths import _row_lengths
from probnets.coding.models import Shipped
from probnets.coding.schedule import CODE, Schedule
from probnets.coding.stream import open_stream

NOISE = np.random.default_rng(0).integers(0, 2**16, (20, 19, 4))


def payload(blob):
    _, reader = open_stream(blob)
    return reader.left


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((40, 37, 3), np.uint8),
        ((40, 37), np.uint8),
        ((40, 37, 4), np.uint8),
        ((40, 37, 2), np.bool_),
        ((40, 37, 3), np.uint16),
        ((1, 1), np.uint8),
        ((1, 1, 3), np.uint8),
        ((300, 260), np.uint8),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "model", [tile_model, *(partial(pretrained, name) for name in get_args(Shipped))]
)
def test_sum_is_the_size(shape, dtype, model):
    image = picture(shape, dtype)

    bits = code_lengths(image, model())

    assert bits.shape == (*shape[:2], *(shape[2:] or (1,)))
    assert bits.dtype == np.float64
    assert bits.min() > 0
    size = payload(compress(image, model()))
    groups = 8 if dtype == np.uint16 else 4
    chains = 4 + shape[0] * shape[1] // (64 * 256)  # for each an index and less than a byte
    assert bits.sum() / 8 - groups <= size <= bits.sum() / 8 + groups * (1 + 4 * chains)


def test_noise_is_stored():
    image = NOISE.astype(np.uint8)

    np.testing.assert_array_equal(code_lengths(image, tile_model()), 8.0)
    np.testing.assert_array_equal(code_lengths(NOISE.astype(np.uint16), tile_model()), 16.0)


def test_edges_cost_more():
    image = np.zeros((64, 64), dtype=np.uint8)
    image[:, 32:] = 200

    columns = code_lengths(image)[..., 0].sum(0)

    assert columns[1:].argmax() == 31, columns


def test_whole_images_by_their_probability():
    model = whole_model()
    image = picture((4, 5), np.uint8) // 16

    bits = code_lengths(image, model)

    log_prob = model.to_circuit().log_prob(torch.from_numpy(image.astype(np.int64)))
    assert bits.shape == (4, 5, 1)
    assert bits.sum() == pytest.approx(-log_prob.item() / np.log(2), rel=1e-4)
    assert abs(payload(compress(image, model)) - bits.sum() / 8) < 1
    assert code_lengths(image > 5, whole_model(values=9)).shape == (4, 5, 1)


@pytest.mark.parametrize("name", CASES)
def test_rows_by_the_frequencies_of_the_reference(name, monkeypatch):
    tables, x = case(name)[1], rows(name, 70)
    present = np.arange(x.shape[1]) % 3 != 1
    found = []

    def record(low, freq):
        found.append(24 - np.log2(freq))  # of the coded variables, in the coder's order
        return [b""] * len(low)

    monkeypatch.setattr(reference, "encode_intervals", record)
    for some in (None, present):
        reference.encode_rows_torch(tables, x, present=some)
        bits = _row_lengths(tables, x, some)
        order = Schedule.depth_first(tables.tree, some).operations
        order = order[order[:, 0] == CODE, 3]
        np.testing.assert_allclose(bits[:, order], found.pop(), rtol=1e-12)
        assert not np.delete(bits, order, axis=1).any()


def test_rejects():
    with pytest.raises(ValueError, match=r"expected an image with shape \(4, 5\), got \(9, 9\)"):
        code_lengths(np.zeros((9, 9), np.uint8), whole_model())
    with pytest.raises(ValueError, match="expected mode 'fast' for a model of tiles, got 'slow'"):
        code_lengths(np.zeros((9, 9), np.uint8), tile_model(), mode="slow")
    with pytest.raises(TypeError, match="expected dtype bool, uint8 or uint16"):
        code_lengths(np.zeros((9, 9)))
