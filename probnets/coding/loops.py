r"""The codec as compiled loops: messages and range coder fused, many rows in lockstep.

Rows go through the schedule in blocks. Whatever the block, the thread or the processor, the
numbers are integers and the bytes the same as those of :mod:`probnets.coding.reference`.
"""

__all__ = ["BLOCK", "compiled_decode", "compiled_encode"]

import math
from collections.abc import Callable
from functools import cache

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

# Numba derives the types of compiled loops.
# ruff: noqa: ANN001, ANN202
# pyright: reportMissingParameterType=false

BLOCK = 64  # rows in lockstep


def _normalise(target, o, source, i, rows, bits, K, W):
    r"""Brings positive rows to integers of so many bits, in a compiled loop.

    A row is scaled by the power of two that brings its largest number into
    :math:`[2^{b - 1}, 2^b)`, rounded down, and raised by one so that nothing dies out.
    """
    raise NotImplementedError


@overload(_normalise, prefer_literal=True)
def _normalise_rows(target, o, source, i, rows, bits, K, W):
    K, W = K.literal_value, W.literal_value

    def loop(target, o, source, i, rows, bits, K, W):
        one = fill(1.0, W)
        for b in range(0, rows * K, K):
            top = 0.0
            for k in range(b, b + K, W):
                top = max(top, row_max(load(source, i + k, W)))
            scale = fill(power_of_two(top, bits), W)
            for k in range(b, b + K, W):
                store(target, o + k, floor(load(source, i + k, W) * scale) + one)

    return loop


def _normalise_product(target, o, x, i, y, j, rows, bits, K, W):
    r"""Multiplies rows number by number, and brings them to integers of so many bits."""
    raise NotImplementedError


@overload(_normalise_product, prefer_literal=True)
def _normalise_product_rows(target, o, x, i, y, j, rows, bits, K, W):
    K, W = K.literal_value, W.literal_value

    def loop(target, o, x, i, y, j, rows, bits, K, W):
        one = fill(1.0, W)
        for b in range(0, rows * K, K):
            top = 0.0
            for k in range(b, b + K, W):
                top = max(top, row_max(load(x, i + k, W) * load(y, j + k, W)))
            scale = fill(power_of_two(top, bits), W)
            for k in range(b, b + K, W):
                product = load(x, i + k, W) * load(y, j + k, W)
                store(target, o + k, floor(product * scale) + one)

    return loop


def _pass(operation, prior, below, scratch, belief, root, down, up, rows, bits, K, W):
    r"""Takes the messages of one operation: into a region, or out of it."""
    raise NotImplementedError


@overload(_pass, prefer_literal=True)
def _pass_rows(operation, prior, below, scratch, belief, root, down, up, rows, bits, K, W):
    K, W = K.literal_value, W.literal_value

    def loop(operation, prior, below, scratch, belief, root, down, up, rows, bits, K, W):
        kind, parent, group = operation[0], operation[2], operation[4] * K * K
        here, above = operation[5] * BLOCK * K, operation[6] * BLOCK * K
        ignorant = operation[7]
        if kind == ENTER and parent < 0:
            for b in range(0, rows * K, K):
                for k in range(0, K, W):
                    store(scratch, b + k, load(root, k, W))
            _normalise(prior, here, scratch, 0, rows, bits, K, W)
        elif kind == ENTER:
            _belief(belief, prior, below, above, ignorant, rows, bits, K, W)
            clear(scratch, 0, rows * K, W)
            add_products(scratch, 0, belief, 0, K, 1, down, group, rows, K, K, W)
            _normalise(prior, here, scratch, 0, rows, bits, K, W)
        else:
            clear(scratch, 0, rows * K, W)
            add_products(scratch, 0, below, here, K, 1, up, group, rows, K, K, W)
            if ignorant:
                _normalise(below, above, scratch, 0, rows, bits, K, W)
            else:
                _normalise_product(below, above, scratch, 0, below, above, rows, bits, K, W)

    return loop


def _belief(belief, prior, below, here, ignorant, rows, bits, K, W):
    r"""Computes what is believed of a region's unit, from above and from below."""
    raise NotImplementedError


@overload(_belief, prefer_literal=True)
def _belief_rows(belief, prior, below, here, ignorant, rows, bits, K, W):
    K, W = K.literal_value, W.literal_value

    def loop(belief, prior, below, here, ignorant, rows, bits, K, W):
        if ignorant:
            for k in range(0, rows * K, W):
                store(belief, k, load(prior, here + k, W))
        else:
            _normalise_product(belief, 0, prior, here, below, here, rows, bits, K, W)

    return loop


