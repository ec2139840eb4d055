"""What stands for computing: a train pipeline whose steps are waits, a meter and metrics without tensors.

In: this rank's workload, batches. Out: what `dlrm/trainer/loop.py` expects of torchrec's pipeline.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dlrm.emulate.options import EmulateOptions
from dlrm.emulate.tables import TableFiles
from dlrm.emulate.workload import RankWorkload
from dlrm.runtime import trace
from dlrm.runtime.mpi import RankGroup

AHEAD = 2  # batches that torchrec's pipeline has taken when it computes one: copied, exchanged


class WaitingPipeline:
    """Takes batches when TrainPipelineSparseDist would, and waits as long as the run's steps took."""

    def __init__(
        self, split: str, steps: Iterator["StepTime"], group: RankGroup, communicate: bool,
        tables: TableFiles | None = None,
    ) -> None:  # fmt: skip
        """communicate: end each step with a barrier, or an exchange. tables: whose calls each step makes."""
        self._split, self._steps, self._group = split, steps, group
        self._communicate, self._tables = communicate, tables
        self._taken: deque[Any] = deque()
        self._idle_since: float | None = None  # end of the step before, if this one follows at once
        self._buffers: dict[int, tuple[bytearray, bytearray]] = {}

    def progress(self, batches: Iterator[Any]) -> tuple[float, Any, Any]:
        """(loss, one value per row, labels) of the next batch; StopIteration after the last one."""
        begun = time.perf_counter()
        if not self._taken:
            self._idle_since = None  # the first of an epoch or evaluation
            self._taken.extend(itertools.islice(batches, AHEAD))
        self._taken.extend(itertools.islice(batches, 1))
        if not self._taken:
            raise StopIteration
        waited = time.perf_counter() - begun
        step = next(self._steps)
        # what this program did since the step before is part of the step, as it was in the run
        started = begun if self._idle_since is None else self._idle_since
        begun = started + waited  # from here on, what is not waiting for tables is the step's own work
        for part in self._tables.take_step(self._split) if self._tables else ():
            assert self._tables
            self._tables.start_part(part, begun, step.scale)
            if part.kind != "end":
                self._compute_until(begun + part.at * step.scale)
                begun += self._tables.end_part(part)
        self._compute_until(begun + step.seconds)
        if self._communicate:
            self._communicate_with_ranks(step.exchange_bytes)
        self._idle_since = time.perf_counter()
        labels = self._taken.popleft().labels
        return 0.0, labels, labels

    def exclude_time(self, seconds: float) -> None:
        """These seconds were a pause between two steps, and no part of the next one."""
        if self._idle_since is not None:
            self._idle_since += seconds

    def _compute_until(self, end: float) -> None:
        if end > time.perf_counter():
            with trace.span("compute", "step"):
                while (left := end - time.perf_counter()) > 0:
                    time.sleep(left)

    def _communicate_with_ranks(self, count: int) -> None:
        if not count:
            with trace.span("comm", "barrier"):
                self._group.barrier()
            return
        if count not in self._buffers:
            ranks = self._group.here.world_size
            size = -(-count // ranks) * ranks
            self._buffers[count] = bytearray(size), bytearray(size)
        with trace.span("comm", "all_to_all", bytes=count):
            self._group.exchange_bytes(*self._buffers[count])


class StepTime(NamedTuple):
    """What a step takes besides waiting for data and for rows of tables in files. scale: how long what took a
    second in the run takes now."""

    seconds: float
    scale: float
    exchange_bytes: int


def draw_steps(
    workload: RankWorkload, split: str, options: EmulateOptions, exchange_bytes: int
) -> Iterator[StepTime]:
    """Without end: the run's own steps in their order, again and again. `exchange_bytes`: what
    `--communication traced` moves where the trace does not say it.
    """
    steps = workload.steps.get(split) or workload.steps.get("val") or workload.steps["train"]
    transfers = workload.transfers.get(split) or [0.0] * len(steps)
    exchanges = options.communication == "traced"
    count = (workload.exchange_bytes or exchange_bytes) if exchanges else 0
    factor, fixed = options.compute_factor, options.compute_seconds
    for seconds, transfer in itertools.cycle(zip(steps, itertools.cycle(transfers), strict=False)):
        computed = seconds - transfer
        if exchanges or options.communication == "none":
            seconds = computed
        scale = factor or 0.0 if fixed is None else fixed / computed if computed > 0 else 0.0
        yield StepTime(seconds * scale if fixed is None else fixed, scale, count)


class RowMeter:
    """As `meter.ThroughputMeter`, without a loss."""

    click_share: float | None = None

    def __init__(self, group: RankGroup, exclude_time: Callable[[float], None]) -> None:
        """`exclude_time`: also called with the seconds of each pause."""
        self._group, self._exclude_time = group, exclude_time
        self._rows, self.steps = 0, 0
        self._since = time.perf_counter()

    def add_step(self, loss: Any, rows: int, labels: Any = None) -> None:
        self._rows += rows
        self.steps += 1

    def reduce_and_reset(self) -> tuple[float, int, float]:
        rows = sum(self._group.gather_from_all(self._rows))
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._rows = self.steps = 0
        return 0.0, rows, seconds

    def exclude_time(self, seconds: float) -> None:
        self._since += seconds
        self._exclude_time(seconds)


class RowCounter:
    """Metrics of an evaluation: how many rows it had. Computing them takes as long as in the run."""

    def __init__(self, group: RankGroup, seconds: float) -> None:
        self._group, self._seconds, self._rows = group, seconds, 0

    def update(self, scores: Any, labels: Any, /) -> None:
        self._rows += len(labels)

    def compute(self) -> dict[str, Any]:
        time.sleep(self._seconds)
        return {"auroc": None, "samples": sum(self._group.gather_from_all(self._rows))}
