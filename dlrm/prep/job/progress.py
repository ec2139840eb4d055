"""How far it is: step n of m, rows, MB/s, time left. Live on a terminal, a line now and then in a log."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LINE_SECONDS, BAR_SECONDS = 5.0, 0.2


class PrepProgress:
    """Threads add what they have done; a clock thread shows it. Silent but on the first rank.

    With more ranks than one it counts the first one's share, and says so.
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
        """`rows` or `bytes`: all that this rank has to do, for the time left."""
        self._number += 1
        self.rows = self.bytes = 0
        begun, over = time.monotonic(), threading.Event()

        def watch() -> None:
            while not over.wait(BAR_SECONDS if self._live else LINE_SECONDS):
                text = self._text(name, rows, bytes, time.monotonic() - begun)
                print(
                    f"\r\033[K{text}" if self._live else text,
                    end="" if self._live else "\n",
                    file=sys.stderr,
                    flush=True,
                )

        clock = threading.Thread(target=watch, name="progress", daemon=True)
        if self._show:
            clock.start()
        try:
            yield
        finally:
            over.set()
            if self._show:
                clock.join()
        done = self._text(name, 0, 0, time.monotonic() - begun) + " done"
        self.print_line(f"\r\033[K{done}" if self._live else done)

    def skip(self, name: str, why: str) -> None:
        self._number += 1
        self.print_line(f"step {self._number} of {self._steps} {name}: {why}")

    def _text(self, name: str, rows: int, bytes: int, seconds: float) -> str:
        text = f"step {self._number} of {self._steps} {name}{self._whose}:"
        if self.rows:
            text += f" {self.rows:,} rows"
        if self.bytes:
            text += f" {self.bytes / 1e6 / max(seconds, 1e-6):,.0f} MB/s"
        part = self.bytes / bytes if bytes else self.rows / rows if rows else 0
        if 0 < part <= 1:
            text += f" {part:.0%}, {seconds * (1 - part) / part:,.0f} s left"
        return text + f"{',' * (not text.endswith(':'))} {seconds:.1f} s"
