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
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    def __init__(self, run_dir: str | Path, heads: Sequence[TracedProcess] | None = None) -> None:
        """heads: what `read_heads` gave, where the beginnings of the files have been read already."""
        self.run_dir = run_dir
        self._known = heads

    @cached_property
    def _heads(self) -> Sequence[TracedProcess]:
        return read_heads(self.run_dir) if self._known is None else self._known

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


class Sharing:
    """Hands out items, one after the other, to several analyses, each of which runs on a thread of its own.

    An item is handed out when all have asked for it, so they work on the same one at the same time.
    """

    def __init__(self) -> None:
        self._sharers: list[Sharer] = []

    def add(self, name: str, analysis: Callable[["Sharer"], Any]) -> "Sharer":
        """An analysis to run: it is called with a `Sharer`, and asks it for all items."""
        sharer = Sharer(name, analysis)
        self._sharers.append(sharer)
        return sharer

    def run(self, items: Iterable[Any]) -> None:
        """Run the analyses. Each one's result or error is in what `add` gave back; an error in making an item
        is an error of each.
        """
        for sharer in self._sharers:
            sharer.thread.start()
        try:
            left = iter(items)
            while asking := self._wait_for_sharers():
                try:
                    item = next(left, END)
                except Exception as error:  # each analysis reports it
                    item = error
                for sharer in asking:
                    sharer.inbox.put(item)
                if item is END or isinstance(item, Exception):
                    break
        except BaseException as error:
            for sharer in self._sharers:
                sharer.inbox.put(error)
            raise
        finally:
            for sharer in self._sharers:
                sharer.thread.join()

    def _wait_for_sharers(self) -> "list[Sharer]":
        """The analyses that have not ended, once each of them is done with the last item."""
        for sharer in self._sharers:
            if not sharer.ended:
                sharer.asked.acquire()
        return [sharer for sharer in self._sharers if not sharer.ended]


END = object()  # there are no more items


class Sharer:
    """One of the analyses of a `Sharing`: its thread, the items for it, and how it ended."""

    def __init__(self, name: str, analysis: Callable[["Sharer"], Any]) -> None:
        """name: of the analysis, for messages. analysis: called with this object on a thread of its own."""
        self.name = name
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

    def __iter__(self) -> Iterator[Any]:
        while (item := self.take()) is not END:
            yield item

    def take(self) -> Any:
        """The next item, or END."""
        self.asked.release()
        item = self.inbox.get()
        if isinstance(item, BaseException):
            raise item
        return item


class SharedReading:
    """Reads all traces of a run once, for the analyses that `add` has been called with."""

    def __init__(self, run_dir: str | Path) -> None:
        self._files = OpenFiles()
        self._heads = read_heads(run_dir, self._files.open)
        self.order = [p for job in group_launches(self._heads) for p in assign_ranks(job)]
        self.strings, self.paths = StringTable(), {}
        self._sharing = Sharing()

    def add(self, name: str, analysis: Callable[[TraceSource], Any]) -> Sharer:
        """An analysis to run: it gets a source, and reads all its files in the order of `list_files`."""
        return self._sharing.add(name, lambda sharer: analysis(_SharedSource(self, sharer)))

    def run(self, progress: Progress | None = None) -> None:
        """Read the traces and run the analyses. Each one's result or error is in what `add` gave back."""
        try:
            self._sharing.run(self._read_files(progress))
        finally:
            self._files.close_all()

    def close(self) -> None:
        """Where nothing is read after all."""
        self._files.close_all()

    def copy_heads(self) -> list[TracedProcess]:
        return [replace(process) for process in self._heads]

    def _read_files(self, progress: Progress | None) -> Iterator[tuple[TracedProcess, EventBlock | None]]:
        """The blocks of all files; None at the end of each."""
        for process in self.order:
            reader = TraceReader(process.path, self.strings, self.paths, self._files.open)
            reader.process.rank = process.rank
            for block in reader:
                yield reader.process, block
                if progress:
                    progress(process.path, len(block))
            yield reader.process, None
            self._files.close(process.path)


class _SharedSource:
    """What one of the analyses of a `SharedReading` takes for the files."""

    def __init__(self, reading: SharedReading, sharer: Sharer) -> None:
        self.reading, self.sharer = reading, sharer

    def read_heads(self) -> list[TracedProcess]:
        return self.reading.copy_heads()

    def list_files(self) -> list[Path]:
        return [process.path for process in self.reading.order]

    def open_reader(self, path: Path, strings: StringTable, paths: dict[int, int]) -> "_SharedReader":
        return _SharedReader(self, path)


class _SharedReader:
    """A file's blocks as one of the analyses gets them, to change as it likes."""

    def __init__(self, source: _SharedSource, path: Path) -> None:
        self._sharer = source.sharer
        self.process = TracedProcess(path)
        self.strings, self.paths = source.reading.strings, source.reading.paths

    def __iter__(self) -> Iterator[EventBlock]:
        while (item := self._sharer.take()) is not END:
            process, block = item
            if process.path != self.process.path:
                raise AssertionError(f"{self.process.path}: asked for out of order, after {process.path}")
            vars(self.process).update(vars(process))
            if block is None:
                return
            yield block.copy()
