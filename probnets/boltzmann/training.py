r"""Training of image machines, by conditional marginals or by free energies."""

__all__ = [
    "Batch",
    "Epoch",
    "Scores",
    "TrainingResult",
    "TrainingSettings",
    "batch_loss",
    "draw_masks",
    "evaluate",
    "train",
]

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from probnets.backend import checkpoints

from .images import ImageMachine
from .machine import Options
from .meanfield import MeanField

_FORMAT = 1

Images = Tensor | np.ndarray


@dataclass(frozen=True)
class TrainingSettings:
    r"""Creates the settings of a training.

    Of each image random pixels are observed, and the label never is. The objective
    ``"marginals"`` is the cross-entropy of what is hidden, under its marginals given what is
    observed, with implicit gradients:

    .. math:: L = (1 - w) \, \frac{1}{|h|} \sum_{i \in h} -\log q_i(x_i) - w \log q_y(y)

    The objective ``"free_energy"`` replaces log-likelihoods by differences of least free
    energies, which need no linear systems for gradients:

    .. math:: L = \frac{1 - w}{|h|} \Big( F^*(x_o, y, x_h) - F^*(x_o, y) \Big)
        + w \Big( F^*(x_o, y) - F^*(x_o) \Big)

    The second stands in for :math:`-\log p(y \mid x_o)`, and the first for
    :math:`-\log p(x_h \mid x_o, y)`, the joint one of all hidden pixels. Both are at least
    zero; see :meth:`BoltzmannMachine.free_energy_difference` for what they bound. Temperatures
    are learned by the first objective alone. In both, :math:`|h|` is the mean number of hidden
    pixels in a batch.

    The optimiser is Adam. Its step grows linearly, then falls along a cosine to zero.

    Arguments:
        epochs: The number of epochs.
        batch_size: The number of images of a batch.
        lr: The largest step size.
        warmup: The share of the training in which it grows.
        clip: The largest norm of a gradient, to which longer ones are cut.
        observed: The share of pixels that are observed, or the range from which it is drawn for
            each image.
        label_weight: The weight :math:`w` of the label.
        patch_share: The share of images of which, instead of random pixels, one square patch at
            a random place is hidden.
        patch_size: The width of the patch in pixels.
        objective: The objective.
        tolerance: The largest distance of marginals from the solution.
        adjoint_tolerance: The largest relative residual of the linear system for gradients.
        max_steps: The largest number of steps of the solver.
        seed: The seed of the order of the images and of the masks.
    """

    epochs: int = 10
    batch_size: int = 100
    lr: float = 2e-3
    warmup: float = 0.05
    clip: float = 1.0
    observed: float | tuple[float, float] = 0.4
    label_weight: float = 0.5
    patch_share: float = 0.0
    patch_size: int = 14
    objective: Literal["marginals", "free_energy"] = "marginals"
    tolerance: float = 1e-2
    adjoint_tolerance: float = 1e-3
    max_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or self.patch_size < 1 or self.max_steps < 1:
            raise ValueError(
                "expected no negative epochs, and batch_size, patch_size and max_steps of 1 or "
                f"more, got {self.epochs}, {self.batch_size}, {self.patch_size} and "
                f"{self.max_steps}"
            )
        if not (self.lr > 0 and self.clip > 0 and 0 <= self.warmup < 1):
            raise ValueError(
                "expected lr > 0, clip > 0 and warmup in [0, 1), got "
                f"{self.lr}, {self.clip} and {self.warmup}"
            )
        if not (self.tolerance > 0 and self.adjoint_tolerance > 0):
            raise ValueError(
                f"expected positive tolerances, got {self.tolerance} and {self.adjoint_tolerance}"
            )
        low, high = self.range
        if not 0 <= low <= high <= 1:
            raise ValueError(
                "expected a share of observed pixels, or a range of shares, in [0, 1], got "
                f"{self.observed}"
            )
        if not (0 <= self.label_weight <= 1 and 0 <= self.patch_share <= 1):
            raise ValueError(
                "expected label_weight and patch_share in [0, 1], got "
                f"{self.label_weight} and {self.patch_share}"
            )
        if self.objective not in ("marginals", "free_energy"):
            raise ValueError(
                f"expected objective 'marginals' or 'free_energy', got {self.objective!r}"
            )

    @property
    def range(self) -> tuple[float, float]:
        r"""The smallest and the largest share of observed pixels."""
        if isinstance(self.observed, (tuple, list)):
            if len(self.observed) != 2:
                raise ValueError(f"expected observed as a range of two, got {self.observed}")
            return self.observed[0], self.observed[1]
        return self.observed, self.observed

    def step_size(self, progress: float) -> float:
        r"""Returns the step size after a part, from 0 to 1, of the training."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        fall = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))


class Scores(NamedTuple):
    r"""Is how well hidden pixels and labels are predicted.

    Attributes:
        pixel_nll: The mean negative log-probability of a hidden pixel, zero without any.
        label_nll: The mean negative log-probability of a label.
        accuracy: The share of labels that are predicted.
        unconverged: The share of images whose mean field is not within the tolerance.
    """

    pixel_nll: float
    label_nll: float
    accuracy: float
    unconverged: float


class Epoch(NamedTuple):
    r"""Is what happened in an epoch.

    Attributes:
        loss: The mean loss, measured while the weights changed, as are the scores.
        training: The scores on the training images.
        validation: The scores after the epoch on images that were not learned from, or None.
        products: How often, on average, a batch was multiplied by the coupling to find the
            marginals given what is observed.
        unconverged: The share of images whose marginals did not converge.
    """

    loss: float
    training: Scores
    validation: Scores | None
    products: float
    unconverged: float


@dataclass(frozen=True)
class TrainingResult:
    r"""Is the outcome of a training.

    Arguments:
        history: What happened in each epoch.
    """

    history: list[Epoch]


class Batch(NamedTuple):
    r"""Is the loss of a batch.

    Attributes:
        loss: The loss, with gradients.
        scores: The scores.
        hidden: The number of hidden pixels.
        field: The mean field given what is observed.
    """

    loss: Tensor
    scores: Scores
    hidden: int
    field: MeanField


def draw_masks(
    shape: tuple[int, int],
    batch: int,
    settings: TrainingSettings,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draws which pixels are observed, with shape :math:`(B, H, W)`.

    Arguments:
        shape: The height and width of images.
        batch: The number of images.
        settings: The share of observed pixels, and the patches.
        generator: The source of randomness, on the CPU.

    Example:
        >>> settings = TrainingSettings(observed=(0.2, 0.6))
        >>> draw_masks((4, 4), 3, settings).shape
        torch.Size([3, 4, 4])
    """
    (low, high), (H, W) = settings.range, shape
    share = low + (high - low) * torch.rand(batch, 1, 1, generator=generator)
    seen = torch.rand(batch, H, W, generator=generator) < share
    if settings.patch_share == 0:
        return seen

    chosen = torch.rand(batch, 1, 1, generator=generator) < settings.patch_share
    within = torch.ones(1, 1, 1, dtype=torch.bool)
    for size, view in ((H, (1, -1, 1)), (W, (1, 1, -1))):
        width = min(settings.patch_size, size)
        first = torch.randint(size - width + 1, (batch, 1, 1), generator=generator)
        place = torch.arange(size).view(view)
        within = within & (place >= first) & (place < first + width)
    return torch.where(chosen, ~within, seen)


