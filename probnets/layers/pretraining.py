r"""Self-supervised pre-training of backbones."""

__all__ = ["PretrainingResult", "PretrainingSettings", "pretrain"]

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from probnets.backend import checkpoints

from .masked import MaskedImageModel

_FORMAT = 1

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class PretrainingSettings:
    r"""Creates the settings of a pre-training.

    The optimiser is AdamW. Its step grows linearly, then falls along a cosine to zero.

    Arguments:
        epochs: The number of epochs.
        batch_size: The number of images :math:`B` of a batch.
        lr: The largest step size.
        warmup: The share of the training in which it grows.
        weight_decay: The weight decay of matrices and kernels.
        clip: The largest norm of a gradient, to which longer ones are cut.
        seed: The seed of the order of the images, the masks and the augmentation.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(
                "expected no negative epochs and a batch size of 1 or more, got "
                f"{self.epochs} and {self.batch_size}"
            )
        if not (self.lr > 0 and self.clip > 0 and self.weight_decay >= 0 <= self.warmup < 1):
            raise ValueError(
                "expected lr > 0, clip > 0, weight_decay >= 0 and warmup in [0, 1), got "
                f"{self.lr}, {self.clip}, {self.weight_decay} and {self.warmup}"
            )

    def step_size(self, progress: float) -> float:
        r"""Returns the step size after a part, from 0 to 1, of the training."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        fall = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))


@dataclass(frozen=True)
class PretrainingResult:
    r"""Is the outcome of a pre-training.

    Arguments:
        history: The mean loss of each epoch, measured while the weights changed.
    """

    history: list[float]


def pretrain(
    model: MaskedImageModel,
    images: Tensor | np.ndarray,
    settings: PretrainingSettings | None = None,
    *,
    augment: Augment | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> PretrainingResult:
    r"""Learns a backbone from images without labels, by predicting hidden patches.

    The mean and the scale of the backbone's inputs are set to those of the images. The
    backbone is left in evaluation mode.

    A checkpoint is written after each epoch and read if it exists: a training that was
    interrupted continues and ends with the very weights of one that was not, on the same
    machine and number of threads.

    Arguments:
        model: The model, which is learned in place on the device it is on.
        images: The images, with shape :math:`(N, C, H, W)`, of bytes or floats.
        settings: The schedule and the seed.
        augment: Changes a batch, given a generator on the CPU. By default nothing does.
        checkpoint: The file to write after each epoch and to resume from.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the images do not fit, or a checkpoint is of another training.
        FloatingPointError: If the loss is not finite.

    Example:
        >>> from probnets.layers import Backbone
        >>> model = MaskedImageModel(Backbone("C-T", in_channels=1, width=8, stem=2), width=16)
        >>> settings = PretrainingSettings(epochs=2, batch_size=4)
        >>> len(pretrain(model, torch.rand(8, 1, 8, 8), settings, progress=False).history)
        2
    """
    settings = settings or PretrainingSettings()
    data = torch.as_tensor(images if _writable(images) else np.array(images))
    _check(model, data)
    run = _Run(model, data, settings, augment)
    if checkpoint is not None:
        checkpoints.state_arrays(model)  # complains of types that no file can hold
    if checkpoint is not None and Path(checkpoint).exists():
        run.load(checkpoint)
    else:
        model.backbone.standardise(data)

    steps = settings.epochs * run.batches
    done = len(run.history) * run.batches
    with tqdm(total=steps, initial=done, desc="pre-training", disable=not progress) as bar:
        while len(run.history) < settings.epochs:
            run.epoch(bar)
            if checkpoint is not None:
                run.save(checkpoint)
    model.eval()
    return PretrainingResult(run.history)


class _Run:
    r"""Is a pre-training under way."""

    def __init__(
        self,
        model: MaskedImageModel,
        data: Tensor,
        settings: PretrainingSettings,
        augment: Augment | None,
    ) -> None:
        self.model, self.data, self.settings, self.augment = model, data, settings, augment
        self.device = model.backbone.input_mean.device
        self.batches = -(-len(data) // settings.batch_size)
        self.history: list[float] = []
        weights = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))

    def epoch(self, bar: tqdm) -> None:
        r"""Takes one epoch."""
        epoch, settings = len(self.history), self.settings
        seed = np.random.SeedSequence((settings.seed, epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        order = torch.randperm(len(self.data), generator=generator)
        self.model.train()
        total = 0.0
        for b, rows in enumerate(order.split(settings.batch_size)):
            share = (epoch + (b + 0.5) / self.batches) / settings.epochs
            for group in self.optimiser.param_groups:
                group["lr"] = settings.step_size(share)
            x = self.data[rows].to(self.device)
            if self.augment is not None:
                x = self.augment(x, generator)
            loss = self.step(x, generator)
            total += loss * len(rows)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
        self.history.append(total / len(self.data))

    def step(self, x: Tensor, generator: torch.Generator) -> float:
        r"""Takes one step, and returns the loss before it."""
        visible = self.model.draw_masks(x, generator=generator)
        loss = self.model.loss(x, visible)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"expected a finite loss, got {value} in epoch {len(self.history) + 1}; lower lr, "
                "or look for values in the images that are not finite"
            )
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimiser.step()
        return value

    # ------------------------------------------------------------------------------------------

    def facts(self) -> dict:
        r"""Returns what two runs must share for one to continue the other."""
        model = self.model
        return {
            "what": "pre-training",
            "format": _FORMAT,
            "settings": asdict(self.settings),
            "backbone": model.backbone.config,
            "patch": model.patch,
            "mask_ratio": model.mask_ratio,
            "target": model.target,
            "augmented": self.augment is not None,
            "images": checkpoints.digest(self.data.numpy(force=True)),
        }

    def save(self, path: str | Path) -> None:
        r"""Writes a checkpoint."""
        facts = {**self.facts(), "history": self.history}
        checkpoints.write_training(path, self.model, self.optimiser, facts)

    def load(self, path: str | Path) -> None:
        r"""Reads a checkpoint."""
        found = checkpoints.read_training(path, self.model, self.optimiser, self.facts())
        self.history = [float(loss) for loss in found["history"]]


def _writable(images: Tensor | np.ndarray) -> bool:
    r"""Tells whether PyTorch can share the memory of images without a warning."""
    return isinstance(images, Tensor) or images.flags.writeable


def _check(model: MaskedImageModel, data: Tensor) -> None:
    channels = model.backbone.in_channels
    if data.ndim != 4 or data.shape[1] != channels or not len(data):
        raise ValueError(
            f"expected images with shape (N, {channels}, H, W), got {tuple(data.shape)}"
        )
    if not (data.is_floating_point() or data.dtype == torch.uint8):
        raise ValueError(f"expected images of uint8 or floats, got {data.dtype}")
    if data.is_floating_point() and not bool(data.isfinite().all()):
        raise ValueError("expected finite images, got NaN or infinity")
    model.draw_masks(data[:1], generator=torch.Generator())
