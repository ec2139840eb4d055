"""How far the reading of a run's traces is: a bar on a terminal, a line now and then in a log."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import printable

LOG_SECONDS = 30  # between two lines in a log


@contextmanager
def show_progress() -> Iterator[Callable[[Path, int], None]]:
    """A function that is called with a trace file and how many of its events were read."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        size = shutil.get_terminal_size((100, 24))  # some terminals say 0 x 0: tqdm would hide the bar
        with tqdm(
            unit=" events", unit_scale=True, ncols=size.columns or 100, nrows=size.lines or 24, leave=False
        ) as bar:

            def advance(path: Path, events: int) -> None:
                bar.set_description(printable(path.name), refresh=False)
                bar.update(events)

            yield advance
    else:
        yield _LogLines().advance


class _LogLines:
    """Plain lines on stderr; none for a run that is read within LOG_SECONDS."""

    def __init__(self) -> None:
        self.begun = self.last = time.monotonic()
        self.events = 0

    def advance(self, path: Path, events: int) -> None:
        self.events += events
        now = time.monotonic()
        if now - self.last >= LOG_SECONDS:
            self.last = now
            rate = self.events / (now - self.begun)
            name = printable(os.path.basename(path))
            print(
                f"analysis: {self.events:,} events read, {rate:,.0f}/s, now {name}",
                file=sys.stderr,
                flush=True,
            )
