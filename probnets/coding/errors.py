r"""What goes wrong in decoding, and what is worth a warning in encoding."""

__all__ = ["ImageWarning", "StreamError", "unsound_stream"]


class ImageWarning(UserWarning):
    r"""Warns of an image whose pixels are kept exactly, but not all that the file says of them."""


class StreamError(ValueError):
    r"""Is raised for bytes that are not a valid stream for the model at hand.

    Example:
        >>> import probnets
        >>> probnets.decompress(b"GIF89a")
        Traceback (most recent call last):
        ...
        probnets.coding.errors.StreamError: expected a probnets stream, got foreign bytes
    """


def unsound_stream() -> StreamError:
    r"""Returns the error for a stream that decodes to what its encoder did not encode."""
    return StreamError(
        "expected a stream of this model, got one that decodes to something else; "
        "it is damaged, or another model wrote it"
    )
