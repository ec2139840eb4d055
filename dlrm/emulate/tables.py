"""The reads and writes of tables in files, as the run's trace has them, beside the steps they belong to.

In: the parts of each step. Out: the same calls on files of the same size, by as many threads; what is written
has no meaning, what is read is thrown away. Which rows a step needs depends on the ids and on the cache, so
the calls are the run's own: with another batch size or other data they stay as they were.
"""

import errno
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.descriptors import close_descriptor, open_descriptor
from common.errors import UserError, os_errors_as_user_errors, printable
from common.owned import write_whole
from dlrm.runtime.trace import get_time, name_thread, record_span, span, sync_to_disk

# What is done besides steps, as one each: before the first one, with each checkpoint, after the last one.
STARTUP, CHECKPOINT, FINISH = "startup", "checkpoint", "finish"


class CallRun(NamedTuple):
    """Calls of one kind on one file, one after the other."""

    op: str  # read, write, sync, hint, or describe: a description is written whole, and made durable
    file: str
    offsets: Sequence[int]
    sizes: Sequence[int]


class Batch(NamedTuple):
    """What another thread does. Seconds: `at` of the main thread's own time in the step, but not before the
    thread's batch before and `pause`."""

    at: float
    pause: float
    thread: str  # its name in the trace
    calls: Sequence[CallRun]


class Awaited(NamedTuple):
    """How many calls of a thread must be done; the seconds that are waited beyond that."""

    thread: str
    count: int
    beyond: float


class StepPart(NamedTuple):
    """A part of a step, and what the main thread does at its end: `calls`, a `wait` for rows, the begin
    (`fetch`) or end (`fetched`) of looking rows up; nothing at the `end` of a step. It comes `at` so many
    seconds of its own time in the step, of which it spends `between` its calls."""

    at: float
    kind: str
    background: Sequence[Batch]
    calls: Sequence[CallRun]
    between: float
    awaited: Awaited | None


def unpack_part(values: Sequence[Any]) -> StepPart:
    """From JSON."""
    ends_at, kind, background, calls, between, awaited = values
    batches = [
        Batch(at, pause, thread, [CallRun(*run) for run in runs]) for at, pause, thread, runs in background
    ]
    runs = [CallRun(*run) for run in calls]
    return StepPart(ends_at, kind, batches, runs, between, Awaited(*awaited) if awaited else None)


