"""Which rows of a table are in memory, and where: a hash map from row to slot, and who makes room for whom.

In: the row numbers of a batch. Out: their slots, what must be read into which slot, what must go first.
A row that came last leaves first, while its page is still near, unless it was looked up more often than
others that are here (as in TinyLFU). How often any row was looked up is estimated, and fades.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

NONE = -1
MOST = 63  # a row's estimated lookups end here
FADE = 40  # lookups per slot after which all estimates are halved
TRIED = 8  # slots that are compared to find one that can go
# row, stamp, queue, young, dirty, uses; map and estimates at their most
SLOT_BYTES = 8 + 4 + 4 + 1 + 1 + 1 + 16 + 16


class CacheFull(Exception):
    """A batch touches more rows than there are slots: `args[0]` rows."""


@dataclass(frozen=True)
class LookupResult:
    ids: np.ndarray
    slots: np.ndarray  # -1: not here
    left: np.ndarray  # places in `ids` of those that are not here
    held: int  # rows that are here

    @property
    def absent(self) -> np.ndarray:
        return np.unique(self.ids[self.left])


@dataclass(frozen=True)
class AdmissionResult:
    slots: np.ndarray  # of each id
    missing: np.ndarray  # rows to read, in ascending order
    into: np.ndarray  # their slots
    leaving: np.ndarray  # rows to write before that, in ascending order
    places: np.ndarray  # the slots that they are still in
    near: np.ndarray  # which of them came so late that their page is hardly gone


def compiled(function: Any) -> Any:
    return numba.njit(nogil=True, cache=True, boundscheck=False)(function)


class RowCache:
    """`admit` gives each row of a batch a slot; rows of the batch before may lose theirs."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        bits = max(4, int(2 * slots).bit_length())
        self.map = np.full(1 << bits, NONE, np.int32)  # slots, where the hash of their row says
        self.counts = np.zeros(1 << max(4, int(8 * slots - 1).bit_length()), np.uint8)
        self.row = np.full(slots, NONE, np.int64)  # of each slot
        self.stamp = np.zeros(slots, np.int32)  # the batch that last used it
        self.young = np.zeros(slots, np.uint8)  # in the queue
        self.dirty = np.zeros(slots, np.uint8)
        self.uses = np.zeros(slots, np.uint8)  # estimated lookups of its row
        self.queue = np.zeros(slots, np.int32)  # slots of rows that came last, a ring
        self.at = np.zeros(4, np.int64)  # filled slots, hand, the queue's first, its length
        self.now = self.counted = 0
        self.lookups = self.misses = self.evictions = 0

    def clear(self) -> None:
        self.map.fill(NONE)
        self.row.fill(NONE)
        self.dirty.fill(0)
        self.young.fill(0)
        self.at.fill(0)

    def look(self, ids: np.ndarray) -> LookupResult:
        """Which of these rows are here; true until the next `admit`. On any thread."""
        self.now += 1
        self.counted += len(ids)
        if self.counted > FADE * self.slots:
            self.counts >>= 1
            self.uses >>= 1
            self.counted = 0
        slots, left = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        count, held = _look(
            ids, self.map, self.row, self.counts, self.stamp, self.uses, self.now, slots, left
        )
        return LookupResult(ids, slots, left[:count], held)

    def admit(self, ids: np.ndarray, change: bool, looked: LookupResult | None = None) -> AdmissionResult:
        """Room for all of them. `change`: they are going to be updated.

        Raises Full, with nothing changed that matters."""
        if looked is None or not np.array_equal(ids, looked.ids):
            looked = self.look(ids)
        if len(looked.left) + looked.held > self.slots and len(np.unique(ids)) > self.slots:
            raise CacheFull(len(np.unique(ids)))
        wanted, into, leaving = (np.empty(len(looked.left), np.int64) for _ in range(3))
        near = np.zeros(len(wanted), np.bool_)
        made = _make_room(
            ids, looked.left, self.map, self.row, self.counts, self.stamp, self.uses, self.young, self.dirty,
            self.queue, self.at, self.now, looked.slots, wanted, into, leaving, near,
        )  # fmt: skip
        if change:
            self.dirty[looked.slots] = 1
        order, gone = np.argsort(wanted[:made]), np.argsort(leaving[:made])
        gone = gone[np.searchsorted(leaving[gone], 0) :]
        self.lookups += len(ids)
        self.misses += made
        self.evictions += int((leaving[:made] != NONE).sum())
        return AdmissionResult(
            looked.slots, wanted[order], into[order], leaving[gone], into[gone], near[gone]
        )

    def absent(self, ids: np.ndarray) -> np.ndarray:
        """Of these rows, in ascending order, those that are not here; nothing changes."""
        rows = np.empty(len(ids), np.int64)
        return np.unique(rows[: _absent(ids, self.map, self.row, rows)])

    def changed(self) -> np.ndarray:
        """Slots with rows that are newer here than in the store."""
        return np.flatnonzero((self.dirty != 0) & (self.row >= 0))


@numba.njit(nogil=True, inline="always")
def _mixed(row: Any) -> Any:
    made = np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((made ^ (made >> np.uint64(29))) >> np.uint64(1))


@compiled
def _find(map: np.ndarray, rows: np.ndarray, row: int) -> int:
    """Where `row` is in the map, or the empty place where it would be."""
    mask = len(map) - 1
    at = _mixed(row) & mask
    while map[at] != -1 and rows[map[at]] != row:
        at = (at + 1) & mask
    return at


