r"""A fit under way: E-steps, M-steps, validation and checkpoints."""

__all__ = ["Learner", "expected_counts_torch"]

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from probnets.backend import checkpoints

from .circuit import TreeCircuit
from .estep import Counts, Tables, Workspace, expected_counts
from .inputs import Categorical, Discrete
from .mstep import maximise
from .rows import SLICE, Rows
from .settings import EMSettings, FitResult


class Learner:
    r"""Is a fit under way: parameters and history.

    Arguments:
        circuit: The circuit.
        rows: The training data.
        held_out: The validation data.
        settings: The settings.
    """

    def __init__(
        self, circuit: TreeCircuit, rows: Rows, held_out: Rows | None, settings: EMSettings
    ) -> None:
        self.circuit, self.rows, self.held_out, self.settings = circuit, rows, held_out, settings
        self.workers = torch.get_num_threads()
        self.workspace = Workspace()
        self.discrete = isinstance(circuit.inputs, Discrete)
        self.tables: Tables | None = circuit.tables() if self.discrete else None
        self.pseudocount = settings.pseudocounts[0]
        self.history: list[tuple[float, float]] = []
        self.best = math.inf
        self.kept: dict[str, Tensor] | None = None

    # ------------------------------------------------------------------------------------------

    def batches(self, epoch: int) -> Iterator[tuple[Rows, float]]:
        r"""Yields the batches of an epoch, each with its step size."""
        N, size = len(self.rows.x), self.settings.batch_size
        count = N // size  # the rows that are left over join the last batch
        if epoch >= self.mini_epochs():
            yield self.rows, 1.0
            return
        if count <= 1:
            yield self.rows, self.settings.step(epoch, 0.5)
            return
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(N)
        for b in range(count):
            rows = order[b * size : (b + 1) * size if b + 1 < count else N]
            yield self.rows.take(rows), self.settings.step(epoch, b / count)

    def epoch(self, bar: tqdm) -> tuple[float, float]:
        r"""Takes one epoch and returns bits per dimension in training and validation."""
        epoch = len(self.history)
        log_prob, valid = 0.0, math.nan
        for batch, step in self.batches(epoch):
            counts = self.counts(batch)
            log_prob += _total(counts, batch, bar)
            valid = self.maximise(counts, step, batch.total / self.rows.total)
        train = -log_prob / (self.rows.observed() * math.log(2))
        valid = self.validate() if math.isnan(valid) else valid
        self.history.append((train, valid))
        if valid < self.best:
            self.best = valid
            self.keep()
        return train, valid

    def counts(self, rows: Rows) -> Counts:
        r"""Takes the E-step."""
        if self.tables is not None:
            x, w = rows.x.numpy(), rows.weights.numpy()
            return expected_counts(
                self.circuit.tree,
                self.tables,
                x,
                w,
                workers=self.workers,
                workspace=self.workspace,
            )
        assert rows.seen is not None
        slices = [slice(n, n + SLICE) for n in range(0, len(rows.x), SLICE)]
        parts = [
            expected_counts_torch(self.circuit, rows.x[s], rows.seen[s], rows.weights[s])
            for s in slices
        ]
        return Counts(
            np.sum([part.root for part in parts], axis=0),
            np.sum([part.sums for part in parts], axis=0),
            np.sum([part.inputs for part in parts], axis=0),
            np.concatenate([part.log_prob for part in parts]),
        )

    def maximise(self, counts: Counts, step: float, share: float) -> float:
        r"""Takes the M-step, and returns bits per dimension in validation if it had to know."""
        candidates = self.settings.pseudocounts
        if len(candidates) == 1 or self.held_out is None or step < 1.0:
            pseudocount = candidates[0] * share
            self.tables = maximise(
                self.circuit, counts, self.tables, pseudocount, step, in_place=True
            )
            return math.nan
        before, scores = self.tables, []
        inputs = {k: v.clone() for k, v in self.circuit.inputs.state_dict().items()}
        for candidate in (*candidates, None):
            if candidate is None:  # all are tried, the best comes again
                candidate = candidates[int(np.argmin(scores))]
            self.circuit.inputs.load_state_dict(inputs)
            self.tables = maximise(self.circuit, counts, before, candidate, step)
            scores.append(self.validate())
            self.pseudocount = candidate
        return scores[-1]

    def validate(self) -> float:
        r"""Measures bits per dimension on the validation data."""
        if self.held_out is None:
            return math.nan
        if self.tables is not None:
            x, w = self.held_out.x.numpy(), self.held_out.weights.numpy()
            log_prob = expected_counts(
                self.circuit.tree, self.tables, x, w, workers=self.workers, counting=False
            ).log_prob
        else:
            assert self.held_out.seen is not None
            with torch.no_grad():
                parts = zip(
                    self.held_out.x.split(SLICE), self.held_out.seen.split(SLICE), strict=True
                )
                log_prob = torch.cat([self.circuit.log_prob_torch(x, seen) for x, seen in parts])
            log_prob = log_prob.double().numpy()
        bits = -float((log_prob * self.held_out.weights.numpy()).sum()) / math.log(2)
        return bits / self.held_out.observed()

    def mini_epochs(self) -> int:
        r"""Counts the mini-batch epochs, which end when validation has not improved for long."""
        patience, epochs = self.settings.patience, self.settings.epochs
        if patience is None or self.held_out is None:
            return epochs
        best, last = math.inf, 0
        for epoch, (_, valid) in enumerate(self.history[:epochs]):
            if valid < best:
                best, last = valid, epoch
            elif epoch - last >= patience:
                return epoch + 1
        return epochs

    # ------------------------------------------------------------------------------------------

    def write_back(self) -> None:
        r"""Moves the tables into the circuit's parameters."""
        if self.tables is None:
            return
        circuit = self.circuit
        with torch.no_grad():
            circuit.root_logits.copy_(torch.from_numpy(self.tables.root).log())
            circuit.sum_logits.copy_(torch.from_numpy(self.tables.sums).log())
            if isinstance(circuit.inputs, Categorical):
                circuit.inputs.logits.copy_(torch.from_numpy(self.tables.inputs).log())

    def keep(self) -> None:
        r"""Remembers the parameters of now."""
        self.write_back()
        self.kept = {k: v.detach().clone() for k, v in self.circuit.state_dict().items()}

    def finish(self) -> FitResult:
        r"""Restores the best parameters and sums up."""
        self.write_back()
        if self.kept is not None:
            self.circuit.load_state_dict(self.kept)
        best = self.best if self.held_out is not None else math.nan
        return FitResult(self.history, self.pseudocount, best)

    def save(self, path: str | Path) -> None:
        r"""Writes the state of the fit to a file."""
        self.write_back()
        arrays = {f"circuit.{k}": v.numpy() for k, v in self.circuit.state_dict().items()}
        if self.tables is not None:
            tables = self.tables._asdict().items()
            arrays |= {f"tables.{k}": v for k, v in tables if v is not None}
        if self.kept is not None:
            arrays |= {f"kept.{k}": v.numpy() for k, v in self.kept.items()}
        names = ("history", "best", "workers", "pseudocount")
        facts = {name: getattr(self, name) for name in names}
        checkpoints.write(path, arrays, facts | {"run": self.fingerprint()})

    def load(self, path: str | Path) -> None:
        r"""Reads the state of a fit from a file."""
        arrays, facts = checkpoints.read(path)
        if facts.get("run") != self.fingerprint():
            raise ValueError(
                f"expected a checkpoint of this fit in {path}, got one with other settings, data "
                "or circuit; remove it to start anew"
            )
        state = checkpoints.part(arrays, "circuit")
        self.circuit.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
        if self.tables is not None:
            self.tables = Tables(**checkpoints.part(arrays, "tables"))
        kept = checkpoints.part(arrays, "kept")
        self.kept = {k: torch.from_numpy(v) for k, v in kept.items()} if kept else None
        self.history = [(train, valid) for train, valid in facts["history"]]
        self.best, self.workers = facts["best"], facts["workers"]
        self.pseudocount = facts["pseudocount"]

    def fingerprint(self) -> dict[str, object]:
        r"""Describes the fit, so that a checkpoint of another one is not taken for its own."""
        tree, settings = self.circuit.tree, self.settings
        return {
            "settings": repr(settings),
            "tree": checkpoints.digest(tree.parent, tree.region, tree.sum_group, tree.input_group),
            "data": self.rows.digest(),
            "validation": None if self.held_out is None else self.held_out.digest(),
            "inputs": repr(self.circuit.inputs),
        }


