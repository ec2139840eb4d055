"""The ranks of a job that needs no torch: barriers, exchange of values, errors of all ranks, over MPI.

In: this rank, as the launcher started it. Out: a `RankGroup`. What `dlrm/runtime/session.py` is to a
training, this is to programs that only move bytes (`dlrm.emulate`, `dlrm.replay`). A job of one rank needs no
MPI. A rank that dies is noticed by mpiexec, which ends the others.

Waiting ranks sleep between looks instead of spinning, so that many more ranks than cores fit on a host.
"""

import ctypes
import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, TypeVar

import numpy as np

from dlrm.runtime import entry, trace
from dlrm.runtime.clock_offset import ROUND_TRIPS, choose_round_trip
from dlrm.runtime.errors import UserError, share_user_errors
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.stop import SIGNALS

T = TypeVar("T")
POLL_SECONDS = 50e-6  # between two looks of a rank that has a core of its own
PR_SET_TIMERSLACK = 29
CLOCK_TAG = 7
PRINT_SECONDS = 0.3  # mpiexec drops what it has not passed on when a rank aborts
TURN_SECONDS = 2 * PRINT_SECONDS  # in which a rank that has failed prints, and ends all ranks
MOST_TURNS = 5


@contextmanager
def open_group(here: Ranks) -> Iterator["RankGroup"]:
    """All ranks of this job, for the block. A collective; UserError where MPI sees other ranks than the
    launcher named. When the block raises, all ranks exit with the same code.
    """
    set_exact_sleep()
    if here.world_size == 1:
        yield RankGroup(here, None)
        return
    from mpi4py import MPI  # importing it initializes MPI

    comm = MPI.COMM_WORLD
    if comm.size != here.world_size or comm.rank != here.rank:
        raise UserError(
            f"rank {here.rank} of {here.world_size}: MPI says rank {comm.rank} of {comm.size}: start it with "
            "the mpiexec of the MPI that mpi4py was built for (./launcher.sh knows it)"
        )
    group = RankGroup(here, comm)
    try:
        yield group
        group.barrier()
        MPI.Finalize()
    except BaseException as error:
        if getattr(error, "shared", False):  # all ranks are here, with the same error
            trace.stop_tracing()
            group.barrier()
            MPI.Finalize()
            raise
        _end_all_ranks(error, here, comm)


def _end_all_ranks(error: BaseException, here: Ranks, comm: Any) -> NoReturn:
    """Print the line of this rank's error, and end all ranks with its exit code."""
    for number in SIGNALS:  # one Ctrl-C may come twice, from the terminal and from mpiexec
        signal.signal(number, signal.SIG_IGN)
    trace.stop_tracing()
    # Ctrl-C, or a disk that is full, comes to many ranks at once: the lowest one prints its line, and has
    # ended the others before it is their turn.
    time.sleep(TURN_SECONDS * min(here.rank, MOST_TURNS))

    def fail(_: Ranks) -> NoReturn:
        raise error

    code = entry.run_for_exit_code(fail, here)
    time.sleep(PRINT_SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPICH prints a line of its own, which says nothing
    comm.Abort(code)
    raise AssertionError("MPI_Abort came back")


def set_exact_sleep() -> None:
    """Let this process's sleeps end on time: Linux adds 50 microseconds to each otherwise."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


class RankGroup:
    """All ranks of this job. Every method is a collective: all ranks call it, in the same order."""

    def __init__(self, here: Ranks, comm: Any) -> None:
        """`comm`: an mpi4py communicator, or None where there is one rank."""
        self.here, self._comm = here, comm
        cores = len(os.sched_getaffinity(0))
        self._poll_seconds = POLL_SECONDS * max(1.0, here.local_world_size / cores)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self._comm is not None:
            self._wait(self._comm.Ibarrier())

    def exchange_bytes(self, send: Any, receive: Any) -> None:
        """Send an equal part of `send` to every rank, and get one from each into `receive`: buffers of one
        size, a multiple of the number of ranks.
        """
        if self._comm is not None:
            self._wait(self._comm.Ialltoall(send, receive))

    def _wait(self, request: Any) -> None:
        while not request.Test():
            time.sleep(self._poll_seconds)

    def gather_from_all(self, value: T) -> list[T]:
        """The values of all ranks, in rank order. They must be picklable."""
        if self._comm is None:
            return [value]
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self.here.world_size, np.int64)
        self._wait(self._comm.Iallgather(np.array([len(mine)], np.int64), sizes))
        joined = np.empty(int(sizes.sum()), np.uint8)
        self._wait(self._comm.Iallgatherv(mine, (joined, sizes)))
        return [pickle.loads(part.tobytes()) for part in np.split(joined, np.cumsum(sizes)[:-1])]

    def broadcast_from_first(self, value: T) -> T:
        """Rank 0's value, on all ranks; what the others pass is ignored."""
        if self._comm is None:
            return value
        data = np.frombuffer(pickle.dumps(value if self.here.first else None), np.uint8).copy()
        size = np.array([len(data)], np.int64)
        self._wait(self._comm.Ibcast(size))
        data = data if self.here.first else np.empty(int(size[0]), np.uint8)
        self._wait(self._comm.Ibcast(data))
        return pickle.loads(data.tobytes())

    def scatter_from_first(self, values: list[T] | None) -> T:
        """The value that rank 0 has for this rank; `values`: one for each rank, on rank 0."""
        if self._comm is None:
            assert values is not None
            return values[0]
        parts = [pickle.dumps(value) for value in values or ()]
        sizes = np.array([len(part) for part in parts], np.int64) if values else None
        size = np.empty(1, np.int64)
        self._wait(self._comm.Iscatter(sizes, size))
        joined = (np.frombuffer(b"".join(parts), np.uint8), sizes) if values else None
        mine = np.empty(int(size[0]), np.uint8)
        self._wait(self._comm.Iscatterv(joined, mine))
        return pickle.loads(mine.tobytes())

    def errors_on_all_ranks(self) -> AbstractContextManager[None]:
        """`errors.share_user_errors` between these ranks."""
        return share_user_errors(self.gather_from_all)

    def mark_clock(self, when: str) -> None:
        """Record in the trace how the clocks of the ranks' hosts compare; `when`: "start" or "end"."""
        hosts = self.gather_from_all(self.here.host)
        asking = [hosts.index(host) for host in dict.fromkeys(hosts) if host != hosts[0]]
        for rank in asking:
            if self.here.first:
                self._answer_host(rank)
            elif self.here.rank == rank:
                ahead_us, error_us = self._measure_offset()
                trace.instant(
                    "clock", "offset", when=when, ahead_us=ahead_us, error_us=error_us,
                    round_trips=ROUND_TRIPS,
                )  # fmt: skip
        self.barrier()
        trace.instant("clock", "barrier", when=when)

    def _answer_host(self, rank: int) -> None:
        times = []
        for _ in range(ROUND_TRIPS):
            self._comm.recv(source=rank, tag=CLOCK_TAG)
            received = time.time_ns()
            self._comm.send(None, rank, tag=CLOCK_TAG)
            times.append((received, received))
        self._comm.send(times, rank, tag=CLOCK_TAG)

    def _measure_offset(self) -> tuple[int, int]:
        own = []
        for _ in range(ROUND_TRIPS):
            sent = time.time_ns()
            self._comm.send(None, 0, tag=CLOCK_TAG)
            self._comm.recv(source=0, tag=CLOCK_TAG)
            own.append((sent, time.time_ns()))
        offset = choose_round_trip(own, self._comm.recv(source=0, tag=CLOCK_TAG))
        return offset.ahead_us, offset.error_us
