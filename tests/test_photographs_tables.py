r"""Tests for the probnets.coding.photographs.tables module."""

import numpy as np
import pytest

from probnets.coding.photographs.tables import (
    CDF_BITS,
    LOGIT_STEPS,
    LOGS,
    OCTAVE,
    REACH,
    SCALES,
    Tables,
    tables,
)

TABLES = tables()


def steps(table):
    return np.arange(len(table), dtype=np.float64)


# What each table holds, in float64.
EXACT = {
    "log": lambda i: OCTAVE * np.log2(i + 1),
    "power": lambda i: 64 * 2 ** (i / OCTAVE),
    "squash": lambda i: 64 * np.arcsinh(2 ** ((i - REACH) / OCTAVE)),
    "sigmoid": lambda i: 2**CDF_BITS / (1 + np.exp(-i / 32)),
    "exp": lambda i: 2 ** (16 - i / LOGIT_STEPS),
    "inverse": lambda i: 2 ** (32 - i / 8),
}


def test_by_hand():
    assert TABLES.log[:8].tolist() == [0, 16, 25, 32, 37, 41, 45, 48]
    assert TABLES.power[::16].tolist() == [64 << i for i in range(22)]
    assert TABLES.squash[[0, REACH, 2 * REACH]].tolist() == [0, 56, 399]
    assert TABLES.sigmoid[0] == 1 << CDF_BITS - 1
    assert TABLES.exp[::LOGIT_STEPS].tolist() == [1 << 16 - i for i in range(17)]
    assert TABLES.inverse[::8].tolist() == [1 << 32 - i for i in range(21)]


@pytest.mark.parametrize("name", Tables._fields)
def test_entries_are_the_nearest_whole_numbers(name):
    table = getattr(TABLES, name)
    exact = EXACT[name](steps(table))

    assert table.dtype == np.int64
    # Float64 is that close to the exact number, and no entry is as close to two whole numbers.
    error = 1e-15 * exact.max()
    halves = exact % 1 == 0.5  # exactly in the middle, and rounded to even
    assert (abs(table - exact)[~halves] < 0.5 - error).all()
    np.testing.assert_array_equal(table[halves], np.rint(exact[halves]))


@pytest.mark.parametrize("name", Tables._fields)
def test_tables_are_monotone(name):
    sign = -1 if name in ("exp", "inverse") else 1
    assert (sign * np.diff(getattr(TABLES, name)) >= 0).all()


def test_ranges():
    assert len(TABLES.log) == LOGS
    assert len(TABLES.squash) == 2 * REACH + 1
    assert len(TABLES.inverse) == SCALES
    assert TABLES.exp.min() == 1  # no component is lost
    assert len(TABLES.sigmoid) == 16 * 32 + 2
    assert TABLES.sigmoid.max() <= 1 << CDF_BITS


def test_one_set_for_all():
    assert tables() is TABLES
