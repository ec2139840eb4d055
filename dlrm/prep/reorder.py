"""torchrec's third script alone: days of NPY files shuffled together, the last copied, in constant memory."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlrm import trace
from dlrm.criteo import NUM_DENSE, NUM_SPARSE, PARTS, part_name
from dlrm.errors import UserError
from dlrm.prep import permute, publish
from dlrm.prep.check import layout
from dlrm.prep.files import File
from dlrm.prep.native import compiled
from dlrm.prep.place import PART_RECORDS, place, records_of
from dlrm.prep.scan import Block
from dlrm.prep.sources import Output
from dlrm.prep.spill import WORDS, Spill, bucket_bits, buckets
from dlrm.prep.steps import days_in, whole_file
from dlrm.prep.store import overlaps

EXPECTED = {"dense": (NUM_DENSE, "f"), "sparse": (NUM_SPARSE, "i"), "labels": (1, "i")}
BATCH = 1 << 13
NO_MAP = np.zeros(1, np.int64), np.zeros(1, np.int32)


def shuffle(
    dense_dir: Path, sparse_dir: Path, output_dir: Path, seed: int, tmp_dir: Path | None = None
) -> None:
    """shuffle_preproc_criteo. Integers come back as torchrec's float32 array leaves them."""
    folders = {"dense": dense_dir, "sparse": sparse_dir, "labels": dense_dir}
    days = min(days_in(folder, part) for part, folder in folders.items())
    made = [Output(f"day_{day}", rows_of_day(folders, day)) for day in range(days)]
    moved = sum(output.rows for output in made[:-1])
    tmp = tmp_dir or output_dir / "shuffle.tmp"
    tmp.mkdir(parents=True, exist_ok=True)
    with trace.span("prep", "permute", bytes=4 * moved):
        permute.write_places(tmp / "places.u32", moved, seed, lambda rows: None)
    bits, begin, spills = bucket_bits(moved), 0, []
    for day, output in enumerate(made[:-1]):
        with trace.span("prep", "spill", bytes=160 * output.rows):
            spills.append(spill_day(folders, day, begin, output.rows, bits, tmp))
        begin += output.rows
    shapes = [(min(moved, 1 << bits), columns) for columns, _ in EXPECTED.values()]
    buffers = (*(np.empty(shape, np.int32) for shape in shapes), np.empty((PART_RECORDS, WORDS), np.uint32))
    for bucket in range(buckets(moved, bits)):
        with trace.span("prep", "place", bytes=160 << bits):
            write_bucket(made[:-1], spills, bucket, bits, buffers, output_dir)
    for day in range(days - 1):
        for part in PARTS:
            path = output_dir / part_name(day, part)
            (output_dir / (path.name + publish.PARTIAL)).rename(path)
    for part, folder in folders.items():
        copy(folder / part_name(days - 1, part), output_dir / part_name(days - 1, part))
    shutil.rmtree(tmp)


def rows_of_day(folders: dict[str, Path], day: int) -> int:
    """Rows, after a look at the three headers."""
    found = {}
    for part, (columns, kind) in EXPECTED.items():
        path = folders[part] / part_name(day, part)
        shape, dtype, _ = layout(path)
        if len(shape) != 2 or shape[1] != columns or dtype.kind != kind:
            raise UserError(f"{path}: {shape} {dtype}, {columns} columns of kind {kind} expected")
        found[shape[0]] = path
    if len(found) > 1:
        raise UserError(f"{' and '.join(map(str, found.values()))}: different numbers of rows")
    return next(iter(found))


def blocks_of_day(folders: dict[str, Path], day: int) -> Iterator[Block]:
    """The bits of the floats travel as integers; the ids stay where they are, only looked at by column."""
    files = {part: File(folder / part_name(day, part)) for part, folder in folders.items()}
    layouts = {part: layout(file.path) for part, file in files.items()}
    arrays = {part: np.empty((BATCH, EXPECTED[part][0]), dtype) for part, (_, dtype, _) in layouts.items()}
    dense, rows = np.empty((BATCH, NUM_DENSE + 1), np.int32), layouts["labels"][0][0]
    for row in range(0, rows, BATCH):
        count = min(BATCH, rows - row)
        for part, array in arrays.items():
            width = array.itemsize * array.shape[1]
            files[part].read_into(array[:count].data.cast("B"), layouts[part][2] + row * width)
        dense[:count, :NUM_DENSE] = arrays["dense"][:count].view(np.int32)
        dense[:count, NUM_DENSE] = arrays["labels"][:count, 0]
        if outside(arrays["sparse"][:count]):
            raise UserError(f"{files['sparse'].path}: rows from {row}: an id does not fit 32 bits")
        yield Block(dense, arrays["sparse"].T, count)
    for file in files.values():
        file.close()


@compiled
def outside(ids):
    low, high = ids[0, 0], ids[0, 0]
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            low, high = min(low, ids[row, column]), max(high, ids[row, column])
    return low < 0 or high >= 1 << 32


def spill_day(folders: dict[str, Path], day: int, begin: int, rows: int, bits: int, tmp: Path):
    path = tmp / f"day_{day}.spill"
    with File(tmp / "places.u32") as places, File(path, "w") as file:
        file.resize(0)

        def read(at: int, count: int) -> np.ndarray:
            return places.read_array(count, 4 * (begin + at), np.uint32)

        spill = Spill(file, read, rows, 0, bits)
        for block in blocks_of_day(folders, day):
            spill.take(block)
        spill.finish()
    return path, spill.first, spill.runs


def write_bucket(
    made: list[Output], spills: list, bucket: int, bits: int, buffers: tuple[np.ndarray, ...], folder: Path
) -> None:
    *whole, buffer = buffers
    rows = min(sum(output.rows for output in made), (bucket + 1) << bits) - (bucket << bits)
    dense, sparse, labels = (array[:rows] for array in whole)
    for path, first, runs in spills:
        at = bucket - first
        if 0 <= at < len(runs) - 1:
            with File(path) as file:
                for _, records in records_of(file, int(runs[at]), int(runs[at + 1] - runs[at]), buffer):
                    place(records, *NO_MAP, False, np.int32(0), 1 << 40, dense, sparse, labels)
    through_float(sparse, labels)
    for output, start, stop, at in overlaps(made, bucket << bits, rows):
        for part, array in (("dense", dense), ("sparse", sparse), ("labels", labels)):
            with File(folder / f"{output.name}_{part}.npy{publish.PARTIAL}", "w") as file:
                shape, dtype = (output.rows, array.shape[1]), "<f4" if part == "dense" else "<i4"
                if at == 0:
                    file.write(publish.header(shape, dtype), 0)
                file.write(array[start:stop], publish.HEADER_BYTES + at * 4 * shape[1])


@compiled
def beyond(values, limit):
    """Whether rounding can matter at all."""
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            if values[row, column] > limit or values[row, column] < -limit:
                return True
    return False


def through_float(sparse: np.ndarray, labels: np.ndarray) -> None:
    if beyond(sparse, 1 << 24):
        sparse[:] = publish.rounded(sparse.view(np.uint32))
    if beyond(labels, 1 << 24):
        labels[:] = publish.rounded(labels)


def copy(source: Path, target: Path) -> None:
    """As it is, but with calls that the tracer sees."""
    block, at = memoryview(bytearray(1 << 20)), 0
    with File(source) as file, whole_file(target) as out:
        while count := file.read_into(block, at):
            at = out.write(block[:count], at)
