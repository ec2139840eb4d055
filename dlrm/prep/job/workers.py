"""Who does what: items dealt to MPI ranks and, within a rank, to threads, or to forks; one error for all."""

import ctypes
import gc
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks

T = TypeVar("T")
R = TypeVar("R")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LOST = sys.maxsize  # in the place of an item: told if no item has an error


def run_in_threads(workers: int, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results in order; the first error is raised."""
    if workers == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))


def run_in_processes(workers: int, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """The same by this process and forks of it, which share no interpreter; what a fork keeps is lost."""
    if workers == 1:
        return run_in_threads(1, work, items)
    with tempfile.TemporaryFile(buffering=0) as deal:
        deal.write(b"".join(number.to_bytes(8, "little") for number in range(len(items))))
        deal.seek(0)  # all share this position, which nobody can die holding as a lock
        found = _run_forked(workers, lambda: _work_through_items(deal, work, items))
    results = [found[number] for number in sorted(found)]
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results  # type: ignore[return-value]


def _work_through_items(deal: Any, work: Callable[[T], R], items: Sequence[T]) -> dict[int, R | Exception]:
    """Take items while there are some."""
    found: dict[int, R | Exception] = {}
    while word := deal.read(8):
        number = int.from_bytes(word, "little")
        try:
            found[number] = work(items[number])
        except Exception as error:
            found[number] = error
            deal.seek(0, io.SEEK_END)  # nobody begins another
    return found


def _run_forked(workers: int, serve: Callable[[], dict[int, Any]]) -> dict[int, Any]:
    """What this process and its forks serve, together."""

    parent = os.getpid()

    def serve_and_tell(out: Connection) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its forks
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nor do they outlive it
        if os.getppid() == parent:
            out.send(serve())

    gc.freeze()  # what is there is garbage to nobody: looking at it would copy its pages
    fork = multiprocessing.get_context("fork")
    ends = [fork.Pipe(duplex=False) for _ in range(workers - 1)]
    forks = [fork.Process(target=serve_and_tell, args=(out,)) for _, out in ends]
    try:
        for process, (_, out) in zip(forks, ends, strict=True):
            process.start()
            out.close()
        found = serve()
        for process, (into, _) in zip(forks, ends, strict=True):
            try:
                found |= into.recv()
            except (EOFError, OSError):
                process.join()
                lost = f"a worker ended with exit code {process.exitcode} (-9: killed, for memory?)"
                found.setdefault(LOST, UserError(f"{lost}: try fewer --workers"))
        return found
    finally:
        gc.unfreeze()
        for process in forks:
            if process.pid is not None:
                process.kill()
                process.join()


class Workers:
    """Without MPI a team of one rank. The ranks see each other's files and exchange only small things."""

    def __init__(self, here: Ranks, workers: int) -> None:
        self.rank, self.size, self.workers = here.rank, here.world_size, workers
        self._comm: Any = None
        self.agreed = False  # an error that all ranks know of
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

    def gather(self, value: T) -> list[T]:
        return self._comm.allgather(value) if self._comm else [value]

    def agree(self, error: BaseException | None = None) -> None:
        """All ranks meet; if one has failed, all stop, with the first one's error."""
        mine = None if error is None else (type(error), str(error))
        failed = [found for found in self.gather(mine) if found]
        self.agreed = bool(failed)
        if error is not None and mine == failed[0]:
            raise error
        if failed:
            kind, text = failed[0]
            raise UserError(text) if kind is UserError else RuntimeError(f"another rank failed: {text}")

    def abort(self, code: int) -> None:
        """End the other ranks too, which may be waiting for this one."""
        if self._comm and not self.agreed:
            sys.stderr.flush()
            self._comm.Abort(code)

    def first_does(self, work: Callable[[], None]) -> None:
        """Rank 0 works, the others wait."""
        error: BaseException | None = None
        if self.first:
            try:
                work()
            except Exception as found:
                error = found
        self.agree(error)

    def first_gives(self, work: Callable[[], T]) -> T:
        """What rank 0 has found out, on all ranks."""
        found: list[Any] = [None]

        def keep() -> None:
            found[0] = work()

        self.first_does(keep)
        return self.gather(found[0])[0]

    def each(self, items: Sequence[T], work: Callable[[T], None]) -> None:
        """Every item once, somewhere; in order, so that the earliest bad one is reported."""
        mine = list(items[self.rank :: self.size])
        errors: dict[int, BaseException] = {}
        stop = threading.Event()

        def one(number: int) -> None:
            if not stop.is_set():
                try:
                    work(mine[number])
                except Exception as error:
                    errors[number] = error
                    stop.set()

        run_in_threads(self.workers, one, range(len(mine)))
        self.agree(errors[min(errors)] if errors else None)
