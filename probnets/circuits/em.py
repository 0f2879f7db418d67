r"""Learning by expectation maximisation."""

__all__ = ["EMSettings", "FitResult", "fit"]

from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from .circuit import TreeCircuit
from .learner import Learner
from .rows import Rows
from .settings import EMSettings, FitResult


def fit(
    circuit: TreeCircuit,
    data: np.ndarray | Tensor,
    settings: EMSettings | None = None,
    *,
    observed: np.ndarray | Tensor | None = None,
    weights: np.ndarray | Tensor | None = None,
    validation: np.ndarray | Tensor | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> FitResult:
    r"""Fits a circuit to data by expectation maximisation, starting from its parameters.

    Circuits with discrete inputs take a compiled loop in float32, others PyTorch. With
    validation data the best parameters seen are kept.

    A checkpoint is written after each epoch and read if it exists: a fit that was interrupted
    continues and ends with the very parameters of one that was not, on the same number of
    threads.

    Arguments:
        circuit: The circuit, changed in place.
        data: The data, with shape :math:`(N, D)` or the circuit's shape after :math:`N`.
            NaN is missing.
        settings: The schedule, the pseudocount and the seed.
        observed: Which values are observed, with the shape of the data.
        weights: The weight of each row, with shape :math:`(N,)`.
        validation: Data to choose by, as `data`.
        checkpoint: The file to write after each epoch and to resume from.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If data do not fit the circuit, or have probability zero under it.
    """
    settings = settings or EMSettings()
    if circuit.root_logits.device.type != "cpu":
        raise ValueError(
            f"expected a circuit on the CPU, got one on {circuit.root_logits.device}; move it "
            "with .cpu(), or train it there by a torch optimiser"
        )
    rows = Rows.prepare(circuit, data, observed, weights)
    held_out = None if validation is None else Rows.prepare(circuit, validation, None, None)
    learner = Learner(circuit, rows, held_out, settings)
    if checkpoint is not None and Path(checkpoint).exists():
        learner.load(checkpoint)

    total = settings.epochs + settings.full_epochs
    with tqdm(total=total, initial=len(learner.history), desc="EM", disable=not progress) as bar:
        while len(learner.history) < learner.mini_epochs() + settings.full_epochs:
            train, valid = learner.epoch(bar)
            bar.set_postfix(bpd=f"{train:.4f}", valid=f"{valid:.4f}")
            bar.update()
            if checkpoint is not None:
                learner.save(checkpoint)
    return learner.finish()
