"""Spill files: the parsed rows of one piece of input, sorted by the bucket of the output that they belong to.

The rows of the output, all days one after the other, are divided into buckets of 2^k rows. Each piece of the
input writes one spill file, with one run of records per bucket. A record is uint32 words: row in the bucket,
counts, ids, label. The permutation says beforehand how many records each bucket gets, so the position of
every run in the file is known before the first record is written.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from dlrm.data.criteo import Columns
from dlrm.prep.io.blocks import TextBlock
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.kernels.intrinsics import compiled, copy_words, load32, narrow_words, store32

# Memory for records before they are written: of all buckets, of one
STAGING_BYTES, MOST_STAGED = 64 << 20, 256 << 10
MIN_BITS, MAX_BUCKETS = 15, 4096
MOST_BUCKET_BYTES = 16 << 20  # of records, where rows are wide


def count_words(columns: Columns) -> int:
    """Words of a record."""
    return columns.total + 1


def count_record_bytes(columns: Columns) -> int:
    return 4 * count_words(columns)


def choose_bucket_bits(rows: int, columns: Columns) -> int:
    """k, for buckets of 2^k rows: small enough to sort in memory, few enough to have a buffer for each."""
    bits = MIN_BITS
    while count_record_bytes(columns) << bits > MOST_BUCKET_BYTES:
        bits -= 1
    while rows >> bits >= MAX_BUCKETS:
        bits += 1
    return bits


def count_buckets(rows: int, bits: int) -> int:
    return (rows + (1 << bits) - 1) >> bits


@compiled
def count_per_bucket(places, bits, counts):
    """Add to `counts` how many of the rows go to each bucket. `places`: the output row of each."""
    for row in range(len(places)):
        counts[np.int64(places[row]) >> bits] += 1


@functools.cache
def make_scatterer(columns: Columns) -> Any:
    """`scatter_to_buckets`, compiled for records of these columns."""
    numerical, categorical, words = columns.numerical, columns.categorical, count_words(columns)

    @compiled
    def scatter_to_buckets(addresses, rows, row, places, bits, first, staging, filled):
        """Copy rows `row` .. `rows` of a block as records to the buffers of their buckets, until one is full.

        `addresses`: the block's (see blocks.TextBlock). `places`: integers [rows], output rows. `first`:
        bucket of the first buffer. `staging`: uint32 [buckets, records, words]. `filled`: int64 [buckets],
        records in each buffer. Returns (next row, the full buffer or -1).
        """
        dense, dense_step, ids, ids_step = addresses[0], 4 * addresses[1], addresses[2], 4 * addresses[3]
        wide, labels, label_step = addresses[4] == 2, addresses[5], addresses[6]
        mask = (np.int64(1) << bits) - 1
        base, capacity = staging.ctypes.data, staging.shape[1]
        while row < rows:
            place = np.int64(places[row])
            bucket = (place >> bits) - first
            if filled[bucket] == capacity:
                return row, bucket
            record = base + 4 * words * (bucket * capacity + filled[bucket])
            store32(record, 0, np.uint32(place & mask))
            copy_words(record + 4, dense + dense_step * row, numerical)
            if wide:
                narrow_words(record + 4 + 4 * numerical, ids + ids_step * row, categorical)
            else:
                copy_words(record + 4 + 4 * numerical, ids + ids_step * row, categorical)
            store32(record, words - 1, load32(labels, label_step * row))
            filled[bucket] += 1
            row += 1
        return row, -1

    return scatter_to_buckets


class SpillFile:
    """Writes the records of one piece to its file, each run at its position.

    `read_places(begin, rows)` returns the output rows of the piece's rows `begin` .. `begin` + `rows`.
    """

    def __init__(
        self,
        file: OffsetFile,
        read_places: Callable[[int, int], np.ndarray],
        rows: int,
        bits: int,
        columns: Columns,
    ) -> None:
        """`rows`: of the piece. `bits`: a bucket has 2^bits rows of the output."""
        self.record_bytes, self._scatter = count_record_bytes(columns), make_scatterer(columns)
        self.file, self.read_places, self.rows, self.bits = file, read_places, rows, bits
        self.done = 0  # rows added
        self.counts = self._count_records()
        self.runs = np.concatenate([[0], np.cumsum(self.counts)])  # record number where each run begins
        capacity = max(16, min(STAGING_BYTES // len(self.counts), MOST_STAGED) // self.record_bytes)
        self._staging = np.empty((len(self.counts), capacity, count_words(columns)), np.uint32)
        self._filled = np.zeros(len(self.counts), np.int64)
        self._next = self.runs[:-1].copy()

    def _count_records(self) -> np.ndarray:
        """Records per bucket, from the first bucket that gets any (`first`) to the last."""
        step, counts = 1 << 16, np.zeros(MAX_BUCKETS, np.int64)
        for begin in range(0, self.rows, step):
            count_per_bucket(self.read_places(begin, min(step, self.rows - begin)), self.bits, counts)
        used = np.flatnonzero(counts)
        self.first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        return counts[self.first : end]

    def add_block(self, block: TextBlock) -> None:
        places = self.read_places(self.done, block.rows)
        row = 0
        while row < block.rows:
            row, full = self._scatter(
                block.addresses, block.rows, row, places, self.bits, self.first, self._staging, self._filled,
            )  # fmt: skip
            if full >= 0:
                self._write_buffer(full)
        self.done += block.rows

    def write_rest(self) -> None:
        for bucket in np.flatnonzero(self._filled):
            self._write_buffer(int(bucket))

    def _write_buffer(self, bucket: int) -> None:
        count = int(self._filled[bucket])
        self.file.write(self._staging[bucket, :count], int(self._next[bucket]) * self.record_bytes)
        self._next[bucket] += count
        self._filled[bucket] = 0
