"""Numbers ids in order of first appearance: an open-addressing hash table per column, all in one call.

A slot is 8 bytes: the id in the high half, its number + 1 in the low half; 0 is an empty slot. So a look-up
usually costs one cache miss.
"""

import numpy as np

from dlrm.prep.kernels.intrinsics import compiled, inlined, load32, load64, prefetch, store32, store64

# Columns of `Vocabulary.tables`. SLOTS, VALUES, COUNTS: addresses; BITS: log2 of the number of slots;
# SIZE: entries; LIMIT: entries above which the table must grow.
SLOTS, BITS, VALUES, COUNTS, SIZE, LIMIT = range(6)
FIRST_BITS = 13  # log2 of a new table's slots
AHEAD = 8  # look-ups prefetched in advance
GROUP = 128  # rows at a time: their ids stay in the first-level cache while the columns are handled in turn
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiplicative hashing


@inlined
def find_slot(key, bits):
    return np.int64((np.uint64(key) * MIX) >> np.uint64(64 - bits))


@compiled
def encode_ids(tables, ids, row_step, id_step, rows, shift):
    """Replace ids by their numbers + 1 + `shift`. New ids get the next number and are appended to the values.

    `tables`: int64 [columns, 6], see above; there must be enough free slots and values for `rows` new ids.
    `ids`: an address; the id of a row and column is the 4-byte word `row_step` * row + `id_step` * column
    words after it.
    """
    for begin in range(0, rows, GROUP):
        end = min(rows, begin + GROUP)
        for column in range(len(tables)):
            slots, bits = tables[column, SLOTS], tables[column, BITS]
            values, counts = tables[column, VALUES], tables[column, COUNTS]
            size, mask = tables[column, SIZE], (np.int64(1) << bits) - 1
            base = ids + 4 * id_step * column
            far = bits > 15  # smaller tables are in the cache anyway
            for row in range(begin, end):
                if far and row + AHEAD < rows:
                    prefetch(slots + 8 * find_slot(load32(base, (row + AHEAD) * row_step), bits))
                key = load32(base, row * row_step)
                at = find_slot(key, bits)
                held = load64(slots, at)
                while held != 0 and np.uint32(held >> np.uint64(32)) != key:
                    at = (at + 1) & mask
                    held = load64(slots, at)
                if held == 0:
                    size += 1
                    held = (np.uint64(key) << np.uint64(32)) | np.uint64(size)
                    store64(slots, at, held)
                    store32(values, size - 1, key)
                number = np.int64(np.uint32(held))
                if counts != 0:
                    store32(counts, number - 1, load32(counts, number - 1) + np.uint32(1))
                store32(base, row * row_step, np.uint32(number + shift))
            tables[column, SIZE] = size


@compiled
def refill_slots(slots, bits, values, size):
    """Insert all values into an empty, larger table."""
    mask = (np.int64(1) << bits) - 1
    for number in range(size):
        key = values[number]
        at = find_slot(key, bits)
        while slots[at] != 0:
            at = (at + 1) & mask
        slots[at] = (np.uint64(key) << np.uint64(32)) | np.uint64(number + 1)


@compiled
def replace_ids(slots, final):
    """Replace number + 1 in each slot by final[number]."""
    for at in range(len(slots)):
        if slots[at] != 0:
            number = np.int64(np.uint32(slots[at])) - 1
            slots[at] = (slots[at] >> np.uint64(32) << np.uint64(32)) | np.uint64(final[number])


class Vocabulary:
    """The hash tables of some columns: id -> number, and with `counting` how often each id occurred.

    Tables are at most half full. They grow before a block of rows is encoded, because the kernel cannot.
    `tables` has their addresses for the kernel. `slots`: uint64; `values`: uint32, the ids in the order of
    their numbers; `counts`: uint32, occurrences in the same order.
    """

    def __init__(self, counting: bool, columns: int) -> None:
        self.tables = np.zeros((columns, 6), np.int64)
        self._complete = False
        self.slots = [np.zeros(1 << FIRST_BITS, np.uint64) for _ in range(columns)]
        self.values = [np.zeros(1 << (FIRST_BITS - 1), np.uint32) for _ in range(columns)]
        self.counts = [
            np.zeros(1 << (FIRST_BITS - 1), np.uint32) if counting else None for _ in range(columns)
        ]
        for column in range(columns):
            self._update_addresses(column, FIRST_BITS)

    def encode_columns(self, ids: np.ndarray, shift: int = -1) -> None:
        """Replace ids, uint32 or int64 [rows, columns], by their numbers; the first number is 1 + `shift`."""
        rows = len(ids)
        full = self.tables[:, SIZE] + rows > self.tables[:, LIMIT]
        if full.any() and not self._complete:
            for column in np.flatnonzero(full):
                self._grow_table(int(column), rows)
        steps = (ids.strides[0] // 4, ids.strides[1] // 4)
        encode_ids(self.tables, ids.ctypes.data, *steps, rows, shift)

    def count_ids(self) -> list[int]:
        """Distinct ids of each column."""
        return self.tables[:, SIZE].tolist()

    def list_ids(self, column: int) -> np.ndarray:
        """uint32 [size]: the column's ids in the order of their numbers."""
        return self.values[column][: self.tables[column, SIZE]]

    def list_occurrences(self, column: int) -> np.ndarray:
        """uint32 [size]: how often each of these ids occurred."""
        counts = self.counts[column]
        assert counts is not None
        return counts[: self.tables[column, SIZE]]

    def set_final_numbers(self, final: list[np.ndarray]) -> None:
        """From now on `encode_columns` replaces an id with number n by final[column][n] + `shift`. It must
        not be called with new ids after this.
        """
        self._complete = True
        self.tables[:, COUNTS] = 0
        for slots, numbers in zip(self.slots, final, strict=True):
            replace_ids(slots, numbers)

    def clear(self) -> None:
        """Remove all ids; the tables keep their sizes, because fresh memory costs more than zeroing."""
        self.tables[:, SIZE] = 0
        for arrays in (self.slots, self.counts):
            for array in arrays:
                if array is not None:
                    array[:] = 0

    def _grow_table(self, column: int, rows: int) -> None:
        """Make space for `rows` more ids."""
        size, bits = int(self.tables[column, SIZE]), int(self.tables[column, BITS])
        while (1 << bits) < 2 * (size + rows):
            bits += 1
        self.slots[column] = np.zeros(1 << bits, np.uint64)
        for arrays in (self.values, self.counts):
            old = arrays[column]
            if old is not None:
                larger = np.zeros(1 << (bits - 1), np.uint32)
                larger[:size] = old[:size]
                arrays[column] = larger
        refill_slots(self.slots[column], bits, self.values[column], size)
        self._update_addresses(column, bits)

    def _update_addresses(self, column: int, bits: int) -> None:
        counts = self.counts[column]
        self.tables[column, SLOTS] = self.slots[column].ctypes.data
        self.tables[column, BITS] = bits
        self.tables[column, VALUES] = self.values[column].ctypes.data
        self.tables[column, COUNTS] = 0 if counts is None else counts.ctypes.data
        self.tables[column, LIMIT] = 1 << (bits - 1)
