"""Parquet: columns label, I1..I13, C1..C26; subsets train, val and test, or days as in the .npy layout.

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

from dlrm.data.criteo import META, NUM_DENSE, NUM_SPARSE, DatasetMeta
from dlrm.data.npy import CountingFile, rows_of_stage
from dlrm.data.rows import STAGES, Rows, batch_name
from dlrm.data.shuffle import join_rows
from dlrm.runtime.errors import UserError
from dlrm.runtime.trace import span

LABEL = "label"
DENSE = [f"I{n}" for n in range(1, NUM_DENSE + 1)]
SPARSE = [f"C{n}" for n in range(1, NUM_SPARSE + 1)]
COLUMNS = [LABEL, *DENSE, *SPARSE]


@dataclass
class ParquetFile:
    path: str
    rows: int
    metadata: Any  # kept, so that opening again need not read the footer again


@dataclass
class ParquetLayout:
    folder: str
    files: dict[str, list[ParquetFile]]  # by subset (train, val, test) or by day (0, 1, ...)
    table_sizes: list[int] | None = None
    bytes_read: dict[str, int] = field(default_factory=dict)

    def pieces(self, stage: str) -> list[tuple[ParquetFile, range]]:
        """The files of a stage, and which rows of each."""
        if stage in self.files:
            return [(file, range(file.rows)) for file in self.files[stage]]
        days = [sum(file.rows for file in files) for files in self.files.values()]
        found = []
        for day, wanted in rows_of_stage(days, stage):
            first = 0
            for file in self.files[str(day)]:
                rows = range(max(wanted.start - first, 0), min(wanted.stop - first, file.rows))
                if len(rows):
                    found.append((file, rows))
                first += file.rows
        return found


def scan_parquet(folder: str | os.PathLike[str]) -> ParquetLayout:
    """Find the files and check their columns; UserError names all that are bad."""
    root = Path(folder).absolute()
    meta = DatasetMeta.load(root) if (root / META).exists() else None
    layout = ParquetLayout(str(root), {}, meta.table_sizes if meta else None)
    bad: list[str] = []
    for name, stem in find_subsets(root).items():
        one, several = root / f"{stem}.parquet", root / stem
        paths = [one] if one.exists() else sorted(several.glob("*.parquet"))
        if not paths:
            bad.append(f"{one} is missing")
        for path in paths:
            try:
                file = open_parquet(str(path), layout.bytes_read)
                layout.files.setdefault(name, []).append(file)
            except (OSError, ValueError, pa.ArrowException) as error:
                bad.append(f"{path} {str(error).splitlines()[0]}")
    if bad:
        raise UserError("; ".join(bad) + ": restore these files or make the dataset again")
    return layout


def find_subsets(root: Path) -> dict[str, str]:
    """What the folder is made of: name -> file stem."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the folder with the Parquet files")
    stems = {name.removesuffix(".parquet") for name in os.listdir(root)}
    days = [int(m.group(1)) for stem in stems if (m := re.fullmatch(r"day_(\d+)", stem))]
    if days:
        return {str(day): f"day_{day}" for day in range(max(days) + 1)}
    if "train" in stems and not stems & {"val", "test"}:
        return {"0": "train"}  # one file, as Kaggle's: a part of it is held out
    if "train" in stems:
        return {stage: stage for stage in STAGES}
    raise UserError(
        f"{root} has neither day_0.parquet nor train.parquet: make it with dlrm.prep run --format parquet"
    )


def open_parquet(path: str, bytes_read: dict[str, int]) -> ParquetFile:
    with CountingFile(path, bytes_read) as file:
        metadata = pq.read_metadata(file)
    schema = metadata.schema.to_arrow_schema()
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise ValueError(f"has no column {', '.join(missing)}")
    for name in COLUMNS:
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) or (name in DENSE and pa.types.is_floating(kind))):
            raise ValueError(
                f"holds {kind} in column {name}, expected {'float' if name in DENSE else 'int32'}"
            )
    return ParquetFile(path, metadata.num_rows, metadata)


@dataclass(frozen=True)
class RowGroup:
    """The part of a row group that belongs to a set."""

    file: ParquetFile
    number: int
    first: int  # its first row, counted in the file
    rows: range  # which of its rows


class ParquetSource:
    random_access = False
    holds = False
    contiguous = True  # in step order each of several ranks would read every group

    def __init__(self, layout: ParquetLayout, stage: str) -> None:
        self.batch_name = batch_name(stage)
        self.bytes_read, self.batch = layout.bytes_read, 0
        self.row_bytes = 4 * len(COLUMNS)
        self.groups: list[RowGroup] = []
        for file, wanted in layout.pieces(stage):
            first = 0
            for number in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(number).num_rows
                rows = range(max(wanted.start - first, 0), min(wanted.stop - first, size))
                if len(rows):
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
            pieces.append(self._group(number).slice(start - low, end - low))
            start = end
        return pieces[0] if len(pieces) == 1 else join_rows(pieces)

    def _group(self, number: int) -> Rows:
        if number != self._number or self._held is None:
            self._held = None  # the old group goes before the new one comes
            group = self.groups[number]
            path = group.file.path
            before = self.bytes_read.get(path, 0)
            with span("data", "read", file=path, **{self.batch_name: self.batch}) as reading:
                table = self._read(group)
                reading.update(bytes=self.bytes_read.get(path, 0) - before)
            try:
                self._held = table_to_rows(table.slice(group.rows.start, len(group.rows)))
            except (ValueError, pa.ArrowException) as error:
                raise UserError(f"{path}, row group {group.number}: {error}: make it again") from None
            self._number = number
        return self._held

    def _read(self, group: RowGroup) -> Any:
        path = group.file.path
        try:
            if self._handle is None or self._handle.path != path:
                self.close()
                self._handle = CountingFile(path, self.bytes_read)
            file = pq.ParquetFile(self._handle, metadata=group.file.metadata)
            return file.read_row_group(group.number, columns=COLUMNS, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}, row group {group.number}: {error}: restore the file") from error

    def take(self, rows: np.ndarray) -> Rows:
        raise NotImplementedError("row groups are read in order")

    def hold(self, runs: np.ndarray, gaps: bool = False) -> None:
        """Nothing to do: groups are read when they are asked for."""

    def where(self, row: int, part: str) -> str:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        group = self.groups[number]
        return f"{group.file.path}, row {group.first + group.rows.start + row - int(self.starts[number])}"

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def table_to_rows(table: Any) -> Rows:
    """An arrow table with our columns -> arrays; ValueError on nulls and on ids that do not fit."""

    def column(name: str, kind: type) -> np.ndarray:
        """By the buffers: arrow's own to_numpy imports pandas, in the middle of a training."""
        data = table.column(name)
        if data.null_count:
            raise ValueError(f"column {name} has {data.null_count} empty values")
        width = np.dtype(kind).itemsize
        parts = [  # a safe cast: what does not fit is an error
            np.frombuffer(part.buffers()[1], kind, len(part), part.offset * width)
            for part in data.cast(pa.from_numpy_dtype(kind)).chunks
        ]
        return np.concatenate([np.empty(0, kind), *parts])

    dense = np.empty((table.num_rows, NUM_DENSE), np.float32)
    sparse = np.empty((table.num_rows, NUM_SPARSE), np.int32)
    for number, name in enumerate(DENSE):
        dense[:, number] = column(name, np.float32)
    for number, name in enumerate(SPARSE):
        sparse[:, number] = column(name, np.int32)
    return Rows(dense, sparse, column(LABEL, np.int32))
