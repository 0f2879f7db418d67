r"""Tests for the probnets.circuits.integers and probnets.circuits.integertables modules."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load, save
from scipy import stats
from torch import nn

from probnets.circuits import Binomial, DiscretisedLogistic, IntegerNetwork, IntegerParameters
from probnets.circuits.integertables import (
    OCTAVE,
    integer_exp2,
    integer_logistic,
    integer_softmax,
    log2_binomials,
    octaves,
)

TOTAL = 1 << 24
UNIT = 1 << OCTAVE

LAYERS = {
    "one": lambda: nn.Sequential(nn.Linear(3, 4)),
    "ReLU": lambda: nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4)),
    "Hardtanh": lambda: nn.Sequential(nn.Linear(3, 16), nn.Hardtanh(0, 0.5), nn.Linear(16, 4)),
    "no bias": lambda: nn.Sequential(
        nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)
    ),
    "three": lambda: nn.Sequential(
        *(nn.Linear(3, 16), nn.ReLU()),
        *(nn.Linear(16, 8), nn.Hardtanh(0.0, 2.0)),
        nn.Linear(8, 4),
    ),
}
SCALE = 1 / 255


def pixels(*shape):
    return torch.randint(256, (*shape, 3))


def array(*values):
    return np.array(values, dtype=np.int64)


def weights(*rows):
    return np.array(rows, dtype=np.int16)


# Networks


def test_by_hand():
    network = IntegerNetwork(
        [weights([2, -3], [1, 1]), weights([5, 7])],
        [array(1, 0), array(-4)],
        [array(1, 0), array(2)],
        [10],
        input_bits=4,
        fraction_bits=3,
    )
    # (2 * 5 - 3 * 2 + 1) / 2 = 2.5, rounded up; 5 + 2; (5 * 3 + 7 * 7 - 4) / 4
    assert network(torch.tensor([5, 2])).tolist() == [15]
    # -9 / 2 is clipped from below and 14 from above: (70 - 4) / 4 = 16.5, rounded up
    assert network(torch.tensor([[2, 12]])).tolist() == [[17]]
    assert network.plain([5, 2]) == [15]
    assert network.plain([2, 12]) == [17]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("examples", [None, pixels(50)], ids=["bounds", "examples"])
def test_matches_definition(name, examples):
    layers = LAYERS[name]()
    network = IntegerNetwork.from_module(
        layers, input_scale=SCALE, input_bits=8, examples=examples
    )
    x = torch.cat([pixels(30), -pixels(3)])
    expected = [network.plain(row) for row in x.tolist()]
    assert network(x).tolist() == expected
    assert network(x.float()).tolist() == expected
    assert network(x.view(3, 11, 3)).shape == (3, 11, 4)
    assert network(x[:0]).shape == (0, 4)


@pytest.mark.parametrize("name", LAYERS)
def test_rounds_little(name):
    layers, x = LAYERS[name](), pixels(200)
    network = IntegerNetwork.from_module(layers, input_scale=SCALE, examples=x, fraction_bits=12)
    with torch.no_grad():
        expected = layers.double()(x.double() * SCALE)
    loss = (network(x).double() / 2**12 - expected).abs().max().item()
    assert loss < 5e-4
    assert network.deviation(layers, x, input_scale=SCALE) == pytest.approx(loss)


def test_rows_have_their_own_scale():
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight[0] *= 1000.0  # a mean beside a logit
        linear.weight[1] /= 1000.0
    network = IntegerNetwork.from_module(linear, input_scale=SCALE, input_bits=8)
    assert network.deviation(linear, pixels(50), input_scale=SCALE) < 0.05
    arrays = network.arrays()
    weight = np.ldexp(arrays["weight_0"][1], -int(arrays["shift_0"][1]) - 12)
    assert_allclose(weight, linear.weight[1].detach() * SCALE, rtol=1e-3)


@pytest.mark.parametrize("width", [1, 300])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1.0, 1e3])
def test_any_size_of_weights(width, size):
    first, second = nn.Linear(3, width), nn.Linear(width, 2)
    with torch.no_grad():
        first.weight.mul_(size)
        second.weight.div_(max(size, 1.0))
    layers = nn.Sequential(first, nn.ReLU(), second)
    for examples in (None, pixels(20)):
        network = IntegerNetwork.from_module(
            layers, input_scale=SCALE, examples=examples, input_bits=8
        )
        x = pixels(20) if examples is None else examples
        assert network.deviation(layers, x, input_scale=SCALE) < 0.02
        assert network(x[:4]).tolist() == [network.plain(row) for row in x[:4].tolist()]


def test_input_scale_for_each_input():
    layers, scale = LAYERS["ReLU"](), [1.0, 0.5, SCALE]
    network = IntegerNetwork.from_module(layers, input_scale=scale, input_bits=4)
    x = torch.randint(16, (20, 3))
    assert network.deviation(layers, x, input_scale=torch.tensor(scale)) < 0.02


def test_arrays():
    network = IntegerNetwork.from_module(LAYERS["three"](), input_bits=8)
    arrays = network.arrays()
    assert all(a.dtype.kind == "i" for a in arrays.values())
    twin = IntegerNetwork.from_arrays(load(save(arrays)))
    assert twin.digest == network.digest
    assert twin.digest != IntegerNetwork.from_module(LAYERS["three"]()).digest
    x = pixels(9)
    assert twin(x).tolist() == network(x).tolist()
    assert "[3, 16, 8, 4]" in repr(twin)
    assert twin.float()(x).tolist() == network(x).tolist()  # of integers alone


@pytest.mark.parametrize("name", ["weight_0", "bias_1", "tops", "bits", "extra"])
def test_rejects_other_arrays(name):
    arrays = IntegerNetwork.from_module(LAYERS["ReLU"]()).arrays()
    with pytest.raises(ValueError, match="expected"):
        IntegerNetwork.from_arrays(
            {n: a for n, a in arrays.items() if n != name} | {"extra": 0 * arrays["bits"]}
        )
    if name != "extra":
        with pytest.raises(ValueError, match="expected"):
            IntegerNetwork.from_arrays({**arrays, name: arrays[name].astype(np.float32)})
        with pytest.raises(ValueError, match="expected"):
            IntegerNetwork.from_arrays({**arrays, name: arrays[name][None]})


def test_rejects_what_would_overflow():
    W, b = weights([2**14] * 4), array(0)
    sizes = {"input_bits": 16, "fraction_bits": 0}
    IntegerNetwork([W], [b], [b], [], **sizes)
    for bias, shift in ((2**53, 0), (-(2**53), 0), (2**53 - 2**31, 0), (2**53 - 2**51, 52)):
        with pytest.raises(ValueError, match=r"expected sums below 2\^53"):
            IntegerNetwork([W], [array(bias)], [array(shift)], [], **sizes)
    with pytest.raises(ValueError, match="expected shifts from 0 to 52"):
        IntegerNetwork([W], [b], [array(53)], [], **sizes)
    with pytest.raises(ValueError, match="expected 0 to 32 bits"):
        IntegerNetwork([W], [b], [b], [], input_bits=33, fraction_bits=0)
    with pytest.raises(ValueError, match="one top less"):
        IntegerNetwork([W], [b], [b], [3], **sizes)


def test_largest_sums_are_exact():
    n = 1 << 6
    W = np.full((1, n), 2**15 - 1, dtype=np.int16)
    network = IntegerNetwork([W], [array(1)], [array(0)], [], input_bits=32, fraction_bits=0)
    x = torch.full((n,), 2**32 - 1, dtype=torch.int64)
    assert network(x).item() == n * (2**15 - 1) * (2**32 - 1) + 1
    assert network.plain(x.tolist()) == [n * (2**15 - 1) * (2**32 - 1) + 1]


@pytest.mark.parametrize(
    "layers",
    [
        nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.Hardtanh(), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        nn.Sequential(nn.Sequential(nn.Linear(2, 2))),
        nn.Sequential(),
        nn.Bilinear(2, 2, 2),
    ],
)
def test_rejects_modules(layers):
    with pytest.raises(TypeError, match=r"expected an nn\.Sequential of Linear layers"):
        IntegerNetwork.from_module(layers)


def test_rejects_parameters_and_inputs():
    layers = nn.Linear(2, 2)
    network = IntegerNetwork.from_module(layers, input_bits=4)
    for bad in (torch.tensor([16, 0]), torch.tensor([-16, 0]), torch.tensor([0.5, 0])):
        with pytest.raises(ValueError, match="expected integers of 4 bits"):
            network(bad)
    with pytest.raises(ValueError, match="expected integers of 4 bits"):
        network(torch.tensor([math.nan, 0]))
    with pytest.raises(ValueError, match=r"expected x with shape \(\*, 2\), got \(3,\)"):
        network(torch.zeros(3))
    with torch.no_grad():
        layers.weight.fill_(1e6)
    with pytest.raises(ValueError, match="ask for fewer fraction_bits"):
        IntegerNetwork.from_module(layers, fraction_bits=12)
    with torch.no_grad():
        layers.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="expected finite parameters"):
        IntegerNetwork.from_module(layers)


def test_parameters():
    network = IntegerNetwork.from_module(LAYERS["ReLU"](), input_bits=8, fraction_bits=10)
    parameters = IntegerParameters(network)
    context, earlier = pixels(5)[:, :2], pixels(5)[:, :1].double()
    integers = network(torch.cat([context, earlier.long()], dim=1))
    assert parameters.integers(context, earlier).tolist() == integers.tolist()
    assert (parameters(context, earlier) * 2**10).tolist() == integers.tolist()


def test_device(device):
    network = IntegerNetwork.from_module(LAYERS["three"](), input_bits=8)
    x = pixels(64)
    expected = network(x).tolist()
    assert network.to(device)(x.to(device)).tolist() == expected


# Probabilities


def test_exp2():
    t = np.arange(0, 30 * UNIT, 997)
    found = integer_exp2(t)
    assert_allclose(found, 2.0 ** (30 - t / UNIT), rtol=1.1e-7, atol=1)
    assert (np.diff(found) <= 0).all()
    assert integer_exp2(array(0)).tolist() == [1 << 30]
    assert integer_exp2(array(2**62)).tolist() == [0]

    # Neighbours around the steps of the table and of octaves
    for start in (0, 1023, UNIT - 5, UNIT - 1024, 2 * UNIT - 5):
        assert (np.diff(integer_exp2(np.arange(start, start + 3000))) <= 0).all()


def test_exp2_is_the_same_everywhere():
    found = integer_exp2(np.arange(0, 25 * UNIT, 99_991))
    assert found[:4].tolist() == [1073741824, 1005064697, 940780144, 880607244]
    assert int(found.sum()) == 16787548965


def test_octaves():
    logits = array(-(2**14), 0, 2**12, 2**40)
    assert_allclose(octaves(logits[:3], 12) / UNIT, logits[:3] / 2**12 / math.log(2), atol=2e-6)
    assert octaves(logits, 12)[3] == octaves(array(2**31), 12)[0]


@pytest.mark.parametrize("values", [1, 2, 7, 256, 257, 65536])
def test_softmax(values):
    logits = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (2, values))
    bounds = integer_softmax(octaves(logits, 12), floor=1)
    assert bounds.dtype == np.int64
    assert (bounds[:, 0] == 0).all()
    assert (bounds[:, -1] == TOTAL).all()
    assert (np.diff(bounds) >= 1).all()

    expected = torch.tensor(logits / 2**12).softmax(-1).numpy() * (TOTAL - values) + 1
    assert_allclose(np.diff(bounds), expected, rtol=1e-5, atol=2)


def test_softmax_of_extremes():
    logits = array(-(2**62), 2**31, 0)
    assert integer_softmax(octaves(logits, 1)).tolist() == [0, 0, TOTAL, TOTAL]
    assert integer_softmax(octaves(logits, 1), floor=1).tolist() == [0, 1, TOTAL - 1, TOTAL]
    equal = integer_softmax(np.zeros(4, dtype=np.int64))
    assert equal.tolist() == [0, TOTAL // 4, TOTAL // 2, 3 * TOTAL // 4, TOTAL]


@pytest.mark.parametrize("values", [1, 2, 3, 256])
def test_logistic(values):
    generator = np.random.default_rng(0)
    mean = generator.integers(-20 << 12, (values + 20) << 12, (4, 30))
    log_scale = generator.integers(-4 << 12, 5 << 12, (4, 30))
    bounds = integer_logistic(mean, log_scale, values, fraction_bits=12)
    assert bounds.shape == (4, 30, values + 1)
    assert (bounds[..., 0] == 0).all()
    assert (bounds[..., -1] == TOTAL).all()
    assert (np.diff(bounds) >= 1).all()

    inputs = DiscretisedLogistic(4, 30, values, dtype=torch.float64)
    with torch.no_grad():
        inputs.mean.copy_(torch.tensor(mean / 2**12))
        inputs.log_scale.copy_(torch.tensor(log_scale / 2**12))
    expected = inputs.log_table().exp().detach().numpy().swapaxes(1, 2) * (TOTAL - values) + 1
    assert_allclose(np.diff(bounds), expected, rtol=2e-4, atol=3)


@pytest.mark.parametrize("fraction_bits", [1, 12, 16])
def test_logistic_of_extremes(fraction_bits):
    most = 2**62
    mean = array(-most, most, 0, 100 << fraction_bits)
    for log_scale in (-most, 0, most):
        bounds = integer_logistic(mean, np.full(4, log_scale), 65536, fraction_bits=fraction_bits)
        assert (np.diff(bounds) >= 1).all()
        assert (bounds[:, -1] == TOTAL).all()


@pytest.mark.parametrize("n", [0, 1, 10, 255])
def test_binomials(n):
    inputs = Binomial(1, 1, n + 1, dtype=torch.float64)
    with torch.no_grad():
        inputs.logits.zero_()
    expected = stats.binom.logpmf(np.arange(n + 1), n, 0.5) / math.log(2) + n
    assert_allclose(log2_binomials(n) / UNIT, expected, atol=2 / UNIT + 1e-9)
    assert_array_equal(log2_binomials(n), log2_binomials(n)[::-1])
