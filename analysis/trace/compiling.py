"""Says that loops are being compiled, which a user would take for a program that hangs.

In: numba's events. Out: one line on stderr, once it has taken a while; none where numba's cache has the code.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba.core.event import Listener, install_listener

from common.errors import printable
from common.numba_cache import VARIABLE

PATIENCE = 2.0  # seconds of compiling before the line


class _CompileAnnouncer(Listener):
    """Prints the line as soon as compiling has taken `PATIENCE`, all functions together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0  # functions that are being compiled: callers wait for those that they call
        self._begun = self._spent = 0.0
        self._timer: threading.Timer | None = None
        self._is_said = False

    def on_start(self, event: Any) -> None:
        with self._lock:
            self._open += 1
            if self._open == 1 and not self._is_said:
                self._begun = time.monotonic()
                self._timer = threading.Timer(max(0.0, PATIENCE - self._spent), self._say)
                self._timer.daemon = True
                self._timer.start()

    def on_end(self, event: Any) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._timer is not None:
                self._timer.cancel()
                self._timer = None
                self._spent += time.monotonic() - self._begun

    def _say(self) -> None:
        with self._lock:
            if self._is_said or not self._open:
                return
            self._is_said = True
        where = printable(os.environ.get(VARIABLE, ""))
        print(
            "analysis: compiling the loops that read traces: once for this processor and version, half a "
            f"minute or more; kept in {where}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def announce_compiling() -> Iterator[None]:
    """While the `with` block runs, say in one line that it is compiling, if it is."""
    with install_listener("numba:compile", _CompileAnnouncer()):
        yield
