r"""Tests for the probnets.coding.codec, .loops and .reference modules."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from coding_cases import CASES, case, circuit_on, rows
from constriction import stream as peer  # pyright: ignore[reportAttributeAccessIssue]
from hypothesis import given

from probnets.circuits import TreeCircuit, binary_tree, chain
from probnets.coding import CodeTables, StreamError, decode_rows, encode_rows, reference
from probnets.coding.rangecoder import RangeEncoder
from probnets.coding.reference import decode_rows_torch, encode_rows_torch

TOTAL = 1 << 24

encoders = pytest.mark.parametrize(
    "encode", [encode_rows, encode_rows_torch], ids=["compiled", "torch"]
)
decoders = pytest.mark.parametrize(
    "decode", [decode_rows, decode_rows_torch], ids=["compiled", "torch"]
)


def dyadic_tables():
    r"""A hidden coin toss, seen twice: p(0 | k) is 1/4 or 3/4, nearly."""
    half = TOTAL // 2
    cumulative = np.array([[[0, 0], [TOTAL // 4, 3 * TOTAL // 4], [TOTAL, TOTAL]]])
    return CodeTables(
        chain(2, tied=True),
        np.array([half, half], np.int32),
        np.array([[[TOTAL, 0], [0, TOTAL]]], np.int32),
        cumulative.astype(np.int32),
    )


def bounds_of(tables, x, present=None):
    r"""The bounds of all values at each variable, in the order of coding."""
    found = []

    def code(variable, bounds):
        found.append((variable, bounds.numpy()))
        return torch.from_numpy(x[:, variable])

    reference._run(tables, len(x), present, code, "cpu")
    return found


def ideal_bits(tables, x, present=None):
    r"""The code length of each row under the integer frequencies, with shape (N,)."""
    bits = np.zeros(len(x))
    for v, bounds in bounds_of(tables, x, present):
        low, high = (np.take_along_axis(bounds, x[:, v, None] + i, 1)[:, 0] for i in (0, 1))
        bits += 24 - np.log2(high - low)
    return bits


def test_by_hand():
    tables = dyadic_tables()
    x = np.array([[0, 0], [1, 1]])
    first, second = (bounds for _, bounds in bounds_of(tables, x))

    # p(0) = 1/2. Then p(0 | 0) = 1/4 * 1/4 + 3/4 * 3/4 = 5/8, and the room is 2^24 - 2.
    assert first.tolist() == [[0, TOTAL // 2, TOTAL]] * 2
    np.testing.assert_allclose(second / TOTAL, [[0, 5 / 8, 1], [0, 3 / 8, 1]], atol=1e-6)

    # 1/2 + 1/2 * 3/8 = 0.6875 starts the interval of the second row.
    for encode in (encode_rows, encode_rows_torch):
        assert [s.hex() for s in encode(tables, x)] == ["", "b0"]


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_the_circuits_probabilities(name):
    circuit, tables = case(name)
    x = rows(name, 60)
    with torch.no_grad():
        exact = -circuit.log_prob(torch.from_numpy(x)).numpy() / np.log(2)

    # What the floor of one unit a value gives away shows in values that never occur.
    drawn = np.arange(len(x)) % 3 < 2
    loss = (ideal_bits(tables, x) - exact)[drawn]
    assert abs(loss.mean()) < 1e-3 * x.shape[1]


@pytest.mark.parametrize("name", ["binary", "quad, tied, channels", "Chow-Liu"])
def test_rounding_to_integers_costs_nothing_visible(name):
    circuit, tables = case(name)
    x = rows(name, 450)[np.arange(450) % 3 < 2]
    exact = circuit.bits_per_dimension(torch.from_numpy(x))
    assert abs(ideal_bits(tables, x).sum() / x.size - exact) < 1e-4


@pytest.mark.parametrize(
    ("name", "encode"),
    [*((name, encode_rows) for name in CASES), ("Chow-Liu", encode_rows_torch)],
)
def test_streams_do_not_depend_on_the_batch(name, encode):
    _, tables = case(name)
    x = rows(name, 1000)
    streams = encode(tables, x)
    for count in (1, 7, 64):
        assert encode(tables, x[:count]) == streams[:count]
    assert encode(tables, x[333:400]) == streams[333:400]

    chained = encode(tables, x, chained=True)
    assert len(chained) == 4
    for count in (256, 512):
        assert encode(tables, x[:count], chained=True) == chained[: count // 256]
    assert encode(tables, x[768:], chained=True) == chained[3:]


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_both_paths_give_the_same_bytes(name, chained):
    _, tables = case(name)
    small = name in ("chain", "Chow-Liu", "deep")
    for count in (1, 7, 64, 1000) if small else (1, 67):
        x = rows(name, 1000)[:count]
        streams = encode_rows(tables, x, chained=chained)
        assert encode_rows_torch(tables, x, chained=chained) == streams

        for decode in (decode_rows, decode_rows_torch):
            y = decode(tables, streams, count, chained=chained)
            assert y.dtype == (np.uint8 if tables.values <= 256 else np.uint16)
            np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("name", ["chain", "quad, tied, channels"])
def test_threads_do_not_change_bytes(name, chained):
    _, tables = case(name)
    x = rows(name, 1000)
    streams = encode_rows(tables, x, chained=chained, workers=1)
    for workers in (2, 3, None):
        assert encode_rows(tables, x, chained=chained, workers=workers) == streams
        y = decode_rows(tables, streams, len(x), chained=chained, workers=workers)
        np.testing.assert_array_equal(y, x)


def test_more_rows_than_a_loop_takes():
    _, tables = case("chain")
    x = np.tile(rows("chain", 1000), (9, 1))
    for chained in (False, True):
        streams = encode_rows(tables, x, chained=chained, workers=1)
        assert encode_rows(tables, x[8192:], chained=chained) == streams[8192 // 256**chained :]
        y = decode_rows(tables, streams, len(x), chained=chained, workers=1)
        np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("name", CASES)
def test_masks(name):
    _, tables = case(name)
    x = rows(name, 70)
    D = x.shape[1]
    source = np.random.default_rng(0)
    one, none = np.arange(D) == D - 1, np.zeros(D, np.bool_)
    masks = source.random((3, D)) < [[0.2], [0.4], [0.8]]
    for i, present in enumerate((*masks, one, none)):
        chained = i % 2 == 0
        streams = encode_rows(tables, x, present=present, chained=chained)
        again = encode_rows_torch(tables, x, present=present, chained=chained)
        assert again == streams

        for decode in (decode_rows, decode_rows_torch):
            y = decode(tables, streams, len(x), present=present, chained=chained)
            np.testing.assert_array_equal(y, np.where(present, x, 0))

        hidden = np.where(present, x, (x + 1) % tables.values)
        assert encode_rows(tables, hidden, present=present) == encode_rows(
            tables, x, present=present
        )


@pytest.mark.parametrize("name", ["binary", "deep"])
def test_masked_frequencies_are_marginals(name):
    circuit, tables = case(name)
    x = rows(name, 40)[np.arange(40) % 3 < 2]
    present = np.arange(x.shape[1]) % 3 != 1
    with torch.no_grad():
        exact = circuit.log_prob(torch.from_numpy(x), torch.from_numpy(present))
    loss = ideal_bits(tables, x, present) + exact.numpy() / np.log(2)
    assert abs(loss.mean()) < 1e-3 * present.sum()


@pytest.mark.parametrize("name", CASES)
def test_permuted_units_give_the_same_bytes(name):
    # Exact sums do not depend on their order.
    _, tables = case(name)
    order = np.random.default_rng(3).permutation(tables.units)
    shuffled = CodeTables(
        tables.tree,
        tables.root[order],
        np.ascontiguousarray(tables.sums[:, order][:, :, order]),
        np.ascontiguousarray(tables.cumulative[..., order]),
    )
    x = rows(name, 70)
    streams = encode_rows(tables, x)
    assert encode_rows(shuffled, x) == streams
    assert encode_rows_torch(shuffled, x) == streams


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("name", ["binary", "quad, tied, channels"])
def test_every_device_gives_the_same_bytes(name, chained, device):
    _, tables = case(name)
    x = rows(name, 70)
    streams = encode_rows(tables, x, chained=chained)
    assert encode_rows_torch(tables, x, chained=chained, device=device) == streams
    y = decode_rows_torch(tables, streams, len(x), chained=chained, device=device)
    np.testing.assert_array_equal(y, x)


# The coder


@pytest.mark.parametrize("name", CASES)
def test_coder_is_constrictions(name):
    _, tables = case(name)
    x = rows(name, 1000)[-40:]
    found = bounds_of(tables, x)
    streams = encode_rows(tables, x)

    for n in range(len(x)):
        ours, theirs = RangeEncoder(), peer.queue.RangeEncoder()
        for v, bounds in found:
            low, high = bounds[n, x[n, v]], bounds[n, x[n, v] + 1]
            ours.encode(low, high - low)
            if tables.values > 1:  # constriction knows no certain symbol
                theirs.encode(int(x[n, v]), model_of(bounds[n]))
        assert ours.finish() == streams[n]
        if tables.values == 1:
            continue

        words = ours.sealed_words()
        np.testing.assert_array_equal(words, theirs.get_compressed())
        padded = streams[n] + bytes(-len(streams[n]) % 4)
        decoders = [words, np.frombuffer(padded, ">u4").astype(np.uint32)]
        for decoder in map(peer.queue.RangeDecoder, decoders):
            assert [decoder.decode(model_of(b[n])) for _, b in found] == [
                x[n, v] for v, _ in found
            ]


def model_of(bounds):
    r"""A constriction model with these integer frequencies."""
    weights = (np.diff(bounds) - 1).astype(np.float64)  # so that its scale is exactly 1
    return peer.model.Categorical(weights, perfect=False)


@pytest.mark.parametrize("name", CASES)
def test_length_is_a_byte_from_the_ideal(name):
    _, tables = case(name)
    x = rows(name, 1000)
    ideal = ideal_bits(tables, x)
    rounding = x.shape[1] * np.log2(256 / 255)  # at worst
    lengths = 8 * np.array([len(s) for s in encode_rows(tables, x)])
    assert (lengths < ideal + 8 + rounding + 1e-6).all()
    assert lengths.mean() < ideal.mean() + 5

    chained = 8 * np.array([len(s) for s in encode_rows(tables, x, chained=True)])
    parts = np.add.reduceat(ideal, [0, 256, 512, 768])
    assert (chained < parts + 8 + 256 * rounding + 1e-6).all()
    assert chained.sum() < ideal.sum() + 4 * 8 + 1e-3 * x.size


# Exactness


@given(
    rows=st.lists(
        st.lists(st.floats(min_value=1.0, max_value=2.0**90), min_size=3, max_size=3),
        min_size=1,
    ),
    bits=st.integers(1, 29),
)
def test_normalise(rows, bits):
    x = torch.tensor(rows, dtype=torch.float64)
    y = reference._normalise(x, bits)

    top = y.max(-1).values
    assert bool((y == y.floor()).all())
    assert bool((y >= 1).all())
    assert bool((top > 2 ** (bits - 1)).all())
    assert bool((top <= 2**bits).all())
    assert torch.equal(reference._normalise(x * 2.0**40, bits), y)
    assert bool((y.gather(1, x.argsort(1)).diff(dim=1) >= 0).all())


def test_messages_stay_exact(monkeypatch):
    # A message of b bits for each of K units, times 24 bits, sums to at most 2^53.
    for units in range(1, 600):
        bits = 29 - (units - 1).bit_length()
        assert units * 2**bits * TOTAL <= 2**53 < 2 * max(units, 2) * 2**bits * TOTAL * 2

    checked = []
    normalise = reference._normalise

    def spy(rows, bits):
        result = normalise(rows, bits)
        assert bool((rows.max(-1).values > 0).all())
        assert bool(((result >= 1) & (result <= 2**bits)).all())
        assert float(result.sum(-1).max()) * TOTAL <= 2**53
        checked.append(bits)
        return result

    monkeypatch.setattr(reference, "_normalise", spy)
    for name in CASES:
        _, tables = case(name)
        ideal_bits(tables, rows(name, 60)[:9])
    assert set(checked) == {29, 27, 25, 23}


@torch.no_grad()
def test_units_that_are_impossible():
    circuit = circuit_on(binary_tree(11), 16, 256)
    circuit.root_logits[:15] = -torch.inf
    circuit.sum_logits[:, :, 3:] = -torch.inf
    circuit.get_parameter("inputs.logits")[:, 5:] = -torch.inf
    tables = CodeTables.from_circuit(circuit)
    x = rows("binary", 70)  # with values that have probability zero

    streams = encode_rows(tables, x)
    assert encode_rows_torch(tables, x) == streams
    np.testing.assert_array_equal(decode_rows(tables, streams, len(x)), x)
    np.testing.assert_array_equal(decode_rows_torch(tables, streams, len(x)), x)


@pytest.mark.slow
@pytest.mark.parametrize(("units", "values"), [(96, 256), (2, 65536), (33, 3)])
def test_other_sizes(units, values):
    circuit = circuit_on(binary_tree(11), units, values)
    tables = CodeTables.from_circuit(circuit)
    x = np.random.default_rng(0).integers(0, values, (100, 11))
    for chained in (False, True):
        streams = encode_rows(tables, x, chained=chained)
        assert encode_rows_torch(tables, x, chained=chained) == streams
        y = decode_rows(tables, streams, len(x), chained=chained)
        np.testing.assert_array_equal(y, x)


# Edges and errors


@encoders
@decoders
def test_no_rows(encode, decode):
    _, tables = case("chain")
    for chained in (False, True):
        assert encode(tables, np.zeros((0, 9), np.uint8), chained=chained) == []
        assert decode(tables, [], 0, chained=chained).shape == (0, 9)


@encoders
def test_rows_of_any_layout(encode):
    _, tables = case("chain")
    x = rows("chain", 70)
    streams = encode(tables, x)
    for same in (x.astype(">u2"), np.asfortranarray(x), np.repeat(x, 2, 1)[:, ::2]):
        assert encode(tables, same) == streams


@encoders
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 8), np.uint8), r"shape \(N, 9\), got \(2, 8\)"),
        (np.zeros(9, np.uint8), r"shape \(N, 9\), got \(9,\)"),
        (np.zeros((2, 9)), "of float64"),
        (np.full((2, 9), 2), "from 0 to 1, got 2 to 2"),
        (np.full((2, 9), -1), "from 0 to 1, got -1 to -1"),
    ],
)
def test_rejects_rows(encode, x, message):
    with pytest.raises(ValueError, match=message):
        encode(case("chain")[1], x)


@decoders
def test_rejects_a_wrong_number_of_streams(decode):
    _, tables = case("chain")
    with pytest.raises(ValueError, match="expected 3 streams for 3 rows, got 2"):
        decode(tables, [b"", b""], 3)
    with pytest.raises(ValueError, match="expected 2 streams for 257 rows, got 1"):
        decode(tables, [b""], 257, chained=True)


@decoders
@pytest.mark.parametrize("chained", [False, True])
def test_rejects_streams_that_no_encoder_wrote(decode, chained):
    _, tables = case("chain")
    x = rows("chain", 300)
    streams = encode_rows(tables, x, chained=chained)
    for bad in (b"\0", b"\0" * 99 + b"\1"):
        for i in (0, len(streams) - 1):
            forged = [s + bad if i == j else s for j, s in enumerate(streams)]
            with pytest.raises(StreamError, match="decodes to something else"):
                decode(tables, forged, len(x), chained=chained)


def test_decoding_any_bytes_agrees_in_both_paths():
    _, tables = case("deep")
    source = np.random.default_rng(0)
    sound = 0
    for size in range(200):
        stream = source.bytes(size // 12)
        outcomes = []
        for decode in (decode_rows, decode_rows_torch):
            try:
                outcomes.append(decode(tables, [stream], 1).tolist())
            except StreamError:
                outcomes.append(None)
        assert outcomes[0] == outcomes[1]
        if outcomes[0] is not None:
            sound += 1
            assert encode_rows(tables, np.array(outcomes[0])) == [stream]
    assert sound > 20


def test_tables_of_a_trained_circuit_keep_float32():
    circuit = circuit_on(binary_tree(11), 16, 256)
    single = TreeCircuit(circuit.tree, circuit.inputs).float()
    assert single.root_logits.dtype == torch.float32
    x = rows("binary", 70)
    tables = CodeTables.from_circuit(single)
    np.testing.assert_array_equal(decode_rows(tables, encode_rows(tables, x), 70), x)
