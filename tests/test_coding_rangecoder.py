r"""Tests for the probnets.coding.rangecoder and probnets.coding.rangeloops modules."""

import itertools
import math

import hypothesis.strategies as st
import numba
import numpy as np
import pytest
from constriction import stream as peer  # pyright: ignore[reportAttributeAccessIssue]
from hypothesis import given, settings

from probnets.coding.rangecoder import RangeDecoder, RangeEncoder
from probnets.coding.rangeloops import (
    LockstepDecoder,
    advance_one,
    canonical_one,
    coder_states,
    encode_chain,
    encode_intervals,
    encode_one,
    finish_one,
    peek_one,
    start_decoding_one,
    start_encoding_one,
    stream_capacity,
)

TOTAL = 1 << 24
HALF, QUARTER = TOTAL // 2, TOTAL // 4


def encoder_of(intervals):
    encoder = RangeEncoder()
    for low, freq in intervals:
        encoder.encode(low, freq)
    return encoder


def finish_python(intervals):
    return encoder_of(intervals).finish()


def finish_compiled(intervals):
    low, freq = np.array(intervals, np.uint32).reshape(-1, 2).T
    return encode_chain(low, freq)


PATHS = {"python": finish_python, "compiled": finish_compiled}


def exact(intervals):
    r"""The final interval as numbers without an end, and the bits of their fraction."""
    lower, width, bits = 0, 2**64 - 1, 64
    for low, freq in intervals:
        lower, width = lower + (width >> 24) * low, (width >> 24) * freq
        if width < 1 << 32:
            lower, width, bits = lower << 32, width << 32, bits + 32
    return lower, width, bits


