r"""Tests for models of photographs: places, stages and files."""

import json
import math
from dataclasses import asdict, replace
from functools import cache

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from coding_cases import picture, tile_model
from hypothesis import given, settings
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from probnets.backend.checkpoints import read, write
from probnets.circuits import IntegerNetwork
from probnets.coding import PhotographModel, compress, decompress, load_model
from probnets.coding.photographs.kernel import MARGIN
from probnets.coding.photographs.layout import PLACES
from probnets.coding.photographs.model import Settings
from probnets.coding.photographs.network import CAP, MOST, OUTPUTS, run_network
from probnets.coding.photographs.stages import FRACTION_BITS, INPUT_BITS, SUM_BITS, Places, Stage

NEAR = [(0, -1), (-1, 0), (-1, 1), (-2, 0)]
SETTINGS = Settings(ridge=40, decay=200, periods=(3, 1), rates=(300, 50))


def lines(*places):
    return np.array(places, np.int8).reshape(-1, 3)


@cache
def places_of(plane):
    own = [(plane, *place) for place in NEAR]
    others = [(q, *place) for q in range(plane) for place in [(0, 0), (0, 1), (1, -1)]]
    return Places(plane, lines(*own, *others[1:]), lines(*own[:3], *others), lines(*own))


def arrays_of(inputs, *, units=32, components=2, seed=0, size=60):
    r"""Draws the arrays of a network of whole numbers."""
    random = np.random.default_rng(seed)
    outputs = 3 * components
    return {
        "weight_0": random.integers(-size, size + 1, (units, inputs), np.int16),
        "bias_0": random.integers(-1000, 1000, units),
        "shift_0": random.integers(0, 8, units),
        "weight_1": random.integers(-size, size + 1, (outputs, units), np.int16),
        "bias_1": random.integers(-1000, 1000, outputs),
        "shift_1": random.integers(0, 14, outputs),
        "tops": np.array([CAP]),
        "bits": np.array([INPUT_BITS, FRACTION_BITS]),
    }


def stage_of(plane, changes=(), **options):
    r"""Draws a stage, of whose network some arrays are changed."""
    places = places_of(plane)
    arrays = arrays_of(places.inputs, seed=plane, **options) | dict(changes)
    deviations = np.arange(1, places.inputs + 1, dtype=np.int16)
    return Stage(places, IntegerNetwork.from_arrays(arrays), deviations)


@cache
def model():
    return PhotographModel(tuple(stage_of(plane) for plane in range(3)), SETTINGS)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    model().save(path)
    return path


def tampered(path, arrays=(), **facts):
    r"""Changes arrays and facts of a model file; those that are None are left out."""
    old_arrays, old_facts = read(path)
    new = {**old_arrays, **dict(arrays)}, {**old_facts, **facts}
    kept = [{k: v for k, v in part.items() if v is not None} for part in new]
    write(path, *kept)
    return path


# Places


@pytest.mark.parametrize(
    "place",
    [
        *((0, 0, 0), (0, 0, 1), (0, 1, -3), (0, 3, 3)),  # not yet known
        *((1, -1, 0), (2, 0, -1), (-1, -1, -1)),  # no such plane, or a later one
        *((0, -4, 0), (0, 0, -4), (0, -1, 4), (0, -128, 0), (0, -1, 127)),  # too far
    ],
    ids=str,
)
@pytest.mark.parametrize("part", ["regressors", "errors", "pixels"])
def test_places_that_are_not_known(part, place):
    good = {name: lines((0, 0, -1)) for name in ("regressors", "errors", "pixels")}
    Places(0, **good)
    with pytest.raises(ValueError, match=f"expected {part} that are known before a pixel"):
        Places(0, **good | {part: lines((0, 0, -1), place)})


def test_earlier_planes_are_known_in_full():
    everywhere = [
        (0, y, x) for y in range(-MARGIN, MARGIN + 1) for x in range(-MARGIN, MARGIN + 1)
    ]
    own = lines((1, 0, -1))
    places = Places(1, lines(*everywhere), lines(*everywhere), own)
    assert places.inputs == 1 + 2 * 49 + 1
    with pytest.raises(ValueError, match="for plane 0"):
        Places(0, lines(*everywhere), lines((0, 0, -1)), lines((0, 0, -1)))