def expected_counts_torch(
    circuit: TreeCircuit, x: Tensor, seen: Tensor, weights: Tensor
) -> Counts:
    r"""Computes expected counts as the gradient of the log-likelihood.

    This defines what the compiled loop computes, and serves circuits it cannot.

    Arguments:
        circuit: The circuit.
        x: The values, with shape :math:`(N, D)`.
        seen: Which values are observed, with shape :math:`(N, D)`.
        weights: The weight of each row, with shape :math:`(N,)`.
    """
    local = circuit.local(x, seen).detach().requires_grad_()
    log_root = circuit.log_root().detach().requires_grad_()
    log_sums = circuit.log_sums().detach().requires_grad_()
    beta, _ = circuit.upward(local, log_sums)
    log_prob = circuit.evidence(beta, log_root)

    possible = ~log_prob.isneginf()
    total = (log_prob[possible] * weights.to(log_prob)[possible]).sum()
    leaves = [log_root, log_sums, local]
    root, sums, posterior = torch.autograd.grad(total, leaves, materialize_grads=True)
    inputs = circuit.inputs.statistics(x, circuit.input_group, posterior * seen[..., None])
    counts = (root, sums, inputs, log_prob.detach())
    return Counts(*(part.cpu().numpy() for part in counts))


def _total(counts: Counts, rows: Rows, bar: tqdm) -> float:
    r"""Sums the log-likelihood of the rows that weigh, all of which must be possible."""
    weights = rows.weights.numpy()
    log_prob = np.where(weights > 0, counts.log_prob, 0.0)
    if not np.isfinite(log_prob).all():
        row = int(np.flatnonzero(~np.isfinite(log_prob))[0])
        bar.close()
        raise ValueError(
            f"expected data of positive probability, got row {row} of a batch with probability "
            "zero; start from other parameters or use a pseudocount"
        )
    return float((log_prob * weights).sum())
