r"""How much do the solvers of mean field cost, up to a certified distance from the solution?

Prints the products with the coupling and the milliseconds that all samples of a batch take to come
within 1e-2, 1e-4 and 1e-8 of the one solution, in double precision, and the ratio of times between
the paper's solver and the default. `no` stands for steps or seconds that ran out before.

    python benchmarks/mean_field.py [--batch 16] [--seconds 20] [--smoke]

`digits` is the paper's architecture for MNIST with its cap, 40 % of pixels observed at random and
the label hidden. There is no trained model of it, so weights are random, at three times their
first scale so that nearly all caps bind, as training makes them do. `easy`, `paper cap` and
`extended cap` are dense and have 100 variables of 4 states. The spectra are printed. `published`
is forward-backward splitting with the paper's step of 0.125 and a proximal operator like its own:
Newton's method for the multiplier and Halley's within, both up to 1e-4, or to 1e-8, and until all
groups are done. `paper` has our operator in its place. Spectra are known before; times are the
best of three if they are short.
"""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from probnets import boltzmann as bm

TOLERANCES = 1e-2, 1e-4, 1e-8
ALPHA = 0.125  # of the paper


def main(argv: list[str] | None = None) -> int:
    r"""Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20, help="of a solver and a tolerance")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--smoke", action="store_true", help="small problems, in seconds")
    options = parser.parse_args(argv)
    if options.smoke:
        options.batch, options.seconds = 2, 0.1
    print(f"torch {torch.__version__}, threads: {torch.get_num_threads()}, batch: {options.batch}")
    for name in options.problems:
        torch.manual_seed(0)
        coupling = build(name, small=options.smoke).requires_grad_(requires_grad=False)
        query = draw(coupling, options.batch, 784 if name == "digits" else 100)
        largest, smallest = coupling.spectrum()
        print(f"\n{name}: {coupling.states} states, eigenvalues {smallest:.2f} to < {largest:g}")
        print(f"{'products and ms':24}" + "".join(f"{f'to {x:g}':>20}" for x in TOLERANCES))
        times = {}
        for title, solver in SOLVERS.items():
            cells, count, spent = [], 0, 0.0
            for tolerance in TOLERANCES:  # what one stops, a smaller one would
                if spent < math.inf:
                    count, spent = run(query | {"tolerance": tolerance}, solver, options.seconds)
                cells.append(f"{count:5} {1e3 * spent:10.1f}" if spent < math.inf else "no")
                times[title, tolerance] = spent
            print(f"{title:24}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
        for title in list(SOLVERS)[:3]:
            ratios = (times[title, x] / times["auto", x] for x in TOLERANCES)
            print(f"{title + ' / auto':24}" + "".join(f"{ratio:20.1f}" for ratio in ratios))
    return 0


def build(name: str, *, small: bool) -> bm.Coupling:
    r"""Creates a coupling."""
    sizes = [4] * (5 if small else 100)
    paper: dict[str, Any] = {"cap": "paper", "margin": 0.01, "dtype": torch.float64}
    match name:
        case "digits" if small:
            tiers = [bm.Tier(3, 1, 4, 4), bm.Tier(2, 2, 2, 2), bm.Tier(5)]
            made = bm.TierCoupling(tiers, {(0, 0): 3, (1, 0): 3, (2, 1): 1}, **paper)
        case "digits":
            made = bm.paper_architecture(**paper)
        case "easy" | "paper cap":
            made = bm.GramCoupling(sizes, 400 if name == "easy" else 20, **paper)
        case _:
            made = bm.FreeCoupling(sizes, margin=0.05, std=1.0, dtype=torch.float64)
    for weight in made.parameters():
        weight.data.mul_(0.3 if name == "easy" else 3)
    return made


def draw(coupling: bm.Coupling, batch: int, pixels: int) -> dict[str, Any]:
    r"""Draws biases, and values of 40 % of the pixels."""
    observed = torch.rand(batch, coupling.variables) < 0.4
    observed[:, pixels:] = False
    chosen = (torch.rand(observed.shape) * coupling.groups.sizes).long()
    bias = torch.randn(coupling.states, dtype=torch.float64)
    values = torch.zeros(batch, coupling.states, dtype=torch.float64)
    values.scatter_(1, coupling.groups.starts + chosen, 1.0)
    return {"coupling": coupling, "bias": bias, "observed": observed, "values": values}


def run(query: dict[str, Any], solver: bm.Solver | str, seconds: float) -> tuple[int, float]:
    r"""Returns products and seconds, which are infinite if steps or time run out."""
    products, best = 0, math.inf
    for _ in range(3):
        start = time.perf_counter()
        timed: Any = solver if isinstance(solver, str) else Timed(solver, start + seconds)
        with contextlib.suppress(RuntimeError, TimeoutError):
            found = bm.mean_field(**query, solver=timed, max_steps=5000, strict=True)
            products, best = found.products, min(best, time.perf_counter() - start)
        if best > 1:
            break  # infinity included
    return products, best


@dataclass
class Timed(bm.Solver):
    r"""Takes the steps of a solver until the time is over."""

    inner: bm.Solver
    end: float

    def start(self, problem: bm.Problem, theta: Tensor) -> bm.State:
        problem.multiply = partial(self.checked, problem.multiply)
        return self.inner.start(problem, theta)

    def checked(self, multiply: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        if time.perf_counter() > self.end:
            raise TimeoutError
        return multiply(v)

    def step(self, problem: bm.Problem, state: bm.State) -> bm.State:
        return self.inner.step(problem, state)


@dataclass
class Published(bm.Solver):
    r"""Takes the steps of the paper, with its proximal operator."""

    tolerance: float

    def step(self, problem: bm.Problem, state: bm.State) -> bm.State:
        y = (1 - ALPHA) * state.q + ALPHA * (state.phi + problem.field)
        runs = [list(same) for _, same in groupby(problem.groups.sizes.tolist())]
        parts = y.split([sum(run) for run in runs], dim=1)
        cut = [part.unflatten(1, (-1, run[0])) for part, run in zip(parts, runs, strict=True)]
        theta = torch.cat([published(part, self.tolerance).flatten(1) for part in cut], dim=1)
        return bm.solvers.arrive(problem, theta, problem.marginals(theta))


def published(y: Tensor, tolerance: float) -> Tensor:
    r"""Computes the logarithms of the paper's proximal operator along the last dimension."""
    x, nu = torch.zeros_like(y), 1 - y.amax(dim=-1, keepdim=True)
    for _ in range(100):
        for _ in range(100):  # (1 - α) exp x + α x = y + ν - α
            curved = (1 - ALPHA) * x.exp()
            rest, slope = ALPHA * x + curved - (y + nu - ALPHA), ALPHA + curved
            if rest.abs().max() <= tolerance:
                break
            x = x - 2 * rest * slope / (2 * slope.square() - rest * curved)
        z = x.exp()
        excess = z.sum(dim=-1, keepdim=True) - 1
        if excess.abs().max() <= tolerance:
            break
        nu = nu - excess / (z / (ALPHA + (1 - ALPHA) * z)).sum(dim=-1, keepdim=True)
    return x


PROBLEMS = ["digits", "easy", "paper cap", "extended cap"]

SOLVERS: dict[str, bm.Solver | str] = {
    "published": Published(1e-4),
    "published, 1e-8": Published(1e-8),
    "paper": bm.ForwardBackward(ALPHA),
    **{name: make() for name, make in bm.meanfield.SOLVERS.items()},
    "auto": "auto",
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
