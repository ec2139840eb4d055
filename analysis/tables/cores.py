"""Ranks are read on all cores of this machine: a function of one rank's files, and the results in order.

In: a function of a module and the ranks of a run. Out: what it returns for each, in their order; few more
results than there are cores wait until they are asked for. `dask_cluster.py` does the same on a cluster.

Threads share Python's lock, of which making tables takes a good part. Processes do not, but each takes a
second to start, so small runs are read by threads. Those for a run of many files start while the beginnings
of the files are read.
"""

import importlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol, TypeVar

from analysis.trace.events import find_trace_files
from analysis.trace.launches import Launch
from common.errors import UserError
from common.memory import find_memory_limit
from common.processes import begin_worker

T = TypeVar("T")
LARGE_RUN = 8 << 20  # bytes of compressed traces, half a million events: below that threads are faster
MANY_FILES = 64  # of fewer `finish` and `perfetto` may make a whole trace, which one process does
MEMORY_PER_BYTE = 15  # of a rank's compressed trace, while its tables are made
MEMORY_OF_WORKER = 300 << 20


class Map(Protocol):
    """Calls the function with each launch, somewhere; the results come in the order of the launches."""

    def __call__(self, function: Callable[[Launch], T], work: list[Launch], /) -> Iterable[T]: ...


class Cores:
    """A `Map` on threads or on processes, by the size of the traces. For commands only: each process imports
    the main module of this one, which in somebody's script or notebook does more than define functions.
    """

    def __init__(self) -> None:
        self._started: ProcessPoolExecutor | None = None
        self._count = 0  # of the processes that were started

    def start_early(self, run_dir: str | Path, module: str) -> None:
        """Where this run has so many traces that processes will read it, they start now. module: with what
        they will be asked for; to import it is most of the time that a start takes.
        """
        with suppress(UserError, OSError):  # whoever reads the files says what is wrong with them
            files = find_trace_files(run_dir)
            self._count = _count_workers([path.stat().st_size for path in files])
            if len(files) > MANY_FILES and self._count > 1:
                self._started = _start_processes(self._count)
                for _ in range(self._count):
                    self._started.submit(_import_module, module)

    def __call__(self, function: Callable[[Launch], T], work: list[Launch], /) -> Iterable[T]:
        workers = _count_workers([_count_bytes(job) for job in work])
        started, self._started = self._started, None
        if started and workers < self._count:  # a rank's files together need more memory than one of them
            started.shutdown(wait=False)
            started = None
        if workers > 1:
            return map_on_processes(function, work, workers, started)
        return map_on_threads(function, work)


def _count_workers(sizes: list[int]) -> int:
    """How many processes are to read so many pieces; 1: threads are faster. sizes: bytes of each piece."""
    if sum(sizes) < LARGE_RUN:
        return 1
    memory = MEMORY_OF_WORKER + MEMORY_PER_BYTE * max(sizes)
    return min(len(sizes), count_cores(), find_memory_limit() // 2 // memory)


def count_cores() -> int:
    """Those that this process may use: a job may have a part of its node."""
    return len(os.sched_getaffinity(0))


def _count_bytes(job: Launch) -> int:
    return sum(path.stat().st_size for path in job.files)


def map_on_threads(function: Callable[[Launch], T], work: list[Launch], /) -> Iterator[T]:
    with ThreadPoolExecutor(max_workers=min(len(work), count_cores()) or 1) as pool:
        yield from _map_in_order(pool, function, work, count_cores())


def map_on_processes(
    function: Callable[[Launch], T], work: list[Launch], workers: int,
    started: ProcessPoolExecutor | None = None,
) -> Iterator[T]:  # fmt: skip
    """The function, and what it returns, are pickled. started: processes, at least as many."""
    pool = started or _start_processes(workers)
    try:
        yield from _map_in_order(pool, function, work, workers)
    except BrokenProcessPool:
        raise UserError(
            "a process that read a part of the traces was killed (for memory?): "
            "give the job more memory, or fewer cores with taskset"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_processes(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), begin_worker, initargs=(os.getpid(),))


def _import_module(name: str) -> None:
    importlib.import_module(name)


def _map_in_order(
    pool: Executor, function: Callable[[Launch], T], work: list[Launch], ahead: int
) -> Iterator[T]:
    waiting: deque[Future[T]] = deque()
    for job in work:
        if len(waiting) > ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(function, job))
    while waiting:
        yield waiting.popleft().result()
