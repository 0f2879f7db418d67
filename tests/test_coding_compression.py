r"""Tests for the probnets.coding.compression and probnets.coding.tilecodec modules."""

from typing import get_args

import numpy as np
import pytest
import torch
from coding_cases import circuit_on, picture, tile_model, whole_model
from PIL import Image

import probnets
from probnets.circuits import quad_tree
from probnets.coding import (
    ImageModel,
    StreamError,
    compress,
    compress_batch,
    decompress,
    decompress_batch,
    encode_rows,
    pretrained,
)
from probnets.coding.models import Shipped
from probnets.coding.stream import Header, Reader, index, open_stream, seal
from probnets.coding.tilecodec import decode_tiles

SIZES = [(1, 1), (1, 9), (7, 1), (8, 8), (15, 17), (16, 16), (33, 31)]


def assert_same(found, image):
    assert found.dtype == image.dtype
    assert found.shape == image.shape
    np.testing.assert_array_equal(found, image)


# Models of tiles


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [(), (1,), (2,), (3,), (4,)])
def test_images_of_every_kind(dtype, channels):
    for size in SIZES:
        image = picture((*size, *channels), dtype)
        assert_same(decompress(compress(image, tile_model()), tile_model()), image)


def test_noise_is_stored_raw():
    source = np.random.default_rng(0)
    for image in (
        source.integers(0, 256, (40, 40, 3), dtype=np.uint8),
        source.integers(0, 2**16, (20, 30), dtype=np.uint16),
    ):
        blob = compress(image, tile_model())
        assert len(blob) <= image.nbytes + 14 + 4 * (image.ndim + 1)
        assert_same(decompress(blob, tile_model()), image)


def test_smooth_images_shrink():
    image = picture((64, 64, 3), np.uint8)
    assert len(compress(image, tile_model())) < 0.9 * image.nbytes
    assert len(compress(np.zeros((64, 64, 3), np.uint8), tile_model())) < 0.3 * image.nbytes


def test_more_than_one_group_of_tiles():
    image = picture((8 * 17 + 3, 8 * 33 + 5, 1), np.uint8)  # 561 tiles and three borders
    blob = compress(image, tile_model(), workers=1)
    assert_same(decompress(blob, tile_model(), workers=1), image)
    for workers in (2, None):
        assert compress(image, tile_model(), workers=workers) == blob
        assert_same(decompress(blob, tile_model(), workers=workers), image)


def test_more_tiles_than_are_decoded_at_a_time():
    image = picture((8 * 65, 8 * 65), np.uint8)  # 4225
    assert_same(decompress(compress(image, tile_model()), tile_model()), image)


def test_the_payload_of_tiles_ends_with_it():
    image = picture((9, 9, 3), np.uint8)
    header, reader = open_stream(compress(image, tile_model()))
    payload = reader.take(reader.left)
    for bad, message in [
        (payload + b"\0", "expected the end of the stream, got 1 more bytes"),
        (payload[:-1], "expected .* more bytes"),
        (b"\2" + payload[1:], "expected planes raw or coded, got 2"),
        (b"\0" + payload[1:], "expected 243 more bytes"),
    ]:
        with pytest.raises(StreamError, match=message):
            decompress(seal(header, bad), tile_model())


def test_shapes_that_no_image_has():
    for shape in [(3,), (2, 2, 5), (2, 2, 2, 2)]:
        blob = seal(Header(tile_model().digest, np.dtype(np.uint8), shape), b"\0" * 100)
        with pytest.raises(StreamError, match="expected an image: expected"):
            decompress(blob, tile_model())


def test_residuals_that_no_image_has():
    # Luma has half as many residuals as the model has values.
    model = tile_model()
    symbols = np.full((1, 8, 8, 3), 300)
    stream = encode_rows(model.tables, symbols.reshape(1, -1), chained=True)[0]
    reader = Reader(b"\1" + index([stream]) + stream)
    with pytest.raises(StreamError, match="expected residuals of an image"):
        decode_tiles(model, (8, 8, 3), np.dtype(np.uint8), reader)


def test_values_that_a_mask_lacks():
    blob = seal(Header(tile_model().digest, np.dtype(np.bool_), (1, 2)), b"\0\0\2")
    with pytest.raises(StreamError, match="expected values of bool"):
        decompress(blob, tile_model())


def test_images_of_every_source(tmp_path):
    image = picture((15, 17, 3), np.uint8)
    blob = compress(image, tile_model())
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)

    wide = np.repeat(image, 2, axis=1)
    for same in [
        wide[:, ::2],
        np.asfortranarray(image),
        torch.from_numpy(image),
        Image.fromarray(image),
        path,
        str(path),
    ]:
        assert compress(same, tile_model()) == blob

    deep = picture((5, 6), np.uint16)
    assert compress(deep.astype(">u2"), tile_model()) == compress(deep, tile_model())


