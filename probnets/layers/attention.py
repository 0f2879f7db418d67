r"""Attention between tokens."""

__all__ = ["AttentionBlock", "FeedForward", "MultiHeadAttention", "attend"]

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionCtx
from torch.nn.functional import scaled_dot_product_attention

from .activations import Activation
from .activations import activation as create_activation
from .layer import TokenLayer
from .norms import token_norm
from .widths import head_width, hidden_width


def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    r"""Computes scaled dot-product attention.

    .. math:: \mathrm{softmax}(q k^\top / \sqrt{d} + b) \, v

    PyTorch's fused attention stands in for the formula where it can: it is faster and keeps none
    of the :math:`N \times M` scores. It is computed once more for the gradient, and by the
    formula for second derivatives, in forward mode and under :mod:`torch.func`. The two agree up
    to rounding, not in all bits.

    Arguments:
        q: The queries :math:`q`, with shape :math:`(*, N, d)`.
        k: The keys :math:`k`, with shape :math:`(*, M, d)`.
        v: The values :math:`v`, with shape :math:`(*, M, e)`.
        bias: What is added to the scores :math:`b`, of a shape that broadcasts to
            :math:`(*, N, M)`. Where it is :math:`-\infty` no attention is paid; each row needs
            a finite entry.

    Returns:
        The means of values, with shape :math:`(*, N, e)`.

    Example:
        >>> q, k, v = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6, 3)
        >>> attend(q, k, v).shape
        torch.Size([4, 3])
    """
    if not _fusible(q, k, v, bias):
        return _attend_torch(q, k, v, bias)
    tensors = (q, k, v) if bias is None else (q, k, v, bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        if bias is not None and bias.requires_grad:  # its gradient needs the scores
            return _attend_torch(q, k, v, bias)
        return _Fused.apply(*tensors)
    return _fused(*tensors)


def _attend_torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT  # (*, N, M)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=bias)


class _Fused(Function):
    r"""Is the fused attention, with a gradient that can be differentiated again."""

    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return _fused(*tensors)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # the graph of the gradient itself is being recorded
        tensors = ctx.saved_tensors  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad  # type: ignore[attr-defined]
        with torch.enable_grad():
            if again:  # views, as one of the tensors may come from another
                tensors = [x.view_as(x) for x in tensors]
            else:
                pairs = zip(tensors, needs, strict=True)
                tensors = [x.detach().requires_grad_(needed) for x, needed in pairs]
            attention = _attend_torch if again else _fused
            wanted = [x for x, needed in zip(tensors, needs, strict=True) if needed]
            found = iter(
                torch.autograd.grad(attention(*tensors), wanted, gradients, create_graph=again)
            )
        return tuple(next(found) if needed else None for needed in needs)


def _fusible(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    r"""Tells whether the fused attention knows the shapes, and no transformation watches."""
    if torch.compiler.is_compiling():
        return False
    tensors = (q, k, v) if bias is None else (q, k, v, bias)
    return (
        q.ndim == 4
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and q.shape[-1] == v.shape[-1]
        and q.dtype == k.dtype == v.dtype
        and (bias is None or (bias.ndim in (2, 4) and bias.dtype == q.dtype))
        and not any(map(_transformed, tensors))
    )


def _transformed(x: Tensor) -> bool:
    r"""Tells whether a tensor is the stand-in of vmap, grad or jvp, or has a tangent."""
    functorch = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return wrapped is None or wrapped(x) or forward_ad.unpack_dual(x).tangent is not None


class MultiHeadAttention(TokenLayer):
    r"""Creates a self-attention with several heads.

    .. math:: y = W_O \, [\mathrm{attend}(W_Q^h x, W_K^h x, W_V^h x)]_{h = 1, \dots, H}

    Heads may be wider together than the tokens, :math:`H d > D`: one such layer, with the heads
    of many, is the wide alternative to a deep network.

    References:
        | Attention Is All You Need (Vaswani et al., 2017)
        | https://arxiv.org/abs/1706.03762

        | Wide Attention Is The Way Forward For Transformers? (Brown et al., 2022)
        | https://arxiv.org/abs/2210.00640

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        features: The number of features :math:`D` of a token.
        heads: The number of heads :math:`H`.
        head_features: The number of features :math:`d` of a head, :math:`D / H` by default.
        bias: Whether the linear maps have biases.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> MultiHeadAttention(8, heads=2)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        head_features: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features)
        self.heads = heads
        self.head_features = head_width(features, heads, head_features)
        inner = heads * self.head_features
        self.qkv = nn.Linear(features, 3 * inner, bias=bias, device=device, dtype=dtype)
        self.output = nn.Linear(inner, features, bias=bias, device=device, dtype=dtype)

    def transform(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head_features))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, H, N, d)
        return self.output(attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(TokenLayer):
    r"""Creates a network of two layers that acts on each token alone.

    .. math::

        \text{mlp:} \quad y &= W_2 \, \phi(W_1 x) \\
        \text{geglu:} \quad y &= W_3 \, (\phi(W_1 x) \odot W_2 x)

    The second gates one hidden layer by another. Both kinds have hidden layers of
    ``round(expansion * features)``; the gated one has one matrix more, so that two thirds of
    the expansion give as many weights.

    References:
        | GLU Variants Improve Transformer (Shazeer, 2020)
        | https://arxiv.org/abs/2002.05202

        | Activator: GLU Activation Function as the Core Component of a Vision Transformer
        | (Abdullah and Aydin, 2024)
        | https://arxiv.org/abs/2405.15953

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        features: The number of features :math:`D` of a token.
        expansion: The width of a hidden layer, as a multiple of :math:`D`.
        kind: The kind: ``mlp`` or ``geglu``.
        activation: The activation :math:`\phi`.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> FeedForward(8, kind="geglu")(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        features: int,
        *,
        expansion: float = 4.0,
        kind: Literal["mlp", "geglu"] = "mlp",
        activation: Activation = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features)
        if kind not in ("mlp", "geglu"):
            raise ValueError(f"expected kind mlp or geglu, got {kind!r}")
        hidden = hidden_width(features, expansion)
        self.kind = kind
        parts = 2 if kind == "geglu" else 1
        self.expand = nn.Linear(features, parts * hidden, device=device, dtype=dtype)
        self.activation = create_activation(activation)
        self.project = nn.Linear(hidden, features, device=device, dtype=dtype)

    def transform(self, x: Tensor) -> Tensor:
        if self.kind == "mlp":
            return self.project(self.activation(self.expand(x)))
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.project(self.activation(gate) * value)


class AttentionBlock(TokenLayer):
    r"""Creates a transformer block: attention, then a network on each token.

    .. math::

        x &\gets x + s \, \gamma_1 \odot \mathrm{Attention}(\mathrm{norm}(x)) \\
        x &\gets x + s \, \gamma_2 \odot \mathrm{FeedForward}(\mathrm{norm}(x))

    References:
        | An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale
        | (Dosovitskiy et al., 2020)
        | https://arxiv.org/abs/2010.11929

        | Going deeper with Image Transformers (Touvron et al., 2021)
        | https://arxiv.org/abs/2103.17239

    Used by: backbones of circuits, priors and bottleneck.

    Arguments:
        features: The number of features :math:`D` of a token.
        heads: The number of heads.
        head_features: The number of features of a head, ``features / heads`` by default. Heads
            may be wider together than the tokens.
        expansion: The width of the hidden layer, as a multiple of :math:`D`.
        kind: The kind of the network on each token: ``mlp`` or ``geglu``.
        norm: The norm of tokens: ``layer``, ``layer_plain`` (without weights) or ``none``.
        layer_scale: What the learned scales :math:`\gamma` start from, or None for no scales.
        res_scale: The fixed factor :math:`s` of both branches.
        device: The device.
        dtype: The type of the weights.

    Example:
        >>> AttentionBlock(8, heads=2)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        head_features: int | None = None,
        expansion: float = 4.0,
        kind: Literal["mlp", "geglu"] = "mlp",
        norm: Literal["layer", "layer_plain", "none"] = "layer",
        layer_scale: float | None = None,
        res_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features)
        self.res_scale = res_scale
        self.norm1 = token_norm(norm, features, device=device, dtype=dtype)
        self.attention = MultiHeadAttention(
            features, heads=heads, head_features=head_features, device=device, dtype=dtype
        )
        self.norm2 = token_norm(norm, features, device=device, dtype=dtype)
        self.feed_forward = FeedForward(
            features, expansion=expansion, kind=kind, device=device, dtype=dtype
        )
        self.scale1 = self.scale2 = None
        if layer_scale is not None:
            start = torch.full((features,), layer_scale, device=device, dtype=dtype)
            self.scale1, self.scale2 = nn.Parameter(start), nn.Parameter(start.clone())

    def own_fan_in(self, name: str) -> int | None:
        return 1 if name in ("scale1", "scale2") else None

    def transform(self, x: Tensor) -> Tensor:
        x = x + self._scaled(self.attention(self.norm1(x)), self.scale1)
        return x + self._scaled(self.feed_forward(self.norm2(x)), self.scale2)

    def _scaled(self, y: Tensor, scale: Tensor | None) -> Tensor:
        return self.res_scale * (y if scale is None else scale * y)
