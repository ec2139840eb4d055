"""One table in a file: the rows of it that are in memory, and all of them for a checkpoint.

fbgemm's table is the cache: it has one row per slot. A batch's rows stay until its backward pass has
updated them; changed rows are written when they leave.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import torch

from dlrm.embeddings.ssd.row_cache import NONE, SLOT_BYTES, AdmissionResult, CacheFull, LookupResult, RowCache
from dlrm.embeddings.ssd.row_file import BUFFERS, LARGEST, RowFile
from dlrm.embeddings.ssd.snapshot import SnapshotSlice, TableSnapshot
from dlrm.runtime.errors import UserError

NO_ROWS = np.empty(0, np.int64)
COUNTS = ("lookups", "misses", "evictions", "bytes_read", "bytes_written")


@dataclass(frozen=True)
class TableShare:
    name: str
    rows: int
    dim: int
    state: int  # floats of optimizer state per row
    pooling: float = 1.0
    first: int = 0  # of a shard, its first row in the table

    @property
    def slot_bytes(self) -> int:
        return 4 * (self.dim + self.state) + SLOT_BYTES


def share_budget(tables: list[TableShare], budget: int) -> dict[str, int]:
    """Slots of each table: small ones whole, what they leave goes to the others by how much they look up."""
    slots = {}
    left = budget - min(BUFFERS, budget / 4)  # a budget under 38 MB is not kept to the byte
    weight = sum(table.pooling for table in tables)
    for table in sorted(tables, key=lambda each: each.rows * each.slot_bytes / each.pooling):
        given = left * table.pooling / weight
        slots[table.name] = min(table.rows, max(1, int(given // table.slot_bytes)))
        left -= slots[table.name] * table.slot_bytes
        weight -= table.pooling
    return slots


class CachedTable:
    """One table of this rank: its file, and the rows of it that fbgemm sees."""

    def __init__(
        self, table: TableShare, store: RowFile, weights: torch.Tensor, state: torch.Tensor | None,
        beside: Executor | None = None,
    ) -> None:  # fmt: skip
        self.table, self.store = table, store
        self.cache = RowCache(len(weights))
        self.weights = weights.detach().numpy()
        self.state = None if state is None else state.detach().numpy().reshape(len(weights), -1)
        self.sound = store.clean  # else a killed job left rows of different moments
        self.filled = False  # from a checkpoint
        self._beside = beside  # a thread that works while batches are computed
        self._coming: Future[tuple[LookupResult, np.ndarray, np.ndarray]] | None = None  # of the next batch
        self._going: Future[None] | None = None  # rows of the last batch are being written
        self._read = 0  # bytes, when the last batch was here
        self._moment: Callable[[], TableSnapshot | None] = lambda: None  # that a checkpoint reads

    def admit(self, ids: np.ndarray, change: bool) -> np.ndarray:
        """The slots of these rows, which are then filled."""
        coming, self._coming = self._coming, None
        looked, here, values = coming.result() if coming else (None, NO_ROWS, self._values(NO_ROWS))
        try:
            new = self.cache.admit(ids, change, looked)
        except CacheFull as full:
            needed = full.args[0] * self.table.slot_bytes
            raise UserError(
                f"{self.table.name}: a batch touches {full.args[0]} rows, its cache holds "
                f"{self.cache.slots}: this table needs {needed / 1e6:.3g} MB of "
                "--cache_memory_budget_mb; raise it or lower --batch_size"
            ) from None
        if change:
            self.store.soil()
        if len(new.missing):
            self.settle()  # a row may be wanted again that is being written
            here = here[: len(values)]
            at = np.searchsorted(here, new.missing)
            known = np.append(here, NONE)[at] == new.missing
            rest, into = new.missing[~known], new.into[~known]
            if coming is None:
                self.store.expect(self.store.places(rest))
            self._release(new)
            self._put(new.into[known], values[at[known]])
            for begin in range(0, len(rest), self.store.few):
                part = slice(begin, begin + self.store.few)
                self._put(into[part], self.store.read(rest[part]))
        self._read = self.store.bytes_read
        return new.slots

    def _put(self, slots: np.ndarray, values: np.ndarray) -> None:
        self.weights[slots] = values[:, : self.table.dim]
        if self.state is not None:
            self.state[slots] = values[:, self.table.dim :]

    def expect(self, ids: np.ndarray) -> None:
        """The next batch's: while this one is computed, those that are not here are read."""
        if self._beside is not None:
            self._coming = self._beside.submit(self._fetch, ids)

    def _fetch(self, ids: np.ndarray) -> tuple[LookupResult, np.ndarray, np.ndarray]:
        """On the thread, after what left was written: rows and their values, as many as there is room for."""
        store, looked = self.store, self.cache.look(ids)
        rows = looked.absent
        rows = store.made(rows)
        store.expect(store.places(rows))
        values = np.empty((min(len(rows), max(1, LARGEST // store.row_bytes)), store.width), np.float32)
        for begin in range(0, len(values), store.few):
            part = slice(begin, min(begin + store.few, len(values)))
            values[part] = store.get(rows[part])
        return looked, rows, values

    def _release(self, new: AdmissionResult) -> None:
        """Copies of changed rows go to the file; their slots are free at once."""
        if not len(new.leaving):
            return
        values, far = self._values(new.places), new.leaving[~new.near]
        if self._beside is None:
            self._write(new.leaving, values, far)
        else:
            self._going = self._beside.submit(self._write, new.leaving, values, far)

    def _write(self, rows: np.ndarray, values: np.ndarray, far: np.ndarray) -> None:
        self.store.expect(self.store.places(far))  # a page is read before a part of it is written
        self.store.write(rows, values)

    def _values(self, slots: np.ndarray) -> np.ndarray:
        values = np.empty((len(slots), self.store.width), np.float32)
        values[:, : self.table.dim] = self.weights[slots]
        if self.state is not None:
            values[:, self.table.dim :] = self.state[slots]
        return values

    def settle(self) -> None:
        """What left is in the file, or it is said why not."""
        going, self._going = self._going, None
        if going is not None:
            going.result()

    def forget(self) -> None:
        """The store's rows are about to be others."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.result()
        self.settle()
        self.cache.clear()

    def flush(self) -> None:
        """Every changed row into the file; all stay in the cache."""
        self.settle()
        slots = self.cache.changed()
        slots = slots[np.argsort(self.cache.row[slots])]
        few = max(1, LARGEST // self.store.row_bytes)
        for begin in range(0, len(slots), few):
            part = slots[begin : begin + few]
            rows = self.cache.row[part]
            self._write(rows, self._values(part), rows)
        self.cache.dirty.fill(0)

    def moment(self) -> TableSnapshot:
        """All rows as they are now, until nobody refers to it any more."""
        self.flush()
        now = self._moment()
        if now is None or not now.fresh:
            now = TableSnapshot(self.store)
            seen = self._moment = weakref.ref(now)

            def before_write(ids: np.ndarray) -> None:
                moment = seen()
                if moment is not None:
                    moment.keep(ids)
                else:  # its checkpoint is written
                    self.store.before_write = None
                    with contextlib.suppress(OSError):  # only room is lost
                        self.store.aside()

            self.store.before_write = before_write
        return now

    def counts(self) -> np.ndarray:
        cache, store = self.cache, self.store
        return np.array(
            [cache.lookups, cache.misses, cache.evictions, self._read, store.bytes_written], np.int64
        )

    def close(self) -> None:
        self.flush()
        self.store.close()


@dataclass(frozen=True)
class WholeTable:
    """All rows of a table, weights or optimizer state, for a checkpoint. On its owner `tier` is there."""

    table: TableShare
    tier: CachedTable | None
    state: bool

    def size(self) -> torch.Size:
        width = self.table.state if self.state else self.table.dim
        flat = self.state and width == 1
        return torch.Size([self.table.rows] if flat else [self.table.rows, width])

    @property
    def _columns(self) -> slice:
        return slice(self.table.dim, None) if self.state else slice(0, self.table.dim)

    def copy(self) -> Iterator[SnapshotSlice]:
        """As it is now. Only changed rows are written here; a checkpoint reads the others by and by."""
        if self.tier is not None:
            shape = torch.Size([self.tier.table.rows, *self.size()[1:]])
            place = (self.tier.table.first, *[0] * (len(shape) - 1))
            yield SnapshotSlice(self.tier.moment(), self._columns, shape, place)

    def fill(self, read: Callable[[tuple[int, ...], torch.Tensor], int]) -> int:
        """Each block by `read(offset, tensor)`; what the cache held is forgotten."""
        if self.tier is None:
            return 0
        tier, store, done = self.tier, self.tier.store, 0
        tier.forget()
        for block in range(len(store.blocks)):
            low, high = store.span(block)
            shape = (high - low, *self.size()[1:])
            values = torch.empty(shape)
            done += read((tier.table.first + low, *[0] * (len(shape) - 1)), values)
            # the weights come first, then the optimizer's state, or it begins anew
            store.fill(block, self._columns, values.reshape(high - low, -1).numpy(), alone=not self.state)
        tier.sound = tier.filled = True
        return done
