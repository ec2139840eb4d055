"""Parquet: columns label, I1, I2 .., C1, C2 ..; subsets train, val and test, or days as in the .npy layout.

A subset or day is one file (train.parquet) or a folder of files (train/*.parquet). Row groups are read whole
through a Python file, so that its bytes are counted and DFTracer sees them; the group read last is kept.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError, os_errors_as_user_errors, printable
from common.memory import refuse_too_large
from dlrm.data import parquet_ids
from dlrm.data.criteo import (
    DAY_NUMBER,
    LABEL,
    META,
    Columns,
    DatasetMeta,
    count_days,
    join_flaws,
    refuse_without_dataset,
)
from dlrm.data.npy import CountingFile, list_stage_rows
from dlrm.data.parquet_footer import read_footer
from dlrm.data.rows import STAGES, Rows, SourceKind, name_batch_argument
from dlrm.data.shuffle import join_rows
from dlrm.runtime.trace import span

FIELD_BYTES = 3 * 4  # in memory: a decoded row group of 64-bit ids, and our arrays of it
NUMBERED = re.compile("([IC])([1-9][0-9]{0,5})")  # the name of a column
FREE_ROWS = 1 << 20  # of a row group, whatever the file's size
ROWS_PER_BYTE = 1  # of a larger one: 40 columns of real rows take many bytes


@dataclass
class ParquetFile:
    path: str
    rows: int
    metadata: Any  # pyarrow's, kept, so that opening again need not read the footer again
    footer: bytes  # what `metadata` was made of


@dataclass
class ParquetLayout:
    folder: str
    files: dict[str, list[ParquetFile]]  # by subset (train, val, test) or by day (0, 1, ...)
    columns: Columns
    table_sizes: list[int] | None = None
    bytes_read: dict[str, int] = field(default_factory=dict)
    shared_ids: bool = False  # OneFlow's form: ids are not rows of tables, counts come without logarithm
    _numbering: parquet_ids.IdNumbering | None = None

    def number_ids(self) -> parquet_ids.IdNumbering | None:
        """Which row of its table an id has; None where ids are rows already. The first call reads all ids."""
        if self.shared_ids and self._numbering is None:
            self._numbering = collect_ids(self)
        return self._numbering

    def split_files(self, stage: str) -> list[tuple[ParquetFile, range]]:
        """The files of a stage, and which rows of each."""
        if stage in self.files:
            return [(file, range(file.rows)) for file in self.files[stage]]
        days = [sum(file.rows for file in files) for files in self.files.values()]
        found = []
        for day, wanted in list_stage_rows(days, stage):
            first = 0
            for file in self.files[str(day)]:
                rows = range(max(wanted.start - first, 0), min(wanted.stop - first, file.rows))
                if len(rows):
                    found.append((file, rows))
                first += file.rows
        return found


def scan_parquet(folder: str | os.PathLike[str]) -> ParquetLayout:
    """Find the files and check their columns; UserError names all that are bad.

    They have the columns that meta.json gives; without one, those of the first file.
    """
    root = Path(folder).absolute()
    meta = DatasetMeta.load(root) if os.path.lexists(root / META) else None
    columns, files, bytes_read = meta.columns if meta else None, {}, {}
    bad: list[str] = []
    for name, stem in find_subsets(root, meta).items():
        one, several = root / f"{stem}.parquet", root / stem
        with os_errors_as_user_errors(several):
            paths = [one] if os.path.lexists(one) else sorted(several.glob("*.parquet"))
        if not paths:
            bad.append(f"{printable(one)} is missing")
        for path in paths:
            try:
                file, columns = open_parquet(str(path), columns, bytes_read)
                files.setdefault(name, []).append(file)
            except (OSError, *DAMAGED) as error:
                bad.append(f"{printable(path)} {describe_error(error)}")
    if bad:
        raise UserError(join_flaws(root, bad) + ": restore these files or make the dataset again")
    assert columns is not None  # a folder without files is bad
    if meta:
        shared = bool(meta.parameters.get("mod_idx"))
    else:
        every = [file for each in files.values() for file in each]
        ranges = parquet_ids.find_id_ranges(every, columns.categorical_names)
        shared = parquet_ids.have_shared_ids(ranges)
    return ParquetLayout(str(root), files, columns, meta.table_sizes if meta else None, bytes_read, shared)


def collect_ids(layout: ParquetLayout) -> parquet_ids.IdNumbering:
    """Read the id columns of all files, once."""
    names = layout.columns.categorical_names
    collector = parquet_ids.IdCollector(len(names), printable(layout.folder))
    for files in layout.files.values():
        for file in files:
            with CountingFile(file.path, layout.bytes_read) as handle:
                for number in range(file.metadata.num_row_groups):
                    refuse_large_group(file, number, layout.columns)
                    try:
                        table = read_group(handle, file, number, names)
                        for column, name in enumerate(names):
                            collector.add(column, to_array(table.column(name).unique(), name, np.int64))
                    except (OSError, *DAMAGED) as error:
                        raise UserError(
                            f"{printable(file.path)}, row group {number}: {describe_error(error)}: "
                            "restore the file"
                        ) from None
    return collector.number_ids()


# what arrow raises for bytes that are not Parquet; its ArrowMemoryError is a MemoryError
DAMAGED = (ValueError, TypeError, KeyError, OverflowError, MemoryError, pa.ArrowException)


def describe_error(error: BaseException) -> str:
    """The first line of arrow's message, or the system's words; not longer than a line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable((text.strip().splitlines() or [type(error).__name__])[0][:200])


