"""The progress of a piece of work on stderr: a tqdm bar on a terminal, plain lines in a log.

In: how much was done. Out: text for people; nothing on ranks that do not show it. tqdm is imported only when
there is something to show.
"""

import mmap
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common import processes
from common.words import format_number


def open_terminal_bar(label: str, unit: str, total: int | None = None, done: int = 0, **more: Any) -> Any:
    """A tqdm bar on stderr; a disabled one where that is not a terminal. `more`: other options of tqdm."""
    from tqdm import tqdm

    size = shutil.get_terminal_size((100, 24))  # some terminals say 0 x 0: tqdm would hide the bar
    return tqdm(
        desc=label, unit=unit, total=total, initial=done, disable=not sys.stderr.isatty(),
        ncols=size.columns or 100, nrows=size.lines or 24, **more,
    )  # fmt: skip


class ProgressBar:
    """Counts units of work and shows them. Threads may share it.

    `total`: units in all, if known. `line_seconds`: between two lines in a log, so that short work prints
    none. `show` is false on all ranks but one.
    """

    def __init__(
        self, label: str, unit: str, total: int | None = None, line_seconds: float = 30.0, show: bool = True
    ) -> None:
        self.label, self.unit, self.total, self.line_seconds = label, unit, total, line_seconds
        self.count, self.note = 0, ""
        self._show, self._lock = show, threading.Lock()
        self._begun = self._last_line = time.monotonic()
        on_terminal = show and sys.stderr.isatty()
        self._bar = (
            open_terminal_bar(label, unit, total, leave=False, unit_scale=True) if on_terminal else None
        )

    def add(self, count: int, note: str = "") -> None:
        """`note`: a word on what is being worked on, shown behind the numbers."""
        with self._lock:
            self.count += count
            self.note = note or self.note
            self._show_if_due()

    def refresh_bar(self) -> None:
        """Show the time that has passed, though nothing was added."""
        if self._bar is not None:
            self._bar.refresh()

    def _show_if_due(self) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(self.count - self._bar.n)
        elif self._show and now - self._last_line >= self.line_seconds:
            self._last_line = now
            print(self.describe_speed(now - self._begun), file=sys.stderr, flush=True)

    def describe_speed(self, seconds: float) -> str:
        if not self.count:
            return f"{self.label}: {seconds:.0f} s"
        from tqdm import tqdm

        return tqdm.format_meter(
            self.count, self.total or 0, seconds, ncols=0, prefix=self.label, unit=self.unit, unit_scale=True,
            postfix=self.note or None,
        )  # fmt: skip

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def show_progress(
    label: str, unit: str, total: int | None = None, line_seconds: float = 30.0, show: bool = True
) -> Iterator[ProgressBar]:
    """The `with` block is the work; see `ProgressBar`."""
    bar = ProgressBar(label, unit, total, line_seconds, show)
    try:
        yield bar
    finally:
        bar.close()


def _make_shared_numbers(count: int) -> memoryview:
    """Whole numbers that forks of this process see and change."""
    return memoryview(mmap.mmap(-1, 8 * count)).cast("q")


class StepProgress:
    """A bar for each step of a job, "step n of m", and a line when it is done. Threads may share it, and
    forks of this process.

    `show`: print anything at all; set on rank 0 only. With several ranks it shows rank 0's share, and says
    so.
    """

    LINE_SECONDS, BAR_SECONDS = 5.0, 0.2  # between two lines in a log, two updates on a terminal
    MOST_WORKERS = 1024

    def __init__(self, steps: int, show: bool, ranks: int = 1) -> None:
        self._steps, self._show = steps, show
        self._whose = f" (rank 0 of {ranks})" if ranks > 1 else ""
        self._number = 0
        self._lock = threading.Lock()  # of the threads of one process: a fork adds to numbers of its own
        self._rows, self._bytes = (_make_shared_numbers(self.MOST_WORKERS) for _ in range(2))

    @property
    def rows(self) -> int:
        return sum(self._rows)

    @property
    def bytes(self) -> int:
        return sum(self._bytes)

    def add(self, rows: int = 0, bytes: int = 0) -> None:
        with self._lock:
            self._rows[processes.worker_number] += rows
            self._bytes[processes.worker_number] += bytes

    def print_line(self, text: str) -> None:
        if self._show:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def step(self, name: str, rows: int = 0, bytes: int = 0) -> Iterator[None]:
        """The `with` block is one step. `rows` or `bytes`: this rank's share of it, to estimate the time
        left.
        """
        self._number += 1
        for numbers in (self._rows, self._bytes):
            numbers[:] = _make_shared_numbers(self.MOST_WORKERS)
        label = f"step {self._number} of {self._steps} {name}{self._whose}"
        unit, total = ("B", bytes or None) if bytes else (" rows", rows or None)
        begun, done = time.monotonic(), threading.Event()
        with show_progress(label, unit, total, self.LINE_SECONDS, self._show) as bar:

            def refresh_until_done() -> None:
                while not done.wait(self.BAR_SECONDS):
                    # without the lock: this process may fork at any time
                    count = self.bytes if bytes else self.rows
                    bar.add(count - bar.count, format_number(self.rows, "row") if bytes and self.rows else "")
                    bar.refresh_bar()

            clock = threading.Thread(target=refresh_until_done, name="progress", daemon=True)
            if self._show:
                clock.start()
            try:
                yield
            finally:
                done.set()
                if self._show:
                    clock.join()
        self.print_line(f"{label}: {self._sum_up(time.monotonic() - begun)} done")

    def skip_step(self, name: str, why: str) -> None:
        """Count a step that has nothing to do."""
        self._number += 1
        self.print_line(f"step {self._number} of {self._steps} {name}: {why}")

    def _sum_up(self, seconds: float) -> str:
        parts = [format_number(self.rows, "row")] if self.rows else []
        if self.bytes:
            parts.append(f"{self.bytes / 1e6 / max(seconds, 1e-6):,.0f} MB/s")
        return ", ".join([*parts, f"{seconds:.1f} s"])