def test_places_need_regressors_and_own_pixels():
    near = lines((1, 0, -1))
    with pytest.raises(ValueError, match="expected regressors, and pixels of the plane itself"):
        Places(1, lines(), near, near)
    with pytest.raises(ValueError, match="expected regressors, and pixels of the plane itself"):
        Places(1, near, near, lines((0, 0, -1)))
    assert Places(1, near, lines(), lines()).inputs == 1


@pytest.mark.parametrize(
    "bad",
    [lines((0, 0, -1)).astype(np.int64), np.zeros(3, np.int8), np.zeros((1, 2), np.int8)],
    ids=["int64", "flat", "two columns"],
)
def test_places_need_lines(bad):
    near = lines((0, 0, -1))
    for parts in ((bad, near, near), (near, bad, near), (near, near, bad)):
        with pytest.raises(ValueError, match=r"of int8 with shape \(n, 3\)"):
            Places(0, *parts)


@pytest.mark.parametrize("size", [(1, 1), (3, 8), (20, 5)])
@pytest.mark.parametrize("plane", range(3))
@pytest.mark.parametrize("of", [places_of, PLACES.__getitem__], ids=["small", "shipped"])
def test_taps_by_definition(of, plane, size):
    places = of(plane)
    random = np.random.default_rng(0)
    padded = random.integers(-99, 99, (3, size[0] + 2 * MARGIN, size[1] + 2 * MARGIN))
    flat, stride = padded.ravel(), padded.shape[2]
    taps = places.taps(*size)

    for y in range(MARGIN, MARGIN + size[0]):
        for x in range(MARGIN, MARGIN + size[1]):
            o = plane * padded[0].size + y * stride + x

            def at(q, row, column, y=y, x=x):
                return padded[q, y + row, x + column]

            for (q, row, column), (a, b, c) in zip(
                places.regressors, taps.regressors, strict=True
            ):
                found = 2 * flat[o + a] - flat[o + b] - flat[o + c]
                if q == plane or (row, column) == (0, 0):
                    expected = 2 * at(q, row, column) - at(q, 0, -1) - at(q, -1, 0)
                else:
                    expected = 2 * (at(q, row, column) - at(q, 0, 0))
                assert found == expected
            for name in ("errors", "pixels"):
                found = flat[o + getattr(taps, name)]
                expected = [at(*place) for place in getattr(places, name)]
                assert_array_equal(found, expected)


def test_the_layout():
    assert [places.plane for places in PLACES] == [0, 1, 2]
    for places in PLACES:
        for part in (places.regressors, places.errors, places.pixels):
            assert len(np.unique(part, axis=0)) == len(part)
        # No regressor is zero all over.
        taps = places.taps(50, 50).regressors
        assert (taps[:, :1] != taps[:, 1:]).any(1).all()


# Stages


def ran(stage, x, rates=None):
    r"""Runs the compiled network on rows of inputs."""
    net = stage.compiled(rates)
    outputs = np.zeros((len(x), OUTPUTS), np.float32)
    for row, out in zip(x.astype(np.float32), outputs, strict=True):
        run_network(net, row, np.zeros_like(net.first_bias), out)
    return outputs


@pytest.mark.parametrize("rates", [None, (1e-4, 1e-4)])
@given(
    st.integers(0, 2), st.integers(0, 999), st.sampled_from([32, 64]), st.integers(1, 5),
    st.sampled_from([0, 1, 60, 200]),
)  # fmt: skip
@settings(max_examples=30)
def test_compiled_networks_are_those_of_integers(rates, plane, seed, units, components, size):
    places = places_of(plane)
    arrays = arrays_of(places.inputs, units=units, components=components, seed=seed, size=size)
    deviations = np.ones(places.inputs, np.int16)
    stage = Stage(places, IntegerNetwork.from_arrays(arrays), deviations)
    assert stage.components == components

    most = 2**INPUT_BITS - 1
    random = np.random.default_rng(seed)
    x = np.concatenate(
        [
            random.integers(-most, most + 1, (20, places.inputs)),
            random.choice([-most, most], (20, places.inputs)),
            most * np.sign(arrays["weight_0"][:8]),  # the largest sums
            -most * np.sign(arrays["weight_0"][:8]),
            np.zeros((1, places.inputs), int),
        ]
    )
    expected = stage.network(torch.from_numpy(x)).clamp(-MOST, MOST).numpy()
    found = ran(stage, x, rates)
    assert_array_equal(found[:, : 3 * components], expected)
    assert not found[:, 3 * components :].any()