def batch_loss(
    machine: ImageMachine,
    images: Images,
    labels: Images,
    observed: Images,
    settings: TrainingSettings,
) -> Batch:
    r"""Computes the loss of a batch, as :class:`TrainingSettings` defines it.

    Arguments:
        machine: The machine.
        images: The images, with shape :math:`(B, H, W)`.
        labels: The labels, with shape :math:`(B,)`.
        observed: Which pixels are observed, with shape :math:`(H, W)` or :math:`(B, H, W)`.
        settings: The objective and how precisely to solve.
    """
    core, w = machine.machine, settings.label_weight
    values = machine.encode(images, labels)
    known = machine.mask(observed, len(values))
    hidden = ~known[:, : machine.pixels]
    count = int(hidden.sum())
    options: Options = {
        "tolerance": settings.tolerance,
        "max_steps": settings.max_steps,
    }
    if settings.objective == "marginals":
        options["adjoint_tolerance"] = settings.adjoint_tolerance
        field = core.mean_field(values, known, **options)
        pixel, label, scores = _entropies(machine, field, images, labels, hidden)
        return Batch((1 - w) * pixel + w * label, scores, count, field)

    plain, field = core.free_energy(values, known, **options)
    named = known.clone()
    named[:, -1] = True
    labelled = core.free_energy(values, named, given=known, **options).value
    whole = named.clone()
    whole[:, : machine.pixels] = True
    full = core.free_energy(values, whole, given=known, **options).value
    loss = (1 - w) * (full - labelled).sum() / max(count, 1) + w * (labelled - plain).mean()
    with torch.no_grad():
        scores = _entropies(machine, field, images, labels, hidden)[2]
    return Batch(loss, scores, count, field)


