"""One table in a file: those of its rows that are in memory, and all of them for a checkpoint.

fbgemm's table is the cache: it has one row per slot. A batch's rows stay until its backward pass has
updated them; changed rows are written when they leave.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dlrm.embeddings.ssd.row_cache import NONE, SLOT_BYTES, AdmissionResult, CacheFull, LookupResult, RowCache
from dlrm.embeddings.ssd.row_file import BUFFER_BYTES, MAX_CALL_BYTES, RowFile
from dlrm.embeddings.ssd.snapshot import SnapshotSlice, TableSnapshot
from dlrm.runtime import trace
from dlrm.runtime.errors import UserError

NO_ROWS = np.empty(0, np.int64)
COUNTS = ("lookups", "misses", "evictions", "bytes_read", "bytes_written")


def _wait_for(work: Future[Any]) -> Any:
    """The result of what the I/O thread does. A span says how long it was waited for: that is not compute."""
    if work.done():
        return work.result()
    with trace.span("ssd", "wait"):
        return work.result()


@dataclass(frozen=True)
class TableShare:
    """A table, or the rows or columns of it that one rank has."""

    name: str
    rows: int
    dim: int
    state: int  # floats of optimizer state per row, of all its tensors
    pooling: float = 1.0  # ids per sample
    first: int = 0  # number of the share's first row in the table
    first_column: int = 0  # likewise; `dim` and `state` are of the share's columns

    @property
    def slot_bytes(self) -> int:
        return 4 * (self.dim + self.state) + SLOT_BYTES


def share_budget(tables: list[TableShare], budget: int) -> dict[str, int]:
    """Table -> slots of its cache, within `budget` bytes.

    Small tables get a slot for each row; the rest of the budget is divided among the others by their lookups.
    """
    slots = {}
    left = budget - min(BUFFER_BYTES, budget / 4)  # a budget under 38 MB is not kept to the byte
    weight = sum(table.pooling for table in tables)
    for table in sorted(tables, key=lambda each: each.rows * each.slot_bytes / each.pooling):
        share = left * table.pooling / weight
        slots[table.name] = min(table.rows, max(1, int(share // table.slot_bytes)))
        left -= slots[table.name] * table.slot_bytes
        weight -= table.pooling
    return slots


class CachedTable:
    """One table of this rank: its row file, and the cache that is fbgemm's weight tensor.

    weights: float32 [slots, dim], fbgemm's own, written to in place. state: likewise [slots, floats per row],
    one tensor or several.
    """

    def __init__(
        self, table: TableShare, row_file: RowFile, weights: torch.Tensor,
        state: torch.Tensor | Sequence[torch.Tensor] | None, io_thread: Executor | None = None,
    ) -> None:  # fmt: skip
        """table: this rank's share of it. io_thread: reads and writes its file while batches are computed."""
        self.table, self.row_file = table, row_file
        self.cache = RowCache(len(weights))
        states = [] if state is None else [state] if isinstance(state, torch.Tensor) else state
        # where a row's numbers are in its slot, and in its row of the file
        self.slots: list[tuple[np.ndarray, slice]] = []
        column = 0
        for each in (weights, *states):
            values = each.detach().numpy().reshape(len(weights), -1)
            self.slots.append((values, slice(column, column + values.shape[1])))
            column += values.shape[1]
        self.weights = self.slots[0][0]
        self.state = self.slots[1][0] if states else None
        self.consistent = row_file.clean  # else a killed job left rows of different steps
        self.loaded = False  # a checkpoint's rows have replaced those of the file
        self._io_thread = io_thread  # reads and writes while batches are computed
        # of the next batch
        self._prefetched: Future[tuple[LookupResult, np.ndarray, np.ndarray]] | None = None
        self._writing: Future[None] | None = None  # rows of the last batch are being written
        self._read = 0  # bytes read up to the last batch: those of a running prefetch are not counted yet
        self._snapshot: Callable[[], TableSnapshot | None] = lambda: None  # weak reference

    def admit_rows(self, ids: np.ndarray, will_update: bool) -> np.ndarray:
        """The slots of these rows (int64, as `ids`), with the rows in them.

        will_update: the batch's backward pass changes the rows, so they have to be written some day.
        """
        prefetched, self._prefetched = self._prefetched, None
        lookup, read_rows, values = (
            _wait_for(prefetched) if prefetched else (None, NO_ROWS, self._read_slots(NO_ROWS))
        )
        try:
            new = self.cache.admit_rows(ids, will_update, lookup)
        except CacheFull as full:
            needed = full.args[0] * self.table.slot_bytes
            raise UserError(
                f"{self.table.name}: a batch touches {full.args[0]} rows, its cache holds "
                f"{self.cache.slots}: this table needs {needed / 1e6:.3g} MB of "
                "--cache_memory_budget_mb; raise it or lower --batch_size"
            ) from None
        if will_update:
            self.row_file.mark_dirty()
        if len(new.missing):
            self.wait_for_writes()  # a missing row may be one that is still being written
            read_rows = read_rows[: len(values)]
            at = np.searchsorted(read_rows, new.missing)
            known = np.append(read_rows, NONE)[at] == new.missing
            rest, slots = new.missing[~known], new.missing_slots[~known]
            if prefetched is None:
                self.row_file.announce_reads(self.row_file.find_ranges(rest))
            self._write_evicted(new)
            self._fill_slots(new.missing_slots[known], values[at[known]])
            for begin in range(0, len(rest), self.row_file.rows_per_call):
                part = slice(begin, begin + self.row_file.rows_per_call)
                self._fill_slots(slots[part], self.row_file.read(rest[part]))
        self._read = self.row_file.bytes_read
        return new.slots

    def _fill_slots(self, slots: np.ndarray, values: np.ndarray) -> None:
        """Write rows, float32 [slots, weights and state], to their slots."""
        for array, columns in self.slots:
            array[slots] = values[:, columns]

    def prefetch_rows(self, ids: np.ndarray) -> None:
        """Start reading those of the next batch's rows that are not cached, on the I/O thread."""
        if self._io_thread is not None:
            self._prefetched = self._io_thread.submit(self._fetch_absent, ids)

    def _fetch_absent(self, ids: np.ndarray) -> tuple[LookupResult, np.ndarray, np.ndarray]:
        """(lookup, rows that are not cached, values of the first of them, up to MAX_CALL_BYTES).

        Runs on the I/O thread, which has written the evicted rows before.
        """
        row_file, lookup = self.row_file, self.cache.look_up(ids)
        rows = row_file.find_stored(lookup.absent)
        row_file.announce_reads(row_file.find_ranges(rows))
        count = min(len(rows), max(1, MAX_CALL_BYTES // row_file.row_bytes))
        values = np.empty((count, row_file.width), np.float32)
        for begin in range(0, len(values), row_file.rows_per_call):
            part = slice(begin, min(begin + row_file.rows_per_call, len(values)))
            values[part] = row_file.read_stored(rows[part])
        return lookup, rows, values

    def _write_evicted(self, new: AdmissionResult) -> None:
        """Write copies of evicted changed rows, on the I/O thread if there is one; frees their slots."""
        if not len(new.evicted):
            return
        values, far = self._read_slots(new.evicted_slots), new.evicted[~new.recent]
        if self._io_thread is None:
            self._write(new.evicted, values, far)
        else:
            self._writing = self._io_thread.submit(self._write, new.evicted, values, far)

    def _write(self, rows: np.ndarray, values: np.ndarray, far: np.ndarray) -> None:
        """Write evicted rows to the file.

        rows    int64 [n], their numbers
        values  float32 [n, weights and state]
        far     int64 [k], those of `rows` whose pages are probably not in the page cache
        """
        # a page is read before a part of it is written
        self.row_file.announce_reads(self.row_file.find_ranges(far))
        self.row_file.write(rows, values)

    def _read_slots(self, slots: np.ndarray) -> np.ndarray:
        """float32 [slots, weights and state]: a copy."""
        values = np.empty((len(slots), self.row_file.width), np.float32)
        for array, columns in self.slots:
            values[:, columns] = array[slots]
        return values

    def wait_for_writes(self) -> None:
        """Wait until evicted rows are in the file; raises the I/O thread's UserError if they are not."""
        writing, self._writing = self._writing, None
        if writing is not None:
            _wait_for(writing)

    def discard_cached_rows(self) -> None:
        """Empty the cache without writing: the file's rows are about to be replaced."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None:
            prefetched.result()
        self.wait_for_writes()
        self.cache.clear()

    def flush(self) -> None:
        """Write every changed row to the file; all stay in the cache."""
        self.wait_for_writes()
        slots = self.cache.list_dirty_slots()
        slots = slots[np.argsort(self.cache.row[slots])]
        portion = max(1, MAX_CALL_BYTES // self.row_file.row_bytes)
        for begin in range(0, len(slots), portion):
            part = slots[begin : begin + portion]
            rows = self.cache.row[part]
            self._write(rows, self._read_slots(part), rows)
        self.cache.dirty.fill(0)

    def take_snapshot(self) -> TableSnapshot:
        """All rows as they are now, while something refers to it; the last one again if no row changed."""
        self.flush()
        snapshot = self._snapshot()
        if snapshot is None or not snapshot.unchanged:
            snapshot = TableSnapshot(self.row_file)
            reference = self._snapshot = weakref.ref(snapshot)

            def before_write(ids: np.ndarray) -> None:
                current = reference()
                if current is not None:
                    current.save_old_rows(ids)
                else:  # its checkpoint has been written
                    self.row_file.before_write = None
                    with contextlib.suppress(OSError):  # emptying it only saves space
                        self.row_file.open_old_values()

            self.row_file.before_write = before_write
        return snapshot

    def read_counters(self) -> np.ndarray:
        cache, row_file = self.cache, self.row_file
        return np.array(
            [cache.lookups, cache.misses, cache.evictions, self._read, row_file.bytes_written], np.int64
        )

    def close(self) -> None:
        self.flush()
        self.row_file.close()


@dataclass(frozen=True)
class WholeTable:
    """All rows of a table, weights or optimizer state, as a checkpoint saves and loads them.

    `cached_table` is None on ranks that have no row of it.
    """

    table: TableShare
    cached_table: CachedTable | None
    state: bool  # optimizer state, not weights
    number: int = 0  # which of the state's tensors: each is as wide as the table, or one number a row

    @property
    def _width(self) -> int:
        return min(self.table.state, self.table.dim) if self.state else self.table.dim

    def size(self) -> torch.Size:
        flat = self.state and self._width == 1
        return torch.Size([self.table.rows] if flat else [self.table.rows, self._width])

    @property
    def _columns(self) -> slice:
        first = self.table.dim + self.number * self._width if self.state else 0
        return slice(first, first + self._width)

    def copy(self) -> Iterator[SnapshotSlice]:
        """This rank's rows as they are now. Writes changed rows to the file; the checkpoint reads later."""
        if self.cached_table is not None:
            shape = torch.Size([self.cached_table.table.rows, *self.size()[1:]])
            place = (self.cached_table.table.first, *[0] * (len(shape) - 1))
            yield SnapshotSlice(self.cached_table.take_snapshot(), self._columns, shape, place)

    def fill(self, read: Callable[[tuple[int, ...], torch.Tensor], int]) -> int:
        """Replace all rows of this rank; returns the number of bytes read.

        read: called with (offset in the whole table, float32 tensor to fill) for each block.
        """
        if self.cached_table is None:
            return 0
        table, row_file, done = self.cached_table, self.cached_table.row_file, 0
        table.discard_cached_rows()
        for block in range(len(row_file.blocks)):
            low, high = row_file.find_block_range(block)
            shape = (high - low, *self.size()[1:])
            values = torch.empty(shape)
            done += read((table.table.first + low, *[0] * (len(shape) - 1)), values)
            # weights come first: they set the optimizer's state to 0, which a later call may fill
            row_file.fill_block(
                block, self._columns, values.reshape(high - low, -1).numpy(), zero_others=not self.state
            )
        table.consistent = table.loaded = True
        return done


@dataclass(frozen=True)
class ColumnWiseTable:
    """All of a column-wise table, as `WholeTable`. parts: this rank's; each is whole with its columns."""

    table: TableShare
    parts: Sequence[WholeTable]

    def size(self) -> torch.Size:
        return torch.Size([self.table.rows, self.table.dim])

    def copy(self) -> Iterator[SnapshotSlice]:
        for part in self.parts:
            for columns in part.copy():
                row, column = columns.place
                yield replace(columns, place=(row, column + part.table.first_column))

    def fill(self, read: Callable[[tuple[int, ...], torch.Tensor], int]) -> int:
        done = 0
        for part in self.parts:
            first = part.table.first_column
            done += part.fill(lambda at, into, first=first: read((at[0], at[1] + first), into))
        return done
