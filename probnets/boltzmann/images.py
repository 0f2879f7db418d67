r"""Boltzmann machines of images and labels: completion and classification."""

__all__ = ["Completion", "ImageMachine", "dense_machine", "tier_machine"]

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .couplings import Cap, GramCoupling
from .machine import BoltzmannMachine, Options
from .meanfield import MeanField
from .tiers import Tier, TierCoupling


class Completion(NamedTuple):
    r"""Is what a machine makes of partly observed images.

    Attributes:
        images: The images, with shape :math:`(B, H, W)`, from 0 to 1. Observed pixels are as
            they were given, and hidden ones are expected values.
        levels: The probabilities of levels, with shape :math:`(B, H, W, K)`.
        labels: The probabilities of labels, with shape :math:`(B, C)`.
        field: The mean field, with its certificate for each image.
    """

    images: Tensor
    levels: Tensor
    labels: Tensor
    field: MeanField


class ImageMachine(nn.Module):
    r"""Creates a machine over images and a label.

    The first :math:`H W` variables are the pixels, row by row, with :math:`K` states each. The
    last one is the label. Those between are latent.

    A pixel :math:`x` from 0 to 1 has the level :math:`\min(\lfloor K x \rfloor, K - 1)`, so
    that level :math:`k` is the interval from :math:`k / K` to :math:`(k + 1) / K` without its
    end, save for 1 and rounding. A level stands for the middle of its interval, or for the mean
    of the pixels in it after :meth:`standardise`.

    Arguments:
        machine: The machine.
        shape: The height and width :math:`(H, W)` of images.
        levels: The number of levels :math:`K`.
        classes: The number of labels :math:`C`.
        learn_temperature: Whether reported probabilities are
            :math:`\mathrm{softmax}((\Phi q + b) / T)`, with one temperature :math:`T` for
            pixels and one for the label that are learned. By default they are the marginals.

    Example:
        >>> from probnets.boltzmann import GramCoupling
        >>> machine = BoltzmannMachine(GramCoupling([2] * 12 + [3], 6))
        >>> machine = ImageMachine(machine, shape=(4, 3), levels=2, classes=3)
        >>> machine.classify(torch.rand(5, 4, 3)).shape
        torch.Size([5, 3])
    """

    centres: Tensor  # (K,)

    def __init__(
        self,
        machine: BoltzmannMachine,
        *,
        shape: tuple[int, int],
        levels: int,
        classes: int,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__()
        H, W = shape
        if min(H, W, levels, classes) < 1:
            raise ValueError(
                "expected a positive shape, number of levels and number of classes, got "
                f"{(H, W)}, {levels} and {classes}"
            )
        sizes = machine.coupling.groups.sizes.tolist()
        pixels = sizes[: H * W]
        if len(sizes) <= H * W or set(pixels) != {levels} or sizes[-1] != classes:
            raise ValueError(
                f"expected variables that begin with {H * W} of {levels} states and end with one "
                f"of {classes}, got {len(sizes)} with sizes {sorted(set(pixels))} and {sizes[-1]}"
            )
        self.machine, self.shape, self.levels, self.classes = machine, (H, W), levels, classes
        like = machine.bias.detach()
        middles = (torch.arange(levels, device=like.device, dtype=torch.float64) + 0.5) / levels
        self.register_buffer("centres", middles.to(like.dtype))
        self.log_temperatures = nn.Parameter(like.new_zeros(2)) if learn_temperature else None

    def extra_repr(self) -> str:
        return f"shape={self.shape}, levels={self.levels}, classes={self.classes}"

    @property
    def pixels(self) -> int:
        r"""The number of pixels :math:`H W`."""
        return self.shape[0] * self.shape[1]

    @property
    def latents(self) -> int:
        r"""The number of latent variables."""
        return self.machine.variables - self.pixels - 1

    @property
    def temperatures(self) -> Tensor:
        r"""The temperatures of pixels and of the label, with shape :math:`(2,)`."""
        if self.log_temperatures is None:
            return torch.ones_like(self.machine.bias[:1]).expand(2)
        return self.log_temperatures.exp()

    def to_levels(self, images: Tensor | np.ndarray) -> Tensor:
        r"""Returns the level of each pixel, with shape :math:`(B, H, W)`.

        Arguments:
            images: The images, with shape :math:`(B, H, W)`, bytes or floats from 0 to 1.

        Raises:
            ValueError: If they do not fit.
        """
        x = self._images(images)
        if x.dtype == torch.uint8:
            found = x.long() * self.levels // 255
        else:
            # A byte divided by 255 that begins an interval may be rounded out of it.
            found = (x * (self.levels * (1 + 4 * torch.finfo(x.dtype).eps))).long()
        return found.clamp(max=self.levels - 1)

    def encode(
        self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray | None = None
    ) -> Tensor:
        r"""Returns the values of pixels and labels, one-hot with shape :math:`(B, N)`.

        Latent variables are zero, and so are labels that are not given.

        Arguments:
            images: The images, with shape :math:`(B, H, W)`, bytes or floats from 0 to 1.
            labels: The labels, integers with shape :math:`(B,)`.

        Raises:
            ValueError: If they do not fit.
        """
        found = self.to_levels(images).flatten(1)
        values = self.machine.bias.new_zeros(len(found), self.machine.states)
        starts = torch.arange(self.pixels, device=found.device) * self.levels
        values.scatter_(1, starts + found, 1.0)
        if labels is not None:
            chosen = self.check_labels(labels, len(found))
            values.scatter_(1, (chosen + values.shape[1] - self.classes)[:, None], 1.0)
        return values

    def mask(
        self,
        observed: Tensor | np.ndarray | None = None,
        batch: int = 1,
        *,
        label: bool = False,
    ) -> Tensor:
        r"""Returns which variables are observed, with shape :math:`(B, n)`.

        Arguments:
            observed: Which pixels are observed, boolean with shape :math:`(H, W)` or
                :math:`(B, H, W)`. By default all are.
            batch: The number of images :math:`B`.
            label: Whether labels are observed.

        Raises:
            ValueError: If the mask does not fit.
        """
        known = torch.zeros(
            batch, self.machine.variables, dtype=torch.bool, device=self.machine.bias.device
        )
        known[:, : self.pixels] = self._pixel_mask(observed, batch).flatten(1)
        known[:, -1] = label
        return known

    def log_probabilities(self, field: MeanField) -> tuple[Tensor, Tensor]:
        r"""Returns the log-probabilities of hidden pixels and labels, with gradients.

        Arguments:
            field: The mean field.

        Returns:
            Those of levels, with shape :math:`(B, H, W, K)`, and of labels, :math:`(B, C)`.
            They mean nothing where a variable is observed.
        """
        levels, labels = self._cut(field.logits)
        if self.log_temperatures is not None:
            first, second = self.temperatures
            levels, labels = levels / first, labels / second
        return levels.log_softmax(dim=3), labels.log_softmax(dim=1)

    def probabilities(self, field: MeanField, observed: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the probabilities of pixels and labels, one-hot where they are observed.

        Arguments:
            field: The mean field.
            observed: Which variables are observed, with shape :math:`(B, n)`.

        Returns:
            Those of levels, with shape :math:`(B, H, W, K)`, and of labels, :math:`(B, C)`.
        """
        levels, labels = self._cut(field.marginals)
        if self.log_temperatures is None:
            return levels, labels
        log_levels, log_labels = self.log_probabilities(field)
        seen = observed[:, : self.pixels].view(-1, *self.shape, 1)
        levels = torch.where(seen, levels, log_levels.exp())
        return levels, torch.where(observed[:, -1:], labels, log_labels.exp())

    def complete(
        self,
        images: Tensor | np.ndarray,
        observed: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | None = None,
        *,
        batch_size: int = 256,
        progress: bool = False,
        **options: Unpack[Options],
    ) -> Completion:
        r"""Completes images of which some pixels are hidden.

        Arguments:
            images: The images, with shape :math:`(B, H, W)`, bytes or floats from 0 to 1. What
                hidden pixels hold is ignored, NaN included.
            observed: Which pixels are observed, boolean with shape :math:`(H, W)` or
                :math:`(B, H, W)`.
            labels: The labels, integers with shape :math:`(B,)`, if they are known.
            batch_size: The number of images that are completed at once.
            progress: Whether to show a progress bar.
            options: What else :func:`mean_field` takes.

        Returns:
            The completion, without gradients. It holds all marginals of all images.

        Raises:
            ValueError: If shapes or values do not fit.

        Example:
            >>> machine = dense_machine((4, 4), levels=2, classes=3, features=8)
            >>> found = machine.complete(torch.rand(5, 4, 4), torch.rand(5, 4, 4) < 0.4)
            >>> found.images.shape, found.labels.shape
            (torch.Size([5, 4, 4]), torch.Size([5, 3]))
        """
        parts = []
        for x, known, field in self._batches(
            images, observed, labels, batch_size, progress=progress, options=options
        ):
            levels, chances = self.probabilities(field, known)
            seen = known[:, : self.pixels].view(-1, *self.shape)
            x = x.to(levels.dtype) / 255 if x.dtype == torch.uint8 else x.to(levels.dtype)
            whole = torch.where(seen, x, levels @ self.centres)
            parts.append(Completion(whole, levels, chances, field))
        maps, levels, chances = (torch.cat([part[place] for part in parts]) for place in range(3))
        return Completion(maps, levels, chances, _joined([part.field for part in parts]))

    def classify(
        self,
        images: Tensor | np.ndarray,
        observed: Tensor | np.ndarray | None = None,
        *,
        batch_size: int = 256,
        progress: bool = False,
        **options: Unpack[Options],
    ) -> Tensor:
        r"""Returns the probabilities of labels, with shape :math:`(B, C)`.

        Arguments:
            images: The images, as for :meth:`complete`.
            observed: Which pixels are observed, likewise. By default all are.
            batch_size: The number of images that are classified at once.
            progress: Whether to show a progress bar.
            options: What else :func:`mean_field` takes.

        Raises:
            ValueError: If shapes or values do not fit.
        """
        batches = self._batches(
            images, observed, None, batch_size, progress=progress, options=options
        )
        return torch.cat([self.probabilities(field, known)[1] for _, known, field in batches])

    @torch.no_grad()
    def standardise(
        self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray | None = None
    ) -> None:
        r"""Sets biases and levels to what images are like.

        Biases become the log frequencies of levels and labels, each counted once more than it
        occurs and then centred. Levels stand for the mean of the pixels in them.

        Arguments:
            images: The images, with shape :math:`(B, H, W)`, bytes or floats from 0 to 1.
            labels: The labels, integers with shape :math:`(B,)`.
        """
        images, bias = self._images(images), self.machine.bias
        labels = None if labels is None else self.check_labels(labels, len(images))
        counts = bias.new_zeros(self.machine.states, dtype=torch.float64)
        mass = torch.zeros(self.levels, dtype=torch.float64, device=bias.device)
        number = torch.zeros_like(mass)
        for rows in torch.arange(len(images)).split(1024):
            x = images[rows]
            found = self.to_levels(x).flatten()
            y = None if labels is None else labels[rows]
            counts += self.encode(x, y).double().sum(dim=0)
            x = x.double().flatten() / (255 if x.dtype == torch.uint8 else 1)
            mass.index_add_(0, found, x)
            number.index_add_(0, found, torch.ones_like(x))
        means = (mass / number).to(bias.dtype)
        self.centres.copy_(torch.where(number > 0, means, self.centres))
        end = self.pixels * self.levels
        log_levels = (counts[:end].view(self.pixels, self.levels) + 1).log()
        bias[:end] = (log_levels - log_levels.mean(dim=1, keepdim=True)).flatten().to(bias.dtype)
        if labels is not None:
            log_labels = (counts[-self.classes :] + 1).log()
            bias[-self.classes :] = (log_labels - log_labels.mean()).to(bias.dtype)

    def check_labels(self, labels: Tensor | np.ndarray, batch: int) -> Tensor:
        r"""Returns labels as integers, after checking them.

        Arguments:
            labels: The labels.
            batch: The number of images :math:`B`.

        Raises:
            ValueError: If they are not integers with shape :math:`(B,)` from 0 on.
        """
        y = torch.as_tensor(labels)
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"expected labels that are integers, got {y.dtype}")
        if y.shape != (batch,):
            raise ValueError(f"expected labels with shape ({batch},), got {tuple(y.shape)}")
        if len(y) and not (y.min() >= 0 and y.max() < self.classes):
            raise ValueError(
                f"expected labels from 0 to {self.classes - 1}, got {y.min()} to {y.max()}"
            )
        return y.to(self.machine.bias.device).long()

    @torch.no_grad()
    def _batches(
        self,
        images: Tensor | np.ndarray,
        observed: Tensor | np.ndarray | None,
        labels: Tensor | np.ndarray | None,
        batch_size: int,
        *,
        progress: bool,
        options: Options,
    ) -> Iterator[tuple[Tensor, Tensor, MeanField]]:
        r"""Yields images, what is observed of them, and their mean field."""
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {batch_size}")
        x = torch.as_tensor(images)
        if x.ndim == 3 and x.shape[1:] == self.shape and observed is not None:
            seen = self._pixel_mask(observed, len(x)).to(x.device)
            x = torch.where(seen, x, torch.zeros_like(x))
        x = self._images(x)
        known = self.mask(observed, len(x), label=labels is not None)
        values = None if labels is None else self.check_labels(labels, len(x))
        bar = tqdm(torch.arange(len(x)).split(batch_size), "mean field", disable=not progress)
        start = options.get("initial")
        start = start.start if isinstance(start, MeanField) else start
        for rows in bar:
            if start is not None:
                options = {**options, "initial": start[rows]}
            encoded = self.encode(x[rows], None if values is None else values[rows])
            yield x[rows], known[rows], self.machine.mean_field(encoded, known[rows], **options)

    def _images(self, images: Tensor | np.ndarray) -> Tensor:
        x = torch.as_tensor(images)
        H, W = self.shape
        if x.ndim != 3 or x.shape[1:] != (H, W):
            raise ValueError(f"expected images with shape (B, {H}, {W}), got {tuple(x.shape)}")
        if not (x.is_floating_point() or x.dtype == torch.uint8):
            raise ValueError(f"expected images of uint8 or floats, got {x.dtype}")
        # NaN is in no interval.
        if x.is_floating_point() and not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError("expected images from 0 to 1, got other values; divide bytes by 255")
        return x.to(self.machine.bias.device)

    def _pixel_mask(self, observed: Tensor | np.ndarray | None, batch: int) -> Tensor:
        H, W = self.shape
        if observed is None:
            return torch.ones(batch, H, W, dtype=torch.bool, device=self.machine.bias.device)
        seen = torch.as_tensor(observed)
        if seen.shape not in ((H, W), (batch, H, W)):
            raise ValueError(
                f"expected observed pixels with shape ({H}, {W}) or ({batch}, {H}, {W}), got "
                f"{tuple(seen.shape)}"
            )
        if seen.dtype != torch.bool:
            raise ValueError(f"expected a boolean mask of observed pixels, got {seen.dtype}")
        return seen.to(self.machine.bias.device).expand(batch, H, W)

    def _cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Takes the states of pixels and of the label."""
        end = self.pixels * self.levels
        return x[:, :end].view(-1, *self.shape, self.levels), x[:, -self.classes :]


def dense_machine(
    shape: tuple[int, int],
    levels: int,
    classes: int,
    *,
    features: int,
    latents: int = 0,
    latent_states: int = 2,
    cap: Cap = "extended",
    margin: float = 0.1,
    learn_temperature: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ImageMachine:
    r"""Creates a machine of small images, in which all variables are coupled.

    Arguments:
        shape: The height and width of images.
        levels: The number of levels.
        classes: The number of labels.
        features: The number of features, as for :class:`GramCoupling`.
        latents: The number of latent variables.
        latent_states: The number of states of each.
        cap: The cap, as for :func:`capped`.
        margin: The margin.
        learn_temperature: Whether temperatures are learned, as for :class:`ImageMachine`.
        generator: The source of randomness of the weights.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> machine = dense_machine((4, 4), levels=3, classes=2, features=8, latents=5)
        >>> machine.machine.variables, machine.machine.states
        (22, 60)
    """
    if latents < 0:
        raise ValueError(f"expected latents >= 0, got {latents}")
    sizes = [levels] * (shape[0] * shape[1]) + [latent_states] * latents + [classes]
    coupling = GramCoupling(
        sizes, features, cap=cap, margin=margin, generator=generator, device=device, dtype=dtype
    )
    return ImageMachine(
        BoltzmannMachine(coupling),
        shape=shape,
        levels=levels,
        classes=classes,
        learn_temperature=learn_temperature,
    )


def tier_machine(
    shape: tuple[int, int] = (28, 28),
    levels: int = 20,
    classes: int = 10,
    *,
    hidden: Sequence[tuple[int, int, int]] = ((4, 10, 2), (4, 20, 4)),
    kernel: int = 3,
    cap: Cap = "extended",
    margin: float = 0.1,
    learn_temperature: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ImageMachine:
    r"""Creates a deep machine of images, by default that of :func:`paper_architecture`.

    All tiers of maps are linked with each other, and the label with the last of them.

    Arguments:
        shape: The height and width of images.
        levels: The number of levels.
        classes: The number of labels.
        hidden: The latent tiers: the number of states of a variable, the number of variables of
            a pixel, and how many times smaller than the image the tier is.
        kernel: The width of all kernels.
        cap: The cap, as for :func:`capped`.
        margin: The margin.
        learn_temperature: Whether temperatures are learned, as for :class:`ImageMachine`.
        generator: The source of randomness of the weights.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> tier_machine().machine.variables
        3725
        >>> machine = tier_machine((8, 8), levels=2, classes=3, hidden=[(2, 4, 2)])
        >>> machine.pixels, machine.latents
        (64, 64)
    """
    H, W = shape
    tiers = [Tier(levels, 1, H, W)]
    for states, variables, stride in hidden:
        if stride < 1 or H % stride or W % stride:
            raise ValueError(
                f"expected latent tiers a whole number of times smaller than {(H, W)}, got "
                f"{stride} times"
            )
        tiers.append(Tier(states, variables, H // stride, W // stride))
    last = len(tiers)
    links = {
        (i, j): 1 if tiers[i].size == (1, 1) else kernel for i in range(last) for j in range(i + 1)
    }
    links |= {(last, last - 1): 1, (last, last): 1}
    coupling = TierCoupling(
        [*tiers, Tier(classes)],
        links,
        cap=cap,
        margin=margin,
        generator=generator,
        device=device,
        dtype=dtype,
    )
    return ImageMachine(
        BoltzmannMachine(coupling),
        shape=shape,
        levels=levels,
        classes=classes,
        learn_temperature=learn_temperature,
    )


def _joined(fields: Sequence[MeanField]) -> MeanField:
    r"""Joins the mean fields of batches."""
    *columns, products = zip(*fields, strict=True)
    return MeanField(*(torch.cat(column) for column in columns), products=sum(products))
