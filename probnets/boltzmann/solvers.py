r"""Solvers of mean-field problems: one step of each."""

__all__ = ["LogitDamping", "Parallel", "Solver", "State"]

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import damp, measure
from .problems import Problem


class State(NamedTuple):
    r"""Is an iterate of a batch.

    Attributes:
        theta: The logits, with shape :math:`(B, N)`.
        q: Their marginals, zero at observed variables.
        phi: The products :math:`\Phi q`.
        norm: The norms of the residuals, of shape :math:`(B,)`.
        energy: The free energies, likewise, or what they were before rounding raised them.
        r: The residuals, zero at observed variables.
        memory: What the solver remembers, tensors whose first dimension is the batch.
    """

    theta: Tensor
    q: Tensor
    phi: Tensor
    norm: Tensor
    energy: Tensor
    r: Tensor
    memory: dict[str, Tensor]

    def take(self, rows: Tensor) -> "State":
        r"""Returns the iterates of some samples, by their indices or a boolean mask.

        Arguments:
            rows: The samples.
        """
        theta, q, phi, norm, energy, r = (x[rows] for x in self[:6])
        memory = {name: x[rows] for name, x in self.memory.items()}
        return State(theta, q, phi, norm, energy, r, memory)


class Solver(ABC):
    r"""Is an iterative solver, free of state.

    Implementing a solver: inherit, and implement ``step``, and ``remember`` if it remembers
    anything. Samples do not meet: each row of a step depends on its own row alone.
    """

    def start(self, problem: Problem, theta: Tensor) -> State:
        r"""Returns the first iterate.

        Arguments:
            problem: The problem.
            theta: The first logits, with shape :math:`(B, N)`.
        """
        state = arrive(problem, theta, problem.marginals(theta))
        return state._replace(memory=self.remember(problem, state))

    def remember(self, problem: Problem, state: State) -> dict[str, Tensor]:
        r"""Returns what to remember at first.

        Arguments:
            problem: The problem.
            state: The first iterate, without a memory.
        """
        return {}

    @abstractmethod
    def step(self, problem: Problem, state: State) -> State:
        r"""Takes one step.

        Arguments:
            problem: The problem.
            state: The iterate.

        Returns:
            The next iterate. A step that does not improve may return the same one, with another
            memory.
        """


class Parallel(Solver):
    r"""Creates the plain iteration, which updates all variables at once.

    .. math:: q \gets \mathrm{softmax}(\Phi q + b)

    It is the baseline that can fail: it may swing between two states for ever although the
    solution is unique.
    """

    def step(self, problem: Problem, state: State) -> State:
        theta = state.phi + problem.field
        return arrive(problem, theta, problem.marginals(theta))


class LogitDamping(Solver):
    r"""Creates damping of logits: mirror descent with a step that always converges.

    .. math:: \theta \gets (1 - \eta) \theta + \eta (\Phi q + b)
        \qquad \eta = \frac{1}{1 + \ell / 2}

    The free energy is :math:`1 + \ell / 2` smooth relative to the negative entropy, where
    :math:`-\ell` is the smallest eigenvalue of :math:`P \Phi P`, hence it falls with every step
    and the iteration converges linearly. The eigenvalue is an estimate: where the free energy
    rises none the less, the step is taken back and halved for that sample.

    References:
        | Relatively Smooth Convex Optimization by First-Order Methods, and Applications
        | (Lu et al., 2018)
        | https://arxiv.org/abs/1610.05708
    """

    def remember(self, problem: Problem, state: State) -> dict[str, Tensor]:
        return {"rate": state.theta.new_full((len(state.theta), 1), safe_rate(problem))}

    def step(self, problem: Problem, state: State) -> State:
        rate = state.memory["rate"]
        new = arrive(problem, *damped(problem, state, rate))
        good = new.energy <= state.energy + slack(state.energy)
        memory = {"rate": torch.where(good[:, None], rate, rate / 2)}
        return choose(good, new._replace(memory=memory), state)


def arrive(problem: Problem, theta: Tensor, q: Tensor) -> State:
    r"""Returns the iterate of logits, with one product and without a memory.

    Arguments:
        problem: The problem.
        theta: The logits.
        q: Their marginals.
    """
    phi = problem.couple(q)
    return State(theta, q, phi, *assess(problem, theta, q, phi), {})


def safe_rate(problem: Problem) -> float:
    r"""Returns the rate of logit damping at which the free energy never rises.

    Arguments:
        problem: The problem.
    """
    return 1 / (1 - min(problem.smallest, 0.0) / 2)


def damped(problem: Problem, state: State, rate: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns the logits after a damped step, and their marginals.

    Arguments:
        problem: The problem.
        state: The iterate.
        rate: The rates, with shape :math:`(B, 1)`.
    """
    fixed = {"hidden": problem.hidden, "groups": problem.groups}
    return damp(state.theta, state.phi, problem.field, rate, **fixed)


def assess(
    problem: Problem, theta: Tensor, q: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns the norms of the residuals, the free energies and the residuals.

    Arguments:
        problem: The problem.
        theta: The logits.
        q: Their marginals.
        phi: The products :math:`\Phi q`.
    """
    fixed = {"hidden": problem.hidden, "groups": problem.groups}
    return measure(theta, q, phi, problem.field, **fixed)


def slack(energy: Tensor) -> Tensor:
    r"""Returns by how much free energies may differ from rounding alone.

    Arguments:
        energy: The free energies.
    """
    return 1e3 * torch.finfo(energy.dtype).eps * energy.abs().clamp(min=1.0)


def choose(good: Tensor, new: State, old: State) -> State:
    r"""Returns the new iterate of some samples and the old one of others, and the new memory.

    Energies do not rise by rounding, little by little.

    Arguments:
        good: Of which samples the new one is taken, with shape :math:`(B,)`.
        new: The new iterate.
        old: The old iterate.
    """
    energy = torch.minimum(new.energy, old.energy)
    if good.all():
        return new._replace(energy=energy)
    wide = good[:, None]
    news, olds = (*new[:3], new.r), (*old[:3], old.r)
    theta, q, phi, r = (torch.where(wide, x, y) for x, y in zip(news, olds, strict=True))
    norm = torch.where(good, new.norm, old.norm)
    energy = torch.where(good, energy, old.energy)
    return State(theta, q, phi, norm, energy, r, new.memory)
