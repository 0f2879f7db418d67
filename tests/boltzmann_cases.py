r"""Small couplings and queries, which enumeration can answer."""

from typing import Any

import torch

from probnets.boltzmann import FreeCoupling, GramCoupling

SIZES = [2, 3, 4, 1, 3]
N, n = sum(SIZES), len(SIZES)


def coupling(kind="free", cap: Any = "extended", sizes=SIZES):
    if kind == "free":
        model = FreeCoupling(sizes, cap=cap, std=1.0, dtype=torch.float64)
    else:
        model = GramCoupling(sizes, 8, cap=cap, dtype=torch.float64)
    return model.requires_grad_(requires_grad=False)


def bias(batch, states=N):
    return torch.randn(batch, states, dtype=torch.float64)


def query(model, batch) -> Any:
    r"""Observes some variables at random states."""
    states = model.groups.starts + (torch.rand(batch, n) * model.groups.sizes).long()
    values = torch.zeros(batch, model.states, dtype=torch.float64).scatter_(1, states, 1.0)
    return {"observed": torch.rand(batch, n) < 0.3, "values": values}
