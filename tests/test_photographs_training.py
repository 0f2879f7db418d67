r"""Tests for learning models of photographs: circuits, variants and training."""

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from coding_cases import picture
from numpy.testing import assert_array_equal
from PIL import Image
from safetensors.numpy import save_file
from torch import nn
from torch.testing import assert_close

from probnets.circuits import ConditionalCircuit, TreeCircuit
from probnets.coding import (
    PhotographModel,
    TrainingSettings,
    compress,
    decompress,
    pretrained,
    train_photographs,
)
from probnets.coding.photographs import training
from probnets.coding.photographs.circuit import (
    PixelParameters,
    pixel_circuit,
    pixel_context,
    stage_circuit,
)
from probnets.coding.photographs.layout import PLACES
from probnets.coding.photographs.model import Settings
from probnets.coding.photographs.planes import Context, colour_planes, contexts, measure_planes
from probnets.coding.photographs.variants import Variant, variants

TINY = TrainingSettings(units=32, components=2, samples=3000, steps=60, batch_size=256)
SHORT = replace(TINY, steps=30)
FIT = Settings().fit("fast")


def photographs(count=2, size=(24, 30)):
    return [picture((*size, 3), np.uint8, seed) for seed in range(count)]


def train(images=None, settings=TINY, **options):
    images = photographs() if images is None else images
    return train_photographs(images, settings=settings, progress=False, **options)


def rng(seed=0):
    return np.random.default_rng(seed)


# The circuit of a number


@pytest.mark.parametrize("top", [255, 1023])
def test_the_loop_measures_what_the_circuit_says(top):
    # Both have the same outputs; the loop has means in sixteenths and scales in eighths.
    model = pretrained()
    assert isinstance(model, PhotographModel)
    image = picture((20, 24, 3), np.uint16) >> (6 if top == 1023 else 8)
    planes = colour_planes(image)
    bits = measure_planes(model, planes, top=top)
    found = contexts(PLACES, planes, top=top, fit=model.settings.fit("fast"))
    for stage, own, expected in zip(model.stages, found, bits, strict=True):
        circuit = stage_circuit(stage, top + 1)
        x, context = pixel_context(own)
        likely = expected.ravel() < 16  # of others the loop has few quantiles
        real = -circuit.log_prob(x, context).numpy()[likely] / math.log(2)
        assert likely.mean() > 0.95
        assert real.mean() == pytest.approx(expected.ravel()[likely].mean(), abs=0.01)
        np.testing.assert_allclose(real, expected.ravel()[likely], rtol=0.06, atol=0.1)


def test_rounding_costs_little():
    # The same, from a network of floats that is rounded.
    planes = colour_planes(photographs(1, (40, 40))[0])
    found = contexts(PLACES, planes, top=255, fit=FIT)
    stages, real = [], []
    for places, own in zip(PLACES, found, strict=True):
        deviations = np.maximum(np.rint(own.inputs.std(0)), 1).astype(np.int16)
        network = training._network(places, deviations, TrainingSettings(units=32))
        stages.append(training._rounded(places, network, own.inputs, deviations))
        real.append(training._bits(pixel_circuit(network, 4, 256), own))
        x, context = pixel_context(own)
        log_prob = pixel_circuit(network, 4, 256).log_prob(x, context).sum().item()
        assert real[-1] == pytest.approx(-log_prob / math.log(2), rel=1e-4)

    model = PhotographModel(tuple(stages))
    bits = measure_planes(model, planes, top=255).sum((1, 2))
    np.testing.assert_allclose(bits / 1600, np.array(real) / 1600, atol=0.01)


def one_context():
    r"""Returns the circuit of red less green where green is 100, and a context."""
    inputs = PLACES[1].inputs
    parameters = PixelParameters(nn.Linear(inputs, 9), torch.full((inputs,), 0.1))
    network = pixel_circuit(parameters, 3, 256)
    facts = np.array([[7, 16 * 5 + 3, 80, -100, 155]], np.int32)
    own = Context(rng().integers(-90, 90, (1, inputs)).astype(np.int16), facts)
    return network, *pixel_context(own)


