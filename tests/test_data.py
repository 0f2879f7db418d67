r"""Tests for the probnets.data package."""

import gzip
import struct

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from probnets import data
from probnets.data.digits import KEYS, NAMES

READERS = {"mnist": data.mnist, "fashion": data.fashion}


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = [(6, 28, 28), (6,), (2, 28, 28), (2,)]
    return [rng.integers(0, 256, shape, np.uint8) for shape in shapes]


def save_idx(place, arrays, suffix=""):
    place.mkdir(exist_ok=True)
    for name, array in zip(NAMES, arrays, strict=True):
        content = idx(array)
        (place / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)


def assert_same(digits, arrays):
    assert isinstance(digits, data.Digits)
    for got, expected in zip(digits, arrays, strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.uint8
        assert got.flags.writeable  # torch.from_numpy warns otherwise


def test_folder_order(tmp_path, monkeypatch):
    for name in ("checkout", "shared/data", "named", "variable"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "checkout")

    monkeypatch.delenv("PROBNETS_DATA", raising=False)
    assert data.folder().resolve() == tmp_path / "shared/data"

    monkeypatch.setenv("PROBNETS_DATA", str(tmp_path / "variable"))
    assert data.folder() == tmp_path / "variable"
    assert data.folder(tmp_path / "named") == tmp_path / "named"


def test_folder_takes_no_substitute(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBNETS_DATA", str(tmp_path / "missing"))

    with pytest.raises(FileNotFoundError, match=r"expected a data folder, got .*missing.*--data"):
        data.folder()

    monkeypatch.setenv("PROBNETS_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"got .*other"):
        data.folder(tmp_path / "other")


@pytest.mark.parametrize("name", READERS)
def test_archive(name, tmp_path, arrays):
    np.savez(tmp_path / f"{name}.npz", **dict(zip(KEYS, arrays, strict=True)))

    assert_same(READERS[name](tmp_path), arrays)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", [False, True])
def test_original_files(name, suffix, below, tmp_path, arrays):
    save_idx(tmp_path / name if below else tmp_path, arrays, suffix)

    assert_same(READERS[name](str(tmp_path)), arrays)


def test_two_sets_in_one_folder(tmp_path, arrays):
    other = [255 - array for array in arrays]
    save_idx(tmp_path / "mnist", arrays)
    save_idx(tmp_path / "fashion", other)

    assert_same(data.mnist(tmp_path), arrays)
    assert_same(data.fashion(tmp_path), other)


@pytest.mark.parametrize("name", READERS)
def test_no_set(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"expected {name}.npz, or train-images"):
        READERS[name](tmp_path)


def test_missing_fellow(tmp_path, arrays):
    save_idx(tmp_path, arrays)
    (tmp_path / NAMES[3]).unlink()

    with pytest.raises(FileNotFoundError, match=NAMES[3]):
        data.mnist(tmp_path)


def test_idx_by_hand(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6]))

    np.testing.assert_array_equal(data.read_idx(path), [[1, 2, 3], [4, 5, 6]])


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_idx_round_trip(shape, tmp_path_factory):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = tmp_path_factory.mktemp("idx") / "bytes"
    path.write_bytes(idx(array))

    np.testing.assert_array_equal(data.read_idx(path), array)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_idx(suffix, tmp_path):
    whole = idx(np.zeros((3, 4), np.uint8))
    path = tmp_path / ("bytes" + suffix)

    for content in [*(whole[:length] for length in range(len(whole))), whole + b"\0"]:
        path.write_bytes(gzip.compress(content) if suffix else content)
        with pytest.raises(ValueError, match="expected"):
            data.read_idx(path)

    path.write_bytes(idx(np.zeros(3, np.float64)).replace(b"\x08", b"\x0d"))
    with pytest.raises(ValueError, match=r"expected (an IDX file of bytes|a whole gzip file)"):
        data.read_idx(path)


def test_claimed_shape_is_not_allocated(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12)

    with pytest.raises(ValueError, match=r"bytes for the shape .* got 0 .* fetch the file again"):
        data.read_idx(path)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "bytes.gz"
    whole = gzip.compress(idx(np.arange(200, dtype=np.uint8)))

    for content in (whole[:-9], b"\0" + whole, whole[:40] + b"\xff" * 4 + whole[44:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected a whole gzip file"):
            data.read_idx(path)


def test_damaged_archive(tmp_path, arrays):
    path = tmp_path / "mnist.npz"
    np.savez(path, **dict(zip(KEYS, arrays, strict=True)))
    whole = path.read_bytes()

    for content in (b"", whole[:-40], whole[:100], b"no archive", whole.replace(b"xte", b"xxx")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected an archive with the arrays xtr"):
            data.mnist(tmp_path)


def test_pickles_stay_closed(tmp_path, arrays):
    arrays[1] = np.array([{}] * 6, dtype=object)
    np.savez(tmp_path / "mnist.npz", **dict(zip(KEYS, arrays, strict=True)))

    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.mnist(tmp_path)


def test_wrong_shapes_and_types(tmp_path, arrays):
    train, train_labels, test, test_labels = arrays
    path = tmp_path / "mnist.npz"

    for wrong, sentence in [
        ((train, train_labels[:-1], test, test_labels), r"expected images \(N, 28, 28\)"),
        ((train, train_labels, test[:, :27], test_labels), r"got \(2, 27, 28\)"),
        ((train, np.uint8(3), test, test_labels), r"expected images \(N, 28, 28\)"),
        ((train / 255, train_labels, test, test_labels), "expected bytes, got float64"),
    ]:
        np.savez(path, **dict(zip(KEYS, wrong, strict=True)))
        with pytest.raises(ValueError, match=sentence):
            data.mnist(tmp_path)


def test_image_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "folder.png").mkdir()
    for name in ("b.png", "a.JPG", "deep/c.webp", "notes.txt"):
        (tmp_path / name).touch()

    images = data.image_folder(str(tmp_path))
    assert images == [tmp_path / name for name in ("a.JPG", "b.png", "deep/c.webp")]


@pytest.mark.parametrize("name", ["", "missing"])
def test_image_folder_without_images(name, tmp_path):
    (tmp_path / "notes.txt").touch()

    with pytest.raises(FileNotFoundError, match=r"expected images in .*, got none.* \.png"):
        data.image_folder(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_real_data(name, data_folder):
    digits = READERS[name](data_folder)

    assert digits.train.shape == (60000, 28, 28)
    assert digits.test.shape == (10000, 28, 28)
    assert np.bincount(digits.test_labels).tolist() == (
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009] if name == "mnist" else [1000] * 10
    )
