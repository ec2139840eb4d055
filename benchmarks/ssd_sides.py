"""The sides that ssd_tables.py compares: lookups and fused updates of one table with its rows
in memory, in a cache, or in a mapped file.

Each side takes batches and yields the seconds of each. Time in which pages are taken from it to keep its
limit does not count, but waiting for the disk does.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks.pages import (
    PAGE,
    Bounded,
    Leaving,
    count_pages_read,
    count_resident_bytes,
    drop_from_cache,
    find_pages,
)
from dlrm.embeddings.ssd.cached_table import CachedTable, TableShare, share_budget
from dlrm.embeddings.ssd.row_cache import RowCache
from dlrm.embeddings.ssd.row_file import BUFFER_BYTES, RowFile

Batches = list[np.ndarray]
RATE = 0.01  # of learning


def make_kernel(slots: int, dim: int) -> Any:
    specs = [(slots, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    return SplitTableBatchedEmbeddingBagsCodegen(
        specs, optimizer=EmbOptimType.EXACT_ADAGRAD, learning_rate=RATE
    )


@dataclass
class Case:
    folder: Path
    table: TableShare
    budget: float  # bytes
    warm: Batches  # large ones that fill the memory
    dense: Callable[[], None]
    limited: bool

    @property
    def path(self) -> Path:
        return self.folder / f"{self.table.name}.rows"


class Memory:
    """Without files."""

    def __init__(self, case: Case) -> None:
        self.case, self.module = case, make_kernel(case.table.rows, case.table.dim)
        for part in np.array_split(np.arange(case.table.rows), 64):  # the memory is touched
            out = self.module(torch.from_numpy(part), torch.arange(len(part) + 1))
            out.backward(torch.zeros_like(out))

    def time_steps(self, batches: Batches) -> Iterator[float]:
        for ids in batches:
            begun = time.perf_counter()
            out = self.module(torch.from_numpy(ids), torch.arange(len(ids) + 1))
            self.case.dense()
            out.backward(torch.full_like(out, 1e-3))
            yield time.perf_counter() - begun


def open_filled(folder: Path, table: TableShare) -> RowFile:
    """All of it in the file, and in the page cache as far as it holds them."""
    row_file = RowFile(folder, table.name, table.rows, table.dim, table.state, "adagrad", 0)
    for block in range(len(row_file.blocks)):
        if row_file.blocks[block]:
            for _ in row_file.read_block(block):
                pass
        else:
            row_file.write_first_values(block)
    os.fsync(row_file._file)
    return row_file


class Cached:
    """Rows in a cache; with a thread that fetches the next batch's and writes, or without it."""

    def __init__(self, case: Case, some: Batches) -> None:
        self.case, self.row_file = case, open_filled(case.folder, case.table)
        self.module = make_kernel(self._count_slots(some), case.table.dim)
        weights, states = self.module.split_embedding_weights()[0], self.module.split_optimizer_states()[0]
        self.cached_table = CachedTable(case.table, self.row_file, weights, states[0])
        for ids in case.warm:
            self.cached_table.cache.admit_rows(ids, True)
        slots = np.flatnonzero(self.cached_table.cache.row >= 0)
        slots = slots[np.argsort(self.cached_table.cache.row[slots])]
        for part in np.array_split(slots, -(-len(slots) // self.row_file.rows_per_call)):
            self.cached_table._fill_slots(part, self.row_file.read(self.cached_table.cache.row[part]))
        if case.limited:
            drop_from_cache(self.row_file._file)
        self.written_rows: list[np.ndarray] = []  # rows that were written
        write = self.cached_table._write
        self.cached_table._write = lambda rows, *rest: (self.written_rows.append(rows), write(rows, *rest))  # type: ignore

    def _count_slots(self, some: Batches) -> int:
        """Slots, less the page cache's pages: those of six batches' misses."""
        most = share_budget([self.case.table], int(self.case.budget))[self.case.table.name]
        if not self.case.limited:
            return most
        cache = RowCache(most)
        for ids in self.case.warm[: len(self.case.warm) // 4]:
            cache.admit_rows(ids, True)
        missing = max(len(cache.admit_rows(ids, True).missing) for ids in some)
        budget = int(self.case.budget - 6 * missing * PAGE)
        return share_budget([self.case.table], budget)[self.case.table.name]

    def start_io_thread(self) -> None:
        self.cached_table._io_thread = ThreadPoolExecutor(1)

    def time_steps(self, batches: Batches, found: dict[str, float]) -> Iterator[float]:
        case, cached, most = self.case, self.cached_table, 0
        cached._read = cached.row_file.bytes_read
        before = cached.read_counters()
        leaving, held, last = Leaving(cached.row_file._file), *np.empty((2, 0), np.int64)
        pages_read, total = 0, 0.0
        for number, ids in enumerate(batches):
            coming = batches[number + 1 : number + 2] if cached._io_thread else []
            missing = cached.cache.find_absent(ids)
            read_before, begun = count_pages_read(), time.perf_counter()
            out = self.module(torch.from_numpy(cached.admit_rows(ids, True)), torch.arange(len(ids) + 1))
            for following in coming:
                cached.prefetch_rows(following)
            case.dense()
            out.backward(torch.full_like(out, 1e-3))
            cached.wait_for_writes()
            if cached._prefetched is not None:
                cached._prefetched.result()  # not while the clock is stopped
            seconds = time.perf_counter() - begun
            pages_read += count_pages_read() - read_before
            if case.limited:
                most = max(most, count_resident_bytes(case.path)) if number % 4 == 0 else most
                used, soon = (
                    find_pages(np.concatenate(rows), cached.row_file.row_bytes)
                    for rows in (
                        [missing, *self.written_rows],
                        [cached.cache.find_absent(each) for each in (*coming, ids[:0])],
                    )
                )
                here = find_pages(missing, cached.row_file.row_bytes)
                needed = np.concatenate((soon, here, last))
                held, last = np.union1d(np.union1d(held, used), soon), here
                held, gone = np.intersect1d(held, needed), np.setdiff1d(held, needed)
                seconds += leaving.evict_pages(gone, needed)
            self.written_rows.clear()
            total += seconds
            yield seconds
        counts, slots = cached.read_counters() - before, cached.cache.slots
        found |= {
            "hit_rate": 1 - counts[1] / counts[0],
            "bytes_per_step": int(counts[3] + counts[4]) // len(batches),
            "pages_read_per_second": pages_read / total,
            "page_cache_mb": most / 1e6,
            "slots": slots,
            "slots_used": int((cached.cache.row >= 0).sum()),
            "memory_mb": (slots * cached.table.slot_bytes + min(BUFFER_BYTES, case.budget / 4) + most) / 1e6,
        }


class Mapped:
    """The obvious alternative: the file as an array, rows gathered, adagrad by numpy's own vectors."""

    def __init__(self, case: Case) -> None:
        self.case, self.bounded = case, Bounded(case.path, case.budget)
        self.rows = np.frombuffer(self.bounded.map, np.float32).reshape(case.table.rows, 2 * case.table.dim)
        for ids in case.warm:
            self.bounded.mark_used(self._find_pages(ids))
        if case.limited:
            self.bounded.reload_used_pages()

    def _find_pages(self, ids: np.ndarray) -> np.ndarray:
        return find_pages(np.unique(ids), self.rows.shape[1] * 4)

    def time_steps(self, batches: Batches, found: dict[str, float]) -> Iterator[float]:
        case, dim, rows, most, missed = self.case, self.case.table.dim, self.rows, 0, 0
        for number, ids in enumerate(batches):
            missed += int((self.bounded.used[self._find_pages(ids)] == 0).sum())
            begun = time.perf_counter()
            unique, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
            values = rows[unique]
            _ = values[inverse, :dim]
            case.dense()
            gradient = np.repeat(1e-3 * counts[:, None].astype(np.float32), dim, 1)
            values[:, dim:] += gradient**2
            values[:, :dim] -= RATE * gradient / (np.sqrt(values[:, dim:]) + 1e-8)
            rows[unique] = values
            seconds = time.perf_counter() - begun
            if case.limited:
                seconds += self.bounded.trim_to_budget(self._find_pages(ids))
                most = max(most, count_resident_bytes(case.path)) if number % 4 == 0 else most
            yield seconds
        found |= {"faults_per_step": missed / len(batches), "page_cache_mb": most / 1e6}