def test_it_is_a_conditional_circuit():
    circuit, x, context = one_context()
    assert isinstance(circuit, ConditionalCircuit)
    assert circuit.variables == 1
    assert x.tolist() == [[107]]
    assert context[0, -2:].tolist() == [16 * 105 + 3, 80]

    one = circuit.at(context[0])
    assert isinstance(one, TreeCircuit)
    values = torch.arange(256)[:, None]
    log_prob = circuit.log_prob(values, context.expand(256, -1))
    assert_close(one.log_prob(values), log_prob)
    assert_close(log_prob.exp().sum(), torch.tensor(1.0))
    assert_close(one.log_prob(x), circuit.log_prob(x, context))


def test_means_and_scales_are_relative_to_the_anchor_and_the_spread():
    circuit, _, context = one_context()
    linear = circuit.get_submodule("blocks.0.network.network.layers")
    with torch.no_grad():
        assert isinstance(linear, nn.Linear)
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor([0.0, -60.0, -60.0, 0.5, 0, 0, -3.0, 0, 0]))

    # A spread of 2^(80 / 16) sixteenths, thus of 2 levels: the mean is one level beyond the
    # anchor, and the scale an eighth of the spread.
    values = torch.arange(256)[:, None]
    probs = circuit.log_prob(values, context.expand(256, -1)).exp().detach().double()
    mean = 105 + 3 / 16 + 1
    edges = torch.sigmoid((torch.arange(1, 256, dtype=torch.float64) - 0.5 - mean) / 0.25)
    one = torch.ones(1, dtype=torch.float64)
    expected = torch.diff(torch.cat([0 * one, edges, one]))
    assert_close(probs, expected, atol=1e-5, rtol=0.0)


def test_samples_are_values():
    circuit, _, context = one_context()
    x = circuit.sample(context.expand(500, -1), generator=torch.Generator().manual_seed(0))
    assert x.shape == (500, 1)
    assert_array_equal(x, x.round())
    assert 0 <= x.min() <= x.max() <= 255
    assert len(x.unique()) > 5

    # A context far outside still has values.
    far = context.clone()
    far[:, -2:] = torch.tensor([1e6, 0.0])
    assert circuit.sample(far.expand(9, -1)).max() == 255


# Variants


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 40), (17, 64), (90, 70)])
def test_variants(size):
    img = picture((*size, 3), np.uint8)
    before = img.copy()
    for seed in range(8):
        found = list(variants(img, rng(seed)))
        assert all(isinstance(variant, Variant) for variant in found)
        assert sum(weight for _, weight in found) == pytest.approx(1.0)
        assert min(weight for _, weight in found) > 0
        assert [pixels.dtype for pixels, _ in found] == [np.uint8] * 5 + [np.uint16]
        for pixels, _ in found:
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert pixels.flags.c_contiguous
        assert min(found[3].pixels.shape[:2]) >= 16
        for pixels, _ in (*found[:3], found[4]):  # as large as the image
            assert sorted(pixels.shape[:2]) == sorted(size)
    assert_array_equal(img, before)


def test_variants_by_hand():
    img = picture((40, 50, 3), np.uint8)
    turned = {np.rot90(part, n).tobytes() for part in (img, img[:, ::-1]) for n in range(4)}
    seen = set()
    for seed in range(40):
        one, two, noisy, scaled, jpeg, deep = (v.pixels for v in variants(img, rng(seed)))
        seen |= {one.tobytes(), two.tobytes()}
        for other in (noisy, jpeg):
            assert other.tobytes() not in turned
            assert abs(other.astype(float).mean() - img.mean()) < 5
        assert 16 <= min(scaled.shape[:2]) < max(scaled.shape[:2]) < 50
        assert sorted(deep.shape[:2]) == [20, 25]
        assert deep.max() > 255
    assert seen == turned

    scales = [2.0 ** math.ceil(math.log2(v[-1].pixels.max())) for v in
              (list(variants(img, rng(seed))) for seed in range(40))]  # fmt: skip
    assert min(scales) <= 2**10
    assert max(scales) == 2**16


