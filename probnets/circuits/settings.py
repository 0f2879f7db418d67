r"""What a fit is told, and what it tells."""

__all__ = ["EMSettings", "FitResult"]

from dataclasses import dataclass


@dataclass(frozen=True)
class EMSettings:
    r"""Creates the settings of a fit.

    Mini-batch epochs move the parameters towards those that suit a batch best,

    .. math:: \theta \leftarrow (1 - \eta) \theta + \eta \, \hat\theta(\text{batch}) ,

    with a step :math:`\eta` that falls geometrically from ``first_step`` to ``last_step``. On
    images this gave better likelihoods, in training and on new data, than averaging the expected
    counts instead, as in stepwise EM. Full-batch epochs, :math:`\eta = 1`, finish the fit. With
    full-batch epochs alone this is classical EM, which never lowers the likelihood.

    References:
        | Tractable Regularization of Probabilistic Circuits (Liu & Van den Broeck, 2021)
        | https://arxiv.org/abs/2106.02264

    Arguments:
        epochs: The number of mini-batch epochs.
        full_epochs: The number of full-batch epochs that follow.
        batch_size: The number of rows :math:`B` of a mini-batch.
        first_step: The first step size.
        last_step: The last step size.
        pseudocount: The count added for each parameter to those of all data, of which a batch
            gets its share. Of several, full-batch epochs choose the one that suits the
            validation data best; the first is used until then, and without validation data.
        patience: The number of epochs without improvement on the validation data after which
            the mini-batch epochs end. By default, and without validation data, all take place.
        seed: The seed of the order of the rows.
    """

    epochs: int = 20
    full_epochs: int = 1
    batch_size: int = 500
    first_step: float = 0.9
    last_step: float = 0.05
    pseudocount: float | tuple[float, ...] = (0.1, 0.03, 0.3, 1.0)
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.full_epochs < 0 or self.batch_size < 1:
            raise ValueError(
                f"expected no negative epochs and a batch size of 1 or more, got {self}"
            )
        if not (0 < self.last_step <= 1 and 0 < self.first_step <= 1):
            raise ValueError(f"expected steps in (0, 1], got {self.first_step}, {self.last_step}")
        if not self.pseudocounts or min(self.pseudocounts) < 0:
            raise ValueError(f"expected pseudocounts of 0 or more, got {self.pseudocount}")

    @property
    def pseudocounts(self) -> tuple[float, ...]:
        r"""The candidates for the pseudocount."""
        single = isinstance(self.pseudocount, (int, float))
        return (float(self.pseudocount),) if single else tuple(self.pseudocount)  # type: ignore

    def step(self, epoch: int, part: float) -> float:
        r"""Returns the step size after a part, from 0 to 1, of an epoch."""
        if epoch >= self.epochs:
            return 1.0
        progress = (epoch + part) / self.epochs
        return self.first_step * (self.last_step / self.first_step) ** progress


@dataclass(frozen=True)
class FitResult:
    r"""Is the outcome of a fit.

    Arguments:
        history: For each epoch, bits per dimension on the training data, measured while they
            changed, and on the validation data, which are NaN without any.
        pseudocount: The pseudocount that was chosen last.
        best: The validation bits per dimension of the parameters that were kept.
    """

    history: list[tuple[float, float]]
    pseudocount: float
    best: float
