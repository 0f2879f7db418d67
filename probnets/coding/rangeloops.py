r"""Range coding of integer intervals in compiled loops, bit for bit as in plain Python.

Kernels that fuse the coder into other loops call the functions that end on ``_one``. They keep
one coder per row of an array from :func:`coder_states`, and trust their caller: rows exist,
intervals are not empty and end within :math:`2^{24}`, and a row of ``out`` has room for
:func:`stream_capacity` bytes.
"""

__all__ = [
    "LockstepDecoder",
    "advance_one",
    "canonical_one",
    "coder_states",
    "encode_chain",
    "encode_intervals",
    "encode_one",
    "finish_one",
    "peek_one",
    "start_decoding_one",
    "start_encoding_one",
    "stream_capacity",
]

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numba
import numpy as np

from .rangecoder import PRECISION

# The columns of a state. Eight words keep each coder on its own cache line.
_LOWER, _WIDTH, _POSITION, _OFFSET, _END, _FAULT, _COLUMNS = 0, 1, 2, 3, 4, 5, 8

# Numba turns a mix of signed and unsigned integers into floats, so that constants need a type.
_PRECISION = np.uint64(PRECISION)
_LAST = np.uint64((1 << PRECISION) - 1)
_WORD = np.uint64(32)
_FULL = np.uint64(2**64 - 1)
_NARROW = np.uint64(2**32)
_BYTE = np.uint64(8)
_TOP = np.uint64(56)  # the shift to the most significant byte
_ZERO, _ONE = np.uint64(0), np.uint64(1)

# Nothing here divides by zero or makes an array. Inlined, and without the branch that would look
# for zeros and the reference counts (`_nrt`), a symbol takes a quarter of the time.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "forceinline": True, "_nrt": False}
_compiled = numba.njit(nogil=True, cache=True, **_OPTIONS)

_Int = int | np.integer


def coder_states(rows: int) -> np.ndarray:
    r"""Returns room for the states of coders, which a start function fills row by row.

    Arguments:
        rows: The number of coders :math:`N`.

    Returns:
        The states, with shape :math:`(N, 8)`, as an array of `numpy.uint64`.
    """
    return np.zeros((rows, _COLUMNS), np.uint64)


def stream_capacity(symbols: int) -> int:
    r"""Returns the bytes that a stream of so many symbols never exceeds.

    A symbol of one quantile costs 24 bits, and rounding less than the 1 bit that any other
    symbol saves.
    """
    return symbols * PRECISION // 8 + 16


@_compiled
def start_encoding_one(state: np.ndarray, row: _Int) -> None:
    r"""Starts an encoder in a row of the states."""
    state[row, _LOWER] = _ZERO
    state[row, _WIDTH] = _FULL
    state[row, _POSITION] = _ZERO


@_compiled
def encode_one(state: np.ndarray, out: np.ndarray, row: _Int, low: _Int, freq: _Int) -> None:
    r"""Appends a symbol, as :meth:`RangeEncoder.encode` does.

    Arguments:
        state: The states, with shape :math:`(N, 8)`.
        out: The bytes of the streams, with shape :math:`(N, *)`.
        row: The coder.
        low: The first quantile of the symbol.
        freq: The number of quantiles of the symbol.
    """
    scale = state[row, _WIDTH] >> _PRECISION
    width = scale * np.uint64(freq)
    lower = state[row, _LOWER] + scale * np.uint64(low)

    if lower < state[row, _LOWER]:  # the sum left its 64 bits
        _carry(out, row, np.int64(state[row, _POSITION]))

    if width < _NARROW:
        position = np.int64(state[row, _POSITION])
        _write(out, row, position, lower, 4)
        state[row, _POSITION] = np.uint64(position + 4)
        lower <<= _WORD
        width <<= _WORD

    state[row, _LOWER] = lower
    state[row, _WIDTH] = width


@_compiled
def finish_one(state: np.ndarray, out: np.ndarray, row: _Int) -> np.int64:
    r"""Writes the shortest end of a stream, as :meth:`RangeEncoder.finish` does.

    Returns:
        The length of the stream, which begins at ``out[row, 0]``.
    """
    position = np.int64(state[row, _POSITION])
    lower = state[row, _LOWER]
    point = lower + _distance(lower, state[row, _WIDTH])

    if point < lower:
        _carry(out, row, position)

    _write(out, row, position, point, 8)
    length = position + 8
    while length > 0 and out[row, length - 1] == 0:
        length -= 1
    return length


@_compiled
def start_decoding_one(
    state: np.ndarray, data: np.ndarray, row: _Int, begin: _Int, end: _Int
) -> None:
    r"""Starts a decoder in a row of the states.

    Arguments:
        state: The states, with shape :math:`(N, 8)`.
        data: The bytes of all streams, one after the other.
        row: The coder.
        begin: Where its stream begins in the data.
        end: Where it ends.
    """
    state[row, _LOWER] = _ZERO
    state[row, _WIDTH] = _FULL
    state[row, _POSITION] = np.uint64(begin + 8)
    state[row, _OFFSET] = _read(data, begin, end) << _WORD | _read(data, begin + 4, end)
    state[row, _END] = np.uint64(end)
    state[row, _FAULT] = _ONE if end > begin and data[end - 1] == 0 else _ZERO


