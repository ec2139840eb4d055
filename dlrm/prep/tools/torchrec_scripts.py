"""torchrec's first two scripts, npy_preproc_criteo and contiguous_preproc_criteo, with the same arguments and
output.

The third one is in `torchrec_shuffle`. The command `run` should be preferred: it reads the data once less,
can resume, and its memory does not grow with the number of ids.
"""

import functools
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import UserError, printable
from dlrm.data.criteo import CRITEO, META, PARTS, Columns, check_column_counts, name_array_file
from dlrm.prep.io import inputs, publish
from dlrm.prep.io.blocks import (
    BLOCK_ROWS,
    InputPiece,
    LineScanner,
    TextBlock,
    count_rows,
    find_line_end,
    make_text_buffer,
)
from dlrm.prep.io.columns import find_columns
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.folders import DATASET, Output, publish_results
from dlrm.prep.io.odd_lines import LineRules
from dlrm.prep.io.output import take_logarithm_in_place
from dlrm.prep.job.workers import run_in_processes, run_in_threads
from dlrm.prep.kernels.intrinsics import compiled
from dlrm.prep.kernels.parse_line import count_ends, make_parser
from dlrm.prep.kernels.vocabulary import Vocabulary
from dlrm.prep.tools.check import read_layout
from dlrm.runtime import trace


class ThreadBuffers(threading.local):
    """Each thread's block and text buffer, reused for all files: fresh pages cost page faults."""

    def __init__(self, columns: Columns) -> None:
        self.block, self.text = TextBlock.make_arrays(columns), make_text_buffer()


@functools.cache
def get_buffers(columns: Columns) -> ThreadBuffers:
    return ThreadBuffers(columns)


