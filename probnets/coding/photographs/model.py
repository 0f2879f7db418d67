r"""The model of photographs, in a file."""

__all__ = ["Mode", "PhotographModel", "Settings"]

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from probnets.backend.checkpoints import digest, part, read_model, write

from .kernel import Fit
from .stages import Stage

Mode = Literal["fast", "slow"]

FORMAT = 1
STAGES = 3


@dataclass(frozen=True)
class Settings:
    r"""Creates the settings that a model codes with.

    Arguments:
        ridge: What is added to the diagonal of the normal equations.
        decay: The weight of a line of pixels in that of the next, in 256ths.
        periods: The number of pixels between two solutions, fast and slow.
        rates: The rates in units of :math:`2^{-20}` at which the two layers of the networks
            adapt in slow mode.
    """

    ridge: int = 64
    decay: int = 218
    periods: tuple[int, int] = (4, 2)
    rates: tuple[int, int] = (840, 200)

    def __post_init__(self) -> None:
        numbers = [self.ridge, self.decay, *self.periods, *self.rates]
        sound = (
            all(type(n) is int for n in numbers)
            and 1 <= self.ridge < 2**20
            and 0 <= self.decay <= 256
            and len(self.periods) == len(self.rates) == 2
            and all(1 <= n <= 8 for n in self.periods)
            and all(1 <= n < 2**20 for n in self.rates)
        )
        if not sound:
            raise ValueError(f"expected whole numbers in their ranges, got {self}")

    def fit(self, mode: Mode) -> Fit:
        r"""Returns the settings of least squares in a mode."""
        return Fit(float(self.ridge), self.decay / 256, self.periods[mode == "slow"])

    def adaptation(self, mode: Mode) -> tuple[float, float] | None:
        r"""Returns the rates of adaptation in a mode, if there is any."""
        return None if mode == "fast" else (self.rates[0] * 2.0**-20, self.rates[1] * 2.0**-20)


@dataclass(frozen=True, eq=False)
class PhotographModel:
    r"""Creates a model of photographs: a conditional circuit of each pixel given those before.

    A pixel is green, red less green and blue less green, in this order, and the planes of a
    photograph follow one another. The distribution of a number is a sum node over `K`
    discretised logistics, whose parameters a network of integers computes from the causal
    context: from errors and pixels around it, relative to an anchor that least squares
    predicts. Given the context the circuit is smooth and decomposable; over the pixels of a
    photograph it has no tractable marginals.

    Images of any size and kind are coded; grey, alpha and other single planes by the first
    stage.

    Arguments:
        stages: The three stages.
        settings: The settings.

    Raises:
        ValueError: If the stages do not fit together.
    """

    stages: tuple[Stage, ...]
    settings: Settings = Settings()

    kind = "photographs"

    def __post_init__(self) -> None:
        planes = [stage.places.plane for stage in self.stages]
        counts = {stage.components for stage in self.stages}
        if planes != list(range(STAGES)) or len(counts) != 1:
            raise ValueError(
                f"expected stages of planes 0 to {STAGES - 1} and as many components in each, "
                f"got planes {planes} and {sorted(counts)} components"
            )

    @property
    def components(self) -> int:
        r"""The number of components of a mixture :math:`K`."""
        return self.stages[0].components

    @property
    def parameters(self) -> int:
        r"""The number of weights and biases."""
        names = ("weight_0", "bias_0", "weight_1", "bias_1")
        return sum(s.network.arrays()[name].size for s in self.stages for name in names)

    @cached_property
    def digest(self) -> bytes:
        r"""The first bytes of a hash of all that codes, by which streams name a model."""
        arrays = self._arrays()
        state = digest(*(arrays[name] for name in sorted(arrays)))
        own = self.settings
        numbers = (FORMAT, own.ridge, own.decay, *own.periods, *own.rates)
        return hashlib.sha256(f"{self.kind} {numbers} {state}".encode()).digest()[:4]

    def __repr__(self) -> str:
        return (
            f"PhotographModel({self.digest.hex()}, components={self.components}, "
            f"parameters={self.parameters})"
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            f"stage{stage.places.plane}.{name}": array
            for stage in self.stages
            for name, array in stage.arrays().items()
        }

    def save(self, path: str | Path) -> None:
        r"""Writes the model to a safetensors file, whole or not at all.

        Arguments:
            path: The file.
        """
        facts = {"format": FORMAT, "what": "photograph model", "settings": asdict(self.settings)}
        write(path, self._arrays(), facts)

    @classmethod
    def load(cls, path: str | Path) -> "PhotographModel":
        r"""Reads a model from a file.

        Arguments:
            path: The file.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If it is not the file of such a model.
        """
        arrays, facts = read_model(path, "photograph model", FORMAT)
        try:
            told = dict(facts["settings"])
            pairs = (tuple(told.pop(name)) for name in ("periods", "rates"))
            settings = Settings(told.pop("ridge"), told.pop("decay"), *pairs)
            if told:
                raise ValueError(f"expected known settings, got {sorted(told)}")
            stages = tuple(Stage.from_arrays(part(arrays, f"stage{n}")) for n in range(STAGES))
            return cls(stages, settings)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"expected a sound model in {path}: {error}") from None