@pytest.mark.parametrize("name", get_args(Shipped))
def test_the_models_of_the_package(name):
    # The stream names the model that wrote it.
    image = picture((20, 30, 3), np.uint8)
    blob = probnets.compress(image, pretrained(name))
    assert_same(probnets.decompress(blob), image)
    assert_same(probnets.decompress(blob, pretrained(name)), image)
    assert (blob == probnets.compress(image)) == (name == "photographs")

    others = [other for other in get_args(Shipped) if other != name]
    for other in others:
        with pytest.raises(StreamError, match=r"expected a stream of model \w{8}, got one of"):
            probnets.decompress(blob, pretrained(other))


def test_streams_of_other_models():
    with pytest.raises(StreamError, match=r"of a model that ships with probnets, got one of"):
        decompress(compress(picture((4, 5), np.uint8), tile_model()))


# Models of whole images


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 2)])
def test_whole_images(shape, dtype):
    circuit = circuit_on(quad_tree(4, 5, channels=(*shape, 1)[2]), 3, 16, shape=shape)
    model = ImageModel.from_circuit(circuit)
    image = picture(shape, dtype) if dtype == np.bool_ else picture(shape, dtype) % 16
    assert_same(decompress(compress(image, model), model), image)
    assert compress(image, circuit) == compress(image, model)


def test_trailing_axes_of_one_are_kept():
    for model in (whole_model(), whole_model((4, 5, 1))):
        for shape in [(4, 5), (4, 5, 1)]:
            image = picture(shape, np.uint8) // 16
            assert_same(decompress(compress(image, model), model), image)
            images = image[None].repeat(3, 0)
            assert_same(decompress_batch(compress_batch(images, model), model), images)


def test_vectors():
    model = whole_model((12,))
    x = np.random.default_rng(0).integers(0, 16, (300, 12), dtype=np.uint8)
    blob = compress(x[0], model)
    assert_same(decompress(blob, model), x[0])
    assert compress(torch.from_numpy(x[0]), model) == blob
    for chained in (False, True):
        many = compress_batch(x, model, chained=chained)
        assert compress_batch(list(x), model, chained=chained) == many
        assert_same(decompress_batch(many, model), x)
        assert_same(decompress_batch(many, model, select=slice(250, 260)), x[250:260])


def test_files_are_models(tmp_path):
    image = picture((4, 5), np.uint8) // 16
    whole_model().save(tmp_path / "model.safetensors")
    blob = compress(image, tmp_path / "model.safetensors")
    assert blob == compress(image, whole_model())
    assert_same(decompress(blob, str(tmp_path / "model.safetensors")), image)


# Batches


@pytest.mark.parametrize("chained", [False, True])
def test_batches_of_whole_images(chained):
    model = whole_model()
    images = np.random.default_rng(0).integers(0, 16, (600, 4, 5), dtype=np.uint8)
    blob = compress_batch(images, model, chained=chained, workers=1)
    for workers in (2, None):
        assert compress_batch(images, model, chained=chained, workers=workers) == blob
        assert_same(decompress_batch(blob, model, workers=workers), images)
    assert compress_batch(torch.from_numpy(images), model, chained=chained) == blob
    assert compress_batch(list(images), model, chained=chained) == blob
    assert compress_batch(images[:, ::-1][:, ::-1], model, chained=chained) == blob


def test_chaining_saves_bytes():
    images = np.random.default_rng(0).integers(0, 16, (600, 4, 5), dtype=np.uint8)
    chained, single = (
        len(compress_batch(images, whole_model(), chained=chained)) for chained in (True, False)
    )
    assert chained + 700 < single


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize(
    "select",
    [
        *(slice(None), slice(0), slice(1), slice(255, 257), slice(256, 512), slice(256, None)),
        *(slice(-3, None), slice(-900, 900), slice(520, 300), slice(300, 100), slice(600, None)),
        *(slice(599, 700), slice(5, 3), slice(256, 256), slice(300, 310)),
    ],
    ids=str,
)
def test_select(select, chained):
    images = (np.arange(600 * 20) % 13).reshape(600, 4, 5).astype(np.uint8)
    blob = compress_batch(images, whole_model(), chained=chained)
    assert_same(decompress_batch(blob, whole_model(), select=select), images[select])


