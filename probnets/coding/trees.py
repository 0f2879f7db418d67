r"""The model of images as one quad tree of residuals, however large."""

__all__ = ["TreeModel", "image_tree", "root_level"]

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from probnets.backend.checkpoints import digest, read_model, write
from probnets.circuits import DiscretisedLogistic, Tree, TreeCircuit
from probnets.circuits.integertables import integer_logistic

from .tables import TOTAL, CodeTables, _cumulative

FORMAT = 1
CHANNELS = 3
SHIFT = 255  # what is added to a residual
VALUES = 511  # residuals of eight bits

_NAMES: tuple[str, ...] = ("roots", "sums", "means", "log_scales")
_FRACTION = 12  # fraction bits of means and of logarithms of scales


@dataclass(frozen=True, eq=False)
class TreeModel:
    r"""Creates a model of images of any size from the integer parameters of a quad tree.

    The variables are residuals :math:`r`, what least squares leave of an image, from
    :func:`~probnets.coding.treeresiduals.image_residuals`. Each block of the quad tree (see
    :func:`image_tree`) has a hidden state, which says how rough the image is there, and the
    residuals of a pixel have discretised logistic distributions :math:`p_c` given its state,

    .. math:: p(r) = \sum_z \pi(z_0) \prod_{b \neq 0} A_{l(b)}(z_b \mid z_{p(b)})
        \prod_{v, c} p_c(r_{vc} \mid z_v) .

    The matrices :math:`A_l` depend on the level of a block alone. Levels beyond those that were
    learnt take the last matrix, so that a few thousand parameters give a circuit for every
    size, with :meth:`circuit`. In it likelihoods, marginals, conditionals and samples are exact
    and take time linear in the number of pixels. They are those of residuals: given the pixels
    before it the residual of a pixel tells its value, but without those there is no such
    marginal of a pixel.

    Arguments:
        roots: The distribution of the state of a block by its level, in units of
            :math:`2^{-24}`, of int32 with shape :math:`(L + 1, K)`. Higher ones take the last.
        sums: The matrices :math:`A_l` by the level of the lower block, in the same units, of
            int32 with shape :math:`(L, K, K)`.
        means: The means of the residuals of :math:`G`, :math:`R - G` and :math:`B - G`, with
            255 added, in units of :math:`2^{-12}`, of int32 with shape :math:`(3, K)`.
        log_scales: The natural logarithms of their scales, in the same units and shape.

    Raises:
        ValueError: If the parameters do not fit together.

    Example:
        >>> inputs = DiscretisedLogistic(3, units=4, values=511)
        >>> model = TreeModel.from_circuit(TreeCircuit(image_tree(8, 8), inputs, shape=(8, 8, 3)))
        >>> model.circuit(40, 60).log_prob(torch.full((40, 60, 3), 255)).shape
        torch.Size([])
    """

    roots: np.ndarray
    sums: np.ndarray
    means: np.ndarray
    log_scales: np.ndarray

    def __post_init__(self) -> None:
        L, K = self.roots.shape[0] - 1, self.roots.shape[-1]
        shapes = [a.shape for a in self._arrays()]
        if shapes != [(L + 1, K), (L, K, K), (CHANNELS, K), (CHANNELS, K)] or min(L, K) < 1:
            raise ValueError(
                "expected parameters with shapes (L + 1, K), (L, K, K), (3, K) and (3, K), "
                f"got {shapes}"
            )
        if any(a.dtype != np.int32 for a in self._arrays()):
            raise ValueError("expected parameters of int32")
        for part in (self.roots, self.sums):
            if part.min() < 0 or (part.sum(-1) != TOTAL).any():
                raise ValueError("expected probabilities in units of 2^-24, got others")

    @classmethod
    def from_circuit(cls, circuit: TreeCircuit) -> "TreeModel":
        r"""Rounds a circuit to integers.

        Arguments:
            circuit: A circuit over the :func:`image_tree` of its shape :math:`(H, W, 3)`, whose
                inputs are discretised logistics of 511 values.

        Raises:
            ValueError: If it is another.
        """
        inputs, shape, tree = circuit.inputs, tuple(circuit.shape), circuit.tree
        fits = len(shape) == 3 and shape[2] == CHANNELS and max(shape[:2]) > 1
        if not fits or not _same(tree, image_tree(shape[0], shape[1])):
            raise ValueError(
                f"expected a circuit over image_tree(H, W) with shape (H, W, 3), got {circuit}"
            )
        if not isinstance(inputs, DiscretisedLogistic) or inputs.values != VALUES:
            raise ValueError(f"expected DiscretisedLogistic of {VALUES} values, got {inputs}")
        tables = CodeTables.from_circuit(circuit)
        rows = [tables.root / TOTAL]
        for matrix in tables.sums[::-1]:
            rows.append(rows[-1] @ (matrix / TOTAL))
        units = 1 << _FRACTION
        means, log_scales = (
            (parameter.detach().double().cpu().numpy() * units).round().astype(np.int32)
            for parameter in (inputs.mean, inputs.log_scale)
        )
        roots = np.diff(_cumulative(np.stack(rows[::-1])))
        return cls(roots, tables.sums, means, log_scales)

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.roots, self.sums, self.means, self.log_scales

    @property
    def kind(self) -> Literal["tree"]:
        r"""What the circuit models."""
        return "tree"

    @property
    def units(self) -> int:
        r"""The number of states of a block :math:`K`."""
        return self.roots.shape[1]

    @property
    def levels(self) -> int:
        r"""The number of different sum matrices :math:`L`."""
        return len(self.sums)

    @property
    def parameters(self) -> int:
        r"""The number of free parameters."""
        K = self.units
        return (K - 1) * (1 + self.levels * K) + 2 * CHANNELS * K

    @cached_property
    def cumulative(self) -> np.ndarray:
        r"""The cumulative distributions of residuals, with shape :math:`(3, 512, K)`, int32.

        They are computed in integers, so that they are the same on every machine.
        """
        table = integer_logistic(self.means, self.log_scales, VALUES, fraction_bits=_FRACTION)
        return np.ascontiguousarray(table.swapaxes(1, 2)).astype(np.int32)

    @cached_property
    def modes(self) -> np.ndarray:
        r"""The value that most states find most probable, by channel, with shape (3,)."""
        return np.diff(self.cumulative, axis=1).sum(-1, dtype=np.int64).argmax(1)

    @cached_property
    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        r"""The sum matrices and their transposes as float64, flat."""
        sums = self.sums.astype(np.float64)
        return sums.ravel(), np.ascontiguousarray(sums.swapaxes(1, 2)).ravel()

    @cached_property
    def digest(self) -> bytes:
        r"""The first bytes of a hash of the parameters, by which streams name a model."""
        facts = f"{self.kind} {FORMAT} {digest(*self._arrays())}"
        return hashlib.sha256(facts.encode()).digest()[:4]

    def __repr__(self) -> str:
        return (
            f"TreeModel({self.digest.hex()}, kind={self.kind!r}, units={self.units}, "
            f"levels={self.levels})"
        )

    def root(self, level: int) -> np.ndarray:
        r"""Returns the distribution of the state of a block of a level, with shape (K,)."""
        return self.roots[min(level, self.levels)]

    def tables(self, height: int, width: int, *, channels: int = CHANNELS) -> CodeTables:
        r"""Returns the integer tables of images of a size.

        Arguments:
            height: The height :math:`H` in pixels.
            width: The width :math:`W` in pixels.
            channels: The number of channels, of which the first come. The others are summed
                out.
        """
        tree = image_tree(height, width, channels=channels, levels=self.levels)
        root = self.root(root_level(height, width))
        return CodeTables(tree, root, self.sums[: tree.sums], self.cumulative[:channels])

    def circuit(self, height: int, width: int, *, channels: int = CHANNELS) -> TreeCircuit:
        r"""Returns the circuit of the residuals of images of a size, to ask things of.

        Its values are residuals with 255 added, in the order :math:`G`, :math:`R - G`,
        :math:`B - G`. The code of an image is as long as they are unlikely, but for rounding:
        it gives every value a probability of :math:`2^{-24}` or more.

        Arguments:
            height: The height :math:`H` in pixels.
            width: The width :math:`W` in pixels.
            channels: The number of channels: 3, or 1 for a grey image.

        Returns:
            A circuit with shape :math:`(H, W, C)`.
        """
        tables = self.tables(height, width, channels=channels)
        inputs = DiscretisedLogistic(channels, self.units, VALUES)
        circuit = TreeCircuit(tables.tree, inputs, shape=(height, width, channels))
        with torch.no_grad():
            for logits, counts in (
                (circuit.root_logits, tables.root),
                (circuit.sum_logits, tables.sums),
            ):
                logits.copy_(torch.from_numpy(counts.astype(np.float64)).log())
            inputs.mean.copy_(torch.from_numpy(self.means[:channels] / (1 << _FRACTION)))
            inputs.log_scale.copy_(torch.from_numpy(self.log_scales[:channels] / (1 << _FRACTION)))
        return circuit

    def save(self, path: str | Path) -> None:
        r"""Writes the model to a safetensors file, whole or not at all.

        Arguments:
            path: The file.
        """
        arrays = dict(zip(_NAMES, self._arrays(), strict=True))
        write(path, arrays, {"format": FORMAT, "what": "tree model"})

    @classmethod
    def load(cls, path: str | Path) -> "TreeModel":
        r"""Reads a model from a file.

        Arguments:
            path: The file.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If it is not the file of a tree model.
        """
        arrays, _ = read_model(path, "tree model", FORMAT)
        try:
            return cls(*(arrays[name] for name in _NAMES))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"expected a sound model in {path}: {error}") from None


