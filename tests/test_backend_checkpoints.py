r"""Tests for the probnets.backend.checkpoints module."""

import math
import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import nn

from probnets.backend import checkpoints

ARRAYS = {
    "a.matrix": np.arange(6.0).reshape(2, 3),
    "a.turned": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    "b.number": np.array(3.5, dtype=np.float32),
    "b.nothing": np.zeros((0, 4), dtype=np.uint8),
}
FACTS = {"history": [[1.5, math.nan], [0.1, math.inf]], "name": "größer", "count": 3}


def test_round_trip(tmp_path):
    file = tmp_path / "new" / "folder" / "file"
    checkpoints.write(file, ARRAYS, FACTS)
    arrays, facts = checkpoints.read(str(file))

    assert repr(facts) == repr(FACTS)  # nan is not equal to itself
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        assert arrays[name].tolist() == array.tolist()
    assert sorted(checkpoints.part(arrays, "a")) == ["matrix", "turned"]


def test_writes_the_same_bytes(tmp_path):
    for name in "ab":
        checkpoints.write(tmp_path / name, ARRAYS, FACTS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_replaces_a_file(tmp_path):
    file = tmp_path / "file"
    checkpoints.replace(file, b"old")
    checkpoints.replace(file, b"new")
    assert file.read_bytes() == b"new"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="needs permissions of POSIX")
def test_permissions_are_those_of_any_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    checkpoints.replace(tmp_path / "file", b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "file")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_old_file_survives_a_full_disk(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError("no space left on device")

    file = tmp_path / "file"
    checkpoints.replace(file, b"old")
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.replace(file, b"new")
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a file was executed",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a file of arrays",
        pickle.dumps(Trap()),
        save({"a": np.zeros(3)}),
        save({"a": np.zeros(3)}, metadata={"probnets": "{no json"}),
    ],
    ids=["empty", "text", "pickle", "foreign", "broken facts"],
)
def test_rejects_other_files(tmp_path, content):
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="expected a file that probnets wrote at"):
        checkpoints.read(file)


def test_rejects_part_of_a_file(tmp_path):
    file = tmp_path / "file"
    checkpoints.write(file, ARRAYS, FACTS)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="expected a file that probnets wrote at"):
        checkpoints.read(file)


def test_no_file(tmp_path):
    for path in (tmp_path / "file", tmp_path):
        with pytest.raises(FileNotFoundError, match="expected a file of arrays at"):
            checkpoints.read(path)


def test_digest():
    x = np.arange(6, dtype=np.int32)
    digest = checkpoints.digest
    assert digest(x) == digest(x.astype(">i4")) == digest(np.arange(12, dtype=np.int32)[:6])
    assert digest(x.reshape(2, 3)) == digest(np.asfortranarray(x.reshape(2, 3)))

    others = [x.reshape(2, 3), x.astype(np.int64), x.astype(np.float32), x[:5], x[::-1]]
    digests = {digest(x), digest(x, x), digest(), *map(digest, others)}
    assert len(digests) == 8


# Modules


class Module(nn.Module):
    r"""Has parameters and buffers of several types and shapes, zero dimensions among them."""

    def __init__(self, start):
        super().__init__()
        generator = torch.Generator().manual_seed(start)
        linear = nn.Linear(3, 2, dtype=torch.float64)
        nn.init.normal_(linear.weight, generator=generator)
        self.inner = nn.Sequential(linear, nn.BatchNorm2d(2))
        self.number = nn.Parameter(torch.tensor(0.5 + start))
        self.register_buffer("count", torch.tensor(2**40 + start))
        self.register_buffer("mask", torch.rand(4, generator=generator) < 0.5)
        self.register_buffer("bytes", torch.full((2, 0, 3), start, dtype=torch.uint8))
        self.register_buffer("turned", torch.rand(3, 2, generator=generator).T)
        self.register_buffer("fleeting", torch.tensor(float(start)), persistent=False)


def assert_same(module, state):
    assert module.state_dict().keys() == state.keys()
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


def test_state_round_trip(tmp_path):
    module, other = Module(1), Module(2)
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    arrays = checkpoints.state_arrays(module)
    assert {name: array.shape for name, array in arrays.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert arrays["count"] == 2**40 + 1

    checkpoints.write(tmp_path / "file", arrays, {})
    kept = dict(other.named_parameters())
    checkpoints.load_state(other, {**checkpoints.read(tmp_path / "file")[0], "stray": np.ones(2)})
    assert_same(other, expected)
    assert all(parameter is kept[name] for name, parameter in other.named_parameters())
    assert other.fleeting == 2


def test_state_arrays_are_copies():
    module = Module(1)
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    arrays = checkpoints.state_arrays(module)
    for array in arrays.values():
        array[...] = 1
    assert_same(module, expected)

    arrays = checkpoints.state_arrays(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert arrays["number"] == 1.5
    checkpoints.load_state(module, arrays)
    arrays["number"][...] = 9
    assert_same(module, expected)


def test_state_of_arrays_that_cannot_be_written():
    module, other = Module(1), Module(2)
    arrays = checkpoints.state_arrays(module)
    for array in arrays.values():
        array.setflags(write=False)
    checkpoints.load_state(other, arrays)
    assert_same(other, module.state_dict())


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("number", None, r"expected number of torch.float32 \(\), got none"),
        ("count", None, r"expected count of torch.int64 \(\), got none"),
        ("number", np.ones(1, np.float32), r"float32 \(\), got torch.float32 \(1,\)"),
        ("turned", np.ones((3, 2), np.float32), r"\(2, 3\), got torch.float32 \(3, 2\)"),
        ("mask", np.ones(4, np.uint8), r"expected mask of torch.bool \(4,\), got torch.uint8"),
        ("inner.0.weight", np.ones((2, 3), np.float32), r"of torch.float64 .*got torch.float32"),
        ("inner.1.num_batches_tracked", np.array(1.0), r"of torch.int64 .*got torch.float64 \(\)"),
    ],
)
def test_wrong_state_changes_nothing(name, array, message):
    module, other = Module(1), Module(2)
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    arrays = checkpoints.state_arrays(other)
    if array is None:
        del arrays[name]
    else:
        arrays[name] = array
    with pytest.raises(ValueError, match=message):
        checkpoints.load_state(module, arrays)
    assert_same(module, expected)
