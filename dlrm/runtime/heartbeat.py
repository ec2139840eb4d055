"""When a rank fails, all other ranks exit within seconds and name it.

Without this, a rank that is gone leaves the others waiting in a collective until its timeout, and the job
holds its nodes. Three things are watched:

  processes of this host  The kernel reports the end of a process at once (`peers.LocalPeers`).
  heartbeats              Each rank counts up a number in the store once a second. Rank 0 reads those of all
                          ranks, the others read rank 0's. A number that has not changed for --timeout seconds
                          means a lost rank, whatever the cause: its process is stopped, its host is down.
  the failure notice      The first rank that notices a failure leaves the reason in the store.

When a collective breaks, which the main thread sees as an exception, 3.5 seconds without a heartbeat are
enough to name the missing rank: that something is wrong is known by then.

Two threads, because a store that does not answer blocks whoever asks it: "watch" asks the store, "guard"
never does. Both must be able to end the process while the main thread is inside a collective, so they call
os._exit.
"""

import contextlib
import os
import threading
import time
from typing import Any

from dlrm.runtime import trace
from dlrm.runtime.entry import print_error
from dlrm.runtime.errors import LostRank
from dlrm.runtime.failure_notice import (
    FailureNotice,
    describe_end,
    name_ranks,
    post_notice,
    read_notice,
    try_post_notice,
)
from dlrm.runtime.peers import ENDED_WELL, LocalPeers, RankProcess
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.rendezvous import END_SECONDS, name_heartbeat
from dlrm.runtime.signed_store import SignedStore, read_job_key

BEAT_SECONDS = 1.0
LEAVE_SECONDS = 5  # at the end rank 0 keeps the store for the others at most so long
MISSING_SECONDS = 3.5  # without a heartbeat, once a collective has broken
# What the messages of torch's, gloo's and NCCL's errors contain when a peer is gone. Their type does not
# tell: most are a plain RuntimeError.
BROKEN_CONNECTION = (
    "connection reset", "connection closed", "timed out", "broken pipe", "socket", "connectfullmesh",
    "connection was likely closed", "nccl error", "connection refused", "has ended while", "has sent nothing",
)  # fmt: skip


