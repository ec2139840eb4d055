"""torchrec's scripts one at a time, with their arguments and their bytes; the third is in `reorder`.

`run` is the better way: one pass less over the data, resumable, and its memory does not grow with the ids.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dlrm import trace
from dlrm.criteo import NUM_DENSE, NUM_SPARSE, part_name
from dlrm.errors import UserError
from dlrm.prep import publish, sources
from dlrm.prep.check import layout
from dlrm.prep.files import File
from dlrm.prep.native import compiled
from dlrm.prep.rows import Rules
from dlrm.prep.scan import BLOCK_ROWS, STRIDE, Piece, Scanner, count
from dlrm.prep.vocab import Vocabulary
from dlrm.prep.work import line_end

BATCH = 8 * BLOCK_ROWS
LENIENT = Rules(lenient=True)


@contextmanager
def whole_file(path: Path) -> Iterator[File]:
    """Grows as `.partial`, has its name when it is complete."""
    partial = path.with_name(path.name + publish.PARTIAL)
    with File(partial, "w") as file:
        file.resize(0)
        yield file
    os.replace(partial, path)


@compiled
def unpack(dense, sparse, rows, at, counts, ids, labels):
    """A block into row-major arrays from row `at` on."""
    for row in range(rows):
        for column in range(NUM_DENSE):
            counts[at + row, column] = dense[row, column]
        for column in range(NUM_SPARSE):
            ids[at + row, column] = sparse[column, row]
        labels[at + row, 0] = dense[row, NUM_DENSE]


def parse(input_dir: Path, output_dir: Path, dataset: str = "", workers: int = 1) -> None:
    """npy_preproc_criteo: TSV to float32 logarithms, int64 hashes, int32 labels."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for source in sources.find(input_dir, dataset):
        size = source.path.stat().st_size
        with trace.span("prep", "parse", bytes=size):
            parse_file(source, output_dir, workers)


def parse_file(source: sources.Source, folder: Path, workers: int) -> None:
    rules = Rules(lenient=True, labelled=source.labelled)
    with (
        whole_file(folder / f"{source.name}_dense.npy") as dense,
        whole_file(folder / f"{source.name}_sparse.npy") as sparse,
        whole_file(folder / f"{source.name}_labels.npy") as labels,
        ThreadPoolExecutor(workers) as pool,
    ):
        pieces = cut(source, rules, workers, pool)

        def one(piece: Piece) -> tuple[int, int]:
            return parse_piece(source, piece, rules, (dense, sparse, labels))

        done = list(pool.map(one, pieces))
        rows, low = sum(count for count, _ in done), min(low for _, low in done)
        if not rows:
            raise UserError(f"{source.path}: no rows in it")
        shift = np.int64(low - 2).astype(np.int32)
        list(
            pool.map(lambda at: log_rows(dense.path, at, min(BATCH, rows - at), shift), range(0, rows, BATCH))
        )
        for file, columns, dtype in (
            (dense, NUM_DENSE, "<f4"),
            (sparse, NUM_SPARSE, "<i8"),
            (labels, 1, "<i4"),
        ):
            file.write(publish.header((rows, columns), dtype), 0)


