r"""Accelerated solvers of mean-field problems."""

__all__ = ["Anderson", "Fista"]

import math

import torch
from torch import Tensor

from .problems import Problem
from .prox import prox
from .solvers import Solver, State, arrive, choose, safe_rate, slack

# What Anderson's acceleration remembers of each difference.
KINDS = ("move", "change")


class Anderson(Solver):
    r"""Creates Anderson's acceleration of logits, safeguarded by the free energy.

    .. math:: \theta \gets \theta - r
        - \sum_{j=1}^{m} \gamma_j (\Delta \theta_j - \Delta r_j)
        \qquad \gamma = \arg\min_\gamma \Big\| r - \sum_j \gamma_j \Delta r_j \Big\|_2

    Here :math:`r = P (\theta - \Phi q - b)`, and the differences are those of the last
    iterates. Where a combination raises the free energy, the sample stays where it is, forgets
    the differences and takes the damped step of :class:`LogitDamping` next, hence it converges
    as that does. Where energies differ by rounding alone, the residuals decide.

    References:
        | Anderson Acceleration for Fixed-Point Iterations (Walker and Ni, 2011)
        | https://doi.org/10.1137/10078356X

    Arguments:
        memory: The number :math:`m` of differences.
    """

    def __init__(self, memory: int = 5) -> None:
        if memory < 1:
            raise ValueError(f"expected memory >= 1, got {memory}; for none, use LogitDamping")
        self.memory = memory

    def remember(self, problem: Problem, state: State) -> dict[str, Tensor]:
        theta = state.theta
        past = torch.zeros_like(theta)
        return {
            "rate": theta.new_full((len(theta), 1), safe_rate(problem)),
            "plain": torch.ones_like(state.norm, dtype=torch.bool),  # nothing is remembered
            "gram": theta.new_zeros(len(theta), self.memory, self.memory),  # of the changes
            **{f"move {j}": past for j in range(self.memory)},  # Δθ - Δr, the newest first
            **{f"change {j}": past for j in range(self.memory)},  # Δr
        }

    def step(self, problem: Problem, state: State) -> State:
        old, m = state.memory, self.memory
        r, rate, plain = state.r, old["rate"], old["plain"]
        theta = state.theta - torch.where(plain[:, None], rate, 1.0) * r
        for j, weight in enumerate(self._weights(old, r).unbind(1)):
            theta = theta.addcmul_(old[f"move {j}"], weight[:, None], value=-1)
        new = arrive(problem, theta, problem.marginals(theta))
        change, room = new.energy - state.energy, slack(state.energy)
        good = (change <= -room) | ((change <= room) & (plain | (new.norm <= 2 * state.norm)))

        latest = new.r - r
        past = {
            "move 0": theta - state.theta - latest,
            "change 0": latest,
            **{f"{name} {j + 1}": old[f"{name} {j}"] for name in KINDS for j in range(m - 1)},
        }
        wide = good[:, None]
        if not good.all():
            past = {name: torch.where(wide, x, 0.0) for name, x in past.items()}
        row = torch.stack([_dot(past["change 0"], past[f"change {j}"]) for j in range(m)], dim=1)
        gram = torch.zeros_like(old["gram"])
        gram[:, 1:, 1:] = torch.where(wide[:, :, None], old["gram"][:, :-1, :-1], 0.0)
        gram[:, 0], gram[:, :, 0] = row, row
        memory = {
            "rate": torch.where(wide | ~plain[:, None], rate, rate / 2),
            "plain": ~good,
            "gram": gram,
        }
        return choose(good, new._replace(memory=memory | past), state)

    def _weights(self, memory: dict[str, Tensor], r: Tensor) -> Tensor:
        r"""Returns the weights of the differences. Those that are zero get none."""
        gram = memory["gram"]
        overlap = torch.stack([_dot(memory[f"change {j}"], r) for j in range(self.memory)], dim=1)
        length = gram.diagonal(dim1=1, dim2=2).sqrt()
        length = length.masked_fill(length == 0, 1.0)
        # Unit differences and a ridge at the level of rounding keep the equations solvable.
        ridge = 10 * torch.finfo(gram.dtype).eps * torch.eye(self.memory).to(gram)
        unit = gram / (length[:, :, None] * length[:, None]) + ridge
        weights = torch.linalg.solve_ex(unit, overlap / length).result / length
        return torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    r"""Returns the products of rows."""
    return torch.linalg.vecdot(x, y)


