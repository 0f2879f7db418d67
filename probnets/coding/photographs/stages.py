r"""Stages: the model of one plane of a photograph given the planes before it."""

__all__ = ["FRACTION_BITS", "INPUT_BITS", "SUM_BITS", "Places", "Stage"]

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from probnets.circuits import IntegerNetwork

from .kernel import MARGIN, Taps
from .network import CAP, OUTPUTS, UNITS, Network

INPUT_BITS = 9  # of an input of a network
FRACTION_BITS = 6  # of an output
SUM_BITS = 24  # of the sums, which float32 holds exactly


@dataclass(frozen=True, eq=False)
class Places:
    r"""Creates the list of places that are looked at to predict a pixel of a plane.

    Places are lines of plane, row and column relative to the pixel, of int8. Earlier planes are
    known in full, the plane itself up to the pixel.

    Arguments:
        plane: The plane: 0 for green or for a plane of its own, 1 for red less green, 2 for
            blue less green.
        regressors: Of what least squares takes differences, with shape :math:`(n, 3)`: in the
            plane itself to the pixels left and above, in others to the same pixel of that plane.
        errors: The errors that the network sees, with shape :math:`(E, 3)`.
        pixels: The pixels of the plane itself that the network sees, with shape :math:`(P, 3)`.

    Raises:
        ValueError: If a place is too far away, or not known when the pixel is coded.
    """

    plane: int
    regressors: np.ndarray
    errors: np.ndarray
    pixels: np.ndarray

    def __post_init__(self) -> None:
        for name in ("regressors", "errors", "pixels"):
            _check_places(getattr(self, name), self.plane, name)
        if not len(self.regressors) or (self.pixels[:, 0] != self.plane).any():
            raise ValueError("expected regressors, and pixels of the plane itself")

    @property
    def inputs(self) -> int:
        r"""The number of inputs of the network, :math:`I = 1 + 2 E + P`."""
        return 1 + 2 * len(self.errors) + len(self.pixels)

    def taps(self, height: int, width: int) -> Taps:
        r"""Returns the places as distances in the buffers of planes of a size."""
        stride = width + 2 * MARGIN
        area = (height + 2 * MARGIN) * stride
        lines = []
        for plane, row, column in self.regressors.tolist():
            at = (plane - self.plane) * area  # the same pixel of that plane
            other = plane != self.plane and (row, column) != (0, 0)
            references = (at, at) if other else (at - 1, at - stride)
            lines.append((at + row * stride + column, *references))
        flat = []
        for places in (self.errors, self.pixels):
            plane, row, column = places.astype(np.int64).T
            flat.append((plane - self.plane) * area + row * stride + column)
        return Taps(np.array(lines, np.int64), *flat)


