r"""The widths of what lies inside of blocks."""

__all__ = ["head_width", "hidden_width"]


def head_width(features: int, heads: int, head_features: int | None) -> int:
    r"""Returns the number of features of a head, by default an equal share of all.

    Arguments:
        features: The number of features that heads share by default.
        heads: The number of heads.
        head_features: The number of features of a head, or None.

    Raises:
        ValueError: If a number is below one, or heads do not divide the features they share.
    """
    if heads < 1:
        raise ValueError(f"expected heads >= 1, got {heads}")
    if head_features is None:
        if features % heads:
            raise ValueError(
                f"expected features divisible by heads, got {features} and {heads}; "
                "give head_features"
            )
        return features // heads
    if head_features < 1:
        raise ValueError(f"expected head_features >= 1, got {head_features}")
    return head_features


def hidden_width(features: int, expansion: float) -> int:
    r"""Returns the number of features of a hidden layer, ``round(expansion * features)``.

    Arguments:
        features: The number of features outside.
        expansion: How many times more there are inside.

    Raises:
        ValueError: If that is less than one.

    Example:
        >>> hidden_width(8, 2.5)
        20
    """
    hidden = round(expansion * features)
    if hidden < 1:
        raise ValueError(
            f"expected a hidden layer of one or more, got round({expansion} * {features}) "
            f"= {hidden}; raise expansion"
        )
    return hidden
