"""The lanes' ids to the dataset's: 2, 3, 4 ... in order of first appearance, 1 for the rare ones.

Each lane knows its distinct ids in the order it met them, and how often. Going through the lanes in order
gives the order over the whole input. One column at a time; small ones by hash table, giant ones by bitmap.
"""

import threading

import numpy as np

from dlrm.prep.io.files import OffsetFile
from dlrm.prep.job.progress import PrepProgress
from dlrm.prep.kernels.intrinsics import compiled, ones
from dlrm.prep.kernels.vocabulary import Vocabulary
from dlrm.prep.steps.plan import PrepPlan
from dlrm.runtime import trace

PART = 1 << 16  # ids at a time

FIRST_ID, RARE, GAP = 2, 1, 0
_one_giant = threading.Lock()  # a gigabyte or two each: one at a time in a process


class ColumnMaps:
    """One column's lists in the lanes' files, and the maps that are written for them."""

    def __init__(self, plan: PrepPlan, sizes: np.ndarray, column: int) -> None:
        self.plan, self.column, self.lanes = plan, column, len(plan.lanes)
        self.sizes = sizes[:, column]
        self.offsets = sizes[:, :column].sum(axis=1)
        self.totals = sizes.sum(axis=1)

    def parts(self, counted: bool = False):
        """(lane, position in its list, ids, counts or None) in order."""
        for lane in range(self.lanes):
            with OffsetFile(self.plan.path("lane", lane, "ids")) as file:
                for at in range(0, int(self.sizes[lane]), PART):
                    count, begin = min(PART, int(self.sizes[lane]) - at), int(self.offsets[lane]) + at
                    ids = file.read_array(count, 4 * begin, np.uint32)
                    seen = None
                    if counted:
                        seen = file.read_array(count, 4 * (begin + int(self.totals[lane])), np.uint32)
                    yield lane, at, ids, seen

    def writer(self, lane: int) -> OffsetFile:
        return OffsetFile(self.plan.path("lane", lane, "map"), "w")

    def write(self, file: OffsetFile, at: int, lane: int, numbers: np.ndarray) -> None:
        file.write(numbers.astype(np.int32, copy=False), 4 * (int(self.offsets[lane]) + at))

    def numbers(self, lane: int, at: int, count: int) -> np.ndarray:
        with OffsetFile(self.plan.path("lane", lane, "map")) as file:
            return file.read_array(count, 4 * (int(self.offsets[lane]) + at), np.int32)


def merge_column(plan: PrepPlan, sizes: np.ndarray, column: int, progress: PrepProgress) -> None:
    path = plan.path("column", column)
    if path.exists():
        return
    lists = ColumnMaps(plan, sizes, column)
    total = int(lists.sizes.sum())
    with trace.span("prep", "ids", bytes=4 * total, column=column):
        if plan.options.mod_idx:
            kept = merge_moduli(lists, plan.options.mod_idx)
        elif total > plan.options.giant:
            with _one_giant:
                kept = merge_giant(lists, plan.options.min_count, bool(plan.options.frequency_limit))
        else:
            kept = merge_small(lists, plan.options.min_count, bool(plan.options.frequency_limit))
    plan.save_json(path, {"kept": kept})
    progress.add(bytes=4 * total)


def merge_small(lists: ColumnMaps, least: int, gaps: bool) -> int:
    """Through one hash table; numbers first, ids when all counts are known."""
    vocabulary, counting = Vocabulary(False, columns=1), least > 1
    totals = np.zeros(0, np.int64)
    for lane, at, ids, seen in lists.parts(counting):
        numbers = ids.copy()
        vocabulary.encode(numbers[:, None], -1 if counting or gaps else FIRST_ID - 1)
        with lists.writer(lane) as file:
            lists.write(file, at, lane, numbers.view(np.int32))
        if seen is not None:
            size = vocabulary.sizes()[0]
            if size > len(totals):
                totals = np.concatenate([totals, np.zeros(size, np.int64)])
            totals[numbers] += seen  # an id stands once in a lane's list
    size = vocabulary.sizes()[0]
    if not counting and not gaps:
        return size
    kept = totals[:size] >= least if counting else np.ones(size, bool)
    values = vocabulary.ids(0)
    if gaps:
        kept &= values != 0
    final = np.where(kept, FIRST_ID - 1 + np.cumsum(kept), RARE).astype(np.int32)
    if gaps:
        final[values == 0] = GAP
    for lane, at, ids, _ in lists.parts():
        numbers = lists.numbers(lane, at, len(ids))
        with lists.writer(lane) as file:
            lists.write(file, at, lane, final[numbers])
    return int(kept.sum())


