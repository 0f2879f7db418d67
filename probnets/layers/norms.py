r"""Norms of maps by name."""

__all__ = [
    "NORMS",
    "BatchNorm",
    "GroupNorm",
    "InstanceBatchNorm",
    "LayerNorm",
    "NoNorm",
    "Norm",
    "NormName",
    "ProgressiveNorm",
    "RepBatchNorm",
    "ResponseNorm",
    "norm",
    "token_norm",
]

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .layer import MapLayer
from .visible import expand, hide

NormName = Literal[
    "none",
    "layer",
    "layer_plain",
    "group",
    "batch",
    "instance_batch",
    "rep_batch",
    "progressive",
    "response",
]


class NoNorm(MapLayer):
    r"""Creates a norm that does nothing.

    Arguments:
        channels: The number of channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)

    @property
    def receptive_field(self) -> int:
        return 1

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        return x


class LayerNorm(MapLayer):
    r"""Creates a layer norm over the channels of each pixel.

    References:
        | A ConvNet for the 2020s (Liu et al., 2022)
        | https://arxiv.org/abs/2201.03545

    Arguments:
        channels: The number of channels.
        affine: Whether channels are scaled and shifted by weights.
        eps: What is added to the variance.
    """

    def __init__(
        self,
        channels: int,
        *,
        affine: bool = True,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        self.norm = nn.LayerNorm(
            channels, eps=eps, elementwise_affine=affine, device=device, dtype=dtype
        )

    @property
    def receptive_field(self) -> int:
        return 1

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class GroupNorm(MapLayer):
    r"""Creates a group norm, over all visible pixels of a group of channels.

    References:
        | Group Normalization (Wu and He, 2018)
        | https://arxiv.org/abs/1803.08494

    Arguments:
        channels: The number of channels.
        groups: The number of groups, which divides it. By default groups have eight channels
            or more, and there are 32 of them at most.
        eps: What is added to the variance.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int | None = None,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        if groups is None:
            most = max(1, min(32, channels // 8))
            groups = next(g for g in range(most, 0, -1) if channels % g == 0)
        self.norm = nn.GroupNorm(groups, channels, eps=eps, device=device, dtype=dtype)

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        if visible is None:
            return self.norm(x)
        dtype, x = x.dtype, hide(x, visible)
        x = x.to(torch.promote_types(dtype, torch.float32))  # counts overflow in 16 bits
        mask = expand(visible, x)[:, None]  # (B, 1, 1, H, W)
        grouped = x.unflatten(1, (self.norm.num_groups, -1))  # (B, G, C / G, H, W)
        count = mask.sum(dim=(2, 3, 4), keepdim=True) * grouped.shape[2]
        mean = (grouped * mask).sum(dim=(2, 3, 4), keepdim=True) / count
        centred = grouped - mean
        variance = (centred.square() * mask).sum(dim=(2, 3, 4), keepdim=True) / count
        y = (centred * (variance + self.norm.eps).rsqrt()).flatten(1, 2).to(dtype)
        return y * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


class BatchNorm(MapLayer):
    r"""Creates a batch norm with running statistics, over all visible pixels of a batch.

    In evaluation mode it is an affine map of each channel, hence per sample. In training it
    couples the samples of a batch.

    References:
        | Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        | Shift (Ioffe and Szegedy, 2015)
        | https://arxiv.org/abs/1502.03167

    Arguments:
        channels: The number of channels.
        eps: What is added to the variance.
        momentum: The weight of a batch in the running statistics.
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        self.norm = nn.BatchNorm2d(
            channels, eps=eps, momentum=momentum, device=device, dtype=dtype
        )

    @property
    def receptive_field(self) -> int | None:
        return None if self.training else 1

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        if visible is None or not self.training:
            return self.norm(x)
        mask = expand(visible, x).bool().expand_as(x).movedim(1, -1)  # (B, H, W, C)
        rows = x.movedim(1, -1)[mask].view(1, -1, self.in_channels)
        y = torch.zeros_like(mask, dtype=x.dtype)
        y[mask] = self.norm(rows.transpose(1, 2)[..., None]).squeeze(3).transpose(1, 2).flatten()
        return y.movedim(-1, 1)

    @torch.no_grad()
    def fold(self) -> tuple[Tensor, Tensor]:
        r"""Returns the scale and the shift of each channel that it applies in evaluation."""
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return scale, norm.bias - norm.running_mean * scale


class RepBatchNorm(MapLayer):
    r"""Creates a batch norm with a short cut, which folds into the linear map after it.

    .. math:: y = \mathrm{BN}(x) + \alpha x

    References:
        | SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
        | Re-parameterized Batch Normalization (Guo et al., 2024)
        | https://arxiv.org/abs/2405.11582

    Arguments:
        channels: The number of channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        self.batch = BatchNorm(channels, device=device, dtype=dtype)
        self.alpha = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    @property
    def receptive_field(self) -> int | None:
        return self.batch.receptive_field

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        return self.batch(x, visible) + self.alpha * x

    @torch.no_grad()
    def fold(self) -> tuple[Tensor, Tensor]:
        r"""Returns the scale and the shift of each channel that it applies in evaluation."""
        scale, shift = self.batch.fold()
        return scale + self.alpha, shift


class ProgressiveNorm(MapLayer):
    r"""Creates a layer norm that turns into a batch norm while training.

    .. math:: y = \lambda \, \mathrm{LN}(x) + (1 - \lambda) (\mathrm{BN}(x) + \alpha x)

    :math:`\lambda` falls linearly from one to zero over the first :math:`T` passes in training
    mode. Evaluation uses the :math:`\lambda` that has been reached. Once that is zero, the norm
    is an affine map of each channel in evaluation, which the next linear map can take over.

    References:
        | SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
        | Re-parameterized Batch Normalization (Guo et al., 2024)
        | https://arxiv.org/abs/2405.11582

    Arguments:
        channels: The number of channels.
        steps: The number of passes :math:`T`.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> ProgressiveNorm(8, steps=1000)(torch.randn(2, 8, 3, 5)).shape
        torch.Size([2, 8, 3, 5])
    """

    count: Tensor  # (), the passes in training so far

    def __init__(
        self,
        channels: int,
        *,
        steps: int = 10_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        if steps < 1:
            raise ValueError(f"expected steps >= 1, got {steps}")
        self.steps = steps
        self.layer = LayerNorm(channels, device=device, dtype=dtype)
        self.batch = RepBatchNorm(channels, device=device, dtype=dtype)
        self.register_buffer("count", torch.zeros((), device=device, dtype=torch.long))

    @property
    def receptive_field(self) -> int | None:
        return self.batch.receptive_field

    @property
    def share(self) -> Tensor:
        r"""The share :math:`\lambda` of the layer norm, a scalar tensor."""
        return (1 - self.count / self.steps).clamp(min=0)

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        share = self.share.to(x.dtype)
        if self.training:
            self.count.add_(1)
        return share * self.layer(x, visible) + (1 - share) * self.batch(x, visible)

    @torch.no_grad()
    def fold(self) -> tuple[Tensor, Tensor]:
        r"""Returns the scale and the shift of each channel that it applies in evaluation.

        Raises:
            ValueError: If it has trained for fewer passes than it takes.
        """
        if self.share > 0:
            raise ValueError(
                f"expected {self.steps} passes in training mode before folding, got "
                f"{int(self.count)}; train on, or set count"
            )
        return self.batch.fold()


class InstanceBatchNorm(MapLayer):
    r"""Creates an instance norm of some channels beside a batch norm of the others.

    References:
        | Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net
        | (Pan et al., 2018)
        | https://arxiv.org/abs/1807.09441

    Arguments:
        channels: The number of channels, two or more.
        ratio: The share of channels with an instance norm, rounded down to one or more and
            leaving one or more to the batch norm.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        if channels < 2 or not 0 < ratio < 1:
            raise ValueError(
                f"expected channels >= 2 and ratio in (0, 1), got {channels} and {ratio}"
            )
        part = min(max(1, int(channels * ratio)), channels - 1)
        self.sizes = part, channels - part
        self.instance = GroupNorm(part, groups=part, device=device, dtype=dtype)
        self.batch = BatchNorm(channels - part, device=device, dtype=dtype)

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        first, second = x.split(self.sizes, dim=1)
        return torch.cat([self.instance(first, visible), self.batch(second, visible)], dim=1)


class ResponseNorm(MapLayer):
    r"""Creates a global response norm, which lets the channels of a sample compete.

    .. math:: y_c = \gamma_c \, x_c \frac{\|x_c\|}{\frac{1}{C} \sum_j \|x_j\|} + \beta_c + x_c

    Norms are over visible pixels. :math:`\gamma` and :math:`\beta` start at zero.

    References:
        | ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders
        | (Woo et al., 2023)
        | https://arxiv.org/abs/2301.00808

    Arguments:
        channels: The number of channels.
        eps: What is added to the mean of norms.
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels)
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def transform(self, x: Tensor, visible: Tensor | None) -> Tensor:
        # A tiny number keeps the slope of the norm of a zero map from being NaN.
        wide = hide(x, visible).to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(dim=(2, 3), keepdim=True)
        size = (squares + torch.finfo(wide.dtype).tiny).sqrt()
        ratio = size / (size.mean(dim=1, keepdim=True) + self.eps)
        scale = self.weight[:, None, None] * ratio.to(x.dtype)
        return x * (1 + scale) + self.bias[:, None, None]


class Norm(NamedTuple):
    r"""Is a norm and what it promises.

    Attributes:
        build: Creates it, from ``channels``, ``device`` and ``dtype``.
        per_sample: Whether in evaluation mode outputs depend on their own sample alone.
        function: Whether in training mode too it is a function of the sample and the weights.
    """

    build: Callable[..., MapLayer]
    per_sample: bool
    function: bool


def _plain(
    channels: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LayerNorm:
    return LayerNorm(channels, affine=False, device=device, dtype=dtype)


NORMS: dict[str, Norm] = {
    "none": Norm(NoNorm, per_sample=True, function=True),
    "layer": Norm(LayerNorm, per_sample=True, function=True),
    "layer_plain": Norm(_plain, per_sample=True, function=True),
    "group": Norm(GroupNorm, per_sample=True, function=True),
    "batch": Norm(BatchNorm, per_sample=True, function=False),
    "instance_batch": Norm(InstanceBatchNorm, per_sample=True, function=False),
    "rep_batch": Norm(RepBatchNorm, per_sample=True, function=False),
    "progressive": Norm(ProgressiveNorm, per_sample=True, function=False),
    "response": Norm(ResponseNorm, per_sample=True, function=True),
}


def norm(
    name: NormName,
    channels: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MapLayer:
    r"""Creates a norm of maps.

    Arguments:
        name: Its name: ``none``, ``layer``, ``layer_plain`` (without weights), ``group``,
            ``batch``, ``instance_batch``, ``rep_batch``, ``progressive`` or ``response``.
        channels: The number of channels.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> norm("group", 16)(torch.randn(2, 16, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """
    if name not in NORMS:
        raise ValueError(f"expected a norm of {sorted(NORMS)}, got {name!r}")
    return NORMS[name].build(channels, device=device, dtype=dtype)


def token_norm(
    name: Literal["layer", "layer_plain", "none"],
    features: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    r"""Creates a norm of tokens, over the features of each.

    Arguments:
        name: Its name: ``layer``, ``layer_plain`` (without weights) or ``none``.
        features: The number of features.
        device: The device.
        dtype: The type of the weights.
    """
    if name == "none":
        return nn.Identity()
    if name not in ("layer", "layer_plain"):
        raise ValueError(f"expected a norm of tokens, layer, layer_plain or none, got {name!r}")
    return nn.LayerNorm(
        features, eps=1e-6, elementwise_affine=name == "layer", device=device, dtype=dtype
    )
