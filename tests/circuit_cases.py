r"""Small circuits on trees of every kind, and their joint distributions by enumeration."""

import math

import numpy as np
import torch
from torch.testing import assert_close

from probnets.circuits import (
    Categorical,
    Tree,
    TreeCircuit,
    binary_tree,
    chain,
    enumerate_joint,
    hidden_chow_liu_tree,
    quad_tree,
)

RANDOM = np.random.default_rng(0).integers(0, 3, (20, 5))

TREES = {
    "chain": lambda: chain(4),
    "chain, tied": lambda: chain(4, tied=True),
    "binary": lambda: binary_tree(4),
    "binary, odd": lambda: binary_tree(5),
    "binary, tied": lambda: binary_tree(5, tied=True),
    "quad": lambda: quad_tree(2, 2),
    "quad, odd": lambda: quad_tree(2, 3),
    "quad, tied, channels": lambda: quad_tree(1, 3, channels=2, tied=True),
    "Chow-Liu": lambda: hidden_chow_liu_tree(RANDOM, levels=3),
    "Chow-Liu, own latents": lambda: hidden_chow_liu_tree(RANDOM, levels=3, own_latents=True),
    "any": lambda: Tree.from_parents([2, 2, -1, 1, 1], regions=[0, 3, 3, 4, 2]),
    "any, tied": lambda: Tree.from_parents(
        [4, 0, 0, 4, -1, 3],  # region 5 has no variable, region 4 two
        regions=[4, 1, 2, 4, 3],
        sum_keys=["a", "b", "b", "a", None, "c"],
        input_keys=[0, 1, 1, 0, 2],
    ),
    "one region": lambda: Tree.from_parents([-1], regions=[0, 0, 0]),
    "one variable": lambda: chain(1),
}


def circuit_on(name, *, units=2, values=3, dtype=torch.float64, scale=1.0):
    r"""Draws a circuit on the tree of that name."""
    tree = TREES[name]()
    circuit = TreeCircuit(tree, Categorical(tree.inputs, units, values, dtype=dtype))
    return randomise(circuit, scale)


@torch.no_grad()
def randomise(circuit, scale=1.0):
    for parameter in circuit.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, dtype=parameter.dtype))
    return circuit


@torch.no_grad()
def kill(circuit, share=0.3):
    r"""Gives a share of all parameters probability zero, never the first of a distribution."""
    for logits in (circuit.root_logits, circuit.sum_logits):
        dead = torch.rand(logits.shape) < share
        dead[..., 0] = False
        logits.masked_fill_(dead, -math.inf)
    dead = torch.rand(circuit.inputs.logits.shape) < share
    dead[:, 0] = False
    circuit.inputs.logits.masked_fill_(dead, -math.inf)
    return circuit


def observations(circuit, count=6, missing=0.4):
    r"""Draws integers, and which of them are observed."""
    shape = count, circuit.tree.variables
    x = torch.randint(circuit.inputs.values, shape)
    observed = torch.rand(shape) >= missing
    return x, observed


def with_nan(x, observed):
    return x.double().masked_fill(~observed, math.nan)


def joint(circuit, x):
    r"""Returns all latent states, and their joint probabilities with each row, NaN left out."""
    tables = [enumerate_joint(circuit, row) for row in x]
    return tables[0][0], torch.stack([prob for _, prob in tables]).detach()


def exact_log_prob(circuit, x):
    return joint(circuit, x)[1].sum(-1).log()


def assert_exact(found, expected):
    r"""Holds results in double precision to the oracle."""
    assert_close(found, expected, rtol=1e-10, atol=1e-10)


def assert_single(found, expected):
    r"""Holds results in single precision to one another."""
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Query(torch.nn.Module):
    r"""Is a query as a module, whose parameters can be replaced for a check of gradients."""

    def __init__(self, circuit, query):
        super().__init__()
        self.circuit = circuit
        self.query = query

    def forward(self, *args, **kwargs):
        return self.query(self.circuit, *args, **kwargs)

    def check(self, *args, **kwargs):
        names, values = zip(*self.named_parameters(), strict=True)

        def function(*parameters):
            replaced = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(self, replaced, args, kwargs)

        return torch.autograd.gradcheck(function, values)
