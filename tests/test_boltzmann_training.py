r"""Tests of the training of image machines."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from probnets.backend import checkpoints
from probnets.boltzmann import training
from probnets.boltzmann.images import dense_machine, tier_machine
from probnets.boltzmann.training import (
    Epoch,
    Scores,
    TrainingSettings,
    batch_loss,
    draw_masks,
    evaluate,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = TrainingSettings(epochs=3, batch_size=10, lr=0.05)
EXACT = TrainingSettings(tolerance=1e-12, adjoint_tolerance=1e-12, label_weight=0.3)
OBJECTIVES = ["marginals", "free_energy"]


def stripes(count, *, seed=0, phases=1):
    r"""Draws images of stripes one pixel wide, which are horizontal (0) or vertical (1)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    start = torch.randint(phases, (count, 1, 1), generator=generator)
    x = ((torch.arange(4) + start) % 2).expand(count, 4, 4)
    x = torch.where(labels[:, None, None] == 1, x, x.transpose(1, 2))
    return 255 * x.byte(), labels


IMAGES, LABELS = stripes(24)  # in batches of 10, 10 and 4


def machine_of(kind="dense", *, seed=0, **options):
    options = {"generator": torch.Generator().manual_seed(seed), **options}
    if kind == "tiers":
        return tier_machine((4, 4), 2, 2, hidden=[(2, 4, 2)], **options)
    return dense_machine((4, 4), 2, 2, **{"features": 20, "latents": 3, **options})


def learn(machine, data: Any = (IMAGES, LABELS), settings=SHORT, **options):
    images, labels = data
    return train(machine, images, labels, settings, progress=False, **options)


def state(machine):
    return {name: tensor.clone() for name, tensor in machine.state_dict().items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def interrupt(patch, epoch):
    r"""Breaks training off within an epoch."""
    calls, step = [], training._Run.step

    def spy(self, *args):
        calls.append(0)
        if len(calls) == 3 * epoch + 2:
            raise KeyboardInterrupt
        return step(self, *args)

    patch.setattr(training._Run, "step", spy)


# Masks


def test_masks_by_hand():
    settings = TrainingSettings(observed=0.3)
    seen = draw_masks((10, 20), 50, settings)
    assert seen.shape == (50, 10, 20)
    assert seen.double().mean() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 10_000))
    assert draw_masks((2, 2), 3, TrainingSettings(observed=1.0)).all()
    assert not draw_masks((2, 2), 3, TrainingSettings(observed=0.0)).any()


def test_the_share_of_each_image_is_drawn_from_the_range():
    seen = draw_masks((50, 50), 400, TrainingSettings(observed=(0.2, 0.6)))
    shares = seen.double().mean(dim=(1, 2))
    assert 0.15 < shares.min() < 0.25
    assert 0.55 < shares.max() < 0.65
    assert shares.mean() == pytest.approx(0.4, abs=5 * 0.4 / math.sqrt(12 * 400))


def test_patches_are_hidden_at_random_places():
    settings = TrainingSettings(patch_share=1.0, patch_size=3)
    hidden = ~draw_masks((5, 9), 500, settings)
    rows, columns = hidden.any(2), hidden.any(1)
    assert (hidden == rows[:, :, None] & columns[:, None]).all()
    for line, size in ((rows, 5), (columns, 9)):
        assert (line.sum(1) == 3).all()
        places = line.double().argmax(1)
        assert places.unique().tolist() == list(range(size - 2))
        assert ((line.long().diff(dim=1) == 1).sum(1) <= 1).all()  # in one piece
    assert not draw_masks((3, 2), 4, settings).any()  # patches that are larger than images

    some = replace(settings, patch_share=0.5, observed=0.0)
    whole = (~draw_masks((5, 9), 1000, some)).all(dim=(1, 2)).double().mean()
    assert whole == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(1000))


