r"""What the command says: lines on stdout, errors and warnings in one line each on stderr."""

__all__ = [
    "complain",
    "flush",
    "held",
    "interrupted",
    "say",
    "sizes",
    "spoken_warnings",
    "warn",
]

import contextlib
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO

from PIL import Image
from tqdm import tqdm

from probnets.coding import ImageWarning

Lines = list[tuple[str, bool]]  # each with whether it goes to stderr

_source: ContextVar[Path | None] = ContextVar("source", default=None)
_lines: ContextVar[Lines | None] = ContextVar("lines", default=None)


def say(text: str) -> None:
    r"""Says a line on stdout, around progress bars."""
    _tell(text, error=False)


def complain(error: Exception, source: Path | None = None) -> None:
    r"""Says an error in one line on stderr, with the file that it is about."""
    _tell(f"probnets: error: {_named(error, source)}", error=True)


def warn(text: str) -> None:
    r"""Says a warning in one line on stderr, with the file that is at work."""
    _tell(f"probnets: warning: {_placed(' '.join(text.split()), _source.get())}", error=True)


def interrupted(*, wait: bool = False) -> None:
    r"""Says on stderr that the user has stopped the command, or why it does not stop yet."""
    text = "stopping once the images at work are done" if wait else "interrupted"
    _tell(f"probnets: {text}", error=True)


@contextlib.contextmanager
def held(source: Path) -> Iterator[Lines]:
    r"""Holds back what this thread says while it works on a file, so that others may go first.

    Arguments:
        source: The file, which warnings are said to be about.
    """
    lines: Lines = []
    tokens = _source.set(source), _lines.set(lines)
    try:
        yield lines
    finally:
        _source.reset(tokens[0])
        _lines.reset(tokens[1])


def flush(lines: Lines) -> None:
    r"""Says what was held back."""
    for text, error in lines:
        _tell(text, error=error)


@contextlib.contextmanager
def spoken_warnings() -> Iterator[None]:
    r"""Says warnings in the words of the command, those about images each time."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        warn(str(message))

    with warnings.catch_warnings():
        for category in (ImageWarning, Image.DecompressionBombWarning):
            warnings.simplefilter("always", category)
        warnings.showwarning = show
        yield


def sizes(before: int, after: int) -> str:
    r"""Says how much smaller something has become."""
    return f"{before:,} -> {after:,} bytes ({100 * after / max(before, 1):.1f} %)"


def _tell(text: str, *, error: bool) -> None:
    if (lines := _lines.get()) is not None:
        lines.append((text, error))
    else:
        tqdm.write(text, file=sys.stderr if error else sys.stdout)


def _named(error: Exception, source: Path | None) -> str:
    r"""Returns the sentence of an error in one line, with the file it is about."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"expected to open {error.filename or source}, got: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = f"expected more memory, got: {text or 'none left'}"
    return _placed(text, source)


def _placed(text: str, source: Path | None) -> str:
    return text if source is None or str(source) in text else f"{text} (in {source})"
