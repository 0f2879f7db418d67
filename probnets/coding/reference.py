r"""The codec in PyTorch, which defines the bytes and runs on any device.

Every operation here is exact or correctly rounded, number by number: sums of products are
integers below :math:`2^{53}`, factors are powers of two, and bounds take one division and one
multiplication. Hence the compiled loops and every device give the same bytes.
"""

__all__ = ["decode_rows_torch", "encode_rows_torch"]

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .codec import GROUP, check_rows, check_streams
from .errors import unsound_stream
from .loops import BLOCK
from .rangecoder import RangeDecoder
from .rangeloops import LockstepDecoder, encode_chain, encode_intervals
from .schedule import CODE, ENTER, Schedule
from .tables import TOTAL, CodeTables


def encode_rows_torch(
    tables: CodeTables,
    x: np.ndarray,
    *,
    present: np.ndarray | None = None,
    chained: bool = False,
    device: torch.device | str = "cpu",
) -> list[bytes]:
    r"""Encodes rows of values, as :func:`probnets.coding.encode_rows` does.

    Arguments:
        tables: The tables of the circuit.
        x: The values, with shape :math:`(N, D)`.
        present: Which variables are coded.
        chained: Whether up to 256 rows share a stream.
        device: Where messages are computed.
    """
    x = check_rows(tables, x)
    values = torch.from_numpy(x.astype(np.int64)).to(device)
    lows, freqs = [], []

    def code(variable: int, bounds: Tensor) -> Tensor:
        value = values[:, variable]
        pair = bounds.gather(1, torch.stack([value, value + 1], dim=1))
        lows.append(pair[:, 0])
        freqs.append(pair[:, 1] - pair[:, 0])
        return value

    _run(tables, len(x), present, code, device)
    if not lows:
        return [b""] * (-(-len(x) // GROUP) if chained else len(x))
    low, freq = (torch.stack(parts).cpu().numpy() for parts in (lows, freqs))  # (T, N)
    if not chained:
        return encode_intervals(low.T, freq.T)
    streams = []
    for start in range(0, len(x), GROUP):
        blocks = [slice(b, b + BLOCK) for b in range(start, min(start + GROUP, len(x)), BLOCK)]
        parts = [np.concatenate([table[:, b].ravel() for b in blocks]) for table in (low, freq)]
        streams.append(encode_chain(*parts))
    return streams


def decode_rows_torch(
    tables: CodeTables,
    streams: Sequence[bytes],
    count: int,
    *,
    present: np.ndarray | None = None,
    chained: bool = False,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    r"""Decodes rows of values, as :func:`probnets.coding.decode_rows` does.

    Arguments:
        tables: The tables of the circuit.
        streams: The streams.
        count: The number of rows :math:`N`.
        present: Which variables are coded.
        chained: Whether up to 256 rows share a stream.
        device: Where messages are computed.

    Raises:
        StreamError: If a stream is not one that the encoder wrote.
        ValueError: If there are more or fewer streams than the rows need.
    """
    check_streams(streams, count, chained=chained)
    x = np.zeros((count, tables.tree.variables), dtype=np.int64)
    if not chained:
        lockstep = LockstepDecoder(streams)

        def code(variable: int, bounds: Tensor) -> Tensor:
            quantile = torch.from_numpy(lockstep.peek()).to(bounds.device)
            value = torch.searchsorted(bounds, quantile[:, None], right=True) - 1
            pair = torch.cat([bounds.gather(1, value), bounds.gather(1, value + 1)], dim=1)
            low, high = pair.cpu().numpy().T
            lockstep.advance(low, high - low)
            x[:, variable] = value[:, 0].cpu().numpy()
            return value[:, 0]

        _run(tables, count, present, code, device)
        sound = bool(lockstep.canonical().all())
    else:
        sound = True
        for group, stream in enumerate(streams):
            decoder = RangeDecoder(stream)
            stop = min((group + 1) * GROUP, count)
            for start in range(group * GROUP, stop, BLOCK):
                block = x[start : min(start + BLOCK, stop)]
                _run(tables, len(block), present, _in_turn(decoder, block), device)
            sound = sound and decoder.canonical()
    if not sound:
        raise unsound_stream()
    return x.astype(np.uint8 if tables.values <= 256 else np.uint16)


def _in_turn(decoder: RangeDecoder, x: np.ndarray) -> Callable[[int, Tensor], Tensor]:
    r"""Lets the rows of a block draw from one stream, one after the other."""

    def code(variable: int, bounds: Tensor) -> Tensor:
        table = bounds.cpu().numpy()
        for row, bound in enumerate(table):
            value = int(np.searchsorted(bound, decoder.peek(), side="right")) - 1
            decoder.advance(int(bound[value]), int(bound[value + 1] - bound[value]))
            x[row, variable] = value
        return torch.from_numpy(x[:, variable].copy()).to(bounds.device)

    return code


def _run(
    tables: CodeTables,
    rows: int,
    present: np.ndarray | None,
    code: Callable[[int, Tensor], Tensor],
    device: torch.device | str,
) -> None:
    r"""Goes through the schedule. At each variable `code` turns bounds into values.

    Bounds are the integer cumulative probabilities of all values, with shape
    :math:`(N, X + 1)`.
    """
    sums = torch.from_numpy(tables.sums.astype(np.float64)).to(device)
    cumulative = torch.from_numpy(tables.cumulative.astype(np.float64)).to(device)
    root = torch.from_numpy(tables.root.astype(np.float64)).to(device)
    steps = torch.arange(tables.values + 1, device=device, dtype=torch.float64)
    room, bits = float(TOTAL - tables.values), tables.bits

    prior: dict[int, Tensor] = {}  # what a region's unit is, seen from above
    below: dict[int, Tensor] = {}  # what is known of it from below

    def belief(region: int) -> Tensor:
        if region not in below:
            return prior[region]
        return _normalise(prior[region] * below[region], bits)

    def learn(region: int, message: Tensor) -> None:
        known = below.get(region)
        below[region] = _normalise(message if known is None else message * known, bits)

    schedule = Schedule.depth_first(tables.tree, present)
    for kind, r, parent, v, group, *_ in schedule.operations.tolist():
        if kind == ENTER and parent < 0:
            prior[r] = _normalise(root.expand(rows, -1), bits)
        elif kind == ENTER:
            prior[r] = _normalise(belief(parent) @ sums[group], bits)
        elif kind == CODE:
            weights = belief(r)
            table = cumulative[group]
            total = weights.sum(-1, keepdim=True) * TOTAL
            bounds = torch.floor(weights @ table.T / total * room) + steps
            value = code(v, bounds.long())
            learn(r, table[value + 1] - table[value])
        else:
            learn(parent, below.pop(r) @ sums[group].T)


def _normalise(rows: Tensor, bits: int) -> Tensor:
    r"""Brings positive rows to integers of so many bits, none of them zero.

    A row is scaled by the power of two that brings its largest number into
    :math:`[2^{b - 1}, 2^b)`, rounded down, and raised by one.
    """
    top = rows.max(dim=-1, keepdim=True).values
    exponent = top.view(torch.int64) >> 52  # of a positive number, biased by 1023
    scale = ((bits + 2045 - exponent) << 52).view(torch.float64)
    return torch.floor(rows * scale) + 1.0
