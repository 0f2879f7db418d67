r"""Tests for the probnets.coding.training module."""

import numpy as np
import pytest
import torch
from coding_cases import picture

from probnets.backend import checkpoints
from probnets.circuits.em import EMSettings
from probnets.coding import (
    compress,
    compress_batch,
    decompress,
    decompress_batch,
    train_tiles,
    train_whole,
)
from probnets.coding.training import tile_rows

SETTINGS = EMSettings(epochs=3, full_epochs=1, batch_size=60, pseudocount=(0.1, 1.0))
PICTURES = [picture((40, 56, 3), np.uint8, seed) for seed in range(3)]


def digits(count, top=None):
    r"""Bars that stand or lie, with some noise."""
    source = np.random.default_rng(0)
    images = np.zeros((count, 5, 6), dtype=np.int64)
    for image, stands, place in zip(
        images, source.random(count) < 0.5, source.integers(0, 5, count), strict=True
    ):
        image[(slice(None), place) if stands else (place, slice(None))] = 1
    images ^= source.random(images.shape) < 0.05
    return images.astype(np.bool_) if top is None else (top * images).astype(np.uint8)


@pytest.fixture(scope="module")
def tiles():
    return train_tiles(PICTURES, units=3, tile=8, settings=SETTINGS, progress=False)


@pytest.fixture(scope="module")
def whole():
    return train_whole(digits(400), units=3, settings=SETTINGS, progress=False)


def test_tiles_are_better_than_uniform(tiles):
    model, circuit, result = tiles
    assert (model.kind, model.shape, model.tables.values) == ("tiles", (8, 8, 3), 512)
    assert tuple(circuit.shape) == (8, 8, 3)
    assert len(result.history) == 4
    assert result.best == min(valid for _, valid in result.history)
    assert result.best < 6.5  # of nine bits

    image = picture((61, 43, 3), np.uint8, 9)
    blob = compress(image, model)
    assert len(blob) < 0.8 * image.size
    np.testing.assert_array_equal(decompress(blob, model), image)


def test_whole_is_better_than_uniform(whole):
    model, circuit, result = whole
    assert (model.kind, model.shape, model.tables.values) == ("whole", (5, 6), 2)
    assert result.best < 0.8  # of one bit

    new = digits(900)[400:]
    blob = compress_batch(new, model)
    np.testing.assert_array_equal(decompress_batch(blob, model), new)
    bits = circuit.bits_per_dimension(torch.from_numpy(new.astype(np.uint8)))
    assert abs(8 * len(blob) / new.size - bits) < 0.02


def test_bytes_and_channels():
    images = digits(60, top=200)[..., None].repeat(2, -1)
    settings = EMSettings(epochs=1, batch_size=60)
    model, _, _ = train_whole(images, units=3, settings=settings, progress=False)
    assert (model.shape, model.tables.values) == ((5, 6, 2), 256)
    np.testing.assert_array_equal(decompress(compress(images[0], model), model), images[0])


def test_training_again_gives_the_same_model(whole, tiles):
    again = train_whole(digits(400), units=3, settings=SETTINGS, progress=False)
    assert again[0].tables.digest == whole[0].tables.digest
    again = train_tiles(iter(PICTURES), units=3, tile=8, settings=SETTINGS, progress=False)
    assert again[0].tables.digest == tiles[0].tables.digest


@pytest.mark.parametrize("kind", ["whole", "tiles"])
def test_resuming_gives_the_same_model(kind, whole, tiles, tmp_path, monkeypatch):
    def train():
        options = {"checkpoint": tmp_path / "checkpoint", "settings": SETTINGS, "progress": False}
        if kind == "whole":
            return train_whole(digits(400), units=3, **options)[0]
        return train_tiles(PICTURES, units=3, tile=8, **options)[0]

    written = []
    write = checkpoints.write

    def interrupt(*arguments):
        write(*arguments)
        written.append(arguments)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train()

    expected = {"whole": whole, "tiles": tiles}[kind][0].tables.digest
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", lambda *arguments: written.append(arguments))
        assert train().tables.digest == expected
    assert len(written) == 4  # epochs in all


def test_tiles_in_both_orientations():
    image = picture((17, 24, 3), np.uint8)
    rows = tile_rows([image, image[..., 0], image[:7]], 8)
    assert rows.shape == (12, 192)

    alpha = np.concatenate([image, image[..., :1]], axis=2)
    np.testing.assert_array_equal(tile_rows([alpha], 8), rows)
    turned = tile_rows([image.transpose(1, 0, 2)], 8)
    np.testing.assert_array_equal(np.sort(turned, 0), np.sort(rows, 0))


def test_rejects_images_without_tiles():
    for images in ([], [PICTURES[0][..., 0]], [PICTURES[0][:7]]):
        with pytest.raises(ValueError, match="expected an image in colour of 8 x 8 pixels or"):
            train_tiles(images, tile=8)
    with pytest.raises(ValueError, match="20 complete tiles or more, got 4"):
        train_tiles([PICTURES[0][:16, :16]], tile=8)


@pytest.mark.parametrize(
    "images",
    [np.zeros((19, 4, 4), np.uint8), np.zeros((30, 4, 4)), np.zeros(30, np.uint8)],
)
def test_rejects_images(images):
    with pytest.raises(ValueError, match="expected 20 images or more with shape"):
        train_whole(images)


def test_circuit_of_a_model_keeps_the_probabilities():
    images = np.stack(PICTURES)[:, :8, :8, 1].repeat(10, 0)
    settings = EMSettings(epochs=1, batch_size=16)
    model, circuit, _ = train_whole(images, units=4, settings=settings, progress=False)
    x = torch.from_numpy(images.astype(np.int64))
    again = model.to_circuit()
    assert again.bits_per_dimension(x) == pytest.approx(circuit.bits_per_dimension(x), rel=1e-3)
    assert again.shape == circuit.shape
