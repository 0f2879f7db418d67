r"""Masks of visible patches, which pre-training hides the rest with."""

__all__ = ["check_visible", "expand", "gather", "hide", "masked_mean", "scatter"]

import torch
from torch import Tensor


def check_visible(visible: Tensor, x: Tensor, *, stride: int = 1) -> None:
    r"""Raises an error unless a mask of patches fits the maps that go in and come out.

    Arguments:
        visible: The mask, with shape :math:`(B, 1, h, w)`.
        x: The maps, with shape :math:`(B, C, H, W)`.
        stride: The stride of the layer.
    """
    if visible.ndim != 4 or visible.shape[:2] != (len(x), 1) or visible.dtype != torch.bool:
        raise ValueError(
            f"expected a boolean mask with shape ({len(x)}, 1, h, w), "
            f"got {visible.dtype} with shape {tuple(visible.shape)}"
        )
    for name, size, patches in zip(("H", "W"), x.shape[2:], visible.shape[2:], strict=True):
        if patches == 0 or size % (patches * stride):
            raise ValueError(
                f"expected maps with {name} divisible by {patches * stride}, for {patches} "
                f"patches and stride {stride}, got {size}; crop or pad them"
            )


def expand(visible: Tensor, x: Tensor) -> Tensor:
    r"""Enlarges a mask of patches to one of pixels.

    Arguments:
        visible: The mask, with shape :math:`(B, 1, h, w)`.
        x: The maps, with shape :math:`(B, C, H, W)`.

    Returns:
        The mask, with shape :math:`(B, 1, H, W)` and the type of the maps.

    Example:
        >>> mask = torch.tensor([[[[True, False]]]])
        >>> expand(mask, torch.zeros(1, 3, 1, 4))
        tensor([[[[1., 1., 0., 0.]]]])
    """
    for axis in (2, 3):
        visible = visible.repeat_interleave(x.shape[axis] // visible.shape[axis], dim=axis)
    return visible.to(x.dtype)


def hide(x: Tensor, visible: Tensor | None) -> Tensor:
    r"""Sets the hidden patches of maps to zero. Without a mask, nothing is hidden."""
    return x if visible is None else x.masked_fill(expand(~visible, x).bool(), 0.0)


def masked_mean(x: Tensor, visible: Tensor | None) -> Tensor:
    r"""Averages maps over their visible pixels, with shape :math:`(B, C, 1, 1)`."""
    if visible is None:
        return x.mean(dim=(2, 3), keepdim=True)
    wide = hide(x, visible).to(torch.promote_types(x.dtype, torch.float32))
    count = expand(visible, wide).sum(dim=(2, 3), keepdim=True)
    return (wide.sum(dim=(2, 3), keepdim=True) / count).to(x.dtype)


def gather(x: Tensor, visible: Tensor | None) -> Tensor:
    r"""Takes the visible pixels of maps as tokens, row by row.

    Arguments:
        x: The maps, with shape :math:`(B, C, H, W)`.
        visible: The mask, with as many visible patches in each sample.

    Returns:
        The tokens, with shape :math:`(B, N, C)`.

    Raises:
        ValueError: If samples show different numbers of patches.
    """
    tokens = x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H W, C)
    if visible is None:
        return tokens
    counts = visible.flatten(1).sum(dim=1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"expected as many visible patches in each sample, got {counts}")
    mask = expand(visible, x).flatten(1).bool()
    return tokens[mask].view(len(x), int(mask[:1].sum()), x.shape[1])


def scatter(tokens: Tensor, visible: Tensor | None, size: tuple[int, int]) -> Tensor:
    r"""Undoes :func:`gather`, with zeros at hidden pixels.

    Arguments:
        tokens: The tokens, with shape :math:`(B, N, C)`.
        visible: The mask.
        size: The height and width of the maps.

    Returns:
        The maps, with shape :math:`(B, C, H, W)`.
    """
    B, _, C = tokens.shape
    if visible is not None:
        whole = tokens.new_zeros(B, size[0] * size[1], C)
        mask = expand(visible, whole.new_zeros(B, 1, *size)).flatten(1).bool()
        whole[mask] = tokens.flatten(0, 1)
        tokens = whole
    return tokens.transpose(1, 2).unflatten(2, size)