class TableFiles:
    """The files of one rank's tables."""

    def __init__(self, folder: Path, steps: Mapping[str, Sequence[Sequence[StepPart]]]) -> None:
        """folder: made here, or empty. steps: split, STARTUP, ... -> the parts of each of its steps."""
        self._steps = {split: iter(each) for split, each in steps.items()}
        runs = [
            run for each in steps.values() for parts in each for part in parts for run in _list_runs(part)
        ]
        self._noise = memoryview(np.random.default_rng(0).bytes(max([max(run.sizes) for run in runs] or [0])))
        sizes: dict[str, int] = {}
        for run in runs:
            if run.op == "describe":
                continue
            end = max(offset + size for offset, size in zip(run.offsets, run.sizes, strict=True))
            sizes[run.file] = max(sizes.get(run.file, 0), end)
        with os_errors_as_user_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: self._make_file(folder / name, size) for name, size in sizes.items()}
        self._paths = {run.file: os.path.abspath(folder / run.file) for run in runs}
        self.bytes_read: dict[str, int] = {}
        self.bytes_written: dict[str, int] = {}
        self._counting = threading.Lock()
        self._threads: dict[str, _CallThread] = {}
        self._looks_up_since = 0  # on the trace's clock
        self.do_at_once(STARTUP)

    def do_at_once(self, split: str) -> None:
        """The next step of the split, without other work."""
        for part in self.take_step(split):
            self.start_part(part, 0.0, 0.0)
            self.end_part(part)

    def _make_file(self, path: Path, size: int) -> int:
        try:
            file = open_descriptor(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            os.ftruncate(file, size)
        except FileExistsError:
            raise UserError(
                f"{printable(path)}: is there already, and is not overwritten: name another --output_dir or "
                "--persistent_path"
            ) from None
        except OSError as error:
            raise UserError(f"{printable(path)}: {error.strerror}: name another --persistent_path") from None
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        return file

    def take_step(self, split: str) -> Sequence[StepPart]:
        """The parts of the split's next step; none after the run's last one."""
        return next(self._steps.get(split, iter(())), ())

    def start_part(self, part: StepPart, begun: float, scale: float) -> None:
        """Let the other threads begin with what they do during this part. begun: time.perf_counter() at which
        the main thread's own time in the step was 0; scale: how long a second of it takes. What the others
        do besides calls takes as long as it did.
        """
        for batch in part.background:
            if batch.thread not in self._threads:
                self._threads[batch.thread] = _CallThread(batch.thread, self.make_calls)
            self._threads[batch.thread].add(begun + batch.at * scale, batch.pause, batch.calls)

    def end_part(self, part: StepPart) -> float:
        """Do what the main thread does at its end. Returns the seconds that this took beyond its own time."""
        begun = time.perf_counter()
        if part.kind == "fetch":
            self._looks_up_since = get_time()
        elif part.kind == "fetched":
            record_span("ssd", "fetch", self._looks_up_since, get_time())
        self.make_calls(part.calls)
        if part.awaited:
            self._wait_for_rows(*part.awaited)
        return max(0.0, time.perf_counter() - begun - part.between)

    def _wait_for_rows(self, name: str, count: int, beyond: float) -> None:
        thread = self._threads.get(name)
        if beyond or (thread and not thread.has_done(count)):
            with span("ssd", "wait"):
                if thread:
                    thread.wait_for(count)
                time.sleep(beyond)

    def finish(self) -> None:
        """What follows the last step; then wait for all that the other threads have to do."""
        self.do_at_once(FINISH)
        for thread in self._threads.values():
            thread.finish()
        self._threads.clear()

    def make_calls(self, runs: Sequence[CallRun]) -> None:
        for op, name, offsets, sizes in runs:
            path, noise = self._paths[name], self._noise
            if op == "describe":
                for size in sizes:
                    write_whole(Path(path), bytes(noise[:size]), durable=True)
                    sync_to_disk(Path(path).parent)
                continue
            file = self._files[name]
            with os_errors_as_user_errors(path):
                if op == "read":
                    moved = sum([len(os.pread(file, *at)) for at in zip(sizes, offsets, strict=True)])
                    with self._counting:
                        self.bytes_read[path] = self.bytes_read.get(path, 0) + moved
                elif op == "write":
                    moved = sum(
                        [os.pwrite(file, noise[:size], at) for size, at in zip(sizes, offsets, strict=True)]
                    )
                    with self._counting:
                        self.bytes_written[path] = self.bytes_written.get(path, 0) + moved
                    if moved < sum(sizes):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                elif op == "hint":
                    for size, at in zip(sizes, offsets, strict=True):
                        os.posix_fadvise(file, at, size, os.POSIX_FADV_WILLNEED)
                else:
                    os.fsync(file)

    def close(self) -> None:
        for file in self._files.values():
            close_descriptor(file)
        self._files.clear()


class _CallThread:
    """A thread that makes calls in the order in which they are given to it, beside the main one."""

    def __init__(self, name: str, make_calls: Callable[[Sequence[CallRun]], None]) -> None:
        self._name, self._make_calls = name, make_calls
        self._todo: queue.SimpleQueue[tuple[float, float, Sequence[CallRun]] | None] = queue.SimpleQueue()
        self._done = 0  # calls
        self._failure: UserError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, not_before: float, pause: float, calls: Sequence[CallRun]) -> None:
        """These are next: not before that time, and not before `pause` seconds after those before them."""
        self._todo.put((not_before, pause, calls))

    def has_done(self, count: int) -> bool:
        """Whether `count` calls are done, or the thread has failed."""
        return self._done >= count or self._failure is not None

    def wait_for(self, count: int) -> None:
        """Wait until `count` calls are done; the thread's failure is raised here."""
        with self._changed:
            self._changed.wait_for(lambda: self.has_done(count))
        self._raise_failure()

    def finish(self) -> None:
        self._todo.put(None)
        self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _run(self) -> None:
        name_thread(self._name)
        ended = 0.0
        while item := self._todo.get():
            not_before, pause, calls = item
            if (left := max(not_before, ended + pause) - time.perf_counter()) > 0:
                time.sleep(left)
            try:
                self._make_calls(calls)
            except UserError as error:
                self._failure = error
            ended = time.perf_counter()
            with self._changed:
                self._done += sum(len(run.offsets) for run in calls)
                self._changed.notify()
            if self._failure:
                return


def _list_runs(part: StepPart) -> list[CallRun]:
    """All calls of a part."""
    return [*part.calls, *(run for batch in part.background for run in batch.calls)]
