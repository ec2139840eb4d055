"""The same pipeline as a PySpark job, for a site with a Spark cluster instead of MPI. It writes the same
bytes.

Spark distributes the rows; parsing of lines, the order of ids and the permutation are shared with the other
engines. All executors must see the input, output and temporary folders. Without a configured master it runs
locally.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.data.criteo import Columns, DatasetMeta
from dlrm.prep.io import inputs, odd_lines, publish
from dlrm.prep.io.columns import choose_columns
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.folders import Folders, Output
from dlrm.prep.io.inputs import InputFile, OutputDay
from dlrm.prep.job.options import PrepOptions
from dlrm.runtime.errors import UserError

BAD = "bad row"
LOCAL = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
}


def run(options: PrepOptions) -> None:
    try:
        from pyspark.sql import SparkSession  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--engine spark needs pyspark: pip install pyspark, and a Java runtime") from None
    found = inputs.find_inputs(options.input_dir, options.dataset)
    options = choose_columns(options, found)
    stamps = inputs.FileStamps(source.path for source in found)
    with Output("run", options.output_dir, options.tmp_dir) as output:
        folders = output.open([], publish.list_result_names(options, found), restart=True)
        meta = start_session(SparkSession, options, found, folders, stamps)
        if not options.keep_tmp:
            output.clear()
    print(publish.describe_dataset(options.output_dir, meta))


def start_session(
    session: Any, options: PrepOptions, found: list[InputFile], folders: Folders, stamps: inputs.FileStamps
) -> DatasetMeta:
    """Set up Spark, make the dataset with it, stop it. `session`: the class pyspark.sql.SparkSession."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    here = str(Path(__file__).parents[3])
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    builder = session.builder.appName("dlrm.prep")
    for name, value in list_settings(options):
        builder = builder.config(name, value)
    if not os.environ.keys() & {"SPARK_MASTER", "MASTER", "SPARK_REMOTE"}:
        builder = builder.master(f"local[{options.workers}]")
        for name, value in LOCAL.items():
            builder = builder.config(name, value)
        builder = builder.config("spark.default.parallelism", options.workers)
    spark = builder.getOrCreate()
    try:
        spark.sparkContext.setLogLevel("ERROR")
        return make_dataset(spark, options, found, folders, stamps)
    finally:
        spark.stop()


def list_settings(options: PrepOptions) -> Iterator[tuple[str, str]]:
    """Spark's names and values for the options of this engine."""
    if options.spark_driver_memory_gb:
        yield "spark.driver.memory", f"{options.spark_driver_memory_gb}g"
    if options.spark_tmp_dir:
        yield "spark.local.dir", str(options.spark_tmp_dir)
    for setting in options.spark_conf:
        name, _, value = setting.partition("=")
        yield name, value


def make_dataset(
    spark: Any, options: PrepOptions, found: list[InputFile], folders: Folders, stamps: inputs.FileStamps
) -> DatasetMeta:
    """Write and publish the dataset. `found`: the input files; `stamps`: of them. `spark`: a session."""
    parsed, counts = zip(*(parse_lines(spark, options, source) for source in found), strict=True)
    outputs = inputs.plan_outputs(found, list(counts), options.steps)
    starts = [0, *itertools.accumulate(counts)]
    shuffled = inputs.count_shuffled_rows(outputs, options.shuffle)
    tables = [table.map(shift_counts(start)) for table, start in zip(parsed, starts, strict=False)]
    whole = spark.sparkContext.union(tables).coalesce(
        max(options.workers, spark.sparkContext.defaultParallelism)
    )
    columns = options.columns
    last_ids = [0] * columns.categorical
    if options.mod_idx:
        last_ids = count_ids(whole, columns)
    elif options.contiguous:
        whole, last_ids = number_ids(whole, options)
    else:
        last_ids = whole.map(lambda item: get_ids(item[1], columns)).reduce(np.maximum).tolist()
    placed = find_places(spark, options, whole, shuffled, folders)
    if options.format == "parquet":
        names = write_parquet(options, placed, outputs, folders, last_ids)
    else:
        write_arrays(options, placed, outputs, shuffled, folders)
        names = list(publish.list_arrays(outputs, options))
    return publish.publish_dataset(names, options, folders, outputs, last_ids, "dlrm.prep, Spark", stamps)


def shift_counts(start: int):
    return lambda item: (item[0] + start, item[1])


