"""Where an analysis takes a run's events from: the files themselves, or one reading that several share.

An analysis asks a source who wrote the traces (`read_heads`), in which order to read them (`list_files`), and
for a reader of each. In a shared reading every analysis runs in a thread of its own. All work on the same
block at the same time, and the next block is read when the last of them has asked for it: so the tables of
strings and paths, which reading extends, do not change while an analysis uses them, and what an analysis gets
does not depend on the others.
"""

import os
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, Protocol

from analysis.trace.clocks import group_launches
from analysis.trace.events import TraceReader, assign_ranks, find_trace_files, read_heads
from analysis.trace.process import TracedProcess
from analysis.trace.scan import EventBlock
from analysis.trace.strings import StringTable
from common.inputs import open_regular

Progress = Callable[[Path, int], None]  # a trace file, and how many of its events are new


class EventBlockReader(Protocol):
    """The blocks of one trace file; `process` is complete when they have all been read."""

    process: TracedProcess
    strings: StringTable
    paths: dict[int, int]

    def __iter__(self) -> Iterator[EventBlock]: ...


class TraceSource(Protocol):
    def read_heads(self) -> list[TracedProcess]: ...

    def list_files(self) -> list[Path]: ...

    def open_reader(self, path: Path, strings: StringTable, paths: dict[int, int]) -> EventBlockReader:
        """The blocks of one file. strings, paths: filled on the way, as in `TraceReader`; the reader may have
        others.
        """
        ...


class FileSource:
    """The trace files of a run, read by the one that asks."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = run_dir

    @cached_property
    def _heads(self) -> list[TracedProcess]:
        return read_heads(self.run_dir)

    def read_heads(self) -> list[TracedProcess]:
        return [replace(process) for process in self._heads]

    def list_files(self) -> list[Path]:
        return find_trace_files(self.run_dir)

    def open_reader(self, path: Path, strings: StringTable, paths: dict[int, int]) -> TraceReader:
        return TraceReader(path, strings, paths)


class OpenFiles:
    """Trace files that stay open between the reading of their heads and of the rest, as far as this process
    may have that many; the others are opened twice.
    """

    def __init__(self) -> None:
        self._kept: dict[Path, int] = {}
        self._most = max(0, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - 100)

    def open(self, path: Path) -> BinaryIO:
        """From the file's beginning. Only one such file of a path can be used at a time."""
        descriptor = self._kept.get(path)
        if descriptor is None:
            descriptor = open_regular(path)
            if len(self._kept) < self._most:
                self._kept[path] = os.dup(descriptor)
        else:
            descriptor = os.dup(descriptor)
            os.lseek(descriptor, 0, os.SEEK_SET)
        return os.fdopen(descriptor, "rb")

    def close(self, path: Path) -> None:
        if path in self._kept:
            os.close(self._kept.pop(path))

    def close_all(self) -> None:
        for path in list(self._kept):
            self.close(path)


class SharedReading:
    """Reads all traces of a run once, for the analyses that `add` has been called with."""

    def __init__(self, run_dir: str | Path) -> None:
        self._files = OpenFiles()
        self._heads = read_heads(run_dir, self._files.open)
        self.order = [p for job in group_launches(self._heads) for p in assign_ranks(job)]
        self.strings, self.paths = StringTable(), {}
        self._sharers: list[_Sharer] = []

    def add(self, name: str, analysis: Callable[[TraceSource], Any]) -> "_Sharer":
        """An analysis to run: it gets a source, and reads all its files in the order of `list_files`."""
        sharer = _Sharer(self, name, analysis)
        self._sharers.append(sharer)
        return sharer

    def run(self, progress: Progress | None = None) -> None:
        """Read the traces and run the analyses. Each one's result or error is in what `add` gave back."""
        for sharer in self._sharers:
            sharer.thread.start()
        try:
            self._read_files(progress)
        except BaseException as error:
            for sharer in self._sharers:
                sharer.inbox.put(error)
            raise
        finally:
            for sharer in self._sharers:
                sharer.thread.join()
            self._files.close_all()

    def copy_heads(self) -> list[TracedProcess]:
        return [replace(process) for process in self._heads]

    def _read_files(self, progress: Progress | None) -> None:
        for process in self.order:
            reader = TraceReader(process.path, self.strings, self.paths, self._files.open)
            reader.process.rank = process.rank
            blocks = iter(reader)
            while sharers := self._wait_for_sharers():
                try:
                    block = next(blocks, None)
                except Exception as error:  # each analysis reports it
                    for sharer in sharers:
                        sharer.inbox.put(error)
                    return
                for sharer in sharers:
                    sharer.inbox.put((reader.process, block))
                if block is None:
                    break
                if progress:
                    progress(process.path, len(block))
            self._files.close(process.path)

    def _wait_for_sharers(self) -> "list[_Sharer]":
        """The analyses that have not ended, once each of them is done with the last block."""
        for sharer in self._sharers:
            if not sharer.ended:
                sharer.asked.acquire()
        return [sharer for sharer in self._sharers if not sharer.ended]


class _Sharer:
    """One of the analyses of a shared reading: its thread, its source, and how it ended."""

    def __init__(self, reading: SharedReading, name: str, analysis: Callable[[TraceSource], Any]) -> None:
        """name: of the analysis, for messages. analysis: called with this source on a thread of its own."""
        self.reading, self.name = reading, name
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.asked = threading.Semaphore(0)
        self.ended = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._analysis = analysis
        self.thread = threading.Thread(target=self._run, name=name)

    def _run(self) -> None:
        try:
            self.result = self._analysis(self)
        except BaseException as error:  # noqa: BLE001  # reported by who started it
            self.error = error
        finally:
            self.ended = True
            self.asked.release()

    def read_heads(self) -> list[TracedProcess]:
        return self.reading.copy_heads()

    def list_files(self) -> list[Path]:
        return [process.path for process in self.reading.order]

    def open_reader(self, path: Path, strings: StringTable, paths: dict[int, int]) -> "_SharedReader":
        return _SharedReader(self, path)


class _SharedReader:
    """A file's blocks as one of the analyses gets them, to change as it likes."""

    def __init__(self, sharer: _Sharer, path: Path) -> None:
        self._sharer = sharer
        self.process = TracedProcess(path)
        self.strings, self.paths = sharer.reading.strings, sharer.reading.paths

    def __iter__(self) -> Iterator[EventBlock]:
        while True:
            self._sharer.asked.release()
            found = self._sharer.inbox.get()
            if isinstance(found, BaseException):
                raise found
            process, block = found
            if process.path != self.process.path:
                raise AssertionError(f"{self.process.path}: asked for out of order, after {process.path}")
            vars(self.process).update(vars(process))
            if block is None:
                return
            yield block.copy()
