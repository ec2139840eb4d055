"""This rank's batches of one epoch, and the position in it as state.

An epoch is a sequence of rows (in file order, or shuffled); what is left of it is a list of segments of that
sequence, the same on all ranks and known without talking. So a state can be loaded at another world size
and batch size: each remaining row still comes exactly once. How rows are dealt to ranks: see `deal`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torchrec.datasets.utils import Batch

from dlrm.data.collate import BatchCollator
from dlrm.data.rows import Rows, RowSource
from dlrm.data.sampler import RowSampler, Segment, merge_ranges, split_rows
from dlrm.data.shuffle import ShuffledOrder, ShuffleWindow, collect_rows
from dlrm.runtime.errors import UserError
from dlrm.runtime.trace import span


class BatchLoader:
    """`shuffle_batches` permutes the rows inside each batch, `shuffle_set` the whole set, anew per epoch."""

    def __init__(
        self,
        source: RowSource,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        table_sizes: Sequence[int] | None = None,
        *,
        to_batch: BatchCollator | None = None,
        drop_last: bool = False,
        shuffle_batches: bool = False,
        shuffle_set: bool = False,
        window_mb: float = 256,
        by_rank: bool | None = None,
        seed: int = 0,
        limit: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"--batch_size {batch_size}: at least 1 is needed")
        self.source, self.batch_size, self.rank, self.world_size = source, batch_size, rank, world_size
        self.to_batch = to_batch or BatchCollator(table_sizes, pin_memory=pin_memory)
        self.drop_last, self.shuffle_batches, self.shuffle_set = drop_last, shuffle_batches, shuffle_set
        self.window = 0 if source.random_access else max(1, int(window_mb * (1 << 20)) // source.row_bytes)
        if by_rank is None:
            by_rank = shuffle_set or source.contiguous
        self.by_rank, self.seed, self.limit = by_rank, seed, limit
        self.epoch = 0
        self.number = -1  # of the batch given last, counted over all epochs: ties reads to steps in the trace
        self._order: ShuffledOrder | None = None
        self._served: ShuffleWindow | None = None
        self._loaded = False  # a loaded state waits for its pass
        self._begin([(0, source.rows)], 0)

    def _begin(self, segments: list[Segment], steps_done: int) -> None:
        """A pass starts here: over the epoch, or over what a loaded state left of it."""
        self.segments, self.steps_before, self.steps_done = segments, steps_done, steps_done
        rows = sum(stop - start for start, stop in segments)
        self.deal = RowSampler(rows, self.batch_size, self.world_size, self.by_rank, self.drop_last)
        left = self.deal.steps if self.limit is None else max(0, self.limit - steps_done)
        self.steps = min(self.deal.steps, left)

    def __len__(self) -> int:
        """Batches of the current pass."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        if not self._loaded:
            self._begin([(0, self.source.rows)], 0)
        self._loaded = False
        self.prepare()
        for step in range(self.steps):
            batch = self._make(step)
            self.steps_done = self.steps_before + step + 1
            yield batch

    def prepare(self) -> None:
        """Load what has to be in memory before the first batch (else the first batch does it)."""
        set_epoch = getattr(self.source, "set_epoch", None)
        if set_epoch:  # the rows themselves change from epoch to epoch
            set_epoch(self.epoch)
        if self.shuffle_set and (self._order is None or self._order.epoch != self.epoch):
            self._order = ShuffledOrder(self.source.rows, self.seed, self.epoch, self.window)
            self._served = ShuffleWindow(self.source, self._order) if self._order.window else None
        if self.source.holds and self.steps:
            mine = [
                split_rows(self.segments, *self.deal.batch(step, self.rank)) for step in range(self.steps)
            ]
            segments = merge_ranges([segment for batch in mine for segment in batch])
            if self._order is not None:
                rows = np.sort(np.concatenate([self._order.at(*segment) for segment in segments]))
                self.source.hold(find_runs(rows), gaps=True)
            else:
                self.source.hold(np.array(segments, np.int64), gaps=False)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; naming the current one leaves a loaded position alone."""
        if epoch != self.epoch:
            self.epoch, self._loaded = epoch, False
            self._begin([(0, self.source.rows)], 0)

    def state_dict(self) -> dict[str, Any]:
        """Where this epoch stands, for all ranks together. Plain values, fit for JSON."""
        left = [] if self.steps_done - self.steps_before >= self.steps else self.remaining()
        return {
            "epoch": self.epoch,
            "step": self.steps_done,
            "rows": self.source.rows,
            "segments": [list(segment) for segment in left],
            "seed": self.seed,
            "window": self.window if self.shuffle_set else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rows"] != self.source.rows:
            raise UserError(
                f"the checkpoint was made with {state['rows']} rows, this dataset has {self.source.rows}: "
                "give the same dataset"
            )
        if (state["window"] is not None) != self.shuffle_set:
            raise UserError("the checkpoint and this run differ in --shuffle_training_set: give the same")
        if self.shuffle_set and (state["window"] == 0) != (self.window == 0):
            raise UserError("the checkpoint was shuffled for another kind of source: give the same kind")
        self.seed, self.epoch = state["seed"], state["epoch"]
        self.window, self._order = state["window"] or self.window, None
        self._begin([(int(start), int(stop)) for start, stop in state["segments"]], int(state["step"]))
        self._loaded = True

    def remaining(self) -> list[Segment]:
        """What no rank has been given yet, in the order of the epoch's sequence."""
        left = self.deal.left(self.steps_done - self.steps_before)
        return merge_ranges([part for segment in left for part in split_rows(self.segments, *segment)])

    def _make(self, step: int) -> Batch:
        self.number += 1
        self.source.batch = self.number
        rows, numbers = self._rows(step)
        with span("data", "assemble", batch=self.number):
            if self.shuffle_batches:
                key = [self.seed, self.epoch, self.steps_before + step, self.rank]
                order = np.random.default_rng(key).permutation(len(rows.labels))
                rows, numbers = rows.take(order), numbers[order]
            return self.to_batch(rows, lambda row, part: self.source.where(int(numbers[row]), part))

    def _rows(self, step: int) -> tuple[Rows, np.ndarray]:
        """The rows of a batch and their numbers in the set."""
        start, stop = self.deal.batch(step, self.rank)
        pieces = split_rows(self.segments, start, stop)
        if self._served is not None:
            return self._served.take(pieces)
        if self._order is not None:
            numbers = np.concatenate([self._order.at(*piece) for piece in pieces])
            return self.source.take(numbers), numbers
        numbers = np.concatenate([np.arange(*piece) for piece in pieces])
        if len(pieces) > 1:
            return collect_rows(self.source, pieces), numbers
        end = self.deal.batch(self.steps - 1, self.rank)[1]  # with a limit, nothing behind it is read
        run = split_rows(self.segments, start, min(self.deal.ahead(step, self.rank), end))[0]
        return self.source.read(*pieces[0], run[1]), numbers


def find_runs(rows: np.ndarray) -> np.ndarray:
    """Sorted row numbers -> [k, 2] runs of consecutive ones."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = np.concatenate([[0], breaks])
    stops = np.concatenate([breaks, [len(rows)]])
    return np.stack([rows[starts], rows[stops - 1] + 1], axis=1)
