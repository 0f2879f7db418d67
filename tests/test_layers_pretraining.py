r"""Tests for the self-supervised pre-training of backbones."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from probnets.backend import checkpoints
from probnets.layers import Backbone, MaskedImageModel, PretrainingSettings, pretrain
from probnets.layers.decoders import MapDecoder

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = PretrainingSettings(epochs=4, batch_size=12, lr=3e-3)


def stripes(count, *, seed=0):
    r"""Draws images of horizontal or vertical stripes two pixels wide."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(4, (count, 1, 1), generator=generator)
    upright = torch.rand(count, 1, 1, generator=generator) < 0.5
    x = ((torch.arange(8) + start) // 2 % 2).expand(count, 8, 8)
    return 255 * torch.where(upright, x, x.transpose(1, 2)).byte()[:, None]


IMAGES = stripes(30)  # in batches of 12, 12 and 6


def model_of(layout="C-T", *, seed=0, stem=1, norm=None, blocks=None, **options):
    backbone = Backbone(
        layout,
        in_channels=1,
        width=8,
        stem=stem,
        norm=norm,
        options=blocks,
        generator=torch.Generator().manual_seed(seed),
    )
    generator = torch.Generator().manual_seed(seed + 1)
    return MaskedImageModel(backbone, **{"width": 16, "generator": generator, **options})


def learn(model, images: Tensor | np.ndarray = IMAGES, settings=SHORT, **options):
    return pretrain(model, images, settings, progress=False, **options)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def noisy(x, generator):
    return x.float() + torch.randn(x.shape, generator=generator)


def interrupted(epoch):
    r"""Changes batches as ``noisy`` does, and breaks off within an epoch."""
    calls = 0

    def augment(x, generator):
        nonlocal calls
        calls += 1
        if calls == 3 * epoch + 2:
            raise KeyboardInterrupt
        return noisy(x, generator)

    return augment


# Steps


def test_steps_by_hand():
    settings = PretrainingSettings(lr=2.0, warmup=0.2)
    expected = {0: 0, 0.05: 0.5, 0.1: 1, 0.2: 2, 0.4: 2 * 0.853553, 0.6: 1, 1: 0, 1.5: 0}
    for progress, step in expected.items():
        assert settings.step_size(progress) == pytest.approx(step, rel=1e-6, abs=1e-12)
    assert PretrainingSettings(lr=2.0, warmup=0.0).step_size(0.0) == 2


def test_one_step_by_hand():
    # The first step of Adam is the step size times the sign of the gradient, plus decay.
    settings = PretrainingSettings(epochs=1, batch_size=99, lr=0.01, warmup=0.0, weight_decay=0.5)
    model = model_of()
    before = dict(state(model))
    learn(model, settings=settings)
    step = 0.01 * 0.5  # half of the training is over in the middle of its only batch
    decay = 0
    for name, parameter in model.named_parameters():
        kept = 1 - step * 0.5 if parameter.ndim > 1 else 1
        moved = (parameter - kept * before[name]).abs()
        assert moved.max() <= step * 1.001, name
        assert moved.median() > 0.9 * step, name
        decay += parameter.ndim > 1
    assert 0 < decay < len(list(model.parameters()))


def test_long_gradients_are_cut():
    norms, model = [], model_of()
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        grads = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack(grads).sum().sqrt().item())
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        learn(model, settings=PretrainingSettings(epochs=1, batch_size=5, clip=1e-2))
    assert len(norms) == 6
    assert_close(torch.tensor(norms), torch.full((6,), 1e-2), rtol=1e-3, atol=0)


# Learning


@pytest.mark.parametrize("target", ["patch", "image"])
def test_loss_falls(target):
    model = model_of(target=target, mask_ratio=0.5)
    settings = PretrainingSettings(epochs=15, batch_size=16, lr=1e-2)
    history = learn(model, stripes(64), settings).history
    assert len(history) == 15
    assert history[0] > 0.4
    assert history[-1] < 0.1 * history[0]

    new = stripes(32, seed=1)
    with torch.no_grad():
        visible = model.draw_masks(new)
        assert model.loss(new, visible) < 0.1 * model_of(target=target).loss(new, visible)


