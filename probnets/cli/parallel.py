r"""Working on many files at a time, and going on when one fails."""

__all__ = ["each", "processors"]

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

from tqdm import tqdm

from .jobs import Job
from .words import Lines, complain, flush, held, interrupted

T = TypeVar("T")
P = TypeVar("P")

_AHEAD = 4  # jobs that wait for each thread, so that none is idle behind a large image


class Outcome(NamedTuple, Generic[T]):
    r"""Is what came of a job.

    Arguments:
        result: What the work returned, or None if it failed.
        lines: What it said.
    """

    result: T | None
    lines: Lines


def each(
    jobs: Sequence[Job],
    plan: Callable[[Job], P],
    work: Callable[[Job, P], T],
    *,
    threads: int,
) -> list[T]:
    r"""Works on jobs in several threads, and says what came of them in their order.

    A job that fails is complained of, and the others go on. When the user interrupts, no more
    jobs begin, and those at work come to their end.

    Arguments:
        jobs: The jobs.
        plan: What precedes the work on a job. It is called in the order of the jobs, by one
            thread, so that it may decide who goes first. It should be quick.
        work: The work, which is given what was planned, and must be safe in threads.
        threads: The number of threads. With one of them, all is done by the calling thread.

    Returns:
        The results of the jobs that did not fail, in order.
    """
    results = []
    with tqdm(total=len(jobs), unit="image", disable=None if len(jobs) > 1 else True) as bar:
        run = _in_turn if threads == 1 else _at_a_time
        with contextlib.closing(run(jobs, plan, work, threads, bar)) as outcomes:
            for outcome in outcomes:
                flush(outcome.lines)
                if outcome.result is not None:
                    results.append(outcome.result)
    return results


def processors() -> int:
    r"""Counts the processors that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _in_turn(
    jobs: Sequence[Job],
    plan: Callable[[Job], P],
    work: Callable[[Job, P], T],
    threads: int,
    bar: tqdm,
) -> Generator[Outcome[T]]:
    for job in jobs:
        yield _attempt(job, lambda job=job: work(job, plan(job)))
        bar.update()


def _at_a_time(
    jobs: Sequence[Job],
    plan: Callable[[Job], P],
    work: Callable[[Job, P], T],
    threads: int,
    bar: tqdm,
) -> Generator[Outcome[T]]:
    waiting: deque[Future[Outcome[T]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for job in jobs:
                planned = _attempt(job, lambda job=job: (plan(job),))
                future = pool.submit(_resume, job, work, planned)
                future.add_done_callback(lambda _: bar.update())
                waiting.append(future)
                while waiting and (waiting[0].done() or len(waiting) >= _AHEAD * threads):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            if any(future.running() for future in waiting):
                interrupted(wait=True)
            pool.shutdown(wait=True, cancel_futures=True)
            for future in waiting:  # what is done is said
                if not future.cancelled() and future.exception() is None:
                    flush(future.result().lines)
            raise


def _resume(job: Job, work: Callable[[Job, P], T], planned: Outcome[tuple[P]]) -> Outcome[T]:
    r"""Goes on with what was planned, unless that failed."""
    if planned.result is None:
        return Outcome(None, planned.lines)
    (argument,) = planned.result
    done = _attempt(job, lambda: work(job, argument))
    return Outcome(done.result, planned.lines + done.lines)


def _attempt(job: Job, step: Callable[[], T]) -> Outcome[T]:
    r"""Takes a step of a job, and complains if it fails."""
    with held(job.source) as lines:
        try:
            return Outcome(step(), lines)
        except (MemoryError, OSError, TypeError, ValueError) as error:
            complain(error, job.source)
            return Outcome(None, lines)
