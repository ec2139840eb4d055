"""When to stop or to save: told by a signal, a clock or another rank, agreed on by all ranks.

No rank can stop alone: the others would wait for it in their next collective. So a thread of each rank says
through the store how many batches its rank has begun, and holds it before the next one; the largest number
is where all of them stop. Until somebody asks, a batch costs one lock.
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
AGAIN = 2  # seconds: of one Ctrl-C a rank may hear twice, from the terminal and from its launcher
POLL = 0.2  # seconds between two looks at the store; a signal to this rank is heard at once
STOP, SAVE = "stop", "save"

_ears: tuple[int, int] | None = None  # the ends of a pipe: the interpreter writes the signal's number
_attended = False  # a thread listens; before that, a signal ends the program
_interrupted = 0.0  # when Ctrl-C was first heard


def listen_for_signals() -> None:
    """Call it first of all, in the main thread: from here on these signals stop in good order."""
    global _ears
    if _ears is None:
        _ears = os.pipe()
        for end in _ears:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(_ears[1], warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell tells what it starts with &
                signal.signal(number, _handle_signal)


def _handle_signal(number: int, _: Any) -> None:
    global _interrupted
    if number == signal.SIGINT:
        _interrupted = _interrupted or time.monotonic()
        if time.monotonic() - _interrupted > AGAIN:  # the user will not wait
            raise KeyboardInterrupt
    if not _attended:
        raise Stopped(f"stopped by {signal.Signals(number).name} before training began: nothing to save")


def _heard(seconds: float) -> str | None:
    """Wait for a signal so long; its name."""
    if _ears is None:
        time.sleep(seconds)
        return None
    select.select([_ears[0]], [], [], seconds)
    with contextlib.suppress(BlockingIOError):
        for number in os.read(_ears[0], 64):
            if number in SIGNALS:
                return signal.Signals(number).name
    return None


class CollectiveStop(threading.Thread):
    """All ranks do the same thing before the same batch.

    `clock` is asked on rank 0, several times a second: "save", "stop: why", or None. No rank is held longer
    than `seconds`: each says where it is within POLL, if it lives.
    """

    def __init__(self, store: Any, here: Ranks, clock: Callable[[], str | None], seconds: float) -> None:
        super().__init__(name="accord", daemon=True)
        self._store, self._here, self._clock, self._seconds = store, here, clock, seconds
        self._turn = threading.Condition()
        self._begun = 0  # batches that this rank has begun
        self._number = 0  # of the agreement
        self._wish: str | None = None  # of this rank
        self._held = False
        self._broken = False  # the ranks could not agree
        self._agreed: tuple[int, str] | None = None
        self._answers: dict[str, str] = {}  # rank 0's last ones, for ranks that have not read them yet
        self._closed = threading.Event()

    def begin(self) -> None:
        global _attended
        _attended = True
        self.start()

    def before_batch(self) -> str | None:
        """The next batch may begin (None), or what all ranks do now instead. Call it again afterwards."""
        with self._turn:
            while self._held and self._agreed is None:
                if self._broken:
                    raise RuntimeError("timed out: the ranks could not agree on where to stop")
                self._turn.wait(1)
            if self._agreed is not None and self._begun >= self._agreed[0]:
                kind = self._agreed[1]
                self._held, self._agreed = False, None
                self._number += 1
                return kind
            self._begun += 1
            return None

    def run(self) -> None:
        while not self._closed.is_set():
            name = _heard(POLL)
            if name:
                self._wish = f"{STOP}: {name}"
            elif self._here.first and not self._wish:
                self._wish = self._clock()
            try:
                self._look()
            except RuntimeError:  # a lost store: the session ends for that reason
                self._broken = self._held

    def _look(self) -> None:
        for name, value in self._answers.items():
            if not self._store.check([name]):
                self._store.set(name, value)  # another has deleted it: a rank may still wait for it
        with self._turn:
            if self._held:
                return
            key = f"dlrm/accord/{self._number}"
        if self._wish:
            self._store.compare_set(key, "", self._wish)
        if not self._store.check([key]):
            return
        kind = self._store.get(key).decode()
        given_up = time.monotonic() + self._seconds
        with self._turn:
            self._held = True
            mine = self._begun
        while (last := self._exchange(key, kind, mine)) is None:
            if time.monotonic() > given_up or self._closed.is_set():
                raise RuntimeError("timed out: another rank did not answer")
            time.sleep(POLL / 20)
        if self._wish and self._wish.split(":")[0] == kind.split(":")[0]:
            self._wish = None
        with self._turn:
            self._agreed = (last, kind)
            self._turn.notify_all()

    def _exchange(self, key: str, kind: str, mine: int) -> int | None:
        """Where all stop, once all have said where they are. What was set is set again, should it be gone."""
        self._store.set_first(key, kind)
        self._store.set(f"{key}/{self._here.rank}", str(mine))
        if self._here.first:
            found = [self._store.find(f"{key}/{rank}") for rank in range(self._here.world_size)]
            if None in found:
                return None
            self._answers = {f"{key}/last": str(max(int(each) for each in found))}
            self._store.set(*next(iter(self._answers.items())))
        last = self._store.find(f"{key}/last")
        return None if last is None else int(last)

    def close(self) -> None:
        self._closed.set()
        if self.is_alive():
            self.join(2)