def is_broken_connection(error: BaseException) -> bool:
    """Whether this error of a collective may mean that another rank is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in BROKEN_CONNECTION)


class Heartbeat:
    """This rank's heartbeat, and its watch over the other ranks. With one rank it does nothing.

    Life of a session: made after the rendezvous; `mark_group_formed`; the work; `mark_finished`, a barrier,
    `leave_store`; `close`. After an error the main thread calls `announce_failure` or `find_lost_rank`, then
    `close`.
    """

    def __init__(self, store: SignedStore, here: Ranks, processes: list[RankProcess], timeout: int) -> None:
        """`processes`: in rank order. `timeout`: a rank without a heartbeat for this many seconds is lost."""
        self._here, self._processes, self._timeout = here, processes, timeout
        self._closed = threading.Event()
        self._wake_watch = threading.Event()  # the watch thread looks now, not after the next second
        self._exiting = threading.Lock()  # held by the thread that ends the process: one line, one exit code
        self._main_thread_exits = False  # it has printed, or is going to print, its own reason
        self._finished = False  # this rank's work is done: that other ranks leave is not a failure any more
        self._all_finished = False  # the work of all ranks is done, whatever the store says
        self._group_deadline = time.monotonic() + timeout  # for the process group to form
        self._ended: dict[int, str] = {}  # ranks of this host whose process ended, and the cause or ""
        self._store = store
        self._last_answer = time.monotonic()  # of the store
        self._heartbeats: _PeerHeartbeats | None = None  # of the ranks that this one watches
        if here.world_size > 1:
            self._peers = LocalPeers()
            for rank, process in enumerate(processes):
                if rank != here.rank:
                    self._peers.add(rank, process)
            self._guard = threading.Thread(target=self._guard_processes, name="guard", daemon=True)
            self._guard.start()  # before the store is asked, which may not answer any more
            try:
                self._store = SignedStore(store.clone().store, read_job_key(), timeout)
            except RuntimeError:
                notice = self._explain_lost_store()
                self._closed.set()
                raise LostRank(f"ends because {notice.reason}") from None
            self._watch = threading.Thread(target=self._watch_ranks, name="watch", daemon=True)
            self._watch.start()

    # --- the two threads

    def _watch_ranks(self) -> None:
        """The watch thread: send this rank's heartbeat, read the others' and the failure notice."""
        trace.name_thread("watch")
        watched = set(range(self._here.world_size)) if self._here.first else {0}
        watched.discard(self._here.rank)
        heartbeats = self._heartbeats = _PeerHeartbeats(self._store, watched)
        count, before = 0, time.monotonic()
        while not self._closed.is_set():
            self._wake_watch.wait(BEAT_SECONDS)
            self._wake_watch.clear()
            if self._closed.is_set():
                return
            count += 1
            now = time.monotonic()
            notice = None
            try:
                self._store.set(name_heartbeat(self._here.rank), str(count))
                if now - before > 5 * BEAT_SECONDS:
                    # this process was stopped (Ctrl-Z, a debugger) and missed the others' heartbeats
                    heartbeats.reset_timers()
                notice = read_notice(self._store)
                silent = set()
                if notice is None and not self._ended:
                    silent = heartbeats.find_silent(self._timeout)
                if silent:
                    post_notice(self._store, FailureNotice(self._describe_silence(silent), sorted(silent)))
                    notice = read_notice(self._store)  # another rank may have been first
            except RuntimeError:  # the store is gone, and with it the process that keeps it
                self._exit_process(self._explain_lost_store())
            self._last_answer = before = time.monotonic()
            if notice:
                self._exit_after_own_error(notice)
            elif failed := self._find_failed_process():
                if self._finished and not self._closed.wait(BEAT_SECONDS):
                    # the last barrier may be behind that rank and not yet behind this one
                    failed = self._find_failed_process()
                if failed is None or self._closed.is_set():
                    continue
                try_post_notice(self._store, failed)
                self._exit_process(failed)

    def _guard_processes(self) -> None:
        """The guard thread: never asks the store. It notices ends of processes, and a store that is stuck."""
        trace.name_thread("guard")
        before = time.monotonic()
        while not self._closed.is_set():
            ended = self._peers.wait(BEAT_SECONDS)
            if self._closed.is_set():
                return
            now = time.monotonic()
            if ended:
                self._ended |= ended
                # A rank that failed by itself has left a notice with the reason: the watch thread reads it.
                self._wake_watch.set()
                if self._closed.wait(1.5 * BEAT_SECONDS):
                    return
                # it has not ended this process, so the store does not answer
                if failed := self._find_failed_process(ask_store=False):
                    self._exit_process(failed)
            if now - before > 5 * BEAT_SECONDS:  # this process itself was stopped
                self._last_answer = now
            before = now
            if now - self._last_answer > self._timeout + BEAT_SECONDS:
                # rank 0 keeps the store. Its process is there, but suspended: a kill frees the launcher
                self._main_thread_exits = False
                self._exit_after_own_error(FailureNotice(self._describe_silence({0}), [0]))
            if now > self._group_deadline:
                self._exit_process(
                    FailureNotice(f"the ranks did not connect within {self._timeout} s (--timeout)")
                )

    # --- what the threads find

    def _find_failed_process(self, ask_store: bool = True) -> FailureNotice | None:
        """A process of this host that ended although the job is not done.

        Once this rank is finished, others may have left: those ended with code 0, or (where the kernel does
        not tell the code) had marked themselves as finished in the store, or the last barrier is over.
        """
        for rank, cause in dict(self._ended).items():
            if self._finished and cause in ("", ENDED_WELL):
                if cause == ENDED_WELL or not ask_store or self._all_finished:
                    continue
                with contextlib.suppress(RuntimeError):
                    if self._store.check([_name_finished(rank)]):
                        continue
            return FailureNotice(describe_end(rank, cause, dict(enumerate(self._processes))))
        return None

    def _explain_lost_store(self) -> FailureNotice:
        """Which process ended, now that the store is gone."""
        deadline = time.monotonic() + (END_SECONDS if self._processes[0].is_local else BEAT_SECONDS)
        while not (failed := self._find_failed_process(ask_store=False)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return failed or FailureNotice(f"{self._name_ranks({0})} is gone")

    def _describe_silence(self, ranks: set[int]) -> str:
        return f"{self._name_ranks(ranks)} sent no heartbeat for {self._timeout} s (--timeout)"

    def _name_ranks(self, ranks: set[int]) -> str:
        return name_ranks(ranks, [process.host for process in self._processes])

    # --- how the threads end this process

    def _exit_after_own_error(self, notice: FailureNotice) -> None:
        """Exit, but give the main thread a second to end with an error of its own, which is more precise."""
        self._closed.wait(BEAT_SECONDS)
        self._exit_process(notice)

    def _exit_process(self, notice: FailureNotice) -> None:
        """End this process with one line, unless the main thread is ending it."""
        with self._exiting:
            if self._main_thread_exits or self._closed.is_set():
                return
            if notice.reporter_rank in (None, self._here.rank):
                print_error(self._here, f"ends because {notice.reason}")
            # a process that stands still would hold up the launcher; those of other hosts kill their own
            for rank in set(notice.lost) & set(range(len(self._processes))) - {self._here.rank}:
                self._processes[rank].kill()
            os._exit(notice.code)

    # --- what the main thread calls

    def list_silent(self, seconds: float) -> dict[int, tuple[str, float]]:
        """On rank 0, of the ranks without a heartbeat for so long: host, and seconds. It sends nothing."""
        if self._heartbeats is None:
            return {}
        silent = self._heartbeats.measure_silence()
        return {rank: (self._processes[rank].host, age) for rank, age in silent.items() if age > seconds}

    def mark_group_formed(self) -> None:
        """The process group is there: its deadline is over."""
        self._group_deadline = float("inf")

    def let_main_thread_exit(self) -> None:
        """The main thread ends this process and prints why: the threads must not."""
        with self._exiting:
            self._main_thread_exits = True

    def mark_finished(self) -> None:
        """The work of this rank is done; it still waits for the others."""
        if self._here.world_size > 1:
            self._store.set(_name_finished(self._here.rank), "")
            self._finished = True

    def leave_store(self) -> None:
        """The work of all ranks is done. Rank 0 waits until the others have left: the store ends with it."""
        self._all_finished = True
        if self._here.world_size == 1:
            return
        with contextlib.suppress(RuntimeError):
            if not self._here.first:
                self._store.set(_name_left(self._here.rank), "")
                self._closed.set()
                return
            missing = set(range(1, self._here.world_size))
            deadline = time.monotonic() + LEAVE_SECONDS
            while missing and time.monotonic() < deadline and not self._ended.keys() >= missing:
                missing = {rank for rank in missing if not self._store.check([_name_left(rank)])}
                time.sleep(0.002)

    def announce_failure(self, code: int = 1) -> None:
        """This rank ends with an error of its own, which it prints: the others exit with the same code."""
        self.let_main_thread_exit()
        if self._here.world_size > 1:
            with contextlib.suppress(RuntimeError):
                reason = f"{self._name_ranks({self._here.rank})} failed"
                reporter_rank = 1 if self._here.first else 0  # one of the others, whichever is there for sure
                post_notice(self._store, FailureNotice(reason, code=code, reporter_rank=reporter_rank))
                self._keep_store_for_readers()

    def _keep_store_for_readers(self) -> None:
        """Rank 0 waits: the store ends with it, and the others read the notice first."""
        if self._here.first:
            time.sleep(2 * BEAT_SECONDS)

    def find_lost_rank(self) -> LostRank:
        """A collective broke: wait a little for the reason, and return an error that names the lost rank.

        The watch thread continues meanwhile: this rank must not look lost to the others.
        """
        self.let_main_thread_exit()
        others = set(range(self._here.world_size)) - {self._here.rank}
        try:
            heartbeats = _PeerHeartbeats(self._store, others)
            deadline = time.monotonic() + MISSING_SECONDS
            while (
                not (notice := read_notice(self._store))
                and not self._find_failed_process()
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)
                heartbeats.read_all()
            if not notice:
                silent = heartbeats.find_silent(MISSING_SECONDS - BEAT_SECONDS)
                reason = f"{self._name_ranks(silent)} is gone" if silent else "a connection broke"
                post_notice(self._store, self._find_failed_process() or FailureNotice(reason))
                notice = read_notice(self._store)  # another rank may have been first
            self._keep_store_for_readers()
        except RuntimeError:
            notice = self._explain_lost_store()
        notice = notice or FailureNotice(f"{self._name_ranks({0})} is gone")
        error = LostRank(f"ends because {notice.reason}")
        error.code = notice.code
        error.is_printed = notice.reporter_rank not in (None, self._here.rank)
        return error

    def close(self) -> None:
        """End the threads. A guard that does not end in time keeps its descriptors: it may still use them."""
        self._closed.set()
        self._wake_watch.set()
        if self._here.world_size > 1:
            self._peers.wake_waiter()
            self._watch.join(2 * BEAT_SECONDS)
            self._guard.join(BEAT_SECONDS)
            if not self._guard.is_alive():
                self._peers.close()


def _name_finished(rank: int) -> str:
    return f"dlrm/finished/{rank}"


def _name_left(rank: int) -> str:
    return f"dlrm/left/{rank}"


class _PeerHeartbeats:
    """The last heartbeat of each of some ranks, and when it changed, by this process's clock.

    Clocks of hosts differ, so a heartbeat has no time in it: it counts as new when its number is another.
    """

    def __init__(self, store: Any, ranks: set[int]) -> None:
        self._store, self._ranks = store, sorted(ranks)
        self._last: dict[int, tuple[bytes, float]] = {}  # by rank: the number, time.monotonic()

    def read_all(self) -> None:
        now = time.monotonic()
        values = self._store.multi_get([name_heartbeat(rank) for rank in self._ranks])
        for rank, value in zip(self._ranks, values, strict=True):
            if value is None:  # not signed by a rank of this job: keep the time, the rank may be gone
                self._last.setdefault(rank, (b"", now))
            elif rank not in self._last or self._last[rank][0] != value:
                self._last[rank] = value, now

    def find_silent(self, seconds: float) -> set[int]:
        """The ranks whose heartbeat has not changed for so long."""
        self.read_all()
        now = time.monotonic()
        return {rank for rank, (_, since) in self._last.items() if now - since > seconds}

    def measure_silence(self) -> dict[int, float]:
        """Seconds since the heartbeat of each rank changed, as far as it was read."""
        now = time.monotonic()
        return {rank: now - since for rank, (_, since) in dict(self._last).items()}

    def reset_timers(self) -> None:
        self._last.clear()