def shortest(intervals):
    r"""The first stream in the final interval, over all lengths from zero."""
    lower, width, bits = exact(intervals)
    for size in range(bits // 8 + 1):
        unit = 1 << (bits - 8 * size)
        if (number := -(-lower // unit)) * unit < lower + width:
            return number.to_bytes(size, "big")
    raise AssertionError("the width holds a whole number of every stream")


def model_of(low, freq):
    r"""A constriction model with these integer intervals, and the symbol that owns this one."""
    parts = np.array([low, freq, TOTAL - low - freq])
    weights = (parts[parts > 0] - 1).astype(np.float64)  # so that its scale is exactly 1
    return peer.model.Categorical(weights, perfect=False), int(low > 0)


def constriction_words(intervals):
    encoder = peer.queue.RangeEncoder()
    for low, freq in intervals:
        model, symbol = model_of(low, freq)
        encoder.encode(symbol, model)
    return encoder.get_compressed()


def random_intervals(rng, symbols):
    r"""Symbols of all sizes, with a taste for the ends of the quantiles."""
    skew = rng.choice([0.01, 1.0, 4.0, 12.0])
    bits = rng.exponential(skew, symbols).clip(0, 24)
    freq = (TOTAL * 2.0**-bits).astype(np.int64)
    kind = rng.random(symbols)
    freq[kind < 0.05] = 1
    freq[kind > 0.95] = TOTAL - 1 - rng.integers(0, 3, (kind > 0.95).sum())
    freq = freq.clip(1, TOTAL - 1)

    place = rng.choice([rng.random(symbols), np.zeros(symbols), np.ones(symbols)])
    low = np.rint(place * (TOTAL - freq)).astype(np.int64)
    return list(zip(low.tolist(), freq.tolist(), strict=True))


def streams(number, symbols):
    rng = np.random.default_rng(0)
    return [random_intervals(rng, rng.integers(0, symbols)) for _ in range(number)]


def straddling_intervals(rng, symbols, *, carries):
    r"""Symbols whose interval stays around one half until the last one takes a side of it."""
    intervals = []
    for _ in range(symbols):
        lower, width, bits = exact(intervals)
        scale = width >> 24
        quantile = ((1 << (bits - 1)) - lower) // scale
        freq = int(2 ** rng.uniform(2, 16))
        low = min(max(quantile - int(rng.integers(1, freq)), 0), TOTAL - freq)
        intervals.append((low, freq))

    lower, width, bits = exact(intervals)
    quantile = ((1 << (bits - 1)) - lower) // (width >> 24)
    side = (quantile + 1, TOTAL - quantile - 1) if carries else (0, quantile)
    return [*intervals, side]


any_interval = st.integers(1, TOTAL).flatmap(
    lambda freq: st.tuples(st.integers(0, TOTAL - freq), st.just(freq))
)


@pytest.mark.parametrize("finish", PATHS.values(), ids=list(PATHS))
@pytest.mark.parametrize(
    ("intervals", "stream"),
    [
        ([], ""),
        ([(0, 1)] * 5, ""),  # zero lies in it, and a decoder reads zeros past the end
        ([(0, TOTAL)] * 5, ""),
        ([(HALF, HALF)], "80"),
        ([(HALF, HALF), (QUARTER, QUARTER)], "a0"),  # 1/2 + 1/8
        ([(0, HALF), (HALF, QUARTER), (QUARTER, QUARTER)], "48"),  # 1/4 + 1/32
        ([(1, 1)], "000001"),
        ([(0x123456, 1)], "123456"),
    ],
)
def test_by_hand(finish, intervals, stream):
    assert finish(intervals).hex() == stream


def test_sealed_by_hand():
    # The lower end is 2^63 - 2^23, and the next whole word after it 2^63.
    assert encoder_of([(HALF, HALF)]).sealed_words().tolist() == [1 << 31]
    assert encoder_of([(HALF, HALF)]).sealed().hex() == "80000000"
    assert encoder_of([(HALF, HALF)]).sealed_words().dtype == np.uint32
    assert encoder_of([]).sealed() == b""


def test_sealed_words_are_constrictions():
    for intervals in streams(3000, 60):
        words = encoder_of(intervals).sealed_words()
        np.testing.assert_array_equal(words, constriction_words(intervals))


def test_carries_run_through_words():
    rng = np.random.default_rng(0)
    words_before = {False: set(), True: set()}
    for symbols, carries in itertools.product([*range(1, 60)] * 3, [False, True]):
        intervals = straddling_intervals(rng, symbols, carries=carries)
        lower, width, bits = exact(intervals[:-1])
        if not lower < 1 << (bits - 1) < lower + width:
            continue  # one half fell into what rounding leaves over

        # The words until here are 7fffffff ffffffff ...
        words_before[carries].add((bits - 64) // 32)

        encoder = encoder_of(intervals)
        words = encoder.sealed_words()
        assert words[0] >> 31 == carries
        np.testing.assert_array_equal(words, constriction_words(intervals))
        assert encoder.finish() == finish_compiled(intervals) == shortest(intervals)

    assert set(range(1, 9)) <= words_before[False] & words_before[True]


def test_lower_end_lands_on_a_carry():
    intervals = [(131070, 1), (1, 1 << 16)]
    lower, width, bits = exact(intervals)
    assert (bits, lower % 2**64 + (width >> 24) * 256) == (96, 2**64)

    for last in [(256, 1), (256, 70000), (255, 2)]:
        stream = [*intervals, last, (0, 1), (5, 7)]
        assert finish_python(stream) == finish_compiled(stream) == shortest(stream)
        words = encoder_of(stream).sealed_words()
        np.testing.assert_array_equal(words, constriction_words(stream))


def test_width_lands_on_a_word():
    intervals = [(9, 1), (9, 2), (9, 32769), (9, 1 << 16)]
    assert exact(intervals)[1:] == (1 << 32, 96)

    for stream in [intervals, [*intervals, (5, 7)], [*intervals, (5, 7), (9, 3)]]:
        assert finish_python(stream) == finish_compiled(stream) == shortest(stream)
        words = encoder_of(stream).sealed_words()
        np.testing.assert_array_equal(words, constriction_words(stream))

        decoder = LockstepDecoder([finish_python(stream)])
        for low, freq in stream:
            decoder.advance(np.array([low]), np.array([freq]))
        assert decoder.canonical()


def test_finish_is_the_shortest_stream():
    for intervals in streams(1500, 60):
        stream = encoder_of(intervals).finish()

        assert stream == shortest(intervals)
        assert stream == finish_compiled(intervals)
        assert not stream.endswith(b"\0")


@settings(deadline=None)
@given(st.lists(any_interval, max_size=30))
def test_finish_of_any_intervals(intervals):
    assert finish_python(intervals) == finish_compiled(intervals) == shortest(intervals)


@pytest.mark.parametrize("freq", [1 << 9, 1 << 14, HALF, 3 * QUARTER, TOTAL - 1])
def test_no_stream_of_two_bytes_is_shorter(freq):
    everything = [
        b"",
        *(bytes(s) for n in (1, 2) for s in itertools.product(range(256), repeat=n)),
    ]
    decoder = LockstepDecoder(everything)
    rng = np.random.default_rng(freq)
    intervals = [(int(rng.integers(0, TOTAL - freq + 1)), freq) for _ in range(2)]

    owned = np.ones(len(everything), np.bool_)
    for low, _ in intervals:
        quantile = decoder.peek()
        owned &= (low <= quantile) & (quantile < low + freq)
        decoder.advance(np.where(owned, low, quantile), np.where(owned, freq, 1))

    stream = finish_python(intervals)
    readable = [s for s, own in zip(everything, owned, strict=True) if own]
    if len(stream) > 2:
        assert not readable
    else:
        assert min(map(len, readable)) == len(stream)
        assert [s for s, c in zip(everything, decoder.canonical() & owned, strict=True) if c] == [
            stream
        ]


def test_length_is_a_byte_from_the_ideal():
    lengths, ideals = [], []
    for intervals in streams(500, 60):
        ideal = sum(24 - math.log2(freq) for _, freq in intervals)
        lengths.append(8 * len(finish_python(intervals)))
        ideals.append(ideal)

        # Rounding keeps at least 255 of 256 parts of the width at each symbol.
        assert lengths[-1] < ideal + 8 + len(intervals) * math.log2(256 / 255) + 1e-6

    assert sum(lengths) < sum(ideals) + 4.5 * len(lengths)


def test_capacity_is_never_exceeded():
    rng = np.random.default_rng(0)
    for largest in [2, 3, 4, 300]:
        freq = rng.integers(1, largest, (20, 2000))
        low = rng.integers(0, TOTAL - freq + 1)
        assert max(map(len, encode_intervals(low, freq))) <= stream_capacity(2000) - 8


@pytest.mark.parametrize("sealed", [False, True])
def test_round_trip(sealed):
    for intervals in streams(500, 60):
        encoder = encoder_of(intervals)
        decoder = RangeDecoder(encoder.sealed() if sealed else encoder.finish())

        for low, freq in intervals:
            assert low <= decoder.peek() < low + freq
            decoder.advance(low, freq)

        assert sealed or decoder.canonical()


def test_constriction_decodes_after_padding():
    for intervals in streams(500, 60):
        stream = finish_python(intervals)
        stream += bytes(-len(stream) % 4)
        words = np.frombuffer(stream, ">u4").astype(np.uint32)
        decoder = peer.queue.RangeDecoder(words)

        for low, freq in intervals:
            model, symbol = model_of(low, freq)
            assert decoder.decode(model) == symbol


def test_single_symbol_alphabets_cost_nothing():
    intervals = [(0x123456, 1 << 5), *[(0, TOTAL)] * 1000]

    assert finish_python(intervals) == finish_compiled(intervals) == shortest(intervals)
    assert len(finish_python(intervals)) == 3


def test_encoder_goes_on_after_finish():
    first, second = streams(20, 60)[-2:]
    encoder = encoder_of(first)
    assert (encoder.finish(), encoder.sealed()) == (encoder.finish(), encoder.sealed())
    for low, freq in second:
        encoder.encode(low, freq)

    assert encoder.finish() == finish_python([*first, *second])


def test_takes_integers_of_numpy():
    intervals = random_intervals(np.random.default_rng(0), 40)
    encoder, stream = encoder_of(np.array(intervals, np.uint32)), finish_python(intervals)
    decoder = RangeDecoder(stream)
    for low, freq in np.array(intervals):
        decoder.advance(low, freq)

    assert encoder.finish() == stream
    assert decoder.canonical()


def decode_python(stream, bounds, symbols):
    r"""Decodes with one alphabet that splits the quantiles at the bounds."""
    decoder, intervals = RangeDecoder(stream), []
    for _ in range(symbols):
        index = np.searchsorted(bounds, decoder.peek(), side="right") - 1
        intervals.append((int(bounds[index]), int(bounds[index + 1] - bounds[index])))
        decoder.advance(*intervals[-1])
    return intervals, decoder.canonical()


def decode_lockstep(streams, bounds, symbols):
    decoder, low, freq = LockstepDecoder(streams), [], []
    for _ in range(symbols):
        index = np.searchsorted(bounds, decoder.peek(), side="right") - 1
        low.append(bounds[index])
        freq.append(bounds[index + 1] - bounds[index])
        decoder.advance(low[-1], freq[-1])

    pairs = np.stack([low, freq], -1).swapaxes(0, 1).tolist() if symbols else [[]] * len(streams)
    return [[tuple(pair) for pair in row] for row in pairs], decoder.canonical().tolist()


BOUNDS = {
    "halves": [0, HALF, TOTAL],
    "rare": [0, 1, 2, TOTAL - 1, TOTAL],
    "mixed": [0, 5, QUARTER, QUARTER + 70000, TOTAL - 300, TOTAL],
    "single": [0, TOTAL],
    "many": [*range(0, TOTAL, 1 << 16), TOTAL],
}


@settings(deadline=None, max_examples=300)
@given(
    stream=st.lists(st.sampled_from([0, 1, 127, 128, 254, 255]), max_size=24).map(bytes)
    | st.binary(max_size=24),
    name=st.sampled_from(list(BOUNDS)),
    symbols=st.integers(0, 40),
)
def test_any_bytes_decode_and_canonical_is_exact(stream, name, symbols):
    bounds = np.array(BOUNDS[name])
    intervals, canonical = decode_python(stream, bounds, symbols)

    assert canonical == (finish_python(intervals) == stream)
    assert decode_lockstep([stream], bounds, symbols) == ([intervals], [canonical])


@pytest.mark.parametrize("name", BOUNDS)
def test_mutated_streams(name):
    rng = np.random.default_rng(0)
    bounds, symbols = np.array(BOUNDS[name]), 30
    index = rng.integers(0, len(bounds) - 1, (100, symbols))
    good = encode_intervals(bounds[index], np.diff(bounds)[index])

    bad = []
    for stream in good:
        flipped = bytearray(stream or b"\1")
        flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        bad += [stream[:-1], stream + b"\0", stream + b"\1", bytes(flipped), b"\xff" * 40]

    intervals, canonical = decode_lockstep(good + bad, bounds, symbols)
    assert canonical[:100] == [True] * 100
    for stream, row, sound in zip(good + bad, intervals, canonical, strict=True):
        assert decode_python(stream, bounds, symbols) == (row, sound)
        assert sound == (finish_python(row) == stream)


def test_quantile_beyond_the_last():
    # The width 2^64 - 1 holds 2^24 quantiles of 2^40 - 1, and then 2^24 - 1 numbers more.
    for stream, sound in [("ffffffffff000000", False), ("fffffffffeffffff", True)]:
        data = bytes.fromhex(stream)
        decoder, lockstep = RangeDecoder(data), LockstepDecoder([data])
        assert decoder.peek() == lockstep.peek()[0] == TOTAL - 1

        decoder.advance(TOTAL - 1, 1)
        lockstep.advance(np.array([TOTAL - 1]), np.array([1]))
        assert decoder._sound == sound
        assert not decoder.canonical()
        assert not lockstep.canonical().any()


def test_rows_and_chain():
    rng = np.random.default_rng(0)
    rows = np.array([random_intervals(rng, 40) for _ in range(30)])
    low, freq = rows[..., 0], rows[..., 1]

    for dtype in [np.uint32, np.int32, np.int64]:
        encoded = encode_intervals(low.astype(dtype), freq.astype(dtype))
        assert encoded == [finish_python(row) for row in rows.tolist()]

    turns = rows.swapaxes(0, 1).reshape(-1, 2).tolist()
    assert encode_chain(low.T, freq.T) == finish_python(turns)


@numba.njit
def _interleave(low, freq, state, out, lengths):
    for row in range(len(low)):
        start_encoding_one(state, row)
    for t in range(low.shape[1]):
        for row in range(len(low)):
            encode_one(state, out, row, low[row, t], freq[row, t])
    for row in range(len(low)):
        lengths[row] = finish_one(state, out, row)


@numba.njit
def _deinterleave(low, freq, state, data, lengths):
    begin = good = 0
    for row in range(len(low)):
        start_decoding_one(state, data, row, begin, begin + lengths[row])
        begin += lengths[row]
    for t in range(low.shape[1]):
        for row in range(len(low)):
            good += low[row, t] <= peek_one(state, row) < low[row, t] + freq[row, t]
            advance_one(state, data, row, low[row, t], freq[row, t])
    for row in range(len(low)):
        good += canonical_one(state, row)
    return good


def test_inside_another_loop():
    rng = np.random.default_rng(0)
    rows = np.array([random_intervals(rng, 40) for _ in range(30)])
    low, freq = rows[..., 0].astype(np.int64), rows[..., 1].astype(np.int64)
    state, lengths = coder_states(30), np.empty(30, np.int64)
    out = np.empty((30, stream_capacity(40)), np.uint8)

    _interleave(low, freq, state, out, lengths)
    encoded = [out[row, : lengths[row]].tobytes() for row in range(30)]
    assert encoded == encode_intervals(low, freq)

    data = np.frombuffer(bytearray(b"".join(encoded)), np.uint8)
    assert _deinterleave(low, freq, state, data, lengths) == 30 * 40 + 30


def test_empty():
    assert encode_intervals(np.empty((0, 3), int), np.empty((0, 3), int)) == []
    assert encode_intervals(np.empty((2, 0), int), np.empty((2, 0), int)) == [b"", b""]
    assert LockstepDecoder([]).peek().shape == LockstepDecoder([]).canonical().shape == (0,)
    assert LockstepDecoder([b"", b"\0", b"\1"]).canonical().tolist() == [True, False, False]
    assert RangeDecoder(b"").canonical()


@pytest.mark.parametrize(
    "interval", [(0, 0), (-1, 5), (0, -1), (TOTAL, 1), (5, TOTAL), (0, TOTAL + 1), (2**33, 1)]
)
def test_rejects_bad_intervals(interval):
    low, freq = np.array([[0, interval[0]]]), np.array([[1, interval[1]]])
    message = rf"expected low >= 0, .*, got low {interval[0]}, freq {interval[1]}"

    with pytest.raises(ValueError, match=message):
        RangeEncoder().encode(*interval)
    with pytest.raises(ValueError, match=message):
        RangeDecoder(b"").advance(*interval)
    with pytest.raises(ValueError, match=message):
        encode_intervals(low, freq)
    with pytest.raises(ValueError, match=message):
        LockstepDecoder([b"", b""]).advance(low[0], freq[0])


def test_rejects_intervals_of_other_quantiles():
    message = "expected an interval that holds quantile 8388608"

    with pytest.raises(ValueError, match=message):
        RangeDecoder(b"\x80").advance(0, HALF)

    decoder = LockstepDecoder([b"", b"\x80"])
    with pytest.raises(ValueError, match=rf"{message} of stream 1, got low 0, freq {HALF}"):
        decoder.advance(np.array([0, 0]), np.array([1, HALF]))
    assert decoder.peek().tolist() == [0, HALF]  # and no stream moved


def test_rejects_bad_arrays():
    with pytest.raises(ValueError, match=r"expected low and freq \(N, T\), got \(2,\) and \(2,\)"):
        encode_intervals(np.ones(2, int), np.ones(2, int))
    with pytest.raises(ValueError, match=r"of one shape, got \(2,\) and \(3,\)"):
        encode_chain(np.ones(2, int), np.ones(3, int))
    with pytest.raises(ValueError, match=r"expected low and freq \(1,\), got \(2,\) and \(2,\)"):
        LockstepDecoder([b""]).advance(np.ones(2, int), np.ones(2, int))
    with pytest.raises(TypeError, match="expected integers, got low float64, freq int64"):
        encode_intervals(np.ones((1, 2)), np.ones((1, 2), int))
    with pytest.raises(TypeError, match="integer"):
        RangeEncoder().encode(0.5, 1)  # pyright: ignore[reportArgumentType]
