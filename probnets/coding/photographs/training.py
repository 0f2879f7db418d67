r"""Learning a model of photographs."""

__all__ = ["TrainingResult", "TrainingSettings", "train_photographs"]

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from probnets.backend.checkpoints import digest, part, read, write
from probnets.circuits import ConditionalCircuit, IntegerNetwork, ParameterNetwork
from probnets.coding.images import ImageLike, as_array

from .circuit import PixelParameters, pixel_circuit, pixel_context
from .layout import PLACES
from .model import PhotographModel, Settings
from .network import CAP, OUTPUTS, UNITS
from .planes import Context, colour_planes, contexts, measure_planes
from .stages import FRACTION_BITS, INPUT_BITS, SUM_BITS, Places, Stage
from .variants import variants

_DEPTHS = (255, 65535)  # the largest values of a channel
_SAVED = 1000  # steps between checkpoints
_EXAMPLES = 1 << 16  # inputs that tell how large hidden units become


@dataclass(frozen=True)
class TrainingSettings:
    r"""Creates the settings of a training.

    Arguments:
        units: The number of hidden units of a network, a multiple of 32.
        components: The number of components :math:`K` of a mixture.
        samples: The number of pixels to learn from in each plane.
        steps: The number of steps for each plane.
        batch_size: The number of pixels :math:`B` in a step.
        rate: The first learning rate, which falls to a hundredth along a cosine.
        seed: The seed of all that is random.
    """

    units: int = 96
    components: int = 4
    samples: int = 2_000_000
    steps: int = 9000
    batch_size: int = 8192
    rate: float = 6e-3
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.samples, self.steps, self.batch_size)
        if self.units < 1 or self.units % UNITS or not 1 <= 3 * self.components <= OUTPUTS:
            raise ValueError(
                f"expected hidden units in {UNITS}s and at most {OUTPUTS // 3} components, "
                f"got {self.units} and {self.components}"
            )
        if min(counts) < 1 or not self.rate > 0:
            raise ValueError(f"expected samples, steps, a batch size and a rate, got {self}")

    def rate_at(self, step: int) -> float:
        r"""Returns the learning rate of a step."""
        return self.rate * (0.505 + 0.495 * math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class TrainingResult:
    r"""Is the outcome of a training, in bits per number of the images that were held out.

    Arguments:
        real: The bits by the networks of floats, for each plane.
        integer: The bits by the networks of integers, as they code, for each plane.
    """

    real: tuple[float, ...]
    integer: tuple[float, ...]


def train_photographs(
    images: Iterable[ImageLike],
    *,
    validation: Iterable[ImageLike] | None = None,
    settings: TrainingSettings | None = None,
    coding: Settings | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> tuple[PhotographModel, TrainingResult]:
    r"""Learns a model of photographs.

    Each stage is a :class:`~probnets.circuits.ConditionalCircuit` of one number, which gradient
    descent fits to numbers and contexts of the images and of their variants. Its network is
    then rounded to integers.

    Arguments:
        images: The photographs, of uint8 with shape :math:`(H, W, 3)`, or files of them.
        validation: The photographs that the result is measured on. By default every tenth of
            the others, which then is not learnt from, or the only one.
        settings: The settings of the training.
        coding: The settings that the model codes with.
        checkpoint: The file to resume from.
        progress: Whether to show progress bars.

    Returns:
        The model, and how well it codes.

    Raises:
        ValueError: If there are no images, or others than these, or if the checkpoint belongs
            to another training.
    """
    settings, coding = settings or TrainingSettings(), coding or Settings()
    pictures = [_photograph(img) for img in images]
    held = [_photograph(img) for img in validation or ()]
    if not pictures or (validation is not None and not held):
        raise ValueError("expected one photograph or more, got none")
    if validation is None:
        held = pictures[::10]
        pictures = [img for i, img in enumerate(pictures) if i % 10] or pictures

    job = _Job(settings, _digest(pictures, settings, coding), checkpoint, progress=progress)
    data = _collect(pictures, settings, coding, progress=progress)
    stages, networks = [], []
    for plane, (places, own) in enumerate(zip(PLACES, data, strict=True)):
        inputs = own[0].inputs if len(own[0].inputs) else own[1].inputs
        deviations = np.maximum(np.rint(inputs.astype(np.float64).std(0)), 1).astype(np.int16)
        network = job.fit(plane, _network(places, deviations, settings), own)
        networks.append(network)
        stages.append(_rounded(places, network, inputs, deviations))
    model = PhotographModel(tuple(stages), coding)
    return model, _measure(model, networks, held, coding, progress=progress)


def _photograph(img: ImageLike) -> np.ndarray:
    array = as_array(img)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            "expected photographs of uint8 with shape (H, W, 3), "
            f"got {array.dtype} with shape {array.shape}; convert them or leave them out"
        )
    return array


def _digest(pictures: Sequence[np.ndarray], settings: TrainingSettings, coding: Settings) -> str:
    words = np.frombuffer(repr((settings, coding)).encode(), np.uint8)
    return digest(words, *pictures)


# ----------------------------------------------------------------------------------------------
# Data


def _collect(
    pictures: Sequence[np.ndarray], settings: TrainingSettings, coding: Settings, *, progress: bool
) -> list[tuple[Context, ...]]:
    r"""Draws contexts from variants of photographs: for each plane, of 8 bits and of 16."""

    def look(number: int) -> list[list[list[Context]]]:
        rng = np.random.default_rng((settings.seed, number))
        found = [[[] for _ in _DEPTHS] for _ in PLACES]
        for img, weight in variants(pictures[number], rng):
            depth = int(img.dtype == np.uint16)
            planes = colour_planes(img)
            wanted = max(round(weight * settings.samples / len(pictures)), 1)
            context = contexts(PLACES, planes, top=_DEPTHS[depth], fit=coding.fit("fast"))
            for own, (inputs, facts) in zip(found, context, strict=True):
                chosen = rng.permutation(len(facts))[:wanted]
                own[depth].append(Context(inputs[chosen], facts[chosen]))
        return found

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        work = pool.map(look, range(len(pictures)))
        parts = list(
            tqdm(work, "contexts", len(pictures), unit="image", disable=None if progress else True)
        )
    return [
        tuple(
            Context(
                *(
                    np.concatenate(a)
                    for a in zip(*(c for p in parts for c in p[plane][depth]), strict=True)
                )
            )
            for depth in range(len(_DEPTHS))
        )
        for plane in range(len(PLACES))
    ]


# ----------------------------------------------------------------------------------------------
# Networks


def _network(
    places: Places, deviations: np.ndarray, settings: TrainingSettings
) -> PixelParameters:
    r"""Makes a network that starts from mixtures around the anchor."""
    K = settings.components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + places.plane)
        first, last = nn.Linear(places.inputs, settings.units), nn.Linear(settings.units, 3 * K)
    spread = torch.linspace(-0.5, 0.5, K) if K > 1 else torch.zeros(1)
    with torch.no_grad():
        last.weight.mul_(0.3)
        last.bias.copy_(torch.cat([torch.zeros(K), 0.6 * spread, 2.5 * spread - 0.25]))
    layers = nn.Sequential(first, nn.ReLU(), last)
    return PixelParameters(layers, 1 / torch.from_numpy(deviations.astype(np.float32)))