@_compiled
def peek_one(state: np.ndarray, row: _Int) -> np.int64:
    r"""Returns the next quantile as a signed integer, as :meth:`RangeDecoder.peek` does."""
    quantile = state[row, _OFFSET] // (state[row, _WIDTH] >> _PRECISION)
    return np.int64(min(quantile, _LAST))


@_compiled
def advance_one(state: np.ndarray, data: np.ndarray, row: _Int, low: _Int, freq: _Int) -> None:
    r"""Moves past a symbol, as :meth:`RangeDecoder.advance` does.

    An interval that does not hold the quantile spoils :func:`canonical_one`, and no more.
    """
    scale = state[row, _WIDTH] >> _PRECISION
    start = scale * np.uint64(low)
    width = scale * np.uint64(freq)
    lower = state[row, _LOWER] + start
    offset = state[row, _OFFSET] - start

    if offset >= width:
        state[row, _FAULT] = _ONE

    if width < _NARROW:
        position = np.int64(state[row, _POSITION])
        offset = offset << _WORD | _read(data, position, np.int64(state[row, _END]))
        state[row, _POSITION] = np.uint64(position + 4)
        lower <<= _WORD
        width <<= _WORD

    state[row, _LOWER] = lower
    state[row, _WIDTH] = width
    state[row, _OFFSET] = offset


@_compiled
def canonical_one(state: np.ndarray, row: _Int) -> bool:
    r"""Tells whether :func:`finish_one` wrote the stream, as :meth:`RangeDecoder.canonical`."""
    read = state[row, _POSITION] >= state[row, _END] and state[row, _FAULT] == _ZERO
    return read and state[row, _OFFSET] == _distance(state[row, _LOWER], state[row, _WIDTH])


@_compiled
def _distance(lower: _Int, width: _Int) -> np.uint64:
    mask = _FULL
    for _ in range(4):
        if (_ZERO - lower) & mask < width:
            break
        mask >>= _BYTE
    return (_ZERO - lower) & mask


@_compiled
def _carry(out: np.ndarray, row: _Int, position: _Int) -> None:
    position -= 1
    while position > 0 and out[row, position] == 255:
        out[row, position] = 0
        position -= 1
    out[row, position] += np.uint8(1)


@_compiled
def _write(out: np.ndarray, row: _Int, position: _Int, value: _Int, size: int) -> None:
    for i in range(size):
        out[row, position + i] = np.uint8(value >> (_TOP - _BYTE * np.uint64(i)))


@_compiled
def _read(data: np.ndarray, position: _Int, end: _Int) -> np.uint64:
    word = _ZERO
    for i in range(position, position + 4):
        word = word << _BYTE | (np.uint64(data[i]) if i < end else _ZERO)
    return word


def encode_intervals(low: np.ndarray, freq: np.ndarray) -> list[bytes]:
    r"""Encodes each row of symbols into a stream of its own.

    Arguments:
        low: The first quantile of each symbol, with shape :math:`(N, T)`.
        freq: The number of quantiles of each symbol, with shape :math:`(N, T)`.

    Returns:
        The :math:`N` streams, equal to those of :class:`RangeEncoder`.

    Raises:
        ValueError: If an interval is empty or leaves the quantiles.

    Example:
        >>> low = np.array([[0, 1 << 23], [1 << 23, 0]])
        >>> streams = encode_intervals(low, np.full((2, 2), 1 << 22))
        >>> [stream.hex() for stream in streams]
        ['20', '80']
    """
    low, freq = np.ascontiguousarray(low), np.ascontiguousarray(freq)
    if low.ndim != 2 or low.shape != freq.shape:
        raise ValueError(f"expected low and freq (N, T), got {low.shape} and {freq.shape}")
    _check(low, freq)

    rows, symbols = low.shape
    state = coder_states(rows)
    out = np.empty((rows, stream_capacity(symbols)), np.uint8)
    lengths = np.empty(rows, np.int64)

    _encode_rows(state, out, low, freq, lengths)
    return [out[row, :length].tobytes() for row, length in enumerate(lengths.tolist())]


def encode_chain(low: np.ndarray, freq: np.ndarray) -> bytes:
    r"""Encodes all symbols into one stream, the last axis fastest.

    To code :math:`N` rows in lockstep, give the steps first, with shape :math:`(T, N)`: the
    rows then draw in turn from the stream. A :class:`RangeDecoder` reads it back, as does
    one row of states in a compiled loop.

    Arguments:
        low: The first quantile of each symbol, with shape :math:`(*)`.
        freq: The number of quantiles of each symbol, with shape :math:`(*)`.

    Returns:
        The stream, equal to that of :class:`RangeEncoder`.

    Raises:
        ValueError: If an interval is empty or leaves the quantiles.

    Example:
        >>> encode_chain(np.array([0, 1 << 23]), np.array([1 << 23, 1 << 22])).hex()
        '40'
    """
    low, freq = np.asarray(low), np.asarray(freq)
    if low.shape != freq.shape:
        raise ValueError(f"expected low and freq of one shape, got {low.shape} and {freq.shape}")
    return encode_intervals(low.reshape(1, -1), freq.reshape(1, -1))[0]


