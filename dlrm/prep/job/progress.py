"""Progress on stderr: step n of m, rows, MB/s, time left. One line that changes on a terminal, else plain
lines.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LINE_SECONDS, BAR_SECONDS = 5.0, 0.2  # between two lines in a log, two updates on a terminal


class PrepProgress:
    """Counts the rows and bytes that threads have processed, and prints them from a thread of its own.

    `show`: print anything at all; set on rank 0 only. With several ranks it shows rank 0's share, and says
    so.
    """

    def __init__(self, steps: int, show: bool, ranks: int = 1) -> None:
        self._steps, self._show = steps, show
        self._whose = f" (rank 0 of {ranks})" if ranks > 1 else ""
        self._number = 0
        self._live = show and sys.stderr.isatty()
        self._lock = threading.Lock()
        self.rows = self.bytes = 0

    def add(self, rows: int = 0, bytes: int = 0) -> None:
        with self._lock:
            self.rows += rows
            self.bytes += bytes

    def print_line(self, text: str) -> None:
        if self._show:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def step(self, name: str, rows: int = 0, bytes: int = 0) -> Iterator[None]:
        """The `with` block is one step. `rows` or `bytes`: this rank's share of it, to estimate the time
        left.
        """
        self._number += 1
        self.rows = self.bytes = 0
        started, done = time.monotonic(), threading.Event()

        def print_until_done() -> None:
            while not done.wait(BAR_SECONDS if self._live else LINE_SECONDS):
                text = self._describe(name, rows, bytes, time.monotonic() - started)
                print(
                    f"\r\033[K{text}" if self._live else text,
                    end="" if self._live else "\n",
                    file=sys.stderr,
                    flush=True,
                )

        clock = threading.Thread(target=print_until_done, name="progress", daemon=True)
        if self._show:
            clock.start()
        try:
            yield
        finally:
            done.set()
            if self._show:
                clock.join()
        text = self._describe(name, 0, 0, time.monotonic() - started) + " done"
        self.print_line(f"\r\033[K{text}" if self._live else text)

    def skip(self, name: str, why: str) -> None:
        """Count a step that has nothing to do."""
        self._number += 1
        self.print_line(f"step {self._number} of {self._steps} {name}: {why}")

    def _describe(self, name: str, rows: int, bytes: int, seconds: float) -> str:
        text = f"step {self._number} of {self._steps} {name}{self._whose}:"
        if self.rows:
            text += f" {self.rows:,} rows"
        if self.bytes:
            text += f" {self.bytes / 1e6 / max(seconds, 1e-6):,.0f} MB/s"
        part = self.bytes / bytes if bytes else self.rows / rows if rows else 0
        if 0 < part <= 1:
            text += f" {part:.0%}, {seconds * (1 - part) / part:,.0f} s left"
        return text + f"{',' * (not text.endswith(':'))} {seconds:.1f} s"
