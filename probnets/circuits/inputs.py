r"""Input distributions: what a unit says about an observed variable."""

__all__ = [
    "Bernoulli",
    "Binomial",
    "Categorical",
    "Discrete",
    "DiscretisedLogistic",
    "Gaussian",
    "Input",
]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Input(nn.Module, ABC):
    r"""Is the contract of an input distribution: one for each of `H` groups and `K` units.

    Implementing an input: derive from :class:`Discrete` and give ``log_table`` and ``maximise``,
    or derive from this class, as :class:`Gaussian` does, and give all abstract methods.

    Arguments:
        groups: The number of different distributions :math:`H` a unit has.
        units: The number of units :math:`K`.
    """

    def __init__(self, groups: int, units: int) -> None:
        super().__init__()
        self.groups = groups
        self.units = units

    @abstractmethod
    def log_prob(self, x: Tensor, group: Tensor) -> Tensor:
        r"""Computes the log-likelihood of values under each unit.

        Arguments:
            x: The values :math:`x`, with shape :math:`(B, D)`, none missing.
            group: The group of each variable, with shape :math:`(D,)`.

        Returns:
            The log-likelihoods, with shape :math:`(B, D, K)`.
        """

    @abstractmethod
    def sample(self, unit: Tensor, group: Tensor, *, generator: torch.Generator | None) -> Tensor:
        r"""Draws a value for each variable from the unit that is given for it.

        Arguments:
            unit: The unit of each variable, with shape :math:`(B, D)`.
            group: The group of each variable, with shape :math:`(D,)`.
            generator: The source of randomness.

        Returns:
            The values, with shape :math:`(B, D)`.
        """

    @abstractmethod
    def most_probable(self) -> tuple[Tensor, Tensor]:
        r"""Finds the mode of each unit and its log-probability, with shapes :math:`(H, K)`."""

    @abstractmethod
    def statistics(self, x: Tensor, group: Tensor, posterior: Tensor) -> Tensor:
        r"""Sums the sufficient statistics of values, weighted by the units' posteriors.

        Arguments:
            x: The values, with shape :math:`(B, D)`.
            group: The group of each variable, with shape :math:`(D,)`.
            posterior: The weights, with shape :math:`(B, D, K)`; zero where a value is missing.
        """

    @abstractmethod
    def maximise(self, statistics: Tensor, pseudocount: float) -> None:
        r"""Sets the parameters that are most likely given expected statistics (the M-step).

        Arguments:
            statistics: The sum that :meth:`statistics` returns.
            pseudocount: The count that is added to each distribution.
        """

    def check(self, x: Tensor) -> None:
        r"""Raises ``ValueError`` for observed values outside of the support.

        Arguments:
            x: The observed values, in one dimension.
        """