def test_select_decodes_only_its_groups(monkeypatch):
    images = np.zeros((600, 4, 5), dtype=np.uint8)
    blob = compress_batch(images, whole_model())
    rows = []
    decode = probnets.coding.compression.decode_rows

    def spy(tables, streams, count, **options):
        rows.append((len(streams), count))
        return decode(tables, streams, count, **options)

    monkeypatch.setattr(probnets.coding.compression, "decode_rows", spy)
    decompress_batch(blob, whole_model(), select=slice(300, 310))
    decompress_batch(blob, whole_model(), select=slice(511, 513))
    assert rows == [(1, 256), (2, 344)]


def test_batches_of_tiles():
    images = np.stack([picture((9, 11, 3), np.uint8, seed) for seed in range(4)])
    blob = compress_batch(images, tile_model())
    assert compress_batch(list(images), tile_model(), chained=False, workers=2) == blob
    assert_same(decompress_batch(blob, tile_model()), images)
    for select in (slice(1, 3), slice(2, 2), slice(-1, None)):
        assert_same(decompress_batch(blob, tile_model(), select=select), images[select])


def test_rejects_selections():
    blob = compress_batch(np.zeros((3, 4, 5), np.uint8), whole_model())
    with pytest.raises(ValueError, match="expected images in a row, got a step of 2"):
        decompress_batch(blob, whole_model(), select=slice(0, 3, 2))
    for bad in (0, [1]):
        with pytest.raises(TypeError, match=r"expected a slice of the images, got (int|list)"):
            decompress_batch(blob, whole_model(), select=bad)  # pyright: ignore[reportArgumentType]


def test_rejects_kinds_of_batches():
    for model, kind in [(whole_model(), 2), (tile_model(), 1)]:
        header = Header(model.digest, np.dtype(np.uint8), (1, 4, 5), batch=True)
        with pytest.raises(StreamError, match=f"a kind of batch that exists, got {kind}"):
            decompress_batch(seal(header, bytes([kind, 0])), model)


# What is refused


@pytest.mark.parametrize("model", [tile_model, whole_model])
def test_rejects_other_dtypes(model):
    for bad in (np.zeros((4, 5)), np.full((4, 5), np.nan), np.zeros((4, 5), np.int64)):
        with pytest.raises(TypeError, match=r"expected (dtype|images of) bool"):
            compress(bad, model())
        with pytest.raises(TypeError, match=r"expected (dtype|images of) bool"):
            compress_batch(bad[None], model())
    with pytest.raises(TypeError, match="expected images of bool"):
        compress(np.zeros(12), whole_model((12,)))


def test_rejects_values_that_the_model_lacks():
    with pytest.raises(ValueError, match="expected values from 0 to 15, got 0 to 16"):
        compress(np.pad(np.full((3, 4), 16, np.uint8), ((1, 0), (1, 0))), whole_model())


def test_rejects_other_shapes():
    for image in (np.zeros((5, 4), np.uint8), np.zeros((4, 5, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"shape \(4, 5\), got .*; a model of tiles takes"):
            compress(image, whole_model())
        with pytest.raises(ValueError, match=r"shape \(4, 5\), got .*; a model of tiles takes"):
            compress_batch(image[None], whole_model())
    with pytest.raises(ValueError, match="expected an image with at least one pixel"):
        compress(np.zeros((0, 4), np.uint8), tile_model())


@pytest.mark.parametrize("model", [tile_model, whole_model])
def test_rejects_batches(model):
    with pytest.raises(ValueError, match=r"expected (images|one image)"):
        compress_batch([], model())
    with pytest.raises(ValueError, match=r"expected (images|one image)"):
        compress_batch(np.zeros((0, 4, 5), np.uint8), model())
    mixed = [np.zeros((4, 5), np.uint8), np.zeros((4, 5), np.bool_)]
    with pytest.raises(ValueError, match=r"one shape and dtype, got .* of bool, .* of uint8"):
        compress_batch(mixed, model())
    with pytest.raises(TypeError, match=r"expected a sequence of images, got the path 'a.png'"):
        compress_batch("a.png", model())


def test_rejects_other_models():
    for bad in (3, b"model", tile_model().tables):
        with pytest.raises(TypeError, match=r"expected an image, .* a TreeCircuit, a path"):
            compress(np.zeros((4, 5), np.uint8), bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileNotFoundError):
        compress(np.zeros((4, 5), np.uint8), "no such file")


@pytest.mark.parametrize(
    ("make", "mode", "message"),
    [
        (tile_model, "slow", "expected mode 'fast' for a model of tiles, got 'slow'"),
        (whole_model, "slow", "expected mode 'fast' for a model of whole images, got 'slow'"),
        (tile_model, "best", "expected mode 'fast' or 'slow', got 'best'"),
    ],
)
def test_modes(make, mode, message):
    with pytest.raises(ValueError, match=message):
        compress(picture((4, 5), np.uint8) // 16, make(), mode=mode)
