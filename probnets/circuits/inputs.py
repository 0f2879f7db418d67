r"""Input distributions: what a unit says about an observed variable."""

__all__ = ["Categorical", "Discrete", "Gaussian", "Input"]

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Input(nn.Module, ABC):
    r"""Is the contract of an input distribution: one for each of `H` groups and `K` units.

    Variables of one group share their distributions.

    Implementing an input: derive from :class:`Discrete` and give ``log_table`` and ``maximise``,
    or derive from this class, as :class:`Gaussian` does, and give all abstract methods.

    Arguments:
        groups: The number of different distributions :math:`H` a unit has.
        units: The number of units :math:`K`.
    """

    def __init__(self, groups: int, units: int) -> None:
        super().__init__()
        if groups < 1 or units < 1:
            raise ValueError(f"expected one group and one unit or more, got {groups} and {units}")
        self.groups = groups
        self.units = units

    def extra_repr(self) -> str:
        return f"groups={self.groups}, units={self.units}"

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
            pseudocount: The count that is added for each value.
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

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, values={self.values}"

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
        device: The device of the parameters.
        dtype: The type of the parameters.

    Example:
        >>> Categorical(3, units=2, values=4).log_table().shape
        torch.Size([3, 4, 2])
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
        logits = 0.1 * torch.randn(groups, values, units, device=device, dtype=dtype)
        self.logits = nn.Parameter(logits)

    def log_table(self) -> Tensor:
        return self.logits.log_softmax(dim=1)

    @torch.no_grad()
    def maximise(self, statistics: Tensor, pseudocount: float) -> None:
        counts = statistics + pseudocount
        total = counts.sum(1, keepdim=True)
        # A unit that nothing used has no counts to learn from.
        logits = (counts / _positive(total)).log()
        self.logits.copy_(torch.where(total > 0, logits.to(self.logits), self.logits))


class Gaussian(Input):
    r"""Creates Gaussian inputs, :math:`p(x \mid k) = \mathcal{N}(x; \mu_k, \sigma_k^2)`.

    They have a density, hence no code: a circuit with Gaussian inputs does not compress.

    Arguments:
        groups: The number of groups :math:`H`.
        units: The number of units :math:`K`.
        floor: The smallest standard deviation.
        device: The device of the parameters.
        dtype: The type of the parameters.

    Example:
        >>> Gaussian(1, units=2).log_prob(torch.zeros(5, 3), torch.zeros(3).long()).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        groups: int,
        units: int,
        *,
        floor: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, units)
        if not floor > 0:
            raise ValueError(f"expected a positive floor, got {floor}")
        self.floor = floor
        mean = torch.randn(groups, units, device=device, dtype=dtype)
        self.mean = nn.Parameter(mean)
        self.log_scale = nn.Parameter(torch.zeros_like(mean))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, floor={self.floor}"

    def scale(self) -> Tensor:
        r"""Returns the standard deviations :math:`\sigma`, with shape :math:`(H, K)`."""
        return self.log_scale.exp().clamp(min=self.floor)

    def log_prob(self, x: Tensor, group: Tensor) -> Tensor:
        scale = self.scale()[group]
        z = (x[..., None].to(scale) - self.mean[group]) / scale
        return -0.5 * z.square() - scale.log() - 0.5 * math.log(2 * math.pi)

    def sample(self, unit: Tensor, group: Tensor, *, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(
            unit.shape, generator=generator, device=unit.device, dtype=self.mean.dtype
        )
        return self.mean.detach()[group, unit] + self.scale().detach()[group, unit] * noise

    def most_probable(self) -> tuple[Tensor, Tensor]:
        return self.mean, -self.scale().log() - 0.5 * math.log(2 * math.pi)

    def statistics(self, x: Tensor, group: Tensor, posterior: Tensor) -> Tensor:
        # In float64, since a variance is the small difference of large moments.
        x = x.double()
        moments = torch.stack([torch.ones_like(x), x, x.square()], dim=-1)  # (B, D, 3)
        sums = torch.einsum("bdk,bdm->dmk", posterior.double(), moments)
        return sums.new_zeros(self.groups, 3, self.units).index_add_(0, group, sums)

    @torch.no_grad()
    def maximise(self, statistics: Tensor, pseudocount: float) -> None:
        # The pseudocount draws each unit towards the moments of all units together.
        counts, sums, squares = statistics.unbind(1)
        total = counts.sum(1)[:, None]  # (H, 1)
        whole = statistics.sum(2, keepdim=True) / _positive(total)[:, None]
        used = (total > 0) & (counts + pseudocount > 0)
        counts = _positive(counts + pseudocount)
        mean = (sums + pseudocount * whole[:, 1]) / counts
        variance = (squares + pseudocount * whole[:, 2]) / counts - mean.square()
        log_scale = variance.clamp(min=self.floor**2).sqrt().log()
        self.mean.copy_(torch.where(used, mean.to(self.mean), self.mean))
        self.log_scale.copy_(torch.where(used, log_scale.to(self.log_scale), self.log_scale))

    def check(self, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise ValueError("expected finite values, got inf; NaN alone means missing")


def _positive(total: Tensor) -> Tensor:
    r"""Keeps a sum that may be zero, of a unit that was never used, out of a division."""
    return total.clamp(min=torch.finfo(total.dtype).tiny)
