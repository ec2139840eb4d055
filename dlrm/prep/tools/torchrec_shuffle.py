"""torchrec's third script, shuffle_preproc_criteo: shuffles the rows of all days but the last, which it
copies.

In constant memory, and with the same output as the script.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import UserError, printable
from dlrm.data.criteo import META, PARTS, Columns, name_array_file
from dlrm.prep.io import publish
from dlrm.prep.io.blocks import TextBlock
from dlrm.prep.io.files import OffsetFile, view_bytes
from dlrm.prep.io.folders import DATASET, Folders, Output, publish_results
from dlrm.prep.io.inputs import FileStamps, OutputDay
from dlrm.prep.io.output import find_overlaps, round_in_place
from dlrm.prep.io.spill import SpillFile, choose_bucket_bits, count_buckets, count_words
from dlrm.prep.job.overlap import refuse_overlap, same_folder
from dlrm.prep.steps import permute
from dlrm.prep.steps.place import PART_RECORDS, make_placer, read_records
from dlrm.prep.tools.check import read_layout
from dlrm.prep.tools.torchrec_scripts import fit_32_bits, list_days
from dlrm.runtime import trace

DTYPES = {"dense": ("<f4",), "sparse": ("<i4", "<i8"), "labels": ("<i4", "<i8")}
BATCH = 1 << 13  # rows read at a time
PLACES = "places_00000.u32"
OPTIONS = {
    "dense": "--input_dir_labels_and_dense", "sparse": "--input_dir_sparse",
    "labels": "--input_dir_labels_and_dense",
}  # fmt: skip
NO_MAP = np.zeros(1, np.int64), np.zeros(1, np.int32)


def shuffle_folder(
    dense_dir: Path, sparse_dir: Path, output_dir: Path, seed: int, tmp_dir: Path | None = None
) -> None:
    """shuffle_preproc_criteo. Integers come back as torchrec's float32 array leaves them."""
    folders = {"dense": dense_dir, "sparse": sparse_dir, "labels": dense_dir}
    days = min(list_days(folder, part) for part, folder in folders.items())
    columns = read_columns(folders)
    outputs = [OutputDay(f"day_{day}", count_rows_of_day(folders, day, columns)) for day in range(days)]
    shuffled = sum(output.rows for output in outputs[:-1])
    paths = [folder / name_array_file(day, part) for day in range(days) for part, folder in folders.items()]
    stamps = FileStamps(paths)
    names = [path.name for path in paths]
    refuse_overlap("--tmp_dir", tmp_dir, [(OPTIONS[part], folder) for part, folder in folders.items()])
    for part, folder in folders.items():
        if same_folder(output_dir, folder):
            raise UserError(
                f"--output_dir_shuffled {printable(output_dir)}: the same as {OPTIONS[part]}; choose another"
            )
    with Output("shuffle", output_dir, tmp_dir) as output:
        output_folders = output.open([], [*names, META], restart=True)
        write_days(folders, columns, outputs, shuffled, seed, output_folders)
        publish_results(output_folders, names, name_array_file(0, "sparse"), DATASET, stamps.refuse_changed)
        output.clear()


def write_days(
    folders: dict[str, Path],
    columns: Columns,
    outputs: list[OutputDay],
    shuffled: int,
    seed: int,
    output_folders: Folders,
) -> None:
    """Shuffle the rows of all days but the last into new days of the same lengths, and copy the last.

    folders   of the input: part ("dense", "sparse", "labels") -> folder
    shuffled  rows of all days but the last
    """
    with trace.span("prep", "permute", bytes=4 * shuffled):
        permute.write_places(output_folders.work_path(PLACES), shuffled, seed, lambda rows: None)
    bits, begin, spills = choose_bucket_bits(shuffled, columns), 0, []
    row_bytes = 4 * columns.total
    for day, output in enumerate(outputs[:-1]):
        with trace.span("prep", "spill", bytes=row_bytes * output.rows):
            spills.append(spill_day(folders, columns, day, begin, output.rows, bits, output_folders.work))
        begin += output.rows
    shapes = [(min(shuffled, 1 << bits), count) for count in columns.parts.values()]
    records = np.empty((PART_RECORDS, count_words(columns)), np.uint32)
    buffers = (*(np.empty(shape, np.int32) for shape in shapes), records)
    for bucket in range(count_buckets(shuffled, bits)):
        with trace.span("prep", "place", bytes=row_bytes << bits):
            write_bucket(columns, outputs[:-1], spills, bucket, bits, buffers, output_folders.unfinished)
    last = len(outputs) - 1
    for part, folder in folders.items():
        copy_day(
            folder / name_array_file(last, part), output_folders.unfinished / name_array_file(last, part)
        )


def read_columns(folders: dict[str, Path]) -> Columns:
    """The columns of the first day."""
    counts = []
    for part in ("dense", "sparse"):
        path = folders[part] / name_array_file(0, part)
        shape = read_layout(path)[0]
        if len(shape) != 2:
            raise UserError(f"{printable(path)}: {shape}, rows and columns expected")
        counts.append(shape[1])
    return Columns(*counts)