def _rounded(
    places: Places, network: PixelParameters, inputs: np.ndarray, deviations: np.ndarray
) -> Stage:
    r"""Rounds a network to integers."""
    own = network.network
    if not isinstance(own, ParameterNetwork):
        raise TypeError(f"expected a network of floats to round, got {type(own).__name__}")
    integers = IntegerNetwork.from_module(
        own.layers,
        input_scale=own.input_scale,
        examples=torch.from_numpy(inputs[:_EXAMPLES]),
        input_bits=INPUT_BITS,
        activation_bits=CAP.bit_length(),
        fraction_bits=FRACTION_BITS,
        sum_bits=SUM_BITS,
    )
    return Stage(places, integers, deviations)


class _Job:
    r"""Is a training under way, with its checkpoint."""

    def __init__(
        self,
        settings: TrainingSettings,
        digest: str,
        checkpoint: str | Path | None,
        *,
        progress: bool,
    ) -> None:
        self.settings, self.digest, self.progress = settings, digest, progress
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.saved: dict[str, np.ndarray] = {}
        self.done = dict.fromkeys(range(len(PLACES)), 0)
        if self.checkpoint is not None and self.checkpoint.exists():
            self.saved, facts = read(self.checkpoint)
            own = isinstance(facts, dict) and facts.get("what") == "photograph training"
            if not own or facts.get("digest") != digest:
                raise ValueError(
                    f"expected a checkpoint of this training at {self.checkpoint}, got another; "
                    "remove it, or train with its images and settings"
                )
            self.done = {int(plane): steps for plane, steps in facts["done"].items()}

    def fit(
        self, plane: int, network: PixelParameters, data: tuple[Context, ...]
    ) -> PixelParameters:
        r"""Trains the network of a plane, from where a checkpoint left it."""
        settings, start = self.settings, self.done[plane]
        optimiser = torch.optim.Adam(network.parameters(), settings.rate)
        self._restore(plane, network, optimiser, start)
        circuits = [pixel_circuit(network, settings.components, top + 1) for top in _DEPTHS]
        kinds = [depth for depth, own in enumerate(data) if len(own.facts)]
        shares = np.array([len(data[depth].facts) for depth in kinds], np.float64)

        steps = tqdm(
            range(start, settings.steps),
            f"plane {plane + 1} of {len(PLACES)}",
            settings.steps,
            initial=start,
            disable=None if self.progress else True,
        )
        mean = None
        for step in steps:
            rng = np.random.default_rng((settings.seed, plane, step))
            depth = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
            own = data[depth]
            batch = rng.integers(len(own.facts), size=settings.batch_size)
            x, context = pixel_context(Context(own.inputs[batch], own.facts[batch]))

            loss = -circuits[depth].log_prob(x, context).mean() / np.log(2)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.param_groups[0]["lr"] = settings.rate_at(step)
            optimiser.step()

            if depth == kinds[0]:
                mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
                steps.set_postfix(bits=f"{mean:.3f}", refresh=False)
            if (step + 1) % _SAVED == 0 or step + 1 == settings.steps:
                self._save(plane, network, optimiser, step + 1)
        return network

    def _save(
        self, plane: int, network: nn.Module, optimiser: torch.optim.Optimizer, steps: int
    ) -> None:
        state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        for number, moments in optimiser.state_dict()["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[f"{name}.{number}"] = moments[name].numpy()
        self.saved.update({f"plane{plane}.{name}": array.copy() for name, array in state.items()})
        self.done[plane] = steps
        if self.checkpoint is not None:
            facts = {"what": "photograph training", "digest": self.digest, "done": self.done}
            write(self.checkpoint, self.saved, facts)

    def _restore(
        self,
        plane: int,
        network: nn.Module,
        optimiser: torch.optim.Adam,
        steps: int,
    ) -> None:
        if not steps:
            return
        saved = {
            k: torch.from_numpy(v.copy()) for k, v in part(self.saved, f"plane{plane}").items()
        }
        network.load_state_dict({name: saved[name] for name in network.state_dict()})
        state = optimiser.state_dict()
        state["state"] = {
            number: {
                "step": torch.tensor(float(steps)),
                "exp_avg": saved[f"exp_avg.{number}"],
                "exp_avg_sq": saved[f"exp_avg_sq.{number}"],
            }
            for number in range(len(list(network.parameters())))
        }
        optimiser.load_state_dict(state)


# ----------------------------------------------------------------------------------------------
# Result


def _measure(
    model: PhotographModel,
    networks: Sequence[PixelParameters],
    held: Sequence[np.ndarray],
    coding: Settings,
    *,
    progress: bool,
) -> TrainingResult:
    r"""Measures the bits by networks of floats and of integers, each image as one cell."""
    real, integer, count = np.zeros(len(PLACES)), np.zeros(len(PLACES)), 0
    for img in tqdm(held, "validation", unit="image", disable=None if progress else True):
        planes = colour_planes(img)
        count += planes[0].size
        integer += measure_planes(model, planes, top=_DEPTHS[0]).sum((1, 2), dtype=np.float64)
        found = contexts(PLACES, planes, top=_DEPTHS[0], fit=coding.fit("fast"))
        for plane, (network, own) in enumerate(zip(networks, found, strict=True)):
            circuit = pixel_circuit(network, model.components, _DEPTHS[0] + 1)
            real[plane] += _bits(circuit, own)
    return TrainingResult(tuple((real / count).tolist()), tuple((integer / count).tolist()))


@torch.no_grad()
def _bits(circuit: ConditionalCircuit, own: Context) -> float:
    r"""Sums the bits of numbers by a circuit."""
    total = 0.0
    for start in range(0, len(own.facts), _EXAMPLES):
        part = slice(start, start + _EXAMPLES)
        x, context = pixel_context(Context(own.inputs[part], own.facts[part]))
        total -= circuit.log_prob(x, context).double().sum().item() / math.log(2)
    return total
