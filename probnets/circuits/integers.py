r"""Networks in integers, the same on every machine."""

__all__ = ["IntegerNetwork", "IntegerParameters"]

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from probnets.backend.checkpoints import digest

_EXACT = 2**53  # float64 holds all integers below
_WEIGHT = 2**15 - 1  # the largest weight
_SPARE = 24  # fraction bits of a sum beyond those of its result that are worth having
_PARTS = ("weight", "bias", "shift")


class IntegerNetwork(nn.Module):
    r"""Creates a network of linear layers and clipped activations in integers.

    .. math:: h_{l + 1} = \operatorname{clip}\left(
        \left\lfloor (W_l h_l + b_l) / 2^{s_l} + 1/2 \right\rfloor, 0, t_l \right)

    Weights have 16 bits. No sum of absolute values reaches :math:`2^{53}`, so that products of
    float64 matrices are exact in any order and on any device. The last layer is not clipped.
    Use :meth:`from_module` for the integer version of a trained network.

    References:
        | Integer Networks for Data Compression with Latent-Variable Models
        | (Ballé, Johnston & Minnen, 2019)
        | https://research.google/pubs/pub48934/

    Arguments:
        weights: For each layer :math:`W_l`, int16 with shape :math:`(V, D)`.
        biases: For each layer :math:`b_l`, int64 with shape :math:`(V,)`.
        shifts: For each layer :math:`s_l`, int64 with shape :math:`(V,)`, from 0 to 52.
        tops: For each layer but the last the largest activation :math:`t_l`.
        input_bits: Inputs are integers of absolute value below :math:`2^i`.
        fraction_bits: Outputs are in units of :math:`2^{-F}`.

    Raises:
        ValueError: If the arrays do not fit together, or a sum could overflow.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> network = IntegerNetwork.from_module(layers, input_scale=1 / 255, input_bits=8)
        >>> x = torch.randint(256, (100, 2))
        >>> network(x).shape, network(x).dtype
        (torch.Size([100, 3]), torch.int64)
        >>> network.deviation(layers, x, input_scale=1 / 255) < 0.01
        True
    """

    def __init__(
        self,
        weights: Sequence[np.ndarray],
        biases: Sequence[np.ndarray],
        shifts: Sequence[np.ndarray],
        tops: Sequence[int],
        *,
        input_bits: int,
        fraction_bits: int,
    ) -> None:
        super().__init__()
        self.input_bits = input_bits
        self.fraction_bits = fraction_bits
        self.tops = [int(top) for top in tops]
        self.depth = len(weights)
        _check_layers(weights, biases, shifts, self.tops, input_bits, fraction_bits)
        for name, arrays in (("weight", weights), ("bias", biases), ("shift", shifts)):
            for layer, array in enumerate(arrays):
                self.register_buffer(f"{name}_{layer}", torch.tensor(array))

    @property
    def in_features(self) -> int:
        r"""The number of inputs :math:`D`."""
        return self._part("weight", 0).shape[1]

    @property
    def out_features(self) -> int:
        r"""The number of outputs :math:`V`."""
        return self._part("weight", self.depth - 1).shape[0]

    def extra_repr(self) -> str:
        sizes = [self.in_features, *(len(self._part("bias", n)) for n in range(self.depth))]
        return f"{sizes}, input_bits={self.input_bits}, fraction_bits={self.fraction_bits}"

    @classmethod
    def from_module(
        cls,
        layers: nn.Module,
        *,
        input_scale: float | Sequence[float] | Tensor = 1.0,
        examples: Tensor | None = None,
        input_bits: int = 16,
        activation_bits: int = 15,
        fraction_bits: int = 12,
        sum_bits: int = 53,
    ) -> "IntegerNetwork":
        r"""Rounds a network of ``nn.Linear`` with ``nn.ReLU`` or ``nn.Hardtanh(0, c)`` between.

        Each row of weights gets the power of two that uses 16 bits best. Activations share one
        a layer: that which brings :math:`c`, or the largest activation that examples cause, to
        :math:`a` bits.

        Arguments:
            layers: The network, an ``nn.Sequential`` that begins and ends on ``nn.Linear``.
            input_scale: What the network's own inputs are in terms of integers: integers times
                one number, or one for each input.
            examples: Integer inputs of the kind to come, with shape :math:`(B, D)`. Activations
                above theirs are clipped. By default no activation can be.
            input_bits: The bits :math:`i` of an input, without its sign.
            activation_bits: The bits :math:`a` of an activation.
            fraction_bits: The fraction bits :math:`F` of the outputs.
            sum_bits: No sum of absolute values reaches :math:`2^S`: 53 suits float64, and 24
                float32.

        Raises:
            TypeError: If the network has other modules.
            ValueError: If the parameters are not finite, or too large for the bits.
        """
        linears, limits = _pattern(layers)
        weights, biases, shifts, tops = [], [], [], []
        scale = torch.as_tensor(input_scale, dtype=torch.float64).detach().cpu()
        seen = None if examples is None else examples.detach().double().cpu() * scale
        most, fraction = float(2**input_bits - 1), 0  # of what enters a layer, in integers
        for number, (linear, limit) in enumerate(zip(linears, limits, strict=True)):
            with torch.no_grad():
                W, b = _real(linear)
                seen = None if seen is None else (seen @ W.T + b)
            W = (W * scale if number == 0 else W).numpy()
            b = b.numpy()
            last = limit is None
            if not last:
                seen = None if seen is None else seen.clamp(0, limit)
                peak = np.abs(W).sum(1) * most * 2.0**-fraction + np.abs(b)
                peak = min(limit, float(peak.max() if seen is None else seen.max()))
                top = 2**activation_bits - 1
                wanted = min(math.floor(math.log2(top / peak)) if peak > 0 else 30, 30)
            else:
                peak, top, wanted = math.inf, 0, fraction_bits

            exponent = _exponents(W, b, most, fraction, wanted, sum_bits)
            room = fraction + int(exponent.min())
            if last and room < fraction_bits:
                raise ValueError(
                    f"expected outputs with {fraction_bits} fraction bits, and large parameters "
                    f"leave {room}; ask for fewer fraction_bits"
                )
            result = min(wanted, room)
            weights.append(np.rint(np.ldexp(W, exponent[:, None])).astype(np.int16))
            biases.append(np.rint(np.ldexp(b, exponent + fraction)).astype(np.int64))
            shifts.append((fraction + exponent - result).astype(np.int64))
            if not last:
                most = float(min(top, math.ceil(limit * 2.0**result) if limit < math.inf else top))
                tops.append(int(most))
            fraction = result
        return cls(
            weights, biases, shifts, tops, input_bits=input_bits, fraction_bits=fraction_bits
        )

    def forward(self, x: Tensor) -> Tensor:
        r"""Evaluates the network by exact products of float64 matrices.

        Arguments:
            x: The inputs, integers of any type, with shape :math:`(*, D)`.

        Returns:
            The outputs in units of :math:`2^{-F}`, int64 with shape :math:`(*, V)`.

        Raises:
            ValueError: If inputs are not integers of the bits that they may have.
        """
        x = x.double()
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected x with shape (*, {self.in_features}), got {tuple(x.shape)}"
            )
        if bool(((x.abs() >= 2**self.input_bits) | (x != x.floor())).any()):
            raise ValueError(f"expected integers of {self.input_bits} bits, got others")
        for layer in range(self.depth):
            shift = self._part("shift", layer)
            bias = self._part("bias", layer) + (torch.ones_like(shift) << shift >> 1)
            x = x @ self._part("weight", layer).double().T + bias.double()
            x = (x * ((1023 - shift) << 52).view(torch.float64)).floor()  # over 2^shift
            if layer < len(self.tops):
                x = x.clamp(0, self.tops[layer])
        return x.long()

    def plain(self, row: Sequence[int]) -> list[int]:
        r"""Evaluates the network by Python's integers, which defines the result.

        Arguments:
            row: One input.
        """
        for layer in range(self.depth):
            parts = (self._part(name, layer).tolist() for name in ("weight", "bias", "shift"))
            total = [
                sum(w * h for w, h in zip(weights, row, strict=True)) + bias + (1 << shift >> 1)
                >> shift
                for weights, bias, shift in zip(*parts, strict=True)
            ]
            clipped = layer < len(self.tops)
            row = [min(max(h, 0), self.tops[layer]) for h in total] if clipped else total
        return list(row)

    @torch.no_grad()
    def deviation(
        self,
        layers: nn.Module,
        x: Tensor,
        *,
        input_scale: float | Sequence[float] | Tensor = 1.0,
    ) -> float:
        r"""Measures what rounding costs: the largest deviation from a network of floats.

        Arguments:
            layers: The network that this one was made of.
            x: Integer inputs, with shape :math:`(*, D)`.
            input_scale: The scale that it was made with.

        Returns:
            The largest absolute difference of an output, taken as a real number.
        """
        h = x.double().cpu() * torch.as_tensor(input_scale, dtype=torch.float64).cpu()
        for linear, limit in zip(*_pattern(layers), strict=True):
            W, b = _real(linear)
            h = h @ W.T + b
            h = h if limit is None else h.clamp(0, limit)
        own = self(x).cpu().double() * 2.0**-self.fraction_bits
        return (own - h).abs().max().item() if h.numel() else 0.0

    def arrays(self) -> dict[str, np.ndarray]:
        r"""Returns the network as integer arrays, for a file."""
        state = {name: buffer.cpu().numpy() for name, buffer in self.named_buffers()}
        bits = np.array([self.input_bits, self.fraction_bits], dtype=np.int64)
        return {**state, "tops": np.array(self.tops, dtype=np.int64), "bits": bits}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "IntegerNetwork":
        r"""Makes the network of :meth:`arrays`.

        Raises:
            ValueError: If the arrays are not those of a network.
        """
        depth = len(arrays["tops"]) + 1 if "tops" in arrays else 0
        names = {f"{name}_{layer}" for name in _PARTS for layer in range(depth)}
        names |= {"tops", "bits"}
        found = {name: (array.dtype.str[1:], array.ndim) for name, array in arrays.items()}
        plain = [found.get("tops"), found.get("bits")] == [("i8", 1)] * 2
        if arrays.keys() != names or not plain or len(arrays["bits"]) != 2:
            raise ValueError(f"expected the arrays of an integer network, got {found}")
        input_bits, fraction_bits = arrays["bits"].tolist()
        weights, biases, shifts = (
            [arrays[f"{name}_{layer}"] for layer in range(depth)] for name in _PARTS
        )
        return cls(
            weights,
            biases,
            shifts,
            arrays["tops"].tolist(),
            input_bits=input_bits,
            fraction_bits=fraction_bits,
        )

    @property
    def digest(self) -> str:
        r"""The SHA-256 of the network, which names it."""
        arrays = self.arrays()
        return digest(*(arrays[name] for name in sorted(arrays)))

    def _part(self, name: str, layer: int) -> Tensor:
        return self.get_buffer(f"{name}_{layer}")