@torch.no_grad()
def evaluate(
    machine: ImageMachine,
    images: Images,
    labels: Images,
    settings: TrainingSettings | None = None,
    *,
    progress: bool = False,
) -> Scores:
    r"""Measures how well a machine predicts what masks hide.

    Masks depend on the seed and the size of batches alone, and are the same for every machine.

    Arguments:
        machine: The machine.
        images: The images, with shape :math:`(B, H, W)`.
        labels: The labels, with shape :math:`(B,)`.
        settings: The masks, the size of batches and how precisely to solve.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If images or labels do not fit, or there are none.
    """
    settings = settings or TrainingSettings()
    x, y = _checked(machine, images, labels)
    options: Options = {"tolerance": settings.tolerance, "max_steps": settings.max_steps}
    generator = _generator(settings, 0, 1)
    total = _Total()
    batches = torch.arange(len(x)).split(settings.batch_size)
    for rows in tqdm(batches, desc="evaluation", disable=not progress):
        seen = draw_masks(machine.shape, len(rows), settings, generator=generator)
        known = machine.mask(seen, len(rows))
        field = machine.machine.mean_field(machine.encode(x[rows]), known, **options)
        hidden = ~known[:, : machine.pixels]
        scores = _entropies(machine, field, x[rows], y[rows], hidden)[2]
        total.add(scores, int(hidden.sum()), len(rows))
    return total.scores()


def train(
    machine: ImageMachine,
    images: Images,
    labels: Images,
    settings: TrainingSettings | None = None,
    *,
    validation: tuple[Images, Images] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> TrainingResult:
    r"""Trains a machine to predict hidden pixels and labels.

    If all biases are zero, the machine is first given those of the images, with
    :meth:`ImageMachine.standardise`.

    A checkpoint is written after each epoch and read if it exists: a training that was
    interrupted continues and ends with the very weights of one that was not, on the same
    machine and number of threads.

    References:
        | Monotone deep Boltzmann machines (Feng et al., 2023)
        | https://arxiv.org/abs/2307.04990
        | Multi-Prediction Deep Boltzmann Machines (Goodfellow et al., 2013)
        | Advances in Neural Information Processing Systems 26

    Arguments:
        machine: The machine, which is trained in place on the device it is on.
        images: The images, with shape :math:`(N, H, W)`, bytes or floats from 0 to 1.
        labels: The labels, integers with shape :math:`(N,)`.
        settings: The masks, the objective, the schedule and the seed.
        validation: Images and labels that are scored after each epoch, with masks that stay the
            same.
        checkpoint: The file to write after each epoch and to resume from.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If images or labels do not fit, or a checkpoint is of another training.
        FloatingPointError: If the loss or its gradient is not finite.

    Example:
        >>> from probnets.boltzmann.images import dense_machine
        >>> machine = dense_machine((4, 4), levels=2, classes=3, features=8)
        >>> images, labels = torch.rand(20, 4, 4), torch.randint(3, (20,))
        >>> settings = TrainingSettings(epochs=2, batch_size=10)
        >>> len(train(machine, images, labels, settings, progress=False).history)
        2
    """
    settings = settings or TrainingSettings()
    x, y = _checked(machine, images, labels)
    held = None if validation is None else _checked(machine, *validation)
    run = _Run(machine, (x, y), held, settings)
    if checkpoint is not None and Path(checkpoint).exists():
        run.load(checkpoint)
    elif not bool(machine.machine.bias.any()):
        machine.standardise(x, y)

    steps = settings.epochs * run.batches
    done = len(run.history) * run.batches
    with tqdm(total=steps, initial=done, desc="training", disable=not progress) as bar:
        while len(run.history) < settings.epochs:
            run.epoch(bar)
            if checkpoint is not None:
                run.save(checkpoint)
    return TrainingResult(run.history)


class _Total:
    r"""Is a sum of scores, each weighted by what it is a mean of."""

    def __init__(self) -> None:
        self.sums, self.hidden, self.images = [0.0] * 4, 0, 0

    def add(self, scores: Scores, hidden: int, images: int) -> None:
        for i, (score, weight) in enumerate(zip(scores, (hidden, *[images] * 3), strict=True)):
            self.sums[i] += score * weight
        self.hidden, self.images = self.hidden + hidden, self.images + images

    def scores(self) -> Scores:
        pixels, *others = self.sums
        return Scores(pixels / max(self.hidden, 1), *(score / self.images for score in others))


class _Run:
    r"""Is a training under way."""

    def __init__(
        self,
        machine: ImageMachine,
        data: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor] | None,
        settings: TrainingSettings,
    ) -> None:
        self.machine, self.data, self.validation = machine, data, validation
        self.settings = settings
        self.batches = -(-len(data[0]) // settings.batch_size)
        self.history: list[Epoch] = []
        self.weights = [p for p in machine.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.weights, lr=settings.lr)

    def epoch(self, bar: tqdm) -> None:
        r"""Takes one epoch."""
        epoch, settings, (x, y) = len(self.history), self.settings, self.data
        generator = _generator(settings, epoch, 0)
        order = torch.randperm(len(x), generator=generator)
        total, losses, products, failed = _Total(), 0.0, 0, 0
        for b, rows in enumerate(order.split(settings.batch_size)):
            share = (epoch + (b + 0.5) / self.batches) / settings.epochs
            for group in self.optimiser.param_groups:
                group["lr"] = settings.step_size(share)
            seen = draw_masks(self.machine.shape, len(rows), settings, generator=generator)
            found = self.step(x[rows], y[rows], seen)
            loss = found.loss.item()
            losses += loss * len(rows)
            total.add(found.scores, found.hidden, len(rows))
            products += found.field.products
            failed += int((~found.field.converged).sum())
            bar.set_postfix(
                loss=f"{loss:.4f}", accuracy=f"{total.scores().accuracy:.4f}", refresh=False
            )
            bar.update()
        held = self.validation
        scores = None if held is None else evaluate(self.machine, *held, settings)
        means = losses / len(x), products / self.batches, failed / len(x)
        self.history.append(Epoch(means[0], total.scores(), scores, *means[1:]))

    def step(self, x: Tensor, y: Tensor, observed: Tensor) -> Batch:
        r"""Takes one step, and returns the loss before it."""
        found = batch_loss(self.machine, x, y, observed, self.settings)
        self._demand_finite("loss", found.loss)
        self.optimiser.zero_grad()
        found.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.settings.clip)
        self._demand_finite("gradient", norm)
        self.optimiser.step()
        return found

    def _demand_finite(self, name: str, value: Tensor) -> None:
        if not math.isfinite(number := value.item()):
            raise FloatingPointError(
                f"expected a finite {name}, got {number} in epoch {len(self.history) + 1}; "
                "lower lr, or look for weights that are not finite"
            )

    # ------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        r"""Returns what two runs must share for one to continue the other."""
        machine, coupling = self.machine, self.machine.machine.coupling
        held = self.validation
        facts = {
            "what": "training of a Boltzmann machine",
            "format": _FORMAT,
            "settings": asdict(self.settings),
            "coupling": f"{type(coupling).__name__}({coupling.extra_repr()}) to {coupling.limit}",
            "shape": machine.shape,
            "weights": {name: tuple(x.shape) for name, x in machine.state_dict().items()},
            "images": checkpoints.digest(*(part.numpy(force=True) for part in self.data)),
            "validation": held and checkpoints.digest(*(part.numpy(force=True) for part in held)),
        }
        return json.loads(json.dumps(facts))  # as they are read again

    def save(self, path: str | Path) -> None:
        r"""Writes a checkpoint."""
        facts = {**self.facts(), "history": self.history}
        checkpoints.write_training(path, self.machine, self.optimiser, facts)

    def load(self, path: str | Path) -> None:
        r"""Reads a checkpoint."""
        facts = checkpoints.read_training(path, self.machine, self.optimiser, self.facts())
        self.history = [
            Epoch(loss, Scores(*seen), held and Scores(*held), products, unconverged)
            for loss, seen, held, products, unconverged in facts["history"]
        ]