class Fista(Solver):
    r"""Creates accelerated proximal gradient descent, for what is strongly convex.

    The free energy is the sum of two convex functions,

    .. math:: g(q) = -\tfrac12 q^\top \Phi q - b^\top q + \tfrac{\lambda}{2} \|q\|^2 \qquad
        h(q) = \sum_i q_i^\top \log q_i - \tfrac{\lambda}{2} \|q\|^2 ,

    where :math:`\lambda < 2` is the limit of the eigenvalues of :math:`P \Phi P` and
    :math:`-\ell` the smallest. On the tangent space of the simplices :math:`g` is quadratic
    with curvature between 0 and :math:`L = \ell + \lambda`, and :math:`h` is strongly convex
    with :math:`\mu = 2 - \lambda`. So

    .. math:: y = q + \beta (q - q') \qquad
        q \gets \mathrm{prox}_{h / L}\big( y - \nabla g(y) / L \big) \qquad
        \beta = \frac{1 - \sqrt\kappa}{1 + \sqrt\kappa} \qquad
        \kappa = \frac{\mu}{L + \mu}

    converges at the rate :math:`1 - \sqrt\kappa` of the free energy, with the last iterate
    :math:`q'`. The proximal operator is :func:`prox` with a step of
    :math:`1 / (L + 1 - \lambda)`. Where the free energy rises, the step is taken back and the
    momentum is lost; where it rises without momentum, :math:`L` was an underestimate, and is
    doubled for that sample.

    References:
        | An introduction to continuous optimization for imaging (Chambolle and Pock, 2016)
        | https://doi.org/10.1017/S096249291600009X
        | Adaptive Restart for Accelerated Gradient Schemes (O'Donoghue and Candès, 2012)
        | https://arxiv.org/abs/1204.3982
    """

    def remember(self, problem: Problem, state: State) -> dict[str, Tensor]:
        limit = _limit(problem)
        bound = max(limit - min(problem.smallest, 0.0), limit, 1e-6)
        rate = state.theta.new_full((len(state.theta), 1), bound)
        return {"bound": rate, "q": state.q, "phi": state.phi}

    def step(self, problem: Problem, state: State) -> State:
        old, limit = state.memory, _limit(problem)
        L = old["bound"]
        root = ((2 - limit) / (L + 2 - limit)).sqrt()
        beta = (1 - root) / (1 + root)
        y = state.q + beta * (state.q - old["q"])
        slope = state.phi + beta * (state.phi - old["phi"]) + problem.field  # -∇g(y) + λ y

        # prox_{h/L}(v) has (1 - λ/L) z + log(z) / L = v + ν, which is prox_f with another step.
        scale = L + 1 - limit
        v = ((L - limit) * y + slope) / scale
        z = problem.hide(prox(v, problem.groups, 1 / scale))
        theta = scale * v - (L - limit) * z
        new = arrive(problem, theta, problem.marginals(theta))

        plain = (state.q == old["q"]).all(dim=1)
        good = new.energy <= state.energy + slack(state.energy)
        memory = {
            "bound": torch.where((good | ~plain)[:, None], L, 2 * L),
            "q": state.q,
            "phi": state.phi,
        }
        return choose(good, new._replace(memory=memory), state)


def _limit(problem: Problem) -> float:
    r"""Returns the shift, which has to be below 2: less than the limit if that is not known."""
    return problem.largest if math.isfinite(problem.largest) else 1.0
