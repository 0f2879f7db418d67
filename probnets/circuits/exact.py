r"""Truth by enumeration, for circuits with few states."""

__all__ = ["enumerate_joint", "enumerate_values"]

import torch
from torch import Tensor

from .circuit import TreeCircuit
from .inputs import Discrete

MOST = 2**20  # states


def enumerate_values(circuit: TreeCircuit) -> Tensor:
    r"""Lists every observation of a discrete circuit.

    Arguments:
        circuit: The circuit, with :math:`X^D` observations.

    Returns:
        The observations in lexicographic order, with shape :math:`(X^D, D)`.

    Raises:
        ValueError: If there are more than :math:`2^{20}`.

    Example:
        >>> from probnets.circuits import Categorical, chain
        >>> circuit = TreeCircuit(chain(2), Categorical(2, units=2, values=3))
        >>> enumerate_values(circuit).tolist()[:4]
        [[0, 0], [0, 1], [0, 2], [1, 0]]
    """
    if not isinstance(circuit.inputs, Discrete):
        raise TypeError(f"expected discrete inputs, got {type(circuit.inputs).__name__}")
    return _grid(circuit.inputs.values, circuit.tree.variables)


def enumerate_joint(circuit: TreeCircuit, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Computes the joint probability of an observation and every state of the latents.

    This multiplies the factors of the latent tree one by one. It shares no code with the passes
    of the circuit, against which it serves as an oracle.

    Arguments:
        circuit: The circuit, with :math:`K^R` latent states.
        x: One observation, with shape :math:`(D,)`. NaN values are left out.

    Returns:
        The states, with shape :math:`(K^R, R)`, and their probabilities, with shape
        :math:`(K^R,)`.
    """
    tree = circuit.tree
    if x.shape != (tree.variables,):
        raise ValueError(f"expected x with shape ({tree.variables},), got {tuple(x.shape)}")
    states = _grid(circuit.units, tree.regions)
    root, sums = circuit.log_root().exp(), circuit.log_sums().exp()

    prob = root[states[:, 0]]
    for r in range(1, tree.regions):
        above = states[:, int(tree.parent[r])]
        prob = prob * sums[int(tree.sum_group[r]), above, states[:, r]]
    for v in range(tree.variables):
        if not bool(torch.isnan(x[v].double())):
            group = circuit.input_group[v : v + 1]
            input_log_prob = circuit.inputs.log_prob(x[v].view(1, 1), group)[0, 0]
            prob = prob * input_log_prob.exp()[states[:, int(tree.region[v])]]
    return states, prob


def _grid(values: int, variables: int) -> Tensor:
    if values**variables > MOST:
        raise ValueError(
            f"expected at most {MOST} states, got {values}^{variables}; enumerate smaller circuits"
        )
    axes = [torch.arange(values)] * variables
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, variables)
