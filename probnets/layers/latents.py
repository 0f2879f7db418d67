r"""Learned queries that read tokens."""

__all__ = ["LatentRead"]

from typing import Literal

import torch
from torch import Tensor, nn

from .attention import attend
from .layer import Layer
from .norms import token_norm
from .widths import head_width


class LatentRead(Layer):
    r"""Creates learned queries that read a set of tokens, of any number, by cross-attention.

    .. math:: y_c = W_O \, [\mathrm{attend}(q_c^h, W_K^h \, \mathrm{norm}(x),
        W_V^h \, \mathrm{norm}(x))]_{h = 1, \dots, H}

    The output has one row for each of :math:`C` queries, whatever the number of tokens, and
    stays as it is if tokens are permuted. It replaces average pooling where one vector is too
    little, or where several parts of the input are to be told apart.

    References:
        | FIT: Far-reaching Interleaved Transformers (Chen and Li, 2023)
        | https://arxiv.org/abs/2305.12689

        | CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification
        | (Chen et al., 2021)
        | https://arxiv.org/abs/2103.14899

    Used by: bottleneck, for the heads of codebooks; circuits, to pool an image into parameters.

    Arguments:
        features: The number of features :math:`D` of a token.
        latents: The number of queries :math:`C`, which start from :math:`\mathcal{N}(0, 1)`.
        heads: The number of heads :math:`H`.
        out_features: The number of features :math:`D'` of an output, :math:`D` by default.
        head_features: The number of features of a head, :math:`D / H` by default.
        norm: The norm of tokens: ``layer``, ``layer_plain`` (without weights) or ``none``.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> LatentRead(8, 4, heads=2, out_features=6)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 4, 6])
    """

    def __init__(
        self,
        features: int,
        latents: int,
        *,
        heads: int,
        out_features: int | None = None,
        head_features: int | None = None,
        norm: Literal["layer", "layer_plain", "none"] = "layer",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = features if out_features is None else out_features
        for name, value in (
            ("features", features),
            ("latents", latents),
            ("out_features", out_features),
        ):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        self.features, self.latents, self.out_features = features, latents, out_features
        self.heads, self.head_features = heads, head_width(features, heads, head_features)
        inner = heads * self.head_features
        self.queries = nn.Parameter(torch.empty(latents, inner, device=device, dtype=dtype))
        self.norm = token_norm(norm, features, device=device, dtype=dtype)
        self.kv = nn.Linear(features, 2 * inner, device=device, dtype=dtype)
        self.output = nn.Linear(inner, out_features, device=device, dtype=dtype)
        self.start(None)

    def own_fan_in(self, name: str) -> int | None:
        return 1 if name == "queries" else None

    def start(self, generator: torch.Generator | None) -> None:
        r"""Draws the queries."""
        nn.init.normal_(self.queries, generator=generator)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        r"""Computes what the queries read.

        Arguments:
            x: The tokens, with shape :math:`(B, N, D)`.
            visible: Which tokens are visible, boolean with shape :math:`(B, N)`, one or more in
                each sample. By default all are.

        Returns:
            The features, with shape :math:`(B, C, D')`.

        Raises:
            ValueError: If the shapes do not fit, or a sample has no visible token.
        """
        if x.ndim != 3 or x.shape[-1] != self.features or x.shape[1] == 0:
            raise ValueError(
                f"expected x with shape (B, N, {self.features}), got {tuple(x.shape)}"
            )
        bias = None
        if visible is not None:
            _check_tokens(visible, x)
            x = x.masked_fill(~visible[..., None], 0)
            bias = torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, -torch.inf)
            bias = bias[:, None, None]  # (B, N) -> (B, 1, 1, N)

        kv = self.kv(self.norm(x)).unflatten(-1, (2, self.heads, self.head_features))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind()  # each (B, H, N, d)
        q = self.queries.unflatten(-1, (self.heads, self.head_features)).transpose(0, 1)
        y = attend(q.expand(len(x), -1, -1, -1), k, v, bias=bias)  # (B, H, C, d)
        return self.output(y.transpose(1, 2).flatten(2))


def _check_tokens(visible: Tensor, x: Tensor) -> None:
    if visible.dtype != torch.bool or visible.shape != x.shape[:2]:
        raise ValueError(
            f"expected a boolean mask with shape {tuple(x.shape[:2])}, "
            f"got {visible.dtype} with shape {tuple(visible.shape)}"
        )
    empty = ~visible.any(dim=1)
    if bool(empty.any()):
        raise ValueError(
            "expected one or more visible tokens in each sample, got none in samples "
            f"{empty.nonzero().flatten().tolist()}"
        )
