r"""The tree circuit: likelihoods, gradients and the way to every query."""

__all__ = ["TreeCircuit"]

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from probnets.backend import compiled, log_matmul

from .estep import Tables, expected_counts
from .inputs import Categorical, Discrete, Input
from .levels import by_level
from .structure import Tree

# Types for which PyTorch lacks operations.
_RARE = (torch.bool, torch.uint16, torch.uint32, torch.uint64)


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
        >>> from probnets.circuits import Categorical, chain
        >>> tree = chain(5)
        >>> circuit = TreeCircuit(tree, Categorical(tree.inputs, units=4, values=3))
        >>> circuit.log_prob(torch.tensor([[0, 1, 2, 1, 0]])).shape
        torch.Size([1])
        >>> nothing = torch.full((5,), math.nan)
        >>> f"{circuit.log_prob(nothing).exp().item():.3f}"  # all values missing
        '1.000'
    """

    # The arrays of the tree, which follow the circuit to its device.
    parent: Tensor  # (R,)
    region: Tensor  # (D,)
    sum_group: Tensor  # (R,)
    input_group: Tensor  # (D,)

    # Regions by height and by depth, and the place of each one's parent in its level.
    rising: Tensor  # (R,)
    rising_place: Tensor  # (R,)
    falling: Tensor  # (R,)
    falling_place: Tensor  # (R,)

    def __init__(self, tree: Tree, inputs: Input, *, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        if inputs.groups != tree.inputs:
            raise ValueError(f"expected {tree.inputs} groups of inputs, got {inputs.groups}")
        self.tree = tree
        self.shape = torch.Size([tree.variables] if shape is None else shape)
        if self.shape.numel() != tree.variables:
            raise ValueError(f"expected a shape of {tree.variables} elements, got {shape}")

        K = inputs.units
        like = next(inputs.parameters(), torch.empty(0))
        self.inputs = inputs
        self.root_logits = nn.Parameter(torch.zeros(K, dtype=like.dtype, device=like.device))
        self.sum_logits = nn.Parameter(
            torch.randn(tree.sums, K, K, dtype=like.dtype, device=like.device)
        )

        rising, falling = by_level(tree, tree.height), by_level(tree, tree.depth)
        self._rising_runs, self._falling_runs = rising.runs, falling.runs
        arrays = {
            "parent": tree.parent,
            "region": tree.region,
            "sum_group": tree.sum_group,
            "input_group": tree.input_group,
            "rising": rising.order,
            "rising_place": rising.place,
            "falling": falling.order,
            "falling_place": falling.place,
        }
        for name, array in arrays.items():
            index = torch.tensor(array, device=like.device)
            self.register_buffer(name, index, persistent=False)

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
        parts, scale = [self.log_root(), self.log_sums(), self.inputs.log_table()], None
        if not isinstance(self.inputs, Categorical):  # tails that float32 does not reach
            top = parts[2].amax(dim=2, keepdim=True)
            parts[2] = parts[2] - top.masked_fill(top.isneginf(), 0.0)
            scale = top[..., 0].double().cpu().numpy()
        arrays = [np.ascontiguousarray(p.exp().float().cpu().numpy()) for p in parts]
        return Tables(*arrays, log_scale=scale)

    # ------------------------------------------------------------------------------------------
    # Data

    def prepare(
        self, x: Tensor, observed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, torch.Size]:
        r"""Checks observations and flattens them.

        Arguments:
            x: The observations, with shape :math:`(*, D)` or the circuit's shape after `*`.
            observed: Which values are observed: with shape :math:`(D,)` or the circuit's, after
                dimensions that expand to `*`, or with a shape that expands to that of `x`.

        Returns:
            Values with shape :math:`(B, D)`, zero where missing; which of them are observed;
            and the batch shape `*`.

        Raises:
            ValueError: If the shape is wrong or an observed value is out of range.
        """
        if x.is_complex():
            raise ValueError(f"expected real numbers, got {x.dtype}")
        if x.dtype in _RARE:
            x = x.long()
        values = self._flatten(x)
        if values is None:
            event = ", ".join(map(str, self.shape))
            raise ValueError(f"expected x with shape (*, {event}), got {tuple(x.shape)}")

        seen = torch.ones_like(values, dtype=torch.bool)
        if observed is not None:
            seen = self._expand(observed.to(device=x.device, dtype=torch.bool), x, values)
        if x.is_floating_point():
            seen = seen & ~values.isnan()

        D = self.tree.variables
        batch = values.shape[:-1]
        self.inputs.check(values[seen])
        return values.masked_fill(~seen, 0).reshape(-1, D), seen.reshape(-1, D), batch

    def _flatten(self, x: Tensor) -> Tensor | None:
        r"""Flattens observations to (*, D), or returns None if their shape is another."""
        D = self.tree.variables
        for event in (self.shape, torch.Size([D])):
            batch = x.ndim - len(event)
            if batch >= 0 and x.shape[batch:] == event:
                return x.reshape(*x.shape[:batch], D)
        return None

    def _expand(self, observed: Tensor, x: Tensor, values: Tensor) -> Tensor:
        flat = self._flatten(observed)
        try:
            if flat is None:
                return observed.expand(x.shape).reshape(values.shape)
            return flat.expand(values.shape)
        except RuntimeError:
            raise ValueError(
                f"expected a mask that expands to {tuple(x.shape)}, got {tuple(observed.shape)}"
            ) from None

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
        single = self.root_logits.dtype == torch.float32
        if single and isinstance(self.inputs, Discrete) and compiled(x, seen, *self.parameters()):
            return self._log_prob_compiled(self.inputs.values, x, seen).reshape(batch)
        return self.log_prob_torch(x, seen).reshape(batch)

    def log_prob_torch(self, x: Tensor, seen: Tensor) -> Tensor:
        r"""Computes the log-likelihood of prepared observations by PyTorch."""
        beta, _ = self.upward(self.local(x, seen))
        return self.evidence(beta)

    def _log_prob_compiled(self, values: int, x: Tensor, seen: Tensor) -> Tensor:
        x = x.to(torch.int16 if values <= 2**15 else torch.int32)
        rows = x.masked_fill(~seen, -1).contiguous().numpy()
        counts = expected_counts(
            self.tree,
            self.tables(),
            rows,
            np.ones(len(rows), np.float32),
            workers=torch.get_num_threads() if len(rows) > 256 else 1,
            counting=False,
        )
        log_prob = torch.from_numpy(counts.log_prob).float()

        # What is impossible for the loop may just be too small for float32.
        if bool((small := log_prob.isneginf()).any()):
            with torch.no_grad():
                log_prob[small] = self.log_prob_torch(x[small], seen[small])
        return log_prob

    def local(self, x: Tensor, seen: Tensor) -> Tensor:
        r"""Computes what the inputs send up, with shape :math:`(B, D, K)`."""
        log_prob = self.inputs.log_prob(x, self.input_group)
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
        own = local.new_zeros(R, B, K).index_add(0, self.region, local.transpose(0, 1))
        sums = (self.log_sums() if log_sums is None else log_sums).exp()

        sizes = [sum(count for _, count in runs) for runs in self._rising_runs[:-1]]
        beta = list(own[self.rising].split([*sizes, 1]))  # by level, the root last
        matrices = sums[self.sum_group[self.rising[:-1]]].split(sizes)
        places = self.rising_place[:-1].split(sizes)

        messages = []
        for level, runs in enumerate(self._rising_runs[:-1]):
            message = log_matmul(beta[level], matrices[level])
            messages.append(message)
            counts = [count for _, count in runs]
            parts = zip(runs, message.split(counts), places[level].split(counts), strict=True)
            for (above, _), part, place in parts:
                beta[above] = beta[above].index_add(0, place, part)

        messages.append(local.new_zeros(1, B, K))
        order = self.rising.argsort()
        return torch.cat(beta)[order], torch.cat(messages)[order]

    def evidence(self, beta: Tensor, log_root: Tensor | None = None) -> Tensor:
        r"""Computes the log-likelihood of rows that went up the tree.

        Arguments:
            beta: What :meth:`upward` returns first, with shape :math:`(R, B, K)`.
            log_root: The log-distribution of the root's unit. By default the circuit's own.

        Returns:
            The log-likelihoods, with shape :math:`(B,)`, whose gradient is zero for rows of
            probability zero.
        """
        root = (self.log_root() if log_root is None else log_root).exp()
        return log_matmul(beta[0], root[None])[:, 0]

    def downward(self, siblings: Tensor) -> Tensor:
        r"""Takes what lies outside of each region's subtree down the tree.

        Arguments:
            siblings: For each region, the log-likelihood of its parent's units given what lies
                below the parent but not below the region, with shape :math:`(R, B, K)`. The
                root's is not used.

        Returns:
            The log-probability of each unit with all values outside, with shape
            :math:`(R, B, K)`.
        """
        order = self.falling[1:]
        sizes = [sum(count for _, count in runs) for runs in self._falling_runs[1:]]
        sums = self.log_sums().exp().mT[self.sum_group[order]]
        places = self.falling_place[1:].split(sizes)

        outside = [self.log_root().expand(1, siblings.shape[1], -1)]
        levels = zip(siblings[order].split(sizes), sums.split(sizes), places, strict=True)
        for part, matrices, place in levels:
            outside.append(log_matmul(outside[-1][place] + part, matrices))
        return torch.cat(outside)[self.falling.argsort()]

    @torch.no_grad()
    def bits_per_dimension(self, x: Tensor, observed: Tensor | None = None) -> float:
        r"""Computes the mean ideal code length per observed value, in bits.

        Arguments:
            x: The observations, as in :meth:`log_prob`.
            observed: Which values are observed.
        """
        _, seen, _ = self.prepare(x, observed)
        if not bool(seen.any()):
            raise ValueError("expected one observed value or more, got none")
        total = -self.log_prob(x, observed).double().sum().item()
        return total / (int(seen.sum()) * math.log(2))
