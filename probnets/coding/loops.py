r"""The codec as compiled loops: messages and range coder fused, many rows in lockstep.

Rows go through the schedule in blocks. Whatever the block, the thread or the processor, the
numbers are integers and the bytes the same as those of :mod:`probnets.coding.reference`.
"""

__all__ = ["BLOCK", "compiled_decode", "compiled_encode"]

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numba.extending import overload

from probnets.backend.rows import (
    add_products,
    clear,
    fill,
    floor,
    load,
    power_of_two,
    row_max,
    row_sum,
    store,
    width,
)

from .rangeloops import (
    advance_one,
    canonical_one,
    encode_one,
    finish_one,
    peek_one,
    start_decoding_one,
    start_encoding_one,
)
from .schedule import CODE, ENTER
from .tables import TOTAL

BLOCK = 64  # rows in lockstep


def _normalise(target, o, source, i, rows, bits, K, W):  # noqa: ANN001, ANN202
    r"""Brings positive rows to integers of so many bits, in a compiled loop.

    A row is scaled by the power of two that brings its largest number into
    :math:`[2^{b - 1}, 2^b)`, rounded down, and raised by one so that nothing dies out.
    """
    raise NotImplementedError


@overload(_normalise, prefer_literal=True)
def _normalise_rows(target, o, source, i, rows, bits, K, W):  # noqa: ANN001, ANN202
    K, W = K.literal_value, W.literal_value

    def loop(target, o, source, i, rows, bits, K, W):  # noqa: ANN001, ANN202
        one = fill(1.0, W)
        for b in range(0, rows * K, K):
            top = 0.0
            for k in range(b, b + K, W):
                top = max(top, row_max(load(source, i + k, W)))
            scale = fill(power_of_two(top, bits), W)
            for k in range(b, b + K, W):
                store(target, o + k, floor(load(source, i + k, W) * scale) + one)

    return loop


def _multiply(target, x, i, y, j, rows, K, W):  # noqa: ANN001, ANN202
    r"""Multiplies rows number by number, in a compiled loop."""
    raise NotImplementedError


@overload(_multiply, prefer_literal=True)
def _multiply_rows(target, x, i, y, j, rows, K, W):  # noqa: ANN001, ANN202
    K, W = K.literal_value, W.literal_value

    def loop(target, x, i, y, j, rows, K, W):  # noqa: ANN001, ANN202
        for k in range(0, rows * K, W):
            store(target, k, load(x, i + k, W) * load(y, j + k, W))

    return loop


def _pass(operation, prior, below, scratch, belief, root, down, up, rows, bits, K, W):  # noqa: ANN001, ANN202
    r"""Takes the messages of one operation: into a region, or out of it."""
    raise NotImplementedError


@overload(_pass, prefer_literal=True)
def _pass_rows(operation, prior, below, scratch, belief, root, down, up, rows, bits, K, W):  # noqa: ANN001, ANN202
    K, W = K.literal_value, W.literal_value

    def loop(operation, prior, below, scratch, belief, root, down, up, rows, bits, K, W):  # noqa: ANN001, ANN202
        kind, parent, group = operation[0], operation[2], operation[4] * K * K
        here, above = operation[5] * BLOCK * K, operation[6] * BLOCK * K
        ignorant = operation[7]
        if kind == ENTER and parent < 0:
            for b in range(0, rows * K, K):
                for k in range(0, K, W):
                    store(scratch, b + k, load(root, k, W))
            _normalise(prior, here, scratch, 0, rows, bits, K, W)
        elif kind == ENTER:
            _belief(belief, prior, below, scratch, above, ignorant, rows, bits, K, W)
            clear(scratch, 0, rows * K, W)
            add_products(scratch, 0, belief, 0, K, 1, down, group, rows, K, K, W)
            _normalise(prior, here, scratch, 0, rows, bits, K, W)
        else:
            clear(scratch, 0, rows * K, W)
            add_products(scratch, 0, below, here, K, 1, up, group, rows, K, K, W)
            if ignorant:
                _normalise(below, above, scratch, 0, rows, bits, K, W)
            else:
                _normalise(belief, 0, scratch, 0, rows, bits, K, W)
                _multiply(scratch, belief, 0, below, above, rows, K, W)
                _normalise(below, above, scratch, 0, rows, bits, K, W)

    return loop


