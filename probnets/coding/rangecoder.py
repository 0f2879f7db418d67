r"""Range coding of integer intervals, defined in plain Python."""

__all__ = ["PRECISION", "RangeDecoder", "RangeEncoder"]

from operator import index
from typing import SupportsIndex

import numpy as np

PRECISION = 24  # frequencies sum to 2 ** PRECISION

_WORD = 32
_STATE = 64
_WORD_MASK = (1 << _WORD) - 1
_STATE_MASK = (1 << _STATE) - 1
_NARROW = 1 << (_STATE - _WORD)  # the width never stays below this


class RangeEncoder:
    r"""Creates an encoder that turns a sequence of intervals into bytes.

    A symbol owns the quantiles :math:`[l, l + f)` of the :math:`2^{24}` that all symbols
    share. The message so far owns an interval :math:`[L, L + R)` of the unit interval, of
    which the symbol keeps its part,

    .. math:: L \gets L + \lfloor R / 2^{24} \rfloor \, l
        \qquad R \gets \lfloor R / 2^{24} \rfloor \, f .

    :math:`L` and :math:`R` are integers. Once :math:`R < 2^{32}`, the upper word of
    :math:`L` is written and both shift by a word; a later carry runs back through the words
    that were written. All arithmetic is exact, so that the bytes are the same on every
    machine. The stream is one big number, with its most significant byte first.
    :mod:`probnets.coding.rangeloops` has the same coder in compiled loops.

    References:
        | Range encoding: an algorithm for removing redundancy from a digitised message
        | (Martin, 1979)

        | Understanding Entropy Coding With Asymmetric Numeral Systems (Bamler, 2022)
        | https://arxiv.org/abs/2201.01741

    Example:
        >>> encoder = RangeEncoder()
        >>> encoder.encode(0, 1 << 23)  # a symbol of probability 1/2, then two of 1/4
        >>> encoder.encode(1 << 23, 1 << 22)
        >>> encoder.encode(1 << 22, 1 << 22)
        >>> encoder.finish().hex()
        '48'
        >>> decoder = RangeDecoder(bytes.fromhex("48"))
        >>> decoder.peek() < 1 << 23
        True
    """

    def __init__(self) -> None:
        self._lower = 0
        self._width = _STATE_MASK
        self._words: list[int] = []

    def encode(self, low: SupportsIndex, freq: SupportsIndex) -> None:
        r"""Appends a symbol.

        Arguments:
            low: The first quantile :math:`l` of the symbol.
            freq: The number of quantiles :math:`f` of the symbol.

        Raises:
            ValueError: If the interval is empty or leaves the quantiles.
        """
        low, freq = _checked(low, freq)

        scale = self._width >> PRECISION
        self._lower += scale * low
        self._width = scale * freq

        if self._lower > _STATE_MASK:
            self._lower &= _STATE_MASK
            _carry(self._words)

        if self._width < _NARROW:
            self._words.append(self._lower >> _WORD)
            self._lower = self._lower << _WORD & _STATE_MASK
            self._width <<= _WORD

    def finish(self) -> bytes:
        r"""Returns the shortest stream that decodes to the symbols so far.

        A decoder reads zeros past the end. Hence every number in :math:`[L, L + R)` is a
        stream, and the one that ends on the most zero bytes is stored without them. It is
        less than a byte longer than :math:`-\log_2 R` bits. Its length is not stored.

        Returns:
            The stream, which never ends on a zero byte.
        """
        words = self._words_to(self._lower + _distance(self._lower, self._width))
        return _to_bytes(words).rstrip(b"\0")

    def sealed_words(self) -> np.ndarray:
        r"""Returns the words that constriction's ``RangeEncoder`` gives for these symbols.

        The end is stored with one or two words, so that others may follow it.

        Returns:
            The words in the order of the stream, as an array of `numpy.uint32`.
        """
        if self._width == _STATE_MASK:  # no symbols
            return np.empty(0, np.uint32)

        *words, last, _ = self._words_to(self._lower + _NARROW - 1)
        upper = (self._lower + self._width & _STATE_MASK) >> _WORD

        # If the upper end shares the last word, what follows has to start with a zero.
        tail = [last, 0] if upper == last else [last]
        return np.array([*words, *tail], np.uint32)

    def sealed(self) -> bytes:
        r"""Returns the words of :meth:`sealed_words` as bytes of a stream."""
        return _to_bytes(self.sealed_words().tolist())

    def _words_to(self, point: int) -> list[int]:
        r"""Returns all words, when the stream goes on to a point of the last two."""
        words = self._words.copy()
        if point > _STATE_MASK:
            point &= _STATE_MASK
            _carry(words)

        return [*words, point >> _WORD, point & _WORD_MASK]