def _entropies(
    machine: ImageMachine, field: MeanField, images: Images, labels: Images, hidden: Tensor
) -> tuple[Tensor, Tensor, Scores]:
    r"""Returns the cross-entropies of hidden pixels and of labels, and the scores."""
    log_levels, log_labels = machine.log_probabilities(field)
    levels = machine.to_levels(images)
    y = machine.check_labels(labels, len(levels))
    picked = log_levels.gather(3, levels[..., None]).flatten(1)
    pixel = -(picked * hidden).sum() / hidden.sum().clamp(min=1)
    label = -log_labels.gather(1, y[:, None]).mean()
    accuracy = (log_labels.argmax(dim=1) == y).double().mean().item()
    failed = (~field.converged).double().mean().item()
    return pixel, label, Scores(pixel.item(), label.item(), accuracy, failed)


def _checked(machine: ImageMachine, images: Images, labels: Images) -> tuple[Tensor, Tensor]:
    x = torch.as_tensor(images)
    for part in x.split(1024) if x.ndim == 3 else [x]:
        machine.to_levels(part)
    if not len(x):
        raise ValueError("expected one image or more, got none")
    return x, machine.check_labels(labels, len(x)).to(x.device)


def _generator(settings: TrainingSettings, epoch: int, purpose: int) -> torch.Generator:
    seed = np.random.SeedSequence((settings.seed, epoch, purpose)).generate_state(1)[0]
    return torch.Generator().manual_seed(int(seed))
