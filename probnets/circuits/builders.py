r"""Trees for sequences and images."""

__all__ = ["binary_tree", "chain", "quad_tree"]

from collections.abc import Hashable

from .structure import Tree


def chain(variables: int, *, tied: bool = False) -> Tree:
    r"""Builds the tree of a hidden Markov chain: one region a variable, each below the last.

    Arguments:
        variables: The number of variables :math:`D`.
        tied: Whether all steps share one transition matrix and one input distribution.

    Example:
        >>> chain(4).parent.tolist()
        [-1, 0, 1, 2]
    """
    _positive(variables=variables)
    keys = [0] * variables if tied else None
    return Tree.from_parents(
        range(-1, variables - 1), range(variables), sum_keys=keys, input_keys=keys
    )


def binary_tree(variables: int, *, tied: bool = False) -> Tree:
    r"""Builds a balanced binary tree: halves of halves, down to one region a variable.

    A region of the tree is the product of two sums, so that this is a circuit of canonical
    polyadic layers. Its depth is :math:`\lceil \log_2 D \rceil`.

    Arguments:
        variables: The number of variables :math:`D`.
        tied: Whether regions of equal size on the same side share a sum matrix, and all
            variables share one input distribution.

    Example:
        >>> int(binary_tree(64).depth.max())
        6
    """
    _positive(variables=variables)
    return _split_boxes((variables,), 1, tied=tied)


def quad_tree(height: int, width: int, *, channels: int = 1, tied: bool = False) -> Tree:
    r"""Builds a quad tree over an image: quarters of quarters, down to one region a pixel.

    The variables are the numbers of an array with shape :math:`(H, W, C)` in row-major order.
    The channels of a pixel hang on its region. Sides that are not powers of two are split as
    evenly as they can be.

    Arguments:
        height: The height :math:`H` in pixels.
        width: The width :math:`W` in pixels.
        channels: The number of channels :math:`C`.
        tied: Whether regions of equal size in the same quarter share a sum matrix, and all
            pixels share one input distribution a channel.

    Example:
        >>> quad_tree(8, 8, channels=3, tied=True)
        Tree(regions=85, variables=192, sums=12, inputs=3, depth=3)
    """
    _positive(height=height, width=width, channels=channels)
    return _split_boxes((height, width), channels, tied=tied)


def _split_boxes(shape: tuple[int, ...], channels: int, *, tied: bool) -> Tree:
    r"""Halves a box along every side that can be, until only single cells are left."""
    parents: list[int] = [-1]
    keys: list[Hashable] = [((), shape)]
    cells: dict[tuple[int, ...], int] = {}

    boxes = [(0, (0,) * len(shape), shape)]
    for region, corner, size in boxes:
        if max(size) == 1:
            cells[corner] = region
            continue
        for side, part_corner, part in _halves(corner, size):
            parents.append(region)
            keys.append((side, part))
            boxes.append((len(parents) - 1, part_corner, part))

    order = sorted(cells)  # row-major
    regions = [cells[cell] for cell in order for _ in range(channels)]
    input_keys = [c for _ in order for c in range(channels)]
    return Tree.from_parents(
        parents,
        regions,
        sum_keys=keys if tied else None,
        input_keys=input_keys if tied else None,
    )


def _halves(
    corner: tuple[int, ...], size: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    r"""Lists side, corner and size of the parts of a box."""
    parts = [((), (), ())]
    for c, n in zip(corner, size, strict=True):
        cuts = [(0, c, n)] if n == 1 else [(0, c, (n + 1) // 2), (1, c + (n + 1) // 2, n // 2)]
        parts = [
            ((*side, s), (*at, a), (*shape, m)) for side, at, shape in parts for s, a, m in cuts
        ]
    return parts


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected {name} to be at least 1, got {size}")