class RangeDecoder:
    r"""Creates a decoder for a stream of :class:`RangeEncoder`.

    Each symbol takes two steps: :meth:`peek` tells a quantile, the caller finds the symbol
    that owns it, and :meth:`advance` moves on by the interval of that symbol. The number of
    symbols is not stored.

    Bytes that no encoder wrote decode to some symbols, as any bytes do, and never raise. They
    can point beyond the last quantile; the last one stands in for it then. After the last
    symbol, :meth:`canonical` tells such streams from sound ones.

    Arguments:
        data: The stream. Zeros are read past its end.

    Example:
        >>> decoder = RangeDecoder(bytes.fromhex("48"))
        >>> decoder.advance(0, 1 << 23)
        >>> decoder.peek() >> 22
        2
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._lower = 0
        self._width = _STATE_MASK
        self._offset = self._word(0) << _WORD | self._word(4)  # of the stream from the lower end
        self._position = _STATE // 8
        self._sound = not data.endswith(b"\0")

    def peek(self) -> int:
        r"""Returns the next quantile, from 0 to :math:`2^{24} - 1`."""
        return min(self._offset // (self._width >> PRECISION), (1 << PRECISION) - 1)

    def advance(self, low: SupportsIndex, freq: SupportsIndex) -> None:
        r"""Moves past a symbol.

        Arguments:
            low: The first quantile of the symbol.
            freq: The number of quantiles of the symbol.

        Raises:
            ValueError: If the interval does not hold the quantile of :meth:`peek`.
        """
        low, freq = _checked(low, freq)

        if not low <= (quantile := self.peek()) < low + freq:
            raise ValueError(
                f"expected an interval that holds quantile {quantile}, got low {low}, freq {freq}"
            )

        scale = self._width >> PRECISION
        self._lower = self._lower + scale * low & _STATE_MASK
        self._offset -= scale * low
        self._width = scale * freq
        self._sound &= self._offset < self._width

        if self._width < _NARROW:
            self._lower = self._lower << _WORD & _STATE_MASK
            self._width <<= _WORD
            self._offset = self._offset << _WORD & _STATE_MASK | self._word(self._position)
            self._position += _WORD // 8

    def canonical(self) -> bool:
        r"""Tells whether the stream is what :meth:`RangeEncoder.finish` wrote.

        The lower end and the width, which the encoder ended with as well, fix the distance
        from the lower end to the number that it chose. The stream is that number if it lies at
        this distance and goes no further, and it has these bytes if it ends on none that is
        zero. The work does not depend on the length of the stream.

        Returns:
            Whether an encoder of the symbols so far would have finished with these bytes.
        """
        read = self._position >= len(self._data)
        return self._sound and read and self._offset == _distance(self._lower, self._width)

    def _word(self, position: int) -> int:
        size = _WORD // 8
        return int.from_bytes(self._data[position : position + size].ljust(size, b"\0"), "big")


def _checked(low: SupportsIndex, freq: SupportsIndex) -> tuple[int, int]:
    low, freq = index(low), index(freq)  # numpy's integers would overflow
    if freq < 1 or not 0 <= low <= (1 << PRECISION) - freq:
        raise ValueError(
            f"expected low >= 0, freq >= 1 and low + freq <= 2 ** {PRECISION}, "
            f"got low {low}, freq {freq}"
        )
    return low, freq


def _distance(lower: int, width: int) -> int:
    r"""Returns the way from the lower end to the roundest number of the interval.

    It ends on the most zero bytes. The width of at least :math:`2^{32}` holds one of four.
    """
    sizes = range(_STATE, _WORD - 1, -8)
    return next(d for d in (-lower % (1 << size) for size in sizes) if d < width)


def _carry(words: list[int]) -> None:
    r"""Adds one to the number that the words spell."""
    place = len(words) - 1
    while words[place] == _WORD_MASK:
        words[place] = 0
        place -= 1

    words[place] += 1


def _to_bytes(words: list[int]) -> bytes:
    return b"".join(word.to_bytes(_WORD // 8, "big") for word in words)
