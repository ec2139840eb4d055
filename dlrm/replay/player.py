"""Plays the nodes of all threads of some traced ranks in this process, a thread for each.

In: rank plans, and a `Caller` for each thread. Out: the calls, made; spans in this process's own trace; what
the calls gave. Closed loop: think time begins when the thread's last call has ended.
"""

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from common.errors import printable
from common.memory import refuse_too_large
from dlrm.replay.calls import (
    Caller,
    CallSettings,
    CLibrary,
    ProcessFiles,
    ReplayOutcome,
    find_largest_request,
)
from dlrm.replay.files import FilePlan
from dlrm.replay.order import BARRIER, BEGIN, CALL, COPY, END, JOIN, LIMIT, PUT, START, TAKE, Thread
from dlrm.replay.paths import MappedPaths
from dlrm.replay.plan import RankPlan, ThreadPlan, TracedCall, TracedSpan
from dlrm.runtime import mpi, trace

LARGEST_DEBT = 1.0  # seconds by which a thread may be late and still catch up
LOOK_SECONDS = 0.2  # between two looks of a waiting thread at whether another one failed
_PATTERN_BYTES = 1 << 20


class PlaybackStopped(Exception):
    """Another thread has failed: its error is the one to report."""


class BatchCount:
    """A count that threads wait for: batches put, batches taken."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped
        self._changed = threading.Condition()
        self._count = 0

    def reach(self, count: int) -> None:
        with self._changed:
            self._count = max(self._count, count)
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        with self._changed:
            while not self._changed.wait_for(lambda: self._count >= count, LOOK_SECONDS):
                if self._is_stopped():
                    raise PlaybackStopped


class RankBarrier:
    """A barrier of the main threads of all ranks, here and in other processes."""

    def __init__(
        self, count: int, wait_for_processes: Callable[[], None], keys: set[tuple[Any, ...]]
    ) -> None:
        """count: traced ranks of this process. keys: of the barriers that every rank comes to."""
        self._keys = keys
        self._barrier = threading.Barrier(max(1, count), action=wait_for_processes)

    def wait(self, key: tuple[Any, ...]) -> None:
        if key in self._keys:
            try:
                self._barrier.wait()
            except threading.BrokenBarrierError:
                raise PlaybackStopped from None

    def stop(self) -> None:
        self._barrier.abort()


class Player:
    """All traced ranks that this process plays.

    speed: what think times are divided by; 0: there are none.
    """

    def __init__(
        self, plans: list[RankPlan], paths: MappedPaths, files: FilePlan, speed: float,
        settings: CallSettings, wait_for_processes: Callable[[], None], keys: set[tuple[Any, ...]],
        begin: int,
    ) -> None:  # fmt: skip
        """begin: us on the run's clock, from which all ranks count their first think time."""
        self.plans, self.paths, self.files = plans, paths, files
        self.speed, self.settings, self.begin = speed, settings, begin
        self._wait_for_processes, self._barriers = wait_for_processes, len(keys)
        attending = sum(bool(plan.list_barriers()) for plan in plans)
        self._attends = attending > 0
        self.barrier = RankBarrier(attending, wait_for_processes, keys)
        self.error: BaseException | None = None
        self.outcome = ReplayOutcome()
        self._lock = threading.Lock()
        self._running: list[threading.Thread] = []
        self._library = CLibrary()
        calls = [call for plan in plans for _, _, call in plan.calls]
        self._pattern = _make_pattern(_find_buffer_size(each for each in calls if each.op == "write"))

    def is_stopped(self) -> bool:
        return self.error is not None

    def play(self) -> ReplayOutcome:
        """Play to the end. Raises the first error of any thread."""
        if not self._attends:  # the other processes wait for this one all the same
            self.run_thread(self._wait_at_barriers, "barriers")
        main_threads = [RankPlayer(self, plan) for plan in self.plans if plan.threads]
        for each in main_threads:
            each.start_thread(each.plan.threads[0].thread)
        number = 0
        while number < len(self._running):  # threads start others
            thread = self._running[number]
            while thread.is_alive():
                thread.join(LOOK_SECONDS)  # in pieces: a signal is handled in between
                if self.error is not None:
                    raise self.error
            number += 1
        if self.error is not None:
            raise self.error
        return self.outcome

    def _wait_at_barriers(self) -> ReplayOutcome:
        for _ in range(self._barriers):
            self._wait_for_processes()
        return ReplayOutcome()

    def run_thread(self, function: Callable[[], ReplayOutcome], name: str) -> None:
        """Start a thread that adds what `function` returns to the outcome. Its error ends all threads."""

        def run() -> None:
            try:
                mpi.set_exact_sleep()
                trace.name_thread(name)
                outcome = function()
                with self._lock:
                    self.outcome.merge(outcome)
            except PlaybackStopped:
                pass
            except BaseException as error:  # noqa: BLE001  # raised again by `play`
                with self._lock:
                    self.error = self.error or error
                self.barrier.stop()

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._running.append(thread)
        thread.start()

    @property
    def pattern(self) -> int:
        return _find_address(self._pattern)