def _belief(belief, prior, below, scratch, here, ignorant, rows, bits, K, W):  # noqa: ANN001, ANN202
    r"""Computes what is believed of a region's unit, from above and from below."""
    raise NotImplementedError


@overload(_belief, prefer_literal=True)
def _belief_rows(belief, prior, below, scratch, here, ignorant, rows, bits, K, W):  # noqa: ANN001, ANN202
    K, W = K.literal_value, W.literal_value

    def loop(belief, prior, below, scratch, here, ignorant, rows, bits, K, W):  # noqa: ANN001, ANN202
        if ignorant:
            for k in range(0, rows * K, W):
                store(belief, k, load(prior, here + k, W))
        else:
            _multiply(scratch, prior, here, below, here, rows, K, W)
            _normalise(belief, 0, scratch, 0, rows, bits, K, W)

    return loop


def _learn(below, here, scratch, cumulative, entry, ignorant, bits, K, W):  # noqa: ANN001, ANN202
    r"""Multiplies the probability of a value into what comes from below."""
    raise NotImplementedError


@overload(_learn, prefer_literal=True)
def _learn_row(below, here, scratch, cumulative, entry, ignorant, bits, K, W):  # noqa: ANN001, ANN202
    K, W = K.literal_value, W.literal_value

    def loop(below, here, scratch, cumulative, entry, ignorant, bits, K, W):  # noqa: ANN001, ANN202
        for k in range(0, K, W):
            prob = load(cumulative, entry + K + k, W) - load(cumulative, entry + k, W)
            store(scratch, k, prob if ignorant else prob * load(below, here + k, W))
        _normalise(below, here, scratch, 0, 1, bits, K, W)

    return loop


def _bound(belief, o, cumulative, entry, total, room, K, W):  # noqa: ANN001, ANN202
    r"""Computes the integer cumulative probability, less the value, at an entry of the table."""
    raise NotImplementedError


@overload(_bound, prefer_literal=True)
def _bound_row(belief, o, cumulative, entry, total, room, K, W):  # noqa: ANN001, ANN202
    K, W = K.literal_value, W.literal_value

    def loop(belief, o, cumulative, entry, total, room, K, W):  # noqa: ANN001, ANN202
        mass = 0.0
        for k in range(0, K, W):
            mass += row_sum(load(belief, o + k, W) * load(cumulative, entry + k, W))
        return math.floor(mass / total * room)

    return loop


def _total(belief, o, K, W):  # noqa: ANN001, ANN202
    r"""Sums a row of beliefs, times the total of a table."""
    raise NotImplementedError


@overload(_total, prefer_literal=True)
def _total_row(belief, o, K, W):  # noqa: ANN001, ANN202
    K, W = K.literal_value, W.literal_value

    def loop(belief, o, K, W):  # noqa: ANN001, ANN202
        total = 0.0
        for k in range(0, K, W):
            total += row_sum(load(belief, o + k, W))
        return total * TOTAL

    return loop


