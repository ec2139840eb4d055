"""This rank's batches of one epoch, and the position in it as state.

An epoch is a sequence of rows (in file order, or shuffled); what is left of it is a list of segments of that
sequence, computed alike on all ranks without communication. So a state can be loaded at another world size
and batch size: each remaining row still comes exactly once. Which rank gets which rows: see `sampler`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dlrm.data.arrays import ArrayCollator
from dlrm.data.rows import Rows, RowSource
from dlrm.data.sampler import RowSampler, Segment, merge_ranges, split_rows
from dlrm.data.shuffle import BatchOrder, ShuffledOrder, ShuffleWindow, collect_rows
from dlrm.runtime.errors import UserError
from dlrm.runtime.trace import span


class BatchLoader:
    """Iterates over this rank's batches of the current epoch, or of what a loaded state left of it.

    shuffle_batches: permute the rows inside each batch. shuffle_order: take the batches in random order, each
    epoch differently. shuffle_set: permute the whole set, each epoch differently; sources without random
    access in windows of `window_mb`; then shuffle_order has no effect. by_rank: see RowSampler; None: as
    suits the source. limit: largest number of batches of an epoch. rows: an epoch has only the first ones.
    to_batch: what makes a batch of rows; None: torchrec's `Batch`.
    """

    def __init__(
        self,
        source: RowSource,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        table_sizes: Sequence[int] | None = None,
        *,
        to_batch: ArrayCollator | None = None,
        drop_last: bool = False,
        shuffle_batches: bool = False,
        shuffle_set: bool = False,
        shuffle_order: bool = False,
        window_mb: float = 256,
        by_rank: bool | None = None,
        seed: int = 0,
        limit: int | None = None,
        rows: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"--batch_size {batch_size}: must be at least 1")
        self.source, self.batch_size, self.rank, self.world_size = source, batch_size, rank, world_size
        self.rows = source.rows if rows is None else min(rows, source.rows)
        if to_batch is None:  # torchrec's batches; imported here because the emulator has no torch
            from dlrm.data.collate import BatchCollator

            to_batch = BatchCollator(table_sizes)
        self.to_batch = to_batch
        self.drop_last, self.shuffle_batches, self.shuffle_set = drop_last, shuffle_batches, shuffle_set
        self.window_rows = (
            0 if source.random_access else max(1, int(window_mb * (1 << 20)) // source.row_bytes)
        )
        self.shuffle_order = shuffle_order and not shuffle_set
        self.block_rows = batch_size * world_size  # of a step: what shuffle_order moves
        if by_rank is None:
            by_rank = shuffle_set or (source.contiguous and not shuffle_order)
        self.by_rank, self.seed, self.limit = by_rank, seed, limit
        self.epoch = 0
        # of the last batch, counted over all epochs: relates reads to steps in a trace
        self.batch_number = -1
        self._order: ShuffledOrder | None = None
        self._shuffle_window: ShuffleWindow | None = None
        self._batch_order: BatchOrder | None = None
        self._loaded = False  # a state was loaded and not iterated over yet
        self._start_pass([(0, self.rows)], 0)

    def _start_pass(self, segments: list[Segment], steps_done: int) -> None:
        """Set up a pass over these segments of the epoch, of which `steps_done` steps are done."""
        self.segments, self.steps_before, self.steps_done = segments, steps_done, steps_done
        rows = sum(stop - start for start, stop in segments)
        self.sampler = RowSampler(rows, self.batch_size, self.world_size, self.by_rank, self.drop_last)
        allowed = self.sampler.steps if self.limit is None else max(0, self.limit - steps_done)
        self.steps = min(self.sampler.steps, allowed)

    def __len__(self) -> int:
        """Batches of the current pass."""
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        if not self._loaded:
            self._start_pass([(0, self.rows)], 0)
        self._loaded = False
        self.load_first_rows()
        for step in range(self.steps):
            batch = self._make_batch(step)
            self.steps_done = self.steps_before + step + 1
            yield batch

    def load_first_rows(self) -> None:
        """Load what must be in memory before the first batch; iterating calls it, too."""
        set_epoch = getattr(self.source, "set_epoch", None)
        if set_epoch:  # the rows themselves change from epoch to epoch
            set_epoch(self.epoch)
        if self.shuffle_set and (self._order is None or self._order.epoch != self.epoch):
            self._order = ShuffledOrder(self.rows, self.seed, self.epoch, self.window_rows)
            self._shuffle_window = ShuffleWindow(self.source, self._order) if self._order.window else None
        if self.shuffle_order and (self._batch_order is None or self._batch_order.epoch != self.epoch):
            self._batch_order = BatchOrder(self.rows, self.seed, self.epoch, self.block_rows)
        if self.source.in_memory and self.steps:
            mine = [
                split_rows(self.segments, *self.sampler.find_batch_rows(step, self.rank))
                for step in range(self.steps)
            ]
            segments = merge_ranges([segment for batch in mine for segment in batch])
            if self._batch_order is not None:
                segments = merge_ranges(sorted(self._locate_rows(segments)))
            if self._order is not None:
                rows = np.sort(np.concatenate([self._order.take_rows_at(*segment) for segment in segments]))
                self.source.load(find_runs(rows), scattered=True)
            else:
                self.source.load(np.array(segments, np.int64), scattered=False)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; with the number of the current one a loaded position stays."""
        if epoch != self.epoch:
            self.epoch, self._loaded = epoch, False
            self._start_pass([(0, self.rows)], 0)

    def state_dict(self) -> dict[str, Any]:
        """The position in this epoch, of all ranks together, as JSON values."""
        remaining = [] if self.steps_done - self.steps_before >= self.steps else self.list_remaining()
        return {
            "epoch": self.epoch,
            "step": self.steps_done,
            "rows": self.rows,
            "segments": [list(segment) for segment in remaining],
            "seed": self.seed,
            "window": self.window_rows if self.shuffle_set else None,
            "block": self.block_rows if self.shuffle_order else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rows"] != self.rows:
            raise UserError(
                f"the checkpoint was made with {state['rows']} rows, this dataset has {self.rows}: "
                "give the same dataset"
            )
        block = state.get("block")  # older checkpoints have none
        if (block is not None) != self.shuffle_order:
            raise UserError("the checkpoint and this run differ in --shuffle_batch_order: give the same")
        if (state["window"] is not None) != self.shuffle_set:
            raise UserError("the checkpoint and this run differ in --shuffle_training_set: give the same")
        if self.shuffle_set and (state["window"] == 0) != (self.window_rows == 0):
            raise UserError("the checkpoint was shuffled for another kind of source: give the same kind")
        self.seed, self.epoch = state["seed"], state["epoch"]
        self.window_rows, self._order = state["window"] or self.window_rows, None
        self.block_rows, self._batch_order = block or self.block_rows, None
        self._start_pass([(int(start), int(stop)) for start, stop in state["segments"]], int(state["step"]))
        self._loaded = True

    def list_remaining(self) -> list[Segment]:
        """What no rank has been given yet, in the order of the epoch's sequence."""
        remaining = self.sampler.find_remaining(self.steps_done - self.steps_before)
        return merge_ranges([part for segment in remaining for part in split_rows(self.segments, *segment)])

    def _make_batch(self, step: int) -> Any:
        self.batch_number += 1
        self.source.batch = self.batch_number
        rows, numbers = self._read_rows(step)
        with span("data", "preprocess", batch=self.batch_number):
            if self.shuffle_batches:
                key = [self.seed, self.epoch, self.steps_before + step, self.rank]
                order = np.random.default_rng(key).permutation(len(rows.labels))
                rows, numbers = rows.take(order), numbers[order]
            return self.to_batch(rows, lambda row, part: self.source.locate_row(int(numbers[row]), part))

    def _read_rows(self, step: int) -> tuple[Rows, np.ndarray]:
        """The rows of a batch and their numbers in the set, int64 [n]."""
        start, stop = self.sampler.find_batch_rows(step, self.rank)
        pieces = split_rows(self.segments, start, stop)
        if self._shuffle_window is not None:
            return self._shuffle_window.read_positions(pieces)
        if self._order is not None:
            numbers = np.concatenate([self._order.take_rows_at(*piece) for piece in pieces])
            return self.source.take(numbers), numbers
        if self._batch_order is not None:
            pieces = self._locate_rows(pieces)
        numbers = np.concatenate([np.arange(*piece) for piece in pieces])
        if len(pieces) > 1:
            return collect_rows(self.source, pieces), numbers
        if self._batch_order is not None:
            return self.source.read(*pieces[0]), numbers
        end = self.sampler.find_batch_rows(self.steps - 1, self.rank)[1]  # nothing beyond the limit is read
        run = split_rows(self.segments, start, min(self.sampler.find_contiguous_end(step, self.rank), end))[0]
        return self.source.read(*pieces[0], run[1]), numbers

    def _locate_rows(self, segments: list[Segment]) -> list[Segment]:
        """Segments of the shuffled order of batches -> segments of rows."""
        assert self._batch_order is not None
        return [rows for segment in segments for rows in self._batch_order.locate_rows(*segment)]


def find_runs(rows: np.ndarray) -> np.ndarray:
    """Sorted row numbers, int64 [n] -> runs of consecutive ones, int64 [k, 2]: first, past the last."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = np.concatenate([[0], breaks])
    stops = np.concatenate([breaks, [len(rows)]])
    return np.stack([rows[starts], rows[stops - 1] + 1], axis=1)
