r"""Circuits in integers, whose code is the same on every machine."""

__all__ = ["TOTAL", "CodeTables"]

import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from probnets.backend.checkpoints import digest
from probnets.circuits import Discrete, Tree, TreeCircuit

from .rangecoder import PRECISION

TOTAL = 1 << PRECISION


@dataclass(frozen=True, eq=False)
class CodeTables:
    r"""Creates the integer tables that a circuit codes with.

    Probabilities are multiples of :math:`2^{-24}`, and messages integers of `bits` bits, so
    that every sum of their products is an integer below :math:`2^{53}`. Such a sum is exact in
    float64, in any order, fused or not, on a CPU or a GPU.

    Arguments:
        tree: The tree.
        root: The distribution of the root's unit, with shape :math:`(K,)`, summing to
            :math:`2^{24}`.
        sums: The sum matrices, with shape :math:`(G, K, K)`, rows summing to :math:`2^{24}`.
        cumulative: The cumulative input distributions, with shape :math:`(H, X + 1, K)`. They
            rise by one or more from 0 to :math:`2^{24}`, so that every value has a code.
    """

    tree: Tree
    root: np.ndarray
    sums: np.ndarray
    cumulative: np.ndarray

    def __post_init__(self) -> None:
        K, X = self.root.size, self.cumulative.shape[1] - 1 if self.cumulative.ndim == 3 else 0
        shapes = (self.root.shape, self.sums.shape, self.cumulative.shape)
        expected = ((K,), (self.tree.sums, K, K), (self.tree.inputs, X + 1, K))
        if shapes != expected or any(a.dtype != np.int32 for a in self._arrays()):
            raise ValueError(f"expected int32 tables with shapes {expected}, got {shapes}")
        steps = np.diff(self.cumulative.astype(np.int64), axis=1)
        sound = (
            min(X, K) >= 1
            and self.root.min() >= 0
            and self.root.sum() == TOTAL
            and (self.sums.size == 0 or self.sums.min() >= 0)
            and bool((self.sums.sum(-1) == TOTAL).all())
            and not self.cumulative[:, 0].any()
            and bool((self.cumulative[:, -1] == TOTAL).all())
            and steps.min() >= 1
        )
        if not sound:
            raise ValueError("expected tables of probabilities in units of 2^-24, got others")

    @classmethod
    def from_circuit(cls, circuit: TreeCircuit) -> "CodeTables":
        r"""Rounds the probabilities of a circuit with discrete inputs.

        Raises:
            TypeError: If the inputs have a density instead of probabilities.
            ValueError: If there are too many values or the parameters are not finite numbers.
        """
        own = copy.deepcopy(circuit).cpu().double()  # whatever its dtype, and wherever it is
        if not isinstance(own.inputs, Discrete):
            kind = type(own.inputs).__name__
            raise TypeError(f"expected discrete inputs to code with, got {kind}")
        if own.inputs.values > TOTAL >> 8:
            raise ValueError(
                f"expected at most {TOTAL >> 8} values, got {own.inputs.values}; "
                "split them into bytes"
            )
        with torch.no_grad():
            parts = own.log_root(), own.log_sums(), own.inputs.log_table()
            root, sums, inputs = (part.exp().numpy() for part in parts)
        if not all(np.isfinite(part).all() for part in (root, sums, inputs)):
            raise ValueError("expected finite parameters, got nan; train the circuit again")
        cumulative = _cumulative(inputs.transpose(0, 2, 1), floor=1).transpose(0, 2, 1)
        return cls(
            circuit.tree,
            np.diff(_cumulative(root)),
            np.diff(_cumulative(sums)),
            np.ascontiguousarray(cumulative),
        )

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.root, self.sums, self.cumulative

    @property
    def units(self) -> int:
        r"""The number of units :math:`K`."""
        return self.root.size

    @property
    def values(self) -> int:
        r"""The number of values :math:`X` of a variable."""
        return self.cumulative.shape[1] - 1

    @property
    def bits(self) -> int:
        r"""The bits of a message: K of them sum to at most 29 bits, and times 24 to 53."""
        return 29 - (self.units - 1).bit_length()

    @cached_property
    def digest(self) -> bytes:
        r"""The SHA-256 of tree and tables, which names the model."""
        tree = self.tree
        parts = (tree.parent, tree.region, tree.sum_group, tree.input_group, *self._arrays())
        return bytes.fromhex(digest(*(np.asarray(part, dtype=np.int32) for part in parts)))

    @cached_property
    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        r"""The sum matrices and their transposes as float64, flat."""
        sums = self.sums.astype(np.float64)
        return sums.ravel(), np.ascontiguousarray(sums.transpose(0, 2, 1)).ravel()

    @cached_property
    def modes(self) -> np.ndarray:
        r"""The value that most units together find most probable, with shape :math:`(H,)`."""
        return np.diff(self.cumulative, axis=1).sum(-1, dtype=np.int64).argmax(1)


def _cumulative(probs: np.ndarray, *, floor: int = 0) -> np.ndarray:
    r"""Rounds cumulative sums along the last axis so that each step has at least `floor` units."""
    count = probs.shape[-1]
    total = np.cumsum(probs, axis=-1)
    total /= total[..., -1:]
    spread = np.floor(total * (TOTAL - floor * count) + 0.5)
    steps = np.arange(1, count + 1) * floor
    whole = np.zeros((*probs.shape[:-1], count + 1), dtype=np.int32)
    whole[..., 1:] = spread + steps
    return whole