def test_variants_are_those_of_their_seed():
    img = picture((40, 50, 3), np.uint8)
    for a, b in zip(variants(img, rng(3)), variants(img, rng(3)), strict=True):
        assert a.weight == b.weight
        assert_array_equal(a.pixels, b.pixels, strict=True)
    first, other = (next(iter(variants(noise(), rng(seed)))).pixels for seed in (3, 4))
    assert not np.array_equal(first, other)


def noise():
    return rng().integers(0, 256, (40, 50, 3), dtype=np.uint8)


# Training


def test_training_lowers_the_bits():
    images = photographs(3, (40, 48))
    _, start = train(images, replace(TINY, steps=1, rate=1e-9))
    model, result = train(images)

    assert np.all(np.array(result.real) < np.array(start.real) - 0.02)
    assert_close(torch.tensor(result.integer), torch.tensor(result.real), atol=0.02, rtol=0.0)
    assert model.components == 2
    assert model.parameters == sum(32 * (p.inputs + 1) + 6 * 33 for p in PLACES)

    # These are the bits of what was held out, the first image.
    size = 8 * len(compress(images[0], model)) / images[0][..., 0].size
    assert size == pytest.approx(sum(result.integer), abs=8 * 25 / images[0][..., 0].size)
    for mode in ("fast", "slow"):
        blob = compress(images[1], model, mode=mode)
        assert_array_equal(decompress(blob, model), images[1])


def test_training_is_that_of_its_seed():
    model, result = train(settings=SHORT)
    again, same = train(settings=SHORT)
    assert again.digest == model.digest
    assert same == result
    for changes in ({"seed": 1}, {"steps": 29}, {"rate": 5e-3}, {"samples": 2900}):
        assert train(settings=replace(SHORT, **changes))[0].digest != model.digest


def test_images_of_every_source(tmp_path):
    images = photographs()
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    expected = train(images, replace(TINY, steps=3))[0].digest
    for same in (paths, iter(images), [Image.fromarray(image) for image in images]):
        assert train(same, replace(TINY, steps=3))[0].digest == expected


def test_what_is_held_out(monkeypatch):
    taken = {}
    monkeypatch.setattr(training, "_collect", lambda pictures, *_, **__: taken.update(
        train=[len(p) for p in pictures]) or _stop())  # fmt: skip
    for count, options, expected in [
        (1, {}, [1]),
        (2, {}, [2]),
        (12, {}, [*range(2, 11), 12]),
        (2, {"validation": photographs(1)}, [1, 2]),
    ]:
        images = [noise()[:n] for n in range(1, count + 1)]
        with pytest.raises(InterruptedError):
            train(images, **options)
        assert taken["train"] == expected


def _stop():
    raise InterruptedError


def test_validation_is_what_is_measured():
    images = photographs()
    settings = replace(TINY, steps=2)
    smooth = train(images, settings, validation=photographs(1))[1]
    hard = train(images, settings, validation=[noise()])[1]
    assert max(smooth.integer) < min(hard.integer)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 1), (2, 2)])
def test_tiny_photographs(size):
    model, _ = train([picture((*size, 3), np.uint8)], replace(TINY, steps=2))
    image = picture((9, 9, 3), np.uint8)
    assert_array_equal(decompress(compress(image, model), model), image)


def test_settings_of_coding():
    coding = Settings(ridge=9, decay=100, periods=(5, 3), rates=(7, 8))
    model, _ = train(settings=replace(TINY, steps=2), coding=coding)
    assert model.settings == coding


# Checkpoints


@cache
def trained():
    model, result = train(settings=SHORT)
    return model.digest, result