# Losses


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_without_couplings_by_hand(objective):
    machine = dense_machine((1, 2), 2, 2, features=1, dtype=torch.float64)
    next(machine.machine.coupling.parameters()).data.zero_()
    machine.machine.bias.data = torch.tensor([0.0, math.log(3), 0, math.log(9), 0, 0]).double()
    x, y = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]]), torch.tensor([0, 1])
    seen = torch.tensor([[[False, False]], [[True, False]]])
    settings = replace(EXACT, objective=objective)
    found = batch_loss(machine, x, y, seen, settings)
    pixel = -(math.log(1 / 4) + 2 * math.log(9 / 10)) / 3
    assert found.loss.item() == pytest.approx(0.7 * pixel + 0.3 * math.log(2))
    assert found.scores == pytest.approx(Scores(pixel, math.log(2), 0.5, 0.0))
    assert found.hidden == 3
    assert found.field.marginals.shape == (2, 6)


@pytest.mark.parametrize("kind", ["dense", "tiers"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(objective, kind):
    machine = machine_of(kind, dtype=torch.float64, learn_temperature=objective == "marginals")
    machine.machine.bias.data.normal_()
    seen = torch.rand(4, 4, 4) < 0.4
    settings = replace(EXACT, objective=objective)

    def loss():
        return batch_loss(machine, IMAGES[:4], LABELS[:4], seen, settings).loss

    loss().backward()
    for name, weight in machine.named_parameters():
        assert weight.grad is not None, name
        places = {int(weight.grad.abs().argmax()), weight.numel() // 2 * (kind == "dense")}
        for place in places:
            slopes = []
            with torch.no_grad():
                for side in (1e-4, -1e-4):
                    weight.view(-1)[place] += side
                    slopes.append(loss().item())
                    weight.view(-1)[place] -= side
            expected = (slopes[0] - slopes[1]) / 2e-4
            found = weight.grad.view(-1)[place].item()
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-8), name
        assert weight.grad.abs().max() > 1e-4, name


def test_what_is_observed_does_not_count():
    machine = machine_of(dtype=torch.float64)
    seen = torch.ones(4, 4).bool()
    for objective in OBJECTIVES:
        settings = replace(EXACT, objective=objective)
        found = batch_loss(machine, IMAGES, LABELS, seen, settings)
        assert (found.scores.pixel_nll, found.hidden) == (0, 0)
        log_p = machine.classify(IMAGES, tolerance=1e-12).log()
        expected = -log_p.gather(1, LABELS[:, None]).mean()
        if objective == "marginals":
            assert found.loss.item() == pytest.approx(0.3 * expected.item(), rel=1e-6)
        found.loss.backward()  # nothing to divide by is no reason for NaN
        assert all(p.grad is None or p.grad.isfinite().all() for p in machine.parameters())


# Learning


@pytest.fixture(scope="module")
def trained():
    r"""Trains on four patterns, of which no pixel tells the label: latent variables must."""
    torch.set_num_threads(1)
    machine = machine_of(features=30, latents=6, seed=1)
    settings = TrainingSettings(epochs=15, batch_size=20, lr=0.06)
    data, held = stripes(120, phases=2), stripes(60, seed=1, phases=2)
    return machine, learn(machine, data, settings, validation=held).history, settings


def test_it_learns(trained):
    machine, history, settings = trained
    assert len(history) == 15
    first, last = history[0], history[-1]
    assert last.loss < 0.6 * first.loss
    assert last.training.accuracy > 0.9
    assert last.validation.accuracy > 0.9
    assert last.validation.pixel_nll < 0.4
    assert last.unconverged == 0
    assert 1 < last.products < 100
    held = stripes(60, seed=1, phases=2)
    assert evaluate(machine, *held, settings) == last.validation
    assert (machine.classify(held[0]).argmax(1) == held[1]).double().mean() > 0.9
    less = evaluate(machine, *held, replace(settings, observed=0.1))
    assert less.pixel_nll > last.validation.pixel_nll


def test_it_completes(trained):
    machine = trained[0]
    x, y = stripes(40, seed=2, phases=2)
    observed = torch.zeros(4, 4).bool()
    observed[:2, :2] = True  # which tells the stripes apart
    found = machine.complete(x, observed)
    right = (found.images > 0.5) == (x > 127)
    assert right.double().mean() > 0.9
    assert torch.equal(found.images[:, observed], x[:, observed] / 255)
    assert (found.labels.argmax(1) == y).double().mean() > 0.9


@pytest.mark.parametrize(("kind", "objective"), [("dense", "free_energy"), ("tiers", "marginals")])
def test_it_learns_otherwise(kind, objective):
    machine = machine_of(kind)
    settings = replace(SHORT, epochs=8, batch_size=20, lr=0.1, objective=objective)
    history = learn(machine, stripes(60), settings).history
    assert history[-1].loss < 0.6 * history[0].loss
    x, y = stripes(40, seed=1)
    seen = draw_masks((4, 4), 40, settings)
    assert (machine.classify(x, seen).argmax(1) == y).double().mean() > 0.9
    right = (machine.complete(x, seen).images > 0.5) == (x > 127)
    assert right.double().mean() > 0.85


def test_temperatures_are_learned():
    machine = machine_of(learn_temperature=True)
    learn(machine)
    assert (machine.temperatures - 1).abs().min() > 1e-3


def test_biases_begin_with_frequencies_but_once():
    machine, other = machine_of(), machine_of()
    other.standardise(IMAGES, LABELS)
    learn(machine, settings=replace(SHORT, epochs=0))
    assert same(state(machine), state(other))
    machine.machine.bias.data[0] += 1
    before = state(machine)
    learn(machine, settings=replace(SHORT, epochs=0))
    assert same(state(machine), before)


def test_steps_by_hand():
    settings = TrainingSettings(lr=2.0, warmup=0.2)
    expected = {0: 0, 0.05: 0.5, 0.1: 1, 0.2: 2, 0.4: 2 * 0.853553, 0.6: 1, 1: 0, 1.5: 0}
    for progress, step in expected.items():
        assert settings.step_size(progress) == pytest.approx(step, rel=1e-6, abs=1e-12)


def test_the_seed_decides():
    runs = [machine_of() for _ in range(3)]
    for machine, seed in zip(runs, (0, 0, 1), strict=True):
        learn(machine, settings=replace(SHORT, epochs=1, seed=seed))
    assert same(state(runs[0]), state(runs[1]))
    assert not same(state(runs[0]), state(runs[2]))


def test_masks_and_order_change_with_the_epoch(monkeypatch):
    seen = []

    def spy(self, x, y, observed):
        seen.append((x, observed))
        return step(self, x, y, observed)

    step = training._Run.step
    monkeypatch.setattr(training._Run, "step", spy)
    learn(machine_of(), settings=replace(SHORT, epochs=2))
    (x, masks), (y, others) = seen[0], seen[3]
    assert not torch.equal(x, y)
    assert not torch.equal(masks, others)


# Checkpoints


@pytest.mark.parametrize(("kind", "epoch"), [("dense", 0), ("dense", 1), ("tiers", 2)])
def test_resuming_changes_nothing(tmp_path, monkeypatch, kind, epoch):
    settings = replace(SHORT, observed=(0.2, 0.6), patch_share=0.3, patch_size=2)
    held = stripes(10, seed=1)
    whole = machine_of(kind)
    expected = learn(whole, settings=settings, validation=held)
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        interrupt(patch, epoch)
        with pytest.raises(KeyboardInterrupt):
            learn(machine_of(kind), settings=settings, validation=held, checkpoint=path)
    assert path.exists() == (epoch > 0)
    again = machine_of(kind, seed=int(epoch > 0))  # whose weights are read, if there are any
    result = learn(again, settings=settings, validation=held, checkpoint=path)
    assert result == expected
    assert isinstance(result.history[0], Epoch)
    assert isinstance(result.history[0].validation, Scores)
    assert same(state(again), state(whole))
    assert learn(machine_of(kind), settings=settings, validation=held, checkpoint=path) == expected


def test_a_field_network_is_trained_and_resumed(tmp_path):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 40)
            nn.init.zeros_(self.layer.weight)

        def forward(self, values: Tensor, observed: Tensor):
            return self.layer(values[:, :32])

    path = tmp_path / "run.safetensors"
    torch.manual_seed(0)
    machines = [machine_of() for _ in range(2)]
    for machine in machines:
        machine.machine.field = Field()
    first, second = machines
    learn(first, checkpoint=path)
    assert learn(second, checkpoint=path).history
    assert same(state(first), state(second))
    assert first.machine.field.layer.weight.any()  # type: ignore[union-attr]


def test_checkpoints_of_others(tmp_path):
    path = tmp_path / "run.safetensors"
    learn(machine_of(), checkpoint=path)
    for key, change in {
        "settings": {"settings": replace(SHORT, lr=0.1)},
        "images": {"data": stripes(24, seed=5)},
        "validation": {"validation": stripes(3)},
    }.items():
        with pytest.raises(ValueError, match=f"of the same {key}"):
            learn(machine_of(), **{"checkpoint": path, **change})
    with pytest.raises(ValueError, match="of the same coupling"):
        learn(machine_of(margin=0.2), checkpoint=path)
    with pytest.raises(ValueError, match="of the same weights"):
        learn(machine_of(latents=4), checkpoint=path)
    checkpoints.write(path, {}, {"what": "pre-training", "format": 1})
    with pytest.raises(ValueError, match="expected a training of a Boltzmann machine"):
        learn(machine_of(), checkpoint=path)


# Bad input


def test_losses_that_are_not_finite():
    machine = machine_of(learn_temperature=True)
    machine.log_temperatures.data.fill_(math.nan)  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match="finite loss, got nan in epoch 1; lower lr"):
        learn(machine)


