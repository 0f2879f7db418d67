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

import numpy as np
import torch
from torch import Tensor

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
        given: Which observed values are given (:math:`E`), with a shape as `observed`; the
            others are asked for.
        observed: Which values are observed (:math:`Q \cup E`). By default all but NaN.

    Returns:
        The log-probabilities, with shape :math:`(*)`.

    Raises:
        ValueError: If the given values have probability zero.
    """
    _, known, _ = circuit.prepare(x, given)
    x, seen, batch = circuit.prepare(x, observed)
    evidence = _possible(circuit.log_prob(x, known & seen))
    return (circuit.log_prob(x, seen) - evidence).reshape(batch)


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
    _possible(circuit.evidence(beta))
    factors = _factors(circuit, local, message)
    outside = circuit.downward(_without(factors, circuit.parent, message))
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
    _, message = circuit.upward(local)
    factors = _factors(circuit, local, message)
    outside = circuit.downward(_without(factors, circuit.parent, message))

    others = _without(factors, circuit.region, local.transpose(0, 1))
    weights = (others + outside[circuit.region]).transpose(0, 1)  # (B, D, K)
    _possible(weights.logsumexp(-1).amin(-1))
    table = circuit.inputs.log_table().exp()[circuit.input_group]  # (D, X, K)
    result = torch.einsum("bdk,dxk->bdx", weights.softmax(-1), table)
    return result.reshape(*batch, *result.shape[1:])


@torch.no_grad()
def most_probable(circuit: TreeCircuit, x: Tensor, observed: Tensor | None = None) -> MostProbable:
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
    mode, mode_log_prob = circuit.inputs.most_probable()  # (H, K)
    missing = mode_log_prob[circuit.input_group]
    local = torch.where(seen[..., None], circuit.inputs.log_prob(x, circuit.input_group), missing)

    R = circuit.tree.regions
    parent, group = circuit.tree.parent.tolist(), circuit.tree.sum_group.tolist()
    log_sums = circuit.log_sums()
    own = local.new_zeros(R, *local[:, 0].shape)
    beta = own.index_add_(0, circuit.region, local.transpose(0, 1))  # (R, B, K)
    choice = beta.new_zeros(beta.shape, dtype=torch.long)
    for r in range(R - 1, 0, -1):
        best = (beta[r][:, None] + log_sums[group[r]]).max(dim=-1)  # over (B, K, K)
        beta[parent[r]] += best.values
        choice[r] = best.indices

    best = (beta[0] + circuit.log_root()).max(dim=-1)
    _possible(best.values)
    states = choice.new_zeros(R, len(x))
    states[0] = best.indices
    for r in range(1, R):
        states[r] = choice[r].gather(1, states[parent[r]][:, None])[:, 0]

    filled = mode[circuit.input_group, states[circuit.region].T]
    values = _complete(circuit, x, seen, filled)
    return MostProbable(
        values.reshape(shape), states.T.reshape(*batch, R), best.values.reshape(batch)
    )


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
    _possible(circuit.evidence(beta))
    root = beta[0] + circuit.log_root()

    N, R = count * len(x), circuit.tree.regions
    states = torch.zeros(N, R, dtype=torch.long, device=x.device)
    states[:, 0] = _draw(root.softmax(-1).repeat(count, 1), generator)
    log_sums = circuit.log_sums()
    for level in circuit.falling[1:].split(np.bincount(circuit.tree.depth)[1:].tolist()):
        above = states[:, circuit.parent[level]]
        edges = log_sums[circuit.sum_group[level], above]  # (N, L, K)
        below = beta[level].transpose(0, 1).repeat(count, 1, 1)
        states[:, level] = _draw((edges + below).softmax(-1), generator)

    drawn = circuit.inputs.sample(
        states[:, circuit.region], circuit.input_group, generator=generator
    )
    filled = _complete(circuit, x.repeat(count, 1), seen.repeat(count, 1), drawn)
    return filled.reshape(count, *shape)


def _complete(circuit: TreeCircuit, x: Tensor, seen: Tensor, values: Tensor) -> Tensor:
    r"""Puts values where observations miss them, in the type of the observations if it can."""
    if not x.is_floating_point():
        inputs = circuit.inputs
        if not isinstance(inputs, Discrete) or torch.iinfo(x.dtype).max < inputs.values - 1:
            x = x.to(values.dtype)
    return torch.where(seen, x, values.to(x.dtype))


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
    factors = torch.cat([local.transpose(0, 1), message[1:]])
    place = torch.cat([circuit.region, circuit.parent[1:]])
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
