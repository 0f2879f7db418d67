r"""Tests for the compiled loop of photographs, and the plain Python that defines it."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from photograph_cases import (
    ALL,
    AROUND,
    FAR,
    NEAR,
    TABLES,
    Shape,
    buffers_of,
    image_of,
    network_of,
    run_compiled,
    run_plain,
    taps_of,
)

from probnets.coding.photographs.anchor import predict as compiled_predict
from probnets.coding.photographs.anchor import solve as compiled_solve
from probnets.coding.photographs.kernel import (
    CONTEXT,
    DECODE,
    ENCODE,
    MARGIN,
    MEASURE,
    RESTORE,
    Buffers,
    Fit,
)
from probnets.coding.photographs.mixture import (
    INVERSE,
    MEAN,
    WEIGHT,
    find_value,
    lower_quantile,
    set_mixture,
)
from probnets.coding.photographs.network import CAP, MOST, OUTPUTS, gradient, run_network
from probnets.coding.photographs.reference import Mixture, layers, predict, solve, whole_layers
from probnets.coding.photographs.reference import gradient as plain_gradient

TOTAL = 1 << 24
RUNS = {"compiled": run_compiled, "plain": run_plain}
KINDS = ("constant", "noise", "gradient", "board", "smooth")
SIZES = [(1, 1), (1, 7), (7, 1), (2, 8), (3, 9), (2, 16), (9, 17)]


def case(shape: Shape, kind="smooth", own=NEAR, others=AROUND, **options):
    r"""Returns the buffers of a picture, known up to a plane, with places and network."""
    buffers = buffers_of(image_of(kind, shape))
    for plane in range(shape.plane):
        before = shape._replace(plane=plane)
        taps = taps_of(before, own, others)
        buffers = run_compiled(MEASURE, before, buffers, taps, network_of(taps)).buffers
    taps = taps_of(shape, own, others)
    return buffers, taps, network_of(taps, **options)


def assert_same(found, expected):
    r"""Checks that all that two runs left is the same, weights bit for bit."""
    assert found[:3] == expected[:3]
    for name in ("buffers", "record"):
        for a, b in zip(getattr(found, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name, strict=True)
    for name, a, b in zip(found.net._fields, found.net, expected.net, strict=True):
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), err_msg=name)


def assert_agree(shape, buffers, taps, net, **options):
    r"""Checks all actions, and that both decoders read what both encoders write."""
    things = (buffers, taps, net)
    for action in (MEASURE, CONTEXT, RESTORE):
        found = run_compiled(action, shape, *things, **options)
        assert_same(found, run_plain(action, shape, *things, **options))

    written = run_compiled(ENCODE, shape, *things, **options)
    assert_same(written, run_plain(ENCODE, shape, *things, **options))
    hidden = garbled(shape, buffers)
    end = bounds(shape)[1]
    for run in RUNS.values():
        read = run(DECODE, shape, hidden, taps, net, data=written.stream, **options)
        assert read.sound
        rest = zip(written.buffers, hidden, strict=True)  # which is not touched
        known = Buffers(*(np.concatenate([a[:end], b[end:]]) for a, b in rest))
        assert_same(read, written._replace(stream=b"", buffers=known))
    return written


def bounds(shape):
    r"""Returns where a plane begins in the buffers, and where it ends."""
    area = (shape.height + 2 * MARGIN) * (shape.width + 2 * MARGIN)
    return shape.plane * area, (shape.plane + 1) * area


def inside(shape):
    r"""Returns the places of the pixels in the buffers, with shape `(H, W)`."""
    places = np.arange(*bounds(shape)).reshape(shape.height + 2 * MARGIN, -1)
    return places[MARGIN:-MARGIN, MARGIN:-MARGIN]


def garbled(shape, buffers):
    r"""Returns buffers that hold anything from the begin of a plane on."""
    random = np.random.default_rng(0)
    begin, limit = bounds(shape)[0], np.iinfo(np.int32)
    parts = []
    for part in buffers:
        rest = random.integers(limit.min, limit.max, part.size - begin, endpoint=True)
        parts.append(np.concatenate([part[:begin], rest]).astype(np.int32))
    return Buffers(*parts)


# The loop


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_one_pixel_by_hand(run):
    # The anchor is the middle, 128, and the errors around are of 4 levels, 64 sixteenths.
    shape = Shape(0, 1, 1)
    taps = taps_of(shape)
    net = network_of(taps, size=0)
    buffers = buffers_of(np.full((1, 1, 3), 130))

    facts = run(CONTEXT, shape, buffers, taps, net).record.facts
    spread = round(16 * math.log2(66))
    assert facts.tolist() == [[130, 128 * 16, spread, 0, 255]]

    # All components are alike. Their scale is 2^(97 / 16) sixteenths of a level, and 2^(17 / 8)
    # levels in whole eighths of an octave.
    bits = run(MEASURE, shape, buffers, taps, net).record.bits
    begin, end = 1.5 / 2 ** (17 / 8), 2.5 / 2 ** (17 / 8)
    mass = 1 / (1 + math.exp(-end)) - 1 / (1 + math.exp(-begin))
    assert bits[0] == pytest.approx(-math.log2(mass), abs=0.01)

    stream = run(ENCODE, shape, buffers, taps, net).stream
    assert 4 <= len(stream) * 8 <= bits[0] + 8
    decoded = run(DECODE, shape, garbled(shape, buffers), taps, net, data=stream)
    assert decoded.buffers.planes[MARGIN * 7 + MARGIN] == 130

    errors = decoded.buffers.errors[:49].reshape(7, 7)
    assert (errors[:4, 4:] == 32).all()  # 2 levels, repeated in the margins
    assert (errors[3:, 3:] == 32).all()
    assert (errors[:4, :3] == 64).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("plane", [0, 1, 2])
def test_loops_agree(plane, size):
    shape = Shape(plane, *size)
    assert_agree(shape, *case(shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plane", [0, 1, 2])
def test_loops_agree_on_pictures_of_all_kinds(plane, kind):
    shape = Shape(plane, 6, 10)
    assert_agree(shape, *case(shape, kind))


@pytest.mark.parametrize("top", [0, 1, 65535])
@pytest.mark.parametrize("kind", ["noise", "board"])
@pytest.mark.parametrize("plane", [0, 1, 2])
def test_loops_agree_on_channels_of_all_depths(plane, kind, top):
    shape = Shape(plane, 4, 10, top)
    result = assert_agree(shape, *case(shape, kind, rate=1e-2))
    if top == 0:
        assert result.stream == b""


@pytest.mark.parametrize("kind", ["noise", "board", "smooth"])
@pytest.mark.parametrize("plane", [0, 2])
def test_loops_agree_when_units_and_outputs_saturate(plane, kind):
    shape = Shape(plane, 5, 9)
    options = {"size": 127, "scales": (2.0**-4, 2.0**-4)}
    buffers, taps, net = case(shape, kind, **options)

    x = run_compiled(CONTEXT, shape, buffers, taps, net).record.inputs
    hidden, outputs = zip(*(whole_layers(net, row) for row in x.tolist()), strict=True)
    assert np.mean(hidden == np.float32(CAP)) > 0.01
    assert np.mean(np.abs(outputs) == MOST) > 0.5
    assert_agree(shape, buffers, taps, net)
    assert_agree(shape, *case(shape, kind, **options, rate=1.0))


@pytest.mark.parametrize("rate", [1e-4, 1.0])
@pytest.mark.parametrize("plane", [0, 1, 2])
def test_loops_agree_when_networks_adapt(plane, rate):
    shape = Shape(plane, 6, 11)
    buffers, taps, net = case(shape, rate=rate, units=64)
    result = assert_agree(shape, buffers, taps, net, components=5)

    for name in ("first", "first_bias", "second", "second_bias", "turned"):
        assert (getattr(result.net, name) != getattr(net, name)).mean() > 0.2, name
    second = result.net.second.reshape(-1, OUTPUTS)
    np.testing.assert_array_equal(second.T.ravel(), result.net.turned)


def test_networks_without_rates_stay():
    shape = Shape(0, 5, 9)
    buffers, taps, net = case(shape)
    for a, b in zip(run_compiled(ENCODE, shape, buffers, taps, net).net, net, strict=True):
        np.testing.assert_array_equal(a, b)


def test_adaptation_learns():
    shape = Shape(0, 16, 16)
    still, slow = (
        run_compiled(MEASURE, shape, *case(shape, rate=rate)).record.bits.mean()
        for rate in (0.0, 0.3)
    )
    assert slow < still - 0.05


@pytest.mark.parametrize("period", [1, 2, 3, 20])
@pytest.mark.parametrize("ridge", [1e-3, 1e5])
def test_loops_agree_for_all_settings_of_least_squares(period, ridge):
    shape = Shape(1, 5, 18)
    assert_agree(shape, *case(shape), fit=Fit(ridge, 0.95, period))


@pytest.mark.parametrize("period", [1, 2])
def test_loops_agree_where_rounding_decides(period):
    # There are more regressors than pixels before, so that weights are what rounding leaves.
    shape = Shape(0, 4, 20, 65535)
    assert_agree(shape, *case(shape, "noise", own=FAR, size=10), fit=Fit(1e-8, 0.9, period))


@pytest.mark.parametrize("components", [1, 2, 3, 5])
def test_loops_agree_for_all_numbers_of_components(components):
    shape = Shape(1, 3, 5)
    assert_agree(shape, *case(shape, rate=0.1, units=96), components=components)


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_loops_agree_on_all_places_in_reach(plane):
    shape = Shape(plane, 3, 9)
    assert_agree(shape, *case(shape, own=FAR, others=ALL, size=10))


def test_loops_agree_on_few_places():
    shape = Shape(1, 3, 9)
    assert_agree(shape, *case(shape, own=[], others=[]))
    assert_agree(shape, *case(shape, own=[(0, -1)], others=[]))


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_decoder_needs_no_planes(rate):
    shapes = [Shape(plane, 9, 17) for plane in range(3)]
    buffers = buffers_of(image_of("smooth", shapes[0]))
    stages = [taps_of(shape, FAR, ALL) for shape in shapes]
    nets = [network_of(taps, rate=rate, size=10) for taps in stages]

    known, unknown = buffers, garbled(shapes[0], buffers)
    for shape, taps, net in zip(shapes, stages, nets, strict=True):
        written = run_compiled(ENCODE, shape, known, taps, net)
        read = run_compiled(DECODE, shape, unknown, taps, net, data=written.stream)
        known, unknown = written.buffers, read.buffers
        assert read.sound

        begin, end = bounds(shape)
        for a, b in zip(known, unknown, strict=True):
            np.testing.assert_array_equal(a[begin:end], b[begin:end])


def test_bits_are_those_of_the_stream():
    shape = Shape(0, 16, 16)
    things = case(shape, "noise")
    bits = run_compiled(MEASURE, shape, *things).record.bits.sum(dtype=np.float64)
    assert -1 <= 8 * len(run_compiled(ENCODE, shape, *things).stream) - bits < 8


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_restores_differences(plane):
    shape = Shape(plane, 9, 10)
    buffers, taps, net = case(shape)
    shown = run_compiled(CONTEXT, shape, buffers, taps, net)
    _, anchor, _, low, high = shown.record.facts.T
    differences = shown.buffers.planes.copy()
    box = inside(shape)
    differences[box] -= (anchor.reshape(9, 10) + 8) >> 4

    for run in RUNS.values():
        result = run(RESTORE, shape, buffers._replace(planes=differences), taps, net)
        assert result.strays == 0
        np.testing.assert_array_equal(result.buffers.planes, shown.buffers.planes)

        far = buffers._replace(planes=differences.copy())
        far.planes[box] = np.where(np.arange(10) % 2, 2**20, -(2**20))
        result = run(RESTORE, shape, far, taps, net)
        assert result.strays == 90
        restored = result.buffers.planes[box]
        expected = np.where(np.arange(10) % 2, high.reshape(9, 10), low.reshape(9, 10))
        np.testing.assert_array_equal(restored, expected)


def test_only_the_plane_is_written():
    shape = Shape(1, 3, 9, 65535)
    buffers, taps, net = case(shape, own=FAR, others=ALL, size=10, rate=1.0)
    for action in (ENCODE, DECODE, MEASURE, CONTEXT, RESTORE):
        result = run_compiled(action, shape, buffers, taps, net, data=b"probnets")
        begin, end = bounds(shape)
        for a, b in zip(result.buffers, buffers, strict=True):
            np.testing.assert_array_equal(a[:begin], b[:begin])
            np.testing.assert_array_equal(a[end:], b[end:])


@pytest.mark.parametrize("plane", [0, 1])
@given(data=st.binary(max_size=40), top=st.sampled_from([1, 255, 65535]))
@settings(max_examples=15)
def test_any_bytes_decode_to_something(plane, data, top):
    shape = Shape(plane, 2, 9, top)
    buffers, taps, net = case(shape, "noise", rate=0.5)
    first = run_compiled(DECODE, shape, buffers, taps, net, data=data)
    assert_same(first, run_plain(DECODE, shape, buffers, taps, net, data=data))

    _, _, _, low, high = run_compiled(CONTEXT, shape, first.buffers, taps, net).record.facts.T
    values = first.buffers.planes[inside(shape)].ravel()
    assert ((low <= values) & (values <= high)).all()

    # The stream is sound if and only if it is what the encoder writes.
    again = run_compiled(ENCODE, shape, first.buffers, taps, net).stream
    assert first.sound == (again == data)


# Least squares


def solved(M, ridge):
    r"""Solves equations in the compiled loop."""
    n, width = len(M), (len(M) + 8) & -8
    lines, w = np.zeros((n, width)), np.zeros(width)
    lines[:, : n + 1] = M
    compiled_solve(lines.ravel(), np.zeros(width * width), w, n, width, ridge)
    assert not w[n:].any()
    return w[:n].tolist()


def test_solves_equations_by_hand():
    # 3 v + w = 5 and v + 3 w = 7, the ridge included.
    for run in (solved, solve):
        assert run([[2.0, 1.0, 5.0], [1.0, 2.0, 7.0]], 1.0) == pytest.approx([1.0, 2.0])


@given(n=st.integers(1, 17), seed=st.integers(0, 99), ridge=st.sampled_from([1e-9, 1.0, 1e3]))
def test_solves_equations(n, seed, ridge):
    random = np.random.default_rng(seed)
    Z = random.normal(size=(2 * n, n + 1))
    M = Z.T[:n] @ Z
    exact = np.linalg.solve(M[:, :n] + ridge * np.eye(n), M[:, n])

    weights = solved(M, ridge)
    np.testing.assert_allclose(weights, exact, rtol=1e-6, atol=1e-9)
    assert weights == solve(M.tolist(), ridge)

    M[n - 1, n - 1] = -2 * ridge  # no longer positive
    assert solved(M, ridge) == solve(M.tolist(), ridge)


@given(n=st.integers(1, 25), seed=st.integers(0, 99))
def test_predicts_in_order(n, seed):
    w, z = np.random.default_rng(seed).normal(size=(2, n))
    padded = np.zeros((2, (n + 8) & -8))
    padded[:, :n] = w, z

    found = compiled_predict(padded[0], padded[1], padded.shape[1], np.zeros(8))
    assert found == predict(w.tolist(), z.tolist())
    assert found == pytest.approx(w @ z)


# The network


@st.composite
def networks(draw):
    shape = Shape(draw(st.integers(0, 2)), 3, 4)
    options = {"size": draw(st.integers(0, 127)), "units": draw(st.sampled_from([32, 64]))}
    scales = tuple(2.0 ** -draw(st.integers(0, 12)) for _ in range(2))
    taps = taps_of(shape)
    return network_of(taps, seed=draw(st.integers(0, 99)), scales=scales, **options)


def ran(net, x):
    r"""Runs the compiled network."""
    hidden, outputs = np.zeros_like(net.first_bias), np.zeros(OUTPUTS, np.float32)
    run_network(net, np.array(x, np.float32), hidden, outputs)
    return hidden, outputs


@given(net=networks(), seed=st.integers(0, 99))
def test_whole_numbers_are_exact_in_float32(net, seed):
    # No partial sum reaches 2^24, so that any order gives the same.
    inputs = net.first.size // net.first_bias.size
    x = np.random.default_rng(seed).integers(-400, 400, inputs)
    for total in (net.first.reshape(inputs, -1), CAP / 400 * net.second.reshape(-1, OUTPUTS)):
        assume(400 * np.abs(total).sum(0).max() + 127 < 1 << 24)

    for found in (layers(net, x), ran(net, x)):
        for a, b in zip(found, whole_layers(net, x), strict=True):
            assert a.dtype == np.float32
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("plane", [0, 1])
def test_fractions_have_an_order(plane, seed):
    random = np.random.default_rng(seed)
    net = network_of(taps_of(Shape(plane, 3, 4)), units=64)
    first = random.normal(size=(net.first.size // 64, 64)).astype(np.float32)
    second = random.normal(size=(64, OUTPUTS)).astype(np.float32)
    x = random.integers(-400, 400, len(first))

    # The biases undo the sums, and large scales show what rounding leaves.
    net = net._replace(
        first=first.ravel(),
        first_bias=(0.01 - x @ first).astype(np.float32),
        first_scale=np.full(64, 2**15, np.float32),
        second=second.ravel(),
    )
    hidden, _ = layers(net, x.tolist())
    net = net._replace(
        second_bias=-hidden @ second,
        second_scale=np.full(OUTPUTS, 2**12, np.float32),
    )
    hidden, outputs = layers(net, x.tolist())
    assert np.mean((hidden > 0) & (hidden < CAP)) > 0.5
    assert np.mean((outputs != 0) & (np.abs(outputs) < MOST)) > 0.5
    for a, b in zip((hidden, outputs), ran(net, x), strict=True):
        np.testing.assert_array_equal(a, b)


# The mixture


@st.composite
def mixtures(draw, tops=(0, 1, 255, 65535), size=MOST, spreads=(16, 335)):
    r"""Draws outputs, their number of components, an anchor and a spread, and bounds."""
    K = draw(st.integers(1, 5))
    outputs = [draw(st.integers(-size, size)) for _ in range(3 * K)]
    top = draw(st.sampled_from(tops))
    low = draw(st.integers(-top, 0))
    anchor = draw(st.integers(16 * low, 16 * (low + top)))
    return outputs, K, anchor, draw(st.integers(*spreads)), low, low + top


def both(outputs, K, anchor, spread, low, high):
    r"""Returns the compiled mixture and the plain one."""
    found = np.zeros((4, K), np.int64)
    row = np.zeros(OUTPUTS, np.float32)
    row[: 3 * K] = outputs
    tables = TABLES.power, TABLES.exp, TABLES.inverse
    set_mixture(found, row, K, anchor, spread, *tables)
    plain = Mixture.from_outputs(row, K, anchor, spread, low, high, TABLES)
    assert found[MEAN].tolist() == plain.means
    assert found[INVERSE].tolist() == plain.inverses
    assert found[WEIGHT].tolist() == plain.weights
    return found, plain


def test_mixture_by_hand():
    # Logits 0 and -2 octaves; means 0 and half a spread of 8 levels from the anchor; scales of
    # the spread and of 1/4 of it.
    mixture, plain = both([0, -128, 0, 32, 0, -128], 2, 1600, 16 * 7, 0, 255)
    assert plain.weights == [52429, 13107]
    assert plain.means == [1600, 1600 + 4 * 16]
    assert plain.inverses == [2**26 // 8, 2**26 // 2]

    def below(x):
        places = [(x - 0.5 - 100) / 8, (x - 0.5 - 104) / 2]
        return (4 / (1 + math.exp(-places[0])) + 1 / (1 + math.exp(-places[1]))) / 5

    for x in (90, 99, 100, 101, 104, 120):
        expected = (TOTAL - 256) * below(x) + x
        assert plain.lower_quantile(x) == pytest.approx(expected, abs=TOTAL * 1e-4)
        found = lower_quantile(mixture, 2, x, 0, 255, TABLES.sigmoid)
        assert found == plain.lower_quantile(x)


@given(drawn=mixtures(tops=(0, 1, 255)))
def test_every_value_owns_quantiles(drawn):
    _, K, _, _, low, high = drawn
    mixture, plain = both(*drawn)
    values = range(low, high + 2)
    found = [lower_quantile(mixture, K, x, low, high, TABLES.sigmoid) for x in values]

    assert sum(plain.weights) == 1 << 16
    assert min(plain.weights) >= 0
    assert found == [plain.lower_quantile(x) for x in values]
    assert (found[0], found[-1]) == (0, TOTAL)
    assert all(a < b for a, b in itertools.pairwise(found))


@given(drawn=mixtures(tops=(65535,)))
@settings(max_examples=10)
def test_every_value_of_16_bits_owns_quantiles(drawn):
    _, K, _, _, low, high = drawn
    mixture, plain = both(*drawn)
    rest = (low, high, TABLES.sigmoid)
    found = np.array([lower_quantile(mixture, K, x, *rest) for x in range(low, high + 2)])

    assert (found[0], found[-1]) == (0, TOTAL)
    assert np.diff(found).min() >= 1
    for x in range(low, high + 2, 4099):
        assert found[x - low] == plain.lower_quantile(x)


@given(drawn=mixtures(), data=st.data())
def test_quantiles_find_their_values(drawn, data):
    _, K, _, _, low, high = drawn
    mixture, plain = both(*drawn)
    quantile = data.draw(st.integers(0, TOTAL - 1))
    value = plain.find_value(quantile)
    assert plain.lower_quantile(value) <= quantile < plain.lower_quantile(value + 1)

    ends = (plain.lower_quantile(value), plain.lower_quantile(value + 1) - 1)
    for guess in {low, high, value, data.draw(st.integers(low, high))}:
        for q in (quantile, *ends):
            assert find_value(mixture, K, q, guess, low, high, TABLES.sigmoid) == value


# The gradient


def log_probability(plain, spread, x):
    r"""Returns the smooth formula as a function of changes of the outputs, in natural units."""
    scales = torch.tensor(plain.inverses, dtype=torch.float64).reciprocal() * 2**26
    means = torch.tensor(plain.means, dtype=torch.float64) / 16
    weights = torch.tensor(plain.weights, dtype=torch.float64)
    width = 2 ** (spread / 16) / 16  # in levels

    def function(changes):
        octaves, spreads, wider = changes
        pi = torch.softmax(weights.log() + octaves * math.log(2), 0)
        s, mean = scales * 2**wider, means + spreads * width
        begin = torch.sigmoid((x - 0.5 - mean) / s) if x > plain.low else torch.zeros_like(s)
        end = torch.sigmoid((x + 0.5 - mean) / s) if x < plain.high else torch.ones_like(s)
        return (pi * (end - begin)).sum().log()

    return function


def slopes_of(found, plain, K, x, spread):
    r"""Returns the compiled gradient by logits, means and scales, if it is the plain one."""
    slopes = np.zeros(OUTPUTS)
    rest = (plain.low, plain.high, spread, TABLES.power, TABLES.sigmoid)
    gradient(slopes, found, K, x, *rest)
    assert slopes[: 3 * K].tolist() == plain_gradient(plain, x)
    assert not slopes[3 * K :].any()
    return slopes[: 3 * K].reshape(3, K)


def assert_gradient(drawn, data, parts):
    r"""Checks parts of the gradient against autograd and against finite differences."""
    _, K, _, spread, low, high = drawn
    mixture, plain = both(*drawn)
    x = data.draw(st.integers(low, high))
    function = log_probability(plain, spread, x)
    at = torch.zeros(3, K, dtype=torch.float64, requires_grad=True)
    value = function(at)
    assume(value > math.log(1e-3))

    slopes = slopes_of(mixture, plain, K, x, spread)[parts]
    (expected,) = torch.autograd.grad(value, at)
    np.testing.assert_allclose(slopes, expected.clamp(-4, 4)[parts], atol=0.01)

    step = 1e-5 * torch.eye(3 * K, dtype=torch.float64).reshape(-1, 3, K)
    with torch.no_grad():
        differences = [(function(d) - function(-d)).item() / 2e-5 for d in step]
    expected = np.clip(differences, -4, 4).reshape(3, K)[parts]
    np.testing.assert_allclose(slopes, expected, atol=0.01)


@given(drawn=mixtures(tops=(1, 20), size=150, spreads=(16, 120)), data=st.data())
def test_gradient_by_logits_and_scales(drawn, data):
    assert_gradient(drawn, data, [0, 2])


@given(drawn=mixtures(tops=(1, 20), size=150, spreads=(16, 120)), data=st.data())
def test_gradient_by_means(drawn, data):
    assert_gradient(drawn, data, [1])


@given(drawn=mixtures(), data=st.data())
def test_gradient_is_never_too_large_or_too_small(drawn, data):
    _, K, _, spread, low, high = drawn
    mixture, plain = both(*drawn)
    x = data.draw(st.integers(low, high))
    slopes = slopes_of(mixture, plain, K, x, spread)

    sizes = np.abs(slopes)
    assert ((sizes == 0) | (sizes > 1e-6)).all()
    assert sizes.max() <= 4