def test_gradients_that_are_not_finite():
    machine = machine_of()
    machine.machine.bias.register_hook(lambda g: g * math.inf)
    weight = next(machine.machine.coupling.parameters())
    before = weight.clone()
    with pytest.raises(FloatingPointError, match=r"finite gradient, got (nan|inf) in epoch 1"):
        learn(machine)
    assert torch.equal(weight, before)


def test_data_that_do_not_fit():
    for images, labels, message in [
        (IMAGES[:, :3], LABELS, r"shape \(B, 4, 4\)"),
        (IMAGES.float(), LABELS, "from 0 to 1"),
        (IMAGES, LABELS[:3], r"labels with shape \(24,\)"),
        (IMAGES, LABELS + 1, "labels from 0 to 1"),
        (IMAGES, LABELS.float(), "integers"),
        (IMAGES[:0], LABELS[:0], "one image or more"),
    ]:
        for call in (learn, lambda m, data: learn(m, validation=data)):
            with pytest.raises(ValueError, match=message):
                call(machine_of(), (images, labels))
        with pytest.raises(ValueError, match=message):
            evaluate(machine_of(), images, labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "no negative epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr > 0"),
        ({"warmup": 1.0}, "warmup in"),
        ({"clip": math.nan}, "clip > 0"),
        ({"tolerance": 0.0}, "positive tolerances"),
        ({"observed": 1.1}, "share of observed pixels"),
        ({"observed": (0.5, 0.4)}, "share of observed pixels"),
        ({"observed": (0.5,)}, "range of two"),
        ({"label_weight": -0.1}, "label_weight"),
        ({"patch_share": 2.0}, "patch_share"),
        ({"objective": "likelihood"}, "objective 'marginals' or 'free_energy'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**settings)


def test_progress_is_shown(capsys):
    train(machine_of(), IMAGES, LABELS, replace(SHORT, epochs=1))
    assert "3/3" in capsys.readouterr().err
    learn(machine_of(), settings=replace(SHORT, epochs=1))
    assert not capsys.readouterr().err


def test_warmed_up_weights_move_by_the_step():
    # The first step of Adam is the step size times the sign of the gradient.
    machine = machine_of()
    machine.standardise(IMAGES, LABELS)
    before = state(machine)
    settings = TrainingSettings(epochs=1, batch_size=99, lr=0.01, warmup=0.0)
    learn(machine, settings=settings)
    moved = (machine.machine.bias - before["machine.bias"]).abs()
    assert_close(moved.max().item(), 0.005, rtol=1e-3, atol=0)  # half of it is over
