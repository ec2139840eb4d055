"""Ids to numbers in order of first appearance: one open-addressing table per column, all 26 in one call.

A slot holds id and number + 1 in eight bytes (0 is empty), so a look-up costs one cache miss at most.
"""

import numpy as np

from dlrm.criteo import NUM_SPARSE
from dlrm.prep.native import compiled, get32, get64, inlined, prefetch64, put32, put64

SLOTS, BITS, VALUES, COUNTS, SIZE, LIMIT = range(6)  # columns of the table of tables
FIRST_BITS = 13
AHEAD = 8  # look-ups prefetched in advance
MIX = np.uint64(0x9E3779B97F4A7C15)


@inlined
def slot_of(key, bits):
    return np.int64((np.uint64(key) * MIX) >> np.uint64(64 - bits))


@compiled
def encode(tables, sparse, rows):
    """Replace sparse[column, :rows] by numbers; new ids are appended to the column's values."""
    for column in range(len(tables)):
        slots, bits = tables[column, SLOTS], tables[column, BITS]
        values, counts = tables[column, VALUES], tables[column, COUNTS]
        size, mask = tables[column, SIZE], (np.int64(1) << bits) - 1
        far = bits > 15  # smaller tables are in the cache anyway
        for row in range(rows):
            if far and row + AHEAD < rows:
                prefetch64(slots, slot_of(sparse[column, row + AHEAD], bits))
            key = sparse[column, row]
            at = slot_of(key, bits)
            held = get64(slots, at)
            while held != 0 and np.uint32(held >> np.uint64(32)) != key:
                at = (at + 1) & mask
                held = get64(slots, at)
            if held == 0:
                put64(slots, at, (np.uint64(key) << np.uint64(32)) | np.uint64(size + 1))
                put32(values, size, key)
                number = np.uint32(size)
                size += 1
            else:
                number = np.uint32(np.uint32(held) - np.uint32(1))
            if counts != 0:
                put32(counts, number, get32(counts, number) + np.uint32(1))
            sparse[column, row] = number
        tables[column, SIZE] = size


@compiled
def refill(slots, bits, values, size):
    """All values into an empty, larger table."""
    mask = (np.int64(1) << bits) - 1
    for number in range(size):
        key = values[number]
        at = slot_of(key, bits)
        while slots[at] != 0:
            at = (at + 1) & mask
        slots[at] = (np.uint64(key) << np.uint64(32)) | np.uint64(number + 1)


class Vocabulary:
    """The tables of some columns, at most half full: room is made before a block, not in it."""

    def __init__(self, counting: bool, columns: int = NUM_SPARSE) -> None:
        self.tables = np.zeros((columns, 6), np.int64)
        self.slots = [np.zeros(1 << FIRST_BITS, np.uint64) for _ in range(columns)]
        self.values = [np.zeros(1 << (FIRST_BITS - 1), np.uint32) for _ in range(columns)]
        self.counts = [
            np.zeros(1 << (FIRST_BITS - 1), np.uint32) if counting else None for _ in range(columns)
        ]
        for column in range(columns):
            self._describe(column, FIRST_BITS)

    def encode(self, sparse: np.ndarray, rows: int) -> None:
        full = self.tables[:, SIZE] + rows > self.tables[:, LIMIT]
        if full.any():
            for column in np.flatnonzero(full):
                self._widen(int(column), rows)
        encode(self.tables, sparse, rows)

    def sizes(self) -> list[int]:
        return self.tables[:, SIZE].tolist()

    def ids(self, column: int) -> np.ndarray:
        return self.values[column][: self.tables[column, SIZE]]

    def seen(self, column: int) -> np.ndarray:
        counts = self.counts[column]
        assert counts is not None
        return counts[: self.tables[column, SIZE]]

    def stop_counting(self) -> None:
        """From now on ids are only looked up; what was counted stays."""
        self.tables[:, COUNTS] = 0

    def _widen(self, column: int, rows: int) -> None:
        size, bits = int(self.tables[column, SIZE]), int(self.tables[column, BITS])
        while (1 << bits) < 2 * (size + rows):
            bits += 1
        self.slots[column] = np.zeros(1 << bits, np.uint64)
        for arrays in (self.values, self.counts):
            old = arrays[column]
            if old is not None:
                wider = np.zeros(1 << (bits - 1), np.uint32)
                wider[:size] = old[:size]
                arrays[column] = wider
        refill(self.slots[column], bits, self.values[column], size)
        self._describe(column, bits)

    def _describe(self, column: int, bits: int) -> None:
        counts = self.counts[column]
        self.tables[column, SLOTS] = self.slots[column].ctypes.data
        self.tables[column, BITS] = bits
        self.tables[column, VALUES] = self.values[column].ctypes.data
        self.tables[column, COUNTS] = 0 if counts is None else counts.ctypes.data
        self.tables[column, LIMIT] = 1 << (bits - 1)