@pytest.mark.parametrize("layout", ["T", "K", "NR-T"])
def test_loss_falls_with_other_layouts(layout):
    model = model_of(layout, stem=2)
    history = learn(model, settings=PretrainingSettings(epochs=15, batch_size=10, lr=1e-2)).history
    assert history[-1] < 0.7 * history[0]


def test_history_is_the_mean_loss_of_images():
    # Without steps worth their name, losses are those of the first weights.
    model, start = model_of(), model_of()
    settings = PretrainingSettings(epochs=2, batch_size=12, lr=1e-12, weight_decay=0.0)
    history = learn(model, settings=settings).history
    start.backbone.standardise(IMAGES)
    for epoch, found in enumerate(history):
        seed = np.random.SeedSequence((0, epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        total = 0.0
        for rows in torch.randperm(30, generator=generator).split(12):
            x = IMAGES[rows]
            visible = start.draw_masks(x, generator=generator)
            total += start.loss(x, visible).item() * len(rows)
        assert found == pytest.approx(total / 30, rel=1e-5)


def test_backbone_is_standardised_and_left_in_evaluation():
    x = stripes(24).float() * torch.linspace(0, 3, 24)[:, None, None, None]
    for epochs in (0, 1):
        model = model_of().train()
        result = learn(model, x, PretrainingSettings(epochs=epochs, batch_size=8))
        assert len(result.history) == epochs
        assert not any(module.training for module in model.modules())
        assert_close(model.backbone.input_mean, x.mean()[None])
        assert_close(model.backbone.input_std, x.std(correction=0)[None])


def test_no_epochs_change_no_weights():
    model, before = model_of(), dict(model_of().named_parameters())
    assert learn(model, settings=PretrainingSettings(epochs=0)).history == []
    assert same(dict(model.named_parameters()), before)


def test_frozen_weights_stay():
    model = model_of()
    model.backbone.reducers.requires_grad_(requires_grad=False)
    before = state(model)
    learn(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize(
    "kwargs",
    [{"blocks": {"C": {"norm": "batch"}}}, {"layout": "CR-N", "norm": "rep_batch"}],
    ids=["some", "all"],
)
def test_batch_norms_learn(kwargs, tmp_path):
    model, file = model_of(**kwargs), tmp_path / "checkpoint"
    settings = PretrainingSettings(epochs=10, batch_size=10, lr=1e-2)
    history = learn(model, settings=settings, checkpoint=file).history
    assert history[-1] < 0.7 * history[0]
    counts = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {30}

    again = model_of(**kwargs, seed=7)
    learn(again, settings=settings, checkpoint=file)  # reads what is finished
    assert same(state(again), state(model))


# The same twice


def test_seeds_decide():
    results = []
    for seed in (1, 1, 2):
        torch.randn(3)  # the global state is another
        model = model_of()
        settings = PretrainingSettings(epochs=2, batch_size=12, seed=seed)
        results.append((learn(model, settings=settings, augment=noisy).history, state(model)))
    assert results[0][0] == results[1][0] != results[2][0]
    assert same(results[0][1], results[1][1])
    assert not same(results[0][1], results[2][1])


def test_global_state_of_randomness_stays():
    before = torch.get_rng_state()
    model = model_of()
    torch.set_rng_state(before)
    learn(model, augment=noisy)
    assert torch.equal(torch.get_rng_state(), before)


def test_bytes_floats_and_arrays_are_alike():
    states = []
    for kind in (Tensor.byte, Tensor.float, Tensor.double, Tensor.numpy):
        images = kind(IMAGES.clone())
        model = model_of()
        learn(model, images)
        states.append(state(model))
        assert torch.equal(torch.as_tensor(images).byte(), IMAGES)
    assert all(same(states[0], other) for other in states[1:])


def test_augmentation_is_given_each_batch():
    seen = []

    def augment(x, generator):
        assert generator.device.type == "cpu"
        seen.append((x.clone(), torch.rand(1, generator=generator).item()))
        return x.float().zero_()

    x = IMAGES.clone()
    learn(model_of(), x, augment=augment)
    assert [len(batch) for batch, _ in seen] == 4 * [12, 12, 6]
    assert len({draw for _, draw in seen}) == 12
    for epoch in range(4):  # each sees every image once, in another order
        batch = torch.cat([batch for batch, _ in seen[3 * epoch : 3 * epoch + 3]])
        assert sorted(batch.flatten(1).tolist()) == sorted(x.flatten(1).tolist())
    assert not torch.equal(seen[0][0], seen[3][0])
    assert torch.equal(x, IMAGES)


def test_augmentation_counts():
    first, second = model_of(), model_of()
    learn(first)
    learn(second, augment=lambda x, _: x.flip(3))
    assert not same(state(first), state(second))
    learn(third := model_of(), augment=lambda x, _: x)
    assert same(state(first), state(third))


# Checkpoints


@pytest.mark.parametrize("layout", ["C-T", "T"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_interrupted_training_ends_with_the_same_bits(tmp_path, layout, epoch):
    whole, parted = model_of(layout, stem=2), model_of(layout, stem=2)
    history = learn(whole, augment=noisy, checkpoint=tmp_path / "whole").history

    with pytest.raises(KeyboardInterrupt):
        learn(parted, augment=interrupted(epoch), checkpoint=tmp_path / "parted")
    _, facts = checkpoints.read(tmp_path / "parted")
    assert facts["history"] == history[:epoch]

    resumed = model_of(layout, stem=2, seed=5)  # its own weights are replaced
    assert learn(resumed, augment=noisy, checkpoint=tmp_path / "parted").history == history
    assert same(state(resumed), state(whole))
    # The moments of the optimiser are in the files.
    assert (tmp_path / "parted").read_bytes() == (tmp_path / "whole").read_bytes()
    plain = model_of(layout, stem=2)
    assert learn(plain, augment=noisy).history == history
    assert same(state(plain), state(whole))


def test_moments_are_resumed(tmp_path):
    # With moments that start anew, the weights would be others.
    file = tmp_path / "file"
    with pytest.raises(KeyboardInterrupt):
        learn(model_of(), augment=interrupted(2), checkpoint=file)
    arrays, facts = checkpoints.read(file)
    own = checkpoints.part(arrays, "adam")
    assert {name.partition(".")[2] for name in own} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(own) == 3 * len(list(model_of().parameters()))

    models = []
    for scale in (1, 2):
        changed = {k: v * scale if k.endswith("exp_avg") else v for k, v in arrays.items()}
        checkpoints.write(file, changed, facts)
        learn(model := model_of(), augment=noisy, checkpoint=file)
        models.append(state(model))
    assert not same(*models)


def test_finished_training_is_read(tmp_path):
    file = tmp_path / "file"
    learn(model := model_of(), checkpoint=file)
    before = file.read_bytes()
    again = model_of(seed=3).train()
    learn(again, checkpoint=str(file))
    assert same(state(again), state(model))
    assert not again.training
    assert file.read_bytes() == before


OTHERS = {
    "settings": {"settings": PretrainingSettings(epochs=4, batch_size=12, lr=2e-3)},
    "images": {"images": IMAGES.flip(0)},
    "images ": {"images": IMAGES.float()},
    "backbone": {"model": lambda: model_of("T-C")},
    "backbone ": {"model": lambda: model_of("C-T", norm="layer")},
    "patch": {"model": lambda: model_of(patch=4)},
    "mask_ratio": {"model": lambda: model_of(mask_ratio=0.5)},
    "target": {"model": lambda: model_of(target="image")},
    "augmented": {"augment": noisy},
}


@pytest.mark.parametrize("key", OTHERS)
def test_checkpoint_of_another_training(tmp_path, key):
    file = tmp_path / "file"
    learn(model_of(), checkpoint=file)
    content = file.read_bytes()

    other = {"images": IMAGES, "settings": SHORT, **OTHERS[key]}
    model = other.pop("model", model_of)().train()
    before = state(model)
    with pytest.raises(
        ValueError, match=f"expected a checkpoint in .* of the same {key.strip()}, .*, got .*;"
    ):
        learn(model, checkpoint=file, **other)
    assert same(state(model), before)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (lambda: None, "expected decoder.* of torch.float32 .*, got torch.float32"),
        (lambda: MapDecoder([16], 2, 1, width=16), "expected the weights of this model in"),
    ],
    ids=["wider", "shallower"],
)
def test_checkpoint_of_another_decoder(tmp_path, decoder, message):
    file = tmp_path / "file"
    learn(model_of(), checkpoint=file)
    model = model_of(width=32, decoder=decoder())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        learn(model, checkpoint=file)
    assert same(state(model), before)


def test_other_files_are_no_checkpoints(tmp_path):
    file = tmp_path / "file"
    checkpoints.write(file, {}, {"what": "backbone", "format": 1})
    with pytest.raises(ValueError, match=r"expected a pre-training in .*, got 'backbone'"):
        learn(model_of(), checkpoint=file)


# Errors


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_are_not_finite(value):
    x = IMAGES.float()
    x[3, 0, 2, 1] = value
    model = model_of().train()
    before = state(model)
    with pytest.raises(ValueError, match="expected finite images, got NaN or infinity"):
        learn(model, x)
    assert same(state(model), before)


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (4, 3, 8, 8), (4, 8, 8), (2, 4, 1, 8, 8)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"expected images with shape \(N, 1, H, W\), got \("):
        learn(model_of(), torch.zeros(shape))


def test_images_of_another_size():
    with pytest.raises(ValueError, match=r"sides are multiples of 2, .* got 8x7; pad or crop"):
        learn(model_of(), torch.zeros(4, 1, 8, 7))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8])
