"""The steps translate and place: puts the records of a bucket in order in memory, then writes them in long
writes.
"""

import functools
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import UserError, printable
from common.owned import discard_file, finish_file
from common.progress import StepProgress
from dlrm.data.criteo import Columns
from dlrm.prep.io.files import OffsetFile, write_atomically
from dlrm.prep.io.output import store_rows
from dlrm.prep.io.spill import count_record_bytes, count_words
from dlrm.prep.job.options import MISSING
from dlrm.prep.kernels.intrinsics import compiled, copy_words, load32, prefetch, store32, subtract_words
from dlrm.prep.steps.plan import PrepPlan
from dlrm.runtime import trace

PART_RECORDS = 1 << 14  # records read at a time
OTHER_FILES = 256  # file descriptors kept free for everything else
AHEAD = 6  # rows that are prefetched: each is in about five cache lines
LINE = 64  # bytes of a cache line


@functools.cache
def make_placer(columns: Columns) -> Any:
    """`place_records`, compiled for records of these columns."""
    numerical, categorical, words = columns.numerical, columns.categorical, count_words(columns)
    first_id = 1 + numerical  # word of a record
    count_bytes, id_bytes = 4 * numerical, 4 * categorical

    @compiled
    def place_records(records, offsets, maps, mapped, shift, gaps, dense, sparse, labels):
        """Copy each record to its row of dense, sparse and labels, all int32 [rows, columns].

        `shift` is subtracted from the counts; with `gaps`, MISSING is kept. With `mapped`, the id of column c
        becomes maps[offsets[c] + id]. The rows are the records' own; they are not checked.
        """
        counts_at, ids_at, labels_at = dense.ctypes.data, sparse.ctypes.data, labels.ctypes.data
        map_at, record = maps.ctypes.data, records.ctypes.data
        for k in range(len(records)):
            if k + AHEAD < len(records):
                row = np.int64(load32(record, AHEAD * words))
                for at in range(0, count_bytes, LINE):
                    prefetch(counts_at + count_bytes * row + at)
                prefetch(counts_at + count_bytes * row + count_bytes - 4)
                for at in range(0, id_bytes, LINE):
                    prefetch(ids_at + id_bytes * row + at)
                prefetch(ids_at + id_bytes * row + id_bytes - 4)
                prefetch(labels_at + 4 * row)
            row = np.int64(load32(record, 0))
            if gaps:
                for column in range(numerical):
                    value = np.int32(load32(record, 1 + column))
                    dense[row, column] = value if value == MISSING else np.int32(value - shift)
            else:
                subtract_words(counts_at + count_bytes * row, record + 4, shift, numerical)
            if mapped:
                for column in range(categorical):
                    id = load32(map_at, offsets[column] + load32(record, first_id + column))
                    store32(ids_at + id_bytes * row, column, id)
            else:
                copy_words(ids_at + id_bytes * row, record + 4 * first_id, categorical)
            store32(labels_at, row, load32(record, words - 1))
            record += 4 * words

    return place_records


@compiled
def translate_ids(records, first_id, offsets, maps):
    """Replace the ids of column c in the records, from word `first_id` on, by maps[offsets[c] + id]."""
    for k in range(len(records)):
        for column in range(len(offsets) - 1):
            at = first_id + column
            records[k, at] = np.uint32(maps[offsets[column] + records[k, at]])


@dataclass
class IdMaps:
    """The maps from each lane's id numbers to the dataset's ids, in memory."""

    offsets: list[np.ndarray]  # per lane: int64 [columns + 1], where each column begins in its values
    values: list[np.ndarray]  # per lane: int32, the dataset's ids


def load_map(plan: PrepPlan, sizes: np.ndarray, lane: int) -> tuple[np.ndarray, np.ndarray]:
    """A lane's part of `IdMaps`: (offsets, values). `sizes`: int64 [lanes, columns], ids of each."""
    offsets = np.concatenate([[0], np.cumsum(sizes[lane])])
    if not offsets[-1]:  # a lane with no valid row has no map file
        return offsets, np.zeros(0, np.int32)
    with OffsetFile(plan.file_path("lane", lane, "map")) as file:
        return offsets, file.read_array(int(offsets[-1]), 0, np.int32)


def load_maps(plan: PrepPlan, sizes: np.ndarray) -> IdMaps:
    found = [load_map(plan, sizes, lane) for lane in range(len(plan.lanes))]
    return IdMaps([offsets for offsets, _ in found], [values for _, values in found])


