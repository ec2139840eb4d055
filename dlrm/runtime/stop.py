"""Stop or save on all ranks before the same batch: on a signal to any rank, or by rank 0's clock.

Why the ranks must agree: a rank that stops alone leaves the others waiting for it in their next collective.

How: a thread of each rank looks at the store five times a second. Any rank posts a request ("stop: SIGTERM").
Each rank then pauses before its next batch and posts how many batches it has started. Rank 0 posts the
largest of these numbers, and every rank continues until it has started that many batches; there it does what
was requested. The training loop never waits for the store: without a request, a batch costs one lock.

Keys in the store, for the request number N:
    dlrm/stop/N         what is requested
    dlrm/stop/N/RANK    how many batches this rank has started
    dlrm/stop/N/last    the largest of them, from rank 0
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from dlrm.runtime.errors import Stopped
from dlrm.runtime.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One Ctrl-C may arrive twice, from the terminal and from the launcher. A later one is a second Ctrl-C: the
# user does not want to wait for the checkpoint.
SECOND_INTERRUPT_SECONDS = 2
POLL_SECONDS = 0.2  # between two looks at the store; a signal to this rank is noticed at once
STOP, SAVE = "stop", "save"  # a request is "save", or "stop: " and the reason

_wakeup_pipe: tuple[int, int] | None = None  # (read, write): the interpreter writes each signal's number
_has_listener = False  # a CollectiveStop reads the pipe; before that, a signal ends the program
_first_interrupt = 0.0  # time.monotonic() of the first Ctrl-C


def listen_for_signals() -> None:
    """Call it first of all, in the main thread: from here on SIGTERM, SIGUSR1 and SIGINT stop cleanly."""
    global _wakeup_pipe
    if _wakeup_pipe is None:
        _wakeup_pipe = os.pipe()
        for end in _wakeup_pipe:
            os.set_blocking(end, False)
        # A Python handler runs only when the main thread returns from C++, which may take a whole collective.
        # The interpreter writes the signal's number into the pipe at once, and a thread can wait for that.
        signal.set_wakeup_fd(_wakeup_pipe[1], warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's `command &` ignores SIGINT
                signal.signal(number, _handle_signal)


def _handle_signal(number: int, _: Any) -> None:
    global _first_interrupt
    if number == signal.SIGINT:
        _first_interrupt = _first_interrupt or time.monotonic()
        if time.monotonic() - _first_interrupt > SECOND_INTERRUPT_SECONDS:
            raise KeyboardInterrupt
    if not _has_listener:
        name = signal.Signals(number).name
        raise Stopped(f"stopped by {name} while nothing was being trained, so nothing is saved")


def _wait_for_signal(seconds: float) -> str | None:
    """The name of the signal that arrives within `seconds`, or None."""
    if _wakeup_pipe is None:
        time.sleep(seconds)
        return None
    select.select([_wakeup_pipe[0]], [], [], seconds)
    with contextlib.suppress(BlockingIOError):
        for number in os.read(_wakeup_pipe[0], 64):
            if number in SIGNALS:
                return signal.Signals(number).name
    return None


class CollectiveStop(threading.Thread):
    """Makes all ranks do what one of them requests, before the same batch.

    store        a connection to the ranks' store that no other thread uses
    check_clock  called on rank 0 several times a second: returns a request, or None
    timeout      seconds in which all ranks must have answered a request. A rank that is alive answers within
                 POLL_SECONDS
    """

    def __init__(
        self, store: Any, here: Ranks, check_clock: Callable[[], str | None], timeout: float
    ) -> None:
        super().__init__(name="collective-stop", daemon=True)
        self._store, self._here, self._check_clock, self._timeout = store, here, check_clock, timeout
        self._request: str | None = None  # of this rank, not yet carried out
        self._closed = threading.Event()
        self._replies: dict[str, str] = {}  # rank 0's last ones, for ranks that have not read them yet
        # The training's thread and this one share the following; `_changed` guards it.
        self._changed = threading.Condition()
        self._started_batches = 0  # on this rank
        self._number = 0  # of the next request, the same on all ranks
        self._paused = False  # the next batch must not start before `_agreed` is known
        self._failed = False  # the ranks could not agree
        self._agreed: tuple[int, str] | None = None  # (number of batches, request)

    def start_listening(self) -> None:
        """From here on signals are requests, and no longer end the program."""
        global _has_listener
        _has_listener = True
        self.start()

    def before_batch(self) -> str | None:
        """None: the next batch may start. Else a request, which all ranks carry out at this point; call it
        again afterwards.
        """
        with self._changed:
            while self._paused and self._agreed is None:
                if self._failed:
                    raise RuntimeError("timed out: the ranks could not agree on where to stop")
                self._changed.wait(1)
            if self._agreed is not None and self._started_batches >= self._agreed[0]:
                request = self._agreed[1]
                self._paused, self._agreed = False, None
                self._number += 1
                return request
            self._started_batches += 1
            return None

    def run(self) -> None:
        while not self._closed.is_set():
            name = _wait_for_signal(POLL_SECONDS)
            if name:
                self._request = f"{STOP}: {name}"
            elif self._here.first and not self._request:
                self._request = self._check_clock()
            try:
                self._handle_requests()
            except RuntimeError:  # the store is gone: the heartbeat ends this rank
                self._failed = self._paused

    def _handle_requests(self) -> None:
        """Post this rank's request, if it has one; agree with the other ranks on whatever was requested."""
        for name, value in self._replies.items():
            if not self._store.check([name]):
                self._store.set(name, value)  # another program deleted it, and a rank may still wait for it
        with self._changed:
            if self._paused:
                return  # agreed already: the training's thread has not reached that batch yet
            key = f"dlrm/stop/{self._number}"
        if self._request:
            self._store.compare_set(key, "", self._request)
        if not self._store.check([key]):
            return
        request = self._store.get(key).decode()  # another rank's may have been first
        deadline = time.monotonic() + self._timeout
        with self._changed:
            # from here on the number is exact: the training's thread waits for an answer before a batch
            self._paused = True
            started = self._started_batches
        while (last := self._exchange_batches(key, request, started)) is None:
            if time.monotonic() > deadline or self._closed.is_set():
                raise RuntimeError("timed out: another rank did not answer")
            time.sleep(POLL_SECONDS / 20)
        if self._request and self._request.split(":")[0] == request.split(":")[0]:
            self._request = None  # another rank wanted the same
        with self._changed:
            self._agreed = (last, request)
            self._changed.notify_all()

    def _exchange_batches(self, key: str, request: str, started: int) -> int | None:
        """The batch at which all ranks act, once all have posted theirs, else None.

        Everything is posted again in each turn, in case another program deleted it.
        """
        self._store.set_first(key, request)
        self._store.set(f"{key}/{self._here.rank}", str(started))
        if self._here.first:
            found = [self._store.find_value(f"{key}/{rank}") for rank in range(self._here.world_size)]
            if None in found:
                return None
            self._replies = {f"{key}/last": str(max(int(each) for each in found))}
            self._store.set(*next(iter(self._replies.items())))
        last = self._store.find_value(f"{key}/last")
        return None if last is None else int(last)

    def close(self) -> None:
        self._closed.set()
        if self.is_alive():
            self.join(2)