def test_images_of_another_type(dtype):
    with pytest.raises(ValueError, match=f"expected images of uint8 or floats, got {dtype}"):
        learn(model_of(), IMAGES.to(dtype))


def test_steps_too_large():
    settings = PretrainingSettings(epochs=9, batch_size=30, lr=1e30)
    with pytest.raises(
        FloatingPointError, match=r"expected a finite loss, got .* epoch \d; lower"
    ):
        learn(model_of(), settings=settings)


def test_augmentation_that_gives_nan():
    with pytest.raises(FloatingPointError, match="expected a finite loss, got nan in epoch 1;"):
        learn(model_of(), augment=lambda x, _: x * torch.nan)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": 0.0},
        {"lr": math.nan},
        {"clip": 0.0},
        {"weight_decay": -1.0},
        {"warmup": 1.0},
        {"warmup": -0.1},
    ],
    ids=str,
)
def test_wrong_steps(bad):
    with pytest.raises(
        ValueError, match="expected lr > 0, clip > 0, weight_decay >= 0 and warmup"
    ):
        PretrainingSettings(**bad)


@pytest.mark.parametrize("bad", [{"epochs": -1}, {"batch_size": 0}], ids=str)
def test_wrong_counts(bad):
    with pytest.raises(ValueError, match="expected no negative epochs and a batch size of 1"):
        PretrainingSettings(**bad)


def test_progress_bar(capsys):
    pretrain(model_of(), IMAGES, SHORT)
    assert "pre-training: 100%" in capsys.readouterr().err
    learn(model_of())
    assert capsys.readouterr().err == ""
