"""How far a training is, while it runs: RUN/progress.json every 5 s, and a line where no report has come.

In: the run folder, the Progress that the loop advances, counters of this rank. Out: what `analysis watch`
reads. Only rank 0 has it, in a thread; a slow step or a long evaluation does not hold it up.

progress.json is one line of JSON, always of the same length and written in place by a single call.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from dlrm.runtime.trace import name_thread
from dlrm.trainer.loop import Progress
from dlrm.trainer.run_folder import RunFolder

WRITE_SECONDS = 5.0
QUIET_SECONDS = 15.0  # without a line: then one says how far the training is
SILENT_SECONDS = 5.0  # without a heartbeat: such a rank is named
MOST_RANKS = 8  # that are named


def read_counters(datasets: Any) -> dict[str, Any]:
    """Of this rank since it started: seconds waited for training batches, bytes read of the dataset."""
    found = {"wait_seconds": getattr(datasets.train, "wait_seconds", None)}
    with contextlib.suppress(RuntimeError):  # a file was opened meanwhile: the next time will do
        found["bytes_read"] = sum(datasets.bytes_read().values())
    return found


@contextlib.contextmanager
def report_while_training(
    run_folder: RunFolder,
    progress: Progress,
    datasets: Any,
    list_silent: Callable[[float], dict[int, tuple[str, float]]],
) -> Iterator[None]:
    """Around a training.

    datasets     of this rank, see `trainer.Datasets`
    list_silent  seconds -> host and seconds of each rank without a heartbeat for that long
    """
    if not run_folder.is_first:
        yield
        return
    stop = threading.Event()

    def report() -> None:
        name_thread("progress")
        while True:
            silent = list_silent(SILENT_SECONDS)
            run_folder.write_progress(
                {
                    "time": time.time(), "epoch": progress.epoch, "step": progress.step,
                    "evaluating": progress.validating_at is not None, **read_counters(datasets),
                    "silent_count": len(silent),
                    "silent": [[rank, *silent[rank]] for rank in sorted(silent)[:MOST_RANKS]],
                }
            )  # fmt: skip
            if run_folder.measure_quiet_seconds() >= QUIET_SECONDS:
                run_folder.show_position(progress.epoch, progress.step, progress.validating_at is not None)
            if stop.wait(WRITE_SECONDS):
                return

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(WRITE_SECONDS)  # a file system that hangs must not hold up the exit