class IntegerParameters(nn.Module):
    r"""Creates the network of a stage from an integer network, for exact coding.

    Context and earlier values, all integers, are flattened and joined in this order. The
    outputs are the parameters in units of :math:`2^{-F}`.

    Arguments:
        network: The integer network.

    Example:
        >>> network = IntegerNetwork.from_module(nn.Sequential(nn.Linear(3, 5)))
        >>> parameters = IntegerParameters(network)
        >>> parameters(torch.ones(7, 3), torch.zeros(7, 0)).shape
        torch.Size([7, 5])
    """

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__()
        self.network = network

    @property
    def fraction_bits(self) -> int:
        r"""The fraction bits :math:`F` of a parameter."""
        return self.network.fraction_bits

    def integers(self, context: Tensor, earlier: Tensor) -> Tensor:
        r"""Computes the parameters as int64, with shape :math:`(B, P)`."""
        return self.network(torch.cat([context.flatten(1).double(), earlier.double()], dim=1))

    def forward(self, context: Tensor, earlier: Tensor) -> Tensor:
        dtype = earlier.dtype if earlier.is_floating_point() else torch.get_default_dtype()
        integers = self.integers(context, earlier)
        return (integers.double() * 2.0**-self.fraction_bits).to(dtype)


def _pattern(layers: nn.Module) -> tuple[list[nn.Linear], list[float | None]]:
    r"""Takes a network apart: linear layers, and the upper limit of what follows each."""
    modules = list(layers) if isinstance(layers, nn.Sequential) else [layers]
    linears = [module for module in modules[::2] if isinstance(module, nn.Linear)]
    limits = [_limit(module) for module in modules[1::2]]
    if len(linears) != len(limits) + 1 or None in limits:
        names = ", ".join(type(module).__name__ for module in modules)
        raise TypeError(
            "expected an nn.Sequential of Linear layers with one ReLU or Hardtanh(0, c) between "
            f"each two, got {names or 'none'}"
        )
    return linears, [*limits, None]


