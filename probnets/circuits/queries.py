r"""Exact queries: conditionals, posteriors, most probable states, samples."""

__all__ = [
    "MostProbable",
    "conditional_log_prob",
    "conditional_sample",
    "leave_one_out",
    "most_probable",
    "posterior",
    "sample",
]

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probnets.backend import log_matmul

from .circuit import TreeCircuit
from .inputs import Discrete


class MostProbable(NamedTuple):
    r"""The jointly most probable states of all latents and missing values.

    Arguments:
        values: The observations with missing values filled in, with the shape of the query.
        states: The unit of each region, with shape :math:`(*, R)`.
        log_prob: The log-probability of states and values together, with shape :math:`(*)`.
    """

    values: Tensor
    states: Tensor
    log_prob: Tensor


def conditional_log_prob(
    circuit: TreeCircuit, x: Tensor, *, given: Tensor, observed: Tensor | None = None
) -> Tensor:
    r"""Computes the log-probability of some values given others.

    .. math:: \log p(x_Q \mid x_E) = \log p(x_{Q \cup E}) - \log p(x_E)

    Values that are neither asked for nor given are summed out.

    Arguments:
        circuit: The circuit.
        x: The observations, with shape :math:`(*, D)` or the circuit's shape.
        given: Which observed values are given (:math:`E`); the others are asked for.
        observed: Which values are observed (:math:`Q \cup E`). By default all but NaN.

    Returns:
        The log-probabilities, with shape :math:`(*)`.

    Raises:
        ValueError: If the given values have probability zero.
    """
    given = given.bool().expand(x.shape)
    evidence = circuit.log_prob(x, given if observed is None else given & observed.bool())
    return circuit.log_prob(x, observed) - _possible(evidence)


def posterior(circuit: TreeCircuit, x: Tensor, observed: Tensor | None = None) -> Tensor:
    r"""Computes the distribution of each latent given the observed values.

    Arguments:
        circuit: The circuit.
        x: The observations, with shape :math:`(*, D)` or the circuit's shape.
        observed: Which values are observed. By default all but NaN.

    Returns:
        The probabilities of the units, with shape :math:`(*, R, K)`.

    Raises:
        ValueError: If an observation has probability zero.
    """
    x, seen, batch = circuit.prepare(x, observed)
    local = circuit.local(x, seen)
    beta, message = circuit.upward(local)
    _possible(torch.logsumexp(beta[0] + circuit.log_root(), dim=-1))
    outside = _downward(circuit, _factors(circuit, local, message), message)
    result = (beta + outside).softmax(-1).transpose(0, 1)
    return result.reshape(*batch, *result.shape[1:])


def leave_one_out(circuit: TreeCircuit, x: Tensor, observed: Tensor | None = None) -> Tensor:
    r"""Computes the distribution of each variable given all *other* observed values.

    For a missing value this is its posterior marginal. For an observed one it is what the rest
    says of it, which is what pseudo-likelihoods and anomaly scores need.

    Arguments:
        circuit: The circuit, with discrete inputs.
        x: The observations, with shape :math:`(*, D)` or the circuit's shape.
        observed: Which values are observed. By default all but NaN.

    Returns:
        The probabilities, with shape :math:`(*, D, X)`.

    Raises:
        ValueError: If the other values have probability zero.
    """
    if not isinstance(circuit.inputs, Discrete):
        raise TypeError(f"expected discrete inputs, got {type(circuit.inputs).__name__}")
    x, seen, batch = circuit.prepare(x, observed)
    local = circuit.local(x, seen)
    factors = _factors(circuit, local, message := circuit.upward(local)[1])
    outside = _downward(circuit, factors, message)

    _, region, _ = circuit.indices(local.device)
    others = _without(factors, region, local.transpose(0, 1))
    weights = (others + outside[region]).transpose(0, 1)  # (B, D, K)
    _possible(weights.logsumexp(-1))
    group = torch.from_numpy(circuit.tree.input_group.copy()).to(local.device)
    table = circuit.inputs.log_table().exp()[group]  # (D, X, K)
    result = torch.einsum("bdk,dxk->bdx", weights.softmax(-1), table)
    return result.reshape(*batch, *result.shape[1:])


@torch.no_grad()
def most_probable(
    circuit: TreeCircuit, x: Tensor, observed: Tensor | None = None
) -> MostProbable:
    r"""Finds the jointly most probable latent states and missing values.

    With all values missing this is the mode of the circuit with its latents. The maximum over
    the values alone is a different and intractable question.

    Arguments:
        circuit: The circuit.
        x: The observations, with shape :math:`(*, D)` or the circuit's shape.
        observed: Which values are observed. By default all but NaN.

    Raises:
        ValueError: If an observation has probability zero.
    """
    shape = x.shape
    x, seen, batch = circuit.prepare(x, observed)
    group = torch.from_numpy(circuit.tree.input_group.copy()).to(x.device)
    mode, mode_log_prob = (part[group] for part in circuit.inputs.most_probable())  # (D, K)
    local = torch.where(seen[..., None], circuit.local(x, seen), mode_log_prob)

    parent, region, sum_group = circuit.indices(x.device)
    log_sums = circuit.log_sums()
    beta = local.new_zeros(circuit.tree.regions, *local[:, 0].shape)
    beta.index_add_(0, region, local.transpose(0, 1))
    best = torch.zeros(beta.shape, dtype=torch.long, device=x.device)
    for r in range(circuit.tree.regions - 1, 0, -1):
        top = (beta[r][:, None] + log_sums[sum_group[r]]).max(dim=-1)  # over (B, K, K)
        beta[parent[r]] += top.values
        best[r] = top.indices

    top = (beta[0] + circuit.log_root()).max(dim=-1)
    _possible(top.values)
    states = [top.indices]
    states += [top.indices] * (circuit.tree.regions - 1)
    for r in range(1, circuit.tree.regions):
        states[r] = best[r].gather(1, states[int(parent[r])][:, None])[:, 0]
    unit = torch.stack(states, dim=1)  # (B, R)

    filled = mode[torch.arange(len(group), device=x.device), unit[:, region]]
    values = torch.where(seen, x, filled.to(x.dtype))
    return MostProbable(values.view(shape), unit.view(*batch, -1), top.values.view(batch))


