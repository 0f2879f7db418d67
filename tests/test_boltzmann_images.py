r"""Tests of machines of images: levels, masks, completion and classification."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from probnets.boltzmann import FreeCoupling
from probnets.boltzmann.enumeration import exact
from probnets.boltzmann.images import ImageMachine, dense_machine, tier_machine
from probnets.boltzmann.machine import BoltzmannMachine, Options
from probnets.boltzmann.tiers import TierCoupling, paper_architecture

pytestmark = pytest.mark.usefixtures("one_thread")

TIGHT: Options = {"tolerance": 1e-10}


def machine_of(kind="dense", *, shape=(4, 2), levels=3, classes=2, scale=2.0, **options):
    options["dtype"] = torch.float64
    if kind == "dense":
        made = dense_machine(shape, levels, classes, features=8, latents=3, **options)
    else:
        made = tier_machine(shape, levels, classes, hidden=[(2, 3, 2)], **options)
    for weight in made.machine.coupling.parameters():
        weight.data.mul_(scale)
    made.machine.bias.data.normal_()
    return made


def test_levels_by_hand():
    made = machine_of(shape=(1, 7), levels=4)
    x = torch.tensor([[[0.0, 0.2499, 0.25, 0.5, 0.74, 0.75, 1.0]]])
    assert made.to_levels(x).tolist() == [[[0, 0, 1, 2, 2, 3, 3]]]
    x = torch.tensor([[[0, 63, 64, 127, 128, 191, 192]]]).byte()
    assert made.to_levels(x).tolist() == [[[0, 0, 1, 1, 2, 2, 3]]]
    assert made.centres.tolist() == [0.125, 0.375, 0.625, 0.875]


@pytest.mark.parametrize("levels", [1, 2, 3, 5, 15, 17, 20, 51])
def test_bytes_and_floats_have_the_same_levels(levels):
    made = dense_machine((16, 16), levels, 2, features=1)
    x = torch.arange(256).byte().view(1, 16, 16)
    found = made.to_levels(x)
    for floats in (x.float() / 255, x.double() / 255):
        assert torch.equal(made.to_levels(floats), found)
    assert torch.equal(made.to_levels(x.numpy()), found)
    assert found.unique().tolist() == list(range(levels))


def test_values_by_hand():
    made = dense_machine((1, 2), 2, 3, features=2, latents=1)
    x = torch.tensor([[[0.1, 0.9]], [[0.9, 0.9]]])
    values = made.encode(x, torch.tensor([2, 0]))
    assert values.tolist() == [
        [1, 0, 0, 1, 0, 0, 0, 0, 1],
        [0, 1, 0, 1, 0, 0, 1, 0, 0],
    ]
    assert made.encode(x)[:, -3:].sum() == 0
    known = made.mask(torch.tensor([[True, False]]), 2)
    assert known.tolist() == [[True, False, False, False]] * 2
    assert made.mask(batch=1, label=True).tolist() == [[True, True, False, True]]


def test_values_are_laid_out_as_tiers_are():
    made = machine_of("tiers")
    x = torch.rand(5, 4, 2)
    coupling = made.machine.coupling
    assert isinstance(coupling, TierCoupling)
    y = torch.tensor([0, 1, 0, 1, 1])
    first, between, last = coupling.to_maps(made.encode(x, y))
    assert torch.equal(first.argmax(1), made.to_levels(x))
    assert (first.sum(1) == 1).all()
    assert (between == 0).all()
    assert torch.equal(last[:, :, 0, 0].argmax(1), y)


def test_the_default_is_the_architecture_of_the_paper():
    found, expected = tier_machine().machine.coupling, paper_architecture()
    assert isinstance(found, TierCoupling)
    assert found.tiers == expected.tiers
    assert found.kernels == expected.kernels


@pytest.mark.parametrize("learn", [False, True])
def test_completion_without_couplings_by_hand(learn):
    made = dense_machine((1, 2), 2, 2, features=1, learn_temperature=learn, dtype=torch.float64)
    next(made.machine.coupling.parameters()).data.zero_()
    made.machine.bias.data = torch.tensor([0.0, math.log(3), 0, math.log(9), 0, 1]).double()
    seen = torch.tensor([[False, True]])
    x = torch.tensor([[[math.nan, 0.2]]])
    if learn:
        assert made.log_temperatures is not None
        made.log_temperatures.data = torch.tensor([2.0, 0.5]).log().double()
    found = made.complete(x, seen, **TIGHT)
    chance = math.sqrt(3) / (1 + math.sqrt(3)) if learn else 0.75
    assert_close(found.levels[0, 0, 0], torch.tensor([1 - chance, chance]).double())
    assert_close(found.levels[0, 0, 1], torch.tensor([1.0, 0.0]).double())
    assert_close(found.images[0, 0, 0].item(), 0.25 * (1 - chance) + 0.75 * chance)
    assert found.images[0, 0, 1] == x[0, 0, 1].double()
    expected = torch.tensor([0.0, 2.0 if learn else 1.0]).double().softmax(0)
    assert_close(found.labels[0], expected)
    assert_close(
        made.complete(x, seen, torch.tensor([1])).labels, torch.tensor([[0.0, 1]]).double()
    )


@pytest.mark.parametrize("kind", ["dense", "tiers"])
def test_completion_keeps_what_is_observed(kind):
    made = machine_of(kind)
    x = torch.randint(256, (7, 4, 2)).byte()
    observed = torch.rand(7, 4, 2) < 0.5
    found = made.complete(x, observed, batch_size=3, **TIGHT)
    assert torch.equal(found.images[observed], (x.double() / 255)[observed])
    expected = (found.levels * made.centres).sum(3)
    assert_close(found.images[~observed], expected[~observed])
    assert_close(found.levels.sum(3), torch.ones(7, 4, 2).double())
    assert_close(found.labels.sum(1), torch.ones(7).double())
    levels = torch.nn.functional.one_hot(made.to_levels(x), 3).double()
    assert torch.equal(found.levels[observed], levels[observed])
    assert found.field.marginals.shape == (7, made.machine.states)
    assert found.field.products > 0
    assert found.field.converged.all()
    assert not found.images.requires_grad

    noise = torch.where(observed, x, 255 - x)
    again = made.complete(noise.numpy(), observed.numpy(), **TIGHT)
    assert_close(again.images, found.images)
    assert_close(made.classify(x, observed, **TIGHT), found.labels)
    one = made.complete(x[2:3], observed[2], **TIGHT)
    assert_close(one.levels[0], found.levels[2])


def test_answers_are_near_to_enumeration():
    made = dense_machine((2, 2), 2, 3, features=6, latents=2, dtype=torch.float64)
    made.machine.bias.data.normal_()
    x, observed = torch.rand(4, 2, 2), torch.rand(4, 2, 2) < 0.4
    known = made.mask(observed, 4)
    core = made.machine
    truth = exact(core.coupling, core.bias, observed=known, values=made.encode(x)).marginals
    found = made.complete(x, observed, **TIGHT)
    assert_close(found.labels, truth[:, -3:], rtol=0, atol=0.1)
    assert_close(found.levels, truth[:, :8].view(4, 2, 2, 2), rtol=0, atol=0.1)
    prior = made.machine.mean_field().marginals[:, -3:]
    assert (prior - truth[:, -3:]).abs().max() > 3 * (found.labels - truth[:, -3:]).abs().max()


def test_temperatures():
    made = machine_of(learn_temperature=True)
    assert made.temperatures.tolist() == [1, 1]
    x, observed = torch.rand(3, 4, 2), torch.rand(3, 4, 2) < 0.5
    before = made.complete(x, observed, **TIGHT)
    assert made.log_temperatures is not None
    made.log_temperatures.data = torch.tensor([0.5, 4.0]).log().double()
    after = made.complete(x, observed, **TIGHT)
    assert_close(after.field.marginals, before.field.marginals)
    expected = (before.levels.log() * 2).softmax(3)
    assert_close(after.levels[~observed], expected[~observed], rtol=0, atol=1e-8)
    assert torch.equal(after.levels[observed], before.levels[observed])
    assert_close(after.labels, (before.labels.log() / 4).softmax(1), rtol=0, atol=1e-8)
    plain = machine_of()
    assert plain.log_temperatures is None
    assert plain.temperatures.tolist() == [1, 1]
    assert_close(
        plain.complete(x, observed).labels, plain.complete(x, observed).field.marginals[:, -2:]
    )


def test_standardise_by_hand():
    made = dense_machine((1, 2), 2, 2, features=2, latents=1, dtype=torch.float64)
    x = torch.tensor([[[0, 255]], [[51, 255]], [[204, 255]]]).byte()
    made.standardise(x, torch.tensor([1, 1, 1]))
    chances = made.machine.bias.view(4, 2).softmax(1)
    expected = torch.tensor([[3, 2], [1, 4], [2.5, 2.5], [1, 4]]).double() / 5
    assert_close(chances.detach(), expected)
    assert_close(made.machine.bias.view(4, 2).sum(1).detach(), torch.zeros(4).double())
    assert_close(made.centres, torch.tensor([0.1, (0.8 + 3) / 4]).double())
    made.standardise(x[:1] * 0)  # nothing is bright: its level stands for what it did
    assert_close(made.centres, torch.tensor([0.0, 0.95]).double())


def test_any_coupling_will_do():
    coupling = FreeCoupling([2, 2, 5, 3])
    made = ImageMachine(BoltzmannMachine(coupling), shape=(2, 1), levels=2, classes=3)
    assert (made.pixels, made.latents) == (2, 1)
    assert made.classify(torch.rand(4, 2, 1)).shape == (4, 3)
    assert made.classify(torch.rand(0, 2, 1)).shape == (0, 3)
    assert made.complete(torch.rand(0, 2, 1), torch.ones(2, 1).bool()).images.shape == (0, 2, 1)


def test_progress_is_shown(capsys):
    made = machine_of()
    made.classify(torch.rand(4, 4, 2), batch_size=2, progress=True)
    assert "2/2" in capsys.readouterr().err
    made.classify(torch.rand(4, 4, 2), batch_size=2)
    assert not capsys.readouterr().err


def test_machines_that_do_not_fit():
    core = BoltzmannMachine(FreeCoupling([2, 2, 5, 3]))
    options = {"shape": (2, 1), "levels": 2, "classes": 3}
    changes = [{"shape": (2, 2)}, {"levels": 3}, {"classes": 2}, {"shape": (3, 1)}]
    for change in changes:
        with pytest.raises(ValueError, match="expected variables that begin with"):
            ImageMachine(core, **{**options, **change})
    with pytest.raises(ValueError, match="expected a positive shape"):
        ImageMachine(core, **{**options, "shape": (0, 1)})
    with pytest.raises(ValueError, match="whole number of times smaller"):
        tier_machine((5, 4), hidden=[(2, 2, 2)])
    with pytest.raises(ValueError, match="latents >= 0"):
        dense_machine((2, 2), 2, 2, features=2, latents=-1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 2, 4), r"shape \(B, 4, 2\), got \(3, 2, 4\)"),
        (torch.rand(4, 2), r"shape \(B, 4, 2\), got \(4, 2\)"),
        (torch.ones(3, 4, 2).long(), "uint8 or floats, got torch.int64"),
        (torch.full((3, 4, 2), 1.5), "images from 0 to 1"),
        (torch.full((3, 4, 2), -0.1), "images from 0 to 1"),
        (torch.full((3, 4, 2), math.nan), "images from 0 to 1"),
    ],
)
def test_images_that_do_not_fit(images, message):
    made = machine_of()
    seen = torch.ones(4, 2).bool()
    for ask in (made.encode, made.classify, lambda x: made.complete(x, seen)):
        with pytest.raises(ValueError, match=message):
            ask(images)


def test_masks_and_labels_that_do_not_fit():
    made, x, seen = machine_of(), torch.rand(3, 4, 2), torch.ones(4, 2).bool()
    for mask in (torch.ones(2, 4).bool(), torch.ones(2, 4, 2).bool(), np.ones(8, dtype=bool)):
        with pytest.raises(ValueError, match="expected observed pixels with shape"):
            made.complete(x, mask)
    with pytest.raises(ValueError, match="boolean mask of observed pixels"):
        made.classify(x, torch.ones(4, 2))
    with pytest.raises(ValueError, match="labels from 0 to 1, got 0 to 2"):
        made.complete(x, seen, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"labels with shape \(3,\), got \(2,\)"):
        made.complete(x, seen, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels that are integers"):
        made.encode(x, torch.rand(3))
    with pytest.raises(ValueError, match="batch_size >= 1"):
        made.classify(x, batch_size=0)


def test_answers_start_from_like_ones():
    machine = dense_machine((3, 3), 2, 2, features=6, dtype=torch.float64)
    x, seen = torch.rand(5, 3, 3).double(), torch.rand(5, 3, 3) < 0.5
    first = machine.complete(x, seen, batch_size=2, tolerance=1e-8)
    again = machine.complete(x, seen, batch_size=2, tolerance=1e-8, initial=first.field)
    assert first.field.steps.max() > 0
    assert again.field.steps.max() == 0