def test_sums_up_to_the_last_that_float32_holds():
    # Sums of absolute values one below 2^24 are exact, and one more is refused.
    inputs, most = places_of(0).inputs, 2**INPUT_BITS - 1
    for layer, count, factor in ((0, inputs, most), (1, 32, CAP)):
        room = 2**SUM_BITS - 1
        weight = np.zeros((32 if layer == 0 else 6, count), np.int16)
        weight[0] = np.minimum(room // factor // count, 2**15 - 1)
        rest = room - int(weight[0].astype(int).sum()) * factor
        bias = np.zeros(len(weight), np.int64)
        bias[0] = -rest
        changes = {f"weight_{layer}": weight, f"bias_{layer}": bias}
        changes[f"shift_{layer}"] = np.zeros(len(weight), np.int64)

        stage = stage_of(0, changes)
        x = np.array([[most] * inputs, [-most] * inputs, [1] * inputs])
        expected = stage.network(torch.from_numpy(x)).clamp(-MOST, MOST).numpy()
        assert_array_equal(ran(stage, x)[:, :6], expected)

        bias[0] -= 1
        with pytest.raises(ValueError, match=r"expected sums below 2\^24, got 16777216"):
            stage_of(0, changes)


def test_rounding_counts_as_a_part_of_a_sum():
    shift = np.full(32, 25)
    with pytest.raises(ValueError, match=r"expected sums below 2\^24"):
        stage_of(0, {"shift_0": shift})


def test_networks_that_adapt_are_copies():
    # What the loop changes is not the model.
    stage = model().stages[0]
    before = {name: array.copy() for name, array in stage.arrays().items()}
    first = stage.compiled((0.1, 0.1))
    for array in first:
        array += 1
    for a, b in zip(stage.compiled((0.1, 0.1)), first, strict=True):
        assert not np.array_equal(a, b)
    for name, array in stage.arrays().items():
        assert_array_equal(array, before[name])
    assert_array_equal(stage.compiled().rates, np.zeros(0))


def test_adaptation_by_definition():
    # Of what adapts, only the scales are told apart here.
    stage = stage_of(0)
    parts, net = stage.arrays(), stage.compiled((0.25, 0.125))
    assert net.rates[-1] == 0.25
    np.testing.assert_allclose(net.rates[:-1] * stage.deviations.astype(float) ** 2, 0.25)
    assert_array_equal(net.turned.reshape(OUTPUTS, -1)[:6], parts["weight_1"])
    assert_array_equal(net.lift, 2.0 ** (parts["shift_0"] + 6))
    assert_array_equal(net.back[:6], 2.0 ** -parts["shift_1"])
    assert_array_equal(net.ahead[:6], 0.125 * 2.0 ** (parts["shift_1"] - 6))
    assert_array_equal(net.second_rates[:6], 2.0**12)
    for array in (net.turned[6 * 32 :], net.back[6:], net.ahead[6:], net.second_rates[6:]):
        assert not array.any()


BAD_NETWORKS = {
    "other inputs": lambda n: arrays_of(n + 1),
    "outputs that are no mixture": lambda n: {
        name: array[:-1] if name.endswith("_1") else array for name, array in arrays_of(n).items()
    },
    "another layer": lambda n: (
        arrays_of(n)
        | {
            "weight_2": np.ones((6, 6), np.int16),
            "bias_2": np.zeros(6, int),
            "shift_2": np.zeros(6, int),
            "tops": np.array([CAP, CAP]),
        }
    ),
    "another cap": lambda n: arrays_of(n) | {"tops": np.array([CAP + 1])},
    "other input bits": lambda n: arrays_of(n) | {"bits": np.array([8, FRACTION_BITS])},
    "other fraction bits": lambda n: arrays_of(n) | {"bits": np.array([INPUT_BITS, 7])},
    "hidden units not in 32s": lambda n: arrays_of(n, units=40),
    "too many components": lambda n: arrays_of(n, components=6),
}


@pytest.mark.parametrize("name", BAD_NETWORKS)
def test_rejects_networks(name):
    places = places_of(0)
    network = IntegerNetwork.from_arrays(BAD_NETWORKS[name](places.inputs))
    with pytest.raises(ValueError, match=r"expected (a network of|hidden units in 32s)"):
        Stage(places, network, np.ones(places.inputs, np.int16))


@pytest.mark.parametrize("change", ["zero", "negative", "short", "long", "two dimensions"])
def test_rejects_deviations(change):
    stage = stage_of(0)
    deviations = stage.deviations
    bad = {
        "zero": deviations - 1,
        "negative": -deviations,
        "short": deviations[1:],
        "long": np.append(deviations, np.int16(1)),
        "two dimensions": deviations[None],
    }[change]
    with pytest.raises(ValueError, match=r"expected \d+ positive deviations"):
        Stage(stage.places, stage.network, bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0])
