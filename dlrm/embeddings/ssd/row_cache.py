"""Which rows of a table are cached, and in which slot: a hash map from row to slot, and an eviction policy.

In: the row numbers of a batch. Out: their slots, which rows to read into which slot, which to write first.
The policy is TinyLFU's: a row that was admitted recently is evicted first, while its page is probably still
in the page cache, unless it was looked up more often than other cached rows. How often a row was looked up
is estimated by a count-min sketch whose counters are halved from time to time.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

NONE = -1
MAX_USES = 63  # largest estimate of a row's lookups
LOOKUPS_PER_DECAY = 40  # lookups per slot after which all estimates are halved
VICTIM_CANDIDATES = 8  # slots that are compared to find one to evict
# row, stamp, queue, in_queue, dirty, uses; map and counters at their largest
SLOT_BYTES = 8 + 4 + 4 + 1 + 1 + 1 + 16 + 16


class CacheFull(Exception):
    """A batch touches more rows than there are slots: `args[0]` rows."""


@dataclass(frozen=True)
class LookupResult:
    """All arrays are int64."""

    ids: np.ndarray  # rows of a batch, in any order, some more than once
    slots: np.ndarray  # of each id; -1: not cached
    absent_at: np.ndarray  # positions in `ids` of those that are not cached
    present: int  # different rows that are cached

    @property
    def absent(self) -> np.ndarray:
        """Rows that are not cached, ascending."""
        return np.unique(self.ids[self.absent_at])


@dataclass(frozen=True)
class AdmissionResult:
    """All arrays but the last are int64."""

    slots: np.ndarray  # of each id
    missing: np.ndarray  # rows to read, ascending
    missing_slots: np.ndarray  # their slots
    evicted: np.ndarray  # changed rows to write before that, ascending
    evicted_slots: np.ndarray  # the slots that still have their values
    recent: np.ndarray  # bool: admitted so late that their page is probably still in the page cache


def compile_function(function: Any) -> Any:
    """By numba, without the interpreter's lock."""
    return numba.njit(nogil=True, cache=True, boundscheck=False)(function)


