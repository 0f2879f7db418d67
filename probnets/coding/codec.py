r"""Coding many rows of values with a circuit: to streams and back."""

__all__ = ["GROUP", "check_rows", "check_streams", "decode_rows", "encode_rows"]

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch

from .errors import unsound_stream
from .loops import BLOCK, compiled_decode, compiled_encode
from .rangeloops import coder_states, stream_capacity
from .schedule import CODE, Schedule
from .tables import CodeTables

T = TypeVar("T")

GROUP = 256  # rows of a chained stream, a multiple of the block
_CHUNK = 4096  # rows that one call of a loop takes, which bounds its buffers


def encode_rows(
    tables: CodeTables,
    x: np.ndarray,
    *,
    present: np.ndarray | None = None,
    chained: bool = False,
    workers: int | None = None,
) -> list[bytes]:
    r"""Encodes rows of values.

    A stream costs at most one byte more than the ideal code length of its rows under the
    integer tables. It neither holds its length nor how many rows it codes.

    Arguments:
        tables: The tables of the circuit.
        x: The values, with shape :math:`(N, D)`, from 0 to :math:`X - 1`.
        present: Which variables are coded, with shape :math:`(D,)`. The others are summed out.
        chained: Whether up to 256 rows share a stream, which saves most of that byte, instead
            of a stream for each row.
        workers: The number of threads. The streams do not depend on it.

    Returns:
        The streams: :math:`N`, or :math:`\lceil N / 256 \rceil` if chained.

    Raises:
        ValueError: If the values do not fit the tables.
    """
    x = check_rows(tables, x)
    schedule = Schedule.depth_first(tables.tree, present)
    group = GROUP if chained else 1
    coded = int((schedule.operations[:, 0] == CODE).sum())
    capacity = stream_capacity(coded * group)
    loop = compiled_encode(tables.units)

    def job(rows: slice) -> list[bytes]:
        part = np.ascontiguousarray(x[rows])
        streams = -(-len(part) // group)
        coders = 1 if chained else min(BLOCK, len(part))
        ends = np.zeros(streams, dtype=np.int64)
        data = np.empty(streams * capacity, dtype=np.uint8)
        out = np.empty((coders, capacity), dtype=np.uint8)
        work = schedule.operations, *_model(tables), *_buffers(tables, schedule)
        loop(part, group, *work, coder_states(coders), out, data, ends)
        starts = [0, *ends[:-1].tolist()]
        return [data[a:b].tobytes() for a, b in zip(starts, ends.tolist(), strict=True)]

    return [stream for part in _parallel(job, len(x), workers) for stream in part]


def decode_rows(
    tables: CodeTables,
    streams: Sequence[bytes],
    count: int,
    *,
    present: np.ndarray | None = None,
    chained: bool = False,
    workers: int | None = None,
) -> np.ndarray:
    r"""Decodes what :func:`encode_rows` encoded with the same tables and options.

    Arguments:
        tables: The tables of the circuit.
        streams: The streams.
        count: The number of rows :math:`N`.
        present: Which variables are coded. The others come back as zero.
        chained: Whether up to 256 rows share a stream.
        workers: The number of threads.

    Returns:
        The values, with shape :math:`(N, D)`, as uint8 if they fit, else as uint16.

    Raises:
        StreamError: If a stream is not one that the encoder wrote.
        ValueError: If there are more or fewer streams than the rows need.
    """
    check_streams(streams, count, chained=chained)
    group = GROUP if chained else 1
    schedule = Schedule.depth_first(tables.tree, present)
    dtype = np.uint8 if tables.values <= 256 else np.uint16
    x = np.zeros((count, tables.tree.variables), dtype=dtype)
    loop = compiled_decode(tables.units)

    def job(rows: slice) -> None:
        part = streams[rows.start // group : -(-rows.stop // group)]
        ends = np.array([0, *accumulate(map(len, part))], dtype=np.int64)
        data = np.frombuffer(bytearray(b"".join(part)), np.uint8)
        states = coder_states(1 if chained else min(BLOCK, rows.stop - rows.start))
        work = schedule.operations, *_model(tables), *_buffers(tables, schedule)
        if not loop(x[rows], group, *work, states, data, ends, tables.modes):
            raise unsound_stream()

    _parallel(job, count, workers)
    return x


def check_rows(tables: CodeTables, x: np.ndarray) -> np.ndarray:
    r"""Checks that rows of values fit the tables, and returns them in the loops' dtype."""
    if x.ndim != 2 or x.shape[1] != tables.tree.variables or x.dtype.kind not in "iu":
        raise ValueError(
            f"expected integers with shape (N, {tables.tree.variables}), "
            f"got {x.shape} of {x.dtype}"
        )
    if x.size and (x.min() < 0 or x.max() >= tables.values):
        raise ValueError(
            f"expected values from 0 to {tables.values - 1}, got {x.min()} to {x.max()}"
        )
    return x.astype(np.uint8 if tables.values <= 256 else np.uint16, copy=False)


def check_streams(streams: Sequence[bytes], count: int, *, chained: bool) -> None:
    r"""Checks that there are as many streams as so many rows need."""
    needed = -(-count // GROUP) if chained else count
    if len(streams) != needed:
        raise ValueError(f"expected {needed} streams for {count} rows, got {len(streams)}")


def _model(tables: CodeTables) -> tuple:
    down, up = tables.matrices
    root = tables.root.astype(np.float64)
    return root, down, up, tables.cumulative.ravel(), tables.values, tables.bits


def _buffers(tables: CodeTables, schedule: Schedule) -> list[np.ndarray]:
    size = BLOCK * tables.units
    return [np.ones(n * size) for n in (schedule.slots, schedule.slots, 1, 1)]


def _parallel(job: Callable[[slice], T], count: int, workers: int | None) -> list[T]:
    r"""Divides rows among threads, at multiples of a group."""
    workers = torch.get_num_threads() if workers is None else workers
    if workers < 1:
        raise ValueError(f"expected one worker or more, got {workers}")
    size = min(-(-count // workers), _CHUNK)
    size = max(-(-size // GROUP), 1) * GROUP
    parts = [slice(n, min(n + size, count)) for n in range(0, count, size)]
    if workers == 1 or len(parts) == 1:
        return [job(part) for part in parts]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(job, parts))
