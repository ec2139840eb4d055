"""Parquet output: train/, val/ and test/ folders of parts with columns label, I1..I13, C1..C26.

With --mod_idx N as OneFlow makes it: counts + 1 as integers, ids modulo N plus N times the column's number.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm.data.criteo import NUM_DENSE, NUM_SPARSE, split_last_day
from dlrm.prep.io.files import bytes_written, explained, write_whole
from dlrm.prep.io.folders import discard
from dlrm.prep.io.inputs import OutputDay, days_of
from dlrm.prep.io.output import overlaps, take_logarithm
from dlrm.prep.steps.place import Placer
from dlrm.prep.steps.plan import PrepPlan

NAMES = ["label", *(f"I{i + 1}" for i in range(NUM_DENSE)), *(f"C{i + 1}" for i in range(NUM_SPARSE))]
UNLABELLED = "unlabelled"  # Kaggle's test.txt
SIZES = "README.md"


def list_subsets(work: PrepPlan) -> list[OutputDay]:
    """The output's rows, cut into subsets; a single day is all training data, as the loader takes it."""
    days = days_of(work.made)
    rows = [output.rows for output in days]
    if len(days) > 1:
        val, test = split_last_day(rows[-1])
        found = [OutputDay("train", sum(rows[:-1])), OutputDay("val", len(val)), OutputDay("test", len(test))]
    else:
        found = [OutputDay("train", sum(rows))]
    rest = work.rows - sum(rows)
    return found + ([OutputDay(UNLABELLED, rest)] if rest else [])


def list_parts(work: PrepPlan, bucket: int) -> Iterator[tuple[str, int, int]]:
    """(file, from, to) for the rows of one bucket."""
    begin = bucket << work.bits
    rows = min(work.rows, begin + (1 << work.bits)) - begin
    for output, start, stop, _ in overlaps(list_subsets(work), begin, rows):
        yield f"{output.name}/part_{bucket:05d}.parquet", start, stop


def list_names(work: PrepPlan) -> list[str]:
    return [name for bucket in range(work.bucket_count) for name, _, _ in list_parts(work, bucket)]


def make_folders(work: PrepPlan) -> None:
    done = list(work.folder.glob("bucket_*.done"))
    if done and any(
        not path.exists() for number in map(number_of, done) for path in open_files(work, number)
    ):
        discard(work.folder, "bucket_*.done")
    for output in list_subsets(work):
        with explained(work.folders.made / output.name):
            (work.folders.made / output.name).mkdir(exist_ok=True)


def number_of(done) -> int:
    return int(done.stem.split("_")[1])


def open_files(work: PrepPlan, bucket: int):
    return [work.folders.made / name for name, _, _ in list_parts(work, bucket)]


class ParquetPlacer(Placer):
    """A bucket's rows as one part of each subset that it touches."""

    def write(self, begin: int, dense: np.ndarray, sparse: np.ndarray, labels: np.ndarray) -> None:
        work = self.work
        counts = dense if work.options.mod_idx else take_logarithm(dense, work.options)
        if not work.options.contiguous and not work.options.max_ind_range:
            sparse = sparse.view(np.uint32).astype(np.int64)
        for name, start, stop in list_parts(work, begin >> work.bits):
            columns = [labels[start:stop, 0]]
            columns += [counts[start:stop, column] for column in range(NUM_DENSE)]
            columns += [sparse[start:stop, column] for column in range(NUM_SPARSE)]
            table = pa.table([pa.array(np.ascontiguousarray(column)) for column in columns], NAMES)
            path = work.folders.made / name
            with explained(path), open(path, "wb", buffering=0) as file:
                pq.write_table(table, file)
                bytes_written[str(path.absolute())] += file.tell()


def write_sizes(work: PrepPlan, table_sizes: list[int]) -> None:
    """The numbers that a training script is given by hand, as OneFlow's tool exports them."""
    lines = ["## number of examples:"] + [f"{output.name}: {output.rows}" for output in list_subsets(work)]
    lines += ["", "## table size array", f"table_size_array = {table_sizes}"]
    write_whole(work.folders.made / SIZES, ("\n".join(lines) + "\n").encode())