class RowCache:
    """`admit_rows` gives each row of a batch a slot; rows that the batch does not have may lose theirs."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        bits = max(4, int(2 * slots).bit_length())
        self.map = np.full(1 << bits, NONE, np.int32)  # open addressing: slot at the hash of its row
        self.counts = np.zeros(1 << max(4, int(8 * slots - 1).bit_length()), np.uint8)  # count-min sketch
        self.row = np.full(slots, NONE, np.int64)  # in each slot
        self.stamp = np.zeros(slots, np.int32)  # the batch that last used it
        self.in_queue = np.zeros(slots, np.uint8)  # in the queue
        self.dirty = np.zeros(slots, np.uint8)
        self.uses = np.zeros(slots, np.uint8)  # estimated lookups of its row
        self.queue = np.zeros(slots, np.int32)  # ring of slots whose rows were admitted last
        self.cursors = np.zeros(4, np.int64)  # filled slots, clock hand, queue's start, queue's length
        self.now = self.counted = 0
        self.lookups = self.misses = self.evictions = 0

    def clear(self) -> None:
        self.map.fill(NONE)
        self.row.fill(NONE)
        self.dirty.fill(0)
        self.in_queue.fill(0)
        self.cursors.fill(0)

    def look_up(self, ids: np.ndarray) -> LookupResult:
        """Which of these rows are cached; valid until the next `admit_rows`. Any thread may call it."""
        self.now += 1
        self.counted += len(ids)
        if self.counted > LOOKUPS_PER_DECAY * self.slots:
            self.counts >>= 1
            self.uses >>= 1
            self.counted = 0
        slots, absent_at = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        count, present = _look_up(
            ids, self.map, self.row, self.counts, self.stamp, self.uses, self.now, slots, absent_at
        )
        return LookupResult(ids, slots, absent_at[:count], present)

    def admit_rows(
        self, ids: np.ndarray, will_update: bool, lookup: LookupResult | None = None
    ) -> AdmissionResult:
        """A slot for each of these rows (int64 [n], any order, repeats allowed).

        will_update: mark the rows as changed. lookup: made since the last `admit_rows`; ignored if it is of
        other ids. Raises CacheFull, with the cached rows unchanged, if there are more rows than slots.
        """
        if lookup is None or not np.array_equal(ids, lookup.ids):
            lookup = self.look_up(ids)
        if len(lookup.absent_at) + lookup.present > self.slots and len(np.unique(ids)) > self.slots:
            raise CacheFull(len(np.unique(ids)))
        missing, missing_slots, evicted = (np.empty(len(lookup.absent_at), np.int64) for _ in range(3))
        recent = np.zeros(len(missing), np.bool_)
        count = _assign_slots(
            ids, lookup.absent_at, self.map, self.row, self.counts, self.stamp, self.uses, self.in_queue,
            self.dirty, self.queue, self.cursors, self.now, lookup.slots, missing, missing_slots,
            evicted, recent,
        )  # fmt: skip
        if will_update:
            self.dirty[lookup.slots] = 1
        order, written = np.argsort(missing[:count]), np.argsort(evicted[:count])
        written = written[np.searchsorted(evicted[written], 0) :]  # negative: nothing to write
        self.lookups += len(ids)
        self.misses += count
        self.evictions += int((evicted[:count] != NONE).sum())
        return AdmissionResult(
            lookup.slots,
            missing[order],
            missing_slots[order],
            evicted[written],
            missing_slots[written],
            recent[written],
        )

    def find_absent(self, ids: np.ndarray) -> np.ndarray:
        """Those of these rows that are not cached, ascending; counts no lookup."""
        rows = np.empty(len(ids), np.int64)
        return np.unique(rows[: _list_absent(ids, self.map, self.row, rows)])

    def list_dirty_slots(self) -> np.ndarray:
        """Slots with rows that are newer than in the file."""
        return np.flatnonzero((self.dirty != 0) & (self.row >= 0))


@numba.njit(nogil=True, inline="always")
def _hash_row(row: Any) -> Any:
    product = np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((product ^ (product >> np.uint64(29))) >> np.uint64(1))


@compile_function
def _find_entry(map: np.ndarray, rows: np.ndarray, row: int) -> int:
    """Position of `row` in the map, or of the empty entry where it would be."""
    mask = len(map) - 1
    at = _hash_row(row) & mask
    while map[at] != -1 and rows[map[at]] != row:
        at = (at + 1) & mask
    return at


@compile_function
def _list_absent(ids: np.ndarray, map: np.ndarray, rows: np.ndarray, out: np.ndarray) -> int:
    """Write the ids that are not cached to `out`; returns how many."""
    count = 0
    for i in range(len(ids)):
        if map[_find_entry(map, rows, ids[i])] == -1:
            out[count] = ids[i]
            count += 1
    return count


@compile_function
def _remove_entry(map: np.ndarray, rows: np.ndarray, row: Any) -> None:
    """Remove an entry without a tombstone: entries behind it move up."""
    mask = len(map) - 1
    hole = _find_entry(map, rows, row)
    at = hole
    while True:
        at = (at + 1) & mask
        if map[at] == -1:
            break
        home = _hash_row(rows[map[at]]) & mask
        if ((at - home) & mask) >= ((at - hole) & mask):
            map[hole] = map[at]
            hole = at
    map[hole] = -1


@compile_function
def _count_lookups(counts: np.ndarray, row: Any, increment: Any) -> Any:
    """Upper estimate of a row's lookups so far: the lower of two counters, both shared with other rows."""
    mask = len(counts) - 1
    hashed = _hash_row(row)
    one, other = (hashed >> 20) & mask, (hashed >> 37) & mask
    least = min(counts[one], counts[other])
    if increment and least < MAX_USES:
        if counts[one] == least:
            counts[one] += 1
        if counts[other] == least and other != one:
            counts[other] += 1
    return least