@pytest.mark.parametrize("stop", [3, 10, 17, 30, 41, 89])
def test_resumes_to_the_same_model(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SAVED", 10)
    path, rate_at, steps = tmp_path / "checkpoint", TrainingSettings.rate_at, []

    def interrupted(self, step):
        if len(steps) == stop:
            raise KeyboardInterrupt
        steps.append(step)
        return rate_at(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSettings, "rate_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(settings=SHORT, checkpoint=path)
    assert path.exists() == (stop >= 10)

    def counted(self, step):
        steps.append(step)
        return rate_at(self, step)

    steps.clear()
    monkeypatch.setattr(TrainingSettings, "rate_at", counted)
    model, result = train(settings=SHORT, checkpoint=path)
    assert steps == [*range(30), *range(30), *range(30)][stop // 10 * 10 :]
    assert (model.digest, result) == trained()

    # A finished one takes no steps.
    steps.clear()
    model, result = train(settings=SHORT, checkpoint=str(path))
    assert not steps
    assert (model.digest, result) == trained()


def test_checkpoints_of_other_trainings(tmp_path):
    path, settings = tmp_path / "checkpoint", replace(TINY, steps=2)
    train(settings=settings, checkpoint=path)
    before = path.read_bytes()
    for images, options in [
        (photographs(3), {}),
        (photographs(2)[::-1], {}),
        (None, {"settings": replace(settings, seed=1)}),
        (None, {"settings": replace(settings, steps=3)}),
        (None, {"coding": Settings(ridge=65)}),
    ]:
        with pytest.raises(ValueError, match=r"a checkpoint of this training at .*, got"):
            train(images, **{"settings": settings, "checkpoint": path, **options})
        assert path.read_bytes() == before


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "checkpoint"
    model, _ = train(settings=replace(TINY, steps=2))
    model.save(path)
    with pytest.raises(ValueError, match=r"a checkpoint of this training at .*, got"):
        train(checkpoint=path)
    for content in (b"", bytes(100), path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected a file that probnets wrote"):
            train(checkpoint=path)


def test_files_of_other_facts(tmp_path):
    path = tmp_path / "checkpoint"
    save_file({"a": np.zeros(3)}, path, metadata={"probnets": json.dumps([1, 2])})
    with pytest.raises(ValueError, match=r"a checkpoint of this training at .*, got"):
        train(checkpoint=path)


# What is refused


@pytest.mark.parametrize(
    "bad",
    [
        *(np.zeros(shape, np.uint8) for shape in ((8, 8), (8, 8, 1), (8, 8, 2), (8, 8, 4))),
        *(np.zeros((8, 8, 3), dtype) for dtype in (np.uint16, np.bool_)),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_rejects_other_images(bad):
    with pytest.raises(ValueError, match=r"expected photographs of uint8 with shape \(H, W, 3\)"):
        train([*photographs(), bad])
    with pytest.raises(ValueError, match=r"expected photographs of uint8 with shape \(H, W, 3\)"):
        train(validation=[bad])


def test_rejects_none():
    with pytest.raises(ValueError, match="expected one photograph or more, got none"):
        train([])


def test_validation_on_nothing():
    with pytest.raises(ValueError, match="expected one photograph or more"):
        train(settings=replace(TINY, steps=1), validation=[])


@pytest.mark.parametrize(
    "changes",
    [
        *({"units": n} for n in (0, -32, 16, 33)),
        *({"components": n} for n in (0, -1, 6)),
        *({name: 0} for name in ("samples", "steps", "batch_size", "rate")),
        *({"rate": rate} for rate in (-1.0, math.nan)),
    ],
    ids=str,
)
def test_rejects_settings(changes):
    with pytest.raises(ValueError, match=r"expected (hidden units in 32s|samples, steps)"):
        TrainingSettings(**changes)


def test_rates():
    settings = TrainingSettings(steps=100, rate=2.0)
    rates = [settings.rate_at(step) for step in range(101)]
    assert rates[0] == 2.0
    assert rates[50] == pytest.approx(1.01)
    assert rates[100] == pytest.approx(0.02)
    assert sorted(rates, reverse=True) == rates