@compiled
def _absent(ids: np.ndarray, map: np.ndarray, rows: np.ndarray, gone: np.ndarray) -> int:
    count = 0
    for i in range(len(ids)):
        if map[_find(map, rows, ids[i])] == -1:
            gone[count] = ids[i]
            count += 1
    return count


@compiled
def _remove(map: np.ndarray, rows: np.ndarray, row: Any) -> None:
    """Without gravestones: what follows moves up."""
    mask = len(map) - 1
    hole = _find(map, rows, row)
    at = hole
    while True:
        at = (at + 1) & mask
        if map[at] == -1:
            break
        home = _mixed(rows[map[at]]) & mask
        if ((at - home) & mask) >= ((at - hole) & mask):
            map[hole] = map[at]
            hole = at
    map[hole] = -1


@compiled
def _count(counts: np.ndarray, row: Any, more: Any) -> Any:
    """How often it was looked up so far, not too low: two counters, shared with other rows."""
    mask = len(counts) - 1
    mixed = _mixed(row)
    one, other = (mixed >> 20) & mask, (mixed >> 37) & mask
    least = min(counts[one], counts[other])
    if more and least < MOST:
        if counts[one] == least:
            counts[one] += 1
        if counts[other] == least and other != one:
            counts[other] += 1
    return least


@compiled
def _look(
    ids: np.ndarray, map: np.ndarray, rows: np.ndarray, counts: np.ndarray, stamp: np.ndarray,
    uses: np.ndarray, now: int, out: np.ndarray, left: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """The slots of rows that are here; where in `ids` the others are. (How many others, how many here.)"""
    count = held = 0
    for i in range(len(ids)):
        seen = _count(counts, ids[i], True)
        slot = map[_find(map, rows, ids[i])]
        out[i] = slot
        if slot == -1:
            left[count] = i
            count += 1
        else:
            uses[slot] = seen + 1
            if stamp[slot] != now:
                stamp[slot] = now
                held += 1
    return count, held


@compiled
def _old(stamp: np.ndarray, uses: np.ndarray, young: np.ndarray, at: np.ndarray, now: int) -> int:
    """The least looked up of some slots in their turn; -1 if all are needed."""
    best, least = -1, 256
    for _ in range(TRIED):
        slot = at[1]
        at[1] = slot + 1 if slot + 1 < len(stamp) else 0
        if stamp[slot] != now and not young[slot] and uses[slot] < least:
            best, least = slot, uses[slot]
    return best


@compiled
def _next(young: np.ndarray, queue: np.ndarray, at: np.ndarray) -> Any:
    """The slot that is first in the queue, and no longer is."""
    slot = queue[at[2]]
    at[2] = at[2] + 1 if at[2] + 1 < len(queue) else 0
    at[3] -= 1
    young[slot] = 0
    return slot


@compiled
def _victim(
    stamp: np.ndarray, uses: np.ndarray, young: np.ndarray, queue: np.ndarray, at: np.ndarray, now: int,
    mine: int,
) -> tuple[Any, bool]:  # fmt: skip
    """(a slot that this batch does not need, whether its row is one of those that came last).

    `mine`: so many at the queue's end are this batch's."""
    while at[3] > mine:
        slot = _next(young, queue, at)
        if stamp[slot] == now:
            continue  # it came back: it stays
        best = _old(stamp, uses, young, at, now)
        if best >= 0 and uses[slot] > uses[best]:
            return best, False
        return slot, True
    best = -1
    while best < 0:
        best = _old(stamp, uses, young, at, now)
    return best, False


@compiled
def _make_room(
    ids: np.ndarray, left: np.ndarray, map: np.ndarray, rows: np.ndarray, counts: np.ndarray,
    stamp: np.ndarray, uses: np.ndarray, young: np.ndarray, dirty: np.ndarray, queue: np.ndarray,
    at: np.ndarray, now: int, out: np.ndarray, wanted: np.ndarray, slots: np.ndarray, leaving: np.ndarray,
    near: np.ndarray,
) -> int:  # fmt: skip
    """A slot for each row at `left`. `leaving`: the row to write first, -1: the slot was empty, -2: clean."""
    count = mine = 0
    while at[3] > 2 * len(left):  # of larger batches
        _next(young, queue, at)
    for n in range(len(left)):
        row = ids[left[n]]
        place = _find(map, rows, row)
        if map[place] != -1:  # it was there twice
            out[left[n]] = map[place]
            continue
        leaving[count] = -1
        if at[0] < len(rows):
            slot = at[0]
            at[0] += 1
        else:
            slot, near[count] = _victim(stamp, uses, young, queue, at, now, mine)
            leaving[count] = rows[slot] if dirty[slot] else -2
            _remove(map, rows, rows[slot])
            place = _find(map, rows, row)
            end = at[2] + at[3]
            queue[end if end < len(queue) else end - len(queue)] = slot
            young[slot] = 1
            at[3] += 1
            mine += 1
        map[place] = slot
        rows[slot] = row
        stamp[slot] = now
        uses[slot] = _count(counts, row, False)
        dirty[slot] = 0
        out[left[n]] = slot
        wanted[count] = row
        slots[count] = slot
        count += 1
    return count