@compile_function
def _look_up(
    ids: np.ndarray, map: np.ndarray, rows: np.ndarray, counts: np.ndarray, stamp: np.ndarray,
    uses: np.ndarray, now: int, out: np.ndarray, absent_at: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Write slots to `out`, positions of absent ids to `absent_at`. (Absent ids, different cached rows.)"""
    count = present = 0
    for i in range(len(ids)):
        before = _count_lookups(counts, ids[i], True)
        slot = map[_find_entry(map, rows, ids[i])]
        out[i] = slot
        if slot == -1:
            absent_at[count] = i
            count += 1
        else:
            uses[slot] = before + 1
            if stamp[slot] != now:
                stamp[slot] = now
                present += 1
    return count, present


@compile_function
def _find_least_used(
    stamp: np.ndarray, uses: np.ndarray, in_queue: np.ndarray, cursors: np.ndarray, now: int
) -> int:
    """The least used of the next VICTIM_CANDIDATES slots; -1 if this batch needs all of them."""
    best, least = -1, 256
    for _ in range(VICTIM_CANDIDATES):
        slot = cursors[1]
        cursors[1] = slot + 1 if slot + 1 < len(stamp) else 0
        if stamp[slot] != now and not in_queue[slot] and uses[slot] < least:
            best, least = slot, uses[slot]
    return best


@compile_function
def _pop_queue(in_queue: np.ndarray, queue: np.ndarray, cursors: np.ndarray) -> Any:
    """Take the first slot out of the queue. `cursors`: as in `RowCache`; [2] is the queue's start, [3] its
    length.
    """
    slot = queue[cursors[2]]
    cursors[2] = cursors[2] + 1 if cursors[2] + 1 < len(queue) else 0
    cursors[3] -= 1
    in_queue[slot] = 0
    return slot


@compile_function
def _choose_victim(
    stamp: np.ndarray, uses: np.ndarray, in_queue: np.ndarray, queue: np.ndarray, cursors: np.ndarray,
    now: int, own: int,
) -> tuple[Any, bool]:  # fmt: skip
    """(a slot that this batch does not need, whether its row was admitted recently).

    own: how many entries at the queue's end are this batch's.
    """
    while cursors[3] > own:
        slot = _pop_queue(in_queue, queue, cursors)
        if stamp[slot] == now:
            continue  # looked up again: it leaves the queue and stays cached
        best = _find_least_used(stamp, uses, in_queue, cursors, now)
        if best >= 0 and uses[slot] > uses[best]:
            return best, False
        return slot, True
    best = -1
    while best < 0:
        best = _find_least_used(stamp, uses, in_queue, cursors, now)
    return best, False


@compile_function
def _assign_slots(
    ids: np.ndarray, absent_at: np.ndarray, map: np.ndarray, rows: np.ndarray, counts: np.ndarray,
    stamp: np.ndarray, uses: np.ndarray, in_queue: np.ndarray, dirty: np.ndarray, queue: np.ndarray,
    cursors: np.ndarray, now: int, out: np.ndarray, missing: np.ndarray, slots: np.ndarray,
    evicted: np.ndarray, recent: np.ndarray,
) -> int:  # fmt: skip
    """A slot for each id at `absent_at`; returns how many different rows these are.

    out: gets the slot of each id. missing, slots: get the rows and their slots. evicted: gets the row that
    was in the slot before if it has to be written; -1: the slot was empty, -2: its row was not changed.
    """
    count = own = 0
    while cursors[3] > 2 * len(absent_at):  # entries of larger batches before
        _pop_queue(in_queue, queue, cursors)
    for n in range(len(absent_at)):
        row = ids[absent_at[n]]
        entry = _find_entry(map, rows, row)
        if map[entry] != -1:  # the same row a second time
            out[absent_at[n]] = map[entry]
            continue
        evicted[count] = -1
        if cursors[0] < len(rows):
            slot = cursors[0]
            cursors[0] += 1
        else:
            slot, recent[count] = _choose_victim(stamp, uses, in_queue, queue, cursors, now, own)
            evicted[count] = rows[slot] if dirty[slot] else -2
            _remove_entry(map, rows, rows[slot])
            entry = _find_entry(map, rows, row)
            end = cursors[2] + cursors[3]
            queue[end if end < len(queue) else end - len(queue)] = slot
            in_queue[slot] = 1
            cursors[3] += 1
            own += 1
        map[entry] = slot
        rows[slot] = row
        stamp[slot] = now
        uses[slot] = _count_lookups(counts, row, False)
        dirty[slot] = 0
        out[absent_at[n]] = slot
        missing[count] = row
        slots[count] = slot
        count += 1
    return count
