r"""Layers that compress and sparsify, each by a step of an optimisation."""

__all__ = ["CrateBlock", "CrateDecoderBlock", "SparseStep", "SubspaceAttention"]

from typing import Literal

import torch
from torch import Tensor, nn

from .attention import attend
from .layer import TokenLayer
from .norms import token_norm
from .widths import head_width


class SubspaceAttention(TokenLayer):
    r"""Creates a self-attention whose queries, keys and values are the same.

    .. math:: \mathrm{MSSA}(z) = W_O \, [\mathrm{attend}(w_h, w_h, w_h)]_{h = 1, \dots, H},
        \quad w_h = U_h^\top z

    Each head projects tokens to a subspace and moves them there towards those alike. This is
    close to a gradient step that lowers the rate to code the tokens in all subspaces. It has
    half the weights of an attention with three projections.

    References:
        | White-Box Transformers via Sparse Rate Reduction: Compression Is All There Is?
        | (Yu et al., 2023)
        | https://arxiv.org/abs/2311.13110

    Used by: backbones of bottleneck and priors, in :class:`CrateBlock`.

    Arguments:
        features: The number of features :math:`D` of a token.
        heads: The number of heads :math:`H`.
        head_features: The number of features of a head, :math:`D / H` by default.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> SubspaceAttention(8, heads=2)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        head_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features)
        self.heads, self.head_features = heads, head_width(features, heads, head_features)
        inner = heads * self.head_features
        self.subspaces = nn.Linear(features, inner, bias=False, device=device, dtype=dtype)
        self.output = nn.Linear(inner, features, device=device, dtype=dtype)

    def transform(self, x: Tensor) -> Tensor:
        w = self.subspaces(x).unflatten(-1, (self.heads, self.head_features))
        w = w.transpose(1, 2)  # (B, N, H, d) -> (B, H, N, d)
        return self.output(attend(w, w, w).transpose(1, 2).flatten(2))


class SparseStep(TokenLayer):
    r"""Creates a step towards sparse, non-negative codes of tokens in a learned dictionary.

    .. math:: y = \mathrm{ReLU}(z + \eta D^\top (z - D z) - \eta \lambda)

    Each token :math:`z` is a column here, and the columns of :math:`D`, which is square, are
    the atoms. The step is one of proximal gradient descent (ISTA) from the code :math:`a = z`
    on

    .. math:: \min_{a \ge 0} \tfrac{1}{2} \|z - D a\|^2 + \lambda \|a\|_1.

    References:
        | White-Box Transformers via Sparse Rate Reduction: Compression Is All There Is?
        | (Yu et al., 2023)
        | https://arxiv.org/abs/2311.13110

    Used by: backbones of bottleneck and priors, in :class:`CrateBlock`.

    Arguments:
        features: The number of features of a token.
        step: The step size :math:`\eta`.
        threshold: The weight :math:`\lambda` of sparsity.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> SparseStep(8)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        features: int,
        *,
        step: float = 0.1,
        threshold: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features)
        if step <= 0 or threshold < 0:
            raise ValueError(f"expected step > 0 and threshold >= 0, got {step} and {threshold}")
        self.step, self.threshold = step, threshold
        self.dictionary = nn.Linear(features, features, bias=False, device=device, dtype=dtype)

    def transform(self, x: Tensor) -> Tensor:
        residual = x - self.dictionary(x)
        descent = residual @ self.dictionary.weight - self.threshold  # D^T r, with rows as tokens
        return (x + self.step * descent).relu()


class CrateBlock(TokenLayer):
    r"""Creates a block that compresses tokens, then makes them sparse.

    .. math::

        z &\gets z + s \, \mathrm{MSSA}(\mathrm{norm}(z)) \\
        z &\gets \mathrm{ISTA}(\mathrm{norm}(z))

    The second step has no short cut around it: it starts from the normed tokens. Its outputs
    are not negative, many of them zero.

    References:
        | White-Box Transformers via Sparse Rate Reduction: Compression Is All There Is?
        | (Yu et al., 2023)
        | https://arxiv.org/abs/2311.13110

    Used by: backbones of bottleneck and priors.

    Arguments:
        features: The number of features of a token.
        heads: The number of heads of the :class:`SubspaceAttention`.
        head_features: The number of features of a head, ``features / heads`` by default.
        step: The step size of the :class:`SparseStep`.
        threshold: Its weight of sparsity.
        norm: The norm of tokens: ``layer``, ``layer_plain`` (without weights) or ``none``.
        res_scale: The fixed factor :math:`s` of the attention.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> CrateBlock(8, heads=2)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        head_features: int | None = None,
        step: float = 0.1,
        threshold: float = 0.1,
        norm: Literal["layer", "layer_plain", "none"] = "layer",
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features)
        self.res_scale = res_scale
        self.norm1 = token_norm(norm, features, device=device, dtype=dtype)
        self.attention = SubspaceAttention(
            features, heads=heads, head_features=head_features, device=device, dtype=dtype
        )
        self.norm2 = token_norm(norm, features, device=device, dtype=dtype)
        self.sparse = SparseStep(
            features, step=step, threshold=threshold, device=device, dtype=dtype
        )

    def transform(self, x: Tensor) -> Tensor:
        x = x + self.res_scale * self.attention(self.norm1(x))
        return self.sparse(self.norm2(x))


class CrateDecoderBlock(TokenLayer):
    r"""Creates a block that goes back through a :class:`CrateBlock`, in structure.

    .. math::

        z &\gets W \, \mathrm{norm}(z) \\
        z &\gets z - \mathrm{MSSA}(\mathrm{norm}(z))

    It leaves the sparse code by a linear map and then expands what the encoder compressed. Its
    weights are its own: it undoes the encoder only once trained to, by completing images of
    which tokens are masked.

    References:
        | Masked Completion via Structured Diffusion with White-Box Transformers
        | (Pai et al., 2024)
        | https://arxiv.org/abs/2404.02446

    Used by: bottleneck, to train encoders.

    Arguments:
        features: The number of features of a token.
        heads: The number of heads of the :class:`SubspaceAttention`.
        head_features: The number of features of a head, ``features / heads`` by default.
        norm: The norm of tokens: ``layer``, ``layer_plain`` (without weights) or ``none``.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> CrateDecoderBlock(8, heads=2)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        head_features: int | None = None,
        norm: Literal["layer", "layer_plain", "none"] = "layer",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features)
        self.norm1 = token_norm(norm, features, device=device, dtype=dtype)
        self.map = nn.Linear(features, features, bias=False, device=device, dtype=dtype)
        self.norm2 = token_norm(norm, features, device=device, dtype=dtype)
        self.attention = SubspaceAttention(
            features, heads=heads, head_features=head_features, device=device, dtype=dtype
        )

    def transform(self, x: Tensor) -> Tensor:
        x = self.map(self.norm1(x))
        return x - self.attention(self.norm2(x))