class LockstepDecoder:
    r"""Creates decoders for many streams that take each step together.

    Between :meth:`peek` and :meth:`advance` the caller finds the symbols that own the
    quantiles, for all streams at once. Each row does what a :class:`RangeDecoder` would.

    Arguments:
        streams: The :math:`N` streams. Zeros are read past their ends.

    Example:
        >>> decoder = LockstepDecoder([b"\x20", b"\x80"])
        >>> decoder.peek() >> 22
        array([0, 2])
        >>> decoder.advance(np.array([0, 1 << 23]), np.full(2, 1 << 22))
        >>> decoder.peek() >> 22
        array([2, 0])
    """

    def __init__(self, streams: Sequence[bytes]) -> None:
        # A bytearray, as the loops are compiled for arrays that may be written to.
        self._data = np.frombuffer(bytearray(b"".join(streams)), np.uint8)
        self._state = coder_states(len(streams))

        ends = list(accumulate(len(stream) for stream in streams))
        for row, (stream, end) in enumerate(zip(streams, ends, strict=True)):
            start_decoding_one(self._state, self._data, row, end - len(stream), end)

    def peek(self) -> np.ndarray:
        r"""Returns the next quantile of each stream, with shape :math:`(N,)`."""
        quantiles = np.empty(len(self._state), np.int64)
        _peek_rows(self._state, quantiles)
        return quantiles

    def advance(self, low: np.ndarray, freq: np.ndarray) -> None:
        r"""Moves past a symbol of each stream.

        Arguments:
            low: The first quantile of each symbol, with shape :math:`(N,)`.
            freq: The number of quantiles of each symbol, with shape :math:`(N,)`.

        Raises:
            ValueError: If an interval does not hold the quantile of :meth:`peek`.
        """
        low, freq = np.ascontiguousarray(low), np.ascontiguousarray(freq)
        if not low.shape == freq.shape == self._state.shape[:1]:
            raise ValueError(
                f"expected low and freq ({len(self._state)},), got {low.shape} and {freq.shape}"
            )
        _check(low, freq)

        if (row := _first_stray(self._state, low, freq)) >= 0:
            raise ValueError(
                f"expected an interval that holds quantile {self.peek()[row]} of stream {row}, "
                f"got low {low[row]}, freq {freq[row]}"
            )
        _advance_rows(self._state, self._data, low, freq)

    def canonical(self) -> np.ndarray:
        r"""Tells which streams their encoder ended here, with shape :math:`(N,)`."""
        rows = range(len(self._state))
        return np.array([canonical_one(self._state, row) for row in rows], np.bool_)


def _check(low: np.ndarray, freq: np.ndarray) -> None:
    if low.dtype.kind not in "iu" or freq.dtype.kind not in "iu":
        raise TypeError(f"expected integers, got low {low.dtype}, freq {freq.dtype}")

    if (index := _first_bad(low.reshape(-1), freq.reshape(-1))) >= 0:
        raise ValueError(
            f"expected low >= 0, freq >= 1 and low + freq <= 2 ** {PRECISION}, "
            f"got low {low.flat[index]}, freq {freq.flat[index]}"
        )


@_compiled
def _first_bad(low: np.ndarray, freq: np.ndarray) -> int:
    total = np.int64(1 << PRECISION)
    for i in range(low.size):
        f = np.int64(freq[i])
        if not (1 <= f <= total and 0 <= np.int64(low[i]) <= total - f):
            return i
    return -1


@_compiled
def _first_stray(state: np.ndarray, low: np.ndarray, freq: np.ndarray) -> int:
    for row in range(low.size):
        ahead = peek_one(state, row) - np.int64(low[row])
        if not 0 <= ahead < np.int64(freq[row]):
            return row
    return -1


@_compiled
def _encode_rows(
    state: np.ndarray, out: np.ndarray, low: np.ndarray, freq: np.ndarray, lengths: np.ndarray
) -> None:
    for row in range(low.shape[0]):
        start_encoding_one(state, row)
        for t in range(low.shape[1]):
            encode_one(state, out, row, low[row, t], freq[row, t])
        lengths[row] = finish_one(state, out, row)


@_compiled
def _peek_rows(state: np.ndarray, quantiles: np.ndarray) -> None:
    for row in range(quantiles.size):
        quantiles[row] = peek_one(state, row)


@_compiled
def _advance_rows(state: np.ndarray, data: np.ndarray, low: np.ndarray, freq: np.ndarray) -> None:
    for row in range(low.size):
        advance_one(state, data, row, low[row], freq[row])
