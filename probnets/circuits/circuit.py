r"""The tree circuit: likelihoods, gradients and the way to every query."""

__all__ = ["TreeCircuit"]

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from probnets.backend import compiled, log_matmul

from .estep import Tables, expected_counts
from .inputs import Discrete, Input
from .structure import Tree


class TreeCircuit(nn.Module):
    r"""Creates a probabilistic circuit over a rooted tree of regions.

    Region :math:`r` has `K` units, each the product of what its children send up,

    .. math:: \beta_{rk} = \prod_{v \in r} p(x_v \mid k) \prod_{c \in \text{children}(r)}
        \sum_j A_{ckj} \beta_{cj} \qquad p(x) = \sum_k \pi_k \beta_{0k} ,

    so that the units are the states of a latent variable, and the circuit is a latent tree
    model. Hidden Markov chains, hidden Chow-Liu trees and quad trees are all of this kind.
    Every query is exact and takes one pass up the tree and one down.

    Values may be missing anywhere: they are NaN, or ``observed`` is false there.

    References:
        | Tractable Regularization of Probabilistic Circuits (Liu & Van den Broeck, 2021)
        | https://arxiv.org/abs/2106.02264

    Arguments:
        tree: The tree, with `R` regions, :math:`D` variables and `G` different sum matrices.
        inputs: The input distributions, with as many groups as the tree names.
        shape: The shape of an observation, of :math:`D` elements. By default :math:`(D,)`.

    Example:
        >>> tree = chain(5)
        >>> circuit = TreeCircuit(tree, Categorical(tree.inputs, units=4, values=3))
        >>> circuit.log_prob(torch.tensor([[0, 1, 2, 1, 0]])).shape
        torch.Size([1])
        >>> circuit.log_prob(torch.full((5,), math.nan)).item()  # all values missing
        0.0
    """

    def __init__(self, tree: Tree, inputs: Input, *, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        if inputs.groups != tree.inputs:
            raise ValueError(f"expected {tree.inputs} groups of inputs, got {inputs.groups}")
        self.tree = tree
        self.shape = torch.Size([tree.variables] if shape is None else shape)
        if self.shape.numel() != tree.variables:
            raise ValueError(f"expected a shape of {tree.variables} elements, got {shape}")

        K = inputs.units
        like = next(inputs.parameters())
        self.inputs = inputs
        self.root_logits = nn.Parameter(torch.zeros_like(like[..., 0].flatten()[:1].expand(K)))
        self.sum_logits = nn.Parameter(
            torch.randn(tree.sums, K, K, dtype=like.dtype, device=like.device)
        )

    @property
    def units(self) -> int:
        r"""The number of units per region :math:`K`."""
        return self.inputs.units

    def extra_repr(self) -> str:
        return f"{self.tree}, units={self.units}, shape={tuple(self.shape)}"

    def log_root(self) -> Tensor:
        r"""Computes the log-distribution of the root's unit, with shape :math:`(K,)`."""
        return self.root_logits.log_softmax(-1)

    def log_sums(self) -> Tensor:
        r"""Computes the log of the sum matrices, with shape :math:`(G, K, K)`."""
        return self.sum_logits.log_softmax(-1)

    @torch.no_grad()
    def tables(self) -> Tables:
        r"""Returns all probabilities as float32 arrays, for compiled loops.

        Raises:
            TypeError: If the inputs are not discrete.
        """
        if not isinstance(self.inputs, Discrete):
            raise TypeError(f"expected discrete inputs, got {type(self.inputs).__name__}")
        parts = self.log_root(), self.log_sums(), self.inputs.log_table()
        return Tables(*(np.ascontiguousarray(p.exp().float().cpu().numpy()) for p in parts))

    # ------------------------------------------------------------------------------------------
    # Data

    def prepare(self, x: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor, torch.Size]:
        r"""Checks observations and flattens them.

        Arguments:
            x: The observations, with shape :math:`(*, D)` or the circuit's shape after `*`.
            observed: Which values are observed, with a shape that expands to that of `x`.

        Returns:
            Values with shape :math:`(B, D)`, zero where missing; which of them are observed;
            and the batch shape `*`.

        Raises:
            ValueError: If the shape is wrong or an observed value is out of range.
        """
        event = next(
            (s for s in (self.shape, torch.Size([self.tree.variables])) if x.shape[-len(s) :] == s),
            None,
        )
        if event is None:
            raise ValueError(f"expected x with shape (*, {str(tuple(self.shape))[1:-1]}), "
                             f"got {tuple(x.shape)}")  # fmt: skip
        batch = x.shape[: x.ndim - len(event)]

        seen = torch.ones_like(x, dtype=torch.bool)
        if observed is not None:
            try:
                seen = observed.bool().to(x.device).expand(x.shape)
            except RuntimeError:
                raise ValueError(
                    f"expected observed to expand to {tuple(x.shape)}, got {tuple(observed.shape)}"
                ) from None
        if x.is_floating_point():
            seen = seen & ~x.isnan()

        self.inputs.check(x[seen])
        D = self.tree.variables
        x = x.masked_fill(~seen, 0)
        return x.reshape(-1, D), seen.reshape(-1, D), batch

    # ------------------------------------------------------------------------------------------
    # Likelihood

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        r"""Computes the log-likelihood of observations, missing values summed out.

        The PyTorch passes define the result. Without gradient, float32 circuits with discrete
        inputs take a compiled loop on the CPU, with equal results up to rounding.

        Arguments:
            x: The observations :math:`x`, with shape :math:`(*, D)` or the circuit's shape.
            observed: Which values are observed. By default all that are not NaN.

        Returns:
            The log-likelihoods, with shape :math:`(*)`.
        """
        x, seen, batch = self.prepare(x, observed)
        if self.root_logits.dtype == torch.float32 and compiled(x, *self.parameters()):
            if isinstance(self.inputs, Discrete):
                return self._log_prob_compiled(x, seen).view(batch)
        return self.log_prob_torch(x, seen).view(batch)

    def log_prob_torch(self, x: Tensor, seen: Tensor) -> Tensor:
        r"""Computes the log-likelihood of prepared observations by PyTorch."""
        beta, _ = self.upward(self.local(x, seen))
        return torch.logsumexp(beta[0] + self.log_root(), dim=-1)

    def _log_prob_compiled(self, x: Tensor, seen: Tensor) -> Tensor:
        rows = np.where(seen.numpy(), x.numpy(), -1).astype(np.int16 if self._small() else np.int32)
        counts = expected_counts(
            self.tree,
            self.tables(),
            rows,
            np.ones(len(rows), np.float32),
            workers=torch.get_num_threads() if len(rows) > 256 else 1,
            counting=False,
        )
        return torch.from_numpy(counts.log_prob).float()

    def _small(self) -> bool:
        return isinstance(self.inputs, Discrete) and self.inputs.values <= 2**15

    def local(self, x: Tensor, seen: Tensor) -> Tensor:
        r"""Computes what the inputs send up, with shape :math:`(B, D, K)`."""
        group = torch.from_numpy(self.tree.input_group.copy()).to(x.device)
        log_prob = self.inputs.log_prob(x, group)
        return torch.where(seen[..., None], log_prob, 0.0)

    def upward(self, local: Tensor, log_sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes log-likelihoods up the tree.

        Arguments:
            local: What the inputs send up, with shape :math:`(B, D, K)`.
            log_sums: The log of the sum matrices. By default the circuit's own.

        Returns:
            The log-likelihood :math:`\beta` of each unit given what lies below, and the message
            that each region sends to its parent, both with shape :math:`(R, B, K)`. The root's
            message is zero.
        """
        R, (B, _, K) = self.tree.regions, local.shape
        parent, region, group = self.indices(local.device)
        beta = local.new_zeros(R, B, K).index_add_(0, region, local.transpose(0, 1))
        sums = (self.log_sums() if log_sums is None else log_sums).exp()

        order, messages = [torch.zeros_like(parent[:1])], [local.new_zeros(1, B, K)]
        for level in self.levels(self.tree.height, local.device):
            message = log_matmul(beta[level], sums[group[level]])
            beta.index_add_(0, parent[level], message)
            order.append(level)
            messages.append(message)
        return beta, torch.cat(messages)[torch.cat(order).argsort()]

    def levels(self, key: np.ndarray, device: torch.device) -> list[Tensor]:
        r"""Groups all regions but the root by a key, in rising order of it."""
        key = key[1:]
        return [
            torch.from_numpy(np.flatnonzero(key == k) + 1).to(device) for k in np.unique(key)
        ]

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        r"""Returns parents, regions and sum groups of the tree as tensors."""
        tree = self.tree
        parts = (tree.parent, tree.region, tree.sum_group)
        parent, region, group = (torch.from_numpy(p.copy()).to(device) for p in parts)
        return parent, region, group

    def bits_per_dimension(self, x: Tensor, observed: Tensor | None = None) -> float:
        r"""Computes the mean ideal code length per variable, in bits.

        Arguments:
            x: The observations, as in :meth:`log_prob`.
            observed: Which values are observed.
        """
        with torch.no_grad():
            total = -self.log_prob(x, observed).double().mean().item()
        return total / (self.tree.variables * math.log(2))
