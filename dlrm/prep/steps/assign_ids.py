"""The step ids: maps each lane's id numbers to the dataset's ids: 2, 3, 4 ... in order of first appearance,
and 1 for rare ids.

Parsing has left a list per lane and column: its distinct ids in order of first appearance, and how often each
occurred. Reading the lanes' lists in order gives the order over the whole input. Columns are independent;
small ones use a hash table, giant ones a bitmap over all 2^32 ids.
"""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator

import numpy as np

from common.progress import StepProgress
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.kernels.intrinsics import compiled, count_ones
from dlrm.prep.kernels.vocabulary import Vocabulary
from dlrm.prep.steps.plan import PrepPlan
from dlrm.runtime import trace

PART = 1 << 16  # ids read at a time

FIRST_ID, RARE, GAP = 2, 1, 0  # GAP: id of an empty field, by NVIDIA's rules
_giant_lock = threading.Lock()
_giant_file = os.memfd_create("dlrm-giant-column")  # forks inherit it; a lock on it ends with its process


@contextlib.contextmanager
def _one_giant_column() -> Iterator[None]:
    """A giant column needs one or two gigabytes: one at a time in this process and its forks."""
    with _giant_lock:
        fcntl.lockf(_giant_file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(_giant_file, fcntl.LOCK_UN)


class ColumnMaps:
    """One column's id lists in the lanes' .ids files, and its maps in the lanes' .map files.

    An .ids file is uint32: the ids of all columns, then, if counted, their occurrences. A .map file is int32:
    for each of the ids the dataset's id. `sizes`: int64 [lanes, columns], the lists' lengths.
    """

    def __init__(self, plan: PrepPlan, sizes: np.ndarray, column: int) -> None:
        self.plan, self.column, self.lanes = plan, column, len(plan.lanes)
        self.sizes = sizes[:, column]
        self.offsets = sizes[:, :column].sum(axis=1)
        self.totals = sizes.sum(axis=1)

    def read_parts(self, counted: bool = False):
        """(lane, position in its list, ids, occurrences or None) in the order of the input."""
        for lane in range(self.lanes):
            with OffsetFile(self.plan.file_path("lane", lane, "ids")) as file:
                for at in range(0, int(self.sizes[lane]), PART):
                    count, begin = min(PART, int(self.sizes[lane]) - at), int(self.offsets[lane]) + at
                    ids = file.read_array(count, 4 * begin, np.uint32)
                    seen = None
                    if counted:
                        seen = file.read_array(count, 4 * (begin + int(self.totals[lane])), np.uint32)
                    yield lane, at, ids, seen

    def open_map(self, lane: int) -> OffsetFile:
        return OffsetFile(self.plan.file_path("lane", lane, "map"), "w")

    def write_map(self, file: OffsetFile, at: int, lane: int, numbers: np.ndarray) -> None:
        """Write part of a lane's map, from position `at` of its list on."""
        file.write(numbers.astype(np.int32, copy=False), 4 * (int(self.offsets[lane]) + at))

    def read_map(self, lane: int, at: int, count: int) -> np.ndarray:
        """int32 [count]: part of a lane's map, from position `at` of its list on."""
        with OffsetFile(self.plan.file_path("lane", lane, "map")) as file:
            return file.read_array(count, 4 * (int(self.offsets[lane]) + at), np.int32)


def merge_column(plan: PrepPlan, sizes: np.ndarray, column: int, progress: StepProgress) -> None:
    """Write a column's maps from the lanes' numbers to the dataset's ids, and how many ids it keeps.

    `sizes`: int64 [lanes, columns], how many ids each lane has found. A column that is done is skipped.
    """
    path = plan.file_path("column", column)
    if path.exists():
        return
    lists = ColumnMaps(plan, sizes, column)
    total = int(lists.sizes.sum())
    with trace.span("prep", "ids", bytes=4 * total, column=column):
        if plan.options.mod_idx:
            kept = keep_ids(lists, total > plan.options.bitmap_entries)
        elif total > plan.options.bitmap_entries:
            with _one_giant_column():
                kept = merge_giant(lists, plan.options.min_count, bool(plan.options.frequency_limit))
        else:
            kept = merge_small(lists, plan.options.min_count, bool(plan.options.frequency_limit))
    plan.save_json(path, {"kept": kept})
    progress.add(bytes=4 * total)


def merge_small(lists: ColumnMaps, least: int, gaps: bool) -> int:
    """Map a column by one hash table. Returns how many ids are kept.

    `least`: occurrences that an id needs to be kept. `gaps`: raw id 0, an empty field, becomes GAP. With
    either, the first pass writes provisional numbers and the second one replaces them by ids.
    """
    vocabulary, counting = Vocabulary(False, columns=1), least > 1
    totals = np.zeros(0, np.int64)
    for lane, at, ids, seen in lists.read_parts(counting):
        numbers = ids.copy()
        vocabulary.encode_columns(numbers[:, None], -1 if counting or gaps else FIRST_ID - 1)
        with lists.open_map(lane) as file:
            lists.write_map(file, at, lane, numbers.view(np.int32))
        if seen is not None:
            size = vocabulary.count_ids()[0]
            if size > len(totals):
                totals = np.concatenate([totals, np.zeros(size, np.int64)])
            totals[numbers] += seen  # each id is in a lane's list once, so no index is repeated
    size = vocabulary.count_ids()[0]
    if not counting and not gaps:
        return size
    kept = totals[:size] >= least if counting else np.ones(size, bool)
    values = vocabulary.list_ids(0)
    if gaps:
        kept &= values != 0
    final = np.where(kept, FIRST_ID - 1 + np.cumsum(kept), RARE).astype(np.int32)
    if gaps:
        final[values == 0] = GAP
    for lane, at, ids, _ in lists.read_parts():
        numbers = lists.read_map(lane, at, len(ids))
        with lists.open_map(lane) as file:
            lists.write_map(file, at, lane, final[numbers])
    return int(kept.sum())


def keep_ids(lists: ColumnMaps, giant: bool) -> int:
    """OneFlow's ids: maps keep the ids that the text has, for `oneflow_ids`. Returns how many different ones
    occur. `giant`: a gigabyte of bitmap counts them, else a list that is sorted.
    """
    seen: list[np.ndarray] = []
    with _one_giant_column() if giant else contextlib.nullcontext():
        words = np.zeros(WORDS if giant else 0, np.uint64)
        for lane, at, ids, _ in lists.read_parts():
            if giant:
                mark_seen(words, ids)
            else:
                seen.append(ids)
            with lists.open_map(lane) as file:
                lists.write_map(file, at, lane, ids.view(np.int32))
        return number_words(words) if giant else len(np.unique(np.concatenate(seen)))


# The bitmap of 2^32 ids: 32 ids per 64-bit word. The low half marks the kept ids, the high half has the
# number of kept ids in the words before.
WORDS = 1 << 27


@compiled
def mark_seen(words, ids):
    for id in ids:
        words[id >> np.uint32(5)] |= np.uint64(1) << np.uint64(id & np.uint32(31))


@compiled
def add_counts(counters, low, ids, seen, most):
    """Add occurrences to the counters of the ids low .. low + len(counters), up to `most`."""
    for k in range(len(ids)):
        at = np.int64(ids[k]) - low
        if 0 <= at < len(counters):
            counters[at] = min(np.int64(most), np.int64(counters[at]) + np.int64(seen[k]))


@compiled
def mark_kept(words, counters, low, least):
    """Mark in the bitmap `words` the ids low .. low + len(counters) that occur at least `least` times."""
    for at in range(len(counters)):
        if counters[at] >= least:
            id = low + at
            words[id >> 5] |= np.uint64(1) << np.uint64(id & 31)


@compiled
def number_words(words):
    """Set the high half of each word. Returns the number of kept ids."""
    before = np.uint64(0)
    for at in range(len(words)):
        marks = words[at]
        words[at] = (before << np.uint64(32)) | marks
        before += np.uint64(count_ones(marks))
    return np.int64(before)


@compiled
def assign_numbers(words, given, used, ids, numbers):
    """Write the dataset's ids of `ids` to `numbers`; a kept id that appears for the first time gets the next
    one.

    `given`: int32 [kept], the dataset's id of each kept id, 0 if it has none yet. `used`: how many have one;
    returns the new value.
    """
    for k in range(len(ids)):
        word = words[ids[k] >> np.uint32(5)]
        bit = np.uint64(1) << np.uint64(ids[k] & np.uint32(31))
        if word & bit:
            rank = np.int64(word >> np.uint64(32)) + count_ones(word & (bit - np.uint64(1)))
            if given[rank] == 0:
                given[rank] = FIRST_ID + used
                used += 1
            numbers[k] = given[rank]
        else:
            numbers[k] = RARE
    return used


def merge_giant(lists: ColumnMaps, least: int, gaps: bool) -> int:
    """Like `merge_small`, with the bitmap. Memory: 1 GiB, another 1 GiB while ids are counted, 4 bytes per
    kept id.

    Ids are counted in ranges, as many as counters fit into the second GiB; each range reads all lists.
    """
    words = np.zeros(WORDS, np.uint64)
    if least <= 1:
        for _, _, ids, _ in lists.read_parts():
            mark_seen(words, ids)
    else:
        kind = np.uint8 if least <= 255 else np.uint32
        span = (1 << 30) // np.dtype(kind).itemsize
        most = np.iinfo(kind).max
        for low in range(0, 1 << 32, span):
            counters = np.zeros(span, kind)
            for _, _, ids, seen in lists.read_parts(True):
                add_counts(counters, low, ids, seen, most)
            mark_kept(words, counters, low, least)
        del counters
    if gaps:
        words[0] &= ~np.uint64(1)
    kept = number_words(words)
    given, used = np.zeros(kept, np.int32), 0
    for lane, at, ids, _ in lists.read_parts():
        numbers = np.empty(len(ids), np.int32)
        used = assign_numbers(words, given, used, ids, numbers)
        if gaps:
            numbers[ids == 0] = GAP
        with lists.open_map(lane) as file:
            lists.write_map(file, at, lane, numbers)
    return kept