def _limit(module: nn.Module) -> float | None:
    if isinstance(module, nn.ReLU):
        return math.inf
    if isinstance(module, nn.Hardtanh) and module.min_val == 0:
        return float(module.max_val)
    return None


def _real(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    r"""Returns weights and biases in double precision."""
    W = linear.weight.detach().double().cpu()
    b = W.new_zeros(len(W)) if linear.bias is None else linear.bias.detach().double().cpu()
    if not bool(W.isfinite().all() and b.isfinite().all()):
        raise ValueError("expected finite parameters, got nan or inf; train the network again")
    return W, b


def _exponents(
    W: np.ndarray, b: np.ndarray, most: float, fraction: int, wanted: int, sum_bits: int
) -> np.ndarray:
    r"""Finds for each row the power of two that brings it to most bits without overflow."""
    largest = np.abs(W).max(1, initial=0.0)
    most_bits = np.floor(np.log2(_WEIGHT / np.where(largest > 0, largest, 2.0**-60)))
    exponent = np.minimum(most_bits, wanted - fraction + _SPARE).astype(np.int64)
    total = np.abs(W).sum(1) * most + np.abs(b) * 2.0**fraction
    over = np.ldexp(total, exponent) / 2.0 ** (sum_bits - 2)  # half of it for rounding to integers
    return exponent - np.maximum(np.ceil(np.log2(np.maximum(over, 1.0))), 0).astype(np.int64)


def _check_layers(
    weights: Sequence[np.ndarray],
    biases: Sequence[np.ndarray],
    shifts: Sequence[np.ndarray],
    tops: Sequence[int],
    input_bits: int,
    fraction_bits: int,
) -> None:
    depth = len(weights)
    if not len(biases) == len(shifts) == len(tops) + 1 == depth >= 1:
        raise ValueError(
            "expected as many weights, biases and shifts, and one top less, "
            f"got {depth}, {len(biases)}, {len(shifts)} and {len(tops)}"
        )
    if not (0 <= input_bits <= 32 and 0 <= fraction_bits <= 32):
        raise ValueError(f"expected 0 to 32 bits, got {input_bits} and {fraction_bits}")
    most, features = 2**input_bits - 1, None
    for W, b, s, top in zip(weights, biases, shifts, [*tops, 0], strict=True):
        types = W.dtype, b.dtype, s.dtype
        sound = types == (np.int16, np.int64, np.int64) and W.ndim == 2 and W.size > 0
        sound = sound and b.shape == s.shape == W.shape[:1] and features in (None, W.shape[1])
        if not sound:
            raise ValueError(
                "expected layers of int16 weights (V, D), int64 biases (V,) and shifts (V,), "
                f"got {W.shape}, {b.shape} and {s.shape} of {', '.join(map(str, types))}"
            )
        if s.min() < 0 or s.max() > 52 or not 0 <= top < _EXACT:
            raise ValueError(
                f"expected shifts from 0 to 52 and tops from 0, got {s.min()} to {s.max()}, {top}"
            )
        bound = max(
            sum(map(abs, row)) * most + abs(bias) + (1 << shift >> 1)
            for row, bias, shift in zip(W.tolist(), b.tolist(), s.tolist(), strict=True)
        )
        if bound >= _EXACT:
            raise ValueError(f"expected sums below 2^53, got up to {bound}; use fewer bits")
        most, features = top, len(b)
