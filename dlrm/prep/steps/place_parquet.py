"""Parquet output: folders train, val and test, with files of the columns label, I1, I2 .., C1, C2 ...

With --mod_idx the values are OneFlow's: counts + 1 without logarithm, ids as in `io/oneflow_ids.py`.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm.data.criteo import split_last_day
from dlrm.prep.io.files import bytes_written, os_errors_as_user_errors, write_atomically
from dlrm.prep.io.folders import discard_files
from dlrm.prep.io.inputs import OutputDay, select_days
from dlrm.prep.io.oneflow_ids import make_oneflow_ids
from dlrm.prep.io.output import find_overlaps, take_logarithm
from dlrm.prep.steps.place import Placer
from dlrm.prep.steps.plan import PrepPlan

UNLABELLED = "unlabelled"  # Kaggle's test.txt
SIZES = "README.md"


def list_subsets(plan: PrepPlan) -> list[OutputDay]:
    """The subsets that the output's rows are divided into, in order. A single day is all training data."""
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
    """(file, start, stop) for the rows of one bucket: a bucket may belong to several subsets."""
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
        discard_files(plan.folder, "bucket_*.done")
    for output in list_subsets(plan):
        with os_errors_as_user_errors(plan.folders.unfinished / output.name):
            (plan.folders.unfinished / output.name).mkdir(exist_ok=True)


def parse_bucket_number(done) -> int:
    return int(done.stem.split("_")[1])


def list_bucket_files(plan: PrepPlan, bucket: int):
    return [plan.folders.unfinished / name for name, _, _ in list_parts(plan, bucket)]


class ParquetPlacer(Placer):
    """Writes a bucket's rows as one Parquet file in each subset that they belong to."""

    def write_rows(self, begin: int, dense: np.ndarray, sparse: np.ndarray, labels: np.ndarray) -> None:
        """Write rows from output row `begin` on. dense: float32 [n, numerical]. sparse: [n, categorical].
        labels: int32 [n].
        """
        write_bucket(self.plan, begin, dense, sparse, labels)


def write_bucket(
    plan: PrepPlan, begin: int, dense: np.ndarray, sparse: np.ndarray, labels: np.ndarray
) -> None:
    """Write the rows of one bucket: one file in each subset that they belong to.

    begin: the first row's number in the output. dense: int32 [rows, columns], counts less the shift of their
    file. sparse: int32 [rows, columns]. labels: int32 [rows, 1].
    """
    mod_idx = plan.options.mod_idx
    counts = dense.astype(np.float32) if mod_idx else take_logarithm(dense, plan.options)
    if not plan.options.contiguous and not plan.options.max_ind_range:
        sparse = sparse.view(np.uint32).astype(np.int64)
    for name, start, stop in list_parts(plan, begin >> plan.bits):
        ids = list(sparse[start:stop].T)
        columns = [labels[start:stop, 0]]
        if mod_idx:
            ids = [make_oneflow_ids(each.view(np.uint32), column, mod_idx) for column, each in enumerate(ids)]
            columns = [labels[start:stop, 0].astype(np.float32)]
        columns += [*counts[start:stop].T, *ids]
        arrays = [pa.array(np.ascontiguousarray(column)) for column in columns]
        table = pa.table(arrays, plan.options.columns.names)
        path = plan.folders.unfinished / name
        with os_errors_as_user_errors(path), open(path, "wb", buffering=0) as file:
            pq.write_table(table, file)
            bytes_written[str(path.absolute())] += file.tell()


def write_sizes(plan: PrepPlan, table_sizes: list[int]) -> None:
    """Write README.md with the numbers of rows and the table sizes, as OneFlow's tool does."""
    lines = ["## number of examples:"] + [f"{output.name}: {output.rows}" for output in list_subsets(plan)]
    lines += ["", "## table size array", f"table_size_array = {table_sizes}"]
    write_atomically(plan.folders.unfinished / SIZES, ("\n".join(lines) + "\n").encode())