def test_rejects_deviations_of_floats(bad):
    stage = stage_of(0)
    with pytest.raises(ValueError, match="positive deviations"):
        Stage(stage.places, stage.network, np.full(stage.deviations.shape, bad))


@pytest.mark.parametrize("plane", range(3))
def test_stages_as_arrays(plane):
    stage = stage_of(plane)
    again = Stage.from_arrays(stage.arrays())
    assert again.arrays().keys() == stage.arrays().keys()
    for name, array in stage.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array, strict=True)


# Settings


@pytest.mark.parametrize(
    "changes",
    [
        *({"ridge": n} for n in (0, -1, 2**20, 1.0, True, None, "64")),
        *({"decay": n} for n in (-1, 257, 0.5)),
        *({"periods": n} for n in ((0, 1), (4, 9), (4,), (4, 2, 1), (4.0, 2), ())),
        *({"rates": n} for n in ((0, 1), (1, 2**20), (1,), (1, 2, 3), (1, 1.5))),
    ],
    ids=str,
)
def test_rejects_settings(changes):
    with pytest.raises(ValueError, match=r"expected whole numbers in their ranges, got Settings"):
        Settings(**changes)


def test_settings_in_units():
    fast, slow = SETTINGS.fit("fast"), SETTINGS.fit("slow")
    assert fast == (40.0, 200 / 256, 3)
    assert slow == (40.0, 200 / 256, 1)
    assert SETTINGS.adaptation("fast") is None
    assert SETTINGS.adaptation("slow") == (300 / 2**20, 50 / 2**20)


# Models


@pytest.mark.parametrize("numbers", [(), (0,), (0, 1), (0, 1, 2, 2), (1, 0, 2), (0, 1, 1)])
def test_rejects_stages(numbers):
    stages = tuple(stage_of(n) for n in numbers)
    with pytest.raises(ValueError, match="expected stages of planes 0 to 2"):
        PhotographModel(stages)


def test_rejects_stages_of_other_components():
    stages = (stage_of(0), stage_of(1), stage_of(2, components=3))
    with pytest.raises(ValueError, match=r"got planes \[0, 1, 2\] and \[2, 3\] components"):
        PhotographModel(stages)


def test_what_a_model_says_of_itself():
    parameters = sum(32 * (places_of(n).inputs + 1) + 6 * 33 for n in range(3))
    assert (model().kind, model().components, model().parameters) == ("photographs", 2, parameters)
    text = f"PhotographModel({model().digest.hex()}, components=2, parameters={parameters})"
    assert repr(model()) == text


def test_the_digest_covers_all_that_codes():
    stages, seen = list(model().stages), {model().digest}
    assert PhotographModel(tuple(stages), SETTINGS).digest == model().digest
    for plane, stage in enumerate(stages):
        for name, array in stage.arrays().items():
            if name in ("plane", "tops", "bits"):
                continue  # others are refused
            changed = array.copy()
            if name in ("regressors", "errors", "pixels"):
                changed[0] = plane, -3, -3
            else:
                changed.reshape(-1)[-1] += 1
            new = stages.copy()
            new[plane] = Stage.from_arrays({**stage.arrays(), name: changed})
            seen.add(PhotographModel(tuple(new), SETTINGS).digest)
    for changes in (
        *({"ridge": 41}, {"decay": 201}, {"periods": (1, 3)}, {"periods": (3, 2)}),
        *({"rates": (301, 50)}, {"rates": (300, 51)}),
    ):
        other = replace(SETTINGS, **changes)
        seen.add(PhotographModel(model().stages, other).digest)
    assert len(seen) == 1 + 3 * 10 + 6


@pytest.mark.parametrize("shape", [(9, 8), (5, 7, 3), (17, 9, 4)])
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16])
def test_models_of_any_weights_are_exact(shape, dtype):
    image = picture(shape, dtype)
    noise = np.random.default_rng(0).integers(0, 2**16, shape).astype(dtype)
    for img in (image, noise):
        for mode in ("fast", "slow"):
            blob = compress(img, model(), mode=mode)
            assert_array_equal(decompress(blob, model()), img, strict=True)