def read_records(
    file: OffsetFile, begin: int, count: int, buffer: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """(record number, records) in parts; `buffer`, uint32 [n, words], is reused for each."""
    for at in range(begin, begin + count, len(buffer)):
        part = buffer[: min(len(buffer), begin + count - at)]
        got = file.read_into(part.data.cast("B"), at * part[:1].nbytes)
        if got != part.nbytes:
            raise UserError(f"{printable(file.path)}: shorter than it should be; start again with --restart")
        yield at, part


def translate_piece(
    plan: PrepPlan, sizes: np.ndarray, lane: int, number: int, progress: StepProgress
) -> None:
    """Rewrite a piece's records with the dataset's ids, where all maps together are too large for memory."""
    final, spill = plan.file_path("piece", number, "final"), plan.file_path("piece", number, "spill")
    rows = plan.pieces[number].rows
    if not final.exists() and rows:
        partial = plan.file_path("piece", number, "rewritten")
        offsets, values = load_map(plan, sizes, lane)
        columns = plan.options.columns
        record_bytes = count_record_bytes(columns)
        buffer = np.empty((PART_RECORDS, count_words(columns)), np.uint32)
        with (
            trace.span("prep", "translate", bytes=rows * record_bytes),
            OffsetFile(spill) as source,
            OffsetFile(partial, "w") as target,
        ):
            target.resize(0)
            for at, records in read_records(source, 0, rows, buffer):
                translate_ids(records, 1 + columns.numerical, offsets, values)
                target.write(records, at * record_bytes)
                progress.add(len(records), 2 * records.nbytes)
        finish_file(partial, final)
    discard_file(spill)


def reserve_open_files(files: int) -> int:
    """How many of this number of files can be open at once, after raising the soft limit as far as needed."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + OTHER_FILES
    if 0 <= hard < wanted:
        wanted = hard
    if 0 <= limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(0, min(files, wanted - OTHER_FILES))


class Placer:
    """Writes buckets to the output files. All ranks write to the same files, each bucket to its own range.

    `maps`: ids are mapped while rows are placed; None if they are final already (raw, or translated before).
    """

    def __init__(self, plan: PrepPlan, maps: IdMaps | None, progress: StepProgress) -> None:
        self.plan, self.maps, self.progress = plan, maps, progress
        self.columns = plan.options.columns
        self._place_records = make_placer(self.columns)
        self._own = threading.local()
        self._opened: list[OffsetFile] = []
        self.most_open = reserve_open_files(len(plan.pieces) * plan.options.workers) // plan.options.workers
        self.lane_of = {piece: lane for lane, pieces in enumerate(plan.lanes) for piece in pieces}
        self.shifts = plan.find_log_shifts()
        ending = "spill" if maps is not None or not plan.options.contiguous else "final"
        self.spills = [plan.file_path("piece", number, ending) for number in range(len(plan.pieces))]
        self.runs = []
        for number, piece in enumerate(plan.pieces):
            runs = np.zeros(2, np.int64)
            if piece.rows:
                with OffsetFile(plan.file_path("piece", number, "runs")) as file:
                    runs = file.read_array(file.size // runs.itemsize, 0, runs.dtype)
            self.runs.append((int(runs[0]), runs[1:]))

    def place_bucket(self, number: int) -> None:
        done = self.plan.file_path("bucket", number, "done")
        if done.exists():
            return
        begin = number << self.plan.bits
        rows = min(self.plan.rows, begin + (1 << self.plan.bits)) - begin
        size = rows * count_record_bytes(self.columns)
        with trace.span("prep", "place", bytes=size):
            arrays = self._gather_bucket(number, rows)
            self.write_rows(begin, *arrays)
        write_atomically(done, b"")
        self.progress.add(rows, size)

    def _get_buffers(self) -> tuple[np.ndarray, ...]:
        """Dense, sparse, labels and a read buffer. Each thread reuses its own, to save page faults."""
        if not hasattr(self._own, "buffers"):
            rows = min(self.plan.rows, 1 << self.plan.bits)
            buffers = [np.empty((rows, count), np.int32) for count in self.columns.parts.values()]
            self._own.buffers = (*buffers, np.empty((PART_RECORDS, count_words(self.columns)), np.uint32))
        return self._own.buffers

    @contextmanager
    def _open_spill(self, piece: int) -> Iterator[OffsetFile]:
        """A piece's spill file. Each thread keeps its own open, up to `most_open`: every bucket reads them
        all.
        """
        if not hasattr(self._own, "files"):
            self._own.files = {}
        kept = self._own.files
        if piece not in kept and len(kept) >= self.most_open:
            with OffsetFile(self.spills[piece]) as file:
                yield file
            return
        if piece not in kept:
            kept[piece] = OffsetFile(self.spills[piece])
            self._opened.append(kept[piece])
        yield kept[piece]

    def close(self) -> None:
        """The files that this process has opened."""
        for file in self._opened:
            file.close()

    def _gather_bucket(self, number: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(dense, sparse, labels) of a bucket's rows in order, in this thread's buffers."""
        dense, sparse, labels, buffer = self._get_buffers()
        dense, sparse, labels = dense[:rows], sparse[:rows], labels[:rows]
        gaps = bool(self.plan.options.frequency_limit)
        for piece, (first, runs) in enumerate(self.runs):
            at = number - first
            if not 0 <= at < len(runs) - 1 or runs[at] == runs[at + 1]:
                continue
            lane, shift = self.lane_of[piece], np.int32(self.shifts[self.plan.pieces[piece].source])
            offsets = self.maps.offsets[lane] if self.maps else np.zeros(1, np.int64)
            values = self.maps.values[lane] if self.maps else np.zeros(1, np.int32)
            with self._open_spill(piece) as file:
                for _, records in read_records(file, int(runs[at]), int(runs[at + 1] - runs[at]), buffer):
                    self._place_records(
                        records, offsets, values, self.maps is not None, shift, gaps, dense, sparse, labels
                    )
        return dense, sparse, labels

    def write_rows(self, begin: int, dense: np.ndarray, sparse: np.ndarray, labels: np.ndarray) -> None:
        """Write a bucket, the rows from `begin` of the output on; arrays as in `store_rows`."""
        plan = self.plan
        store_rows(
            plan.folders.unfinished, plan.options, plan.outputs, plan.shuffled_rows, begin,
            dense, sparse, labels,
        )  # fmt: skip
