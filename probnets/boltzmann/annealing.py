r"""Partition functions by annealed importance sampling."""

__all__ = ["Estimate", "annealed_log_partition"]

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from probnets.backend import grouped_softmax, segment_logsumexp

from .couplings import Coupling
from .gibbs import GibbsSampler, draw
from .meanfield import free_energy, mean_field
from .problems import Problem, prepare

# The number of bootstrap samples of intervals.
_RESAMPLED = 2000


class Estimate(NamedTuple):
    r"""Is an estimate of log partition functions, of float64.

    Attributes:
        log_partition: The estimates, with shape :math:`(B,)`.
        standard_error: Their standard errors, from the spread of weights.
        lower: The lower ends of bootstrap intervals.
        upper: Their upper ends.
        effective: The effective numbers of chains. If they are small, nothing here can be
            trusted: take more temperatures.
    """

    log_partition: Tensor
    standard_error: Tensor
    lower: Tensor
    upper: Tensor
    effective: Tensor


@torch.no_grad()
def annealed_log_partition(
    coupling: Coupling,
    bias: Tensor,
    *,
    chains: int = 100,
    temperatures: int = 1000,
    observed: Tensor | None = None,
    values: Tensor | None = None,
    start: Literal["mean_field", "bias"] = "mean_field",
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Estimate:
    r"""Estimates log partition functions given observed variables, with error bars.

    Chains pass from a product of independent variables with logits :math:`\theta` to the model,
    by one sweep of Gibbs sampling at each strength of the coupling :math:`\beta_t = t / T`:

    .. math:: p_t(x) \propto \exp\left( \tfrac{\beta_t}{2} x^\top \Phi x
        + ((1 - \beta_t) \theta + \beta_t b)^\top x \right)

    The weight of a chain is the product of :math:`p_t / p_{t - 1}`, without their constants, at
    the states between. Its mean is an unbiased estimate of :math:`Z / Z_0`, from whatever
    product it starts; the log of the mean errs to the low side. Distributions among the values
    are treated as by :func:`exact`.

    Standard errors are those of the delta method,
    :math:`\mathrm{std}(w) / (\bar w \sqrt C)`.

    References:
        | Annealed importance sampling (Neal, 2001)
        | https://arxiv.org/abs/physics/9803008
        | On the quantitative analysis of deep belief networks (Salakhutdinov and Murray, 2008)
        | https://doi.org/10.1145/1390156.1390266

    Arguments:
        coupling: The coupling :math:`\Phi`, of at most 4096 states.
        bias: The biases :math:`b`, with shape :math:`(N,)` or :math:`(B, N)`.
        chains: The number of chains :math:`C` of each sample.
        temperatures: The number of temperatures :math:`T`.
        observed: Which variables are observed, boolean with shape :math:`(n,)` or
            :math:`(B, n)`. By default none are.
        values: The values of observed variables, with shape :math:`(N,)` or :math:`(B, N)`.
        start: The product to start from: that of mean field, with
            :math:`\theta = \Phi q + b`, or that of the biases alone.
        confidence: The coverage of intervals.
        generator: The source of randomness.
        progress: Whether to show a progress bar.

    Returns:
        The estimates.

    Raises:
        ValueError: If shapes do not fit, or a setting is out of range.

    Example:
        >>> from probnets.boltzmann import GramCoupling
        >>> coupling, bias = GramCoupling([2, 3, 3], 5), torch.zeros(4, 8)
        >>> estimate = annealed_log_partition(coupling, bias, temperatures=50, progress=False)
        >>> estimate.log_partition.shape
        torch.Size([4])
    """
    if chains < 2 or temperatures < 1:
        raise ValueError(
            f"expected chains >= 2 and temperatures >= 1, got {chains} and {temperatures}"
        )
    if start not in ("mean_field", "bias"):
        raise ValueError(f"expected start 'mean_field' or 'bias', got {start!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"expected confidence in (0, 1), got {confidence}")

    problem, known = prepare(coupling, bias, observed=observed, values=values)
    theta = problem.field
    if start == "mean_field":
        theta = mean_field(coupling, bias, observed=observed, values=values).logits
    bar = tqdm(total=temperatures, desc="annealing", disable=not progress)
    with bar:
        log_w = _anneal(GibbsSampler(coupling), problem, theta, chains, generator, bar)

    log_z0 = segment_logsumexp(theta.double(), problem.groups.index, len(problem.groups))
    if problem.hidden is not None:
        log_z0 = log_z0 * problem.hidden[:, problem.groups.starts]
    offset = log_z0.sum(dim=1) - free_energy(coupling, bias, known)
    return _estimate(log_w, offset, confidence, generator)


def _anneal(
    sampler: GibbsSampler,
    problem: Problem,
    theta: Tensor,
    chains: int,
    generator: torch.Generator | None,
    bar: tqdm,
) -> Tensor:
    r"""Returns the log-weights of chains, with shape (B, C)."""
    slope, constant = sampler.linearise(problem)
    # Logits go from start to target, and the target's energy is ½ |W x|² + targetᵀ x + constant.
    first, last = theta[:, None], (problem.field + slope)[:, None]
    hidden = None if problem.hidden is None else problem.hidden[:, None]
    weight, T = sampler.weight.to(theta), int(bar.total)

    p = grouped_softmax(first, sampler.groups).expand(-1, chains, -1)
    x = draw(p, sampler.groups, generator=generator)
    x = x if hidden is None else x * hidden
    log_w = theta.new_zeros(len(theta), chains, dtype=torch.float64)
    for t in range(1, T + 1):
        product = x @ weight.T  # (B, C, R)
        quadratic = 0.5 * product.double().square().sum(dim=2)
        linear = (x * (last - first)).sum(dim=2, dtype=torch.float64)
        log_w += (quadratic + linear + constant[:, None]) / T
        beta = t / T
        if t < T:
            logits = (1 - beta) * first + beta * last
            x, _ = sampler.sweep(product, logits, hidden, strength=beta, generator=generator)
        bar.update()
    return log_w


def _estimate(
    log_w: Tensor, offset: Tensor, confidence: float, generator: torch.Generator | None
) -> Estimate:
    r"""Averages weights, and resamples them for intervals."""
    C = log_w.shape[1]
    top = log_w.amax(dim=1, keepdim=True)
    w = (log_w - top).exp()
    mean = w.mean(dim=1)

    drawn = torch.randint(C, (_RESAMPLED, C), generator=generator, device=w.device)
    counts = w.new_zeros(_RESAMPLED, C).scatter_add(1, drawn, w.new_ones(drawn.shape))
    means = w @ counts.T / C  # (B, _RESAMPLED), zero if the heaviest were not drawn
    ends = w.new_tensor([(1 - confidence) / 2, (1 + confidence) / 2])
    lower, upper = means.quantile(ends, dim=1).log() if len(w) else w.new_zeros(2, 0)

    base = offset + top[:, 0]
    variance = (w - mean[:, None]).square().sum(dim=1) / (C - 1)
    return Estimate(
        base + mean.log(),
        (variance / C).sqrt() / mean,
        base + lower,
        base + upper,
        w.sum(dim=1).square() / w.square().sum(dim=1),
    )