class RankPlayer:
    """The threads of one traced rank, and what they wait for."""

    def __init__(self, player: Player, plan: RankPlan) -> None:
        self.player, self.plan = player, plan
        self._threads = {thread.thread: thread for thread in plan.threads}
        self._open_files = {thread.thread[0]: ProcessFiles() for thread in plan.threads}
        self._put = {thread.thread: BatchCount(player.is_stopped) for thread in plan.threads}
        self._taken = {thread.thread: BatchCount(player.is_stopped) for thread in plan.threads}
        self._ended = {thread.thread: BatchCount(player.is_stopped) for thread in plan.threads}

    def start_thread(self, thread: Thread) -> None:
        plan = self._threads[thread]
        prefix = f"rank {self.plan.rank} " if len(self.player.plans) > 1 else ""
        self.player.run_thread(lambda: self._play_thread(plan), f"{prefix}{plan.name}")

    def _play_thread(self, plan: ThreadPlan) -> ReplayOutcome:
        player = self.player
        calls = [node.payload for node in plan.nodes if node.kind == CALL]
        memory = mmap.mmap(-1, _find_buffer_size(call for call in calls if call.op == "read"))
        caller = Caller(
            plan.thread[1], self._open_files[plan.thread[0]], player._library, player.paths, player.files,
            _find_address(memory), player.pattern, player.settings, player.is_stopped,
        )  # fmt: skip
        pace = _Pace(player.speed)
        if plan is self.plan.threads[0]:
            pace.think(self.plan.begin - player.begin)
            pace.end()
        spans: list[trace.span] = []
        for think, kind, payload in plan.nodes:
            pace.think(think)
            if kind == CALL:
                caller.make(payload)
            elif kind == BEGIN:
                spans.append(self._begin_span(payload))
            elif kind == END:
                spans.pop().__exit__()
            elif kind == COPY:
                caller.copy_mapped(
                    payload.path, payload.args.get("offset") or 0, payload.args.get("bytes") or 0
                )
            elif kind == PUT:
                self._put[plan.thread].reach(payload)
            elif kind == TAKE:
                thread, count = payload
                self._put[thread].wait(count)
                self._taken[thread].reach(count)
            elif kind == LIMIT:
                self._taken[plan.thread].wait(payload)
            elif kind == START:
                self.start_thread(payload)
            elif kind == JOIN:
                self._ended[payload].wait(1)
            elif kind == BARRIER:
                player.barrier.wait(payload)
            pace.end()
            if player.error is not None:
                raise PlaybackStopped
        self._ended[plan.thread].reach(1)
        return caller.outcome

    def _begin_span(self, span: TracedSpan) -> trace.span:
        named = {"file": span.path} if span.path else {}
        if span.path and span.path.startswith("/"):
            named = {"file": self.player.paths.find(span.path)}
        mapped = {"mapped": 1} if span.mapped else {}
        return trace.span(span.cat, span.name, **span.args, **named, **mapped).__enter__()


class _Pace:
    """When a thread does the next thing: what it was late for once is taken off the times that follow."""

    def __init__(self, speed: float) -> None:
        self._seconds = 1e-6 / speed if speed else 0.0  # of a microsecond in the trace
        self._ended = time.perf_counter()
        self._late = 0.0

    def think(self, microseconds: int) -> None:
        due = self._ended + microseconds * self._seconds - self._late
        now = time.perf_counter()
        if due > now:
            time.sleep(due - now)
            now = time.perf_counter()
        self._late = min(now - due, LARGEST_DEBT)

    def end(self) -> None:
        self._ended = time.perf_counter()


def _find_buffer_size(calls: Iterable[TracedCall]) -> int:
    """Bytes of memory that the largest of these reads or writes needs, at least one."""
    largest = max(calls, key=find_largest_request, default=None)
    if largest is None:
        return 1
    size = find_largest_request(largest)
    refuse_too_large(size, f"{largest.name} of {printable(largest.path)}", "replay other --ranks")
    return max(1, size)


def _make_pattern(size: int) -> mmap.mmap:
    """Memory of made-up bytes, as random as a file system that compresses can tell."""
    memory = mmap.mmap(-1, size)
    block = np.random.default_rng(0).bytes(min(size, _PATTERN_BYTES))
    for begin in range(0, size, len(block)):
        memory[begin : begin + len(block)] = block[: size - begin]
    return memory


def _find_address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
