"""Rows on their way from their place in the input to their place in the output.

The output's rows, all days after each other, are cut into buckets of 2^k rows. Each piece of the input
writes one file: for every bucket a run of records (row in the bucket, 13 counts, 26 ids, label).
How many records go where is known beforehand, so every run has its place in the file.
"""

from collections.abc import Callable

import numpy as np

from dlrm.criteo import NUM_DENSE, NUM_SPARSE
from dlrm.prep.files import File
from dlrm.prep.native import compiled
from dlrm.prep.scan import Block

WORDS = 1 + NUM_DENSE + NUM_SPARSE + 1
RECORD_BYTES = 4 * WORDS
STAGING_BYTES, MOST_STAGED = 16 << 20, 64 << 10  # in all, and for one bucket
MIN_BITS, MAX_BUCKETS = 17, 2048


def bucket_bits(rows: int) -> int:
    """Buckets small enough to be put in order in memory, few enough to be filled side by side."""
    bits = MIN_BITS
    while rows >> bits >= MAX_BUCKETS:
        bits += 1
    return bits


def buckets(rows: int, bits: int) -> int:
    return (rows + (1 << bits) - 1) >> bits


@compiled
def histogram(places, base, bits, first, counts):
    """How many rows of a piece go to each bucket; buckets are counted from `first`."""
    for row in range(len(places)):
        counts[((base + places[row]) >> bits) - first] += 1


@compiled
def scatter(dense, sparse, rows, row, places, base, bits, first, staging, filled):
    """Records into their buckets' staging rows, until one is full; returns (next row, full bucket or -1)."""
    mask = (np.int64(1) << bits) - 1
    room = staging.shape[1]
    while row < rows:
        place = base + np.int64(places[row])
        bucket = (place >> bits) - first
        if filled[bucket] == room:
            return row, bucket
        record = staging[bucket, filled[bucket]]
        record[0] = np.uint32(place & mask)
        for column in range(NUM_DENSE):
            record[1 + column] = np.uint32(dense[row, column])
        for column in range(NUM_SPARSE):
            record[1 + NUM_DENSE + column] = sparse[column, row]
        record[WORDS - 1] = np.uint32(dense[row, NUM_DENSE])
        filled[bucket] += 1
        row += 1
    return row, -1


class Spill:
    """One piece's records into its file. `places(begin, rows)` gives where its rows go, less `base`."""

    def __init__(self, file: File, places: Callable[[int, int], np.ndarray], rows: int, base: int, bits: int):
        self.file, self.places, self.rows, self.base, self.bits = file, places, rows, base, bits
        self.done = 0
        self.counts = self._count()
        self.runs = np.concatenate([[0], np.cumsum(self.counts)])  # record number where each run begins
        room = max(16, min(STAGING_BYTES // len(self.counts), MOST_STAGED) // RECORD_BYTES)
        self._staging = np.empty((len(self.counts), room, WORDS), np.uint32)
        self._filled = np.zeros(len(self.counts), np.int64)
        self._next = self.runs[:-1].copy()

    def _count(self) -> np.ndarray:
        step = 1 << 20
        low, high = 1 << 62, 0
        for begin in range(0, self.rows, step):
            places = self.places(begin, min(step, self.rows - begin))
            low, high = min(low, int(places.min())), max(high, int(places.max()))
        self.first = (self.base + low) >> self.bits
        counts = np.zeros(((self.base + high) >> self.bits) - self.first + 1, np.int64)
        for begin in range(0, self.rows, step):
            places = self.places(begin, min(step, self.rows - begin))
            histogram(places, self.base, self.bits, self.first, counts)
        return counts

    def take(self, block: Block) -> None:
        places = self.places(self.done, block.rows)
        row = 0
        while row < block.rows:
            row, full = scatter(
                block.dense, block.sparse, block.rows, row, places, self.base, self.bits, self.first,
                self._staging, self._filled,
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
