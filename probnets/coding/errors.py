r"""What goes wrong in decoding."""

__all__ = ["StreamError"]


class StreamError(ValueError):
    r"""Is raised for bytes that are not a valid stream for the model at hand.

    Example:
        >>> import probnets
        >>> probnets.decompress(b"GIF89a")
        Traceback (most recent call last):
        ...
        probnets.coding.errors.StreamError: expected a probnets stream, got foreign bytes
    """