def get_ids(record: bytes, columns: Columns) -> np.ndarray:
    return np.frombuffer(record, np.int64)[columns.numerical : -1]


def parse_lines(spark: Any, options: PrepOptions, source: InputFile) -> tuple[Any, int]:
    """Parse an input file. Returns (an RDD of (row number, record), number of rows).

    A record is the bytes of int64 numbers: counts, already shifted for the logarithm, ids, label.
    """
    rules = odd_lines.LineRules(
        options.lenient, source.labelled, options.modulus, options.empty_dense, options.columns
    )
    name, skip = str(source.path), options.skip_bad_rows
    text = spark.read.text(f"file://{source.path.resolve()}", lineSep="\n").rdd
    ends_well = ends_with_newline(source)
    numbered = text.map(lambda row: row[0]).zipWithIndex()

    def parse_one(item: tuple[str, int]) -> Iterator[Any]:
        line, number = item
        try:
            for found in odd_lines.read_line(line.encode("utf-8") + b"\n", rules):
                yield np.array([*found[0], *found[1], found[2]], np.int64).tobytes()
        except odd_lines.BadRow as error:
            yield (BAD, f"{name}:{number + 1}: {error}")

    read = numbered.flatMap(parse_one).cache()
    bad = read.filter(lambda row: isinstance(row, tuple))
    if not skip:
        first = bad.take(1)
        if first:
            raise UserError(first[0][1])
        if not ends_well and not options.lenient:
            raise UserError(f"{name}: no newline at the end: is the file cut short? add one if it is whole")
    table = read.filter(lambda row: not isinstance(row, tuple)).zipWithIndex().map(lambda item: item[::-1])
    count = table.count()
    if not count:
        raise UserError(f"{name}: no rows in it")
    return take_logarithm(table, options, source.path), count


def ends_with_newline(source: InputFile) -> bool:
    if source.compressed:
        return True  # the end of gzip's text is not known; gzip's own checksum finds a truncated file
    with open(source.path, "rb") as file:
        file.seek(max(0, source.path.stat().st_size - 1))
        return file.read(1) == b"\n"


def take_logarithm(table: Any, options: PrepOptions, path: Path) -> Any:
    """Subtract the file's minimum - 2 from its counts, in int32 arithmetic. Logs are taken when writing."""
    from dlrm.prep.job.options import MISSING

    numerical = options.columns.numerical

    def low_high(record: bytes) -> tuple[int, int]:
        counts = np.frombuffer(record, np.int64)[:numerical]
        counts = counts[counts != MISSING] if options.frequency_limit else counts
        return (int(counts.min()), int(counts.max())) if len(counts) else (1 << 40, -(1 << 40))

    low, high = table.values().map(low_high).reduce(lambda a, b: (min(a[0], b[0]), max(a[1], b[1])))
    options.check_counts(path, low, high)
    shift = options.log_shift(low)

    def shift_one(record: bytes) -> bytes:
        numbers = np.frombuffer(record, np.int64).copy()
        counts = numbers[:numerical]
        gaps = counts == MISSING if options.frequency_limit else np.zeros(numerical, bool)
        numbers[:numerical] = np.where(gaps, counts, (counts - shift).astype(np.int32))
        return numbers.tobytes()

    return table.mapValues(shift_one)


def count_ids(whole: Any, columns: Columns) -> list[int]:
    """Where ids are not numbered: for each column the last row of a table for its different ids."""

    def list_cells(item: tuple[int, bytes]) -> Iterator[tuple[int, int]]:
        yield from enumerate(get_ids(item[1], columns).tolist())

    counts = whole.flatMap(list_cells).distinct().countByKey()
    return [counts[column] - 1 for column in sorted(counts)]