def _learn(below, here, cumulative, entry, ignorant, bits, K, W):
    r"""Multiplies the probability of a value into what comes from below."""
    raise NotImplementedError


@overload(_learn, prefer_literal=True)
def _learn_row(below, here, cumulative, entry, ignorant, bits, K, W):
    K, W = K.literal_value, W.literal_value

    def loop(below, here, cumulative, entry, ignorant, bits, K, W):
        for k in range(0, K, W):
            row = load(cumulative, entry + K + k, W) - load(cumulative, entry + k, W)
            store(below, here + k, row if ignorant else row * load(below, here + k, W))
        _normalise(below, here, below, here, 1, bits, K, W)

    return loop


def _bound(belief, cumulative, entry, total, room, K, W):
    r"""Computes the integer cumulative probability, less the value, at an entry of the table."""
    raise NotImplementedError


@overload(_bound, prefer_literal=True)
def _bound_row(belief, cumulative, entry, total, room, K, W):
    K, W = K.literal_value, W.literal_value

    def loop(belief, cumulative, entry, total, room, K, W):
        mass = 0.0
        for k in range(0, K, W):
            mass += row_sum(load(belief, k, W) * load(cumulative, entry + k, W))
        return math.floor(mass / total * room)

    return loop


def _total(belief, K, W):
    r"""Sums a row of beliefs, times the total of a table."""
    raise NotImplementedError


@overload(_total, prefer_literal=True)
def _total_row(belief, K, W):
    K, W = K.literal_value, W.literal_value

    def loop(belief, K, W):
        total = 0.0
        for k in range(0, K, W):
            total += row_sum(load(belief, k, W))
        return total * TOTAL

    return loop


@cache
def compiled_encode(units: int) -> Callable[..., None]:
    r"""Compiles the encoder for a number of units."""
    import numba

    K, W, B = units, width(units, itemsize=8), BLOCK

    @numba.njit(cache=True, nogil=True)
    def encode(
        x, group, operations, root, down, up, cumulative, X, bits,
        prior, below, belief, scratch, states, out, data, ends,
    ):  # fmt: skip
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
                for b in range(used):
                    row, value = here + b * K, x[n + b, v]
                    entry = table + value * K
                    _belief(belief, prior, below, row, ignorant, 1, bits, K, W)
                    total = _total(belief, K, W)
                    low = _bound(belief, cumulative, entry, total, room, K, W) if value else 0
                    high = _bound(belief, cumulative, entry + K, total, room, K, W)
                    encode_one(states, out, b if single else 0, low + value, high - low + 1)
                    _learn(below, row, cumulative, entry, ignorant, bits, K, W)
                for row in range(here + used * K, here + rows * K):
                    below[row] = 1.0  # rows past the end

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
    def decode(
        x, group, operations, root, down, up, cumulative, X, bits,
        prior, below, belief, scratch, states, data, ends, modes,
    ):  # fmt: skip
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
                for b in range(used):
                    row, coder = here + b * K, b if single else 0
                    _belief(belief, prior, below, row, ignorant, 1, bits, K, W)
                    total = _total(belief, K, W)
                    quantile = peek_one(states, coder)

                    # Bisection, which asks for the most frequent value first.
                    value, beyond = 0, X
                    start, end = 0, TOTAL - X
                    middle = modes[operation[4]]
                    if middle == 0:
                        middle = 1
                    while beyond - value > 1:
                        entry = table + middle * K
                        bound = _bound(belief, cumulative, entry, total, room, K, W)
                        if bound + middle <= quantile:
                            value, start = middle, bound
                            probed = middle == modes[operation[4]]
                        else:
                            beyond, end = middle, bound
                            probed = False
                        middle = value + 1 if probed else (value + beyond) // 2
                    x[n + b, v] = value
                    advance_one(states, data, coder, start + value, end - start + 1)
                    _learn(below, row, cumulative, table + value * K, ignorant, bits, K, W)
                for row in range(here + used * K, here + rows * K):
                    below[row] = 1.0  # rows past the end

            if single:
                for b in range(used):
                    sound &= canonical_one(states, b)
            elif (n + B) % group == 0 or n + B >= len(x):
                sound = canonical_one(states, 0)
            if not sound:
                return False  # without going through what else a forged stream may claim
        return True

    return decode
