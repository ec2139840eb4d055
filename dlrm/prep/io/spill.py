"""Spill files: the parsed rows of one piece of input, sorted by the bucket of the output that they belong to.

The rows of the output, all days one after the other, are divided into buckets of 2^k rows. Each piece of the
input writes one spill file, with one run of records per bucket. A record is 41 uint32 words: row in the
bucket, 13 counts, 26 ids, label. The permutation says beforehand how many records each bucket gets, so the
position of every run in the file is known before the first record is written.
"""

from collections.abc import Callable

import numpy as np

from dlrm.data.criteo import NUM_DENSE, NUM_SPARSE
from dlrm.prep.io.blocks import TextBlock
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.kernels.intrinsics import compiled, load32, make_copier, make_narrower, store32

WORDS = 1 + NUM_DENSE + NUM_SPARSE + 1
RECORD_BYTES = 4 * WORDS
STAGING_BYTES, MOST_STAGED = (
    64 << 20,
    256 << 10,
)  # memory for records before they are written: all, per bucket
MIN_BITS, MAX_BUCKETS = 15, 4096
copy_counts, copy_ids, narrow_ids = make_copier(NUM_DENSE), make_copier(NUM_SPARSE), make_narrower(NUM_SPARSE)


def choose_bucket_bits(rows: int) -> int:
    """k, for buckets of 2^k rows: small enough to sort in memory, few enough to have a buffer for each."""
    bits = MIN_BITS
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


@compiled
def scatter_to_buckets(addresses, rows, row, places, bits, first, staging, filled):
    """Copy rows `row` .. `rows` of a block as records to the buffers of their buckets, until one is full.

    `addresses`: the block's (see blocks.TextBlock). `places`: integers [rows], output rows. `first`: bucket
    of the first buffer. `staging`: uint32 [buckets, records, WORDS]. `filled`: int64 [buckets], records in
    each buffer. Returns (next row, the full buffer or -1).
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
        record = base + RECORD_BYTES * (bucket * capacity + filled[bucket])
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
    """Writes the records of one piece to its file, each run at its position.

    `read_places(begin, rows)` returns the output rows of the piece's rows `begin` .. `begin` + `rows`.
    """

    def __init__(
        self, file: OffsetFile, read_places: Callable[[int, int], np.ndarray], rows: int, bits: int
    ) -> None:
        self.file, self.read_places, self.rows, self.bits = file, read_places, rows, bits
        self.done = 0  # rows added
        self.counts = self._count_records()
        self.runs = np.concatenate([[0], np.cumsum(self.counts)])  # record number where each run begins
        capacity = max(16, min(STAGING_BYTES // len(self.counts), MOST_STAGED) // RECORD_BYTES)
        self._staging = np.empty((len(self.counts), capacity, WORDS), np.uint32)
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
            row, full = scatter_to_buckets(
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
        self.file.write(self._staging[bucket, :count], int(self._next[bucket]) * RECORD_BYTES)
        self._next[bucket] += count
        self._filled[bucket] = 0
