r"""Input distributions that know the order of values."""

__all__ = ["Bernoulli", "Binomial", "DiscretisedLogistic"]

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .inputs import Discrete

_SURE = 40.0  # log-odds that are certain up to rounding, and finite


class Binomial(Discrete):
    r"""Creates binomial inputs, :math:`p(x \mid k) = \binom{n}{x} p_k^x (1 - p_k)^{n - x}`.

    Arguments:
        groups: The number of groups :math:`H`.
        units: The number of units :math:`K`.
        values: The number of values, :math:`X = n + 1`.
        device: The device of the parameters.
        dtype: The type of the parameters.

    Example:
        >>> inputs = Binomial(1, 2, 3)
        >>> inputs.logits.data[0] = torch.tensor([0.0, -math.inf])
        >>> inputs.log_table().exp().tolist()
        [[[0.25, 1.0], [0.5, 0.0], [0.25, 0.0]]]
    """

    def __init__(
        self,
        groups: int,
        units: int,
        values: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, units, values)
        self.logits = nn.Parameter(torch.randn(groups, units, device=device, dtype=dtype))

    def log_table(self) -> Tensor:
        n = self.values - 1
        x = torch.arange(self.values, device=self.logits.device, dtype=torch.float64)[:, None]
        choose = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        x, choose = x.to(self.logits.dtype), choose.to(self.logits.dtype)

        logits = self.logits[:, None]  # (H, 1, K)
        success, failure = -nn.functional.softplus(-logits), -nn.functional.softplus(logits)
        return choose + _times(x, success) + _times(n - x, failure)

    @torch.no_grad()
    def maximise(self, statistics: Tensor, pseudocount: float) -> None:
        n = self.values - 1
        x = torch.arange(self.values, device=statistics.device, dtype=statistics.dtype)[:, None]
        ones = (statistics * x).sum(1) + pseudocount
        zeros = (statistics * (n - x)).sum(1) + pseudocount
        used = ones + zeros > 0
        logits = (ones.log() - zeros.log()).clamp(-_SURE, _SURE)
        self.logits.copy_(torch.where(used, logits.to(self.logits), self.logits))


class Bernoulli(Binomial):
    r"""Creates Bernoulli inputs, :math:`p(x = 1 \mid k) = p_k`.

    Arguments:
        groups: The number of groups :math:`H`.
        units: The number of units :math:`K`.
        values: The number of values, always two.
        device: The device of the parameters.
        dtype: The type of the parameters.
    """

    def __init__(
        self,
        groups: int,
        units: int,
        values: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if values != 2:
            raise ValueError(f"expected two values of a Bernoulli variable, got {values}")
        super().__init__(groups, units, values, device=device, dtype=dtype)


class DiscretisedLogistic(Discrete):
    r"""Creates discretised logistic inputs.

    .. math:: p(x \mid k) = \sigma\!\left(\frac{x + 1/2 - \mu_k}{s_k}\right)
        - \sigma\!\left(\frac{x - 1/2 - \mu_k}{s_k}\right)

    The first and the last value take the tails. Expectation maximisation has no closed form
    here and climbs instead.

    References:
        | PixelCNN++ (Salimans et al., 2017)
        | https://arxiv.org/abs/1701.05517

    Arguments:
        groups: The number of groups :math:`H`.
        units: The number of units :math:`K`.
        values: The number of values :math:`X`.
        device: The device of the parameters.
        dtype: The type of the parameters.
    """

    def __init__(
        self,
        groups: int,
        units: int,
        values: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, units, values)
        mean = values * torch.rand(groups, units, device=device, dtype=dtype)
        self.mean = nn.Parameter(mean)
        self.log_scale = nn.Parameter(torch.full_like(mean, math.log(values / 8)))

    def log_table(self) -> Tensor:
        return _logistic_table(self.mean, self.log_scale, self.values)

    def log_prob(self, x: Tensor, group: Tensor) -> Tensor:
        if x.numel() > self.groups * self.values:
            return super().log_prob(x, group)  # the table is the smaller

        x = x[..., None].to(self.mean.dtype)
        return _logistic_at(x, self.mean[group], self.log_scale[group], self.values)

    def maximise(self, statistics: Tensor, pseudocount: float) -> None:
        counts = statistics.detach() + pseudocount
        if not bool(counts.any()):
            return

        def loss(mean: Tensor, log_scale: Tensor) -> Tensor:
            table = _logistic_table(mean, log_scale, self.values)
            return -_times(counts, table).sum() / counts.sum()

        mean, log_scale = _descend(loss, self.mean, self.log_scale)
        with torch.no_grad():
            self.mean.copy_(mean)
            self.log_scale.copy_(log_scale)


def _times(x: Tensor, log_prob: Tensor) -> Tensor:
    r"""Multiplies, where nothing times minus infinity is nothing."""
    return torch.where(x == 0, 0.0, x * log_prob)


def _logistic_table(mean: Tensor, log_scale: Tensor, values: int) -> Tensor:
    r"""Computes the table from parameters with shape (H, K)."""
    if values == 1:
        return torch.zeros_like(mean)[:, None]
    edges = torch.arange(1, values, device=mean.device, dtype=mean.dtype) - 0.5
    z = (edges[:, None] - mean[:, None]) / log_scale[:, None].exp()  # (H, X - 1, K)
    below, above = nn.functional.logsigmoid(z), nn.functional.logsigmoid(-z)

    # log(σ(b) - σ(a)) = log σ(b) + log σ(-a) + log(1 - exp(a - b)), which loses no digits.
    inner = below[:, 1:] + above[:, :-1] + (-(z[:, :-1] - z[:, 1:]).expm1()).log()
    return torch.cat([below[:, :1], inner, above[:, -1:]], dim=1)


def _logistic_at(x: Tensor, mean: Tensor, log_scale: Tensor, values: int) -> Tensor:
    r"""Computes entries of the table alone, from values and parameters that broadcast."""
    if values == 1:
        return torch.zeros_like(x - mean)
    scale = log_scale.exp()
    upper, lower = (x + 0.5 - mean) / scale, (x - 0.5 - mean) / scale
    first, last = x == 0, x == values - 1
    below = nn.functional.logsigmoid(upper).masked_fill(last, 0.0)
    above = nn.functional.logsigmoid(-lower).masked_fill(first, 0.0)

    # The tails take no part in the last term, not even by an infinite slope.
    tail = first | last
    width = (lower - upper).masked_fill(tail, -1.0)
    return below + above + (-width.expm1()).log().masked_fill(tail, 0.0)


def _descend(loss: Callable[..., Tensor], *start: Tensor) -> list[Tensor]:
    r"""Lowers a loss by a few steps of L-BFGS, or returns where it started."""
    parameters = [p.detach().clone().requires_grad_() for p in start]
    optimiser = torch.optim.LBFGS(parameters, max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(*parameters)
        value.backward()
        return value

    with torch.enable_grad():
        before = loss(*parameters).item()
        with contextlib.suppress(IndexError):  # how PyTorch's line search ends among NaNs
            optimiser.step(closure)
        after = loss(*parameters).item()
    best = parameters if after <= before else start
    return [p.detach() for p in best]