def merge_moduli(lists: ColumnMaps, modulo: int) -> int:
    """OneFlow's ids: the hash modulo N, each column in its own range. Returns how many there are."""
    seen = np.zeros(modulo, bool)
    for lane, at, ids, _ in lists.parts():
        seen[ids] = True
        with lists.writer(lane) as file:
            lists.write(file, at, lane, ids.view(np.int32) + modulo * lists.column)
    return int(seen.sum())


WORDS = 1 << 27  # 2^32 ids, 32 to a word: its low half marks the kept ids, its high half counts those before


@compiled
def mark_seen(words, ids):
    for id in ids:
        words[id >> np.uint32(5)] |= np.uint64(1) << np.uint64(id & np.uint32(31))


@compiled
def add_counts(counters, low, ids, seen, most):
    """Saturating counters for the ids low .. low + len(counters)."""
    for k in range(len(ids)):
        at = np.int64(ids[k]) - low
        if 0 <= at < len(counters):
            counters[at] = min(np.int64(most), np.int64(counters[at]) + np.int64(seen[k]))


@compiled
def mark_kept(words, counters, low, least):
    for at in range(len(counters)):
        if counters[at] >= least:
            id = low + at
            words[id >> 5] |= np.uint64(1) << np.uint64(id & 31)


@compiled
def number_words(words):
    """Each word's high half: how many kept ids come before it. Returns how many there are."""
    before = np.uint64(0)
    for at in range(len(words)):
        marks = words[at]
        words[at] = (before << np.uint64(32)) | marks
        before += np.uint64(ones(marks))
    return np.int64(before)


@compiled
def assign_numbers(words, given, used, ids, numbers):
    """The next id for each first appearance; returns how many are used."""
    for k in range(len(ids)):
        word = words[ids[k] >> np.uint32(5)]
        bit = np.uint64(1) << np.uint64(ids[k] & np.uint32(31))
        if word & bit:
            rank = np.int64(word >> np.uint64(32)) + ones(word & (bit - np.uint64(1)))
            if given[rank] == 0:
                given[rank] = FIRST_ID + used
                used += 1
            numbers[k] = given[rank]
        else:
            numbers[k] = RARE
    return used


def merge_giant(lists: ColumnMaps, least: int, gaps: bool) -> int:
    """Memory: 1 GiB, another for counters while there is a threshold, then 4 bytes per kept id."""
    words = np.zeros(WORDS, np.uint64)
    if least <= 1:
        for _, _, ids, _ in lists.parts():
            mark_seen(words, ids)
    else:
        kind = np.uint8 if least <= 255 else np.uint32
        span = (1 << 30) // np.dtype(kind).itemsize
        most = np.iinfo(kind).max
        for low in range(0, 1 << 32, span):
            counters = np.zeros(span, kind)
            for _, _, ids, seen in lists.parts(True):
                add_counts(counters, low, ids, seen, most)
            mark_kept(words, counters, low, least)
        del counters
    if gaps:
        words[0] &= ~np.uint64(1)
    kept = number_words(words)
    given, used = np.zeros(kept, np.int32), 0
    for lane, at, ids, _ in lists.parts():
        numbers = np.empty(len(ids), np.int32)
        used = assign_numbers(words, given, used, ids, numbers)
        if gaps:
            numbers[ids == 0] = GAP
        with lists.writer(lane) as file:
            lists.write(file, at, lane, numbers)
    return kept