def parse_folder(
    input_dir: Path,
    output_dir: Path,
    dataset: str = "",
    workers: int = 1,
    num_numerical: int | None = None,
    num_categorical: int | None = None,
) -> None:
    """npy_preproc_criteo: TSV to float32 logarithms, int64 hashes, int32 labels."""
    check_column_counts(num_numerical, num_categorical)
    found = inputs.find_inputs(input_dir, dataset)
    columns = find_columns(found[0], num_numerical, num_categorical, lenient=True)
    stamps = inputs.FileStamps(source.path for source in found)
    threads = -(-workers // len(found))  # a file is divided only if there are more workers than files
    names = [f"{source.name}_{part}.npy" for source in found for part in PARTS]
    with Output("parse", output_dir) as output:
        folders = output.open([], [*names, META], restart=True)

        def parse_one(source: inputs.InputFile) -> None:
            with trace.span("prep", "parse", bytes=source.path.stat().st_size):
                parse_file(source, folders.unfinished, threads, columns)

        compile_kernels(columns)
        run_in_processes(min(workers, len(found)), parse_one, found)
        publish_results(folders, names, f"{found[0].name}_sparse.npy", DATASET, stamps.refuse_changed)
        output.clear()


def compile_kernels(columns: Columns) -> None:
    """Compile or load the kernels before the process forks, by calling each on no data or on one row."""
    block = get_buffers(columns).block
    make_parser(columns)(0, 0, True, 0, block.addresses, 0, 0)
    take_logarithm_in_place(block.dense[:1], np.int32(0))
    count_ends(block.labels.view(np.uint8), 0)


def parse_file(source: inputs.InputFile, folder: Path, workers: int, columns: Columns) -> None:
    """Write the three arrays of one input file, with `workers` threads."""
    rules = LineRules(lenient=True, labelled=source.labelled, columns=columns)
    with (
        OffsetFile(folder / f"{source.name}_dense.npy", "w") as dense,
        OffsetFile(folder / f"{source.name}_sparse.npy", "w") as sparse,
        OffsetFile(folder / f"{source.name}_labels.npy", "w") as labels,
    ):
        pieces = cut_file(source, rules, workers)

        def parse_one(piece: InputPiece) -> tuple[int, int]:
            return parse_piece(source, piece, rules, (dense, sparse, labels))

        results = run_in_threads(workers, parse_one, pieces)
        rows, low = sum(count for count, _ in results), min(low for _, low in results)
        if not rows:
            raise UserError(f"{printable(source.path)}: no rows in it")
        shift = np.int64(low - 2).astype(np.int32)
        if columns.numerical:
            take_logarithm_of_rows(dense, rows, shift, workers, columns)
        for file, count, dtype in zip(
            (dense, sparse, labels), columns.parts.values(), ("<f4", "<i8", "<i4"), strict=True
        ):
            file.write(publish.make_npy_header((rows, count), dtype), 0)


def cut_file(source: inputs.InputFile, rules: LineRules, workers: int) -> list[InputPiece]:
    """Divide a file into pieces: one for one worker; for more, several whose rows are counted, so that each
    piece's first row is known.
    """
    size = source.path.stat().st_size
    if workers == 1:
        return [InputPiece(0, 0, size, rows=0)]
    with OffsetFile(source.path) as file:
        ends = sorted(
            {find_line_end(file, size * part // (4 * workers), size) for part in range(1, 4 * workers)}
        )
    pieces = [
        InputPiece(0, begin, end) for begin, end in zip([0, *ends], [*ends, size], strict=True) if begin < end
    ]

    def count_one(piece: InputPiece) -> tuple[int, int]:
        with OffsetFile(source.path) as file:
            return count_rows(file, piece, printable(source.path), rules, skip_bad=False)

    row = line = 0
    for piece, (rows, lines) in zip(pieces, run_in_threads(workers, count_one, pieces), strict=True):
        piece.first_row, piece.first_line = row, line
        row, line = row + rows, line + lines
    return pieces


def parse_piece(
    source: inputs.InputFile, piece: InputPiece, rules: LineRules, files: tuple[OffsetFile, ...]
) -> tuple[int, int]:
    """Write one piece to the files of dense, sparse and labels. Returns (rows, smallest count).

    Counts are written as they are, because the logarithm needs the minimum of the whole file.
    """
    row, low = piece.first_row, 1 << 40
    with OffsetFile(source.path) as text:
        buffers = get_buffers(rules.columns)
        scanner = LineScanner(text, printable(source.path), piece, rules, False, buffers.text)
        buffers.block.rows = 0
        for block, _ in scanner.read_blocks(buffers.block):
            if rules.columns.numerical:
                low = min(low, int(block.dense[: block.rows].min()))
            for file, array in zip(files, (block.dense, block.sparse, block.labels), strict=True):
                width = array[:1].nbytes
                file.write(array[: block.rows], publish.HEADER_BYTES + row * width)
            row += block.rows
    return row - piece.first_row, low


def take_logarithm_of_rows(
    out: OffsetFile, rows: int, shift: np.int32, workers: int, columns: Columns
) -> None:
    """Replace the counts in a file of dense values by torchrec's log(x - min + 2); `shift` is min - 2."""
    own = threading.local()  # `read_into` moves the file position, so each thread opens the file itself

    def convert_block(at: int) -> None:
        if not hasattr(own, "file"):
            own.file = OffsetFile(out.path)
            opened.append(own.file)
        counts = get_buffers(columns).block.dense[: min(BLOCK_ROWS, rows - at)]
        offset = publish.HEADER_BYTES + at * counts[:1].nbytes
        own.file.read_into(counts.data.cast("B"), offset)
        out.write(take_logarithm_in_place(counts, shift), offset)

    opened: list[OffsetFile] = []
    run_in_threads(workers, convert_block, range(0, rows, BLOCK_ROWS))
    for file in opened:
        file.close()


@compiled
def fit_32_bits(ids):
    """Whether all ids are from 0 to 2^32 - 1."""
    extra = np.int64(0)
    for id in ids:
        extra |= id
    return 0 <= extra < 1 << 32


def number_ids_of_folder(
    input_dir: Path, output_dir: Path, threshold: int, suffix: str = "_contig_freq.npy"
) -> None:
    """contiguous_preproc_criteo: hashes to 2, 3, ... in order of first appearance, 1 for the rare ones."""
    paths = [input_dir / name_array_file(day, "sparse") for day in range(list_days(input_dir, "sparse"))]
    stamps = inputs.FileStamps(paths)
    names = [path.name.removesuffix(".npy") + suffix for path in paths]
    with Output("contiguous", output_dir) as output:
        folders = output.open([], names, restart=True)
        number_days(paths, [folders.unfinished / name for name in names], threshold)
        publish_results(
            folders, names, names[0], rf"day_\d+_sparse{re.escape(suffix)}", stamps.refuse_changed
        )
        output.clear()


def number_days(paths: list[Path], targets: list[Path], threshold: int) -> None:
    """Write the numbered ids of each day. With a threshold, a first pass counts how often each id occurs."""
    columns = read_columns(paths)
    vocabulary, shift = Vocabulary(threshold > 1, columns), 1
    size = sum(path.stat().st_size for path in paths)
    if threshold > 1:
        with trace.span("prep", "count", bytes=size):
            for path in paths:
                for _ in number_blocks(path, vocabulary, shift):
                    pass
        final = []
        for column in range(columns):
            kept = vocabulary.list_occurrences(column) >= threshold
            final.append(np.where(kept, 1 + np.cumsum(kept), 1))
        vocabulary.set_final_numbers(final)
        shift = 0
    with trace.span("prep", "ids", bytes=size):
        for path, target in zip(paths, targets, strict=True):
            with OffsetFile(target, "w") as out:
                shape, dtype, _ = read_layout(path)
                at = out.write(publish.make_npy_header((shape[0], columns), dtype.str), 0)
                for ids in number_blocks(path, vocabulary, shift):
                    at = out.write(ids, at)


def read_columns(paths: list[Path]) -> int:
    """The columns of ids that all files have; UserError for the first file that is none, or has others."""
    columns = 0
    for path in paths:
        shape, dtype, _ = read_layout(path)
        columns = columns or (shape[1] if len(shape) == 2 else CRITEO.categorical)
        if len(shape) != 2 or shape[1] != columns or dtype.kind != "i" or not dtype.isnative:
            raise UserError(
                f"{printable(path)}: {shape} {dtype}, integer hashes in {columns} columns expected"
            )
    return columns


def number_blocks(path: Path, vocabulary: Vocabulary, shift: int) -> Iterator[np.ndarray]:
    """Blocks of a file's ids, int [rows, columns], replaced by their numbers, in a buffer that is reused."""
    shape, dtype, header = read_layout(path)
    buffer = np.empty((BLOCK_ROWS, shape[1]), dtype)
    with OffsetFile(path) as file:
        for row in range(0, shape[0], BLOCK_ROWS):
            ids = buffer[: min(BLOCK_ROWS, shape[0] - row)]
            if file.read_into(ids.data.cast("B"), header + row * ids[:1].nbytes) != ids.nbytes:
                raise UserError(f"{printable(path)}: has changed while it was read")
            if not fit_32_bits(ids.reshape(-1)):
                raise UserError(
                    f"{printable(path)}: rows {row} to {row + len(ids) - 1}: an id is not a hash of 32 bits"
                )
            vocabulary.encode_columns(ids, shift)
            yield ids


def list_days(folder: Path, part: str) -> int:
    days = 0
    while (folder / name_array_file(days, part)).exists():
        days += 1
    if not days:
        raise UserError(f"{printable(folder / name_array_file(0, part))} is missing")
    return days
