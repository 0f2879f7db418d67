r"""Linear probes, which tell what features know."""

__all__ = ["LinearProbe", "fit_probe"]

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LinearProbe(nn.Module):
    r"""Is a linear classifier of standardised features.

    Arguments:
        mean: The mean of each feature, with shape :math:`(D,)`.
        std: The scale of each feature.
        weight: The weights, with shape :math:`(V, D)`.
        bias: The biases, with shape :math:`(V,)`.
        penalty: The penalty that they were learned with.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(
        self, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor, *, penalty: float
    ) -> None:
        super().__init__()
        for name, value in {"mean": mean, "std": std, "weight": weight, "bias": bias}.items():
            self.register_buffer(name, value)
        self.penalty = penalty

    def forward(self, x: Tensor) -> Tensor:
        r"""Computes logits, with shape :math:`(*, V)`, of features :math:`(*, D)`."""
        x = (x.to(self.mean.dtype) - self.mean) / self.std
        return x @ self.weight.T + self.bias

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        r"""Returns the share of samples whose label gets the largest logit.

        Arguments:
            x: The features, with shape :math:`(N, D)`.
            labels: The labels, with shape :math:`(N,)`.
        """
        return (self(x).argmax(dim=-1) == labels).double().mean().item()


def fit_probe(
    x: Tensor,
    labels: Tensor,
    *,
    penalties: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    folds: int = 5,
    generator: torch.Generator | None = None,
) -> LinearProbe:
    r"""Fits a multinomial logistic regression to standardised features.

    .. math:: \min_{W, b} \; \frac{1}{N} \sum_n -\log \mathrm{softmax}(W x_n + b)_{y_n}
        + \frac{\lambda}{2} \|W\|^2

    The problem is convex, and is solved by L-BFGS in float64. The penalty :math:`\lambda` is
    that of the best accuracy in cross-validation; on ties the largest.

    Arguments:
        x: The features :math:`x`, with shape :math:`(N, D)`.
        labels: The labels :math:`y`, from 0, with shape :math:`(N,)`.
        penalties: The penalties to choose from.
        folds: The number of parts for cross-validation, which one penalty needs not.
        generator: The source of randomness of the parts.

    Raises:
        ValueError: If shapes do not fit, or features are not finite.

    Example:
        >>> x = torch.randn(200, 5)
        >>> fit_probe(x, (x[:, 0] > 0).long()).accuracy(x, (x[:, 0] > 0).long()) > 0.97
        True
    """
    least = folds if len(penalties) > 1 else 1
    if x.ndim != 2 or labels.shape != x.shape[:1] or len(x) < least:
        raise ValueError(
            f"expected features (N, D) and labels (N,) of {least} samples or more, got "
            f"{tuple(x.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise ValueError("expected labels that are integers from 0")
    if not penalties or min(penalties) <= 0 or folds < 2:
        raise ValueError(
            f"expected positive penalties and two folds or more, got {penalties} and {folds}"
        )
    x, labels = x.detach().double(), labels.long()
    if not bool(x.isfinite().all()):
        raise ValueError("expected finite features, got NaN or infinity")
    classes = int(labels.max()) + 1
    best = max(penalties)
    if len(penalties) > 1:
        part = torch.randperm(len(x), generator=generator).to(x.device) % folds
        scores = dict.fromkeys(sorted(penalties, reverse=True), 0.0)
        for fold in range(folds):
            inside, probe = part != fold, None
            for penalty in scores:  # each starts from the one before; roughly will do
                probe = _fit(x[inside], labels[inside], classes, penalty, 1e-4, probe)
                scores[penalty] += probe.accuracy(x[~inside], labels[~inside])
        best = max(scores, key=lambda penalty: scores[penalty])
    return _fit(x, labels, classes, best, 1e-7)


def _fit(
    x: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    tolerance: float,
    start: LinearProbe | None = None,
) -> LinearProbe:
    r"""Fits a probe until no slope exceeds a tolerance, from where another one ended."""
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = torch.where(std > 1e-12 * mean.abs(), std, 1.0)  # else it is of roundings alone
    z = (x - mean) / std
    weight = z.new_zeros(classes, z.shape[1]) if start is None else start.weight.clone()
    bias = z.new_zeros(classes) if start is None else start.bias.clone()
    weight.requires_grad_()
    bias.requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        tolerance_grad=tolerance,
        tolerance_change=1e-5 * tolerance,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        logits = z @ weight.T + bias
        value = nn.functional.cross_entropy(logits, labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return LinearProbe(mean, std, weight.detach(), bias.detach(), penalty=penalty)
