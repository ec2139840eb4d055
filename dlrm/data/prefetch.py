"""A thread that prepares the next batches while the current one trains; at most `depth` of them are queued.

`state_dict` is the position after the batch that was returned last, not after the one prepared last. Leaving
the loop in any way (end, break, exception, Ctrl-C) stops the thread first.
"""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

from dlrm.data.batches import BatchLoader
from dlrm.runtime.trace import name_thread, span

STOP_SECONDS = 5.0  # a thread that hangs in a read of a file system must not delay the exit longer


class Prefetcher:
    """Iterates like the `BatchLoader` that it wraps; `batch_number` is that of the last batch."""

    def __init__(self, batches: BatchLoader, depth: int = 2, stage: str = "") -> None:
        """depth: batches that are read ahead. stage: train, val or test."""
        self.batches, self.depth = batches, max(1, depth)
        self.stage = stage  # of the training, for the thread's name in the trace
        self.batch_number = -1
        self._state = batches.state_dict()
        self.wait_seconds = 0.0  # for which the training has waited for batches

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

    def __iter__(self) -> Iterator[Any]:
        ready: queue.Queue[tuple[Any, int, Any]] = queue.Queue(self.depth)
        stop = threading.Event()
        worker = threading.Thread(target=self._fill_queue, args=(ready, stop), name="prefetch", daemon=True)
        worker.start()
        try:
            while True:
                with span("dataloader", "fetch.iter", batch=self.batch_number + 1) as waiting:
                    began = time.perf_counter()
                    batch, number, state = ready.get()
                    self.wait_seconds += time.perf_counter() - began
                    waiting.update(batch=number)
                if batch is None:
                    if state is not None:
                        raise state  # with its traceback of the thread
                    return
                self.batch_number, self._state = number, state
                yield batch
        finally:
            stop.set()
            deadline = time.monotonic() + STOP_SECONDS
            while worker.is_alive() and time.monotonic() < deadline:
                try:  # the thread may be waiting for a free place in the queue
                    ready.get_nowait()
                except queue.Empty:
                    worker.join(0.01)

    def _fill_queue(self, ready: queue.Queue[tuple[Any, int, Any]], stop: threading.Event) -> None:
        """What the thread does: put (batch, number, the loader's state); at the end (None, number, error)."""
        name_thread(f"prefetch {self.stage}".rstrip())
        failure: BaseException | None = None
        batches = iter(self.batches)
        try:
            while not stop.is_set():
                batch = next(batches, None)
                if batch is None:
                    break
                ready.put((batch, self.batches.batch_number, self.batches.state_dict()))
        except BaseException as error:  # noqa: BLE001  # raised again in the main thread
            failure = error
        finally:
            batches.close()  # type: ignore[attr-defined]  # a generator
            if not stop.is_set():
                ready.put((None, self.batches.batch_number, failure))