def sample(
    circuit: TreeCircuit,
    size: Sequence[int] = (),
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draws observations from the circuit.

    Arguments:
        circuit: The circuit.
        size: The batch shape of the draws.
        generator: The source of randomness.

    Returns:
        The observations, with shape :math:`(*, \dots)` after the circuit's shape.
    """
    nothing = circuit.root_logits.new_full((1, circuit.tree.variables), math.nan)
    draws = conditional_sample(circuit, nothing, math.prod(size), generator=generator)
    if isinstance(circuit.inputs, Discrete):
        draws = draws.long()
    return draws.reshape(*size, *circuit.shape)


@torch.no_grad()
def conditional_sample(
    circuit: TreeCircuit,
    x: Tensor,
    count: int = 1,
    *,
    observed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draws the missing values given the observed ones, jointly.

    Arguments:
        circuit: The circuit.
        x: The observations, with shape :math:`(*, D)` or the circuit's shape.
        count: The number of completions `S` of each observation.
        observed: Which values are observed. By default all but NaN.
        generator: The source of randomness.

    Returns:
        The observations with missing values drawn, with shape :math:`(S, *, \dots)`.

    Raises:
        ValueError: If an observation has probability zero.
    """
    shape = x.shape
    x, seen, _ = circuit.prepare(x, observed)
    beta, _ = circuit.upward(circuit.local(x, seen))
    root = beta[0] + circuit.log_root()
    _possible(root.logsumexp(-1))

    parent, region, group = circuit.indices(x.device)
    N = count * len(x)
    states = torch.zeros(N, circuit.tree.regions, dtype=torch.long, device=x.device)
    states[:, 0] = _draw(root.softmax(-1).repeat(count, 1), generator)
    log_sums = circuit.log_sums()
    for level in circuit.levels(circuit.tree.depth, x.device):
        edges = log_sums[group[level], states[:, parent[level]]]  # (N, L, K)
        below = beta[level].transpose(0, 1).repeat(count, 1, 1)
        states[:, level] = _draw((edges + below).softmax(-1), generator)

    input_group = torch.from_numpy(circuit.tree.input_group.copy()).to(x.device)
    drawn = circuit.inputs.sample(states[:, region], input_group, generator=generator)
    filled = torch.where(seen.repeat(count, 1), x.repeat(count, 1), drawn.to(x.dtype))
    return filled.reshape(count, *shape)


def _draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    flat = probs.reshape(-1, probs.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(probs.shape[:-1])


def _possible(log_prob: Tensor) -> Tensor:
    impossible = log_prob.isneginf()
    if bool(impossible.any()):
        row = impossible.flatten().nonzero()[0].item()
        raise ValueError(
            f"expected evidence of positive probability, got probability zero in row {row}; "
            "train with a pseudocount to give every value a chance"
        )
    return log_prob


def _factors(circuit: TreeCircuit, local: Tensor, message: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sums the finite factors of each unit, and counts those that are zero."""
    parent, region, _ = circuit.indices(local.device)
    factors = torch.cat([local.transpose(0, 1), message[1:]])
    place = torch.cat([region, parent[1:]])
    zero = factors.isneginf()
    shape = message.shape
    finite = local.new_zeros(shape).index_add_(0, place, factors.masked_fill(zero, 0.0))
    return finite, local.new_zeros(shape).index_add_(0, place, zero.to(local.dtype))


def _without(factors: tuple[Tensor, Tensor], place: Tensor, part: Tensor) -> Tensor:
    r"""Takes one factor out of the product of its region, be it zero or not."""
    finite, zeros = factors
    zero = part.isneginf()
    rest = finite[place] - part.masked_fill(zero, 0.0)
    return rest.masked_fill(zeros[place] > zero, -math.inf)


def _downward(circuit: TreeCircuit, factors: tuple[Tensor, Tensor], message: Tensor) -> Tensor:
    r"""Takes what lies outside of each region's subtree down the tree.

    Returns:
        The log-probability of each unit with all values outside, with shape :math:`(R, B, K)`.
    """
    parent, _, group = circuit.indices(message.device)
    sums = circuit.log_sums().exp()

    place = torch.zeros_like(parent)  # where a region stands in the list, concatenated
    outside = circuit.log_root().expand(1, message.shape[1], -1)
    for level in circuit.levels(circuit.tree.depth, message.device):
        siblings = _without(factors, parent[level], message[level])
        below = log_matmul(outside[place[parent[level]]] + siblings, sums[group[level]].mT)
        place[level] = torch.arange(len(outside), len(outside) + len(level), device=place.device)
        outside = torch.cat([outside, below])
    return outside[place]
