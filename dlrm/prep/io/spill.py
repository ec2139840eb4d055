"""Rows on their way from their place in the input to their place in the output.

The output's rows, all days after each other, are cut into buckets of 2^k rows. Each piece of the input
writes one file: for every bucket a run of records (row in the bucket, 13 counts, 26 ids, label).
How many records go where is known beforehand, so every run has its place in the file.
"""

from collections.abc import Callable

import numpy as np

from dlrm.data.criteo import NUM_DENSE, NUM_SPARSE
from dlrm.prep.io.blocks import TextBlock
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.kernels.intrinsics import compiled, load32, make_copier, make_narrower, store32

WORDS = 1 + NUM_DENSE + NUM_SPARSE + 1
RECORD_BYTES = 4 * WORDS
STAGING_BYTES, MOST_STAGED = 64 << 20, 256 << 10  # in all, and for one bucket
MIN_BITS, MAX_BUCKETS = 15, 4096
copy_counts, copy_ids, narrow_ids = make_copier(NUM_DENSE), make_copier(NUM_SPARSE), make_narrower(NUM_SPARSE)


def choose_bucket_bits(rows: int) -> int:
    """Buckets small enough to be put in order in memory, few enough to be filled side by side."""
    bits = MIN_BITS
    while rows >> bits >= MAX_BUCKETS:
        bits += 1
    return bits


def count_buckets(rows: int, bits: int) -> int:
    return (rows + (1 << bits) - 1) >> bits


@compiled
def count_per_bucket(places, bits, counts):
    """How many rows of a piece go to each bucket."""
    for row in range(len(places)):
        counts[np.int64(places[row]) >> bits] += 1


@compiled
def scatter_to_buckets(addresses, rows, row, places, bits, first, staging, filled):
    """Records into their buckets' staging rows, until one is full; returns (next row, full bucket or -1)."""
    dense, dense_step, ids, ids_step = addresses[0], 4 * addresses[1], addresses[2], 4 * addresses[3]
    wide, labels, label_step = addresses[4] == 2, addresses[5], addresses[6]
    mask = (np.int64(1) << bits) - 1
    base, room = staging.ctypes.data, staging.shape[1]
    while row < rows:
        place = np.int64(places[row])
        bucket = (place >> bits) - first
        if filled[bucket] == room:
            return row, bucket
        record = base + RECORD_BYTES * (bucket * room + filled[bucket])
        store32(record, 0, np.uint32(place & mask))
        copy_counts(record + 4, dense + dense_step * row)
        if wide:
            narrow_ids(record + 4 + 4 * NUM_DENSE, ids + ids_step * row)
        else:
            copy_ids(record + 4 + 4 * NUM_DENSE, ids + ids_step * row)
        store32(record, WORDS - 1, load32(labels, label_step * row))
        filled[bucket] += 1
        row += 1
    return row, -1


class SpillFile:
    """One piece's records into its file. `places(begin, rows)` gives where its rows go."""

    def __init__(
        self, file: OffsetFile, places: Callable[[int, int], np.ndarray], rows: int, bits: int
    ) -> None:
        self.file, self.places, self.rows, self.bits = file, places, rows, bits
        self.done = 0
        self.counts = self._count()
        self.runs = np.concatenate([[0], np.cumsum(self.counts)])  # record number where each run begins
        room = max(16, min(STAGING_BYTES // len(self.counts), MOST_STAGED) // RECORD_BYTES)
        self._staging = np.empty((len(self.counts), room, WORDS), np.uint32)
        self._filled = np.zeros(len(self.counts), np.int64)
        self._next = self.runs[:-1].copy()

    def _count(self) -> np.ndarray:
        """Records per bucket, from the first one that gets any to the last."""
        step, counts = 1 << 16, np.zeros(MAX_BUCKETS, np.int64)
        for begin in range(0, self.rows, step):
            count_per_bucket(self.places(begin, min(step, self.rows - begin)), self.bits, counts)
        used = np.flatnonzero(counts)
        self.first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        return counts[self.first : end]

    def take(self, block: TextBlock) -> None:
        places = self.places(self.done, block.rows)
        row = 0
        while row < block.rows:
            row, full = scatter_to_buckets(
                block.addresses, block.rows, row, places, self.bits, self.first, self._staging, self._filled,
            )  # fmt: skip
            if full >= 0:
                self._flush(full)
        self.done += block.rows

    def finish(self) -> None:
        for bucket in np.flatnonzero(self._filled):
            self._flush(int(bucket))

    def _flush(self, bucket: int) -> None:
        count = int(self._filled[bucket])
        self.file.write(self._staging[bucket, :count], int(self._next[bucket]) * RECORD_BYTES)
        self._next[bucket] += count
        self._filled[bucket] = 0
