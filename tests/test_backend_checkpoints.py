r"""Tests for the probnets.backend.checkpoints module."""

import math
import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

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