def root_level(height: int, width: int) -> int:
    r"""Returns the level of the smallest block that holds an image.

    Arguments:
        height: The height in pixels.
        width: The width in pixels.

    Example:
        >>> root_level(5, 8)
        3
    """
    return (max(height, width) - 1).bit_length()


def image_tree(
    height: int, width: int, *, channels: int = CHANNELS, levels: int | None = None
) -> Tree:
    r"""Builds the quad tree of an image whose regions of one level share a sum matrix.

    A region of level :math:`l` is a block of :math:`2^l \times 2^l` pixels, and has up to four
    blocks of the level below. The root is the smallest block that holds the image in its upper
    left. Blocks without a pixel of the image are left out, so that the circuit is that of a
    larger image with the rest summed out. The channels of a pixel hang on its region, which has
    level 0. Regions lie along a Morton curve.

    :func:`probnets.circuits.quad_tree` halves sides evenly instead, so that its levels would
    stand for something else in images of another size.

    Arguments:
        height: The height :math:`H` in pixels.
        width: The width :math:`W` in pixels.
        channels: The number of channels :math:`C`, which have an input distribution each.
        levels: The number of different sum matrices. The highest levels share the last. By
            default each level has its own.

    Example:
        >>> image_tree(5, 8, channels=1)
        Tree(regions=57, variables=40, sums=3, inputs=1, depth=3)
    """
    if min(height, width, channels) < 1 or (levels is not None and levels < 1):
        raise ValueError(
            "expected a height, a width, channels and levels of at least 1, "
            f"got {height}, {width}, {channels} and {levels}"
        )
    top = root_level(height, width)
    rows = [np.arange(0, height, 1 << level) for level in range(top + 1)]
    columns = [np.arange(0, width, 1 << level) for level in range(top + 1)]

    # In depth-first order blocks follow their corners on the curve, the largest first.
    keys = [
        (2 * _spread(row)[:, None] + _spread(column)) * (top + 1) + top - level
        for level, (row, column) in enumerate(zip(rows, columns, strict=True))
    ]
    rank = np.concatenate([key.ravel() for key in keys]).argsort().argsort()
    ends = np.cumsum([key.size for key in keys])[:-1]
    number = [part.reshape(k.shape) for part, k in zip(np.split(rank, ends), keys, strict=True)]

    parent, group = np.full(rank.size, -1), np.full(rank.size, -1)
    for level, below in enumerate(number[:-1]):
        row, column = (np.arange(n) >> 1 for n in below.shape)
        parent[below] = number[level + 1][row[:, None], column]
        group[below] = level if levels is None else min(level, levels - 1)
    region = number[0].ravel().repeat(channels)
    inputs = np.tile(np.arange(channels), height * width)
    return Tree(parent, region, group, inputs, origin=np.arange(rank.size))


def _spread(n: np.ndarray) -> np.ndarray:
    r"""Puts the bits of numbers at the even places."""
    return sum(((n >> bit & 1) << 2 * bit for bit in range(31)), np.zeros_like(n))


def _same(a: Tree, b: Tree) -> bool:
    r"""Tells whether trees are the same up to the numbers of their regions' origins."""
    names = ("parent", "region", "sum_group", "input_group")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
