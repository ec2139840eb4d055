"""The steps count and parse: text to records in spill files, and each lane's ids in order of first
appearance.
"""

import threading
from collections.abc import Callable

import numpy as np

from common.errors import UserError, printable
from common.progress import StepProgress
from dlrm.prep.io.blocks import InputPiece, LineScanner, count_rows
from dlrm.prep.io.files import OffsetFile, write_atomically
from dlrm.prep.io.inputs import InputFile
from dlrm.prep.io.odd_lines import LineRules
from dlrm.prep.io.spill import SpillFile
from dlrm.prep.job.options import MISSING, PrepOptions
from dlrm.prep.kernels.intrinsics import compiled
from dlrm.prep.kernels.vocabulary import Vocabulary
from dlrm.prep.steps.plan import PrepPlan
from dlrm.runtime import trace


def make_line_rules(options: PrepOptions, source: InputFile) -> LineRules:
    return LineRules(options.lenient, source.labelled, options.modulus, options.empty_dense, options.columns)


def count_piece(plan: PrepPlan, number: int, progress: StepProgress) -> None:
    """Save how many rows and lines a piece has, unless an earlier run has done so."""
    path, piece = plan.file_path("count", number), plan.pieces[number]
    if path.exists():
        return
    source, options = plan.sources[piece.source], plan.options
    with (
        trace.span("prep", "count", bytes=piece.end - piece.begin),
        OffsetFile(plan.texts[piece.source]) as file,
    ):
        rows, lines = count_rows(
            file, piece, printable(source.path), make_line_rules(options, source), options.skip_bad_rows
        )
    plan.save_json(path, [rows, lines])
    progress.add(rows, piece.end - piece.begin)


class LaneParser:
    """Parses lanes. Each thread reuses one vocabulary for all its lanes, because fresh memory costs page
    faults.
    """

    def __init__(self, plan: PrepPlan, progress: StepProgress) -> None:
        self.plan, self.progress = plan, progress
        self._own = threading.local()

    def parse_once(self, lane: int) -> None:
        if self.plan.file_path("lane", lane).exists():
            return
        if not self.plan.options.contiguous:
            parse_lane(self.plan, lane, None, self.progress)
            return
        if not hasattr(self._own, "vocabulary"):
            options = self.plan.options
            self._own.vocabulary = Vocabulary(options.min_count > 1, options.columns.categorical)
        self._own.vocabulary.clear()
        parse_lane(self.plan, lane, self._own.vocabulary, self.progress)


def parse_lane(plan: PrepPlan, lane: int, vocabulary: Vocabulary | None, progress: StepProgress) -> None:
    """Write the spill files of a lane's pieces, its id lists, and a summary. Without a vocabulary ids stay
    raw.
    """
    path, options = plan.file_path("lane", lane), plan.options
    categorical = options.columns.categorical
    ranges, skipped, last_ids = [], [], np.zeros(categorical, np.int64)
    size = sum(plan.pieces[number].end - plan.pieces[number].begin for number in plan.lanes[lane])
    with trace.span("prep", "parse", bytes=size):
        for number in plan.lanes[lane]:
            low_high, scanner = parse_piece(plan, number, vocabulary, last_ids, progress)
            ranges.append(low_high)
            if scanner.skipped:
                skipped.append([scanner.skipped, scanner.first_bad])
    sizes = [0] * categorical
    if vocabulary:
        sizes = vocabulary.count_ids()
        lists = [vocabulary.list_ids(column) for column in range(categorical)]
        if options.min_count > 1:
            lists += [vocabulary.list_occurrences(column) for column in range(categorical)]
        write_atomically(plan.file_path("lane", lane, "ids"), np.concatenate(lists))
    plan.save_json(path, {"vocab": sizes, "dense": ranges, "skipped": skipped, "last": last_ids.tolist()})


def parse_piece(
    plan: PrepPlan, number: int, vocabulary: Vocabulary | None, last_ids: np.ndarray, progress: StepProgress
) -> tuple[list[int], LineScanner]:
    """Write the spill file of one piece. Returns ([smallest, largest count], the scanner with its bad lines).

    `last_ids`: int64 [categorical], raised to the largest raw ids where there is no vocabulary.
    """
    piece, options = plan.pieces[number], plan.options
    source = plan.sources[piece.source]
    low_high = np.array([1 << 40, -(1 << 40)])
    with (
        OffsetFile(plan.texts[piece.source]) as text,
        OffsetFile(plan.file_path("piece", number, "spill"), "w") as file,
        Destinations(plan, piece) as places,
    ):
        file.resize(0)
        scanner = LineScanner(
            text, printable(source.path), piece, make_line_rules(options, source), options.skip_bad_rows
        )
        spill = SpillFile(file, places.read, piece.rows, plan.bits, options.columns) if piece.rows else None
        for block, consumed in scanner.read_blocks():
            if spill is None or spill.done + block.rows > piece.rows:
                raise UserError(f"{printable(source.path)}: has changed since its rows were counted")
            widen_range(block.dense, block.rows, MISSING if options.frequency_limit else 1 << 40, low_high)
            if vocabulary:
                vocabulary.encode_columns(block.sparse[: block.rows])
            else:
                np.maximum(last_ids, block.sparse[: block.rows].max(axis=0), out=last_ids)
            spill.add_block(block)
            progress.add(block.rows, consumed)
        if spill:
            if spill.done != piece.rows:
                raise UserError(f"{printable(source.path)}: has changed since its rows were counted")
            spill.write_rest()
            runs = np.concatenate([[spill.first], spill.runs])
            write_atomically(plan.file_path("piece", number, "runs"), runs)
    return low_high.tolist(), scanner


@compiled
def widen_range(dense, rows, missing, low_high):
    """Update low_high, int64 [2], the smallest and the largest count, from dense, int32 [rows, counts]; those
    equal to `missing` are ignored.
    """
    low, high = low_high[0], low_high[1]
    for row in range(rows):
        for column in range(dense.shape[1]):
            value = np.int64(dense[row, column])
            if value != missing:
                low, high = min(low, value), max(high, value)
    low_high[0], low_high[1] = low, high


class Destinations:
    """The output rows of a piece's rows: from the permutation's file for rows that are shuffled; the others
    keep their position. `read(begin, rows)` returns them as int64.
    """

    def __init__(self, plan: PrepPlan, piece: InputPiece) -> None:
        self._first, self._shuffled = piece.first_row, plan.shuffled_rows
        self._file = (
            OffsetFile(plan.file_path("places", 0, "u32")) if piece.first_row < plan.shuffled_rows else None
        )
        self.read: Callable[[int, int], np.ndarray] = self._read_places

    def __enter__(self) -> "Destinations":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def _read_places(self, begin: int, rows: int) -> np.ndarray:
        begin += self._first
        count = max(0, min(rows, self._shuffled - begin))
        unshuffled = np.arange(begin + count, begin + rows, dtype=np.int64)
        if not count or not self._file:
            return unshuffled
        shuffled = self._file.read_array(count, begin * 4, np.uint32)
        return np.concatenate([shuffled.astype(np.int64), unshuffled]) if len(unshuffled) else shuffled