class Discrete(Input):
    r"""Is the contract of an input distribution on :math:`0, \dots, X - 1`.

    Arguments:
        groups: The number of groups :math:`H`.
        units: The number of units :math:`K`.
        values: The number of values :math:`X`.
    """

    def __init__(self, groups: int, units: int, values: int) -> None:
        super().__init__(groups, units)
        if values < 1:
            raise ValueError(f"expected at least one value, got {values}")
        self.values = values

    @abstractmethod
    def log_table(self) -> Tensor:
        r"""Computes the log-probability of every value, with shape :math:`(H, X, K)`."""

    def log_prob(self, x: Tensor, group: Tensor) -> Tensor:
        return self.log_table()[group, x.long()]

    def sample(self, unit: Tensor, group: Tensor, *, generator: torch.Generator | None) -> Tensor:
        table = self.log_table().detach().exp().transpose(1, 2)  # (H, K, X)
        return torch.cat(
            [
                torch.multinomial(table[g, u], 1, replacement=True, generator=generator).T
                for g, u in zip(group.tolist(), unit.T, strict=True)
            ]
        ).T

    def most_probable(self) -> tuple[Tensor, Tensor]:
        best = self.log_table().max(dim=1)
        return best.indices, best.values

    def statistics(self, x: Tensor, group: Tensor, posterior: Tensor) -> Tensor:
        counts = posterior.new_zeros(self.groups * self.values, self.units)
        index = (group * self.values + x.long()).flatten()
        counts.index_add_(0, index, posterior.reshape(-1, self.units))
        return counts.view(self.groups, self.values, self.units)

    def check(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        least, most = x.min().item(), x.max().item()
        whole = not x.is_floating_point() or bool((x == x.floor()).all())
        if least < 0 or most >= self.values or not whole:
            kind = "integers" if whole else "fractions"
            raise ValueError(
                f"expected integers from 0 to {self.values - 1}, got {kind} from {least} to {most}"
            )


class Categorical(Discrete):
    r"""Creates categorical inputs, :math:`p(x \mid k) = \theta_{kx}`.

    Arguments:
        groups: The number of groups :math:`H`.
        units: The number of units :math:`K`.
        values: The number of values :math:`X`.

    Example:
        >>> Categorical(1, 2, 4).log_table().exp().sum(dim=1)
        tensor([[1.0000, 1.0000]], grad_fn=<SumBackward1>)
    """

    def __init__(self, groups: int, units: int, values: int) -> None:
        super().__init__(groups, units, values)
        self.logits = nn.Parameter(0.1 * torch.randn(groups, values, units))

    def log_table(self) -> Tensor:
        return self.logits.log_softmax(dim=1)

    @torch.no_grad()
    def maximise(self, statistics: Tensor, pseudocount: float) -> None:
        counts = statistics + pseudocount / self.values
        total = counts.sum(1, keepdim=True)
        # A unit that nothing used has no counts to learn from.
        logits = (counts / _positive(total)).log()
        self.logits.copy_(torch.where(total > 0, logits, self.logits))


class Binomial(Discrete):
    r"""Creates binomial inputs, :math:`p(x \mid k) = \binom{n}{x} p_k^x (1 - p_k)^{n - x}`.

    Arguments:
        groups: The number of groups :math:`H`.
        units: The number of units :math:`K`.
        values: The number of values, :math:`X = n + 1`.
    """

    def __init__(self, groups: int, units: int, values: int) -> None:
        super().__init__(groups, units, values)
        self.logits = nn.Parameter(torch.randn(groups, units))

    def log_table(self) -> Tensor:
        n = self.values - 1
        x = torch.arange(self.values, device=self.logits.device, dtype=self.logits.dtype)
        choose = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        logits = self.logits[:, None]  # (H, 1, K)
        x, choose = x[:, None], choose[:, None]
        success, failure = -nn.functional.softplus(-logits), -nn.functional.softplus(logits)
        return choose + x * success + (n - x) * failure

    @torch.no_grad()
    def maximise(self, statistics: Tensor, pseudocount: float) -> None:
        n = self.values - 1
        x = torch.arange(self.values, device=statistics.device, dtype=statistics.dtype)[:, None]
        ones = (statistics * x).sum(1) + pseudocount / 2
        zeros = (statistics * (n - x)).sum(1) + pseudocount / 2
        logits = (ones / _positive(ones + zeros)).logit(eps=1e-12)
        self.logits.copy_(torch.where(ones + zeros > 0, logits, self.logits))


class Bernoulli(Binomial):
    r"""Creates Bernoulli inputs, :math:`p(x = 1 \mid k) = p_k`.

    Arguments:
        groups: The number of groups :math:`H`.
        units: The number of units :math:`K`.
        values: The number of values, always two.
    """

    def __init__(self, groups: int, units: int, values: int = 2) -> None:
        if values != 2:
            raise ValueError(f"expected two values of a Bernoulli variable, got {values}")
        super().__init__(groups, units, values)


class DiscretisedLogistic(Discrete):
    r"""Creates discretised logistic inputs.

    .. math:: p(x \mid k) = \sigma\!\left(\frac{x + 1/2 - \mu_k}{s_k}\right)
        - \sigma\!\left(\frac{x - 1/2 - \mu_k}{s_k}\right)

    The first and the last value take the tails.

    References:
        | PixelCNN++ (Salimans et al., 2017)
        | https://arxiv.org/abs/1701.05517

    Arguments:
        groups: The number of groups :math:`H`.
        units: The number of units :math:`K`.
        values: The number of values :math:`X`.
    """

    def __init__(self, groups: int, units: int, values: int) -> None:
        super().__init__(groups, units, values)
        self.mean = nn.Parameter(values * torch.rand(groups, units))
        self.log_scale = nn.Parameter(torch.full((groups, units), math.log(values / 8)))

    def log_table(self) -> Tensor:
        edges = torch.arange(1, self.values, device=self.mean.device, dtype=self.mean.dtype) - 0.5
        z = (edges[:, None] - self.mean[:, None]) / self.log_scale[:, None].exp()
        below, above = nn.functional.logsigmoid(z), nn.functional.logsigmoid(-z)

        # log(σ(b) - σ(a)) = log σ(b) + log σ(-a) + log(1 - exp(a - b)), which loses no digits.
        inner = below[:, 1:] + above[:, :-1] + (-(z[:, :-1] - z[:, 1:]).expm1()).log()
        if self.values == 1:
            return torch.zeros_like(self.mean)[:, None]
        return torch.cat([below[:, :1], inner, above[:, -1:]], dim=1)

    def maximise(self, statistics: Tensor, pseudocount: float) -> None:
        counts = statistics.detach() + pseudocount / self.values
        total = _positive(counts.sum())

        def objective() -> Tensor:
            return -(counts * self.log_table()).sum() / total

        _ascend(objective, [self.mean, self.log_scale])


class Gaussian(Input):
    r"""Creates Gaussian inputs, :math:`p(x \mid k) = \mathcal{N}(x; \mu_k, \sigma_k^2)`.

    They have a density, hence no code: a circuit with Gaussian inputs does not compress.

    Arguments:
        groups: The number of groups :math:`H`.
        units: The number of units :math:`K`.
        floor: The smallest standard deviation.
    """

    def __init__(self, groups: int, units: int, *, floor: float = 1e-3) -> None:
        super().__init__(groups, units)
        self.floor = floor
        self.mean = nn.Parameter(torch.randn(groups, units))
        self.log_scale = nn.Parameter(torch.zeros(groups, units))

    def scale(self) -> Tensor:
        r"""Returns the standard deviations :math:`\sigma`, with shape :math:`(H, K)`."""
        return self.log_scale.exp().clamp(min=self.floor)

    def log_prob(self, x: Tensor, group: Tensor) -> Tensor:
        scale = self.scale()[group]
        z = (x[..., None] - self.mean[group]) / scale
        return -0.5 * z.square() - scale.log() - 0.5 * math.log(2 * math.pi)

    def sample(self, unit: Tensor, group: Tensor, *, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(
            unit.shape, generator=generator, device=unit.device, dtype=self.mean.dtype
        )
        return self.mean.detach()[group, unit] + self.scale().detach()[group, unit] * noise

    def most_probable(self) -> tuple[Tensor, Tensor]:
        return self.mean, -self.scale().log() - 0.5 * math.log(2 * math.pi)

    def statistics(self, x: Tensor, group: Tensor, posterior: Tensor) -> Tensor:
        moments = torch.stack([torch.ones_like(x), x, x.square()], dim=-1)  # (B, D, 3)
        sums = torch.einsum("bdk,bdm->dmk", posterior, moments.to(posterior))
        return sums.new_zeros(self.groups, 3, self.units).index_add_(0, group, sums)

    @torch.no_grad()
    def maximise(self, statistics: Tensor, pseudocount: float) -> None:
        # The pseudocount draws each unit towards the moments of all units together.
        counts, sums, squares = statistics.unbind(1)
        whole = statistics.sum(2, keepdim=True) / _positive(counts.sum(1))[:, None, None]
        used = counts + pseudocount > 0
        counts = _positive(counts + pseudocount)
        mean = (sums + pseudocount * whole[:, 1]) / counts
        variance = (squares + pseudocount * whole[:, 2]) / counts - mean.square()
        log_scale = variance.clamp(min=self.floor**2).sqrt().log()
        self.mean.copy_(torch.where(used, mean, self.mean))
        self.log_scale.copy_(torch.where(used, log_scale, self.log_scale))

    def check(self, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise ValueError("expected finite values, got inf; NaN alone means missing")


def _positive(total: Tensor) -> Tensor:
    r"""Keeps a sum that may be zero, of a unit that was never used, out of a division."""
    return total.clamp(min=torch.finfo(total.dtype).tiny)


def _ascend(objective: Callable[[], Tensor], parameters: list[nn.Parameter]) -> None:
    r"""Lowers an objective by a few steps of L-BFGS, or leaves the parameters as they were."""
    before = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.LBFGS(parameters, max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    with torch.enable_grad():
        start = objective().item()
        optimiser.step(closure)
        end = objective().item()
    optimiser.zero_grad()
    if not end <= start:
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
