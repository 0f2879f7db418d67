r"""Eigenvalues of couplings: estimates from products, and bounds that hold."""

__all__ = [
    "Extremes",
    "extreme_eigenvalues",
    "frequency_bound",
    "lanczos",
    "largest_eigenvalue",
]

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from probnets.backend import project_tangent

if TYPE_CHECKING:
    from .couplings import Coupling
    from .tiers import TierCoupling


class Extremes(NamedTuple):
    r"""Is an estimate of the smallest and the largest eigenvalue.

    The smallest eigenvalue is not above its estimate, and the largest not below, save for
    rounding. There is an eigenvalue within the residual of each estimate.

    Attributes:
        smallest: The estimate of the smallest eigenvalue.
        largest: The estimate of the largest eigenvalue.
        smallest_residual: The residual of the first.
        largest_residual: The residual of the second.
    """

    smallest: float
    largest: float
    smallest_residual: float
    largest_residual: float


def lanczos(
    operator: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    r"""Estimates eigenvalues of a symmetric operator by Lanczos' method.

    The operator is projected on the Krylov space of the start, with full
    reorthogonalisation. The method stops early once that space is invariant.

    References:
        | An iteration method for the solution of the eigenvalue problem of linear differential
        | and integral operators (Lanczos, 1950)

    Arguments:
        operator: The operator, from the shape of the start to the same shape.
        start: The first vector, of any shape.
        steps: The largest number of products.

    Returns:
        The estimates in ascending order, of shape :math:`(T,)`, and for each the norm of its
        residual. The operator has an eigenvalue within that distance. All are in float64.

    Raises:
        ValueError: If no step is allowed.

    Example:
        >>> scale = torch.tensor([1.0, 2.0, 4.0])
        >>> values, residuals = lanczos(lambda v: scale * v, torch.ones(3), steps=3)
        >>> values
        tensor([1.0000, 2.0000, 4.0000], dtype=torch.float64)
    """
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    tiny = 1e-30
    basis, diagonal, off = [start / start.norm().clamp(min=tiny)], [], []
    for _ in range(min(steps, start.numel())):
        w = operator(basis[-1])
        diagonal.append((w * basis[-1]).sum().item())
        for u in basis + basis:  # twice is enough
            w = w - (w * u).sum() * u
        length = w.norm().item()
        off.append(length)
        if length < 1e-6 * max(map(abs, diagonal)) + tiny:
            break
        basis.append(w / length)
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    side = torch.tensor(off[:-1], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(T + torch.diag(side, 1) + torch.diag(side, -1))
    return values, off[-1] * vectors[-1].abs()


@torch.no_grad()
def extreme_eigenvalues(coupling: "Coupling", *, steps: int = 40) -> Extremes:
    r"""Estimates both ends of the spectrum of :math:`P \Phi P`, where :math:`P` centres groups.

    Arguments:
        coupling: The coupling.
        steps: The number of steps of Lanczos' method.

    Returns:
        The estimates.

    Example:
        >>> from probnets.boltzmann import GramCoupling
        >>> found = extreme_eigenvalues(GramCoupling([2, 3, 3], 5))
        >>> found.smallest < 0 < found.largest <= 1.9
        True
    """
    groups, multiply = coupling.groups, coupling.operator()
    like = next(coupling.parameters())
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, coupling.states, generator=generator, dtype=torch.float64)

    def centred(v: Tensor) -> Tensor:
        return project_tangent(multiply(v), groups)

    values, residuals = lanczos(centred, project_tangent(v.to(like), groups), steps)
    ends = values[0], values[-1], residuals[0], residuals[-1]
    return Extremes(*(end.item() for end in ends))


def largest_eigenvalue(coupling: "Coupling", *, steps: int = 40) -> float:
    r"""Estimates the largest eigenvalue of :math:`P \Phi P`, raised by the residual.

    Arguments:
        coupling: The coupling.
        steps: The number of steps of Lanczos' method.

    Example:
        >>> from probnets.boltzmann import GramCoupling
        >>> largest_eigenvalue(GramCoupling([2, 3, 3], 5)) <= 1.9
        True
    """
    found = extreme_eigenvalues(coupling, steps=steps)
    return found.largest + found.largest_residual


@torch.no_grad()
def frequency_bound(coupling: "TierCoupling") -> tuple[float, float]:
    r"""Bounds the eigenvalues of :math:`P \Phi P` of tiers, with certainty.

    The maps are part of larger ones on a torus, where convolutions become a product for each
    frequency: eigenvalues there enclose those of the part, by interlacing. Cells of as many
    pixels as the coarsest map has one make this so for all strides. Dense rows are bounded by
    themselves and added; factors that change from cell to cell because of them are replaced by
    the largest of all cells, which loosens the bound if there are any.

    The cost is that of the eigenvalues of one cell for each frequency.

    Arguments:
        coupling: The coupling.

    Returns:
        What no eigenvalue falls below, at most 0; and what none exceeds, at least 0 and at most
        the limit.

    Example:
        >>> from probnets.boltzmann.tiers import Tier, TierCoupling
        >>> low, high = frequency_bound(TierCoupling([Tier(3, 2, 6, 6)], {(0, 0): 3}))
        >>> low < 0 < high <= 1.9
        True
    """
    smallest, largest = _of_maps(coupling)
    dense = _of_dense_rows(coupling)
    if dense > 0:  # blocks of dense rows may add to the largest
        return smallest - dense, coupling.limit
    return smallest, min(largest, coupling.limit)


def _of_maps(coupling: "TierCoupling") -> tuple[float, float]:
    r"""Bounds the eigenvalues of the part of rows that are maps."""
    tiers = coupling.tiers
    rows = sorted({i for i, _ in coupling.kernels if tiers[i].size != (1, 1)})
    linked = sorted({j for i, j in coupling.kernels if i in rows} | set(rows))
    if not rows:
        return 0.0, 0.0
    cells = [math.gcd(*(tiers[j].size[axis] for j in linked)) for axis in (0, 1)]
    pixels = {j: tuple(tiers[j].size[a] // cells[a] for a in (0, 1)) for j in linked}
    factors = coupling.factors()
    like = factors[0]

    # One column for each state of a cell, factors and centring included.
    counts = [tiers[j].channels * math.prod(pixels[j]) for j in linked]
    basis = torch.eye(sum(counts), dtype=like.dtype, device=like.device).split(counts, dim=1)
    maps = [like.new_empty(0)] * len(tiers)
    owners = []
    for j, x in zip(linked, basis, strict=True):
        (f, g), G, k = pixels[j], tiers[j].variables, tiers[j].states
        top = factors[j].view(cells[0], f, cells[1], g, G).amax(dim=(0, 2))
        x = x.view(-1, f, g, G, k)
        x = (x - x.mean(dim=-1, keepdim=True)) * top[:, :, :, None]
        maps[j] = x.flatten(3).permute(0, 3, 1, 2)
        owner = torch.arange(f * g * G, device=like.device).repeat_interleave(k)
        owners.append(owner + (owners[-1][-1] + 1 if owners else 0))
    owner = torch.cat(owners)
    own = owner[:, None] == owner

    outputs = [coupling.features(i, maps) for i in rows]
    steps = [pixels[i] for i in rows]
    torus = [cells[axis] - 1 + _reach(outputs, steps, axis) for axis in (0, 1)]
    waves = torch.cat([_waves(y, s, torus) for y, s in zip(outputs, steps, strict=True)], dim=2)
    flat = torch.cat([y.flatten(1) for y in outputs], dim=1)
    blocks = (flat @ flat.T) * own
    low, high = 0.0, 0.0
    for wave in waves:  # (n, rows)
        ends = torch.linalg.eigvalsh(blocks - wave.conj() @ wave.T)[[0, -1]]
        low, high = min(low, ends[0].item()), max(high, ends[1].item())
    return low, high


def _reach(outputs: list[Tensor], steps: list[tuple[int, ...]], axis: int) -> int:
    r"""Counts the cells that the response of one cell reaches along an axis."""
    pairs = zip(outputs, steps, strict=True)
    return max(math.ceil(y.shape[2 + axis] / step[axis]) for y, step in pairs)


def _waves(y: Tensor, step: tuple[int, ...], torus: list[int]) -> Tensor:
    r"""Transforms the response of one cell, of shape (n, R, h, w), to (frequencies, n, rows)."""
    n, R, h, w = y.shape
    (f, g), (S, T) = step, torus
    y = torch.nn.functional.pad(y, (0, T * g - w, 0, S * f - h)).view(n, R, S, f, T, g)
    y = torch.fft.rfft2(y, dim=(2, 4))
    return y.permute(2, 4, 0, 1, 3, 5).reshape(-1, n, R * f * g)


def _of_dense_rows(coupling: "TierCoupling") -> float:
    r"""Computes the largest eigenvalue of the Gram of dense rows."""
    tiers, factors = coupling.tiers, coupling.factors()
    largest = 0.0
    for row in sorted({i for i, _ in coupling.kernels if tiers[i].size == (1, 1)}):
        gram = factors[0].new_zeros(())
        for i, j in coupling.kernels:
            if i == row:
                A = coupling.link(i, j).weight
                A = A.view(-1, *tiers[j].size, tiers[j].variables, tiers[j].states)
                A = (A - A.mean(dim=-1, keepdim=True)) * factors[j][..., None]
                gram = gram + A.flatten(1) @ A.flatten(1).T
        largest += torch.linalg.eigvalsh(gram)[-1].item()
    return largest
