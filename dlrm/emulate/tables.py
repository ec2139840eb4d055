"""The reads and writes of tables in files, as the run's trace has them, beside the steps they belong to.

In: calls of each step. Out: the same calls on files of the same size; what is written has no meaning, what
is read is thrown away. Which rows a step needs depends on the ids and on the cache, so the calls are the
run's own: with another batch size or other data they stay as they were.
"""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.descriptors import close_descriptor, open_descriptor
from common.errors import UserError, os_errors_as_user_errors, printable
from dlrm.runtime.trace import name_thread, span


class TableCall(NamedTuple):
    """A call of the run. `thread`: 0 for the one that trains, else the number of another one."""

    thread: int
    op: str  # read, write or sync
    file: str
    offset: int
    size: int


class TableFiles:
    """The files of one rank's tables."""

    def __init__(self, folder: Path, steps: Sequence[Sequence[TableCall]]) -> None:
        """folder: made here, or empty. steps: first the calls before the first step, then those of each."""
        self._steps, self._number = steps, 0
        self._threads: list[threading.Thread] = []
        self._failures: list[UserError] = []
        calls = [call for step in steps for call in step]
        self._noise = np.random.default_rng(0).bytes(max((call.size for call in calls), default=0))
        sizes: dict[str, int] = {}
        for call in calls:
            sizes[call.file] = max(sizes.get(call.file, 0), call.offset + call.size)
        with os_errors_as_user_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: self._make_file(folder / name, size) for name, size in sizes.items()}
        self.bytes_read: dict[str, int] = {}
        self.bytes_written: dict[str, int] = {}
        self._paths = {name: os.path.abspath(folder / name) for name in sizes}
        self._play(steps[0] if steps else ())

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

    def start_step(self) -> float:
        """Make the next step's calls: those of the training thread now, the others in the background. Returns
        the seconds that this took.
        """
        begun = time.perf_counter()
        self._number += 1
        if self._number < len(self._steps):
            calls = self._steps[self._number]
            for thread in sorted({call.thread for call in calls} - {0}):
                mine = [call for call in calls if call.thread == thread]
                self._threads.append(threading.Thread(target=self._play_in_thread, args=(mine,), daemon=True))
                self._threads[-1].start()
            self._play([call for call in calls if call.thread == 0])
        return time.perf_counter() - begun

    def finish_step(self) -> None:
        """Wait for the calls in the background."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        if self._failures:
            raise self._failures[0]

    def _play_in_thread(self, calls: Sequence[TableCall]) -> None:
        name_thread("tables in files")
        try:
            self._play(calls)
        except UserError as error:
            self._failures.append(error)

    def _play(self, calls: Sequence[TableCall]) -> None:
        if not calls:
            return
        with span("ssd", "fetch", bytes=sum(call.size for call in calls)):
            for call in calls:
                file, path = self._files[call.file], self._paths[call.file]
                with os_errors_as_user_errors(path):
                    self._make(call, file, path)

    def _make(self, call: TableCall, file: int, path: str) -> None:
        if call.op == "read":
            count = len(os.pread(file, call.size, call.offset))
            self.bytes_read[path] = self.bytes_read.get(path, 0) + count
        elif call.op == "write":
            count = os.pwrite(file, memoryview(self._noise)[: call.size], call.offset)
            self.bytes_written[path] = self.bytes_written.get(path, 0) + count
            if count < call.size:  # the disk is full: the next write says so
                os.pwrite(file, memoryview(self._noise)[count : call.size], call.offset + count)
        else:
            os.fsync(file)

    def close(self) -> None:
        for file in self._files.values():
            close_descriptor(file)
        self._files.clear()
