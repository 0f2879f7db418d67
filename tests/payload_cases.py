r"""Images, and what the tests of the photograph codec share."""

import tracemalloc
from contextlib import contextmanager
from typing import get_args

import numpy as np
from numpy.testing import assert_array_equal
from numpy.typing import DTypeLike

from probnets.coding import (
    PhotographModel,
    pretrained,
)
from probnets.coding.photographs.codec import (
    decode_photograph,
    encode_photograph,
    photograph_parts,
)
from probnets.coding.photographs.model import Mode, Settings
from probnets.coding.stream import Reader

MODES = get_args(Mode)
SIZES = [(1, 1), (1, 9), (7, 1), (13, 17)]
CHANNELS = [(), (1,), (2,), (3,), (4,)]
FIT = Settings().fit("fast")


def model():
    found = pretrained()
    assert isinstance(found, PhotographModel)
    return found


def noise(shape, dtype: DTypeLike = np.uint8, seed=0):
    values = np.random.default_rng(seed).integers(0, 2**16, shape)
    return values % 2 == 1 if dtype == np.bool_ else values.astype(dtype)


def assert_same(found, image):
    assert_array_equal(found, image, strict=True)


def encoded(image, **options):
    return encode_photograph(model(), image, **options)


def decoded(payload, image, **options):
    r"""Decodes the payload of an image of this shape and dtype."""
    return decode_photograph(model(), image.shape, image.dtype, Reader(payload), **options)


def parts(payload, image):
    return photograph_parts(image.shape, image.dtype, Reader(payload))


@contextmanager
def memory(most):
    r"""Holds what runs within to so many bytes of memory."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most
