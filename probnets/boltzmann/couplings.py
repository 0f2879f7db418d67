r"""Couplings of one-hot variables, for which mean field has one solution."""

__all__ = ["CAPS", "Cap", "Coupling", "FreeCoupling", "GramCoupling", "Spectrum", "capped"]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from probnets.backend import Groups, project_tangent

from .spectra import extreme_eigenvalues

Cap = Literal["paper", "extended"]

# The largest eigenvalue that a coupling may have, before a margin is taken off.
CAPS: dict[str, float] = {"paper": 1.0, "extended": 2.0}


class Spectrum(NamedTuple):
    r"""Bounds the eigenvalues of a coupling on the tangent space of the simplices.

    Attributes:
        largest: What no eigenvalue of :math:`P \Phi P` exceeds.
        smallest: What is estimated to be its smallest eigenvalue, from below.
    """

    largest: float
    smallest: float


class Coupling(nn.Module, ABC):
    r"""Is a symmetric coupling :math:`\Phi` of one-hot variables, with zero blocks within each.

    The variables :math:`x_1, \dots, x_n` lie side by side in vectors of :math:`N` states. They
    have the distribution

    .. math:: p(x) \propto \exp\left( \tfrac12 x^\top \Phi x + b^\top x \right) ,

    and its mean field has one solution for every bias :math:`b` and every choice of observed
    variables if no eigenvalue of :math:`P \Phi P` reaches 2, where :math:`P` centres groups.

    Implementing a coupling: inherit, hand the groups and the limit to the constructor, and
    implement ``forward``, which must be symmetric with zero diagonal blocks. It has one parameter
    or more, and depends on nothing but its parameters.

    Arguments:
        groups: The number of states of each variable.
        limit: What no eigenvalue of :math:`P \Phi P` exceeds, or infinity.
    """

    # Whether products in single precision save more than it takes to prepare them.
    single_pays = False

    def __init__(self, groups: Groups | Sequence[int], *, limit: float) -> None:
        super().__init__()
        self.groups = groups if isinstance(groups, Groups) else Groups(groups)
        if not len(self.groups):
            raise ValueError("expected one variable or more, got none")
        self.limit = limit
        self._smallest: tuple[Tensor, float] | None = None  # for these weights

    @property
    def states(self) -> int:
        r"""The number :math:`N` of states of all variables."""
        return len(self.groups.index)

    @property
    def variables(self) -> int:
        r"""The number :math:`n` of variables."""
        return len(self.groups)

    @abstractmethod
    def forward(self, q: Tensor) -> Tensor:
        r"""Multiplies by the coupling.

        Arguments:
            q: The vectors, with shape :math:`(B, N)`.

        Returns:
            The products :math:`\Phi q`, with shape :math:`(B, N)`.
        """

    def operator(self, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
        r"""Returns the multiplication with the coupling, for many vectors and the same weights.

        What depends on weights alone is worked out once, with gradients if they are recorded.

        Arguments:
            dtype: The type of the vectors, by default that of the weights.
        """
        if dtype is None:
            return self
        like = self.like().dtype
        return lambda q: self(q.to(like)).to(dtype)

    def dense(self) -> Tensor:
        r"""Returns the matrix :math:`\Phi`, with shape :math:`(N, N)`, for small models."""
        like = self.like()
        return self(torch.eye(self.states, dtype=like.dtype, device=like.device))

    def colours(self) -> Tensor:
        r"""Returns a colour for each variable, such that those of one colour do not couple.

        They are integers with shape :math:`(n,)`, all different unless a coupling knows better.
        """
        return torch.arange(self.variables, device=self.groups.sizes.device)

    def like(self) -> Tensor:
        r"""Returns a parameter, whose type and device are those of all.

        Raises:
            TypeError: If there is none.
        """
        for parameter in self.parameters():
            return parameter
        raise TypeError("expected a coupling with one parameter or more, got none")

    @torch.no_grad()
    def spectrum(self) -> Spectrum:
        r"""Returns bounds of the eigenvalues, kept until a weight changes.

        The largest is certain. The smallest comes from Lanczos' method, lowered by the norm of
        its residual; solvers that rely on it watch the free energy.
        """
        self.like()  # complains if there is no parameter
        now = torch.cat([p.detach().flatten() for p in self.parameters()])
        if not bool(now.isfinite().all()):
            raise ValueError("expected finite weights of the coupling, got NaN or infinity")
        known = self._smallest
        if known is None or known[0].device != now.device or not torch.equal(known[0], now):
            known = self._smallest = now, self.smallest_eigenvalue()
        return Spectrum(self.limit, known[1])

    def smallest_eigenvalue(self, *, steps: int = 40) -> float:
        r"""Estimates the smallest eigenvalue of :math:`P \Phi P`, from below.

        Arguments:
            steps: The number of steps of Lanczos' method.
        """
        found = extreme_eigenvalues(self, steps=steps)
        return min(0.0, found.smallest - found.smallest_residual)


def capped(cap: Cap, margin: float) -> float:
    r"""Returns the limit of eigenvalues, after checking it.

    Arguments:
        cap: ``"paper"`` for :math:`1 - m`, or ``"extended"`` for :math:`2 - m`.
        margin: The margin :math:`m`.

    Example:
        >>> capped("extended", 0.1)
        1.9
    """
    if cap not in CAPS:
        raise ValueError(f"expected a cap of {sorted(CAPS)}, got {cap!r}")
    if not 0 < margin < CAPS[cap]:
        raise ValueError(
            f"expected a margin in (0, {CAPS[cap]:g}) for the cap {cap!r}, got {margin}"
        )
    if margin < 1e-5:
        raise ValueError(f"expected a margin of 1e-5 or more, for rounding, got {margin}")
    return CAPS[cap] - margin


class GramCoupling(Coupling):
    r"""Creates a dense coupling from features of the variables.

    .. math:: \Phi = \mathrm{blkdiag}(\hat A^\top \hat A) - \hat A^\top \hat A
        \qquad \hat A_i = A_i \min\left( \frac{\sqrt{c}}{\|A_i\|_2}, 1 \right)

    Rows and columns are scaled alike, hence :math:`\Phi` is symmetric. Its eigenvalues are at
    most :math:`c`, since those of the first term are and the second is positive semi-definite.
    With the extended cap the columns of each variable are centred, which changes nothing but
    the biases.

    References:
        | Monotone deep Boltzmann machines (Feng et al., 2023)
        | https://arxiv.org/abs/2307.04990

    Arguments:
        groups: The number of states of each variable.
        features: The number :math:`R` of features.
        cap: The cap, as for :func:`capped`.
        margin: The margin.
        generator: The source of randomness of the weights.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> coupling = GramCoupling([2, 3, 3], 5)
        >>> coupling(torch.rand(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        groups: Groups | Sequence[int],
        features: int,
        *,
        cap: Cap = "extended",
        margin: float = 0.1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, limit=capped(cap, margin))
        if features < 1:
            raise ValueError(f"expected features >= 1, got {features}")
        self.cap, self.margin = cap, margin
        weight = torch.empty(features, self.states, device=device, dtype=dtype)
        weight.normal_(std=1 / math.sqrt(features), generator=generator)
        self.weight = nn.Parameter(weight)
        self.to(device)

    def extra_repr(self) -> str:
        return f"features={len(self.weight)}, cap={self.cap!r}, margin={self.margin}"

    def scaled(self) -> Tensor:
        r"""Returns the scaled features :math:`\hat A`, with shape :math:`(R, N)`."""
        A, groups = self.weight, self.groups
        if self.cap == "extended":
            A = project_tangent(A, groups)
        sizes = groups.sizes
        place = torch.arange(self.states, device=A.device) - groups.starts[groups.index]
        blocks = A.new_zeros(len(A), len(groups), int(sizes.max()))
        rows = torch.arange(len(A), device=A.device)[:, None]
        blocks = blocks.index_put((rows, groups.index[None], place[None]), A)
        norm = torch.linalg.matrix_norm(blocks.movedim(1, 0), ord=2)  # (n,)
        scale = (math.sqrt(self.limit) / norm.clamp(min=1e-30)).clamp(max=1.0)
        return A * scale[groups.index]

    def dense(self) -> Tensor:
        A = self.scaled()
        gram = A.T @ A
        own = self.groups.index[:, None] == self.groups.index
        return -((gram + gram.T) / 2).masked_fill(own, 0.0)

    def operator(self, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
        return partial(_multiply, self.dense().to(dtype or self.weight.dtype))

    def forward(self, q: Tensor) -> Tensor:
        return q @ self.dense()


def _multiply(matrix: Tensor, q: Tensor) -> Tensor:
    r"""Multiplies rows by a symmetric matrix."""
    return q @ matrix


class FreeCoupling(Coupling):
    r"""Creates a dense coupling of any symmetric weights, scaled down to its cap as a whole.

    .. math:: \Phi = W \min\left( \frac{c}{\lambda_{\max}(W)}, 1 \right)

    :math:`W` are the weights, made symmetric, centred in each group and without the blocks
    within variables. The largest eigenvalue costs :math:`O(N^3)`.

    Arguments:
        groups: The number of states of each variable.
        cap: The cap, as for :func:`capped`, or None for no cap at all: then mean field may have
            several solutions, and nothing is certified.
        margin: The margin.
        std: The standard deviation of the weights at first.
        generator: The source of randomness of the weights.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> FreeCoupling([2, 3, 3])(torch.rand(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        groups: Groups | Sequence[int],
        *,
        cap: Cap | None = "extended",
        margin: float = 0.1,
        std: float = 0.01,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, limit=math.inf if cap is None else capped(cap, margin))
        self.cap, self.margin = cap, margin
        weight = torch.empty(self.states, self.states, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight.normal_(std=std, generator=generator))
        self.to(device)

    def extra_repr(self) -> str:
        return f"cap={self.cap!r}, margin={self.margin}"

    def dense(self) -> Tensor:
        own = self.groups.index[:, None] == self.groups.index
        W = (self.weight + self.weight.T) / 2
        W = project_tangent(project_tangent(W, self.groups).T, self.groups)
        W = ((W + W.T) / 2).masked_fill(own, 0.0)
        if self.cap is None:
            return W
        largest = torch.linalg.eigvalsh(W)[-1]
        return W * (self.limit / largest.clamp(min=1e-30)).clamp(max=1.0)

    def operator(self, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
        return partial(_multiply, self.dense().to(dtype or self.weight.dtype))

    def forward(self, q: Tensor) -> Tensor:
        return q @ self.dense()