def cut(source: sources.Source, rules: Rules, workers: int, pool: ThreadPoolExecutor) -> list[Piece]:
    """One piece for one worker; several, counted so that each knows its first row, for more."""
    size = source.path.stat().st_size
    if workers == 1:
        return [Piece(0, 0, size, rows=0)]
    with File(source.path) as file:
        ends = sorted({line_end(file, size * part // (4 * workers), size) for part in range(1, 4 * workers)})
    pieces = [
        Piece(0, begin, end) for begin, end in zip([0, *ends], [*ends, size], strict=True) if begin < end
    ]

    def one(piece: Piece) -> tuple[int, int]:
        with File(source.path) as file:
            return count(file, piece, str(source.path), rules, skip_bad=False)

    row = line = 0
    for piece, (rows, lines) in zip(pieces, pool.map(one, pieces), strict=True):
        piece.first_row, piece.first_line = row, line
        row, line = row + rows, line + lines
    return pieces


def parse_piece(
    source: sources.Source, piece: Piece, rules: Rules, files: tuple[File, ...]
) -> tuple[int, int]:
    """(rows, smallest count). Counts are written raw; the logarithm needs the whole file's minimum."""
    arrays = [np.empty((BATCH, NUM_DENSE), np.int32), np.empty((BATCH, NUM_SPARSE), np.int64),
              np.empty((BATCH, 1), np.int32)]  # fmt: skip
    held, row, low = 0, piece.first_row, 1 << 40

    def flush() -> None:
        for file, array in zip(files, arrays, strict=True):
            width = array.itemsize * array.shape[1]
            file.write(array[:held], publish.HEADER_BYTES + row * width)

    with File(source.path) as text:
        for block, _ in Scanner(text, str(source.path), piece, rules, skip_bad=False).blocks():
            if held + block.rows > BATCH:
                low = min(low, int(arrays[0][:held].min()))
                flush()
                row, held = row + held, 0
            unpack(block.dense, block.sparse, block.rows, held, *arrays)
            held += block.rows
    if held:
        low = min(low, int(arrays[0][:held].min()))
        flush()
    return row + held - piece.first_row, low


def log_rows(path: Path, at: int, rows: int, shift: np.int32) -> None:
    """torchrec's log(x - min + 2), in place."""
    offset = publish.HEADER_BYTES + at * NUM_DENSE * 4
    with File(path) as file, File(path, "w") as out, np.errstate(all="ignore"):
        counts = file.read_array(rows * NUM_DENSE, offset, np.int32) - shift
        floats = counts.astype(np.float32)
        out.write(np.log(floats, out=floats), offset)


@compiled
def columns_of(rows, sparse):
    """Row-major hashes to columns; False when one is no 32-bit id."""
    good = True
    for row in range(len(rows)):
        for column in range(NUM_SPARSE):
            value = rows[row, column]
            good &= 0 <= value < 1 << 32
            sparse[column, row] = np.uint32(value)
    return good


@compiled
def rows_of(sparse, final, mapped, rows):
    for row in range(len(rows)):
        for column in range(NUM_SPARSE):
            number = np.int64(sparse[column, row])
            rows[row, column] = final[column, number] if mapped else number + 2


def contiguous(input_dir: Path, output_dir: Path, threshold: int, suffix: str = "_contig_freq.npy") -> None:
    """contiguous_preproc_criteo: hashes to 2, 3, ... in order of first appearance, 1 for the rare ones."""
    paths = [input_dir / part_name(day, "sparse") for day in range(days_in(input_dir, "sparse"))]
    output_dir.mkdir(parents=True, exist_ok=True)
    vocabulary, final = Vocabulary(threshold > 1), np.zeros((NUM_SPARSE, 1), np.int32)
    size = sum(path.stat().st_size for path in paths)
    if threshold > 1:
        with trace.span("prep", "count", bytes=size):
            for path in paths:
                for sparse, rows, _ in numbered(path, vocabulary, np.empty((0, 0), np.int64)):
                    del sparse, rows
        vocabulary.stop_counting()
        final = np.ones((NUM_SPARSE, max(vocabulary.sizes())), np.int32)
        for column in range(NUM_SPARSE):
            kept = vocabulary.seen(column) >= threshold
            final[column, np.flatnonzero(kept)] = 2 + np.arange(np.count_nonzero(kept))
    with trace.span("prep", "ids", bytes=size):
        for path in paths:
            with whole_file(output_dir / (path.name.removesuffix(".npy") + suffix)) as out:
                shape, dtype, _ = layout(path)
                at = out.write(publish.header((shape[0], NUM_SPARSE), dtype.str), 0)
                made = np.empty((BLOCK_ROWS, NUM_SPARSE), dtype)
                for sparse, rows, _ in numbered(path, vocabulary, made):
                    rows_of(sparse, final, threshold > 1, made[:rows])
                    at = out.write(made[:rows], at)


def numbered(path: Path, vocabulary: Vocabulary, made: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
    """Blocks of (numbers by column, rows, first row)."""
    shape, dtype, header = layout(path)
    if len(shape) != 2 or shape[1] != NUM_SPARSE or dtype.kind != "i":
        raise UserError(f"{path}: {shape} {dtype}, integer hashes in {NUM_SPARSE} columns expected")
    sparse, buffer = np.empty((NUM_SPARSE, STRIDE), np.uint32), np.empty((BLOCK_ROWS, NUM_SPARSE), dtype)
    with File(path) as file:
        for row in range(0, shape[0], BLOCK_ROWS):
            rows = buffer[: min(BLOCK_ROWS, shape[0] - row)]
            file.read_into(rows.data.cast("B"), header + row * NUM_SPARSE * dtype.itemsize)
            if not columns_of(rows, sparse):
                raise UserError(
                    f"{path}: rows {row} to {row + len(rows) - 1}: an id is not a hash of 32 bits"
                )
            vocabulary.encode(sparse, len(rows))
            yield sparse, len(rows), row


def days_in(folder: Path, part: str) -> int:
    days = 0
    while (folder / part_name(days, part)).exists():
        days += 1
    if not days:
        raise UserError(f"{folder / part_name(0, part)} is missing")
    return days