def find_subsets(root: Path, meta: DatasetMeta | None = None) -> dict[str, str]:
    """What the folder is made of: name -> file stem."""
    if not root.is_dir():
        raise UserError(f"{printable(root)} is not a folder: give the folder with the Parquet files")
    with os_errors_as_user_errors(root):
        stems = {name.removesuffix(".parquet") for name in os.listdir(root)}
    days = {int(m[1]) for stem in stems if (m := re.fullmatch(f"day_{DAY_NUMBER}", stem))}
    if days:
        return {str(day): f"day_{day}" for day in range(count_days(days, root, meta))}
    if "train" in stems and not stems & {"val", "test"}:
        return {"0": "train"}  # one file, as Kaggle's: a part of it is held out
    if "train" in stems:
        return {stage: stage for stage in STAGES}
    refuse_without_dataset(root)
    raise UserError(
        f"{printable(root)} has neither day_0.parquet nor train.parquet: "
        "make it with dlrm.prep run --format parquet"
    )


def open_parquet(
    path: str, columns: Columns | None, bytes_read: dict[str, int]
) -> tuple[ParquetFile, Columns]:
    """A file with these columns, or with those that its schema has; ValueError for others."""
    with CountingFile(path, bytes_read) as file:
        size = os.fstat(file.fileno()).st_size
        footer = read_footer(file)
    metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    schema = metadata.schema.to_arrow_schema()
    columns = columns or count_columns(schema.names)
    names, ids = columns.names, set(columns.categorical_names)
    missing = [name for name in names if name not in schema.names]
    if missing:
        raise ValueError(f"has no column {', '.join(missing)}")
    for name in names:
        if schema.names.count(name) > 1:
            raise ValueError(f"has several columns {name}")
        kind = schema.field(name).type
        dense = name not in ids
        if not (pa.types.is_integer(kind) or (dense and pa.types.is_floating(kind))):
            raise ValueError(
                f"holds {printable(kind)[:60]} in column {name}, expected {'float' if dense else 'int32'}"
            )
    check_row_groups(metadata, size)
    return ParquetFile(path, metadata.num_rows, metadata, footer), columns


def count_columns(names: list[str]) -> Columns:
    """From the highest number of each kind of name; ValueError where it is impossible."""
    most = {"I": 0, "C": 1}
    for name in names:
        if found := NUMBERED.fullmatch(name):
            most[found[1]] = max(most[found[1]], int(found[2]))
    try:
        return Columns(most["I"], most["C"])
    except UserError:
        raise ValueError(f"has columns I1 to I{most['I']} and C1 to C{most['C']}: too many") from None


def check_row_groups(metadata: Any, size: int) -> None:
    """ValueError where the footer promises rows that the file cannot hold: a row group is read whole.

    Of column chunks pyarrow is not asked: see `parquet_footer`.
    """
    rows = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.num_rows < 0:
            raise ValueError(f"has a damaged footer (row group {number})")
        if group.num_rows > max(FREE_ROWS, ROWS_PER_BYTE * size):
            raise ValueError(f"has a damaged footer ({group.num_rows} rows in row group {number})")
        rows += group.num_rows
    if rows != metadata.num_rows:
        raise ValueError(f"has a damaged footer ({metadata.num_rows} rows, its row groups have {rows})")


@dataclass(frozen=True)
class RowGroup:
    """The part of a row group that belongs to a set."""

    file: ParquetFile
    number: int
    first: int  # its first row, counted in the file
    rows: range  # which of its rows


