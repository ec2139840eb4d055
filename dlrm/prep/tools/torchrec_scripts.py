"""torchrec's scripts one at a time, with their arguments and their bytes; the third is in `reorder`.

`run` is the better way: one pass less over the data, resumable, and its memory does not grow with the ids.
"""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import UserError, printable
from dlrm.data.criteo import META, NUM_DENSE, NUM_SPARSE, PARTS, array_file_name
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
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.folders import DATASET, Output, publish_results
from dlrm.prep.io.odd_lines import LineRules
from dlrm.prep.io.output import take_logarithm_in_place
from dlrm.prep.job.workers import run_in_processes, run_in_threads
from dlrm.prep.kernels.intrinsics import compiled
from dlrm.prep.kernels.parse_line import count_ends, parse_lines
from dlrm.prep.kernels.vocabulary import Vocabulary
from dlrm.prep.tools.check import read_layout
from dlrm.runtime import trace


class WholeFile(threading.local):
    """Each thread's buffers, kept from file to file: fresh pages cost more than writing to them."""

    def __init__(self) -> None:
        self.block, self.text = TextBlock.arrays(), make_text_buffer()


_own = WholeFile()


def parse_folder(input_dir: Path, output_dir: Path, dataset: str = "", workers: int = 1) -> None:
    """npy_preproc_criteo: TSV to float32 logarithms, int64 hashes, int32 labels."""
    found = inputs.find_inputs(input_dir, dataset)
    stamps = inputs.FileStamps(source.path for source in found)
    each = -(-workers // len(found))  # a file is cut only where there are more workers than files
    names = [f"{source.name}_{part}.npy" for source in found for part in PARTS]
    with Output("parse", output_dir) as output:
        folders = output.open([], [*names, META], restart=True)

        def one(source: inputs.InputFile) -> None:
            with trace.span("prep", "parse", bytes=source.path.stat().st_size):
                parse_file(source, folders.unfinished, each)

        load_array()
        run_in_processes(min(workers, len(found)), one, found)
        publish_results(folders, names, f"{found[0].name}_sparse.npy", DATASET, stamps.check)
        output.clear()


def load_array() -> None:
    """Have the kernels' machine code before the process forks: by calling each on nothing, or a row."""
    block = _own.block
    parse_lines(0, 0, True, 0, block.addresses, 0, 0)
    take_logarithm_in_place(block.dense[:1], np.int32(0))
    count_ends(block.labels.view(np.uint8), 0)


def parse_file(source: inputs.InputFile, folder: Path, workers: int) -> None:
    rules = LineRules(lenient=True, labelled=source.labelled)
    with (
        OffsetFile(folder / f"{source.name}_dense.npy", "w") as dense,
        OffsetFile(folder / f"{source.name}_sparse.npy", "w") as sparse,
        OffsetFile(folder / f"{source.name}_labels.npy", "w") as labels,
    ):
        pieces = cut_file(source, rules, workers)

        def one(piece: InputPiece) -> tuple[int, int]:
            return parse_piece(source, piece, rules, (dense, sparse, labels))

        done = run_in_threads(workers, one, pieces)
        rows, low = sum(count for count, _ in done), min(low for _, low in done)
        if not rows:
            raise UserError(f"{printable(source.path)}: no rows in it")
        shift = np.int64(low - 2).astype(np.int32)
        take_logarithm_of_rows(dense, rows, shift, workers)
        for file, columns, dtype in (
            (dense, NUM_DENSE, "<f4"),
            (sparse, NUM_SPARSE, "<i8"),
            (labels, 1, "<i4"),
        ):
            file.write(publish.make_npy_header((rows, columns), dtype), 0)


def cut_file(source: inputs.InputFile, rules: LineRules, workers: int) -> list[InputPiece]:
    """One piece for one worker; several, counted so that each knows its first row, for more."""
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

    def one(piece: InputPiece) -> tuple[int, int]:
        with OffsetFile(source.path) as file:
            return count_rows(file, piece, printable(source.path), rules, skip_bad=False)

    row = line = 0
    for piece, (rows, lines) in zip(pieces, run_in_threads(workers, one, pieces), strict=True):
        piece.first_row, piece.first_line = row, line
        row, line = row + rows, line + lines
    return pieces


def parse_piece(
    source: inputs.InputFile, piece: InputPiece, rules: LineRules, files: tuple[OffsetFile, ...]
) -> tuple[int, int]:
    """(rows, smallest count). Counts are written raw; the logarithm needs the whole file's minimum."""
    row, low = piece.first_row, 1 << 40
    with OffsetFile(source.path) as text:
        scanner = LineScanner(text, printable(source.path), piece, rules, False, _own.text)
        _own.block.rows = 0
        for block, _ in scanner.blocks(_own.block):
            low = min(low, int(block.dense[: block.rows].min()))
            for file, array in zip(files, (block.dense, block.sparse, block.labels), strict=True):
                width = array[:1].nbytes
                file.write(array[: block.rows], publish.HEADER_BYTES + row * width)
            row += block.rows
    return row - piece.first_row, low


def take_logarithm_of_rows(out: OffsetFile, rows: int, shift: np.int32, workers: int) -> None:
    """torchrec's log(x - min + 2), in place."""
    own = threading.local()

    def one(at: int) -> None:
        if not hasattr(own, "file"):
            own.file = OffsetFile(out.path)
            opened.append(own.file)
        counts = _own.block.dense[: min(BLOCK_ROWS, rows - at)]
        offset = publish.HEADER_BYTES + at * counts[:1].nbytes
        own.file.read_into(counts.data.cast("B"), offset)
        out.write(take_logarithm_in_place(counts, shift), offset)

    opened: list[OffsetFile] = []
    run_in_threads(workers, one, range(0, rows, BLOCK_ROWS))
    for file in opened:
        file.close()


@compiled
def narrow_ids(ids):
    """Whether every id has 32 bits."""
    extra = np.int64(0)
    for id in ids:
        extra |= id
    return 0 <= extra < 1 << 32


def number_ids_of_folder(
    input_dir: Path, output_dir: Path, threshold: int, suffix: str = "_contig_freq.npy"
) -> None:
    """contiguous_preproc_criteo: hashes to 2, 3, ... in order of first appearance, 1 for the rare ones."""
    paths = [input_dir / array_file_name(day, "sparse") for day in range(list_days(input_dir, "sparse"))]
    stamps = inputs.FileStamps(paths)
    names = [path.name.removesuffix(".npy") + suffix for path in paths]
    with Output("contiguous", output_dir) as output:
        folders = output.open([], names, restart=True)
        number(paths, [folders.unfinished / name for name in names], threshold)
        publish_results(folders, names, names[0], rf"day_\d+_sparse{re.escape(suffix)}", stamps.check)
        output.clear()


def number(paths: list[Path], targets: list[Path], threshold: int) -> None:
    vocabulary, shift = Vocabulary(threshold > 1), 1
    size = sum(path.stat().st_size for path in paths)
    if threshold > 1:
        with trace.span("prep", "count", bytes=size):
            for path in paths:
                for _ in number_column(path, vocabulary, shift):
                    pass
        final = []
        for column in range(NUM_SPARSE):
            kept = vocabulary.seen(column) >= threshold
            final.append(np.where(kept, 1 + np.cumsum(kept), 1))
        vocabulary.renumber(final)
        shift = 0
    with trace.span("prep", "ids", bytes=size):
        for path, target in zip(paths, targets, strict=True):
            with OffsetFile(target, "w") as out:
                shape, dtype, _ = read_layout(path)
                at = out.write(publish.make_npy_header((shape[0], NUM_SPARSE), dtype.str), 0)
                for ids in number_column(path, vocabulary, shift):
                    at = out.write(ids, at)


def number_column(path: Path, vocabulary: Vocabulary, shift: int) -> Iterator[np.ndarray]:
    """Blocks of rows of numbers."""
    shape, dtype, header = read_layout(path)
    if len(shape) != 2 or shape[1] != NUM_SPARSE or dtype.kind != "i":
        raise UserError(
            f"{printable(path)}: {shape} {dtype}, integer hashes in {NUM_SPARSE} columns expected"
        )
    buffer = np.empty((BLOCK_ROWS, NUM_SPARSE), dtype)
    with OffsetFile(path) as file:
        for row in range(0, shape[0], BLOCK_ROWS):
            ids = buffer[: min(BLOCK_ROWS, shape[0] - row)]
            if file.read_into(ids.data.cast("B"), header + row * ids[:1].nbytes) != ids.nbytes:
                raise UserError(f"{printable(path)}: has changed while it was read")
            if not narrow_ids(ids.reshape(-1)):
                raise UserError(
                    f"{printable(path)}: rows {row} to {row + len(ids) - 1}: an id is not a hash of 32 bits"
                )
            vocabulary.encode(ids, shift)
            yield ids


def list_days(folder: Path, part: str) -> int:
    days = 0
    while (folder / array_file_name(days, part)).exists():
        days += 1
    if not days:
        raise UserError(f"{printable(folder / array_file_name(0, part))} is missing")
    return days