@dataclass(frozen=True, eq=False)
class Stage:
    r"""Creates the model of one plane given the planes before it.

    Arguments:
        places: What is looked at.
        network: The network, with :math:`I` inputs, one hidden layer and :math:`3 K` outputs.
        deviations: The standard deviation of each input, of int16 with shape :math:`(I,)`,
            to which the rates of adaptation are relative.

    Raises:
        ValueError: If the parts do not fit together, or if a sum of the network could leave
            float32.
    """

    places: Places
    network: IntegerNetwork
    deviations: np.ndarray

    def __post_init__(self) -> None:
        net, inputs = self.network, self.places.inputs
        sizes = net.depth, net.in_features, net.out_features % 3, net.input_bits, net.tops
        if sizes != (2, inputs, 0, INPUT_BITS, [CAP]) or net.fraction_bits != FRACTION_BITS:
            raise ValueError(
                f"expected a network of {inputs} inputs of {INPUT_BITS} bits, one hidden layer "
                f"up to {CAP} and 3 K outputs of {FRACTION_BITS} fraction bits, got {net}"
            )
        units = len(self._parts["bias_0"])
        if units % UNITS or net.out_features > OUTPUTS:
            raise ValueError(
                f"expected hidden units in {UNITS}s and up to {OUTPUTS} outputs, "
                f"got {units} and {net.out_features}"
            )
        found = self.deviations
        if found.dtype != np.int16 or found.shape != (inputs,) or found.min() < 1:
            raise ValueError(
                f"expected {inputs} positive deviations of int16, got {found.dtype} with shape "
                f"{found.shape}"
            )
        if (largest := self._largest_sum()) >= 2**SUM_BITS:
            raise ValueError(f"expected sums below 2^{SUM_BITS}, got {largest}")

    @property
    def components(self) -> int:
        r"""The number of components of a mixture :math:`K`."""
        return self.network.out_features // 3

    def arrays(self) -> dict[str, np.ndarray]:
        r"""Returns the stage as arrays, for a file."""
        places = self.places
        return {
            "plane": np.array([places.plane], np.int8),
            "regressors": places.regressors,
            "errors": places.errors,
            "pixels": places.pixels,
            "deviations": self.deviations,
            **self._parts,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Stage":
        r"""Makes the stage of :meth:`arrays`.

        Raises:
            KeyError: If one is missing.
            ValueError: If they do not fit together.
        """
        rest = dict(arrays)
        plane, *lines, deviations = (
            rest.pop(name) for name in ("plane", "regressors", "errors", "pixels", "deviations")
        )
        places = Places(int(plane[0]), *lines)
        return cls(places, IntegerNetwork.from_arrays(rest), deviations)

    def compiled(self, rates: tuple[float, float] | None = None) -> Network:
        r"""Returns the network as the compiled loop takes it.

        Arguments:
            rates: The rates at which the two layers adapt. By default the network does not.
        """
        parts = self._parts
        units, outputs = len(parts["bias_0"]), len(parts["bias_1"])
        first_shift, shift = parts["shift_0"], np.zeros(OUTPUTS, np.int64)
        shift[:outputs] = parts["shift_1"]
        second, second_bias = np.zeros((units, OUTPUTS)), np.zeros(OUTPUTS)
        second[:, :outputs] = parts["weight_1"].T
        second_bias[:outputs] = parts["bias_1"] + (1 << parts["shift_1"] >> 1)
        arrays = {
            "first": parts["weight_0"].T.ravel(),
            "first_bias": parts["bias_0"] + (1 << first_shift >> 1),
            "first_scale": np.ldexp(1.0, -first_shift),
            "second": second.ravel(),
            "second_bias": second_bias,
            "second_scale": np.ldexp(1.0, -shift),
        }
        names = ("turned", "rates", "lift", "back", "ahead", "second_rates")
        adaptive: dict[str, np.ndarray] = dict.fromkeys(names, np.zeros(0))
        if rates is not None:
            # Integers per unit of real weights, if a hidden unit is real in sixty-fourths.
            per_unit = np.ldexp(1.0, first_shift + FRACTION_BITS)
            own = np.zeros(OUTPUTS)
            own[:outputs] = 1.0
            adaptive = {
                "turned": second.T.ravel(),
                "rates": np.append(rates[0] / self.deviations.astype(np.float64) ** 2, rates[0]),
                "lift": per_unit,
                "back": own * np.ldexp(1.0, -shift),
                "ahead": own * rates[1] * np.ldexp(1.0, shift - FRACTION_BITS),
                "second_rates": own * 2.0 ** (2 * FRACTION_BITS),
            }
        whole = {k: np.ascontiguousarray(v, np.float32) for k, v in {**arrays, **adaptive}.items()}
        return Network(**whole)

    @cached_property
    def _parts(self) -> dict[str, np.ndarray]:
        return self.network.arrays()

    def _largest_sum(self) -> int:
        largest, most = 0, 2**INPUT_BITS - 1
        for layer in range(2):
            weight, bias, shift = (
                self._parts[f"{name}_{layer}"].astype(np.int64)
                for name in ("weight", "bias", "shift")
            )
            sums = np.abs(weight).sum(1) * most + np.abs(bias) + (1 << shift >> 1)
            largest, most = max(largest, int(sums.max())), CAP
        return largest


def _check_places(lines: np.ndarray, plane: int, name: str) -> None:
    if lines.dtype != np.int8 or lines.ndim != 2 or lines.shape[1] != 3:
        raise ValueError(f"expected {name} of int8 with shape (n, 3), got {lines.shape}")
    for q, row, column in lines.tolist():
        near = max(abs(row), abs(column)) <= MARGIN
        before = (0 <= q < plane) or (q == plane and (row, column) < (0, 0))
        if not near or not before:
            raise ValueError(
                f"expected {name} that are known before a pixel, at most {MARGIN} away, "
                f"got plane {q}, row {row}, column {column} for plane {plane}"
            )