class ParquetSource:
    random_access = False
    in_memory = False
    contiguous = True  # in step order each of several ranks would read every group

    def __init__(self, layout: ParquetLayout, stage: str) -> None:
        self.batch_key = name_batch_argument(stage)
        self.bytes_read, self.batch = layout.bytes_read, 0
        self.columns = layout.columns
        self.row_bytes = 4 * len(self.columns.names)
        self.numbering = layout.number_ids()
        self.groups: list[RowGroup] = []
        for file, wanted in layout.split_files(stage):
            first = 0
            for number in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(number).num_rows
                rows = range(max(wanted.start - first, 0), min(wanted.stop - first, size))
                if len(rows):
                    refuse_large_group(file, number, self.columns)
                    self.groups.append(RowGroup(file, number, first, rows))
                first += size
        self.starts = np.cumsum([0] + [len(group.rows) for group in self.groups])
        self.rows = int(self.starts[-1])
        self._handle: CountingFile | None = None
        self._held, self._number = None, -1

    def read(self, start: int, stop: int, ahead: int = 0) -> Rows:
        pieces = []
        while start < stop:
            number = int(np.searchsorted(self.starts, start, side="right")) - 1
            low, high = int(self.starts[number]), int(self.starts[number + 1])
            end = min(stop, high)
            pieces.append(self._read_group(number).slice(start - low, end - low))
            start = end
        return pieces[0] if len(pieces) == 1 else join_rows(pieces)

    def _read_group(self, number: int) -> Rows:
        if number != self._number or self._held is None:
            self._held = None  # the old group goes before the new one comes
            group = self.groups[number]
            path = group.file.path
            before = self.bytes_read.get(path, 0)
            with span("data", "read", file=path, **{self.batch_key: self.batch}) as reading:
                table = self._read(group)
                reading.update(bytes=self.bytes_read.get(path, 0) - before)
            try:
                part = table.slice(group.rows.start, len(group.rows))
                self._held = table_to_rows(part, self.columns, self.numbering)
            except DAMAGED as error:
                raise UserError(
                    f"{printable(path)}, row group {group.number}: {describe_error(error)}: make it again"
                ) from None
            self._number = number
        return self._held

    def _read(self, group: RowGroup) -> Any:
        path = group.file.path
        try:
            if self._handle is None or self._handle.path != path:
                self.close()
                self._handle = CountingFile(path, self.bytes_read)
            return read_group(self._handle, group.file, group.number, self.columns.names)
        except (OSError, *DAMAGED) as error:
            raise UserError(
                f"{printable(path)}, row group {group.number}: {describe_error(error)}: restore the file"
            ) from None

    def take(self, rows: np.ndarray) -> Rows:
        raise NotImplementedError("row groups are read in order")

    def load(self, runs: np.ndarray, scattered: bool = False) -> None:
        """Nothing to do: groups are read when they are asked for."""

    def locate_row(self, row: int, part: str) -> str:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        group = self.groups[number]
        return f"{group.file.path}, row {group.first + group.rows.start + row - int(self.starts[number])}"

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def refuse_large_group(file: ParquetFile, number: int, columns: Columns) -> None:
    """UserError where row group `number` of the file does not fit into memory."""
    rows = file.metadata.row_group(number).num_rows
    refuse_too_large(
        rows * FIELD_BYTES * len(columns.names),
        f"{printable(file.path)}: row group {number} of {rows} rows",
        "write the file with smaller row groups",
    )


def read_group(handle: CountingFile, file: ParquetFile, number: int, columns: list[str]) -> Any:
    """Some columns of a row group, as an arrow table."""
    table = pq.ParquetFile(handle, metadata=file.metadata).read_row_group(
        number, columns=columns, use_threads=False
    )
    rows = file.metadata.row_group(number).num_rows
    if table.num_rows != rows:
        raise ValueError(f"holds {table.num_rows} rows, the footer says {rows}")
    return table


def to_array(data: Any, name: str, kind: type) -> np.ndarray:
    """An arrow column -> an array [n]; ValueError on empty values, and on such that do not fit `kind`.

    By the buffers: arrow's own to_numpy imports pandas, in the middle of a training.
    """
    if data.null_count:
        raise ValueError(f"column {name} has {data.null_count} empty values")
    width = np.dtype(kind).itemsize
    data = data.cast(pa.from_numpy_dtype(kind))  # a safe cast: what does not fit is an error
    parts = [
        np.frombuffer(part.buffers()[1], kind, len(part), part.offset * width)
        for part in getattr(data, "chunks", [data])
        if len(part)
    ]
    return np.concatenate([np.empty(0, kind), *parts])


def table_to_rows(table: Any, columns: Columns, numbering: parquet_ids.IdNumbering | None) -> Rows:
    """An arrow table with these columns -> arrays; ValueError on nulls and on ids that do not fit.

    With `numbering`, OneFlow's form: ids become rows of tables, and log(count + 1) is taken, as its model
    does; a count below 0 counts as 0.
    """
    dense = np.empty((table.num_rows, columns.numerical), np.float32)
    sparse = np.empty((table.num_rows, columns.categorical), np.int32)
    for number, name in enumerate(columns.numerical_names):
        dense[:, number] = to_array(table.column(name), name, np.float32)
    if numbering:
        np.log1p(np.maximum(dense, 0, out=dense), out=dense)
    for column, name in enumerate(columns.categorical_names):
        if numbering:
            sparse[:, column] = numbering.find_rows(column, to_array(table.column(name), name, np.int64))
        else:
            sparse[:, column] = to_array(table.column(name), name, np.int32)
    return Rows(dense, sparse, to_array(table.column(LABEL), LABEL, np.int32))


PARQUET = SourceKind(scan_parquet, lambda layout, options: ParquetSource(layout, options.stage))