# Files


def test_round_trip(tmp_path):
    model().save(tmp_path / "folder" / "model")
    again = PhotographModel.load(str(tmp_path / "folder" / "model"))
    assert again.digest == model().digest
    assert again.settings == model().settings
    image = picture((9, 8, 3), np.uint8)
    for mode in ("fast", "slow"):
        assert compress(image, again, mode=mode) == compress(image, model(), mode=mode)

    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "folder" / "model").read_bytes()
    assert isinstance(load_model(tmp_path / "again"), PhotographModel)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file"):
        PhotographModel.load(tmp_path / "nothing")


@pytest.mark.parametrize("content", [b"", b"\x89PNG", bytes(200), b"\xff" * 200])
def test_foreign_files(tmp_path, content):
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(ValueError, match="expected a file that probnets wrote"):
        PhotographModel.load(tmp_path / "foreign")


def test_truncated_files(path):
    content = path.read_bytes()
    for end in [*range(0, 40, 3), *range(40, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="expected a file that probnets wrote"):
            PhotographModel.load(path)


def test_flipped_bytes(path):
    # A flip that goes unnoticed makes another model, which streams do not take for this one.
    content = path.read_bytes()
    random = np.random.default_rng(0)
    begin = content.index(b"}}") + 2
    for place in random.integers(begin, len(content), 200):
        flipped = bytearray(content)
        flipped[place] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        try:
            found = PhotographModel.load(path)
        except ValueError:
            continue
        assert found.digest != model().digest


def test_other_files(path, tmp_path):
    tile_model().save(tmp_path / "tiles")
    with pytest.raises(ValueError, match=r"expected a photograph model in .*, got 'image model'"):
        PhotographModel.load(tmp_path / "tiles")
    with pytest.raises(ValueError, match="of format 1, got 2; a newer probnets may read it"):
        PhotographModel.load(tampered(path, format=2))
    with pytest.raises(ValueError, match="got 'a drawing'"):
        PhotographModel.load(tampered(path, what="a drawing"))

    save_file({"a": np.zeros(3)}, path, metadata={"probnets": json.dumps([1, 2])})
    with pytest.raises(ValueError, match=r"expected a photograph model in .*, got \[1, 2\]"):
        PhotographModel.load(path)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="its header has no facts"):
        PhotographModel.load(path)


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("name", sorted(stage_of(0).arrays()))
def test_tampered_arrays(path, name, stage):
    original = path.read_bytes()
    array = read(path)[0][f"stage{stage}.{name}"]
    for bad in (
        None,
        array[:0],
        array[None],
        array[:-1] if len(array) > 1 else None,
        np.full_like(array, np.iinfo(array.dtype).max),
        np.full_like(array, np.iinfo(array.dtype).min),
        array.astype(np.float32) if name not in ("plane", "deviations") else None,
    ):
        path.write_bytes(original)
        tampered(path, {f"stage{stage}.{name}": bad})
        if is_sound(name, array, bad):
            assert PhotographModel.load(path).digest != model().digest
            continue
        with pytest.raises(ValueError, match=r"expected a sound model in .*: "):
            PhotographModel.load(path)


def is_sound(name, array, bad):
    r"""Tells whether other arrays make another model."""
    if bad is None:
        return False
    fewer = name == "regressors" and len(bad) == len(array) - 1
    return fewer or (name == "deviations" and bad.shape == array.shape and bad.min() > 0)


def test_arrays_that_no_stage_has(path):
    with pytest.raises(ValueError, match=r"expected a sound model in .*: expected the arrays"):
        PhotographModel.load(tampered(path, {"stage1.extra": np.zeros(3)}))


@pytest.mark.parametrize(
    "told",
    [
        *({**asdict(SETTINGS), "ridge": bad} for bad in (0, 1.5, "64", None, [64])),
        *({**asdict(SETTINGS), "periods": bad} for bad in (4, [4], "42", [0, 0], None, {"a": 1})),
        {**asdict(SETTINGS), "more": 1},
        *({k: v for k, v in asdict(SETTINGS).items() if k != name} for name in asdict(SETTINGS)),
        *({}, [], None, "settings", 64),
    ],
    ids=str,
)
def test_tampered_settings(path, told):
    with pytest.raises(ValueError, match="expected a sound model in"):
        PhotographModel.load(tampered(path, settings=told))


def test_saving_is_whole_or_not_at_all(path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        PhotographModel(model().stages).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
