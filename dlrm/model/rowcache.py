"""Which rows of a table are in memory, and where: a hash map from row to slot, and a clock that makes room.

In: the row numbers of a batch. Out: their slots, what must be read into which slot, what must go first.
Counts of use (up to LIVES) let rows that return often outlast those that were seen once.
"""

from typing import Any

import numba
import numpy as np

LIVES = 7
NONE = -1
SLOT_BYTES = 8 + 4 + 1 + 1 + 48  # row, stamp, uses, dirty, and the map's entries at their most


class Full(Exception):
    """A batch touches more rows than there are slots: `args[0]` rows."""


def compiled(function: Any) -> Any:
    return numba.njit(nogil=True, cache=True, boundscheck=False)(function)


class RowCache:
    """`admit` gives each row of a batch a slot; rows of the batch before may lose theirs."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        bits = max(4, int(2 * slots + 1).bit_length())
        self.shift = np.uint64(64 - bits)
        self.keys = np.full(1 << bits, NONE, np.int64)
        self.values = np.zeros(1 << bits, np.int32)
        self.row = np.full(slots, NONE, np.int64)  # of each slot
        self.stamp = np.zeros(slots, np.int32)  # the batch that last used it
        self.uses = np.zeros(slots, np.uint8)
        self.dirty = np.zeros(slots, np.uint8)
        self.now = self.hand = 0
        self.lookups = self.misses = self.evictions = 0

    def clear(self) -> None:
        self.keys.fill(NONE)
        self.row.fill(NONE)
        self.dirty.fill(0)
        self.uses.fill(0)

    def admit(self, ids: np.ndarray, change: bool) -> tuple[np.ndarray, ...]:
        """(slot of each id, rows to read, their slots, rows to write first, the slots they are in now).

        `change`: the rows are going to be updated. Raises Full, with nothing changed that matters."""
        self.now += 1
        out = np.empty(len(ids), np.int64)
        wanted = np.empty(min(len(ids), self.slots) + 1, np.int64)
        count, held = _look(
            ids, self.keys, self.values, self.shift, self.stamp, self.uses, self.dirty, self.now, change, out,
            wanted,
        )  # fmt: skip
        if count + held > self.slots:
            for row in wanted[: min(count, len(wanted))]:
                _remove(self.keys, self.values, self.shift, row)
            raise Full(len(np.unique(ids)))
        slots, leaving = np.empty(count, np.int64), np.empty(count, np.int64)
        self.hand = _make_room(
            wanted[:count], self.keys, self.values, self.shift, self.row, self.stamp, self.uses, self.dirty,
            self.now, self.hand, change, slots, leaving,
        )  # fmt: skip
        _settle(out, slots)
        self.lookups += len(ids)
        self.misses += count
        self.evictions += int((leaving != NONE).sum())
        changed = leaving >= 0
        return out, wanted[:count], slots, leaving[changed], slots[changed]

    def absent(self, ids: np.ndarray) -> np.ndarray:
        """Of these rows, in ascending order, those that are not here; nothing changes."""
        rows = np.unique(ids).astype(np.int64, copy=False)
        return rows[_absent(rows, self.keys, self.shift)]

    def changed(self) -> np.ndarray:
        """Slots with rows that are newer here than in the store."""
        return np.flatnonzero((self.dirty != 0) & (self.row >= 0))


@numba.njit(nogil=True, inline="always")
def _home(row: Any, shift: Any) -> Any:
    return np.int64((np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)) >> shift)


@compiled
def _find(keys: np.ndarray, shift: np.uint64, row: int) -> int:
    """Where `row` is in the map, or the empty place where it would be."""
    mask = len(keys) - 1
    at = _home(row, shift)
    while keys[at] != row and keys[at] != -1:
        at = (at + 1) & mask
    return at


@compiled
def _absent(rows: np.ndarray, keys: np.ndarray, shift: np.uint64) -> np.ndarray:
    gone = np.empty(len(rows), np.bool_)
    for i in range(len(rows)):
        gone[i] = keys[_find(keys, shift, rows[i])] == -1
    return gone


@compiled
def _remove(keys: np.ndarray, values: np.ndarray, shift: np.uint64, row: Any) -> None:
    """Without gravestones: what follows moves up."""
    mask = len(keys) - 1
    hole = _find(keys, shift, row)
    if keys[hole] == -1:
        return
    at = hole
    while True:
        at = (at + 1) & mask
        if keys[at] == -1:
            break
        home = _home(keys[at], shift)
        if ((at - home) & mask) >= ((at - hole) & mask):
            keys[hole], values[hole] = keys[at], values[at]
            hole = at
    keys[hole] = -1


@compiled
def _look(
    ids: np.ndarray, keys: np.ndarray, values: np.ndarray, shift: np.uint64, stamp: np.ndarray,
    uses: np.ndarray, dirty: np.ndarray, now: int, change: bool, out: np.ndarray, wanted: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Slots of the rows that are here; -1 - n for the n-th that is not. Stops when there are too many."""
    count = held = 0
    for i in range(len(ids)):
        at = _find(keys, shift, ids[i])
        if keys[at] == -1:
            wanted[count] = ids[i]
            keys[at] = ids[i]
            values[at] = -1 - count
            count += 1
        slot = values[at]
        out[i] = slot
        if slot >= 0 and stamp[slot] != now:
            stamp[slot] = now
            held += 1
            uses[slot] = min(uses[slot] + 1, LIVES)
            if change:
                dirty[slot] = 1
        if count + held > len(stamp):
            break
    return count, held


@compiled
def _make_room(
    wanted: np.ndarray, keys: np.ndarray, values: np.ndarray, shift: np.uint64, row: np.ndarray,
    stamp: np.ndarray, uses: np.ndarray, dirty: np.ndarray, now: int, hand: int, change: bool,
    slots: np.ndarray, leaving: np.ndarray,
) -> int:  # fmt: skip
    """A slot for each wanted row. `leaving`: the row to write first, -1: the slot was empty, -2: clean."""
    for n in range(len(wanted)):
        while True:
            slot = hand
            hand = hand + 1 if hand + 1 < len(row) else 0
            if row[slot] == -1:
                break
            if stamp[slot] == now:
                continue
            if uses[slot] == 0:
                break
            uses[slot] -= 1
        old = row[slot]
        leaving[n] = -1
        if old != -1:
            _remove(keys, values, shift, old)
            leaving[n] = old if dirty[slot] else -2
        row[slot] = wanted[n]
        stamp[slot] = now
        uses[slot] = 0
        dirty[slot] = 1 if change else 0
        slots[n] = slot
        values[_find(keys, shift, wanted[n])] = slot
    return hand


@compiled
def _settle(out: np.ndarray, slots: np.ndarray) -> None:
    for i in range(len(out)):
        if out[i] < 0:
            out[i] = slots[-1 - out[i]]
