r"""Operator splitting of mean-field problems."""

__all__ = ["ForwardBackward"]

import math

import torch
from torch import Tensor

from .problems import Problem
from .prox import prox
from .solvers import Solver, State, arrive, choose, slack


class ForwardBackward(Solver):
    r"""Creates forward-backward splitting, the solver of the paper.

    .. math:: q \gets \mathrm{prox}_f^\alpha\big( (1 - \alpha) q + \alpha (\Phi q + b) \big)

    With :math:`\lambda` the limit of the eigenvalues of :math:`P \Phi P` and :math:`-\ell` the
    smallest, it converges linearly if :math:`\alpha < 2 / \ell`, and fastest in the worst case
    with

    .. math:: \alpha = \frac{2}{L + \mu} \qquad L = 1 + \ell \qquad \mu = 1 - \lambda ,

    which is the default, but 1 where that is larger. The free energy falls with every step;
    where it rises none the less, the step is taken back and halved for that sample.

    References:
        | Monotone deep Boltzmann machines (Feng et al., 2023)
        | https://arxiv.org/abs/2307.04990

    Arguments:
        alpha: The step :math:`\alpha`, in :math:`(0, 1]`, or None for the default. The paper
            has 0.125.
    """

    def __init__(self, alpha: float | None = None) -> None:
        if alpha is not None and not 0 < alpha <= 1:
            raise ValueError(f"expected alpha in (0, 1], got {alpha}; 1 is the plain iteration")
        self.alpha = alpha

    def remember(self, problem: Problem, state: State) -> dict[str, Tensor]:
        alpha = self.alpha
        if alpha is None:
            limit = problem.largest if math.isfinite(problem.largest) else 0.0
            alpha = min(2 / (2 - min(problem.smallest, 0.0) - min(limit, 1.9)), 1.0)
        return {"rate": state.theta.new_full((len(state.theta), 1), alpha)}

    def step(self, problem: Problem, state: State) -> State:
        alpha = state.memory["rate"]
        y = (1 - alpha) * state.q + alpha * (state.phi + problem.field)
        z = problem.hide(prox(y, problem.groups, alpha))
        theta = (y - (1 - alpha) * z) / alpha  # log z but for a constant, without a logarithm
        new = arrive(problem, theta, problem.marginals(theta))
        good = new.energy <= state.energy + slack(state.energy)
        memory = {"rate": torch.where(good[:, None], alpha, alpha / 2)}
        return choose(good, new._replace(memory=memory), state)
