"""Parallel work: items shared among MPI ranks, and within a rank among forked processes or threads.

In: a function and the items to call it with. Out: the results, or one error that is the same on all ranks.

Threads wait for each other at Python's lock, so workers are forks. A process in which MPI runs does not fork:
a network that writes to a process's memory need not survive that.
"""

import gc
import io
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from common import processes as own_process
from dlrm.runtime import trace
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks

T = TypeVar("T")
R = TypeVar("R")
# What a fork adds to these is added to them in its parent, too. Who counts puts its counter here.
counters: list[dict[str, int]] = []
# key for a lost worker's error, behind all item numbers: it is raised only if no item failed
LOST = sys.maxsize


def run_in_threads(threads: int, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results in the order of the items. The error of the earliest item that failed is raised."""
    if threads == 1:
        return [function(item) for item in items]
    with trace.make_named_pool(threads, "worker") as pool:
        return list(pool.map(function, items))


def run_in_processes(
    processes: int, function: Callable[[T], R], items: Sequence[T], at_end: Callable[[], None] | None = None
) -> list[R]:
    """Like `run_in_threads`, in this process and `processes` - 1 forks of it, so that no two share a GIL.

    Results are pickled back to this process, and what was added to `counters`; other changes that a fork
    makes in memory are lost with it. at_end: called by each process after its last item.
    """
    at_end = at_end or (lambda: None)
    if processes == 1:
        done = run_in_threads(1, function, items)
        at_end()
        return done
    with tempfile.TemporaryFile(buffering=0) as queue:
        queue.write(b"".join(number.to_bytes(8, "little") for number in range(len(items))))
        # The forks inherit the open file and share its position, so each read of 8 bytes takes another item.
        # Unlike a lock, the position cannot be held by a process that was killed.
        queue.seek(0)
        results = _run_forked(processes, lambda: _process_queue(queue, function, items, at_end))
    in_order = [results[number] for number in sorted(results)]
    for result in in_order:
        if isinstance(result, Exception):
            raise result
    return in_order  # type: ignore[return-value]


def _process_queue(
    queue: Any, function: Callable[[T], R], items: Sequence[T], at_end: Callable[[], None]
) -> dict[int, R | Exception]:
    """Take item numbers from the queue until it is empty. Returns item number -> result or error."""
    results: dict[int, R | Exception] = {}
    while entry := queue.read(8):
        number = int.from_bytes(entry, "little")
        try:
            results[number] = function(items[number])
        except Exception as error:
            results[number] = error
            queue.seek(0, io.SEEK_END)  # no process starts another item
    at_end()
    return results


def _run_forked(processes: int, run_share: Callable[[], dict[int, Any]]) -> dict[int, Any]:
    """Call `run_share` in this process and in its forks. Returns all their results in one dict."""

    parent = os.getpid()

    def run_and_send(out: Connection, number: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches all processes; the parent ends its forks
        own_process.end_with_parent(parent)
        own_process.worker_number = number
        for counter in counters:  # the parent's so far
            counter.clear()
        results = run_share()
        trace.stop_tracing()  # the parent ends its forks once it has their results
        out.send((results, [dict(counter) for counter in counters]))

    gc.freeze()  # a collection in a fork would write to the objects' headers and so copy the parent's pages
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(processes - 1)]
    forks = [
        fork.Process(target=run_and_send, args=(out, number)) for number, (_, out) in enumerate(pipes, 1)
    ]
    try:
        for process, (_, out) in zip(forks, pipes, strict=True):
            process.start()
            out.close()
        results = run_share()
        for process, (receiver, _) in zip(forks, pipes, strict=True):
            try:
                found, counts = receiver.recv()
                results |= found
                for counter, of_fork in zip(counters, counts, strict=True):
                    for path, count in of_fork.items():
                        counter[path] = counter.get(path, 0) + count
            except (EOFError, OSError):
                process.join()
                lost = f"a worker ended with exit code {process.exitcode} (-9: killed, for memory?)"
                results.setdefault(LOST, UserError(f"{lost}: try fewer --workers"))
        return results
    finally:
        gc.unfreeze()
        for process in forks:
            if process.pid is not None:
                process.kill()
                process.join()


class Workers:
    """All ranks of this job and the number of workers in each. Without MPI it is one rank.

    The ranks share the file system; over MPI they exchange only small values. Every method except
    `abort_ranks` is collective: all ranks must call it, in the same order.
    """

    def __init__(self, here: Ranks, per_rank: int) -> None:
        self.rank, self.size, self.per_rank = here.rank, here.world_size, per_rank
        self._comm: Any = None
        self.error_is_shared = False  # all ranks are about to raise the same error: no need to abort them
        if self.size > 1:
            from mpi4py import MPI

            self._comm = MPI.COMM_WORLD
            if self._comm.size != self.size:
                raise UserError(
                    f"{self.size} ranks by the environment, {self._comm.size} by MPI: start them with mpiexec"
                )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        return self._comm.allgather(value) if self._comm else [value]

    def raise_shared_error(self, error: BaseException | None = None) -> None:
        """`error`: this rank's own, if it failed. If any rank failed, all raise the error of the first."""
        mine = None if error is None else (type(error), str(error))
        failures = [failure for failure in self.all_gather(mine) if failure]
        self.error_is_shared = bool(failures)
        if error is not None and mine == failures[0]:
            raise error
        if failures:
            kind, text = failures[0]
            raise UserError(text) if kind is UserError else RuntimeError(f"another rank failed: {text}")

    def abort_ranks(self, code: int) -> None:
        """End all ranks, unless they fail with a shared error anyway: they may be waiting for this one."""
        if self._comm and not self.error_is_shared:
            sys.stderr.flush()
            self._comm.Abort(code)

    def run_on_first(self, function: Callable[[], None]) -> None:
        """Rank 0 calls the function; the others wait for it."""
        failure: BaseException | None = None
        if self.first:
            try:
                function()
            except Exception as error:
                failure = error
        self.raise_shared_error(failure)

    def compute_on_first(self, function: Callable[[], T]) -> T:
        """The value that the function returns on rank 0, on all ranks."""
        value: list[Any] = [None]

        def keep_value() -> None:
            value[0] = function()

        self.run_on_first(keep_value)
        return self.all_gather(value[0])[0]

    def run_each(
        self, items: Sequence[T], function: Callable[[T], None], at_end: Callable[[], None] | None = None,
        in_threads: bool = False,
    ) -> None:  # fmt: skip
        """Call the function with every item, each by one worker of one rank. Items start in order, and of the
        errors on a rank the earliest item's is raised.

        at_end: called where the function was called, after the last item. in_threads: the function leaves
        Python's lock to others most of the time.
        """
        mine = list(items[self.rank :: self.size])
        error = None
        try:
            if self._comm or in_threads:
                self._run_in_threads(mine, function)
                if at_end:
                    at_end()
            else:
                run_in_processes(max(1, min(self.per_rank, len(mine))), function, mine, at_end)
        except Exception as raised:
            error = raised
        self.raise_shared_error(error)

    def _run_in_threads(self, items: Sequence[T], function: Callable[[T], None]) -> None:
        """No item is started after one has failed."""
        errors: dict[int, Exception] = {}

        def run_one(number: int) -> None:
            if not errors:
                try:
                    function(items[number])
                except Exception as error:
                    errors[number] = error

        run_in_threads(self.per_rank, run_one, range(len(items)))
        if errors:
            raise errors[min(errors)]
