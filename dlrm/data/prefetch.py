"""A thread that prepares the next batches while this one trains; at most `depth` wait in line.

The position it reports is that of the batch last given out, not of the one last prepared. Leaving the loop
in any way (end, break, exception, Ctrl-C) stops the thread before control goes on.
"""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

from torchrec.datasets.utils import Batch

from dlrm.data.batches import BatchLoader
from dlrm.runtime.trace import name_thread, span

PATIENCE = 5.0  # seconds: a thread stuck in a read of a hung file system must not hold up the exit


class Prefetcher:
    """Iterates like the `BatchLoader` that it wraps; `number` is that of the batch given last."""

    def __init__(self, batches: BatchLoader, depth: int = 2) -> None:
        self.batches, self.depth = batches, max(1, depth)
        self.number = -1
        self._state = batches.state_dict()

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)
        self._state = self.batches.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)
        self._state = self.batches.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        line: queue.Queue[tuple[Batch | None, int, Any]] = queue.Queue(self.depth)
        stop = threading.Event()
        worker = threading.Thread(target=self._work, args=(line, stop), name="prefetch", daemon=True)
        worker.start()
        try:
            while True:
                with span("data", "wait", batch=self.number + 1) as waiting:
                    batch, number, state = line.get()
                    waiting.update(batch=number)
                if batch is None:
                    if state is not None:
                        raise state  # with the traceback it got in the thread
                    return
                self.number, self._state = number, state
                yield batch
        finally:
            stop.set()
            given_up = time.monotonic() + PATIENCE
            while worker.is_alive() and time.monotonic() < given_up:  # it may be waiting for room
                try:
                    line.get_nowait()
                except queue.Empty:
                    worker.join(0.01)

    def _work(self, line: queue.Queue[tuple[Batch | None, int, Any]], stop: threading.Event) -> None:
        name_thread("prefetch")
        failure: BaseException | None = None
        batches = iter(self.batches)
        try:
            while not stop.is_set():
                batch = next(batches, None)
                if batch is None:
                    break
                line.put((batch, self.batches.number, self.batches.state_dict()))
        except BaseException as error:  # noqa: BLE001  # handed to the main thread, whatever it is
            failure = error
        finally:
            batches.close()  # type: ignore[attr-defined]  # a generator
            if not stop.is_set():
                line.put((None, self.batches.number, failure))