def count_rows_of_day(folders: dict[str, Path], day: int, columns: Columns) -> int:
    """Rows of a day; UserError if the headers of its three files are not as expected, or differ in rows."""
    paths = {}
    for part, count in columns.parts.items():
        path = folders[part] / name_array_file(day, part)
        shape, dtype, _ = read_layout(path)
        if len(shape) != 2 or shape[1] != count or dtype.str not in DTYPES[part]:
            raise UserError(
                f"{printable(path)}: {shape} {dtype}, {count} columns of {' or '.join(DTYPES[part])} expected"
            )
        paths[shape[0]] = path
    if len(paths) > 1:
        raise UserError(f"{' and '.join(map(printable, paths.values()))}: different numbers of rows")
    return next(iter(paths))


def read_blocks_of_day(folders: dict[str, Path], day: int) -> Iterator[TextBlock]:
    """A day's rows in blocks; the block is reused. Floats are kept as their bits in int32; ids keep their
    dtype.
    """
    files = {part: OffsetFile(folder / name_array_file(day, part)) for part, folder in folders.items()}
    layouts = {part: read_layout(file.path) for part, file in files.items()}
    arrays = {part: np.empty((BATCH, shape[1]), dtype) for part, (shape, dtype, _) in layouts.items()}
    rows = layouts["labels"][0][0]
    dense, sparse, labels = (arrays[part] for part in PARTS)
    block = TextBlock(dense.view(np.int32), sparse, labels[:, 0])
    for row in range(0, rows, BATCH):
        count = min(BATCH, rows - row)
        for part, array in arrays.items():
            width = array.itemsize * array.shape[1]
            wanted = view_bytes(array[:count])
            if files[part].read_into(wanted, layouts[part][2] + row * width) != len(wanted):
                raise UserError(f"{printable(files[part].path)}: has changed while it was read")
        if not fit_32_bits(sparse[:count].reshape(-1)):
            raise UserError(f"{printable(files['sparse'].path)}: rows from {row}: an id does not fit 32 bits")
        block.rows = count
        yield block
    for file in files.values():
        file.close()


def spill_day(
    folders: dict[str, Path], columns: Columns, day: int, begin: int, rows: int, bits: int, tmp: Path
):
    """Write a day's spill file; `begin`: rows of the days before. Returns (path, first bucket, runs)."""
    path = tmp / f"day_{day}.spill"
    with OffsetFile(tmp / PLACES) as places, OffsetFile(path, "w") as file:
        file.resize(0)

        def read_places(at: int, count: int) -> np.ndarray:
            return places.read_array(count, 4 * (begin + at), np.uint32)

        spill = SpillFile(file, read_places, rows, bits, columns)
        for block in read_blocks_of_day(folders, day):
            spill.add_block(block)
        spill.write_rest()
    return path, spill.first, spill.runs


def write_bucket(
    columns: Columns,
    outputs: list[OutputDay],
    spills: list,
    bucket: int,
    bits: int,
    buffers: tuple[np.ndarray, ...],
    folder: Path,
) -> None:
    """Write rows bucket * 2^bits .. (bucket + 1) * 2^bits of the shuffled days to their files in `folder`.

    outputs  the shuffled days
    spills   of each day, as `spill_day` returns them
    buffers  int32 [rows of a bucket, columns] of dense, sparse and labels; uint32 [n, words] for records
    """
    place_records = make_placer(columns)
    *whole, buffer = buffers
    rows = min(sum(output.rows for output in outputs), (bucket + 1) << bits) - (bucket << bits)
    dense, sparse, labels = (array[:rows] for array in whole)
    for path, first, runs in spills:
        at = bucket - first
        if 0 <= at < len(runs) - 1:
            with OffsetFile(path) as file:
                for _, records in read_records(file, int(runs[at]), int(runs[at + 1] - runs[at]), buffer):
                    place_records(records, *NO_MAP, False, np.int32(0), False, dense, sparse, labels)
    round_in_place(sparse, labels, raw=True)
    for output, start, stop, at in find_overlaps(outputs, bucket << bits, rows):
        for part, array in (("dense", dense), ("sparse", sparse), ("labels", labels)):
            with OffsetFile(folder / f"{output.name}_{part}.npy", "w") as file:
                shape, dtype = (output.rows, array.shape[1]), "<f4" if part == "dense" else "<i4"
                if at == 0:
                    file.write(publish.make_npy_header(shape, dtype), 0)
                file.write(array[start:stop], publish.HEADER_BYTES + at * 4 * shape[1])


def copy_day(source: Path, target: Path) -> None:
    """Copy a file with calls that the tracer records."""
    block, at = memoryview(bytearray(1 << 20)), 0
    with OffsetFile(source) as file, OffsetFile(target, "w") as out:
        while count := file.read_into(block, at):
            at = out.write(block[:count], at)
