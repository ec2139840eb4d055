"""Parquet output: train/, val/ and test/ folders of parts with columns label, I1..I13, C1..C26.

With --mod_idx N as OneFlow makes it: counts + 1 as integers, ids modulo N plus N times the column's number.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm.data.criteo import NUM_DENSE, NUM_SPARSE, split_last_day
from dlrm.prep.io.files import bytes_written, os_errors_as_user_errors, write_atomically
from dlrm.prep.io.folders import discard
from dlrm.prep.io.inputs import OutputDay, select_days
from dlrm.prep.io.output import find_overlaps, take_logarithm
from dlrm.prep.steps.place import Placer
from dlrm.prep.steps.plan import PrepPlan

NAMES = ["label", *(f"I{i + 1}" for i in range(NUM_DENSE)), *(f"C{i + 1}" for i in range(NUM_SPARSE))]
UNLABELLED = "unlabelled"  # Kaggle's test.txt
SIZES = "README.md"


def list_subsets(plan: PrepPlan) -> list[OutputDay]:
    """The output's rows, cut into subsets; a single day is all training data, as the loader takes it."""
    days = select_days(plan.outputs)
    rows = [output.rows for output in days]
    if len(days) > 1:
        val, test = split_last_day(rows[-1])
        found = [OutputDay("train", sum(rows[:-1])), OutputDay("val", len(val)), OutputDay("test", len(test))]
    else:
        found = [OutputDay("train", sum(rows))]
    rest = plan.rows - sum(rows)
    return found + ([OutputDay(UNLABELLED, rest)] if rest else [])


def list_parts(plan: PrepPlan, bucket: int) -> Iterator[tuple[str, int, int]]:
    """(file, from, to) for the rows of one bucket."""
    begin = bucket << plan.bits
    rows = min(plan.rows, begin + (1 << plan.bits)) - begin
    for output, start, stop, _ in find_overlaps(list_subsets(plan), begin, rows):
        yield f"{output.name}/part_{bucket:05d}.parquet", start, stop


def list_names(plan: PrepPlan) -> list[str]:
    return [name for bucket in range(plan.bucket_count) for name, _, _ in list_parts(plan, bucket)]


def make_folders(plan: PrepPlan) -> None:
    done = list(plan.folder.glob("bucket_*.done"))
    if done and any(
        not path.exists()
        for number in map(parse_bucket_number, done)
        for path in list_bucket_files(plan, number)
    ):
        discard(plan.folder, "bucket_*.done")
    for output in list_subsets(plan):
        with os_errors_as_user_errors(plan.folders.unfinished / output.name):
            (plan.folders.unfinished / output.name).mkdir(exist_ok=True)


def parse_bucket_number(done) -> int:
    return int(done.stem.split("_")[1])


def list_bucket_files(plan: PrepPlan, bucket: int):
    return [plan.folders.unfinished / name for name, _, _ in list_parts(plan, bucket)]


class ParquetPlacer(Placer):
    """A bucket's rows as one part of each subset that it touches."""

    def write(self, begin: int, dense: np.ndarray, sparse: np.ndarray, labels: np.ndarray) -> None:
        plan = self.plan
        counts = dense if plan.options.mod_idx else take_logarithm(dense, plan.options)
        if not plan.options.contiguous and not plan.options.max_ind_range:
            sparse = sparse.view(np.uint32).astype(np.int64)
        for name, start, stop in list_parts(plan, begin >> plan.bits):
            columns = [labels[start:stop, 0]]
            columns += [counts[start:stop, column] for column in range(NUM_DENSE)]
            columns += [sparse[start:stop, column] for column in range(NUM_SPARSE)]
            table = pa.table([pa.array(np.ascontiguousarray(column)) for column in columns], NAMES)
            path = plan.folders.unfinished / name
            with os_errors_as_user_errors(path), open(path, "wb", buffering=0) as file:
                pq.write_table(table, file)
                bytes_written[str(path.absolute())] += file.tell()


def write_sizes(plan: PrepPlan, table_sizes: list[int]) -> None:
    """The numbers that a training script is given by hand, as OneFlow's tool exports them."""
    lines = ["## number of examples:"] + [f"{output.name}: {output.rows}" for output in list_subsets(plan)]
    lines += ["", "## table size array", f"table_size_array = {table_sizes}"]
    write_atomically(plan.folders.unfinished / SIZES, ("\n".join(lines) + "\n").encode())