def number_ids(whole: Any, options: PrepOptions) -> tuple[Any, list[int]]:
    """Number each column's ids in order of first appearance: one aggregation, one sort, one join.

    Returns (RDD of (row number, record), the largest id of each column).
    """
    least, recipe, columns = options.min_count, bool(options.frequency_limit), options.columns

    def list_cells(item: tuple[int, bytes]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        for column, value in enumerate(get_ids(item[1], columns).tolist()):
            yield (column, value), (item[0], 1)

    seen = whole.flatMap(list_cells).reduceByKey(lambda a, b: (min(a[0], b[0]), a[1] + b[1])).cache()
    kept = seen.filter(lambda item: item[1][1] >= least and not (recipe and item[0][1] == 0))
    ordered = kept.map(lambda item: ((item[0][0], item[1][0]), item[0][1])).sortByKey().zipWithIndex().cache()
    per_column = ordered.map(lambda item: (item[0][0][0], 1)).reduceByKey(lambda a, b: a + b).collectAsMap()
    before = [0, *itertools.accumulate(per_column.get(column, 0) for column in range(columns.categorical))]
    numbers = ordered.map(lambda item: ((item[0][0][0], item[0][1]), 2 + item[1] - before[item[0][0][0]]))

    def list_rows(item: tuple[int, bytes]) -> Iterator[tuple[tuple[int, int], int]]:
        for column, value in enumerate(get_ids(item[1], columns).tolist()):
            yield (column, value), item[0]

    def choose_number(item: Any) -> tuple[int, tuple[int, int]]:
        (column, value), (row, number) = item
        return row, (column, number if number is not None else 0 if recipe and value == 0 else 1)

    def replace_ids(item: Any) -> tuple[int, bytes]:
        row, (record, cells) = item
        values = np.frombuffer(record, np.int64).copy()
        for column, number in cells:
            values[columns.numerical + column] = number
        return row, values.tobytes()

    cells_of_rows = whole.flatMap(list_rows).leftOuterJoin(numbers).map(choose_number).groupByKey()
    return whole.join(cells_of_rows).map(replace_ids), [
        1 + per_column.get(column, 0) for column in range(columns.categorical)
    ]


def find_places(spark: Any, options: PrepOptions, whole: Any, shuffled: int, folders: Folders) -> Any:
    """An RDD of (place in the output, record) from one of (row number, record)."""
    from dlrm.prep.steps.permute import write_places

    places = np.arange(0)
    if shuffled:
        write_places(folders.work_path("places_00000.u32"), shuffled, options.random_seed, lambda count: None)
        with OffsetFile(folders.work_path("places_00000.u32")) as file:
            places = file.read_array(shuffled, 0, np.uint32)
    shared = spark.sparkContext.broadcast(places)
    return whole.map(lambda item: (int(shared.value[item[0]]) if item[0] < shuffled else item[0], item[1]))


def write_arrays(
    options: PrepOptions, placed: Any, outputs: list[OutputDay], shuffled: int, folders: Folders
) -> None:
    """Sort the rows by their place in the output; each partition then writes its ranges of the files."""
    from dlrm.prep.io.output import store_rows

    folder = folders.unfinished
    publish.allocate_arrays(folder, options, outputs)

    def write_runs(items: Iterator[tuple[int, bytes]]) -> None:
        # consecutive places have the same difference to their index: each group is one write
        for _, group in itertools.groupby(enumerate(items), key=lambda pair: pair[1][0] - pair[0]):
            rows = [item for _, item in group]
            arrays = split_records([record for _, record in rows], options.columns)
            store_rows(folder, options, outputs, shuffled, rows[0][0], *arrays)

    placed.sortByKey().foreachPartition(write_runs)
    assert all((folder / name).exists() for name in publish.list_arrays(outputs, options))


def split_records(records: list[bytes], columns: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(counts, ids, labels), all int32 [rows, columns]."""
    numbers = np.frombuffer(b"".join(records), np.int64).reshape(-1, columns.total)
    dense = np.ascontiguousarray(numbers[:, : columns.numerical].astype(np.int32))
    sparse = np.ascontiguousarray(numbers[:, columns.numerical : -1].astype(np.uint32).view(np.int32))
    return dense, sparse, np.ascontiguousarray(numbers[:, -1:].astype(np.int32))


def write_parquet(
    options: PrepOptions, placed: Any, outputs: list[OutputDay], folders: Folders, last_ids: list[int]
) -> list[str]:
    """Write each bucket of rows as the other engine does. Returns the names of the results but README.md."""
    from dlrm.prep.steps.place_parquet import list_names, make_folders, write_bucket, write_sizes
    from dlrm.prep.steps.plan import PrepPlan

    plan = PrepPlan(options, [], [], folders)
    plan.set_outputs(outputs)
    make_folders(plan)

    def write_one(item: tuple[int, Any]) -> None:
        rows = sorted(item[1])
        write_bucket(
            plan, item[0] << plan.bits, *split_records([record for _, record in rows], options.columns)
        )

    placed.map(lambda item: (item[0] >> plan.bits, item)).groupByKey().foreach(write_one)
    write_sizes(plan, publish.compute_table_sizes(last_ids, options))
    return list_names(plan)