@cache
def compiled_encode(units: int) -> Callable[..., None]:
    r"""Compiles the encoder for a number of units."""
    import numba

    K, W, B = units, width(units, itemsize=8), BLOCK

    @numba.njit(cache=True, nogil=True)
    def encode(  # noqa: ANN202
        x, group, operations, root, down, up, cumulative, X, bits,
        prior, below, belief, scratch, states, out, data, ends,
    ):  # fmt: skip  # noqa: ANN001
        room = float(TOTAL - X)
        single = group == 1
        written = 0
        for n in range(0, len(x), B):
            used = min(B, len(x) - n)
            rows = (used + 3) // 4 * 4
            if single:
                for b in range(used):
                    start_encoding_one(states, b)
            elif n % group == 0:
                start_encoding_one(states, 0)

            for t in range(len(operations)):
                operation = operations[t]
                if operation[0] != CODE:
                    _pass(
                        operation, prior, below, scratch, belief, root, down, up, rows, bits, K, W
                    )
                    continue
                v, here, ignorant = operation[3], operation[5] * B * K, operation[7]
                table = operation[4] * (X + 1) * K
                _belief(belief, prior, below, scratch, here, ignorant, rows, bits, K, W)
                for b in range(rows):
                    value = x[n + b, v] if b < used else 0
                    entry = table + value * K
                    if b < used:
                        total = _total(belief, b * K, K, W)
                        low = _bound(belief, b * K, cumulative, entry, total, room, K, W)
                        high = _bound(belief, b * K, cumulative, entry + K, total, room, K, W)
                        coder = b if single else 0
                        encode_one(states, out, coder, low + value, high - low + 1)
                    _learn(below, here + b * K, scratch, cumulative, entry, ignorant, bits, K, W)

            if single:
                for b in range(used):
                    length = finish_one(states, out, b)
                    for i in range(length):
                        data[written + i] = out[b, i]
                    written += length
                    ends[n + b] = written
            elif (n + B) % group == 0 or n + B >= len(x):
                length = finish_one(states, out, 0)
                for i in range(length):
                    data[written + i] = out[0, i]
                written += length
                ends[n // group] = written

    return encode


@cache
def compiled_decode(units: int) -> Callable[..., bool]:
    r"""Compiles the decoder for a number of units. It tells whether all streams were sound."""
    import numba

    K, W, B = units, width(units, itemsize=8), BLOCK

    @numba.njit(cache=True, nogil=True)
    def decode(  # noqa: ANN202
        x, group, operations, root, down, up, cumulative, X, bits,
        prior, below, belief, scratch, states, data, ends,
    ):  # fmt: skip  # noqa: ANN001
        room = float(TOTAL - X)
        single = group == 1
        sound = True
        for n in range(0, len(x), B):
            used = min(B, len(x) - n)
            rows = (used + 3) // 4 * 4
            if single:
                for b in range(used):
                    start_decoding_one(states, data, b, ends[n + b], ends[n + b + 1])
            elif n % group == 0:
                start_decoding_one(states, data, 0, ends[n // group], ends[n // group + 1])

            for t in range(len(operations)):
                operation = operations[t]
                if operation[0] != CODE:
                    _pass(
                        operation, prior, below, scratch, belief, root, down, up, rows, bits, K, W
                    )
                    continue
                v, here, ignorant = operation[3], operation[5] * B * K, operation[7]
                table = operation[4] * (X + 1) * K
                _belief(belief, prior, below, scratch, here, ignorant, rows, bits, K, W)
                for b in range(rows):
                    value = 0
                    if b < used:
                        coder = b if single else 0
                        quantile = peek_one(states, coder)
                        total = _total(belief, b * K, K, W)
                        low, beyond = 0, X  # low(value) <= quantile < low(beyond)
                        start, end = 0, TOTAL - X
                        while beyond - low > 1:
                            middle = (low + beyond) // 2
                            entry = table + middle * K
                            bound = _bound(belief, b * K, cumulative, entry, total, room, K, W)
                            if bound + middle <= quantile:
                                low, start = middle, bound
                            else:
                                beyond, end = middle, bound
                        value = low
                        x[n + b, v] = value
                        advance_one(states, data, coder, start + value, end - start + 1)
                    entry = table + value * K
                    _learn(below, here + b * K, scratch, cumulative, entry, ignorant, bits, K, W)

            if single:
                for b in range(used):
                    sound &= canonical_one(states, b)
            elif (n + B) % group == 0 or n + B >= len(x):
                sound &= canonical_one(states, 0)
        return sound

    return decode
